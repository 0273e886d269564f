"""What is trained: the Space protocol, and what all spaces have in common.

Owns the list of trained tensors (master and live values), their digests, and their assembly over
tensor-parallel ranks. How they are perturbed is each space's own.
"""

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from orchestrator import sweeps_numba, sweeps_triton
from orchestrator.noise import NoiseKind, TensorRegion
from orchestrator.records import Probe, StepUpdate
from orchestrator.runner import gather_from_ranks, sum_over_ranks
from orchestrator.sweeps import Sweeps
from orchestrator.tensor_map import Shard


@dataclass(frozen=True, slots=True)
class Placed:
    """A probe whose perturbation is in place, and the adapter that a row names to be under it."""

    probe: Probe
    adapter: str | None


Groups = Generator[list[Placed], None, None]


class Space(Protocol):
    """The trained state of one replica, or of its part on one tensor-parallel rank.

    All ranks of a replica make the same calls.
    """

    @property
    def adapter(self) -> str | None:
        """What rows name to be scored under the trained state."""

    @property
    def num_parameters(self) -> int:
        """Trained elements, over all ranks."""

    def placed(self, probes: Sequence[Probe]) -> Groups:
        """The probes in groups; those of a group can be evaluated together, until the next.

        When the iterator ends or is closed, all is as it was.
        """

    def apply(self, update: StepUpdate) -> None:
        """Take one step."""

    def digest(self) -> str:
        """Checksum (128 bits, hex) of the trained state, alike on any device at any tp_size."""

    def export(self, base: Path, folder: Path) -> None:
        """Write the trained state where others can load it; `base` is the model's folder."""


@dataclass(frozen=True, slots=True)
class TrainedTensor:
    """What this process trains of a canonical tensor; both values are [rows, columns]."""

    region: TensorRegion
    shard: Shard
    master: torch.Tensor
    live: torch.Tensor


def sweeps_for(device: torch.device) -> Sweeps:
    """The noise sweeps of a device."""
    return sweeps_triton if device.type == "cuda" else sweeps_numba


def num_parameters(tensors: Iterable[TrainedTensor]) -> int:
    """Elements, over all ranks."""
    counted = (tensor.master.numel() for tensor in tensors if tensor.shard.counted)
    return sum_over_ranks([sum(counted)])[0]


def restore(tensors: Iterable[TrainedTensor]) -> None:
    """live = master, rounded to nearest."""
    for tensor in tensors:
        tensor.live.copy_(tensor.master)


def perturb(
    tensors: Sequence[TrainedTensor],
    targets: Iterable[torch.Tensor],
    kind: NoiseKind,
    seed: int,
    coefficient: float,
) -> None:
    """Write master + coefficient * z(seed) of each tensor into its target, of the same shape."""
    for tensor, target in zip(tensors, targets, strict=True):
        sweeps_for(target.device).perturb(
            tensor.master, target, tensor.region, kind=kind, seed=seed, coefficient=coefficient
        )


def add_noise(tensors: Iterable[TrainedTensor], kind: NoiseKind, update: StepUpdate) -> None:
    """master = master * decay + sum of coefficient * z(seed), in order; live follows."""
    for tensor in tensors:
        sweeps_for(tensor.live.device).update(
            tensor.master,
            tensor.live,
            tensor.region,
            kind=kind,
            seeds=update.seeds,
            coefficients=update.coefficients,
            decay=update.decay,
            step=update.step,
        )


def digest(tensors: Sequence[TrainedTensor], value: Callable[[TrainedTensor], torch.Tensor]) -> str:
    """Checksum (128 bits, hex) of the tensors' masters or live values, over all ranks."""
    sweeps = sweeps_for(tensors[0].live.device)
    own = [sweeps.digest(value(tensor), tensor.region) for tensor in tensors]
    counted = [
        checksum if tensor.shard.counted else 0
        for checksum, tensor in zip(own, tensors, strict=True)
    ]
    total = hashlib.blake2b(digest_size=16)
    for tensor, mine, checksum in zip(tensors, own, sum_over_ranks(counted), strict=True):
        if tensor.shard.is_whole and mine != checksum:
            raise RuntimeError(f"this rank's copy of {tensor.region.name} differs from rank 0's")
        total.update(f"{tensor.region.name} {checksum:016x}\n".encode())
    return total.hexdigest()


def assembled(
    parts: Iterable[tuple[str, Shard, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole tensors on the CPU, by name, out of all ranks' parts of them.

    On rank 0; other ranks take part and get nothing.
    """
    for name, shard, part in parts:
        gathered = gather_from_ranks((shard, part.cpu()))
        if gathered is not None:
            yield name, _whole(gathered)


def _whole(parts: Sequence[tuple[Shard, torch.Tensor]]) -> torch.Tensor:
    first, value = parts[0]
    whole = torch.empty(first.full_shape, dtype=value.dtype)
    cells = whole.view(-1, first.full_columns)
    for shard, part in parts:
        cells[shard.cells] = part.reshape(shard.num_rows, shard.num_columns)
    return whole
