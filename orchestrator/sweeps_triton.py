"""Sweeps over slices of parameters on a CUDA device, in Triton: perturb, update and digest.

Owns the device form of noise version 1. A sweep is one launch that reads and writes each element
once; noise exists only in registers. The results are the bits that noise.py specifies. Launches
forbid fused multiply-add, which would round differently from a CPU. It does not know where slices
come from or what seeds and coefficients mean.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

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
    Stream,
    TensorRegion,
    gaussian_magnitudes,
    low_rank_scale,
    tensor_word,
)
from orchestrator.sweeps import check_counts, check_factors, check_layout, require_unit_columns

# Elements of one program. Rademacher tiles are larger: a block of words serves more elements.
GAUSSIAN_TILE = 1024
RADEMACHER_TILE = 4096
DIGEST_TILE = 1024
# Tiles of low-rank noise span rows too: a right factor is read once for all of them. More rows
# would take registers from the programs that hide the memory's latency.
LOW_RANK_ROWS = 4
LOW_RANK_COLUMNS = 512
MAGNITUDE_COUNT = 1024

HALFWORDS_PER_BLOCK = tl.constexpr(GAUSSIAN_BLOCK)
BITS_PER_BLOCK = tl.constexpr(RADEMACHER_BLOCK)
PERTURBATION = tl.constexpr(int(Stream.PERTURBATION))
ROUNDING = tl.constexpr(int(Stream.ROUNDING))
DIGEST_INDEX = tl.constexpr(DIGEST_INDEX_MULTIPLIER)
DIGEST_BITS = tl.constexpr(DIGEST_BITS_MULTIPLIER)
DIGEST_MIX_0 = tl.constexpr(DIGEST_MIX_MULTIPLIERS[0])
DIGEST_MIX_1 = tl.constexpr(DIGEST_MIX_MULTIPLIERS[1])
EXPONENT_BITS = tl.constexpr(0x7F800000)
BFLOAT16_NAN = tl.constexpr(0x7FC0)


class Cut(NamedTuple):
    """How a slice is cut into tiles, one a program.

    Tiles begin where blocks of words begin. A slice is `aligned` if all its rows do so too, which
    lets the kernels load and store whole vectors.
    """

    programs: int
    tiles_per_row: int
    tile: int
    aligned: bool


def perturb(
    master: torch.Tensor,
    live: torch.Tensor,
    region: TensorRegion,
    *,
    kind: NoiseKind,
    seed: int,
    coefficient: float,
) -> None:
    """See sweeps.Sweeps.perturb."""
    check_layout(master, live)
    cut = _cut(master, region, kind)
    with torch.cuda.device_of(master):
        _perturb[(cut.programs,)](
            _patterns(master),
            _patterns(live),
            _magnitudes(master.device),
            cut.tiles_per_row,
            master.shape[1],
            live.stride(0),
            region.start,
            region.row_stride,
            tensor_word(region.name),
            seed,
            coefficient,
            GAUSSIAN=kind == "gaussian",
            ALIGNED=cut.aligned,
            TILE=cut.tile,
            enable_fp_fusion=False,
        )


def update(
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
    """See sweeps.Sweeps.update."""
    check_counts(seeds, coefficients)
    check_layout(master, live)
    cut = _cut(master, region, kind)
    with torch.cuda.device_of(master):
        _update[(cut.programs,)](
            _patterns(master),
            _patterns(live),
            _magnitudes(master.device),
            torch.tensor(seeds, dtype=torch.uint64).to(master.device, non_blocking=True),
            torch.tensor(coefficients, dtype=torch.float32).to(master.device, non_blocking=True),
            len(seeds),
            cut.tiles_per_row,
            master.shape[1],
            live.stride(0),
            region.start,
            region.row_stride,
            tensor_word(region.name),
            step,
            decay,
            GAUSSIAN=kind == "gaussian",
            ALIGNED=cut.aligned,
            TILE=cut.tile,
            enable_fp_fusion=False,
        )


def low_rank_update(
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
    """See sweeps.Sweeps.low_rank_update."""
    check_factors(master, left, right, coefficients)
    check_layout(master, live)
    rows, columns = master.shape
    # only rounding bits come in blocks, and a float32 master draws none
    aligned = master.dtype is torch.float32 or _rows_begin_blocks(region, GAUSSIAN_BLOCK)
    tiles_down = triton.cdiv(rows, LOW_RANK_ROWS)
    tiles = triton.cdiv(columns if aligned else columns + GAUSSIAN_BLOCK - 1, LOW_RANK_COLUMNS)
    with torch.cuda.device_of(master):
        _low_rank_update[(tiles_down * tiles,)](
            _patterns(master),
            _patterns(live),
            left,
            right,
            torch.tensor(coefficients, dtype=torch.float32).to(master.device, non_blocking=True),
            len(coefficients),
            tiles_down,
            rows,
            columns,
            live.stride(0),
            region.start,
            region.row_stride,
            tensor_word(region.name),
            step,
            float(low_rank_scale(left.shape[2])),
            decay,
            RANK=left.shape[2],
            ALIGNED=aligned,
            ROWS=LOW_RANK_ROWS,
            COLUMNS=LOW_RANK_COLUMNS,
            enable_fp_fusion=False,
        )


def digest(values: torch.Tensor, region: TensorRegion) -> int:
    """See sweeps.Sweeps.digest. Waits for the device."""
    require_unit_columns(values)
    rows, columns = values.shape
    tiles = triton.cdiv(columns, DIGEST_TILE)
    partial_sums = torch.empty(rows * tiles, dtype=torch.int64, device=values.device)
    bits = values.view(torch.uint32 if values.dtype is torch.float32 else torch.uint16)
    with torch.cuda.device_of(values):
        _digest[(rows * tiles,)](
            bits,
            partial_sums,
            tiles,
            columns,
            values.stride(0),
            region.start,
            region.row_stride,
            TILE=DIGEST_TILE,
        )
    return int(partial_sums.sum()) % 2**64


def _patterns(values: torch.Tensor) -> torch.Tensor:
    """bfloat16 as uint16: the kernels round it with integers, alike on every device."""
    return values.view(torch.uint16) if values.dtype is torch.bfloat16 else values


def _cut(master: torch.Tensor, region: TensorRegion, kind: NoiseKind) -> Cut:
    rows, columns = master.shape
    block = GAUSSIAN_BLOCK if kind == "gaussian" else RADEMACHER_BLOCK
    tile = GAUSSIAN_TILE if kind == "gaussian" else RADEMACHER_TILE
    aligned = _rows_begin_blocks(region, block)
    tiles = triton.cdiv(columns if aligned else columns + block - 1, tile)
    return Cut(rows * tiles, tiles, tile, aligned)


def _rows_begin_blocks(region: TensorRegion, block: int) -> bool:
    """Whether all rows of a slice begin where blocks of words begin."""
    return region.start % block == 0 and region.row_stride % block == 0


@cache
def _magnitudes(device: torch.device) -> torch.Tensor:
    return torch.tensor(gaussian_magnitudes(), device=device)


@triton.jit(do_not_specialize=["tiles", "start", "row_stride", "name_word", "seed"])
def _perturb(
    master: tl.tensor,
    live: tl.tensor,
    magnitudes: tl.tensor,
    tiles: tl.int32,
    columns: tl.int64,
    live_stride: tl.int64,
    start: tl.int64,
    row_stride: tl.int64,
    name_word: tl.uint32,
    seed: tl.uint64,
    coefficient: tl.float32,
    GAUSSIAN: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row, column, index = _tile(tiles, start, row_stride, GAUSSIAN, ALIGNED, TILE)
    inside = (column >= 0) & (column < columns)
    value = _load(master, row * columns + column, inside)
    z = _noise(seed, name_word, index, magnitudes, GAUSSIAN, TILE)
    _store_nearest(live, row * live_stride + column, value + coefficient * z, inside)


@triton.jit(
    do_not_specialize=["count", "tiles", "start", "row_stride", "name_word", "step"],
)
def _update(
    master: tl.tensor,
    live: tl.tensor,
    magnitudes: tl.tensor,
    seeds: tl.tensor,
    coefficients: tl.tensor,
    count: tl.int32,
    tiles: tl.int32,
    columns: tl.int64,
    live_stride: tl.int64,
    start: tl.int64,
    row_stride: tl.int64,
    name_word: tl.uint32,
    step: tl.uint64,
    decay: tl.float32,
    GAUSSIAN: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row, column, index = _tile(tiles, start, row_stride, GAUSSIAN, ALIGNED, TILE)
    inside = (column >= 0) & (column < columns)
    total = tl.zeros([TILE], tl.float32)
    for i in range(count):
        z = _noise(tl.load(seeds + i), name_word, index, magnitudes, GAUSSIAN, TILE)
        total = total + tl.load(coefficients + i) * z
    value = _load(master, row * columns + column, inside) * decay + total
    if master.dtype.element_ty == tl.uint16:
        rounding = _halfwords(step, name_word, ROUNDING, index, TILE)
        value = _store_stochastic(master, row * columns + column, value, rounding, inside)
    else:
        tl.store(master + row * columns + column, value, mask=inside)
    _store_nearest(live, row * live_stride + column, value, inside)


@triton.jit(
    do_not_specialize=["count", "tiles_down", "rows", "start", "row_stride", "name_word", "step"],
)
def _low_rank_update(
    master: tl.tensor,
    live: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    coefficients: tl.tensor,
    count: tl.int32,
    tiles_down: tl.int32,
    rows: tl.int64,
    columns: tl.int64,
    live_stride: tl.int64,
    start: tl.int64,
    row_stride: tl.int64,
    name_word: tl.uint32,
    step: tl.uint64,
    scale: tl.float32,
    decay: tl.float32,
    RANK: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    # Neighbours lie below each other: they share right factors, which then stay in the cache.
    program = tl.program_id(0)
    row = (program % tiles_down).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    within_row = (program // tiles_down).to(tl.int64) * COLUMNS
    row_index = start + row * row_stride
    # [1, COLUMNS], or [ROWS, COLUMNS] where each row begins elsewhere in a block
    column = within_row + tl.arange(0, COLUMNS)[None, :]
    if not ALIGNED:
        column = column - row_index % HALFWORDS_PER_BLOCK
    of_right = (column >= 0) & (column < columns)
    of_left = row < rows
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(count):
        z = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in tl.static_range(RANK):
            u = tl.load(left + (i * rows + row) * RANK + k, mask=of_left, other=0)
            v = tl.load(right + (i * RANK + k) * columns + column, mask=of_right, other=0)
            z = z + u * v
        total = total + tl.load(coefficients + i) * (z * scale)
    inside = of_left & of_right
    value = _load(master, row * columns + column, inside) * decay + total
    if master.dtype.element_ty == tl.uint16:
        first_block = (row_index + within_row) // HALFWORDS_PER_BLOCK
        block = first_block + tl.arange(0, COLUMNS // HALFWORDS_PER_BLOCK)[None, :]
        rounding = _block_halfwords(step, name_word, ROUNDING, block, ROWS * COLUMNS)
        rounding = tl.reshape(rounding, [ROWS, COLUMNS])
        value = _store_stochastic(master, row * columns + column, value, rounding, inside)
    else:
        tl.store(master + row * columns + column, value, mask=inside)
    _store_nearest(live, row * live_stride + column, value, inside)


@triton.jit(do_not_specialize=["tiles", "start", "row_stride"])
def _digest(
    values: tl.tensor,
    partial_sums: tl.tensor,
    tiles: tl.int32,
    columns: tl.int64,
    memory_stride: tl.int64,
    start: tl.int64,
    row_stride: tl.int64,
    TILE: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    column = (program % tiles).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = column < columns
    bits = tl.load(values + row * memory_stride + column, mask=inside, other=0).to(tl.uint64)
    index = (start + row * row_stride + column).to(tl.uint64)
    mixed = index * DIGEST_INDEX + (bits + 1) * DIGEST_BITS
    mixed = (mixed ^ (mixed >> 30)) * DIGEST_MIX_0
    mixed = (mixed ^ (mixed >> 27)) * DIGEST_MIX_1
    mixed = mixed ^ (mixed >> 31)
    signed = tl.where(inside, mixed.to(tl.int64, bitcast=True), 0)
    tl.store(partial_sums + program, tl.sum(signed, axis=0))


@triton.jit
def _tile(
    tiles: tl.tensor,
    start: tl.tensor,
    row_stride: tl.tensor,
    GAUSSIAN: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """This program's row, its columns [TILE], and the global index of the first of them.

    The index is a multiple of the block size, so the first columns of a row may be negative.
    """
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    within_row = (program % tiles).to(tl.int64) * TILE
    row_index = start + row * row_stride
    column = within_row + tl.arange(0, TILE)
    index = row_index + within_row
    if not ALIGNED:
        skipped = row_index % (HALFWORDS_PER_BLOCK if GAUSSIAN else BITS_PER_BLOCK)
        column -= skipped
        index -= skipped
    return row, column, index


@triton.jit
def _noise(
    seed: tl.tensor,
    name_word: tl.tensor,
    index: tl.tensor,
    magnitudes: tl.tensor,
    GAUSSIAN: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Noise z, float32 [TILE], of the elements from a global index on."""
    if GAUSSIAN:
        halfwords = _halfwords(seed, name_word, PERTURBATION, index, TILE)
        magnitude = tl.load(magnitudes + (halfwords >> 6).to(tl.int32))
        z = tl.where((halfwords & 1) != 0, -magnitude, magnitude)
    else:
        negative = _bits(seed, name_word, PERTURBATION, index, TILE)
        z = tl.where(negative != 0, -1.0, 1.0)
    return z


