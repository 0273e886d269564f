"""Sweeps over slices of parameters on a CUDA device, in Triton: perturb, update and digest.

Owns the launches: one for all slices of the same dtypes, whatever their number, driven by a table
of addresses on the device. Noise exists only in registers; each element is read and written once.
The results are the bits that noise.py specifies. It does not know where slices come from or what
seeds and coefficients mean.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from orchestrator.noise import (
    DIGEST_BITS_MULTIPLIER,
    DIGEST_INDEX_MULTIPLIER,
    DIGEST_MIX_MULTIPLIERS,
    GAUSSIAN_BLOCK,
    RADEMACHER_BLOCK,
    NoiseKind,
    gaussian_magnitudes,
    low_rank_scale,
    tensor_word,
)
from orchestrator.noise_triton import (
    BITS_PER_BLOCK,
    HALFWORDS_PER_BLOCK,
    ROUNDING,
    block_halfwords,
    draw,
    load,
    round_stochastic,
    rounding_bits,
    store_exact,
    store_nearest,
)
from orchestrator.records import StepUpdate
from orchestrator.sweeps import (
    Draw,
    Factors,
    Slice,
    check_counts,
    check_factors,
    check_layout,
    masters,
)

# Elements and warps of one program, the fastest of some that were tried on an H200. Tiles are
# multiples of the noise's blocks; of few warps, programs wait less for each other.
GAUSSIAN_TILE, GAUSSIAN_WARPS = 512, 1
RADEMACHER_TILE, RADEMACHER_WARPS = 2048, 2
DIGEST_TILE, DIGEST_WARPS = 1024, 4
# Tiles of low-rank noise span rows too: a right factor is read once for all of them. More rows
# would take registers from the programs that hide the memory's latency.
LOW_RANK_ROWS, LOW_RANK_COLUMNS, LOW_RANK_WARPS = 4, 512, 4
VECTOR_BYTES = 16
VECTOR_ELEMENTS = 8  # whose 16-bit values fill a vector

DIGEST_INDEX = tl.constexpr(DIGEST_INDEX_MULTIPLIER)
DIGEST_BITS = tl.constexpr(DIGEST_BITS_MULTIPLIER)
DIGEST_MIX_0 = tl.constexpr(DIGEST_MIX_MULTIPLIERS[0])
DIGEST_MIX_1 = tl.constexpr(DIGEST_MIX_MULTIPLIERS[1])
ALIGNED_BYTES = tl.constexpr(VECTOR_BYTES)
ALIGNED_ELEMENTS = tl.constexpr(VECTOR_ELEMENTS)


class Field(IntEnum):
    """What the device's table says of a slice, one int64 each."""

    MASTER = 0
    LIVE = 1
    ROWS = 2
    COLUMNS = 3
    LIVE_STRIDE = 4
    START = 5
    ROW_STRIDE = 6
    NAME_WORD = 7
    DRAW = 8
    FIRST_PROGRAM = 9
    TILES = 10
    LEFT = 11
    RIGHT = 12


NUM_FIELDS = tl.constexpr(16)
MASTER = tl.constexpr(int(Field.MASTER))
LIVE = tl.constexpr(int(Field.LIVE))
ROWS = tl.constexpr(int(Field.ROWS))
COLUMNS = tl.constexpr(int(Field.COLUMNS))
LIVE_STRIDE = tl.constexpr(int(Field.LIVE_STRIDE))
START = tl.constexpr(int(Field.START))
ROW_STRIDE = tl.constexpr(int(Field.ROW_STRIDE))
NAME_WORD = tl.constexpr(int(Field.NAME_WORD))
DRAW = tl.constexpr(int(Field.DRAW))
FIRST_PROGRAM = tl.constexpr(int(Field.FIRST_PROGRAM))
TILES = tl.constexpr(int(Field.TILES))
LEFT = tl.constexpr(int(Field.LEFT))
RIGHT = tl.constexpr(int(Field.RIGHT))

