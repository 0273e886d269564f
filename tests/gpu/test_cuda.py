"""What only a GPU can show: its sweeps' bits are numba's, and ledgers replay alike on both devices.

The other tests of the suite run on the GPU too where there is one (see conftest.DEVICE). Run with
`python -m pytest tests/gpu`, and without the last argument for everything.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import noise, sweeps_cuda, sweeps_numba
from orchestrator.noise import TensorRegion
from orchestrator.records import StepUpdate
from orchestrator.sweeps import Draw, Slice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).parent.parent.parent
MASTERS = [torch.float32, torch.bfloat16]
LIVES = [torch.float32, torch.bfloat16, torch.float16]
REGION = TensorRegion("model.layers.0.mlp.up_proj.weight", 5 * 1000 + 3, 1000)


def tensors(master: torch.dtype, live: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A master [37, 413], and a live view of that shape inside something wider."""
    torch.manual_seed(0)
    wide = torch.full((37, 500), 7.0, dtype=live)
    return (0.05 * torch.randn(37, 413)).to(master), wide[:, 20 : 20 + 413]


def on_gpu(master: torch.Tensor, live: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    assert live._base is not None
    return master.cuda(), live._base.cuda()[:, 20 : 20 + 413]


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("master_dtype", MASTERS)
@pytest.mark.parametrize("live_dtype", LIVES)
def test_sweeps_equal_the_cpus(
    kind: noise.NoiseKind, master_dtype: torch.dtype, live_dtype: torch.dtype
) -> None:
    cpu, gpu = tensors(master_dtype, live_dtype), on_gpu(*tensors(master_dtype, live_dtype))
    tables = (
        sweeps_numba.Table([Slice(REGION, *cpu)]),
        sweeps_cuda.Table([Slice(REGION, *gpu)]),
    )
    for table in tables:
        table.perturb(kind, [Draw(2**63 + 5, 1e-3)])
    assert torch.equal(cpu[1], gpu[1].cpu())
    updates = [
        StepUpdate(
            step,
            tuple(range(num_seeds)),
            tuple(1e-4 * index for index in range(num_seeds)),
            0.999,
        )
        for step, num_seeds in enumerate((17, 0, 1))
    ]
    for table in tables:
        table.update(kind, updates, then=Draw(7, -1e-3))
    assert torch.equal(cpu[0], gpu[0].cpu())
    assert torch.equal(cpu[1], gpu[1].cpu())
    for live in (False, True):
        assert tables[0].digests(live=live) == tables[1].digests(live=live)
    assert gpu[1]._base is not None
    assert torch.equal(gpu[1]._base[:, :20].cpu(), torch.full((37, 20), 7.0, dtype=live_dtype))


def run_demo(folder: Path, *overrides: str) -> dict[str, Any]:
    command = ["train", "configs/demo.yaml", f"run.dir={folder}", *overrides]
    done = subprocess.run(
        [sys.executable, "launch.py", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


@pytest.mark.slow
def test_the_demo_learns_on_the_gpu_and_replays_on_the_cpu(tmp_path: Path) -> None:
    folder = tmp_path / "gpu"
    summary = run_demo(folder, "model.device=cuda", "fleet.num_replicas=1")
    assert summary["final_accuracy"] >= summary["baseline_accuracy"] + 0.12
    replay = tmp_path / "cpu"
    replay.mkdir()
    for name in ("config.yaml", "ledger.jsonl", "metrics.jsonl"):
        (replay / name).write_bytes((folder / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "launch.py", "train", "--resume", str(replay), "model.device=cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((replay / "summary.json").read_text())["digest"] == summary["digest"]


@pytest.mark.slow
def test_memory_is_given_back(
    engines: Callable[[str], Any], model_folders: dict[str, Path]
) -> None:
    engine_class = type(engines("llama"))

    def build_and_close() -> int:
        engine = engine_class(
            str(model_folders["opt"]), dtype="bfloat16", device="cuda", kv_tokens=4096
        )
        engine.score([[3, 4, 5]], [(1, 3)])
        engine.close()
        return torch.cuda.memory_allocated()

    after_first = build_and_close()
    for _ in range(5):
        after_last = build_and_close()
    assert after_last <= after_first * 1.01