@triton.jit
def _halfwords(
    seed: tl.tensor,
    name_word: tl.tensor,
    stream: tl.constexpr,
    index: tl.tensor,
    TILE: tl.constexpr,
) -> tl.tensor:
    """16 bits, as uint32 [TILE], for each element from a global index on."""
    block = index // HALFWORDS_PER_BLOCK + tl.arange(0, TILE // HALFWORDS_PER_BLOCK)
    return _block_halfwords(seed, name_word, stream, block, TILE)


@triton.jit
def _block_halfwords(
    seed: tl.tensor,
    name_word: tl.tensor,
    stream: tl.constexpr,
    block: tl.tensor,
    TILE: tl.constexpr,
) -> tl.tensor:
    """The halfwords, as uint32 [TILE], of blocks, of any shape, in their row-major order."""
    words = _words(seed, name_word, stream, block, TILE // 2)
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [TILE])


@triton.jit
def _bits(
    seed: tl.tensor,
    name_word: tl.tensor,
    stream: tl.constexpr,
    index: tl.tensor,
    TILE: tl.constexpr,
) -> tl.tensor:
    """One bit, as uint32 [TILE], for each element from a global index on."""
    block = index // BITS_PER_BLOCK + tl.arange(0, TILE // BITS_PER_BLOCK)
    words = _words(seed, name_word, stream, block, TILE // 32)
    shift = tl.arange(0, 32).to(tl.uint32)
    return tl.reshape((words[:, None] >> shift[None, :]) & 1, [TILE])


@triton.jit
def _words(
    seed: tl.tensor,
    name_word: tl.tensor,
    stream: tl.constexpr,
    block: tl.tensor,
    COUNT: tl.constexpr,
) -> tl.tensor:
    """The words, uint32 [COUNT], of Philox4x32-10 blocks, of any shape, in row-major order."""
    low = block.to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    name = tl.zeros_like(low) + name_word.to(tl.uint32)
    word_0, word_1, word_2, word_3 = tl.philox(seed, low, high, name, tl.zeros_like(low) + stream)
    # join makes a new last dimension: words come out in the order 0, 1, 2, 3 of each block
    return tl.reshape(tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3)), [COUNT])