POINTED = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.uint16,  # rounded with integers, alike on every device
    None: None,
}


@dataclass(frozen=True, slots=True)
class Tiling:
    """How slices are cut into programs.

    `columns` is a multiple of `block`, the elements that one block of random words serves. Tiles
    begin where blocks begin. With one row a tile, slices whose rows are adjacent count as one row.
    """

    block: int
    columns: int
    warps: int
    rows: int = 1


@dataclass(frozen=True, slots=True)
class Launch:
    """Slices that one kernel sweeps over, each program a tile of one of them."""

    indices: tuple[int, ...]
    """The slices' places in the table."""
    fields: torch.Tensor
    """What each slice is: int64 [slices, 16], see Field."""
    owners: torch.Tensor
    """Each program's slice: int32 [programs]."""
    constants: dict[str, Any]

    @property
    def grid(self) -> tuple[int]:
        return (len(self.owners),)


class Table:
    """See sweeps.Table."""

    def __init__(self, slices: Sequence[Slice]) -> None:
        for part in slices:
            check_layout(part)
        self._slices = list(slices)
        self._device = slices[0].live.device if slices else torch.device("cuda")
        self._launches: dict[Tiling, list[Launch]] = {}

    def perturb(self, kind: NoiseKind, draws: Sequence[Draw]) -> None:
        seeds = self._unsigned([draw.seed for draw in draws])
        coefficients = self._floats([draw.coefficient for draw in draws])
        for launch in self._cut(_tiling(kind)):
            _perturb[launch.grid](
                launch.fields,
                launch.owners,
                seeds,
                coefficients,
                _magnitudes(self._device),
                GAUSSIAN=kind == "gaussian",
                enable_fp_fusion=False,
                **launch.constants,
            )

    def update(
        self, kind: NoiseKind, updates: Sequence[StepUpdate], then: Draw | None = None
    ) -> None:
        masters(self._slices)
        check_counts(updates)
        draws = [draw for update in updates for draw in _draws(update)]
        last = [] if then is None else [then]
        numbers = (
            self._unsigned([draw.seed for draw in draws + last]),
            self._floats([draw.coefficient for draw in draws + last]),
            self._counts(_closings(updates)),
            self._unsigned([update.step for update in updates]),
            self._floats([update.decay for update in updates]),
        )
        for launch in self._cut(_tiling(kind)):
            _update[launch.grid](
                launch.fields,
                launch.owners,
                *numbers,
                len(draws),
                _magnitudes(self._device),
                GAUSSIAN=kind == "gaussian",
                THEN=then is not None,
                enable_fp_fusion=False,
                **launch.constants,
            )

    def low_rank_update(self, factors: Sequence[Factors], update: StepUpdate) -> None:
        check_counts([update])
        for master, pair in zip(masters(self._slices), factors, strict=True):
            check_factors(master, pair, len(update.seeds))
        ranks = {pair.left.shape[2] for pair in factors}
        if len(ranks) > 1:
            raise ValueError(f"factors of several ranks: {sorted(ranks)}")
        coefficients = self._floats(update.coefficients)
        tiling = Tiling(GAUSSIAN_BLOCK, LOW_RANK_COLUMNS, LOW_RANK_WARPS, LOW_RANK_ROWS)
        for launch in self._cut(tiling):
            chosen = [factors[index] for index in launch.indices]
            launch.fields[:, Field.LEFT : Field.RIGHT + 1] = torch.tensor(
                [[pair.left.data_ptr(), pair.right.data_ptr()] for pair in chosen]
            )
            rank = chosen[0].left.shape[2]
            _low_rank_update[launch.grid](
                launch.fields,
                launch.owners,
                coefficients,
                len(update.seeds),
                update.step,
                update.decay,
                float(low_rank_scale(rank)),
                RANK=rank,
                ROWS_A_TILE=LOW_RANK_ROWS,
                enable_fp_fusion=False,
                **launch.constants,
            )

    def digests(self, *, live: bool = False) -> list[int]:
        values = [part.live for part in self._slices] if live else masters(self._slices)
        sums = [0] * len(self._slices)
        for launch in self._cut(Tiling(1, DIGEST_TILE, DIGEST_WARPS)):
            partial = torch.empty(launch.grid, dtype=torch.int64, device=self._device)
            _digest[launch.grid](
                launch.fields,
                launch.owners,
                partial,
                OF_LIVE=live,
                BITS=_bits(values[launch.indices[0]].dtype),
                TILE=DIGEST_TILE,
                num_warps=DIGEST_WARPS,
            )
            own = torch.zeros(len(launch.indices), dtype=torch.int64, device=self._device)
            own.index_add_(0, launch.owners, partial)
            for index, total in zip(launch.indices, own.tolist(), strict=True):
                sums[index] = total % 2**64
        return sums

    def _cut(self, tiling: Tiling) -> list[Launch]:
        if tiling not in self._launches:
            groups = defaultdict(list)
            for index, part in enumerate(self._slices):
                if part.live.numel():
                    groups[_constants(part, tiling)].append(index)
            self._launches[tiling] = [
                self._launch(tiling, indices, dict(constants))
                for constants, indices in groups.items()
            ]
        return self._launches[tiling]

    def _launch(self, tiling: Tiling, indices: list[int], constants: dict[str, Any]) -> Launch:
        rows: list[list[int]] = []
        counts: list[int] = []
        for index in indices:
            part = self._slices[index]
            fields, count = _described(part, tiling, constants["ALIGNED"])
            fields[Field.FIRST_PROGRAM] = sum(counts)
            rows.append(fields)
            counts.append(count)
        owners = torch.arange(len(indices), dtype=torch.int32)
        return Launch(
            tuple(indices),
            torch.tensor(rows, dtype=torch.int64).to(self._device),
            owners.repeat_interleave(torch.tensor(counts)).to(self._device),
            constants,
        )

    def _unsigned(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.uint64).to(self._device, non_blocking=True)

    def _floats(self, values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32).to(self._device, non_blocking=True)

    def _counts(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32).to(self._device, non_blocking=True)


