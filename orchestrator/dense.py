"""The dense space: every weight is trained, and perturbed by noise of its own.

Owns the master copy. The live weights are always written from it, never undone by arithmetic, so
that a probe leaves no trace (MeZO's in-place +eps, -2 eps, +eps drifts). Knows nothing of losses.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from orchestrator import sweeps_numba, sweeps_triton
from orchestrator.noise import NoiseKind, TensorRegion
from orchestrator.parameters import CanonicalTensor
from orchestrator.records import StepUpdate
from orchestrator.runner import gather_from_ranks, sum_over_ranks
from orchestrator.sweeps import Sweeps
from orchestrator.tensor_map import Shard


@dataclass(frozen=True, slots=True)
class TrainedTensor:
    """What this process trains of a canonical tensor; both values are [rows, columns]."""

    region: TensorRegion
    shard: Shard
    master: torch.Tensor
    live: torch.Tensor


class DenseSpace:
    """Master and live weights of one replica, or of its part on one tensor-parallel rank.

    All ranks of a replica make the same calls; digests and exported values are of all of them.
    """

    def __init__(
        self, tensors: Sequence[CanonicalTensor], *, noise: NoiseKind, master_dtype: torch.dtype
    ) -> None:
        device = tensors[0].live.device
        self._noise = noise
        self._sweeps: Sweeps = sweeps_triton if device.type == "cuda" else sweeps_numba
        self.tensors = [
            TrainedTensor(
                tensor.region,
                tensor.shard,
                tensor.initial.to(device, master_dtype, copy=True).contiguous(),
                tensor.live,
            )
            for tensor in tensors
        ]
        self.restore()

    @property
    def num_parameters(self) -> int:
        """Trained elements, over all ranks."""
        counted = (tensor.master.numel() for tensor in self.tensors if tensor.shard.counted)
        return sum_over_ranks([sum(counted)])[0]

    @contextmanager
    def probing(self) -> Iterator["DenseSpace"]:
        """Within, `perturb` may be called any number of times; on leaving, all is as it was."""
        try:
            yield self
        finally:
            self.restore()

    def perturb(self, seed: int, coefficient: float) -> None:
        """live = master + coefficient * z(seed), whatever live held before."""
        if coefficient == 0:
            self.restore()
            return
        for tensor in self.tensors:
            self._sweeps.perturb(
                tensor.master,
                tensor.live,
                tensor.region,
                kind=self._noise,
                seed=seed,
                coefficient=coefficient,
            )

    def restore(self) -> None:
        """live = master, rounded to nearest."""
        for tensor in self.tensors:
            tensor.live.copy_(tensor.master)

    def apply(self, update: StepUpdate) -> None:
        """master = master * decay + sum of coefficient * z(seed), in order; live follows."""
        for tensor in self.tensors:
            self._sweeps.update(
                tensor.master,
                tensor.live,
                tensor.region,
                kind=self._noise,
                seeds=update.seeds,
                coefficients=update.coefficients,
                decay=update.decay,
                step=update.step,
            )

    def digest(self) -> str:
        """Checksum (128 bits, hex) of the trained state, the same on any device at any tp_size."""
        return self._digest(lambda tensor: tensor.master)

    def live_digest(self) -> str:
        """Checksum of the weights that the engine runs with."""
        return self._digest(lambda tensor: tensor.live)

    def _digest(self, value: Callable[[TrainedTensor], torch.Tensor]) -> str:
        own = [self._sweeps.digest(value(tensor), tensor.region) for tensor in self.tensors]
        counted = [
            checksum if tensor.shard.counted else 0
            for checksum, tensor in zip(own, self.tensors, strict=True)
        ]
        total = hashlib.blake2b(digest_size=16)
        for tensor, mine, checksum in zip(self.tensors, own, sum_over_ranks(counted), strict=True):
            if tensor.shard.is_whole and mine != checksum:
                raise RuntimeError(
                    f"this rank's copy of {tensor.region.name} differs from rank 0's"
                )
            total.update(f"{tensor.region.name} {checksum:016x}\n".encode())
        return total.hexdigest()

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The trained weights as the engine runs with them: canonical name, whole tensor on CPU.

        On rank 0; other ranks take part and yield nothing.
        """
        self.restore()
        for tensor in self.tensors:
            parts = gather_from_ranks((tensor.shard, tensor.live.cpu()))
            if parts is not None:
                yield tensor.region.name, _assembled(parts)


def _assembled(parts: Sequence[tuple[Shard, torch.Tensor]]) -> torch.Tensor:
    """The whole tensor, of the ranks' parts of it."""
    first, value = parts[0]
    whole = torch.empty(first.full_shape, dtype=value.dtype)
    cells = whole.view(-1, first.full_columns)
    for shard, part in parts:
        rows = slice(shard.first_row, shard.first_row + shard.num_rows)
        columns = slice(shard.first_column, shard.first_column + shard.num_columns)
        cells[rows, columns] = part.view(shard.num_rows, shard.num_columns)
    return whole