@triton.jit
def _load(stored: tl.tensor, offsets: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """float32 values of float32, or of bfloat16 patterns."""
    values = tl.load(stored + offsets, mask=inside, other=0)
    if stored.dtype.element_ty == tl.uint16:
        values = (values.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return values


@triton.jit
def _store_nearest(
    stored: tl.tensor, offsets: tl.tensor, values: tl.tensor, inside: tl.tensor
) -> None:
    """Store float32 as float32, float16 or bfloat16 patterns, rounded to nearest even."""
    if stored.dtype.element_ty == tl.uint16:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(values != values, BFLOAT16_NAN, rounded)
        tl.store(stored + offsets, rounded.to(tl.uint16), mask=inside)
    else:
        tl.store(stored + offsets, values.to(stored.dtype.element_ty), mask=inside)


@triton.jit
def _store_stochastic(
    stored: tl.tensor, offsets: tl.tensor, values: tl.tensor, rounding: tl.tensor, inside: tl.tensor
) -> tl.tensor:
    """Store one of the two bfloat16 around a value, by chance in proportion, and return it."""
    bits = values.to(tl.uint32, bitcast=True)
    is_finite = (bits & EXPONENT_BITS) != EXPONENT_BITS
    rounded = (bits + tl.where(is_finite, rounding, 0)) >> 16
    tl.store(stored + offsets, rounded.to(tl.uint16), mask=inside)
    return (rounded << 16).to(tl.float32, bitcast=True)
