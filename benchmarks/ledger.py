"""The ledger at length: what a step's append costs, and opening and reading all of it.

  .venv/bin/python -m benchmarks.ledger [--steps 1000000] [--seeds 16] [--folder /tmp]

Appends are timed without fsync, which is the disk's to answer for. Takes 1.5 kB of disk a step.
"""

import argparse
import os
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np

from orchestrator.noise import derive_seed
from orchestrator.seed_sync import Header, Ledger, StepRecord

HEADER = Header(1, 1, "none", "", "", "", ())
TEMPLATES = 64  # different records, used in turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "ledger.jsonl"
        print(f"{arguments.steps:,} steps of {arguments.seeds} seeds")
        append(path, arguments.steps, arguments.seeds)
        print(f"file: {path.stat().st_size / 1e9:.2f} GB")
        reopen(path)


def records(num_seeds: int) -> list[StepRecord]:
    """Records whose numbers are as long as real ones."""
    draw = np.random.default_rng(0)
    made = []
    for step in range(TEMPLATES):
        losses = draw.normal(0.7, 0.01, (num_seeds, 2))
        coefficients = (draw.normal(0, 1e-6, num_seeds)).astype(np.float32)
        made.append(
            StepRecord(
                step,
                tuple(derive_seed(0, step, index) for index in range(num_seeds)),
                tuple((float(plus), float(minus)) for plus, minus in losses),
                tuple(map(float, coefficients)),
                1.0,
                1e-3,
                1e-6,
                "0123456789abcdef",
            )
        )
    return made


def append(path: Path, steps: int, num_seeds: int) -> None:
    templates = records(num_seeds)
    times = np.zeros((2, steps), np.float32)
    before = resident()
    with patch.object(os, "fsync", lambda _: None), Ledger.create(path, HEADER) as ledger:
        for step in range(steps):
            record = replace(templates[step % TEMPLATES], step=step)
            wall, busy = time.perf_counter(), time.thread_time()
            ledger.append(record)
            times[:, step] = time.perf_counter() - wall, time.thread_time() - busy
    tenth = max(1, steps // 10)
    for name, part in (("first", times[:, :tenth]), ("last", times[:, -tenth:])):
        for clock, values in zip(("wall", "processor"), part, strict=True):
            middle, most = 1e6 * np.percentile(values, [50, 99])
            print(f"append, {name} tenth, {clock}: median {middle:.0f} us, p99 {most:.0f} us")
    print(f"append, resident: {before:.0f} MB before, {resident():.0f} MB after")


def reopen(path: Path) -> None:
    before, started, busy = resident(), time.perf_counter(), time.process_time()
    with Ledger.open(path, HEADER) as ledger:
        print(
            f"open: {time.perf_counter() - started:.1f} s, processor "
            f"{time.process_time() - busy:.1f} s, for {ledger.next_step:,} steps"
        )
        print(f"open, resident: {before:.0f} MB before, {resident():.0f} MB after")
        started, busy = time.perf_counter(), time.process_time()
        number = sum(len(record.update().seeds) for record in ledger.records)
        print(
            f"read: {time.perf_counter() - started:.1f} s, processor "
            f"{time.process_time() - busy:.1f} s, for {number:,} seeds; {resident():.0f} MB after"
        )
        started = time.perf_counter()
        assert ledger.records[-1].step == ledger.next_step - 1
        print(f"read the last: {1e3 * (time.perf_counter() - started):.2f} ms")
    print(f"peak resident: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")


def resident() -> float:
    """Megabytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main()
