"""Sweeps over slices of parameters on a CPU, compiled by numba: perturb, update, digest.

Owns the noise's fast form for torch tensors in host memory. A sweep reads and writes
each element once; noise exists only in tiles that stay in the first-level cache. The results are
the bits that noise.py specifies, whatever the number of threads. It does not know where slices
come from, what seeds and coefficients mean, or how many threads it should use.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import get_num_threads, njit, prange
from numpy.typing import NDArray

from orchestrator.noise import (
    DIGEST_BITS_MULTIPLIER,
    DIGEST_INDEX_MULTIPLIER,
    DIGEST_MIX_MULTIPLIERS,
    FACTOR_UNITS,
    GAUSSIAN_BLOCK,
    PHILOX_KEY_STEPS,
    PHILOX_MULTIPLIERS,
    PHILOX_ROUNDS,
    RADEMACHER_BLOCK,
    NoiseKind,
    Stream,
    TensorRegion,
    low_rank_coefficient,
    magnitudes,
    split_words,
    tensor_word,
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

TILE = 4096  # elements: one thread's scratch then fits in 48 KiB of first-level cache
SCRATCH = TILE + 2 * RADEMACHER_BLOCK  # elements: a tile may begin and end inside a block
# A block spans rows too, so that a tile of right factors, read from the first-level cache, serves
# all of them.
BLOCK_ROWS = 4
BLOCK_COLUMNS = TILE // BLOCK_ROWS

# numba adds a signed to an unsigned integer as float64, so every constant below is unsigned.
WORD_BITS = np.uint64(32)
WORD_MASK = np.uint64(0xFFFFFFFF)
MULTIPLIER_0, MULTIPLIER_1 = (np.uint64(word) for word in PHILOX_MULTIPLIERS)
KEY_STEP_0, KEY_STEP_1 = (np.uint64(word) for word in PHILOX_KEY_STEPS)
PERTURBATION = np.uint32(Stream.PERTURBATION)
ROUNDING = np.uint32(Stream.ROUNDING)
DIGEST_INDEX = np.uint64(DIGEST_INDEX_MULTIPLIER)
DIGEST_BITS = np.uint64(DIGEST_BITS_MULTIPLIER)
DIGEST_MIX_0, DIGEST_MIX_1 = (np.uint64(word) for word in DIGEST_MIX_MULTIPLIERS)
UNITS = np.float32(FACTOR_UNITS)
FLOAT_ONE_BITS = np.uint32(0x3F800000)
EXPONENT_BITS = np.uint32(0x7F800000)
BFLOAT16_NAN = np.uint16(0x7FC0)

compiled = njit(fastmath=False, cache=True, nogil=True)
compiled_parallel = njit(parallel=True, fastmath=False, cache=True, nogil=True)


class Frame(NamedTuple):
    """A slice's shape, the distance of its rows in memory, and its place in the whole tensor.

    `ranges` is how many parts to cut the work into, one a thread; results do not depend on it.
    """

    ranges: int
    rows: int
    columns: int
    memory_stride: int
    start: int
    row_stride: int


class Source(NamedTuple):
    """Which noise to draw, and from what."""

    gaussian: bool
    name_word: np.uint32
    magnitude_bits: NDArray[np.uint32]


class Steps(NamedTuple):
    """Steps that follow each other: where in the list of all seeds each one's end, by what each
    multiplies the masters, and with which key it rounds them."""

    ends: NDArray[np.int64]
    decays: NDArray[np.float32]
    rounding_keys: NDArray[np.uint32]


class Table:
    """See sweeps.Table."""

    def __init__(self, slices: Sequence[Slice]) -> None:
        for part in slices:
            check_layout(part)
        self._slices = list(slices)
        empty = [part.live.numel() for part in slices if part.master is None]
        self._zeros = torch.zeros(max(empty, default=0))

    def perturb(self, kind: NoiseKind, draws: Sequence[Draw]) -> None:
        for part in self._slices:
            master = part.master
            if master is None:
                master = self._zeros[: part.live.numel()].view(part.live.shape)
            _perturb_slice(kind, part, master, draws[part.draw])

    def update(
        self, kind: NoiseKind, updates: Sequence[StepUpdate], then: Draw | None = None
    ) -> None:
        check_counts(updates)
        for part, master in zip(self._slices, masters(self._slices), strict=True):
            if updates:
                _update_slice(kind, part, master, updates)
            if then is not None:
                _perturb_slice(kind, part, master, then)
            elif not updates:
                part.live.copy_(master)

    def low_rank_update(self, factors: Sequence[Factors], updates: Sequence[StepUpdate]) -> None:
        check_counts(updates)
        all_masters = masters(self._slices)
        num_seeds = sum(len(update.seeds) for update in updates)
        for master, pair in zip(all_masters, factors, strict=True):
            check_factors(master, pair, num_seeds)
        for part, master, pair in zip(self._slices, all_masters, factors, strict=True):
            _update_slice_by_factors(part, master, pair, updates)

    def digests(self, *, live: bool = False) -> list[int]:
        values = [part.live for part in self._slices] if live else masters(self._slices)
        return [
            int(np.sum(_digest(_patterns(value), _frame(value, part.region)), dtype=np.uint64))
            for part, value in zip(self._slices, values, strict=True)
        ]


def _perturb_slice(kind: NoiseKind, part: Slice, master: torch.Tensor, draw: Draw) -> None:
    with _writable(part.live) as target:
        _perturb(
            _patterns(master),
            _patterns(target),
            _frame(target, part.region),
            _source(kind, part.region),
            _keys([draw.seed])[0],
            np.float32(draw.coefficient),
        )


def _update_slice(
    kind: NoiseKind, part: Slice, master: torch.Tensor, updates: Sequence[StepUpdate]
) -> None:
    coefficients = [value for update in updates for value in update.coefficients]
    with _writable(part.live) as target:
        _update(
            _patterns(master),
            _patterns(target),
            _frame(target, part.region),
            _source(kind, part.region),
            _keys([seed for update in updates for seed in update.seeds]),
            np.array(coefficients, np.float32),
            _steps(updates),
        )


def _update_slice_by_factors(
    part: Slice, master: torch.Tensor, factors: Factors, updates: Sequence[StepUpdate]
) -> None:
    with _writable(part.live) as target:
        _low_rank_update(
            _patterns(master),
            _patterns(target),
            _frame(target, part.region),
            factors.left.float().numpy(),  # whole numbers, as are their sums: exact in any order
            factors.right.float().numpy(),
            _low_rank_coefficients(updates, factors.left.shape[2]),
            _steps(updates),
            np.uint32(tensor_word(part.region.name)),
        )


@contextmanager
def _writable(live: torch.Tensor) -> Iterator[torch.Tensor]:
    """Where the kernels write: live itself, or float32 that torch then rounds to float16."""
    if live.dtype is not torch.float16:
        yield live
        return
    wide = torch.empty(live.shape, dtype=torch.float32)
    yield wide
    live.copy_(wide)


def _patterns(values: torch.Tensor) -> NDArray[Any]:
    """The memory from a view's first to its last element: bit patterns, unsigned [n]."""
    rows, columns = values.shape
    length = (rows - 1) * values.stride(0) + columns if values.numel() else 0
    flat = values.as_strided((length,), (1,))
    pattern = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[values.itemsize]
    patterns: NDArray[Any] = flat.view(pattern).numpy()
    return patterns


