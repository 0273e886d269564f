"""Masters in pinned memory, on a GPU: the bits of masters beside the live weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from host_runs import config, run, same

from orchestrator import host_master, space
from orchestrator.host_master import StreamLane
from orchestrator.noise import TensorRegion
from orchestrator.records import StepUpdate
from orchestrator.sweeps import Draw, Slice, Table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SMALL_CHUNK = 4096  # of some 100,000 parameters
DELAY = 1_000_000  # clock ticks; some half a millisecond


@pytest.mark.parametrize(
    ("family", "dtype", "slow"),
    [
        ("opt", "bfloat16", "load"),
        ("opt", "bfloat16", "sweep"),
        ("qwen3", "float32", "store"),
        ("llama", "bfloat16", None),
    ],
)
def test_a_replica_answers_as_with_its_master_on_the_gpu(
    family: str,
    dtype: str,
    slow: str | None,
    recipe: dict[str, Any],
    model_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever of copies and sweeps is the slowest."""
    folder = model_folders[family]
    expected = run(config(recipe, folder, dtype, "float32"), "cuda")
    monkeypatch.setattr(host_master, "SMALLEST_CHUNK", SMALL_CHUNK)
    if slow is not None:
        monkeypatch.setattr(host_master, "_streams", delayed(slow))
    assert same(run(config(recipe, folder, dtype, "host"), "cuda"), expected)


def delayed(slow: str) -> Callable[..., host_master.Lanes]:
    original = host_master._streams

    def streams(buffers: list[torch.Tensor]) -> host_master.Lanes:
        lanes = original(buffers)
        lane = getattr(lanes, slow)
        assert isinstance(lane, StreamLane)
        run = lane.run

        def run_late(work: Callable[[], object]) -> None:
            run(lambda: torch.cuda._sleep(DELAY))  # type: ignore[no-untyped-call]
            run(work)

        lane.run = run_late  # type: ignore[method-assign]
        return lanes

    return streams


def test_large_chunks_and_a_tensor_that_spans_them() -> None:
    """Copies that take long, of as many bytes as real models have."""
    values = torch.randn(1, 40_000_000, device="cuda").bfloat16()
    region = TensorRegion("model.embed_tokens.weight", 0, 4000)
    parts = [Slice(region, values.float(), values.clone()) for _ in range(2)]
    tables: list[Table] = [
        space.table(parts[:1]),
        host_master.HostTable(parts[1:], [0], chunk_elements=2**22),
    ]
    for step in range(3):
        update = StepUpdate(step, (step,), (0.5,), 0.9)
        for table in tables:
            table.update("gaussian", [update], Draw(step + 7, 0.1))
            table.perturb("gaussian", [Draw(step + 7, -0.1)])
        assert torch.equal(parts[0].live, parts[1].live)
    assert tables[0].digests() == tables[1].digests()