def _draws(update: StepUpdate) -> list[Draw]:
    """A step's draws; for a step without any, one that adds nothing."""
    draws = [Draw(*pair) for pair in zip(update.seeds, update.coefficients, strict=True)]
    return draws or [Draw(0, 0.0)]


def _closings(updates: Sequence[StepUpdate]) -> list[int]:
    """Per draw, the number of the step that it is the last of, or -1."""
    return [
        number if draw == len(_draws(update)) - 1 else -1
        for number, update in enumerate(updates)
        for draw in range(len(_draws(update)))
    ]


def _bits(dtype: torch.dtype) -> tl.dtype:
    return tl.uint32 if dtype is torch.float32 else tl.uint16


def _tiling(kind: NoiseKind) -> Tiling:
    if kind == "gaussian":
        return Tiling(GAUSSIAN_BLOCK, GAUSSIAN_TILE, GAUSSIAN_WARPS)
    return Tiling(RADEMACHER_BLOCK, RADEMACHER_TILE, RADEMACHER_WARPS)


def _constants(part: Slice, tiling: Tiling) -> tuple[tuple[str, Any], ...]:
    """What a kernel is compiled for; slices that agree in it share a launch."""
    is_live_master = part.master is not None and part.live.data_ptr() == part.master.data_ptr()
    served = None if is_live_master else part.live.dtype
    stored = None if part.master is None else part.master.dtype
    return (
        ("STORED", POINTED[stored]),
        ("SERVED", POINTED[served]),
        ("ALIGNED", _is_aligned(part, tiling)),
        ("TILE", tiling.columns),
        ("num_warps", tiling.warps),
    )


