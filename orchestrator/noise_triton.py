"""Noise version 1 inside Triton kernels: drawn in registers, never stored.

Owns the device form of what noise.py specifies, bit for bit, and of the two roundings. Its
functions are called by kernels, which must be launched with `enable_fp_fusion=False`: a fused
multiply-add would round differently from a CPU. It does not know parameters or sweeps.
"""

import triton
import triton.language as tl

from orchestrator.noise import (
    GAUSSIAN_BLOCK,
    PHILOX_KEY_STEPS,
    PHILOX_MULTIPLIERS,
    PHILOX_ROUNDS,
    RADEMACHER_BLOCK,
    Stream,
)

HALFWORDS_PER_BLOCK = tl.constexpr(GAUSSIAN_BLOCK)
BITS_PER_BLOCK = tl.constexpr(RADEMACHER_BLOCK)
PERTURBATION = tl.constexpr(int(Stream.PERTURBATION))
ROUNDING = tl.constexpr(int(Stream.ROUNDING))
EXPONENT_BITS = tl.constexpr(0x7F800000)
SIGN_BIT = tl.constexpr(0x80000000)
FLOAT_ONE_BITS = tl.constexpr(0x3F800000)
PHILOX_ROUND_COUNT = tl.constexpr(PHILOX_ROUNDS)
MULTIPLIER_0, MULTIPLIER_1 = (tl.constexpr(word) for word in PHILOX_MULTIPLIERS)
KEY_STEP_0, KEY_STEP_1 = (tl.constexpr(word) for word in PHILOX_KEY_STEPS)