def _frame(values: torch.Tensor, region: TensorRegion) -> Frame:
    rows, columns = values.shape
    return Frame(
        get_num_threads(), rows, columns, values.stride(0), region.start, region.row_stride
    )


def _source(kind: NoiseKind, region: TensorRegion) -> Source:
    magnitude_bits = magnitudes(kind).view(np.uint32)
    return Source(kind != "rademacher", np.uint32(tensor_word(region.name)), magnitude_bits)


def _low_rank_coefficients(updates: Sequence[StepUpdate], rank: int) -> NDArray[np.float32]:
    """Of products of factors in their units: powers of two apart from noise's, so as exact."""
    units = np.float32(FACTOR_UNITS**2)
    given = [value for update in updates for value in update.coefficients]
    return np.array([low_rank_coefficient(value, rank) / units for value in given], np.float32)


def _steps(updates: Sequence[StepUpdate]) -> Steps:
    return Steps(
        np.cumsum([len(update.seeds) for update in updates], dtype=np.int64),
        np.array([update.decay for update in updates], np.float32),
        _keys([update.step for update in updates]),
    )


def _keys(seeds: Sequence[int]) -> NDArray[np.uint32]:
    """Philox keys [seeds, 2] of 64-bit integers."""
    return np.array([split_words(seed) for seed in seeds], np.uint32).reshape(len(seeds), 2)


