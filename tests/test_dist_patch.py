"""Each patch: the symptom without it, and its absence with it."""

import functools
import inspect
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICE
from sglang.srt.distributed import bootstrap
from sglang.srt.layers.attention import torch_native_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.lora import layers as lora_layers
from sglang.srt.lora import utils as lora_utils
from sglang.srt.model_executor import model_runner
from torch.nn.functional import scaled_dot_product_attention

from orchestrator import dist_patch
from orchestrator.engine import Engine

ROOT = Path(__file__).parent.parent
WITHOUT_DRIVER = not torch.cuda.is_available()
Engines = Callable[[str], Engine]

# A process with none of the patches but those that let it start on this machine; it prints what
# it sees, one line a symptom.
WITHOUT_CPU_ENGINE = """
import sys
from orchestrator import dist_patch
dist_patch.stand_in_for_sgl_kernel()
from orchestrator.engine import Engine
Engine(sys.argv[1], dtype="float32", device="cpu", kv_tokens=64)
"""
UNPATCHED = """
import sys
from orchestrator import dist_patch
model, device, port = sys.argv[1:]
if device == "cpu":
    dist_patch.use_cpu_engine(), dist_patch.stand_in_for_sgl_kernel()
import orchestrator.opt_native
print("registry", "sglang.srt.models.registry" in sys.modules, flush=True)
from sglang.srt.distributed import bootstrap
from sglang.srt.lora import utils
from orchestrator.engine import Engine

def tell(label, call):
    try:
        print(label, call() or "passes", flush=True)
    except Exception as error:
        print(label, type(error).__name__, str(error).splitlines()[0], flush=True)

def build():
    global engine
    engine = Engine(model, dtype="float32", device=device, kv_tokens=64)

def pin():
    from sglang.srt.lora.layers import get_lora_layer
    get_lora_layer(engine.model.model.layers[0].self_attn.qkv_proj, None)

def join(rank, size):
    url = f"tcp://127.0.0.1:{port}"
    bootstrap.init_distributed_environment(
        backend="gloo", world_size=size, rank=rank, distributed_init_method=url
    )

tell("lora", lambda: sorted(dist_patch.OPT_MODULES - utils._KNOWN_LORA_TARGET_MODULES))
tell("rows", lambda: [n for n in ("fc2",) if n not in utils.ROW_PARALLELISM_LINEAR_LORA_NAMES])
tell("port", lambda: join(0, 1))
tell("first", build)
tell("pin", pin)
tell("rank", lambda: join(1, 2))
tell("second", build)
"""
PATCHED = """
import sys
from orchestrator import dist_patch
print(*dist_patch.apply(sys.argv[2]))
from orchestrator import runner
runner.UNUSED_PORT = int(sys.argv[3])  # taken, but then no port is used at all
from orchestrator.engine import Engine
for _ in range(2):
    engine = Engine(sys.argv[1], dtype="float32", device=sys.argv[2], kv_tokens=64)
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
    replaced = bootstrap.initialize_model_parallel
    assert first == dist_patch.apply(DEVICE)
    assert bootstrap.initialize_model_parallel is replaced
    assert {"reuse_world", "reuse_process_groups", "replace_expert_locations"} <= set(first)


def test_every_patch_says_when_it_can_go() -> None:
    for name in dist_patch.apply(DEVICE):
        described = getattr(dist_patch, name).__doc__
        for part in ("Symptom:", "Cause:", f"Seen in {dist_patch.SGLANG_VERSION}.", "Can go when"):
            assert part in described, f"{name}: {part}"


def test_another_sglang_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.6.0")
    with pytest.raises(RuntimeError, match=r"for sglang 0\.5\.17, found 0\.6\.0"):
        dist_patch.apply("cpu")


@pytest.mark.parametrize("replacement", [None, lambda: None])
def test_a_target_that_looks_different_is_refused(
    replacement: Callable[[], None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if replacement is None:
        monkeypatch.delattr(bootstrap, "initialize_model_parallel")
    else:
        monkeypatch.setattr(bootstrap, "initialize_model_parallel", replacement)
    with pytest.raises(RuntimeError, match=r"initialize_model_parallel .*: dist_patch is for"):
        dist_patch.reuse_process_groups()


@pytest.mark.slow
def test_the_symptoms_are_there_without_the_patches(model_folders: dict[str, Path]) -> None:
    """A release of SGLang that mends one of them fails here: then its patch can go."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = python(UNPATCHED, str(model_folders["llama"]), DEVICE, str(port), reuse="false")
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert told["registry"] == "False"  # importing our OPT registers nothing, anywhere
    assert told["lora"] == "['fc1', 'fc2']", done.stderr
    assert told["rows"] == "['fc2']"
    assert "EADDRINUSE" in told["port"]
    assert told["first"] == "passes"
    if WITHOUT_DRIVER:
        assert "RuntimeError" in told["pin"]
    assert told["rank"] == "passes"  # as another rank than it is
    assert "tensor model parallel group is already initialized" in told["second"]


