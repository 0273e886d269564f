"""Elements a second of the noise sweeps on this machine's CPU, a table on standard output.

    python -m benchmarks.sweeps [THREADS]

Medians of seven runs over one tensor of 64 Mi elements, beside torch's plain copy of it.
"""

import math
import sys
from collections.abc import Callable

from orchestrator import environment

NUM_THREADS = int(sys.argv[1]) if len(sys.argv) > 1 else 2
environment.prepare(NUM_THREADS)

import numba  # noqa: E402
import torch  # noqa: E402

from benchmarks.measure import medians, paired  # noqa: E402
from orchestrator.noise import NoiseKind, TensorRegion  # noqa: E402
from orchestrator.records import StepUpdate  # noqa: E402
from orchestrator.sweeps import Draw, Factors, Slice  # noqa: E402
from orchestrator.sweeps_numba import Table  # noqa: E402

SIZE = 64 * 2**20
REGION = TensorRegion("model.embed_tokens.weight", 0, SIZE)


def measure(name: str, sweep: Callable[[], object]) -> None:
    taken = medians(paired({name: sweep}, turns=7, warmups=1))[name]  # the first compiles
    print(f"{name:52s} {SIZE / taken / 1e6:8.0f} million elements/s")


def step(num_seeds: int) -> StepUpdate:
    return StepUpdate(0, tuple(range(num_seeds)), (1e-9,) * num_seeds, decay=1.0)


def measure_low_rank(num_seeds: int, rank: int) -> None:
    rows = columns = math.isqrt(SIZE)
    master = torch.randn(rows, columns)
    region = TensorRegion("model.layers.0.mlp.up_proj.weight", 0, columns)
    table = Table([Slice(region, master, torch.empty_like(master))])
    left, right = torch.randn(num_seeds, rows, rank), torch.randn(num_seeds, rank, columns)
    seeds = f"{num_seeds} seed{'s' if num_seeds > 1 else ''}"
    measure(
        f"low_rank_update, {seeds}, rank {rank}, float32 -> float32",
        lambda: table.low_rank_update([Factors(left, right)], step(num_seeds)),
    )


def measure_dtypes(master_dtype: torch.dtype, live_dtype: torch.dtype) -> None:
    master = torch.randn(1, SIZE).to(master_dtype)
    live = torch.empty(1, SIZE, dtype=live_dtype)
    table = Table([Slice(REGION, master, live)])
    dtypes = f"{master_dtype} -> {live_dtype}".replace("torch.", "")
    kinds: tuple[NoiseKind, ...] = ("gaussian", "rademacher")
    for kind in kinds:

        def perturb(kind: NoiseKind = kind) -> None:
            table.perturb(kind, [Draw(seed=1, coefficient=1e-3)])

        def update(kind: NoiseKind = kind, num_seeds: int = 1) -> None:
            table.update(kind, [step(num_seeds)])

        measure(f"perturb, {kind}, {dtypes}", perturb)
        measure(f"update, 1 seed, {kind}, {dtypes}", update)
        measure(
            f"update, 8 seeds, {kind}, {dtypes}",
            lambda update=update: update(num_seeds=8),  # type: ignore[misc]
        )
    measure(f"copy, {dtypes}", lambda: live.copy_(master))
    measure(f"digest, {dtypes}", table.digests)


if __name__ == "__main__":
    torch.set_num_threads(NUM_THREADS)
    numba.set_num_threads(NUM_THREADS)
    print(f"{NUM_THREADS} threads, torch {torch.__version__}, numba {numba.__version__}")
    measure_dtypes(torch.float32, torch.float32)
    measure_dtypes(torch.float32, torch.bfloat16)
    measure_low_rank(num_seeds=1, rank=4)
    measure_low_rank(num_seeds=8, rank=4)
