"""Several runners in one process: each keeps its own settings, and a closed one leaves nothing."""

import gc
import os
import random
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, VOCABULARY, renamed
from sglang.srt.runtime_context import get_context, get_schedule, get_server_args
from transformers import OPTConfig, OPTForCausalLM

from orchestrator.config import ConfigError
from orchestrator.engine import Engine
from orchestrator.runner import World
from orchestrator.sampling import Sampling

Engines = Callable[[str], Engine]
FAMILIES = ["opt", "llama", "qwen3"]


def test_interleaved_runners_give_their_own_losses(engines: Engines) -> None:
    sequences, spans = [[3, 4, 5, 6], [7, 8, 9]], [(1, 4), (2, 3)]
    alone = {family: engines(family).score(sequences, spans) for family in FAMILIES}
    assert len({scores.spans[0].sum for scores in alone.values()}) == len(FAMILIES)
    draw = random.Random(0)
    for _ in range(50):
        family = draw.choice(FAMILIES)
        assert engines(family).score(sequences, spans) == alone[family]
        assert get_server_args() is engines(family)._runner._arguments


def test_what_sglang_changed_in_a_runner_s_settings_is_there_when_it_runs_again(
    engines: Engines,
) -> None:
    first, second = engines("opt")._runner, engines("llama")._runner
    first.activate()
    before = get_schedule().max_running_requests
    get_context().override("test", max_running_requests=7)
    second.activate()
    assert get_schedule().max_running_requests == before
    first.activate()
    assert get_schedule().max_running_requests == 7
    get_context().override("test", max_running_requests=before)


def test_a_runner_that_fails_to_start_disturbs_no_other(
    engines: Engines, tmp_path: Path, model_folders: dict[str, Path]
) -> None:
    expected = engines("opt").score([[3, 4, 5]], [(1, 3)])
    folder = renamed(model_folders["opt"], tmp_path / "bad", lambda name: name.replace("fc1", "x"))
    with pytest.raises(ConfigError, match="no place in the model"):
        Engine(str(folder), dtype="bfloat16", device=DEVICE, kv_tokens=64)
    assert torch.get_default_dtype() == torch.float32
    assert get_server_args() is not engines("opt")._runner._arguments
    assert engines("opt").score([[3, 4, 5]], [(1, 3)]) == expected
    assert get_server_args() is engines("opt")._runner._arguments


def test_a_runner_of_another_world_is_refused_and_disturbs_no_other(
    engines: Engines, model_folders: dict[str, Path]
) -> None:
    engines("opt")
    before = dict(os.environ)
    with pytest.raises(RuntimeError, match=r"is rank 0 of 1; a runner that is rank 1 of tp_size 2"):
        Engine(
            str(model_folders["opt"]),
            dtype="float32",
            device=DEVICE,
            kv_tokens=64,
            world=World(1, 2, "file:///tmp/nowhere"),
        )
    assert dict(os.environ) == before
    Engine(str(model_folders["opt"]), dtype="float32", device=DEVICE, kv_tokens=64).close()


@pytest.mark.skipif(DEVICE != "cpu", reason="threads are a CPU's")
def test_each_runner_keeps_its_number_of_threads(model_folders: dict[str, Path]) -> None:
    made = {
        threads: Engine(
            str(model_folders["opt"]), dtype="float32", device="cpu", kv_tokens=64, threads=threads
        )
        for threads in (1, 2)
    }
    for threads in (1, 2, 1):
        made[threads].score([[3, 4, 5]], [(1, 3)])
        assert torch.get_num_threads() == threads
    for engine in made.values():
        engine.close()
        engine.close()  # once more does no harm


def test_runners_may_differ_in_dtype_and_pool(model_folders: dict[str, Path]) -> None:
    folder = str(model_folders["llama"])
    choices = [("float32", 64), ("bfloat16", 512), ("float16", 128)]
    made = [
        Engine(folder, dtype=dtype, device=DEVICE, kv_tokens=kv_tokens, threads=2)
        for dtype, kv_tokens in choices
    ]
    losses = [engine.score([[3, 4, 5, 6]], [(1, 4)]).spans[0].sum for engine in made]
    assert losses == pytest.approx([losses[0]] * 3, abs=0.1)
    for engine, (dtype, kv_tokens) in zip(made, choices, strict=True):
        assert next(engine.model.parameters()).dtype == getattr(torch, dtype)
        assert engine.free_slots()[0] == pytest.approx(kv_tokens, abs=2)
        engine.close()


def memory() -> float:
    """Bytes that the process holds, on the device that the engines use."""
    gc.collect()
    if DEVICE == "cuda":
        return float(torch.cuda.memory_reserved())
    num_pages = Path("/proc/self/statm").read_text().split()[1]
    return float(num_pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_twenty_rounds_of_build_use_close_leave_memory_flat(tmp_path: Path) -> None:
    """Each round holds 100 MB of weights and pool, so that a leak of any of it would show."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=512,
        ffn_dim=2048,
        num_hidden_layers=6,
        num_attention_heads=8,
    )
    OPTForCausalLM(config).save_pretrained(tmp_path)
    after = []
    for _ in range(22):
        engine = Engine(str(tmp_path), dtype="float32", device=DEVICE, kv_tokens=1024, threads=2)
        engine.score([[3, 4, 5, 6]] * 8, [(1, 4)] * 8, "a state")
        engine.generate([[3, 4, 5]], Sampling(4))
        parts = [weakref.ref(engine.model), weakref.ref(engine._pools.allocator)]
        engine.close()
        del engine
        after.append(memory())
        assert all(part() is None for part in parts)
    settled, last = after[1], after[-1]  # the first rounds fill caches that stay
    assert last <= 1.01 * settled, [f"{value / 1e6:.0f} MB" for value in after]


def test_a_world_is_checked() -> None:
    with pytest.raises(ValueError, match="rank=2"):
        World(rank=2, size=2, rendezvous="file:///tmp/anything")
    with pytest.raises(ValueError, match="rendezvous"):
        World(rank=0, size=2)
