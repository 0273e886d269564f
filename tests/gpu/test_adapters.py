"""Adapter slots on a GPU: our kernels, a base in 8 bits, and low-rank sums with the CPU's bits."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from test_adapter_kernels import INTERLEAVED, PLAIN, RANKS, SEGMENTS, Batch, check_products
from test_adapter_spaces import SEQUENCES, SPANS, peft_model, probes, reference_sums, sums
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from orchestrator import adapter_kernels, sweeps_cuda, sweeps_numba
from orchestrator.adapter_kernels_triton import Slice as Columns
from orchestrator.adapter_kernels_triton import cut_rows, expand, shrink
from orchestrator.checkpoint import Checkpoint
from orchestrator.config import Config
from orchestrator.engine import Engine
from orchestrator.lora import LoraSpace
from orchestrator.noise import TensorRegion
from orchestrator.records import Probe, StepUpdate
from orchestrator.sampling import Sampling
from orchestrator.spaces import SpacePlan
from orchestrator.sweeps import Factors, Slice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("master_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 4, 8, 16])
def test_low_rank_updates_equal_the_cpus(master_dtype: torch.dtype, rank: int) -> None:
    torch.manual_seed(0)
    master = (0.05 * torch.randn(37, 413)).to(master_dtype)
    left = torch.randint(-112, 113, (5, 37, rank), dtype=torch.int8)
    right = torch.randint(-112, 113, (5, rank, 413), dtype=torch.int8)
    region = TensorRegion("model.layers.0.mlp.up_proj.weight", 5003, 1000)
    results = []
    for sweeps, device in ((sweeps_numba, "cpu"), (sweeps_cuda, "cuda")):
        held = master.to(device, copy=True)
        live = torch.empty_like(held, dtype=torch.bfloat16)
        table = sweeps.Table([Slice(region, held, live)])
        factors = Factors(left.to(device), right.to(device))
        coefficients = (1e-3, -2e-3, 3e-4, 0.0, 5e-3)
        steps = [
            StepUpdate(7, (1, 2), coefficients[:2], 0.999),
            StepUpdate(8, (3, 4, 5), coefficients[2:], 0.99),
        ]
        table.low_rank_update([factors], steps)
        table.low_rank_update([factors], [StepUpdate(9, (1, 2, 3, 4, 5), coefficients, 1.0)])
        results.append((held.cpu(), live.cpu()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_an_adapter_trains_over_a_base_in_8_bits(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Scores near those over bfloat16, slots that differ, and a step that is felt."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    sequences, spans = [[3, 4, 5, 6, 7, 8], [9, 10, 11]], [(1, 6), (1, 3)]
    found = {}
    for quantization in (None, "fp8"):
        values = {
            **recipe,
            "model": {
                "path": str(tmp_path),
                "dtype": "bfloat16",
                "quantization": quantization,
            },
            "space": {"kind": "lora", "rank": 8, "slots": 4},
        }
        plan = SpacePlan(Config.model_validate(values), Checkpoint(tmp_path))
        engine = Engine(
            str(tmp_path),
            dtype="bfloat16",
            device="cuda",
            kv_tokens=1024,
            quantization=quantization,
            adapters=plan.adapters,
        )
        space = plan.build(engine)
        space.apply(StepUpdate(0, seeds=(1,), coefficients=(0.05,), decay=1.0))
        space.settle()
        probes = [Probe(1, 7, sign, 0.05, (0,)) for sign in (1, -1)]
        with closing(space.placed(probes)) as groups:
            adapters = [placed.adapter for placed in next(groups)]
            scores = engine.score(sequences, spans, adapters=[*adapters, space.adapter, None])
            found[quantization] = [span.mean for span in scores.spans]
        engine.close()
    assert found["fp8"] == pytest.approx(found[None], abs=0.1)
    assert len(set(found["fp8"][::2])) == 4  # plus, minus, trained, base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", RANKS)
def test_products_are_the_plain_sums(rank: int, dtype: torch.dtype) -> None:
    check_products("cuda", SEGMENTS, rank, dtype)


@pytest.mark.parametrize("batch", [INTERLEAVED, PLAIN])
def test_products_of_any_order_are_the_plain_sums(batch: Batch) -> None:
    check_products("cuda", batch, 8, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_products_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    x, a, b, base = drawn(500, 8192), drawn(2, 24, 8192), drawn(2, 1024, 8), drawn(500, 1024)
    slices = (Columns(0, 0, 512), Columns(1, 512, 768), Columns(2, 768, 1024))

    def products(rows: slice, lengths: list[int], slots: list[int]) -> torch.Tensor:
        tiles = cut_rows(lengths, slots, [0.01, 0.01])
        tiles = tiles._replace(table=tiles.table.cuda())
        output = base[rows].clone()
        expand(shrink(x[rows].contiguous(), a, tiles), b, output, tiles, slices)
        return output

    whole = products(slice(0, 500), [200, 300], [0, 1])
    assert torch.equal(whole, products(slice(0, 500), [200, 300], [0, 1]))
    alone = [
        products(slice(row, row + 1), [1], [int(row >= 200)]) for row in (0, 63, 199, 200, 499)
    ]
    assert torch.equal(whole[[0, 63, 199, 200, 499]], torch.cat(alone))
    assert torch.equal(whole[190:230], products(slice(190, 230), [10, 30], [0, 1]))


def adapted_engine(
    folder: Path, recipe: dict[str, Any], dtype: str, cuda_graphs: bool = False, **space: Any
) -> tuple[Engine, LoraSpace]:
    """An engine and a space whose adapter is no longer zero."""
    values = {
        **recipe,
        "model": {"path": str(folder), "dtype": dtype},
        "space": {"kind": "lora", "targets": "all-linear", **space},
    }
    plan = SpacePlan(Config.model_validate(values), Checkpoint(folder))
    engine = Engine(
        str(folder),
        dtype=dtype,
        device="cuda",
        kv_tokens=4096,
        cuda_graphs=cuda_graphs,
        adapters=plan.adapters,
    )
    made = plan.build(engine)
    assert isinstance(made, LoraSpace)
    made.apply(StepUpdate(0, seeds=(5,), coefficients=(0.1,), decay=1.0))
    return engine, made


def backend(engine: Engine) -> Any:
    return engine._runner.model_runner.lora_manager.lora_backend


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_layers_equal_peft(
    family: str, recipe: dict[str, Any], model_folders: dict[str, Path]
) -> None:
    """Six adapters and none in one batch, in float32."""
    folder = model_folders[family]
    engine, space = adapted_engine(folder, recipe, "float32", rank=4, alpha=8, slots=6)
    assert backend(engine).name == adapter_kernels.BACKEND
    assert len(backend(engine)._activated) == (2 if family == "llama" else 0)
    with closing(space.placed(probes(3))) as groups:
        (group,) = groups
        *found, plain = sums(engine, [*(placed.adapter for placed in group), None])
        for placed, adapted in zip(group, found, strict=True):
            probe = placed.probe
            model = peft_model(folder, space, probe.seed, probe.sign * probe.eps)
            assert adapted == pytest.approx(reference_sums(model), abs=1e-4)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert plain == pytest.approx(reference_sums(base), abs=1e-4)
    engine.close()


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_layers_in_bfloat16_are_as_near_as_sglangs(
    targets: Any,
    recipe: dict[str, Any],
    model_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Errors against PEFT in float32, of SGLang's kernels and of ours."""
    folder = model_folders["llama"]
    errors = []
    for name in ("triton", "segments"):
        monkeypatch.setattr(adapter_kernels, "BACKEND", name)
        engine, space = adapted_engine(folder, recipe, "bfloat16", rank=8, slots=4, targets=targets)
        assert backend(engine).name == name
        with closing(space.placed(probes(2))) as groups:
            (group,) = groups
            found = sums(engine, [placed.adapter for placed in group])
            wanted = [
                reference_sums(
                    peft_model(folder, space, placed.probe.seed, placed.probe.sign * 0.05)
                )
                for placed in group
            ]
        difference = torch.tensor(found) - torch.tensor(wanted)
        errors.append(float(difference.square().mean().sqrt()))
        engine.close()
    assert max(errors[1:]) < 2 * errors[0] + 0.02, errors


def test_graphs_do_not_change_continuations(
    recipe: dict[str, Any], model_folders: dict[str, Path]
) -> None:
    folder = model_folders["llama"]
    engines = [
        adapted_engine(folder, recipe, "float32", cuda_graphs, rank=4, slots=2)[0]
        for cuda_graphs in (False, True)
    ]
    eager, captured = (engine.generate(SEQUENCES, Sampling(16)) for engine in engines)
    assert captured == eager
    scores = [engine.score(SEQUENCES, SPANS).spans for engine in engines]
    assert [span.sum for span in scores[1]] == pytest.approx(
        [span.sum for span in scores[0]], abs=1e-4
    )
    for engine in engines:
        engine.close()
