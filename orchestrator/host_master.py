"""Masters in the host's memory, streamed through the device: the dense space's largest part.

Owns the float32 masters, in pinned chunks, the few buffers on the device that chunks take turns in,
and the order of copies, sweeps and forwards on their streams. A chunk is copied in, swept by the
device's own table, and copied back if it has changed, while others are on their way: the bits are
those of masters that never left. Layers of a forward wait for their own weights only. Knows nothing
of losses, and of a model only which parameters its layers hold.

Pinned memory is allocated in powers of two, so chunks have such sizes. Pinning is slow, some
gigabytes a second, and what is pinned cannot be swapped out.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from orchestrator.noise import NoiseKind, TensorRegion
from orchestrator.records import StepUpdate
from orchestrator.space import table
from orchestrator.sweeps import Draw, Factors, Slice, Table, check_counts

# While a chunk is swept, one is copied in and one back. The fourth has the numbers of a sweep wait
# behind a chunk's copy without holding up the next one.
NUM_BUFFERS = 4
CHUNKS_A_MASTER = 128  # at least: buffers then take an eighth of a byte a parameter at most
SMALLEST_CHUNK, LARGEST_CHUNK = 2**20, 2**26  # elements
ALIGNMENT = 128  # elements: where a tensor may be cut without slower sweeps


class Lane(Protocol):
    """What the device does one after the other, beside other lanes."""

    def run(self, work: Callable[[], object]) -> None:
        """Give it work, without waiting."""

    def mark(self) -> Any:
        """A mark behind what it was given so far."""

    def wait(self, mark: Any) -> None:
        """What it is given from now on begins when the mark is reached."""

    def finish(self) -> None:
        """Wait, on the host, until nothing is left to do."""


class StreamLane:
    """A stream of its own, or whichever is the current one. See Lane."""

    def __init__(self, own: bool) -> None:
        self._own: Any = torch.cuda.Stream() if own else None  # type: ignore[no-untyped-call]

    @property
    def _stream(self) -> Any:
        return torch.cuda.current_stream() if self._own is None else self._own

    def run(self, work: Callable[[], object]) -> None:
        with torch.cuda.stream(self._own):
            work()

    def mark(self) -> Any:
        return self._stream.record_event()

    def wait(self, mark: Any) -> None:
        self._stream.wait_event(mark)

    def finish(self) -> None:
        self._stream.synchronize()

    def uses(self, tensor: torch.Tensor) -> None:
        """Memory of the tensor is given to nobody else before this lane is done with it."""
        tensor.record_stream(self._own)


@dataclass(frozen=True, slots=True)
class Lanes:
    """Who copies chunks to the device, sweeps over them, copies them back, and computes."""

    load: Lane
    sweep: Lane
    store: Lane
    compute: Lane


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a slice that lies in one chunk."""

    index: int
    """The slice's place in the table."""
    part: Slice
    offset: int
    """Where in the chunk its master begins, in elements."""


@dataclass(slots=True)
class Chunk:
    """Masters that are copied and swept together."""

    masters: torch.Tensor
    """float32 [elements], in the host's memory."""
    buffer: int
    """Number of the buffer on the device that they are copied to."""
    table: Table
    """Sweeps over that buffer."""
    owners: tuple[int, ...]
    """The slice of each of the table's."""
    swept: Any = None
    """A mark behind the last sweep."""


