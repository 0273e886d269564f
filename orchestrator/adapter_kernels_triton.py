"""Low-rank products of many adapters in one batch, on a CUDA device, in Triton.

Owns two products and how they are cut: shrink, x A^T, and expand, output += scaling * (x A^T) B^T,
also with the activation of a gated perceptron behind it. Both are bound by memory, so each reads
its large operand once. The rows of a batch are cut into tiles that belong to one slot, and a tile
of neighbouring rows is one program's. A row's result depends on its own values and its slot alone:
shapes of tiles and the order of sums follow from a module's shape, never from the batch, and
nothing is added atomically. Knows nothing of SGLang, or of what the factors are.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, groupby
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

NO_SLOT = -1
TILE_ROWS = 64
# A split sums so many inputs; what a module has beyond goes to further programs, or a short batch
# would keep most of the device idle.
INPUTS_PER_SPLIT = 4096
MAX_SHRINK_COLUMNS = 64
MIN_DOT = 16  # the least that a dimension of tl.dot may be
COLUMN_ALIGNMENT = tl.constexpr(16)
TABLE_WIDTH = tl.constexpr(4)


class Launch(NamedTuple):
    """How a kernel is cut and compiled; the results' last bits depend on `block` alone."""

    block: int
    """Of shrink: bytes of a row in a step of its sum. Of the others: columns of a tile."""
    warps: int
    stages: int


SHRINK = Launch(block=256, warps=4, stages=4)
EXPAND = Launch(block=128, warps=8, stages=1)
ACTIVATE = Launch(block=128, warps=8, stages=1)


class RowTiles(NamedTuple):
    """The rows of a batch, cut into tiles of at most TILE_ROWS neighbours with the same slot."""

    table: torch.Tensor
    """int32 [tiles, 4]: first row, number of rows, slot or NO_SLOT, bits of a float32 scaling."""
    num_adapted: int
    """Tiles with a slot; they stand first, though some may be empty."""
    num_tiles: int
    rows: int = TILE_ROWS
    """A tile's rows, at most."""


class Slice(NamedTuple):
    """Columns of an output that one of several stacked modules makes."""

    position: int
    first: int
    end: int


def cut_rows(
    lengths: Sequence[int],
    slots: Sequence[int],
    scalings: Sequence[float],
    tile_rows: int = TILE_ROWS,
) -> RowTiles:
    """Cut the rows of a batch; the table lies on the CPU.

    `lengths` and `slots` (NO_SLOT for none) are by request, in the order of their rows;
    `scalings` by slot. Neighbours with the same slot are taken together.
    """
    ends = accumulate(lengths)
    requests = zip(slots, lengths, ends, strict=True)
    bits = np.asarray([*scalings, 0.0], np.float32).view(np.int32).tolist()  # the last for NO_SLOT
    adapted: list[tuple[int, int, int, int]] = []
    plain: list[tuple[int, int, int, int]] = []
    for slot, group in groupby(requests, key=lambda request: request[0]):
        members = list(group)
        first, last = members[0][2] - members[0][1], members[-1][2]
        tiles = plain if slot == NO_SLOT else adapted
        for row in range(first, last, tile_rows):
            tiles.append((row, min(tile_rows, last - row), slot, bits[slot]))
    table = torch.tensor(adapted + plain, dtype=torch.int32).view(-1, TABLE_WIDTH.value)
    return RowTiles(table, len(adapted), len(table), tile_rows)


