"""Noise version 2: every random bit that the optimiser uses, specified and computed in numpy.

Owns the meaning of seeds: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3"), how its words become gaussian or rademacher noise, rounding bits, seeds, orders of
examples and numbers to draw tokens by, and the checksum of a tensor. A bit of noise depends on a
seed, a canonical tensor name and an element's row-major index in the whole tensor, so that any
shard on any device draws the same.

This is the specification, written to be read: one block of words is computed for each element.
The fast kernels are in the sweeps modules. It does not know torch, devices, models or steps.
"""

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

NOISE_VERSION = 2

NoiseKind = Literal["gaussian", "coarse_gaussian", "rademacher"]
Words = NDArray[np.uint32]

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

GAUSSIAN_BLOCK = 8  # elements that one block of four words serves, 16 bits each
RADEMACHER_BLOCK = 128  # elements that one block of four words serves, 1 bit each
FACTOR_UNITS = 32  # factors of low-rank noise are whole numbers of 1 / 32

DIGEST_INDEX_MULTIPLIER = 0x9E3779B97F4A7C15
DIGEST_BITS_MULTIPLIER = 0xD1B54A32D192ED03
DIGEST_MIX_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)

_WORD_MASK = 0xFFFFFFFF
_MAGNITUDES_FILE = Path(__file__).with_name("gaussian_magnitudes.txt")
_MAGNITUDES_SHA256 = "7145426dcdeb4c8b7c781b4991d3b965d3d8428f039bed0b6feb821a0d5b1c14"


class Stream(IntEnum):
    """The last counter word: keeps the uses of one key apart."""

    PERTURBATION = 0
    ROUNDING = 1
    SEEDS = 2
    ORDER = 3
    INITIAL = 4
    SAMPLING = 5
    SAMPLES = 6


@dataclass(frozen=True, slots=True)
class TensorRegion:
    """Where a 2-D slice [rows, columns] lies in the canonical tensor called `name`.

    Element (r, c) has the row-major index start + r * row_stride + c in the whole tensor.
    """

    name: str
    start: int
    row_stride: int