def _shape(part: Slice, tiling: Tiling) -> tuple[int, int]:
    rows, columns = part.live.shape
    is_one_row = part.live.is_contiguous() and part.region.row_stride == columns
    return (1, rows * columns) if is_one_row and tiling.rows == 1 else (rows, columns)


def _is_aligned(part: Slice, tiling: Tiling) -> bool:
    """Whether all rows begin with a block of words and are made of whole vectors."""
    rows, columns = _shape(part, tiling)
    tensors = [part.live] if part.master is None else [part.live, part.master]
    begins = [part.region.start, *([part.region.row_stride] if rows > 1 else [])]
    widths = [columns, *([part.live.stride(0)] if rows > 1 else [])]
    return (
        all(begin % tiling.block == 0 for begin in begins)
        and all(width % VECTOR_ELEMENTS == 0 for width in widths)
        and all(tensor.data_ptr() % VECTOR_BYTES == 0 for tensor in tensors)
    )


def _described(part: Slice, tiling: Tiling, aligned: bool) -> tuple[list[int], int]:
    """A slice's fields, and the number of its programs."""
    rows, columns = _shape(part, tiling)
    reach = columns if aligned else columns + tiling.block - 1  # a tile may begin before its row
    across, down = triton.cdiv(reach, tiling.columns), triton.cdiv(rows, tiling.rows)
    fields = [0] * NUM_FIELDS.value
    fields[Field.MASTER] = 0 if part.master is None else part.master.data_ptr()
    fields[Field.LIVE] = part.live.data_ptr()
    fields[Field.ROWS] = rows
    fields[Field.COLUMNS] = columns
    fields[Field.LIVE_STRIDE] = part.live.stride(0)
    fields[Field.START] = part.region.start
    fields[Field.ROW_STRIDE] = part.region.row_stride
    fields[Field.NAME_WORD] = tensor_word(part.region.name)
    fields[Field.DRAW] = part.draw
    # Low-rank tiles that follow each other lie below each other: they share right factors.
    fields[Field.TILES] = across if tiling.rows == 1 else down
    return fields, across * down


@cache
def _magnitudes(device: torch.device) -> torch.Tensor:
    """The bits of the magnitudes, uint32 [1024]."""
    return torch.tensor(gaussian_magnitudes()).view(torch.uint32).to(device)