@pytest.mark.slow
def test_with_the_patches_a_second_runner_starts(model_folders: dict[str, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = python(PATCHED, str(model_folders["llama"]), DEVICE, str(port))
    names, answer = done.stdout.splitlines()[-2:]
    assert (names.split()[-3:], answer) == (
        ["reuse_world", "reuse_process_groups", "replace_expert_locations"],
        "2",
    ), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not WITHOUT_DRIVER, reason="this machine has a CUDA driver")
def test_without_the_cpu_engine_rotary_embeddings_want_vllm(
    model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE")
    done = python(WITHOUT_CPU_ENGINE, str(model_folders["llama"]))
    assert "vllm" in done.stderr.splitlines()[-1], done.stderr


def test_without_the_variable_process_groups_are_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_ALLOW_REUSE_DISTRIBUTED", "false")
    assert not {"reuse_world", "reuse_process_groups", "replace_expert_locations"} & set(
        dist_patch.apply(DEVICE)
    )


@pytest.mark.skipif(not WITHOUT_DRIVER, reason="this machine has a CUDA driver")
def test_absent_kernels_say_so_when_called() -> None:
    done = python("import sgl_kernel")  # the stand-in is of this process alone
    assert "libcuda.so.1" in done.stderr  # the symptom
    with pytest.raises(RuntimeError, match=r"sgl_kernel\.rmsnorm was called, but sgl_kernel needs"):
        sys.modules["sgl_kernel"].rmsnorm(1, 2)


@pytest.mark.skipif(not WITHOUT_DRIVER, reason="this machine has a CUDA driver")
def test_memory_cannot_be_pinned_without_a_device() -> None:
    values = torch.ones(3)
    assert values.pin_memory() is values
    assert lora_layers.torch.tensor([1], pin_memory=True).tolist() == [1]
    with pytest.raises(RuntimeError):  # where SGLang asks by itself whether it can
        torch.tensor([1], pin_memory=True)


def test_attention_computes_new_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged sequences with and without cached tokens, two queries a key head."""
    torch.manual_seed(0)
    cached, new = [5, 0, 300, 7], [3, 4, 1, 9]
    lengths = [a + b for a, b in zip(cached, new, strict=True)]
    queries = torch.randn(sum(new), 4, 8)
    keys, values = torch.randn(2, 400, 2, 8)
    slots = torch.zeros(6, 320, dtype=torch.int32)
    order = torch.randperm(400)
    for number, length in enumerate(lengths):
        slots[number + 1, :length] = order[:length]
    tables = (slots, *map(torch.tensor, ([1, 2, 3, 4], lengths, cached, new)))
    seen: list[int] = []

    def counted(query: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        seen.append(query.shape[2])
        return scaled_dot_product_attention(query, *others, **named)

    monkeypatch.setattr(torch_native_backend, "scaled_dot_product_attention", counted)
    attend = TorchNativeAttnBackend._run_sdpa_forward_extend
    outputs, rows = [], []
    for function in (inspect.unwrap(attend), attend):
        output = torch.full_like(queries, float("nan"))
        named = {"scaling": 0.3, "enable_gqa": True, "causal": True}
        function(None, queries, output, keys, values, *tables, None, **named)
        outputs.append(output)
        rows.append(seen[-len(new) :])
    assert rows == [lengths, new]  # the symptom, and its absence
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(DEVICE != "cpu", reason="attention of another backend")
def test_sglang_calls_attention_in_a_way_that_the_patch_knows(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It decides which arguments it passes by their places."""
    engine, seen = engines("llama"), set[int]()

    def noted(query: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        seen.add(query.shape[2])
        return scaled_dot_product_attention(query, *others, **named)

    monkeypatch.setattr(torch_native_backend, "scaled_dot_product_attention", noted)
    context = [3 + number % 20 for number in range(40)]
    engine.score([[*context, 3, 4]], [(41, 42)], "a state")
    engine.score([[*context, 5, 6, 7]], [(41, 43)], "a state")
    assert seen == {41, 2}


def test_a_target_that_sglang_decorates_is_replaced_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stock = bootstrap.initialize_model_parallel.__wrapped__

    @functools.wraps(stock)
    def decorated(tensor_model_parallel_size: int) -> None:
        raise AssertionError("stock")

    monkeypatch.setattr(bootstrap, "initialize_model_parallel", decorated)
    dist_patch.reuse_process_groups()
    assert bootstrap.initialize_model_parallel is not decorated


def test_expert_locations_are_replaced(engines: Engines) -> None:
    engines("llama")
    set_metadata = model_runner.set_global_expert_location_metadata
    before = model_runner.get_global_expert_location_metadata()
    try:
        set_metadata("a runner's")
        with pytest.raises(AssertionError):  # the symptom
            set_metadata.__wrapped__("the next one's")
        set_metadata("the next one's")
        assert model_runner.get_global_expert_location_metadata() == "the next one's"
    finally:
        set_metadata(before)


def test_groups_of_another_size_are_refused(engines: Engines) -> None:
    engines("llama")  # makes the process's groups, for tp_size 1
    with pytest.raises(RuntimeError, match=r"tp_size 1; a runner with tp_size 2 needs"):
        bootstrap.initialize_model_parallel(tensor_model_parallel_size=2)


def test_another_rank_is_refused(engines: Engines) -> None:
    engines("llama")
    with pytest.raises(RuntimeError, match=r"is rank 0 of 1; a runner that is rank 1 of tp_size 2"):
        bootstrap.init_distributed_environment(world_size=2, rank=1, backend="gloo")


def test_other_models_do_not_get_opt_s_modules(engines: Engines) -> None:
    """They may have modules of these names, for whose sizes they cannot answer."""
    model: Any = engines("llama").model
    opt: Any = engines("opt").model
    model.fc1 = opt.model.layers[0].fc1
    try:
        assert not dist_patch.OPT_MODULES & lora_utils.auto_detect_lora_target_modules(model)
    finally:
        del model.fc1
    assert lora_utils.ROW_PARALLELISM_LINEAR_LORA_NAMES.count("fc2") == 1
