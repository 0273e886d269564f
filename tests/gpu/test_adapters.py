"""Adapter slots on a GPU: over a base in 8 bits, and low-rank sums with the CPU's bits."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator import sweeps_numba, sweeps_triton
from orchestrator.checkpoint import Checkpoint
from orchestrator.config import Config
from orchestrator.engine import Engine
from orchestrator.noise import TensorRegion
from orchestrator.records import Probe, StepUpdate
from orchestrator.spaces import SpacePlan
from orchestrator.sweeps import Factors, Slice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("master_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_low_rank_updates_equal_the_cpus(master_dtype: torch.dtype, rank: int) -> None:
    torch.manual_seed(0)
    master = (0.05 * torch.randn(37, 413)).to(master_dtype)
    left, right = torch.randn(5, 37, rank), torch.randn(5, rank, 413)
    region = TensorRegion("model.layers.0.mlp.up_proj.weight", 5003, 1000)
    results = []
    for sweeps, device in ((sweeps_numba, "cpu"), (sweeps_triton, "cuda")):
        held = master.to(device, copy=True)
        live = torch.empty_like(held, dtype=torch.bfloat16)
        table = sweeps.Table([Slice(region, held, live)])
        factors = Factors(left.to(device), right.to(device))
        coefficients = (1e-3, -2e-3, 3e-4, 0.0, 5e-3)
        table.low_rank_update([factors], StepUpdate(7, (1, 2, 3, 4, 5), coefficients, 0.999))
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