@triton.jit
def _perturb(
    fields: tl.tensor,
    owners: tl.tensor,
    seeds: tl.tensor,
    coefficients: tl.tensor,
    magnitudes: tl.tensor,
    GAUSSIAN: tl.constexpr,
    STORED: tl.constexpr,
    SERVED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    entry, tile = _slice(fields, owners)
    row, column, inside, index = _elements(entry, tile, GAUSSIAN, ALIGNED, TILE)
    if STORED is None:
        value = tl.zeros([TILE], tl.float32)
    else:
        master = _row(entry, MASTER, row, tl.load(entry + COLUMNS), STORED, ALIGNED)
        value = load(master, column, inside)
    name_word = tl.load(entry + NAME_WORD).to(tl.uint32)
    which = tl.load(entry + DRAW)
    z = draw(tl.load(seeds + which), name_word, index, magnitudes, GAUSSIAN, TILE)
    live = _row(entry, LIVE, row, tl.load(entry + LIVE_STRIDE), SERVED, ALIGNED)
    store_nearest(live, column, value + tl.load(coefficients + which) * z, inside)


@triton.jit(do_not_specialize=["num_draws"])
def _update(
    fields: tl.tensor,
    owners: tl.tensor,
    seeds: tl.tensor,
    coefficients: tl.tensor,
    closings: tl.tensor,
    steps: tl.tensor,
    decays: tl.tensor,
    num_draws: tl.int32,
    magnitudes: tl.tensor,
    GAUSSIAN: tl.constexpr,
    THEN: tl.constexpr,
    STORED: tl.constexpr,
    SERVED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    entry, tile = _slice(fields, owners)
    row, column, inside, index = _elements(entry, tile, GAUSSIAN, ALIGNED, TILE)
    master = _row(entry, MASTER, row, tl.load(entry + COLUMNS), STORED, ALIGNED)
    value = load(master, column, inside)
    name_word = tl.load(entry + NAME_WORD).to(tl.uint32)
    total = tl.zeros([TILE], tl.float32)
    # One loop over the draws of all steps: of two nested ones, Triton 3.6 keeps the inner sum.
    for i in range(num_draws):
        z = draw(tl.load(seeds + i), name_word, index, magnitudes, GAUSSIAN, TILE)
        total = total + tl.load(coefficients + i) * z
        number = tl.load(closings + i)
        if number >= 0:
            value = value * tl.load(decays + number) + total
            if STORED is tl.uint16:
                rounding = rounding_bits(tl.load(steps + number), name_word, index, TILE)
                value = round_stochastic(value, rounding)
            total = tl.zeros([TILE], tl.float32)
    store_exact(master, column, value, inside)
    if THEN:
        z = draw(tl.load(seeds + num_draws), name_word, index, magnitudes, GAUSSIAN, TILE)
        value = value + tl.load(coefficients + num_draws) * z
    if SERVED is not None:
        live = _row(entry, LIVE, row, tl.load(entry + LIVE_STRIDE), SERVED, ALIGNED)
        store_nearest(live, column, value, inside)


@triton.jit(do_not_specialize=["num_seeds", "step"])
def _low_rank_update(
    fields: tl.tensor,
    owners: tl.tensor,
    coefficients: tl.tensor,
    num_seeds: tl.int32,
    step: tl.uint64,
    decay: tl.float32,
    scale: tl.float32,
    RANK: tl.constexpr,
    ROWS_A_TILE: tl.constexpr,
    STORED: tl.constexpr,
    SERVED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    entry, tile = _slice(fields, owners)
    rows, columns = tl.load(entry + ROWS), tl.load(entry + COLUMNS)
    tiles_down = tl.load(entry + TILES).to(tl.int32)
    row = (tile % tiles_down).to(tl.int64) * ROWS_A_TILE + tl.arange(0, ROWS_A_TILE)[:, None]
    within_row = (tile // tiles_down).to(tl.int64) * TILE
    row_index = tl.load(entry + START) + row * tl.load(entry + ROW_STRIDE)
    # [1, TILE], or [ROWS_A_TILE, TILE] where each row begins elsewhere in a block
    column = within_row + tl.arange(0, TILE)[None, :]
    if ALIGNED:
        columns = tl.multiple_of(columns, ALIGNED_ELEMENTS)
    else:
        column = column - row_index % HALFWORDS_PER_BLOCK
    of_right = (column >= 0) & (column < columns)
    of_left = row < rows
    inside = of_left & of_right
    master = _row(entry, MASTER, 0, 0, STORED, ALIGNED)
    value = load(master, row * columns + column, inside)
    left = _row(entry, LEFT, 0, 0, tl.float32, True)
    right = _row(entry, RIGHT, 0, 0, tl.float32, True)
    total = tl.zeros([ROWS_A_TILE, TILE], tl.float32)
    for i in range(num_seeds):
        z = tl.zeros([ROWS_A_TILE, TILE], tl.float32)
        for k in tl.static_range(RANK):
            u = tl.load(left + (i * rows + row) * RANK + k, mask=of_left, other=0)
            v = tl.load(right + (i * RANK + k) * columns + column, mask=of_right, other=0)
            z = z + u * v
        total = total + tl.load(coefficients + i) * (z * scale)
    value = value * decay + total
    if STORED is tl.uint16:
        name_word = tl.load(entry + NAME_WORD).to(tl.uint32)
        first_block = (row_index + within_row) // HALFWORDS_PER_BLOCK
        block = first_block + tl.arange(0, TILE // HALFWORDS_PER_BLOCK)[None, :]
        rounding = block_halfwords(step, name_word, ROUNDING, block, ROWS_A_TILE * TILE)
        value = round_stochastic(value, tl.reshape(rounding, [ROWS_A_TILE, TILE]))
    store_exact(master, row * columns + column, value, inside)
    if SERVED is not None:
        live = _row(entry, LIVE, 0, 0, SERVED, ALIGNED)
        stride = tl.load(entry + LIVE_STRIDE)
        if ALIGNED:
            stride = tl.multiple_of(stride, ALIGNED_ELEMENTS)
        store_nearest(live, row * stride + column, value, inside)


@triton.jit
def _digest(
    fields: tl.tensor,
    owners: tl.tensor,
    partial_sums: tl.tensor,
    OF_LIVE: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    entry, tile = _slice(fields, owners)
    tiles = tl.load(entry + TILES).to(tl.int32)
    row = (tile // tiles).to(tl.int64)
    column = (tile % tiles).to(tl.int64) * TILE + tl.arange(0, TILE)
    columns = tl.load(entry + COLUMNS)
    inside = column < columns
    if OF_LIVE:
        values = _row(entry, LIVE, row, tl.load(entry + LIVE_STRIDE), BITS, False)
    else:
        values = _row(entry, MASTER, row, columns, BITS, False)
    bits = tl.load(values + column, mask=inside, other=0).to(tl.uint64)
    row_index = tl.load(entry + START) + row * tl.load(entry + ROW_STRIDE)
    mixed = (row_index + column).to(tl.uint64) * DIGEST_INDEX + (bits + 1) * DIGEST_BITS
    mixed = (mixed ^ (mixed >> 30)) * DIGEST_MIX_0
    mixed = (mixed ^ (mixed >> 27)) * DIGEST_MIX_1
    mixed = mixed ^ (mixed >> 31)
    signed = tl.where(inside, mixed.to(tl.int64, bitcast=True), 0)
    tl.store(partial_sums + tl.program_id(0), tl.sum(signed, axis=0))


@triton.jit
def _slice(fields: tl.tensor, owners: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Where this program's slice is described, and which of its tiles is the program's."""
    program = tl.program_id(0)
    entry = fields + tl.load(owners + program) * NUM_FIELDS
    return entry, program - tl.load(entry + FIRST_PROGRAM).to(tl.int32)


@triton.jit
def _elements(
    entry: tl.tensor,
    tile: tl.tensor,
    GAUSSIAN: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """A tile's row, its columns [TILE], which exist, and the global index of the first of them.

    The index is a multiple of the block size, so the first columns of a row may be negative.
    """
    tiles = tl.load(entry + TILES).to(tl.int32)
    row = (tile // tiles).to(tl.int64)
    first = (tile % tiles).to(tl.int64) * TILE
    columns = tl.load(entry + COLUMNS)
    row_index = tl.load(entry + START) + row * tl.load(entry + ROW_STRIDE)
    index = row_index + first
    column = first + tl.arange(0, TILE)
    if ALIGNED:
        inside = column < tl.multiple_of(columns, ALIGNED_ELEMENTS)
    else:
        skipped = row_index % (HALFWORDS_PER_BLOCK if GAUSSIAN else BITS_PER_BLOCK)
        column -= skipped
        index -= skipped
        inside = (column >= 0) & (column < columns)
    return row, column, inside, index


@triton.jit
def _row(
    entry: tl.tensor,
    which: tl.constexpr,
    row: tl.tensor,
    stride: tl.tensor,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """Pointer to a row of what an address of a slice's description names."""
    start = tl.load(entry + which).to(tl.pointer_type(ELEMENT)) + row * stride
    if ALIGNED:
        start = tl.multiple_of(start, ALIGNED_BYTES)
    return start