def philox(
    counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]
) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10 of each counter under each key.

    The counter's four words and the key's two are integers or uint32 or uint64 arrays, all below
    2**32 and of shapes that broadcast. Returns four uint32 arrays of the common shape.
    """
    mask, half = np.uint64(_WORD_MASK), np.uint64(32)
    multiplier_0, multiplier_1 = (np.uint64(word) for word in PHILOX_MULTIPLIERS)
    key_step_0, key_step_1 = (np.uint64(word) for word in PHILOX_KEY_STEPS)
    words = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in (*counter, *key)))
    counter_0, counter_1, counter_2, counter_3, key_0, key_1 = words
    for _ in range(PHILOX_ROUNDS):
        product_0 = counter_0 * multiplier_0
        product_1 = counter_2 * multiplier_1
        counter_0 = (product_1 >> half) ^ counter_1 ^ key_0
        counter_1 = product_1 & mask
        counter_2 = (product_0 >> half) ^ counter_3 ^ key_1
        counter_3 = product_0 & mask
        key_0 = (key_0 + key_step_0) & mask
        key_1 = (key_1 + key_step_1) & mask
    return (
        counter_0.astype(np.uint32),
        counter_1.astype(np.uint32),
        counter_2.astype(np.uint32),
        counter_3.astype(np.uint32),
    )


def split_words(value: int) -> tuple[int, int]:
    """The low and the high 32 bits of a 64-bit integer."""
    return value & _WORD_MASK, (value >> 32) & _WORD_MASK


def tensor_word(name: str) -> int:
    """The 32-bit counter word that stands for a canonical tensor name: its CRC-32."""
    return zlib.crc32(name.encode())


@cache
def gaussian_magnitudes() -> NDArray[np.float32]:
    """The 1,024 magnitudes of gaussian noise, ascending: read-only float32 [1024].

    They are the normal quantiles at 1/2 + (k + 1/2)/2048, scaled to a mean square of 1, and kept
    as bit patterns because no two mathematical libraries round quantiles alike.
    Raises RuntimeError if the file is not the one that noise was made with.
    """
    text = _MAGNITUDES_FILE.read_bytes()
    if hashlib.sha256(text).hexdigest() != _MAGNITUDES_SHA256:
        raise RuntimeError(f"{_MAGNITUDES_FILE.name} was altered: its SHA-256 does not match")
    patterns = np.array([int(line, 16) for line in text.split()], np.uint32)
    magnitudes = patterns.view(np.float32)
    magnitudes.setflags(write=False)
    return magnitudes


@cache
def magnitudes(kind: NoiseKind) -> NDArray[np.float32]:
    """What a draw of this kind looks up: read-only float32 [1024], ascending.

    Of coarse gaussian noise they are the gaussian ones to the nearest 1 / 32, up to 112 / 32.
    """
    if kind != "coarse_gaussian":
        return gaussian_magnitudes()
    units = np.float32(FACTOR_UNITS)
    coarse: NDArray[np.float32] = np.rint(gaussian_magnitudes() * units) / units
    coarse.setflags(write=False)
    return coarse


def draw(kind: NoiseKind, seed: int, name: str, start: int, count: int) -> NDArray[np.float32]:
    """Noise z of the elements start .. start + count of tensor `name`: float32 [count].

    All kinds have mean 0 and variance 1, coarse noise to 3 in 10,000. The seed is an integer in
    [0, 2**64).
    """
    index = _indices(start, count)
    key = split_words(seed)
    if kind != "rademacher":
        halfword = _halfwords(index, name, Stream.PERTURBATION, key)
        magnitude = magnitudes(kind)[halfword >> 6]
        return np.where(halfword & 1, -magnitude, magnitude)
    bit = index % np.uint64(RADEMACHER_BLOCK)
    words = _block_words(index // np.uint64(RADEMACHER_BLOCK), name, Stream.PERTURBATION, key)
    word = _pick(words, bit // np.uint64(32))
    negative = (word >> (bit % np.uint64(32)).astype(np.uint32)) & np.uint32(1)
    return np.where(negative, np.float32(-1), np.float32(1))


def factor_kind(kind: NoiseKind) -> NoiseKind:
    """How the factors of low-rank noise of this kind are drawn.

    A factor is a whole number of 1 / 32 of 8 bits: exact in an adapter's bfloat16, so that probes
    see the noise that an update adds, and as an integer, whose sums of products are exact in
    whatever order a device takes them.
    """
    return "coarse_gaussian" if kind == "gaussian" else kind


def factor(kind: NoiseKind, seed: int, name: str, start: int, count: int) -> NDArray[np.int8]:
    """Elements start .. start + count of a factor, in 1 / 32, of low-rank noise of this kind."""
    z = draw(factor_kind(kind), seed, name, start, count)
    return (z * np.float32(FACTOR_UNITS)).astype(np.int8)


def low_rank(left: NDArray[np.int8], right: NDArray[np.int8]) -> NDArray[np.float32]:
    """u v of a whole matrix or a shard of it, before it is scaled: float32 [rows, columns], exact.

    Noise is z = u v / sqrt(rank). `left` is u, int8 [rows, rank], and `right` is v, int8
    [rank, columns], both in 1 / 32: factors are drawn as tensors of their own, named NAME.u and
    NAME.v. EGGROLL, Sarkar et al. 2025; LOZO, Chen et al. 2024.
    """
    products = left.astype(np.int32) @ right.astype(np.int32)
    return products.astype(np.float32) / np.float32(FACTOR_UNITS**2)


def low_rank_coefficient(coefficient: float, rank: int) -> np.float32:
    """What u v of this rank is multiplied by where z has this coefficient; one rounding of both."""
    return np.float32(coefficient) * np.float32(1 / np.sqrt(rank))


def rounding_bits(step: int, name: str, start: int, count: int) -> NDArray[np.uint16]:
    """Bits of one step's stochastic rounding of bfloat16 masters: uint16 [count]."""
    return _halfwords(_indices(start, count), name, Stream.ROUNDING, split_words(step))


