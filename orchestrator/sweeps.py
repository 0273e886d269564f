"""What a sweep over a slice of a parameter is: the contract that numba's and Triton's fulfil.

A slice is seen as [rows, columns]. Its master is contiguous, float32 or bfloat16; its live weights
are a view of the same shape, float32, bfloat16 or float16, with unit column stride. A region says
where the slice lies in the canonical tensor. Both implementations give the bits that `noise`
specifies, so that a replica on a CPU and one on a GPU stay equal.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from orchestrator.noise import NoiseKind, TensorRegion


class Sweeps(Protocol):
    """A module with these functions. All raise ValueError for tensors of another layout."""

    def perturb(
        self,
        master: torch.Tensor,
        live: torch.Tensor,
        region: TensorRegion,
        *,
        kind: NoiseKind,
        seed: int,
        coefficient: float,
    ) -> None:
        """Write live = round(master + coefficient * z(seed)), in float32, to nearest even.

        `coefficient` is rounded to float32.
        """

    def update(
        self,
        master: torch.Tensor,
        live: torch.Tensor,
        region: TensorRegion,
        *,
        kind: NoiseKind,
        seeds: Sequence[int],
        coefficients: Sequence[float],
        decay: float,
        step: int,
    ) -> None:
        """Set master = master * decay + sum_i coefficients[i] * z(seeds[i]), live = round(master).

        Coefficients and decay are rounded to float32. The sum is float32, in the order of the
        seeds; no seeds at all are legal. A bfloat16 master is rounded stochastically with the bits
        of `step`; live is rounded to nearest even from the stored master. Raises ValueError for
        unequal numbers of seeds and coefficients.
        """

    def low_rank_update(
        self,
        master: torch.Tensor,
        live: torch.Tensor,
        region: TensorRegion,
        *,
        left: torch.Tensor,
        right: torch.Tensor,
        coefficients: Sequence[float],
        decay: float,
        step: int,
    ) -> None:
        """Set master = master * decay + sum_s coefficients[s] * z_s, live = round(master).

        z_s is noise.low_rank of left[s] and right[s]: left [seeds, rows, rank] and right
        [seeds, rank, columns], float32, contiguous, on master's device. All else is as in update.
        Raises ValueError for factors that do not fit the master or the coefficients.
        """

    def digest(self, values: torch.Tensor, region: TensorRegion) -> int:
        """The checksum in [0, 2**64) of the raw bits of a [rows, columns] tensor.

        The digests of a tensor's shards add up, modulo 2**64, to the digest of the whole tensor.
        """


def check_layout(master: torch.Tensor, live: torch.Tensor) -> None:
    """Raises ValueError unless both are laid out as the contract says."""
    if not master.is_contiguous() or master.shape != live.shape:
        raise ValueError(f"master must be contiguous and of live's shape {tuple(live.shape)}")
    require_unit_columns(live)


def require_unit_columns(values: torch.Tensor) -> None:
    """Raises ValueError for rows whose elements are not adjacent in memory."""
    if values.shape[1] > 1 and values.stride(1) != 1:
        raise ValueError(f"columns must be adjacent in memory, but lie {values.stride(1)} apart")


def check_counts(seeds: Sequence[int], coefficients: Sequence[float]) -> None:
    """Raises ValueError unless there is one coefficient a seed."""
    if len(seeds) != len(coefficients):
        raise ValueError(f"{len(seeds)} seeds but {len(coefficients)} coefficients")


def check_factors(
    master: torch.Tensor, left: torch.Tensor, right: torch.Tensor, coefficients: Sequence[float]
) -> None:
    """Raises ValueError unless left and right are factors of noise for this master."""
    seeds, (rows, columns) = len(coefficients), master.shape
    rank = left.shape[-1] if left.ndim else 0
    factors = f"factors of shapes {tuple(left.shape)} and {tuple(right.shape)}"
    fit = left.shape == (seeds, rows, rank) and right.shape == (seeds, rank, columns)
    if rank == 0 or not fit:
        raise ValueError(f"{factors} do not fit a master {tuple(master.shape)} and {seeds} seeds")
    for factor in (left, right):
        wanted = (torch.float32, master.device)
        if (factor.dtype, factor.device) != wanted or not factor.is_contiguous():
            raise ValueError(f"{factors} must both be contiguous float32 on {master.device}")