@triton.jit
def draw(
    seed: tl.tensor,
    name_word: tl.tensor,
    index: tl.tensor,
    magnitudes: tl.tensor,
    GAUSSIAN: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Noise z, float32 [TILE], of the elements from a global index on.

    `magnitudes` are the bits of the 1,024 float32 values. Signs are set in the bits: a selection
    between two values would take more instructions, of which a sweep has few to spare.
    """
    if GAUSSIAN:
        block = index // HALFWORDS_PER_BLOCK + tl.arange(0, TILE // HALFWORDS_PER_BLOCK)
        word_0, word_1, word_2, word_3 = _philox(seed, name_word, PERTURBATION, block)
        # Looked up before they are joined: Triton would move joined ones between threads, twice.
        low = _joined(
            _low_value(word_0, magnitudes),
            _low_value(word_1, magnitudes),
            _low_value(word_2, magnitudes),
            _low_value(word_3, magnitudes),
        )
        high = _joined(
            _high_value(word_0, magnitudes),
            _high_value(word_1, magnitudes),
            _high_value(word_2, magnitudes),
            _high_value(word_3, magnitudes),
        )
        bits = tl.reshape(tl.join(low, high), [TILE])
    else:
        block = index // BITS_PER_BLOCK + tl.arange(0, TILE // BITS_PER_BLOCK)
        words = _words(seed, name_word, PERTURBATION, block, TILE // 32)
        to_the_top = 31 - tl.arange(0, 32).to(tl.uint32)
        signs = (words[:, None] << to_the_top[None, :]) & SIGN_BIT
        bits = tl.reshape(signs | FLOAT_ONE_BITS, [TILE])
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def halfwords(
    seed: tl.tensor,
    name_word: tl.tensor,
    stream: tl.constexpr,
    index: tl.tensor,
    TILE: tl.constexpr,
) -> tl.tensor:
    """16 bits, as uint32 [TILE], for each element from a global index on."""
    block = index // HALFWORDS_PER_BLOCK + tl.arange(0, TILE // HALFWORDS_PER_BLOCK)
    return block_halfwords(seed, name_word, stream, block, TILE)


@triton.jit
def block_halfwords(
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
def _low_value(word: tl.tensor, magnitudes: tl.tensor) -> tl.tensor:
    """Bits of the value that a word's low half stands for."""
    return tl.load(magnitudes + ((word >> 6) & 0x3FF)) ^ (word << 31)


@triton.jit
def _high_value(word: tl.tensor, magnitudes: tl.tensor) -> tl.tensor:
    """Bits of the value that a word's high half stands for."""
    return tl.load(magnitudes + (word >> 22)) ^ ((word << 15) & SIGN_BIT)


@triton.jit
def _words(
    seed: tl.tensor,
    name_word: tl.tensor,
    stream: tl.constexpr,
    block: tl.tensor,
    COUNT: tl.constexpr,
) -> tl.tensor:
    """The words, uint32 [COUNT], of Philox4x32-10 blocks, of any shape, in row-major order."""
    word_0, word_1, word_2, word_3 = _philox(seed, name_word, stream, block)
    return tl.reshape(_joined(word_0, word_1, word_2, word_3), [COUNT])


@triton.jit
def _joined(first: tl.tensor, second: tl.tensor, third: tl.tensor, fourth: tl.tensor) -> tl.tensor:
    """[..., 2, 2], in row-major order; join makes a new last dimension."""
    return tl.join(tl.join(first, third), tl.join(second, fourth))


@triton.jit
def _philox(
    seed: tl.tensor, name_word: tl.tensor, stream: tl.constexpr, block: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The four words, uint32, of each Philox4x32-10 block."""
    word_0, word_1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    word_2 = tl.zeros_like(word_0) + name_word.to(tl.uint32)
    word_3 = tl.zeros_like(word_0) + stream
    key_0, key_1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(PHILOX_ROUND_COUNT):
        # one wide product gives both halves; tl.philox multiplies twice
        product_0 = word_0.to(tl.uint64) * MULTIPLIER_0
        product_1 = word_2.to(tl.uint64) * MULTIPLIER_1
        word_0 = (product_1 >> 32).to(tl.uint32) ^ word_1 ^ key_0
        word_2 = (product_0 >> 32).to(tl.uint32) ^ word_3 ^ key_1
        word_1, word_3 = product_1.to(tl.uint32), product_0.to(tl.uint32)
        key_0 += KEY_STEP_0
        key_1 += KEY_STEP_1
    return word_0, word_1, word_2, word_3


@triton.jit
def load(stored: tl.tensor, offsets: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """float32 values of float32, or of bfloat16 patterns."""
    values = tl.load(stored + offsets, mask=inside, other=0)
    if stored.dtype.element_ty == tl.uint16:
        values = (values.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return values


@triton.jit
def store_nearest(
    stored: tl.tensor, offsets: tl.tensor, values: tl.tensor, inside: tl.tensor
) -> None:
    """Store float32 as float32, float16 or bfloat16 patterns, rounded to nearest even."""
    if stored.dtype.element_ty == tl.uint16:
        patterns = values.to(tl.bfloat16).to(tl.uint16, bitcast=True)
        tl.store(stored + offsets, patterns, mask=inside)
    else:
        tl.store(stored + offsets, values.to(stored.dtype.element_ty), mask=inside)


@triton.jit
def rounding_bits(
    step: tl.tensor, name_word: tl.tensor, index: tl.tensor, TILE: tl.constexpr
) -> tl.tensor:
    """Bits of a step's stochastic rounding, uint32 [TILE], of the elements from an index on."""
    return halfwords(step, name_word, ROUNDING, index, TILE)


@triton.jit
def round_stochastic(values: tl.tensor, rounding: tl.tensor) -> tl.tensor:
    """One of the two bfloat16 around each value, by chance in proportion, as float32."""
    bits = values.to(tl.uint32, bitcast=True)
    is_finite = (bits & EXPONENT_BITS) != EXPONENT_BITS
    rounded = (bits + tl.where(is_finite, rounding, 0)) >> 16
    return (rounded << 16).to(tl.float32, bitcast=True)


@triton.jit
def store_exact(
    stored: tl.tensor, offsets: tl.tensor, values: tl.tensor, inside: tl.tensor
) -> None:
    """Store float32, or float32 that holds a bfloat16 as its pattern."""
    if stored.dtype.element_ty == tl.uint16:
        bits = values.to(tl.uint32, bitcast=True) >> 16
        tl.store(stored + offsets, bits.to(tl.uint16), mask=inside)
    else:
        tl.store(stored + offsets, values, mask=inside)