def uniform(seed: int, name: str, count: int) -> NDArray[np.float32]:
    """First values of a trained tensor: float32 [count], evenly spread over [0, 1) in 2**-24s."""
    index = _indices(0, count)
    words = _block_words(index // np.uint64(4), name, Stream.INITIAL, split_words(seed))
    word = _pick(words, index % np.uint64(4))
    return (word >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


def token_uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """A number for each token that is drawn, by a row's seed and how many it drew before.

    Float64 [count], odd multiples of 2**-49, evenly spread over (0, 1); seeds and positions are
    integers in [0, 2**64).
    """
    seed, position = np.array(seeds, np.uint64), np.array(positions, np.uint64)
    mask, half = np.uint64(_WORD_MASK), np.uint64(32)
    counter = (position & mask, position >> half, 0, Stream.SAMPLING)
    word_0, word_1, _, _ = philox(counter, (seed & mask, seed >> half))
    bits = word_0.astype(np.uint64) | (word_1.astype(np.uint64) >> np.uint64(16)) << half
    return (bits.astype(np.float64) + 0.5) * 2.0**-48


def derive_seed(run_seed: int, step: int, index: int) -> int:
    """The seed in [0, 2**64) of perturbation `index` (below 2**32) of a step of a run."""
    counter = (*split_words(step), index, Stream.SEEDS)
    word_0, word_1, _, _ = philox(counter, split_words(run_seed))
    return int(word_0) | int(word_1) << 32


def sample_seeds(run_seed: int, step: int, examples: Sequence[int], number: int) -> list[int]:
    """The seeds in [0, 2**64) that samples of training examples' prompts are drawn by: `number` for
    the first example, then as many for the second, and so on.

    The same for all probes of a step; step, examples and number are below 2**32.
    """
    example = np.repeat(np.array(examples, np.uint64), number)
    sample = np.tile(_indices(0, number), len(examples))
    word_0, word_1, _, _ = philox((step, example, sample, Stream.SAMPLES), split_words(run_seed))
    seeds: list[int] = (
        word_0.astype(np.uint64) | word_1.astype(np.uint64) << np.uint64(32)
    ).tolist()
    return seeds


def permutation(run_seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """The order in which an epoch (below 2**32) visits `size` examples: int64 [size]."""
    index = _indices(0, size)
    counter = (index & np.uint64(_WORD_MASK), index >> np.uint64(32), epoch, Stream.ORDER)
    word_0, word_1, _, _ = philox(counter, split_words(run_seed))
    keys = word_0.astype(np.uint64) | word_1.astype(np.uint64) << np.uint64(32)
    return np.argsort(keys, kind="stable")


def digest(bits: NDArray[np.uint16] | NDArray[np.uint32], region: TensorRegion) -> int:
    """A checksum in [0, 2**64) of a slice's raw bits [rows, columns], uint16 or uint32.

    It is a sum over elements, so that the digests of a tensor's shards add up (modulo 2**64) to
    the digest of the whole.
    """
    rows, columns = bits.shape
    row_starts = _indices(0, rows) * np.uint64(region.row_stride)
    index = row_starts[:, None] + _indices(region.start, columns)
    mixed = index * np.uint64(DIGEST_INDEX_MULTIPLIER)
    mixed += (bits.astype(np.uint64) + np.uint64(1)) * np.uint64(DIGEST_BITS_MULTIPLIER)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(DIGEST_MIX_MULTIPLIERS[0])
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(DIGEST_MIX_MULTIPLIERS[1])
    mixed = mixed ^ (mixed >> np.uint64(31))
    return int(np.sum(mixed, dtype=np.uint64))


def _indices(start: int, count: int) -> NDArray[np.uint64]:
    return np.uint64(start) + np.arange(count, dtype=np.uint64)


def _block_words(
    block: NDArray[np.uint64], name: str, stream: Stream, key: tuple[int, int]
) -> tuple[Words, Words, Words, Words]:
    low, high = block & np.uint64(_WORD_MASK), block >> np.uint64(32)
    return philox((low, high, tensor_word(name), stream), key)


def _pick(words: tuple[Words, Words, Words, Words], which: NDArray[np.uint64]) -> Words:
    """For each element, the word of its block that `which` (0 to 3) names."""
    picked: Words = np.stack(words, axis=-1)[np.arange(len(which)), which]
    return picked


def _halfwords(
    index: NDArray[np.uint64], name: str, stream: Stream, key: tuple[int, int]
) -> NDArray[np.uint16]:
    """Each element's own 16 bits: eight elements share a block, a word's low half comes first."""
    element = index % np.uint64(GAUSSIAN_BLOCK)
    word = _pick(
        _block_words(index // np.uint64(GAUSSIAN_BLOCK), name, stream, key),
        element // np.uint64(2),
    )
    shift = (element % np.uint64(2) * np.uint64(16)).astype(np.uint32)
    return (word >> shift).astype(np.uint16)
