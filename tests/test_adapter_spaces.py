"""The lora and low_rank spaces against PEFT and explicit weights, on transformers."""

import json
import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bare import adapter_runner, last_logits
from conftest import Make
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from orchestrator import low_rank, noise
from orchestrator.checkpoint import Checkpoint
from orchestrator.config import ConfigError
from orchestrator.engine import Engine
from orchestrator.lora import LoraSpace
from orchestrator.low_rank import LowRankSpace
from orchestrator.records import Probe, StepUpdate

FAMILIES = ["opt", "llama", "qwen3"]
EPS = 0.05
SEQUENCES = [[3, 4, 5, 6, 7], [8, 9, 10], [3, 4, 5, 6, 8], [11, 12, 13, 14, 15, 16]]
SPANS = [(4, 5), (1, 3), (4, 5), (2, 6)]


def probes(count: int, step: int = 0) -> list[Probe]:
    return [
        Probe(step, seed, sign, EPS, (0,)) for seed in range(70, 70 + count) for sign in (1, -1)
    ]


def sums(engine: Engine, adapters: list[str | None]) -> list[list[float]]:
    """Per adapter, the sequences' summed log-probabilities, of one call."""
    scores = engine.score(SEQUENCES, SPANS, adapters=adapters).spans
    size = len(SEQUENCES)
    return [
        [span.sum for span in scores[start : start + size]] for start in range(0, len(scores), size)
    ]


