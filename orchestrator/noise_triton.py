"""Noise version 1 inside Triton kernels: drawn in registers, never stored.

Owns the device form of what noise.py specifies, bit for bit, and of the two roundings. Its
functions are called by kernels, which must be launched with `enable_fp_fusion=False`: a fused
multiply-add would round differently from a CPU. It does not know parameters or sweeps.
"""

import triton
import triton.language as tl

from orchestrator.noise import GAUSSIAN_BLOCK, RADEMACHER_BLOCK, Stream

HALFWORDS_PER_BLOCK = tl.constexpr(GAUSSIAN_BLOCK)
BITS_PER_BLOCK = tl.constexpr(RADEMACHER_BLOCK)
PERTURBATION = tl.constexpr(int(Stream.PERTURBATION))
ROUNDING = tl.constexpr(int(Stream.ROUNDING))
EXPONENT_BITS = tl.constexpr(0x7F800000)
BFLOAT16_NAN = tl.constexpr(0x7FC0)


@triton.jit
def draw(
    seed: tl.tensor,
    name_word: tl.tensor,
    index: tl.tensor,
    magnitudes: tl.tensor,
    GAUSSIAN: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Noise z, float32 [TILE], of the elements from a global index on."""
    if GAUSSIAN:
        words = halfwords(seed, name_word, PERTURBATION, index, TILE)
        magnitude = tl.load(magnitudes + (words >> 6).to(tl.int32))
        z = tl.where((words & 1) != 0, -magnitude, magnitude)
    else:
        negative = _bits(seed, name_word, PERTURBATION, index, TILE)
        z = tl.where(negative != 0, -1.0, 1.0)
    return z


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
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(values != values, BFLOAT16_NAN, rounded)
        tl.store(stored + offsets, rounded.to(tl.uint16), mask=inside)
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
