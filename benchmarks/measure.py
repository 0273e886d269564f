"""What the benchmarks share: the device, clocks, paired turns, the machine's rates, tables, files.

Times are taken turn by turn, so that what slows the machine slows everything that is compared.
Knows nothing of models. Imports torch: `environment.prepare()` must have run before.
"""

import gc
import json
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
import triton

from orchestrator import dist_patch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
DTYPE = "bfloat16" if ON_GPU else "float32"
RESULTS = Path(__file__).with_name("results")

COPY_BYTES = 4 * 2**30 if ON_GPU else 2**26
MATRIX_SIZE = 8192 if ON_GPU else 256
RATE_TURNS = 10


# ---------------------------------------------------------------- clocks


def synchronise() -> None:
    """Wait for what the device has been given to do."""
    if ON_GPU:
        torch.cuda.synchronize()


def now() -> float:
    """Seconds of a clock, once the device is idle."""
    synchronise()
    return time.perf_counter()


def seconds(call: Callable[[], object]) -> float:
    """How long a call and the device's work for it take."""
    started = now()
    call()
    return now() - started


def paired(
    calls: Mapping[str, Callable[[], object]], turns: int, warmups: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call in each turn; the order of the calls alternates.

    The first turns, in which kernels are compiled, are not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-warmups, turns):
        for name in calls if turn % 2 == 0 else reversed(list(calls)):
            taken = seconds(calls[name])
            if turn >= 0:
                times[name].append(taken)
    return times


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median seconds of each call."""
    return {name: statistics.median(values) for name, values in times.items()}


def ratio(times: Mapping[str, Sequence[float]], numerator: str, denominator: str) -> float:
    """Median over turns of one call's time in units of another's."""
    pairs = zip(times[numerator], times[denominator], strict=True)
    return statistics.median(first / second for first, second in pairs)


class Stopwatch:
    """Adds up the time that is spent inside of `running`, while it is switched on.

    Switched off, it does not wait for the device, which would change what is measured around it.
    """

    def __init__(self) -> None:
        self.is_on = False
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        if not self.is_on:
            yield
            return
        started = now()
        yield
        self.seconds += now() - started

    def split(self, call: Callable[[], object], turns: int) -> tuple[float, float]:
        """Median seconds of a call that are spent inside of `running`, and outside."""
        inside, outside = [], []
        self.is_on = True
        for _ in range(turns):
            self.seconds = 0.0
            taken = seconds(call)
            inside.append(self.seconds)
            outside.append(taken - self.seconds)
        self.is_on = False
        return statistics.median(inside), statistics.median(outside)


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- the machine


@cache
def copy_rate() -> float:
    """Bytes a second that a large copy on the device reads and writes."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = paired({"copy": lambda: target.copy_(source)}, RATE_TURNS)
    return 2 * COPY_BYTES / medians(times)["copy"]


@cache
def matrix_rate() -> float:
    """Floating-point operations a second of a large bfloat16 matrix product."""
    shape = (MATRIX_SIZE, MATRIX_SIZE)
    left, right = (torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    output = torch.empty_like(left)
    times = paired({"product": lambda: torch.mm(left, right, out=output)}, RATE_TURNS)
    return float(2 * MATRIX_SIZE**3 / medians(times)["product"])


def hardware() -> str:
    """The GPU's name, or how many threads compute on the CPU."""
    if ON_GPU:
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """What the measured code stands on."""
    return {
        "sglang": dist_patch.SGLANG_VERSION,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }


def date() -> str:
    """Today, in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d")


@cache
def commit() -> str:
    """The checkout's commit, marked where files differ from it; "unknown" outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return "unknown"
    return found.stdout.strip()


# ---------------------------------------------------------------- what is shown and kept


def header() -> str:
    """One line that says where and when, and of what, numbers were taken."""
    shown = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{hardware()}, {DTYPE}, {shown}, {date()}, commit {commit()}"


def rates() -> str:
    """One line with the machine's rates, measured now."""
    return (
        f"copy {copy_rate() / 1e9:.0f} GB/s read and written, "
        f"bfloat16 products {matrix_rate() / 1e12:.2f} TFLOP/s"
    )


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns side by side: text to the left, numbers (two decimals) to the right."""
    cells = [
        [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    texts = [isinstance(cell, str) for cell in rows[0]] if rows else [True] * len(columns)
    for line in (list(columns), *cells):
        padded = [
            cell.ljust(width) if is_text else cell.rjust(width)
            for cell, width, is_text in zip(line, widths, texts, strict=True)
        ]
        print("  ".join(padded).rstrip(), flush=True)


def write_results(name: str, rows: Sequence[Mapping[str, Any]], folder: Path = RESULTS) -> Path:
    """Keep rows, and all that says what they are worth, as NAME-HARDWARE.json."""
    slug = re.sub(r"[^a-z0-9]+", "-", hardware().lower()).strip("-")
    path = folder / f"{name}-{slug}.json"
    content = {
        "date": date(),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
        "dtype": DTYPE,
        "copy_bytes_per_second": copy_rate(),
        "bfloat16_operations_per_second": matrix_rate(),
        "rows": list(rows),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path
