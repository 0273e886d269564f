"""What is trained: the Space protocol, and what all spaces have in common.

Owns the list of trained tensors (master and live values), their digests, and their assembly over
tensor-parallel ranks. How they are perturbed is each space's own.
"""

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from orchestrator import sweeps_cuda, sweeps_numba
from orchestrator.noise import NoiseKind, TensorRegion
from orchestrator.records import Probe, StepUpdate
from orchestrator.runner import gather_from_ranks, sum_over_ranks
from orchestrator.sweeps import Draw, Factors, Slice, Table
from orchestrator.tensor_map import Shard


@dataclass(frozen=True, slots=True)
class Placed:
    """A probe whose perturbation is in place, and the adapter that a row names to be under it."""

    probe: Probe
    adapter: str | None


# Updates are held back until they have this many seeds: a replay then makes one pass over the
# masters where single steps would make many.
MAX_WAITING_SEEDS = 256

Groups = Generator[list[Placed], None, None]
Read = Callable[[str], torch.Tensor]
"""A whole tensor, on the CPU, by its canonical name."""


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

    @property
    def parts(self) -> "Sequence[Trained]":
        """All that is trained, in the order of the digest."""

    def placed(self, probes: Sequence[Probe]) -> Groups:
        """The probes in groups; those of a group can be evaluated together, until the next.

        The trained state stays as it is; the engine's weights may stay perturbed until `settle`.
        """

    def apply(self, update: StepUpdate) -> None:
        """Take one step, at the latest when it is needed."""

    def settle(self) -> None:
        """Make the engine's weights those of the trained state: before scoring unperturbed rows."""

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
    """On the meta device where a table of its own keeps the values."""
    live: torch.Tensor

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """This process's part of the whole tensor, contiguous, as [rows, columns]."""
        cells = whole.view(-1, self.shard.full_columns)[self.shard.cells]
        return cells.reshape(self.live.shape).contiguous()


class KeepingTable(Table, Protocol):
    """A table that keeps the masters itself."""

    def read(self, index: int) -> torch.Tensor:
        """A slice's master: [rows, columns], a copy on the CPU."""

    def write(self, index: int, values: torch.Tensor) -> None:
        """Put values, of that shape, in its place."""


