"""What a sweep over parameters is: the contract that numba's and CUDA's tables fulfil.

A slice of a parameter is seen as [rows, columns]; its region says where it lies in the canonical
tensor. A table holds slices and sweeps over all of them at once. Both implementations give the
bits that `noise` specifies, so that a replica on a CPU and one on a GPU stay equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from orchestrator.noise import NoiseKind, TensorRegion
from orchestrator.records import StepUpdate

MAX_RANK = 256  # of low-rank noise: sums of products of 8 bits are then exact in float32


@dataclass(frozen=True, slots=True)
class Slice:
    """What a sweep reads and writes of one parameter, all on one device."""

    region: TensorRegion
    master: torch.Tensor | None
    """[rows, columns], contiguous, float32 or bfloat16; None stands for zeros."""
    live: torch.Tensor
    """[rows, columns], float32, bfloat16 or float16, with unit column stride; may be the master.

    Or int8, in 1 / 32, to draw factors of low-rank noise into; there is no master then.
    """
    draw: int = 0
    """Which of a perturbation's draws is this slice's."""


class Draw(NamedTuple):
    """A perturbation: coefficient * z(seed). The coefficient is rounded to float32."""

    seed: int
    coefficient: float


class Factors(NamedTuple):
    """Low-rank noise of one slice for several seeds, int8 in 1 / 32, contiguous, on its device.

    Of several steps: those of the first step's seeds, then those of the next one's, and so on.
    """

    left: torch.Tensor
    """[seeds, rows, rank]."""
    right: torch.Tensor
    """[seeds, rank, columns]."""


class Table(Protocol):
    """Slices that are swept together. Each element is read and written once a sweep."""

    def __init__(self, slices: Sequence[Slice]) -> None:
        """Raises ValueError for tensors of another layout than `Slice` says."""

    def perturb(self, kind: NoiseKind, draws: Sequence[Draw]) -> None:
        """Write live = round(master + coefficient * z(seed)), in float32, to nearest even."""

    def update(
        self, kind: NoiseKind, updates: Sequence[StepUpdate], then: Draw | None = None
    ) -> None:
        """Take steps, one after the other, and write the live weights, perturbed if asked.

        A step sets master = master * decay + sum_i coefficients[i] * z(seeds[i]). The sum is
        float32, from -0 on and in the order of the seeds; no seeds at all are legal. A bfloat16
        master is rounded stochastically, with the bits of the step. The last of the masters is
        stored; live is round(master), or what `perturb` with `then` would write. Raises ValueError
        for unequal numbers of seeds and coefficients, or a slice without a master.
        """

    def low_rank_update(self, factors: Sequence[Factors], updates: Sequence[StepUpdate]) -> None:
        """Take steps along noise.low_rank of each slice's factors, and write live.

        Their coefficients are noise.low_rank_coefficient's. All else is as in `update`. Raises
        ValueError for factors that do not fit.
        """

    def digests(self, *, live: bool = False) -> list[int]:
        """Per slice, the checksum in [0, 2**64) of the raw bits of its master, or its live values.

        The digests of a tensor's shards add up, modulo 2**64, to the digest of the whole tensor.
        """


def check_layout(part: Slice) -> None:
    """Raises ValueError unless a slice is laid out as the contract says."""
    master, live = part.master, part.live
    if master is not None and (not master.is_contiguous() or master.shape != live.shape):
        raise ValueError(f"master must be contiguous and of live's shape {tuple(live.shape)}")
    if live.shape[1] > 1 and live.stride(1) != 1:
        raise ValueError(f"columns must be adjacent in memory, but lie {live.stride(1)} apart")


def masters(slices: Sequence[Slice]) -> list[torch.Tensor]:
    """All slices' masters. Raises ValueError for a slice without one."""
    for part in slices:
        if part.master is None:
            raise ValueError(f"{part.region.name} has no master")
    return [part.master for part in slices if part.master is not None]


def check_counts(updates: Sequence[StepUpdate]) -> None:
    """Raises ValueError unless there is one coefficient a seed."""
    for update in updates:
        if len(update.seeds) != len(update.coefficients):
            raise ValueError(
                f"{len(update.seeds)} seeds but {len(update.coefficients)} coefficients"
            )


def check_factors(master: torch.Tensor, factors: Factors, num_seeds: int) -> None:
    """Raises ValueError unless these are factors of noise for this master."""
    (left, right), (rows, columns) = factors, master.shape
    rank = left.shape[-1] if left.ndim else 0
    shapes = f"factors of shapes {tuple(left.shape)} and {tuple(right.shape)}"
    fit = left.shape == (num_seeds, rows, rank) and right.shape == (num_seeds, rank, columns)
    if not 0 < rank <= MAX_RANK or not fit:
        raise ValueError(
            f"{shapes} do not fit a master {tuple(master.shape)} and {num_seeds} seeds"
        )
    for factor in factors:
        wanted = (torch.int8, master.device)
        if (factor.dtype, factor.device) != wanted or not factor.is_contiguous():
            raise ValueError(f"{shapes} must both be contiguous int8 on {master.device}")
