"""Our OPT against SGLang's own, on random weights of the family's shapes; a table of medians.

    python -m benchmarks.opt_forward [SIZE ...]

Both classes run in this process, turn by turn, so that what slows the machine slows both. A turn
scores 16 sequences of 64 tokens. `forward` is the model alone; `call` is all of Engine.score.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator import dist_patch, environment

NUM_THREADS = 2
environment.prepare(NUM_THREADS)

import torch  # noqa: E402
from transformers import OPTConfig  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
dist_patch.apply(DEVICE)

from sglang.srt.models import opt as sglang_opt  # noqa: E402
from sglang.srt.models.registry import ModelRegistry  # noqa: E402

from orchestrator.engine import Engine  # noqa: E402
from orchestrator.opt_native import OPTForCausalLM  # noqa: E402

NUM_SEQUENCES, NUM_TOKENS = 16, 64
NUM_TURNS = 30 if DEVICE == "cuda" else 14
SHAPES = {  # hidden size, layers, heads
    "tiny": (64, 2, 4),
    "125m": (768, 12, 12),
    "1.3b": (2048, 24, 32),
    "13b": (5120, 40, 40),
}
DEFAULT_SIZES = ["125m", "1.3b", "13b"] if DEVICE == "cuda" else ["125m"]
DTYPE = "bfloat16" if DEVICE == "cuda" else "float32"


class Stopwatch:
    """Wraps an engine's runner and adds up the time of its forwards."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def forward(self, batch: Any) -> Any:
        started = now()
        output = self._runner.forward(batch)
        self.seconds += now() - started
        return output


def now() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def registered(model_class: type) -> Iterator[None]:
    """Within, OPT is loaded as this class."""
    before = ModelRegistry.models["OPTForCausalLM"]
    ModelRegistry.models["OPTForCausalLM"] = model_class
    try:
        yield
    finally:
        ModelRegistry.models["OPTForCausalLM"] = before


def load(size: str, folder: Path, model_class: type, cuda_graphs: bool) -> Engine:
    hidden, layers, heads = SHAPES[size]
    OPTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=4 * hidden,
        architectures=["OPTForCausalLM"],
    ).save_pretrained(folder)
    with registered(model_class):
        engine = Engine(
            str(folder),
            dtype=DTYPE,
            device=DEVICE,
            kv_tokens=4 * NUM_SEQUENCES * NUM_TOKENS,
            threads=NUM_THREADS,
            cuda_graphs=cuda_graphs,
            load_format="dummy",
        )
    assert type(engine.model) is model_class
    return engine


def measure(engines: dict[str, Engine]) -> dict[str, tuple[float, float]]:
    """Median milliseconds of a forward and of a call, per engine."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 50000, (NUM_SEQUENCES, NUM_TOKENS + 1), generator=generator)
    sequences, spans = tokens.tolist(), [(NUM_TOKENS, NUM_TOKENS + 1)] * NUM_SEQUENCES
    forwards: dict[str, list[float]] = {name: [] for name in engines}
    calls: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(NUM_TURNS + 2):
        order = list(engines.items())
        for name, engine in order if turn % 2 else reversed(order):
            watch = engine._runner = Stopwatch(engine._runner)  # type: ignore[assignment]
            started = now()
            engine.score(sequences, spans)
            if turn >= 2:  # the first compile kernels
                calls[name].append(now() - started)
                forwards[name].append(watch.seconds)
            engine._runner = watch._runner
    return {
        name: (1e3 * statistics.median(forwards[name]), 1e3 * statistics.median(calls[name]))
        for name in engines
    }


def compare(size: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        engines = {
            "SGLang's opt.py": load(size, Path(folder), sglang_opt.OPTForCausalLM, False),
            "ours": load(size, Path(folder), OPTForCausalLM, False),
        }
        if DEVICE == "cuda":
            engines["ours, prefill graphs"] = load(size, Path(folder), OPTForCausalLM, True)
        medians = measure(engines)
    base = medians["SGLang's opt.py"]
    for name, (forward, call) in medians.items():
        print(
            f"{size:6s} {name:22s} forward {forward:8.2f} ms ({base[0] / forward:4.2f}x) "
            f"call {call:8.2f} ms ({base[1] / call:4.2f}x)",
            flush=True,
        )
    for engine in engines.values():
        engine.close()


if __name__ == "__main__":
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {NUM_THREADS} threads"
    print(f"{where}, {DTYPE}, sglang {dist_patch.SGLANG_VERSION}, torch {torch.__version__}")
    for size in sys.argv[1:] or DEFAULT_SIZES:
        compare(size)
