"""Each patch: the symptom without it, in a fresh process, and its absence with it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import DEVICE
from sglang.srt.distributed import bootstrap

from orchestrator import dist_patch
from orchestrator.engine import Engine

ROOT = Path(__file__).parent.parent
NO_DRIVER = subprocess.run(
    [sys.executable, "-c", "import ctypes; ctypes.CDLL('libcuda.so.1')"], capture_output=True
).returncode
BUILD_TWO = """
import sys
from orchestrator.engine import Engine
for _ in range(2):
    engine = Engine(sys.argv[1], dtype="float32", device=sys.argv[2], kv_tokens=64)
    print("built", flush=True)
print(engine.score([[3, 4, 5]], [(1, 3)]).num_tokens)
"""


def python(program: str, *arguments: str, reuse: str = "true") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env={**os.environ, "SGLANG_ALLOW_REUSE_DISTRIBUTED": reuse},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_apply_is_idempotent_and_says_what_it_did() -> None:
    first = dist_patch.apply(DEVICE)
    assert first == dist_patch.apply(DEVICE)
    assert {"reuse_process_groups", "replace_expert_locations"} <= set(first)


def test_another_sglang_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.6.0")
    with pytest.raises(RuntimeError, match=r"for sglang 0\.5\.17, found 0\.6\.0"):
        dist_patch.apply("cpu")


@pytest.mark.skipif(not NO_DRIVER, reason="this machine has a CUDA driver")
def test_absent_kernels_say_so_when_called() -> None:
    done = python("import sgl_kernel")  # the stand-in is of this process alone
    assert "libcuda.so.1" in done.stderr  # the symptom
    done = python(
        "from orchestrator import dist_patch; print(dist_patch.apply('cpu'))\n"
        "from sgl_kernel import rmsnorm\n"
        "rmsnorm(1, 2)"
    )
    assert "stand_in_for_sgl_kernel" in done.stdout
    assert "RuntimeError: sgl_kernel.rmsnorm was called, but sgl_kernel needs" in done.stderr


@pytest.mark.slow
def test_a_second_runner_needs_the_patches(model_folders: dict[str, Path]) -> None:
    """Without the variable the process groups are stock SGLang's, and the symptom is there."""
    program = "from orchestrator import dist_patch; import sys\n"
    program += "dist_patch.apply(sys.argv[2])\n" + BUILD_TWO
    folder = str(model_folders["llama"])
    done = python(program, folder, DEVICE, reuse="false")
    assert done.stdout.count("built") == 1
    assert "tensor model parallel group is already initialized" in done.stderr
    done = python(program, folder, DEVICE, reuse="true")
    assert done.stdout.split() == ["built", "built", "2"], done.stderr


def test_groups_of_another_size_are_refused(engines: Callable[[str], Engine]) -> None:
    engines("llama")  # makes the process's groups, for tp_size 1
    with pytest.raises(RuntimeError, match=r"tp_size 1; a runner with tp_size 2 needs"):
        bootstrap.initialize_model_parallel(tensor_model_parallel_size=2)