class Trained:
    """Trained tensors that are swept together, and what they are yet to become.

    Updates wait until the values are asked for, so that many become one pass over the masters, and
    the last of them one pass with the perturbation that follows. The live weights hold the last
    perturbation until `settle`.

    Anchored masters decay towards what they are now, not towards zero. With d the step's decay,
        master = ((master - anchor) * d + anchor) + sum of coefficient * z(seed),
    each operation rounded to float32 by itself, so that it has the same bits on every device; where
    d is 1, the masters are only added to. Each step is then a pass of its own, and three more.
    """

    def __init__(
        self,
        tensors: Sequence[TrainedTensor],
        noise: NoiseKind,
        own_table: KeepingTable | None = None,
        *,
        anchored: bool = False,
    ) -> None:
        """`own_table` sweeps over the tensors, in their order, instead of the device's own. To be
        anchored, masters must be float32, and no table's own."""
        self.tensors = list(tensors)
        self._noise = noise
        self._keeper = own_table
        self._table = own_table or table(
            [Slice(part.region, part.master, part.live) for part in tensors]
        )
        masters = [part.master for part in tensors]
        assert not anchored or all(master.dtype == torch.float32 for master in masters)
        self._anchors = [_anchor(master) for master in masters] if anchored else []
        self._waiting: list[StepUpdate] = []
        self._is_settled = False
        self.settle()

    @property
    def is_anchored(self) -> bool:
        return bool(self._anchors)

    @property
    def num_parameters(self) -> int:
        """Elements, over all ranks."""
        counted = (part.master.numel() for part in self.tensors if part.shard.counted)
        return sum_over_ranks([sum(counted)])[0]

    def apply(self, update: StepUpdate) -> None:
        """Take a step, see `sweeps.Table.update` and above, in order; before it is needed."""
        self._waiting.append(update)
        self._is_settled = False
        if sum(len(waiting.seeds) for waiting in self._waiting) >= MAX_WAITING_SEEDS:
            self.settle()

    def perturb(self, seed: int, coefficient: float) -> None:
        """live = master + coefficient * z(seed), whatever live held before."""
        if coefficient == 0:
            self.settle()
            return
        draw = Draw(seed, coefficient)
        self._is_settled = False
        if self._waiting:
            self._take(draw)
        else:
            self._table.perturb(self._noise, [draw])

    def settle(self) -> None:
        """Take the updates that wait; live = master, rounded to nearest."""
        if not self._is_settled:
            self._take()
            self._is_settled = True

    def _take(self, then: Draw | None = None) -> None:
        """Take the updates that wait, and write the live weights, perturbed if asked."""
        if self._anchors:
            for update in self._waiting[:-1]:
                self._table.update(self._noise, [self._drawn_back(update)])
            self._waiting = [self._drawn_back(update) for update in self._waiting[-1:]]
        self._table.update(self._noise, self._waiting, then)
        self._waiting.clear()

    def _drawn_back(self, update: StepUpdate) -> StepUpdate:
        """Draw anchored masters back by a step's decay; what is left of the step."""
        if not self._anchors or update.decay == 1:
            return update
        for part, anchor in zip(self.tensors, self._anchors, strict=True):
            part.master.sub_(anchor).mul_(update.decay).add_(anchor)
        return replace(update, decay=1.0)

    def apply_low_rank(self, factors: Sequence[Factors], updates: Sequence[StepUpdate]) -> None:
        """Take steps along low-rank noise, one pair of factors a tensor; if anchored, one step."""
        assert not self.is_anchored or len(updates) == 1
        self.settle()
        self._table.low_rank_update(factors, [self._drawn_back(update) for update in updates])

    def checksums(self, *, live: bool = False) -> list[str]:
        """A line a tensor: its name and a checksum of its master, or of what live holds now."""
        if not live:
            self.settle()
        return self.lines(self._table.digests(live=live))

    def lines(self, own: Sequence[int]) -> list[str]:
        """A line a tensor: its name and its checksum, out of the ranks' own checksums."""
        counted = [
            checksum if part.shard.counted else 0
            for checksum, part in zip(own, self.tensors, strict=True)
        ]
        lines = []
        for part, mine, checksum in zip(self.tensors, own, sum_over_ranks(counted), strict=True):
            if part.shard.is_whole and mine != checksum:
                raise RuntimeError(f"this rank's copy of {part.region.name} differs from rank 0's")
            lines.append(f"{part.region.name} {checksum:016x}\n")
        return lines

    def digest(self, *, live: bool = False) -> str:
        """Checksum (128 bits, hex) of the masters, or of what live holds now, over all ranks."""
        return digest(self.checksums(live=live))

    # ---------------------------------------------------------------- values from elsewhere

    def values(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The masters, one after the other: canonical name, whole tensor. See `assembled`."""
        self.settle()
        read = self._keeper.read if self._keeper else lambda index: self.tensors[index].master
        return assembled(
            (part.region.name, part.shard, read(index)) for index, part in enumerate(self.tensors)
        )

    def checksums_of(self, read: Read) -> list[int]:
        """This rank's own checksums of other values for the masters."""
        sums = []
        for part in self.tensors:
            value = part.of(read(part.region.name))
            sums += sweeps_numba.Table([Slice(part.region, value, value)]).digests()
        return sums

    def put(self, read: Read) -> None:
        """Have other values in the masters' place. Anchors stay what they are."""
        assert not self._waiting
        for index, part in enumerate(self.tensors):
            value = part.of(read(part.region.name))
            if self._keeper:
                self._keeper.write(index, value)
            else:
                part.master.copy_(value)
        self._is_settled = False
        self.settle()


def _anchor(master: torch.Tensor) -> torch.Tensor:
    """A copy of float32 values, in half the memory where they are those of a 16-bit checkpoint."""
    for dtype in (torch.bfloat16, torch.float16):
        narrow = master.to(dtype)
        if torch.equal(narrow.float().view(torch.int32), master.view(torch.int32)):
            return narrow
    return master.clone()


def digest(checksums: Sequence[str]) -> str:
    """Checksum (128 bits, hex) of tensors' checksums."""
    return hashlib.blake2b("".join(checksums).encode(), digest_size=16).hexdigest()


def table(slices: Sequence[Slice]) -> Table:
    """A table of slices that all lie on one device."""
    on_gpu = bool(slices) and slices[0].live.is_cuda
    return sweeps_cuda.Table(slices) if on_gpu else sweeps_numba.Table(slices)


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