class HostTable:
    """See sweeps.Table. Slices' masters are where values are taken from, once."""

    def __init__(
        self,
        slices: Sequence[Slice],
        stages: Sequence[int],
        *,
        lanes: Lanes | None = None,
        chunk_elements: int | None = None,
    ) -> None:
        """`stages[i]` says when a forward needs slice i's live weights: 0 from its start on, n
        in its n-th layer; sweeps take slices in this order.

        Slices' live tensors are on one device. `lanes` stand in for a CUDA device's streams, and
        `chunk_elements` for chunks that fit the masters, for tests. Raises ValueError for a chunk
        that is smaller than a row.
        """
        device = slices[0].live.device
        size = chunk_elements or _chunk_elements(sum(part.live.numel() for part in slices))
        packed = list(_packed(slices, stages, size))
        largest = max(map(_end, packed))
        self._buffers = [
            torch.empty(largest, dtype=torch.float32, device=device)
            for _ in range(min(NUM_BUFFERS, len(packed)))
        ]
        self._lanes = lanes or _streams(self._buffers)
        self._free: list[Any] = [None] * len(self._buffers)
        self._num_slices = len(slices)
        self._shapes = [part.live.shape for part in slices]
        self._chunks = [
            self._chunk(pieces, number % len(self._buffers)) for number, pieces in enumerate(packed)
        ]
        self._last_chunks = {  # of each stage
            stages[piece.index]: number for number, pieces in enumerate(packed) for piece in pieces
        }
        # Of each slice, in its order: chunk, first element there, elements.
        self._places: list[list[tuple[int, int, int]]] = [[] for _ in slices]
        for number, pieces in enumerate(packed):
            for piece in pieces:
                place = number, piece.offset, piece.part.live.numel()
                self._places[piece.index].append(place)
        self._is_overlapping = False

    def _chunk(self, pieces: Sequence[Piece], buffer: int) -> Chunk:
        on_gpu = self._buffers[0].is_cuda
        masters = torch.empty(_end(pieces), dtype=torch.float32, pin_memory=on_gpu)
        swept = []
        for piece in pieces:
            live, initial = piece.part.live, piece.part.master
            assert initial is not None
            place = slice(piece.offset, piece.offset + live.numel())
            masters[place].view(live.shape).copy_(initial)
            swept.append(replace(piece.part, master=self._buffers[buffer][place].view(live.shape)))
        return Chunk(masters, buffer, table(swept), tuple(piece.index for piece in pieces))

    # ---------------------------------------------------------------- sweeps

    def perturb(self, kind: NoiseKind, draws: Sequence[Draw]) -> None:
        fixed = tuple(draws)
        self._stream(lambda chunk: chunk.table.perturb(kind, fixed), changes=False)

    def update(
        self, kind: NoiseKind, updates: Sequence[StepUpdate], then: Draw | None = None
    ) -> None:
        check_counts(updates)
        fixed = tuple(updates)  # the caller's list may be emptied before the device gets to it
        self._stream(lambda chunk: chunk.table.update(kind, fixed, then), changes=bool(fixed))

    def low_rank_update(self, factors: Sequence[Factors], updates: Sequence[StepUpdate]) -> None:
        raise ValueError("masters in the host's memory take no steps along low-rank noise")

    def digests(self, *, live: bool = False) -> list[int]:
        sums = [0] * self._num_slices

        def add(chunk: Chunk) -> None:
            found = chunk.table.digests(live=live)
            for owner, checksum in zip(chunk.owners, found, strict=True):
                sums[owner] = (sums[owner] + checksum) % 2**64

        self._stream(add, changes=False)
        self._lanes.sweep.finish()
        return sums

    # ---------------------------------------------------------------- values

    def read(self, index: int) -> torch.Tensor:
        """See space.KeepingTable."""
        return torch.cat(self._parts(index)).view(self._shapes[index])

    def write(self, index: int, values: torch.Tensor) -> None:
        """See space.KeepingTable."""
        first, flat = 0, values.reshape(-1)
        for part in self._parts(index):
            part.copy_(flat[first : first + len(part)])
            first += len(part)

    def _parts(self, index: int) -> list[torch.Tensor]:
        """Where a slice's master lies, once no copy is on its way."""
        self._lanes.load.finish()
        self._lanes.store.finish()
        return [
            self._chunks[number].masters[first : first + count]
            for number, first, count in self._places[index]
        ]

    # ---------------------------------------------------------------- streams

    def _stream(self, sweep: Callable[[Chunk], object], *, changes: bool) -> None:
        """Sweep over all chunks in turn; `changes`: their masters, too."""
        lanes = self._lanes
        lanes.sweep.wait(lanes.compute.mark())  # a forward may still read the live weights
        for chunk in self._chunks:
            buffer = self._buffers[chunk.buffer][: len(chunk.masters)]
            # Behind the last copy back from this buffer; those of its chunk came before.
            if self._free[chunk.buffer] is not None:
                lanes.load.wait(self._free[chunk.buffer])
            lanes.load.run(partial(buffer.copy_, chunk.masters, non_blocking=True))
            lanes.sweep.wait(lanes.load.mark())
            lanes.sweep.run(partial(sweep, chunk))
            self._free[chunk.buffer] = chunk.swept = lanes.sweep.mark()
            if changes:
                lanes.store.wait(chunk.swept)
                lanes.store.run(partial(chunk.masters.copy_, buffer, non_blocking=True))
                self._free[chunk.buffer] = lanes.store.mark()
        self._await(0 if self._is_overlapping else max(self._last_chunks))

    # ---------------------------------------------------------------- forwards

    @contextmanager
    def overlapping(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Within, live weights of a stage n above 0 are ready for `layers[n - 1]` alone, which
        waits for them when it is called; all others, and everybody afterwards, finds them ready.
        """
        hooks = [
            layer.register_forward_pre_hook(partial(self._await_layer, stage))
            for stage, layer in enumerate(layers, start=1)
        ]
        self._is_overlapping = True
        try:
            yield
        finally:
            self._is_overlapping = False
            for hook in hooks:
                hook.remove()
            self._await(max(self._last_chunks))

    def _await_layer(self, stage: int, *called: object) -> None:
        self._await(stage)

    def _await(self, stage: int) -> None:
        """What is computed from now on finds the live weights of this stage."""
        number = self._last_chunks.get(stage)
        if number is not None and self._chunks[number].swept is not None:
            self._lanes.compute.wait(self._chunks[number].swept)


def staged(model: nn.Module, parameters: Sequence[str]) -> tuple[list[nn.Module], list[int]]:
    """A model's layers in their order, and when a forward needs each of the parameters: 0 from its
    start on, n in the n-th layer.

    A layer is what stands in a list of modules, and is not inside of another one.
    """
    names = [_layer(model, parameter) for parameter in parameters]
    layers = [name for name, _ in model.named_modules() if name in set(names)]
    numbers = {name: number for number, name in enumerate(layers, start=1)}
    return [model.get_submodule(name) for name in layers], [numbers.get(name, 0) for name in names]


def _layer(model: nn.Module, parameter: str) -> str | None:
    path = parameter.split(".")
    for length in range(1, len(path)):
        if isinstance(model.get_submodule(".".join(path[: length - 1])), nn.ModuleList):
            return ".".join(path[:length])
    return None


def _streams(buffers: Sequence[torch.Tensor]) -> Lanes:
    load, sweep, store = (StreamLane(own=True) for _ in range(3))
    ready = torch.cuda.current_stream().record_event()
    for lane in (load, sweep, store):
        lane.wait(ready)  # what had the buffers' memory before may still be at work
        for buffer in buffers:
            lane.uses(buffer)
    return Lanes(load, sweep, store, StreamLane(own=False))


def _chunk_elements(total: int) -> int:
    """A power of two, for that is what pinned memory is allocated in."""
    wanted: int = 2 ** max(0, (total // CHUNKS_A_MASTER).bit_length() - 1)
    return max(SMALLEST_CHUNK, min(wanted, LARGEST_CHUNK))


def _packed(slices: Sequence[Slice], stages: Sequence[int], size: int) -> Iterator[list[Piece]]:
    """All slices by stage, cut where a chunk of this size is full."""
    pieces: list[Piece] = []
    used = 0
    for index in sorted(range(len(slices)), key=stages.__getitem__):
        rest: Slice | None = slices[index] if slices[index].live.numel() else None
        while rest is not None:
            count = _fitting(rest, size - used)
            if count:
                part, rest = _cut(rest, count)
                pieces.append(Piece(index, part, used))
                used = _up(used + part.live.numel())
            elif not pieces:
                raise ValueError(f"a chunk of {size} elements is smaller than a row")
            if rest is not None:
                yield pieces
                pieces, used = [], 0
    if pieces:
        yield pieces


def _fitting(part: Slice, room: int) -> int:
    """How much of a slice fits: rows, or columns of its only row."""
    rows, columns = part.live.shape
    if part.live.numel() <= room:
        return columns if rows == 1 else rows
    return max(0, room) // ALIGNMENT * ALIGNMENT if rows == 1 else max(0, room) // columns


def _cut(part: Slice, count: int) -> tuple[Slice, Slice | None]:
    """A slice's first rows, or first columns of its only row, and what is left, if anything is."""
    initial, live = part.master, part.live
    assert initial is not None
    dimension = 1 if live.shape[0] == 1 else 0
    left = live.shape[dimension] - count
    if left == 0:
        return part, None
    begin = part.region.start + count * (1 if dimension else part.region.row_stride)
    first = replace(
        part,
        master=initial.narrow(dimension, 0, count),
        live=live.narrow(dimension, 0, count),
    )
    rest = replace(
        part,
        region=TensorRegion(part.region.name, begin, part.region.row_stride),
        master=initial.narrow(dimension, count, left),
        live=live.narrow(dimension, count, left),
    )
    return first, rest


def _end(pieces: Sequence[Piece]) -> int:
    return max(piece.offset + piece.part.live.numel() for piece in pieces)


def _up(value: int) -> int:
    return -(-value // ALIGNMENT) * ALIGNMENT