def counted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one with each forward of the engine."""
    forwards: list[Any] = []
    forward = engine._runner.forward

    def noted(batch: Any) -> Any:
        forwards.append(batch)
        return forward(batch)

    monkeypatch.setattr(engine._runner, "forward", noted)
    return forwards


@torch.no_grad()
def reference_sums(model: torch.nn.Module) -> list[float]:
    found = []
    for tokens, (start, end) in zip(SEQUENCES, SPANS, strict=True):
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        found.append(sum(float(logprobs[p - 1, tokens[p]]) for p in range(start, end)))
    return found


def z(seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    count = int(np.prod(shape))
    return torch.from_numpy(noise.draw("gaussian", seed, name, 0, count)).view(shape)


def peft_model(folder: Path, space: LoraSpace, seed: int, scale: float) -> PeftModel:
    """PEFT's model with the space's master, moved by scale * z(seed)."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = space._settings
    config = LoraConfig(
        r=settings.rank, lora_alpha=int(settings.alpha), target_modules=list(settings.modules)
    )
    model = get_peft_model(base, config)
    parameters = {
        name.removeprefix("base_model.model.").replace(".default", ""): value
        for name, value in model.named_parameters()
        if "lora_" in name
    }
    assert parameters.keys() == {tensor.region.name for tensor in space.tensors}
    for tensor in space.tensors:
        name = tensor.region.name
        target = parameters[name]
        moved = tensor.master.cpu().view(target.shape) + scale * z(seed, name, target.shape)
        target.data.copy_(moved)
    return model


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_probes_in_one_forward_equal_peft(
    family: str,
    targets: Any,
    make: Make,
    model_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, space = make(family, kind="lora", rank=4, alpha=8, targets=targets, slots=6)
    assert isinstance(space, LoraSpace)
    space.apply(StepUpdate(0, seeds=(5,), coefficients=(0.1,), decay=1.0))  # B is no longer zero
    space.settle()
    forwards = counted(engine, monkeypatch)
    with closing(space.placed(probes(3))) as groups:
        for group in groups:
            assert len(group) == 6
            losses = sums(engine, [placed.adapter for placed in group])
            assert len(forwards) == 1
            for placed, found in zip(group, losses, strict=True):
                probe = placed.probe
                model = peft_model(model_folders[family], space, probe.seed, probe.sign * probe.eps)
                assert found == pytest.approx(reference_sums(model), abs=1e-4)
    assert len({tuple(found) for found in losses}) == 6
    trained = peft_model(model_folders[family], space, 0, 0.0)
    assert sums(engine, [space.adapter]) == [pytest.approx(reference_sums(trained), abs=1e-4)]
    base = AutoModelForCausalLM.from_pretrained(model_folders[family], dtype=torch.float32)
    assert sums(engine, [None]) == [pytest.approx(reference_sums(base), abs=1e-4)]


def low_rank_z(seed: int, name: str, shape: tuple[int, int], rank: int) -> torch.Tensor:
    left, right = low_rank_factors(seed, name, shape, rank)
    return torch.from_numpy(noise.low_rank(left, right)) / math.sqrt(rank)


def low_rank_factors(
    seed: int, name: str, shape: tuple[int, int], rank: int
) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    left = noise.factor("gaussian", seed, f"{name}.u", 0, shape[0] * rank)
    right = noise.factor("gaussian", seed, f"{name}.v", 0, rank * shape[1])
    return left.reshape(shape[0], rank), right.reshape(rank, shape[1])


def matrices(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Weights of the linear modules inside the layers."""
    return {
        name: value
        for name, value in model.named_parameters()
        if ".layers." in name and value.dim() == 2
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_low_rank_probes_equal_explicit_weights(
    family: str, make: Make, model_folders: dict[str, Path]
) -> None:
    engine, space = make(family, kind="low_rank", rank=2, slots=4)
    assert isinstance(space, LowRankSpace)
    before = space.live_digest()
    base = AutoModelForCausalLM.from_pretrained(model_folders[family], dtype=torch.float32)
    assert set(matrices(base)) == {tensor.region.name for tensor in space.tensors}
    with closing(space.placed(probes(3))) as groups:
        sizes = []
        for group in groups:
            sizes.append(len(group))
            losses = sums(engine, [placed.adapter for placed in group])
            for placed, found in zip(group, losses, strict=True):
                probe = placed.probe
                model = AutoModelForCausalLM.from_pretrained(
                    model_folders[family], dtype=torch.float32
                )
                for name, value in matrices(model).items():
                    shape = (value.shape[0], value.shape[1])
                    value.data += probe.sign * EPS * low_rank_z(probe.seed, name, shape, 2)
                assert found == pytest.approx(reference_sums(model), abs=1e-4)
    assert sizes == [4, 2]
    assert space.live_digest() == before
    assert sums(engine, [space.adapter]) == [pytest.approx(reference_sums(base), abs=1e-4)]


@pytest.mark.parametrize(
    ("others", "dtype", "master", "refresh"),
    [("frozen", "float32", "float32", 1), ("dense", "bfloat16", "bfloat16", 4)],
)
def test_a_replay_of_low_rank_steps_takes_many_in_a_pass(
    others: str,
    dtype: str,
    master: str,
    refresh: int,
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the same bits as one by one, and probes of a state that waits are those of the state."""
    monkeypatch.setattr(low_rank, "MASTERS_OVER_FACTORS", 1)
    choices = {"others": others, "master": master, "refresh": refresh}
    found, passes = [], []
    for is_fused in (False, True):
        engine, space = make("llama", dtype=dtype, kind="low_rank", rank=2, slots=2, **choices)
        assert isinstance(space, LowRankSpace)
        table = space._trained._table
        sweep = table.low_rank_update
        taken: list[int] = []

        def counted(
            factors: Any,
            updates: Sequence[StepUpdate],
            sweep: Any = sweep,
            taken: list[int] = taken,
        ) -> None:
            taken.append(len(updates))
            sweep(factors, updates)

        monkeypatch.setattr(table, "low_rank_update", counted)
        seen: list[Any] = []
        for step in range(12):
            number = (1, 2, 0, 3)[step % 4]
            seeds = tuple(range(10 * step, 10 * step + number))
            space.apply(StepUpdate(step, seeds, (0.05, -0.1, 0.2)[:number], 0.99))
            if not is_fused:
                space.settle()
            if step == 9:
                with closing(space.placed(probes(1, step=10))) as groups:
                    for group in groups:
                        seen.append(sums(engine, [placed.adapter for placed in group]))
        seen += [space.digest(), space.live_digest()]
        found.append(seen)
        passes.append(taken)
    assert found[0] == found[1]
    assert passes == [[1] * 12, [10, 2]]


def test_low_rank_updates_are_the_explicit_sum(make: Make, model_folders: dict[str, Path]) -> None:
    """The same bits as the specification, and the live weights follow."""
    _, space = make("llama", kind="low_rank", rank=3)
    assert isinstance(space, LowRankSpace)
    checkpoint = Checkpoint(model_folders["llama"])
    space.apply(StepUpdate(0, seeds=(5, 6), coefficients=(0.5, -0.25), decay=0.875))
    space.settle()
    for tensor in space.tensors:
        name = tensor.region.name
        initial = checkpoint.read(name).numpy()
        total = np.full_like(initial, -0.0)
        for seed, coefficient in ((5, 0.5), (6, -0.25)):
            shape = (initial.shape[0], initial.shape[1])
            left, right = low_rank_factors(seed, name, shape, 3)
            weight = noise.low_rank_coefficient(coefficient, 3)
            total = total + weight * noise.low_rank(left, right)
        expected = initial * np.float32(0.875) + total
        assert np.array_equal(tensor.master.cpu().numpy().reshape(expected.shape), expected)
        assert torch.equal(tensor.live, tensor.master)


def test_right_factors_are_kept_for_refresh_steps(make: Make) -> None:
    _, space = make("llama", kind="low_rank", rank=2, refresh=3, slots=2)
    assert isinstance(space, LowRankSpace)
    matrix = space._matrices[0]
    drawn = []
    for step in range(6):
        with closing(space.placed(probes(1, step))) as groups:
            next(groups)
            drawn.append([slots[0].clone() for slots in (matrix.left_slots, matrix.right_slots)])
            assert torch.equal(matrix.left_slots[1], -matrix.left_slots[0])  # the pair's factors
            assert torch.equal(matrix.right_slots[1], matrix.right_slots[0])
    rights = [right for _, right in drawn]
    assert torch.equal(rights[0], rights[2]) and torch.equal(rights[3], rights[5])
    assert not torch.equal(rights[2], rights[3])


def test_probes_that_do_not_fit_one_forward_take_few_of_equal_shape(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch holds the same sequences under all adapters, so both signs see the same shapes."""
    engine, space = make("opt", kind="lora", rank=2, slots=8, targets=["v_proj"])
    sequences = [[3, 4, 5, 6, token, 7] for token in range(8, 17)] * 4
    sequences = [[*tokens, index % 17, 5] for index, tokens in enumerate(sequences)]
    spans = [(7, 8)] * len(sequences)
    forwards = counted(engine, monkeypatch)
    with closing(space.placed(probes(4))) as groups:
        (group,) = groups
        adapters = [placed.adapter for placed in group]
        together = engine.score(sequences, spans, adapters=adapters).spans
        assert 1 < len(forwards) <= 6
        for batch in forwards:
            lengths = batch.extend_seq_lens.tolist()
            size = len(lengths) // 8
            assert all(lengths[i * size : (i + 1) * size] == lengths[:size] for i in range(8))
        alone = engine.score(sequences[:1], spans[:1], adapters=adapters[3:4]).spans
    assert together[3 * len(sequences)].sum == pytest.approx(alone[0].sum, abs=1e-4)


@pytest.mark.slow
def test_slots_leave_no_entries_and_no_memory_behind(make: Make) -> None:
    engine, space = make("llama", kind="lora", rank=2, slots=4, targets="all-linear")
    assert isinstance(space, LoraSpace)
    manager = engine._runner.model_runner.lora_manager
    free = engine.free_slots()
    held = [id(buffer) for layers in manager.memory_pool.A_buffer.values() for buffer in layers]
    for step in range(300):
        with closing(space.placed(probes(4, step))) as groups:
            for group in groups:
                sums(engine, [placed.adapter for placed in group])
        space.apply(StepUpdate(step, seeds=(step,), coefficients=(1e-4,), decay=1.0))
        space.settle()
        assert engine.free_slots() == free
    assert engine._pools.cache.total_size() == 0
    assert len(manager.loras) == 5
    buffers = [id(buffer) for layers in manager.memory_pool.A_buffer.values() for buffer in layers]
    assert buffers == held


def test_base_weights_stay_untouched(make: Make) -> None:
    engine, space = make("qwen3", kind="lora", rank=2, targets="all-linear")
    before = {name: value.clone() for name, value in engine.model.named_parameters()}
    with closing(space.placed(probes(6))) as groups:
        for group in groups:
            sums(engine, [placed.adapter for placed in group])
    space.apply(StepUpdate(0, seeds=(1,), coefficients=(0.5,), decay=0.5))
    space.settle()
    for name, value in engine.model.named_parameters():
        assert torch.equal(value, before[name]), name


def test_first_values_are_peft_s(make: Make) -> None:
    """B zero; A evenly spread within 1 / sqrt(inputs), as kaiming_uniform_(a=sqrt(5)) is."""
    engine, space = make("llama", kind="lora", rank=8, targets="all-linear")
    assert isinstance(space, LoraSpace)
    assert sums(engine, [space.adapter]) == sums(engine, [None])
    for tensor in space.tensors:
        values = tensor.master
        if tensor.region.name.endswith("lora_B.weight"):
            assert not values.any()
            continue
        reference = torch.empty(8, tensor.shard.full_columns)
        torch.nn.init.kaiming_uniform_(reference, a=math.sqrt(5))
        assert values.abs().max() <= 1 / math.sqrt(tensor.shard.full_columns)
        assert float(values.std()) == pytest.approx(float(reference.std()), rel=0.1)
        assert abs(float(values.mean())) < 0.1 * float(values.std())


@pytest.mark.slow
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_adapter_scores_the_same_in_peft_and_in_sglang(
    family: str, targets: Any, make: Make, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    engine, space = make(family, kind="lora", rank=4, alpha=8, targets=targets)
    assert isinstance(space, LoraSpace)
    space.apply(StepUpdate(0, seeds=(5, 6), coefficients=(0.1, 0.05), decay=1.0))
    space.settle()
    expected = sums(engine, [space.adapter])[0]
    space.export(model_folders[family], tmp_path / "tuned")
    base = AutoModelForCausalLM.from_pretrained(model_folders[family], dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "tuned"))
    assert reference_sums(loaded) == pytest.approx(expected, abs=1e-4)
    modules = json.loads((tmp_path / "tuned" / "adapter_config.json").read_text())["target_modules"]
    runner = adapter_runner(model_folders[family], [tmp_path / "tuned"], modules)
    for tokens in SEQUENCES:  # the logits behind each sequence, as SGLang's own loader gives them
        logits = last_logits(runner, [tokens], ["tuned"])[0]
        with torch.no_grad():
            reference = loaded(torch.tensor([tokens])).logits[0, -1]
        torch.testing.assert_close(logits, reference, atol=1e-4, rtol=0)
    runner.close()

    again_engine, again = make(
        family, kind="lora", rank=4, alpha=8, targets=targets, init=str(tmp_path / "tuned")
    )
    assert again.digest() == space.digest()
    assert sums(again_engine, [again.adapter])[0] == pytest.approx(expected, abs=1e-6)


def test_an_exported_low_rank_model_scores_the_same(
    make: Make, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    engine, space = make("opt", kind="low_rank", rank=2)
    space.apply(StepUpdate(0, seeds=(5, 6), coefficients=(0.01, 0.02), decay=1.0))
    space.settle()
    space.export(model_folders["opt"], tmp_path / "tuned")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.float32)
    assert reference_sums(loaded) == pytest.approx(sums(engine, [None])[0], abs=1e-4)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"targets": ["q_proj", "w_proj"]},
            r"space\.targets: w_proj: .* there are: down_proj, gate",
        ),
        ({"slots": 10**8}, r"space\.slots: 100000000 slots of .* MiB do not fit .*; \d+ do"),
        ({"init": "nowhere"}, r"space\.init: nowhere: no PEFT adapter"),
        ({"rank": 2, "init": "ADAPTER"}, r"space\.init: .*: has rank 4; space\.rank is 2"),
        ({"rank": 4, "alpha": 2, "init": "ADAPTER"}, r"has alpha 8; space\.alpha is 2"),
        (
            {"rank": 4, "alpha": 8, "init": "ADAPTER"},
            r"has targets \['q_proj'\]; space\.targets is",
        ),
        (
            {"rank": 4, "alpha": 8, "init": "ADAPTER", "targets": ["q_proj"]},
            r"space\.init: .*q_proj\.lora_.*: shape .* in the adapter, .* in the model",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    space: dict[str, Any], message: str, make: Make, tmp_path: Path
) -> None:
    if space.get("init") == "ADAPTER":  # of a base model of another width
        base = OPTForCausalLM(OPTConfig(hidden_size=32, num_attention_heads=4, vocab_size=17))
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
        renamed = {
            name.replace("base_model.model.model.decoder.", "base_model.model.model."): value
            for name, value in get_peft_model_state_dict(get_peft_model(base, config)).items()
            if ".layers.0." in name or ".layers.1." in name
        }
        config.save_pretrained(str(tmp_path / "adapter"))
        save_file(renamed, tmp_path / "adapter" / "adapter_model.safetensors")
        space = {**space, "init": str(tmp_path / "adapter")}
    with pytest.raises(ConfigError, match=message) as caught:
        make("llama", kind="lora", **space)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["lora", "low_rank"])
def test_modules_that_adapters_do_not_reach_are_refused(kind: str, make: Make) -> None:
    """Phi-3's checkpoint holds fused matrices, whose members have no names of their own."""
    with pytest.raises(ConfigError, match="adapters reach 0 of the model's 2 gate_up_proj"):
        make("phi3", kind=kind)