@compiled_parallel
def _perturb(
    master: NDArray[Any],
    live: NDArray[Any],
    frame: Frame,
    source: Source,
    key: NDArray[np.uint32],
    coefficient: np.float32,
) -> None:
    tiles = _tile_count(frame)
    for part in prange(frame.ranges):
        words = np.empty(SCRATCH // 2, np.uint32)
        noise = np.empty(SCRATCH, np.float32)
        for tile in range(tiles * part // frame.ranges, tiles * (part + 1) // frame.ranges):
            row, column, count = _tile(frame, tile)
            index = _global_index(frame, row, column)
            z = _draw(noise, words, source, key, index, count)
            there = row * frame.columns + column
            here = row * frame.memory_stride + column
            _perturb_tile(master[there : there + count], live[here : here + count], z, coefficient)


@compiled_parallel
def _update(
    master: NDArray[Any],
    live: NDArray[Any],
    frame: Frame,
    source: Source,
    keys: NDArray[np.uint32],
    coefficients: NDArray[np.float32],
    steps: Steps,
) -> None:
    tiles = _tile_count(frame)
    for part in prange(frame.ranges):
        words = np.empty(SCRATCH // 2, np.uint32)
        noise = np.empty(SCRATCH, np.float32)
        total = np.empty(TILE, np.float32)
        for tile in range(tiles * part // frame.ranges, tiles * (part + 1) // frame.ranges):
            row, column, count = _tile(frame, tile)
            index = _global_index(frame, row, column)
            there = row * frame.columns + column
            here = row * frame.memory_stride + column
            old = master[there : there + count]
            new = live[here : here + count]
            first = 0
            for step in range(len(steps.ends)):
                _begin(total)
                for i in range(first, steps.ends[step]):
                    z = _draw(noise, words, source, keys[i], index, count)
                    _accumulate(total[:count], z, coefficients[i])
                first = steps.ends[step]
                rounding_key = steps.rounding_keys[step]
                bits = _draw_rounding(words, old, source.name_word, rounding_key, index)
                _update_tile(old, new, total, steps.decays[step], bits)


@compiled_parallel
def _low_rank_update(
    master: NDArray[Any],
    live: NDArray[Any],
    frame: Frame,
    left: NDArray[np.float32],
    right: NDArray[np.float32],
    coefficients: NDArray[np.float32],
    steps: Steps,
    name_word: np.uint32,
) -> None:
    blocks = _block_count(frame)
    for part in prange(frame.ranges):
        words = np.empty(SCRATCH // 2, np.uint32)
        noise = np.empty(BLOCK_COLUMNS, np.float32)
        totals = np.empty((BLOCK_ROWS, BLOCK_COLUMNS), np.float32)
        for block in range(blocks * part // frame.ranges, blocks * (part + 1) // frame.ranges):
            first_row, rows, column, count = _block(frame, block)
            z = noise[:count]
            first = 0
            for step in range(len(steps.ends)):
                for i in range(rows):
                    _begin(totals[i])
                for seed in range(first, steps.ends[step]):
                    for i in range(rows):
                        _multiply(z, left[seed, first_row + i], right[seed], column)
                        _accumulate(totals[i], z, coefficients[seed])
                first = steps.ends[step]
                for i in range(rows):
                    row = first_row + i
                    there = row * frame.columns + column
                    here = row * frame.memory_stride + column
                    old = master[there : there + count]
                    new = live[here : here + count]
                    index = _global_index(frame, row, column)
                    rounding_key = steps.rounding_keys[step]
                    bits = _draw_rounding(words, old, name_word, rounding_key, index)
                    _update_tile(old, new, totals[i], steps.decays[step], bits)


@compiled_parallel
def _digest(bits: NDArray[Any], frame: Frame) -> NDArray[np.uint64]:
    tiles = _tile_count(frame)
    partial = np.zeros(frame.ranges, np.uint64)
    for part in prange(frame.ranges):
        for tile in range(tiles * part // frame.ranges, tiles * (part + 1) // frame.ranges):
            row, column, count = _tile(frame, tile)
            here = row * frame.memory_stride + column
            index = _global_index(frame, row, column)
            partial[part] += _digest_tile(bits[here : here + count], index)
    return partial


@compiled
def _tile_count(frame: Frame) -> int:
    return frame.rows * ((frame.columns + TILE - 1) // TILE)


@compiled
def _tile(frame: Frame, tile: int) -> tuple[int, int, int]:
    """A tile's row, first column and number of columns."""
    tiles_per_row = (frame.columns + TILE - 1) // TILE
    column = tile % tiles_per_row * TILE
    return tile // tiles_per_row, column, min(TILE, frame.columns - column)


@compiled
def _block_count(frame: Frame) -> int:
    down = (frame.rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    return down * ((frame.columns + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS)


@compiled
def _block(frame: Frame, block: int) -> tuple[int, int, int, int]:
    """A block's first row, number of rows, first column and number of columns."""
    blocks_per_row = (frame.columns + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    row = block // blocks_per_row * BLOCK_ROWS
    column = block % blocks_per_row * BLOCK_COLUMNS
    return (
        row,
        min(BLOCK_ROWS, frame.rows - row),
        column,
        min(BLOCK_COLUMNS, frame.columns - column),
    )


@compiled
def _global_index(frame: Frame, row: int, column: int) -> np.uint64:
    return np.uint64(frame.start + row * frame.row_stride + column)


@compiled
def _draw(
    noise: NDArray[np.float32],
    words: NDArray[np.uint32],
    source: Source,
    key: NDArray[np.uint32],
    index: np.uint64,
    count: int,
) -> NDArray[np.float32]:
    """Noise of the `count` elements from a global index on: a view into `noise`."""
    noise_bits = noise.view(np.uint32)
    if source.gaussian:
        halfwords = _draw_halfwords(words, source.name_word, PERTURBATION, key, index, count)
        _fill_gaussian(noise_bits, halfwords, source.magnitude_bits)
        return noise[:count]
    block = index // np.uint64(RADEMACHER_BLOCK)
    skipped = np.int64(index % np.uint64(RADEMACHER_BLOCK))
    blocks = (skipped + count + RADEMACHER_BLOCK - 1) // RADEMACHER_BLOCK
    _fill_words(words, block, blocks, source.name_word, PERTURBATION, key)
    _fill_rademacher(noise_bits, words[: 4 * blocks])
    return noise[skipped : skipped + count]


@compiled
def _draw_halfwords(
    words: NDArray[np.uint32],
    name_word: np.uint32,
    stream: np.uint32,
    key: NDArray[np.uint32],
    index: np.uint64,
    count: int,
) -> NDArray[np.uint16]:
    """16 bits for each of the `count` elements from a global index on: a view into `words`."""
    block = index // np.uint64(GAUSSIAN_BLOCK)
    skipped = np.int64(index % np.uint64(GAUSSIAN_BLOCK))
    blocks = (skipped + count + GAUSSIAN_BLOCK - 1) // GAUSSIAN_BLOCK
    _fill_words(words, block, blocks, name_word, stream, key)
    # words are stored low half first, as on every machine that this runs on
    return words.view(np.uint16)[skipped : skipped + count]


@compiled
def _draw_rounding(
    words: NDArray[np.uint32],
    master: NDArray[Any],
    name_word: np.uint32,
    key: NDArray[np.uint32],
    index: np.uint64,
) -> NDArray[np.uint16]:
    """The rounding bits of a piece of the master: a view into `words`, arbitrary for float32."""
    if master.itemsize == 4:
        return words.view(np.uint16)[: len(master)]
    bits: NDArray[np.uint16] = _draw_halfwords(words, name_word, ROUNDING, key, index, len(master))
    return bits


@compiled
def _fill_words(
    words: NDArray[np.uint32],
    first_block: np.uint64,
    blocks: int,
    name_word: np.uint32,
    stream: np.uint32,
    key: NDArray[np.uint32],
) -> None:
    """Philox4x32-10 of consecutive blocks, four words each."""
    first_key_0 = np.uint64(key[0])
    first_key_1 = np.uint64(key[1])
    for i in range(blocks):
        block = first_block + np.uint64(i)
        counter_0 = block & WORD_MASK
        counter_1 = block >> WORD_BITS
        counter_2 = np.uint64(name_word)
        counter_3 = np.uint64(stream)
        key_0 = first_key_0
        key_1 = first_key_1
        for _ in range(PHILOX_ROUNDS):
            product_0 = counter_0 * MULTIPLIER_0
            product_1 = counter_2 * MULTIPLIER_1
            counter_0 = (product_1 >> WORD_BITS) ^ counter_1 ^ key_0
            counter_1 = product_1 & WORD_MASK
            counter_2 = (product_0 >> WORD_BITS) ^ counter_3 ^ key_1
            counter_3 = product_0 & WORD_MASK
            key_0 = (key_0 + KEY_STEP_0) & WORD_MASK
            key_1 = (key_1 + KEY_STEP_1) & WORD_MASK
        words[4 * i] = np.uint32(counter_0)
        words[4 * i + 1] = np.uint32(counter_1)
        words[4 * i + 2] = np.uint32(counter_2)
        words[4 * i + 3] = np.uint32(counter_3)


@compiled
def _fill_gaussian(
    noise_bits: NDArray[np.uint32],
    halfwords: NDArray[np.uint16],
    magnitude_bits: NDArray[np.uint32],
) -> None:
    for i in range(len(halfwords)):
        halfword = halfwords[i]
        sign = np.uint32(halfword << 31)
        noise_bits[i] = magnitude_bits[halfword >> 6] | sign


@compiled
def _fill_rademacher(noise_bits: NDArray[np.uint32], words: NDArray[np.uint32]) -> None:
    for i in range(len(words)):
        word = words[i]
        for bit in range(32):
            sign = np.uint32(word >> np.uint32(bit)) << np.uint32(31)
            noise_bits[32 * i + bit] = FLOAT_ONE_BITS | sign


@compiled
def _perturb_tile(
    master: NDArray[Any], live: NDArray[Any], z: NDArray[np.float32], coefficient: np.float32
) -> None:
    for i in range(len(master)):
        _store_nearest(live, i, _load(master, i) + coefficient * z[i])


@compiled
def _begin(total: NDArray[np.float32]) -> None:
    """A sum's beginning, to which any number adds itself, -0 too."""
    for i in range(len(total)):
        total[i] = np.float32(-0.0)


@compiled
def _clear(total: NDArray[np.float32]) -> None:
    for i in range(len(total)):
        total[i] = np.float32(0)


@compiled
def _accumulate(
    total: NDArray[np.float32], z: NDArray[np.float32], coefficient: np.float32
) -> None:
    for i in range(len(total)):
        total[i] = total[i] + coefficient * z[i]


@compiled
def _multiply(
    z: NDArray[np.float32], left: NDArray[np.float32], right: NDArray[np.float32], column: int
) -> None:
    """Set z to one row, left [rank], times the columns of right [rank, columns] from one on."""
    last = column + len(z)
    _clear(z)
    grouped = len(left) // 4 * 4
    for k in range(0, grouped, 4):
        _add_four_products(
            z,
            left[k : k + 4],
            right[k, column:last],
            right[k + 1, column:last],
            right[k + 2, column:last],
            right[k + 3, column:last],
        )
    for k in range(grouped, len(left)):
        _accumulate(z, right[k, column:last], left[k])


@compiled
def _add_four_products(
    z: NDArray[np.float32],
    left: NDArray[np.float32],
    right_0: NDArray[np.float32],
    right_1: NDArray[np.float32],
    right_2: NDArray[np.float32],
    right_3: NDArray[np.float32],
) -> None:
    """Four steps of a sum in one pass over z, in their order."""
    left_0, left_1, left_2, left_3 = left[0], left[1], left[2], left[3]
    for i in range(len(z)):
        value = z[i] + left_0 * right_0[i]
        value = value + left_1 * right_1[i]
        value = value + left_2 * right_2[i]
        z[i] = value + left_3 * right_3[i]


@compiled
def _update_tile(
    master: NDArray[Any],
    live: NDArray[Any],
    total: NDArray[np.float32],
    decay: np.float32,
    bits: NDArray[np.uint16],
) -> None:
    for i in range(len(master)):
        _store_stochastic(master, i, _load(master, i) * decay + total[i], bits[i])
        _store_nearest(live, i, _load(master, i))


@compiled
def _digest_tile(bits: NDArray[Any], index: np.uint64) -> np.uint64:
    total = np.uint64(0)
    for i in range(len(bits)):
        mixed = (index + np.uint64(i)) * DIGEST_INDEX
        mixed += (np.uint64(bits[i]) + np.uint64(1)) * DIGEST_BITS
        mixed = (mixed ^ (mixed >> np.uint64(30))) * DIGEST_MIX_0
        mixed = (mixed ^ (mixed >> np.uint64(27))) * DIGEST_MIX_1
        total += mixed ^ (mixed >> np.uint64(31))
    return total


@compiled
def _load(patterns: NDArray[Any], i: int) -> np.float32:
    """The value of a float32 or bfloat16 bit pattern."""
    if patterns.itemsize == 4:
        return np.uint32(patterns[i]).view(np.float32)
    return np.uint32(np.uint32(patterns[i]) << np.uint32(16)).view(np.float32)


@compiled
def _store_nearest(patterns: NDArray[Any], i: int, value: np.float32) -> None:
    """Store a float32, the bfloat16 nearest to it (of two, the even one), or a factor's int8."""
    bits = np.float32(value).view(np.uint32)
    if patterns.itemsize == 4:
        patterns[i] = bits
    elif patterns.itemsize == 1:
        patterns[i] = np.int32(value * UNITS)
    elif np.isnan(value):
        patterns[i] = BFLOAT16_NAN
    else:
        is_odd = (bits >> np.uint32(16)) & np.uint32(1)
        patterns[i] = np.uint32(bits + np.uint32(0x7FFF) + is_odd) >> np.uint32(16)


@compiled
def _store_stochastic(
    patterns: NDArray[Any], i: int, value: np.float32, rounding_bits: np.uint16
) -> None:
    """Store a float32, or one of the two bfloat16 around it, by chance in proportion."""
    bits = np.float32(value).view(np.uint32)
    if patterns.itemsize == 4:
        patterns[i] = bits
    elif bits & EXPONENT_BITS == EXPONENT_BITS:
        patterns[i] = bits >> np.uint32(16)
    else:
        patterns[i] = np.uint32(bits + np.uint32(rounding_bits)) >> np.uint32(16)
