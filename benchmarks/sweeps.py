"""The noise sweeps over all tensors of a model's shape, beside a copy of as many bytes.

    python -m benchmarks.sweeps [SHAPE] [--threads N] [--results FOLDER]

One row a sweep: median milliseconds, the bytes that it cannot avoid to move, and how long the
device's own copy takes for those bytes, as a share of the sweep's time. Above 1 is faster.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orchestrator import environment

PARSER = argparse.ArgumentParser(prog="python -m benchmarks.sweeps")
PARSER.add_argument("shape", nargs="?")
PARSER.add_argument("--threads", type=int, default=2)
PARSER.add_argument("--results", type=Path, default=Path(__file__).with_name("results"))
OPTIONS = PARSER.parse_args() if __name__ == "__main__" else PARSER.parse_args([])
environment.prepare(OPTIONS.threads)

import numba  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from benchmarks import measure  # noqa: E402
from benchmarks.shapes import SHAPES  # noqa: E402
from orchestrator.noise import NoiseKind, TensorRegion  # noqa: E402
from orchestrator.records import StepUpdate  # noqa: E402
from orchestrator.space import table  # noqa: E402
from orchestrator.sweeps import Draw, Factors, Slice, Table  # noqa: E402

KINDS: tuple[NoiseKind, ...] = ("gaussian", "rademacher")
RANK = 8
COLUMNS = (
    ("sweep", "sweep"),
    ("ms", "ms"),
    ("GB", "gigabytes"),
    ("GB/s", "gigabytes_a_second"),
    ("copy / sweep", "copy_over_sweep"),
)
Sweep = tuple[str, int, Callable[[], object]]
"""A name, the bytes to move, and the call."""


def tensor_shapes(name: str) -> list[tuple[str, tuple[int, int]]]:
    """All tensors of a model, as [rows, columns]."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[name].config)
    return [
        (key, (math.prod(value.shape[:-1]), value.shape[-1]))
        for key, value in model.named_parameters()
    ]


def slices(name: str, stored: torch.dtype, served: torch.dtype, shared: bool) -> list[Slice]:
    """Random masters of all tensors, and live weights; or with `shared` both in one."""
    parts = []
    for key, (rows, columns) in tensor_shapes(name):
        master = torch.randn(rows, columns, device=measure.DEVICE, dtype=stored)
        live = master if shared else torch.empty_like(master, dtype=served)
        parts.append(Slice(TensorRegion(key, 0, columns), master, live))
    return parts


def step(num_seeds: int) -> StepUpdate:
    return StepUpdate(0, tuple(range(num_seeds)), (1e-9,) * num_seeds, decay=1.0)


def dense_sweeps(whole: Table, kind: NoiseKind, stored: int, served: int, size: int) -> list[Sweep]:
    perturbed, updated = (stored + served) * size, (2 * stored + served) * size
    draw = Draw(1, 1e-3)
    return [
        (f"perturb, {kind}", perturbed, lambda: whole.perturb(kind, [draw])),
        (f"update by 1 seed, {kind}", updated, lambda: whole.update(kind, [step(1)])),
        (
            f"update by 1 seed and perturb, {kind}",
            updated,
            lambda: whole.update(kind, [step(1)], then=draw),
        ),
        (f"update by 16 seeds, {kind}", updated, lambda: whole.update(kind, [step(16)])),
    ]


def eight_bits(*shape: int) -> torch.Tensor:
    return torch.randint(-112, 113, shape, dtype=torch.int8, device=measure.DEVICE)


def low_rank_sweeps(parts: list[Slice], moved: int) -> Iterator[Sweep]:
    matrices = [part for part in parts if part.live.shape[0] > 1]
    size = sum(part.live.numel() for part in matrices)
    whole = table(matrices)
    for num_seeds in (1, 8):
        factors = [
            Factors(
                eight_bits(num_seeds, part.live.shape[0], RANK),
                eight_bits(num_seeds, RANK, part.live.shape[1]),
            )
            for part in matrices
        ]

        def update(factors: list[Factors] = factors, count: int = num_seeds) -> None:
            whole.low_rank_update(factors, [step(count)])

        yield f"low-rank update, rank {RANK}, seeds {num_seeds}", moved * size, update


def measured(sweep: Sweep, dtypes: str, copy_rate: float, turns: int) -> dict[str, Any]:
    name, moved, call = sweep
    taken = measure.medians(measure.paired({name: call}, turns))[name]
    return {
        "sweep": f"{name}, {dtypes}",
        "ms": 1e3 * taken,
        "gigabytes": moved / 1e9,
        "gigabytes_a_second": moved / taken / 1e9,
        "copy_over_sweep": moved / copy_rate / taken,
    }


def run(shape: str, turns: int) -> list[dict[str, Any]]:
    """All sweeps over a model's tensors."""
    live = getattr(torch, measure.DTYPE)
    copy_rate = measure.copy_rate()
    rows = []
    for stored in (torch.float32, torch.bfloat16):
        parts = slices(shape, stored, live, shared=False)
        size = sum(part.live.numel() for part in parts)
        whole = table(parts)
        dtypes = f"{stored} -> {live}".replace("torch.", "")
        widths = stored.itemsize, live.itemsize
        sweeps = [sweep for kind in KINDS for sweep in dense_sweeps(whole, kind, *widths, size)]
        sweeps.append(("digest", stored.itemsize * size, whole.digests))
        shared = stored is live
        if not shared:
            sweeps += low_rank_sweeps(parts, 2 * stored.itemsize + live.itemsize)
        rows += [measured(sweep, dtypes, copy_rate, turns) for sweep in sweeps]
        if shared:
            alone = slices(shape, stored, live, shared=True)
            rows += [
                measured(sweep, f"{dtypes}, the master is live", copy_rate, turns)
                for sweep in low_rank_sweeps(alone, 2 * stored.itemsize)
            ]
    return rows


def main() -> None:
    torch.set_num_threads(OPTIONS.threads)
    numba.set_num_threads(OPTIONS.threads)
    shape = OPTIONS.shape or ("opt-13b" if measure.ON_GPU else "opt-tiny")
    print(measure.header())
    print(f"{shape}; copy: {measure.copy_rate() / 1e9:.0f} GB/s")
    rows = run(shape, turns=15 if measure.ON_GPU else 5)
    titles, keys = zip(*COLUMNS, strict=True)
    measure.print_table(titles, [[row[key] for key in keys] for row in rows])
    measure.write_results(f"sweeps-{shape}", rows, OPTIONS.results)


if __name__ == "__main__":
    main()