def shrink(
    x: torch.Tensor,
    factors: torch.Tensor,
    tiles: RowTiles,
    launch: Launch = SHRINK,
    inputs_per_split: int = INPUTS_PER_SPLIT,
) -> torch.Tensor:
    """x A^T of each row's slot, in parts that are still to be added: float32 [splits, rows, width].

    `x` [rows, inputs] and `factors` [slots, width, inputs] are contiguous, of one dtype. Rows
    without a slot are left as they happen to be.
    """
    _require_contiguous(x, factors)
    (rows, inputs), width = x.shape, factors.shape[1]
    block_inputs = launch.block // x.element_size()
    least = triton.cdiv(inputs, triton.cdiv(inputs, inputs_per_split))
    split = triton.cdiv(least, block_inputs) * block_inputs
    num_splits = triton.cdiv(inputs, split)
    block_width = min(max(triton.next_power_of_2(width), MIN_DOT), MAX_SHRINK_COLUMNS)
    width_tiles = triton.cdiv(width, block_width)
    parts = torch.empty(num_splits, rows, width, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _shrink[(tiles.num_adapted * num_splits * width_tiles,)](
            x,
            factors,
            parts,
            tiles.table,
            rows,
            INPUTS=inputs,
            WIDTH=width,
            SPLIT=split,
            NUM_SPLITS=num_splits,
            WIDTH_TILES=width_tiles,
            BLOCK_ROWS=tiles.rows,
            BLOCK_WIDTH=block_width,
            BLOCK_INPUTS=block_inputs,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
    return parts


def expand(
    parts: torch.Tensor,
    factors: torch.Tensor,
    output: torch.Tensor,
    tiles: RowTiles,
    slices: tuple[Slice, ...],
    launch: Launch = EXPAND,
) -> None:
    """Add scaling * (x A^T) B^T of each row's slot to `output` [rows, outputs], in place.

    `parts` is shrink's; `factors` [slots, outputs, rank] gives a slice's columns from parts
    position * rank on. What lies in none of the `slices`, and rows without a slot, stay untouched.
    """
    _require_contiguous(parts, factors, output)
    num_splits, rows, width = parts.shape
    _, outputs, rank = factors.shape
    aligned = all(bound % COLUMN_ALIGNMENT.value == 0 for part in slices for bound in part[1:])
    columns = _column_tiles(slices, launch.block, output.device)
    with torch.cuda.device_of(output):
        _expand[(tiles.num_adapted * len(columns),)](
            parts,
            factors,
            output,
            tiles.table,
            columns,
            len(columns),
            rows,
            OUTPUTS=outputs,
            WIDTH=width,
            RANK=rank,
            PADDED_RANK=max(triton.next_power_of_2(rank), MIN_DOT),
            NUM_SPLITS=num_splits,
            ALIGNED=aligned,
            BLOCK_ROWS=tiles.rows,
            BLOCK_COLUMNS=launch.block,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )


def expand_and_activate(
    parts: torch.Tensor,
    factors: torch.Tensor,
    gate_up: torch.Tensor,
    tiles: RowTiles,
    launch: Launch = ACTIVATE,
) -> torch.Tensor:
    """silu(gate) * up of all rows, [rows, outputs / 2], with the adapters' share in both.

    `gate_up` [rows, outputs] holds the gates, then the ups, and is only read; `parts` and
    `factors` are as expand's, for two slices of half the outputs each.
    """
    _require_contiguous(parts, factors, gate_up)
    num_splits, rows, width = parts.shape
    inner, rank = factors.shape[1] // 2, factors.shape[2]
    activated = torch.empty(rows, inner, dtype=gate_up.dtype, device=gate_up.device)
    with torch.cuda.device_of(gate_up):
        _expand_and_activate[(tiles.num_tiles * triton.cdiv(inner, launch.block),)](
            parts,
            factors,
            gate_up,
            activated,
            tiles.table,
            rows,
            INNER=inner,
            WIDTH=width,
            RANK=rank,
            PADDED_RANK=max(triton.next_power_of_2(rank), MIN_DOT),
            NUM_SPLITS=num_splits,
            BLOCK_ROWS=tiles.rows,
            BLOCK_COLUMNS=launch.block,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
    return activated


def _require_contiguous(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError(f"not contiguous: shape {tensor.shape}, strides {tensor.stride()}")


@cache
def _column_tiles(slices: tuple[Slice, ...], block: int, device: torch.device) -> torch.Tensor:
    """int32 [tiles, 4] on the device: first column, end of the slice, its position, nothing."""
    tiles = [
        (column, part.end, part.position, 0)
        for part in slices
        for column in range(part.first, part.end, block)
    ]
    return torch.tensor(tiles, dtype=torch.int32).to(device)


@triton.jit(do_not_specialize=["num_rows"])
def _shrink(
    x: tl.tensor,
    factors: tl.tensor,
    parts: tl.tensor,
    row_tiles: tl.tensor,
    num_rows: tl.int64,
    INPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    WIDTH_TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
) -> None:
    # Neighbours read the same part of x, which then stays in the cache.
    program = tl.program_id(0)
    split = (program // WIDTH_TILES) % NUM_SPLITS
    tile = program // (WIDTH_TILES * NUM_SPLITS)
    first_row, row, in_tile, slot, _ = _row_tile(row_tiles, tile, BLOCK_ROWS)
    if slot < 0:
        return
    column = (program % WIDTH_TILES) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    of_factors = column < WIDTH
    of_split = split * SPLIT + tl.arange(0, BLOCK_INPUTS)
    x_rows = x + first_row * INPUTS + row[:, None] * INPUTS
    factor_rows = factors + slot.to(tl.int64) * (WIDTH * INPUTS) + column[None, :] * INPUTS
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for start in range(0, SPLIT, BLOCK_INPUTS):
        inputs = of_split + start
        of_x, of_factor = in_tile[:, None], of_factors[None, :]
        if NUM_SPLITS * SPLIT != INPUTS:
            of_x = of_x & (inputs < INPUTS)[None, :]
            of_factor = of_factor & (inputs < INPUTS)[:, None]
        left = tl.load(x_rows + inputs[None, :], mask=of_x, other=0)
        right = tl.load(factor_rows + inputs[:, None], mask=of_factor, other=0)
        total = tl.dot(left, right, total, input_precision="ieee")
    targets = parts + (split * num_rows + first_row) * WIDTH
    targets += row[:, None] * WIDTH + column[None, :]
    tl.store(targets, total, mask=in_tile[:, None] & of_factors[None, :])


@triton.jit(do_not_specialize=["num_columns", "num_rows"])
def _expand(
    parts: tl.tensor,
    factors: tl.tensor,
    output: tl.tensor,
    row_tiles: tl.tensor,
    column_tiles: tl.tensor,
    num_columns: tl.int32,
    num_rows: tl.int64,
    OUTPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    # Neighbours write next to each other.
    program = tl.program_id(0)
    entry = column_tiles + (program % num_columns) * TABLE_WIDTH
    first, end, position = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    tile = program // num_columns
    first_row, row, in_tile, slot, scaling = _row_tile(row_tiles, tile, BLOCK_ROWS)
    if slot < 0:
        return
    if ALIGNED:
        first, end = tl.multiple_of(first, COLUMN_ALIGNMENT), tl.multiple_of(end, COLUMN_ALIGNMENT)
    column = first + tl.arange(0, BLOCK_COLUMNS)
    in_slice = column < end
    inside = in_tile[:, None] & in_slice[None, :]
    targets = output + first_row * OUTPUTS + row[:, None] * OUTPUTS + column[None, :]
    base = tl.load(targets, mask=inside, other=0)  # under way while the product is made
    right = _factors(factors, slot, column, in_slice, OUTPUTS, RANK, PADDED_RANK)
    parts += first_row * WIDTH + position * RANK
    left = _sum_parts(parts, row, in_tile, num_rows, WIDTH, RANK, PADDED_RANK, NUM_SPLITS)
    delta = tl.dot(left.to(right.dtype), right, input_precision="ieee") * scaling
    tl.store(targets, (base.to(tl.float32) + delta).to(base.dtype), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _expand_and_activate(
    parts: tl.tensor,
    factors: tl.tensor,
    gate_up: tl.tensor,
    activated: tl.tensor,
    row_tiles: tl.tensor,
    num_rows: tl.int64,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    NUM_COLUMNS: tl.constexpr = tl.cdiv(INNER, BLOCK_COLUMNS)
    tile = program // NUM_COLUMNS
    first_row, row, in_tile, slot, scaling = _row_tile(row_tiles, tile, BLOCK_ROWS)
    column = (program % NUM_COLUMNS) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_slice = column < INNER
    inside = in_tile[:, None] & in_slice[None, :]
    gates = gate_up + first_row * (2 * INNER) + row[:, None] * (2 * INNER) + column[None, :]
    gate = tl.load(gates, mask=inside, other=0)
    up = tl.load(gates + INNER, mask=inside, other=0)
    # Without a slot, factors are taken for zeros and not read: others' may be infinite.
    adapted = slot >= 0
    slot = tl.maximum(slot, 0)
    of_parts, of_factors = in_tile & adapted, in_slice & adapted
    right = _factors(factors, slot, column, of_factors, 2 * INNER, RANK, PADDED_RANK)
    parts += first_row * WIDTH
    left = _sum_parts(parts, row, of_parts, num_rows, WIDTH, RANK, PADDED_RANK, NUM_SPLITS)
    delta = tl.dot(left.to(right.dtype), right, input_precision="ieee") * scaling
    whole_gate = gate.to(tl.float32) + delta
    parts += RANK
    left = _sum_parts(parts, row, of_parts, num_rows, WIDTH, RANK, PADDED_RANK, NUM_SPLITS)
    right = _factors(factors, slot, INNER + column, of_factors, 2 * INNER, RANK, PADDED_RANK)
    delta = tl.dot(left.to(right.dtype), right, input_precision="ieee") * scaling
    whole_up = up.to(tl.float32) + delta
    product = whole_gate * tl.sigmoid(whole_gate) * whole_up
    targets = activated + first_row * INNER + row[:, None] * INNER + column[None, :]
    tl.store(targets, product.to(gate.dtype), mask=inside)


@triton.jit
def _row_tile(
    row_tiles: tl.tensor, index: tl.tensor, BLOCK_ROWS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """A tile's first row, rows from there [BLOCK_ROWS], which are in it, its slot and scaling."""
    entry = row_tiles + index * TABLE_WIDTH
    first_row = tl.load(entry).to(tl.int64)
    row = tl.arange(0, BLOCK_ROWS)
    scaling = tl.load(entry + 3).to(tl.float32, bitcast=True)
    return first_row, row, row < tl.load(entry + 1), tl.load(entry + 2), scaling


@triton.jit
def _sum_parts(
    parts: tl.tensor,
    row: tl.tensor,
    wanted: tl.tensor,
    num_rows: tl.tensor,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
) -> tl.tensor:
    """A slice of x A^T, float32 [rows, PADDED_RANK]; zeros where rows are not wanted."""
    rank = tl.arange(0, PADDED_RANK)
    offsets = row[:, None] * WIDTH + rank[None, :]
    inside = wanted[:, None] & (rank < RANK)[None, :]
    total = tl.load(parts + offsets, mask=inside, other=0)
    for split in tl.static_range(1, NUM_SPLITS):
        total += tl.load(parts + split * num_rows * WIDTH + offsets, mask=inside, other=0)
    return total


@triton.jit
def _factors(
    factors: tl.tensor,
    slot: tl.tensor,
    column: tl.tensor,
    wanted: tl.tensor,
    OUTPUTS: tl.constexpr,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
) -> tl.tensor:
    """A slot's B^T, [PADDED_RANK, columns]; zeros where columns are not wanted."""
    rank = tl.arange(0, PADDED_RANK)
    of_slot = factors + slot.to(tl.int64) * (OUTPUTS * RANK)
    inside = (rank < RANK)[:, None] & wanted[None, :]
    return tl.load(of_slot + column[None, :] * RANK + rank[:, None], mask=inside, other=0)
