"""Our OPT against SGLang's own, on random weights of the family's shapes; a table of medians.

    python -m benchmarks.opt_forward [SIZE ...]

Both classes run in this process, turn by turn, so that what slows the machine slows both. A turn
scores 16 sequences of 64 tokens. `forward` is the model alone, or the replay that stands for it;
`call` is all of Engine.score.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator import dist_patch, environment

NUM_THREADS = 2
environment.prepare(NUM_THREADS)

import torch  # noqa: E402

from benchmarks.measure import DEVICE, DTYPE, ON_GPU, header, medians, now, paired  # noqa: E402
from benchmarks.shapes import SHAPES  # noqa: E402

dist_patch.apply(DEVICE)

from sglang.srt.models import opt as sglang_opt  # noqa: E402
from sglang.srt.models.registry import ModelRegistry  # noqa: E402

from orchestrator.engine import Engine  # noqa: E402
from orchestrator.opt_native import OPTForCausalLM  # noqa: E402

NUM_SEQUENCES, NUM_TOKENS = 16, 64
NUM_TURNS = 30 if ON_GPU else 14
NUM_WARMUPS = 2
DEFAULT_SIZES = ["125m", "1.3b", "13b"] if ON_GPU else ["125m"]


class Timed:
    """Stands in for an engine's runner or graphs, and keeps how long each forward takes."""

    def __init__(self, original: Any, forwards: list[float]) -> None:
        self._original = original
        self._forwards = forwards

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def forward(self, batch: Any) -> Any:
        return self._timed(self._original.forward, batch)

    def run(self, batch: Any) -> Any:
        return self._timed(self._original.run, batch)

    def _timed(self, call: Callable[[Any], Any], batch: Any) -> Any:
        started = now()
        output = call(batch)
        self._forwards.append(now() - started)
        return output


@contextmanager
def registered(model_class: type) -> Iterator[None]:
    """Within, OPT is loaded as this class."""
    before = ModelRegistry.models["OPTForCausalLM"]
    ModelRegistry.models["OPTForCausalLM"] = model_class
    try:
        yield
    finally:
        ModelRegistry.models["OPTForCausalLM"] = before


def load(
    size: str,
    folder: Path,
    model_class: type,
    *,
    cuda_graphs: bool = False,
    score_graphs: bool = False,
) -> Engine:
    SHAPES[f"opt-{size}"].config.save_pretrained(folder)
    with registered(model_class):
        engine = Engine(
            str(folder),
            dtype=DTYPE,
            device=DEVICE,
            kv_tokens=4 * NUM_SEQUENCES * NUM_TOKENS,
            threads=NUM_THREADS,
            cuda_graphs=cuda_graphs,
            score_graphs=score_graphs,
            load_format="dummy",
        )
    assert type(engine.model) is model_class
    return engine


def measure(engines: dict[str, Engine], vocabulary: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds of a forward and of a call, per engine."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, vocabulary, (NUM_SEQUENCES, NUM_TOKENS + 1), generator=generator)
    sequences, spans = tokens.tolist(), [(NUM_TOKENS, NUM_TOKENS + 1)] * NUM_SEQUENCES
    taken_by: dict[str, list[float]] = {name: [] for name in engines}
    for name, engine in engines.items():
        attribute = "_runner" if engine._graphs is None else "_graphs"
        setattr(engine, attribute, Timed(getattr(engine, attribute), taken_by[name]))
    calls = {
        name: lambda engine=engine: engine.score(sequences, spans)
        for name, engine in engines.items()
    }
    taken = medians(paired(calls, NUM_TURNS, NUM_WARMUPS))
    forwards = medians({name: times[NUM_WARMUPS:] for name, times in taken_by.items()})
    return {name: (1e3 * forwards[name], 1e3 * taken[name]) for name in engines}


def compare(size: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        engines = {
            "SGLang's opt.py": load(size, Path(folder), sglang_opt.OPTForCausalLM),
            "ours": load(size, Path(folder), OPTForCausalLM),
        }
        if ON_GPU:
            engines |= {
                "ours, prefill graphs": load(size, Path(folder), OPTForCausalLM, cuda_graphs=True),
                "ours, score graphs": load(size, Path(folder), OPTForCausalLM, score_graphs=True),
            }
        times = measure(engines, SHAPES[f"opt-{size}"].config.vocab_size)
    base = times["SGLang's opt.py"]
    for name, (forward, call) in times.items():
        print(
            f"{size:6s} {name:22s} forward {forward:8.2f} ms ({base[0] / forward:4.2f}x) "
            f"call {call:8.2f} ms ({base[1] / call:4.2f}x)",
            flush=True,
        )
    for engine in engines.values():
        engine.close()


if __name__ == "__main__":
    print(header())
    for size in sys.argv[1:] or DEFAULT_SIZES:
        compare(size)
