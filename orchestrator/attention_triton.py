"""Causal attention inside short sequences that lie one behind the other, on CUDA, in Triton.

Owns one kernel and how it is cut: a tile of rows of a sequence, under one head, is a program.
Tiles are small, since most sequences of a scoring batch are shorter than those for which engines'
kernels are cut. Queries, keys and values are read where they lie, as slices of wider rows too;
what a sequence begins with may be rows of others, named by an index. Scores, softmax and sums are
float32. Knows nothing of SGLang.

Online softmax: Dao et al., FlashAttention, 2022.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

MAX_HEAD_DIM = 128  # wider heads do not fit a program's registers
MIN_DOT = 16  # the least that a dimension of tl.dot may be
LOG2_E = 1.4426950408889634


class Launch(NamedTuple):
    """How the kernel is cut and compiled."""

    rows: int
    """Of a tile."""
    keys: int
    """Of a step of a tile's sums."""
    warps: int
    stages: int


class Context(NamedTuple):
    """What the sequences of a batch see before their own first row: rows of other sequences."""

    counts: torch.Tensor
    """How many rows, per sequence: int32 [sequences]."""
    places: torch.Tensor
    """Which, in their order: int32 [sequences, at least the largest count], contiguous."""


SHORT = Launch(rows=32, keys=32, warps=2, stages=1)
LONG = Launch(rows=64, keys=64, warps=4, stages=3)
FLOAT32 = Launch(rows=16, keys=16, warps=4, stages=1)  # larger tiles would not stay in registers
LONGEST_SHORT = 64


def launch_for(longest: int, dtype: torch.dtype) -> Launch:
    """How to launch for sequences of at most so many tokens."""
    if dtype is torch.float32:
        return FLOAT32
    return SHORT if longest <= LONGEST_SHORT else LONG


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float,
    launch: Launch | None = None,
    context: Context | None = None,
) -> torch.Tensor:
    """Attention's outputs [tokens, heads, head_dim], contiguous.

    `queries` is [tokens, heads, head_dim], `keys` and `values` [tokens, key heads, head_dim], of
    one dtype; neighbouring heads share a key head. Tokens and heads may be any way apart. Sequence
    i, of at most `longest` tokens, has the rows from bounds[i] to bounds[i + 1] (int64 on the
    device). With a `context` sequences begin with rows of others, which all of theirs see. Rows of
    no sequence are left as they happen to be. Raises ValueError for heads that
    do not divide, are too wide, or are not contiguous in themselves.
    """
    num_tokens, num_heads, head_dim = queries.shape
    num_key_heads = keys.shape[1]
    if num_heads % num_key_heads or head_dim > MAX_HEAD_DIM:
        raise ValueError(f"{num_heads} heads of {head_dim} over {num_key_heads}")
    if any(part.stride(2) != 1 for part in (queries, keys, values)):
        raise ValueError("a head's values do not lie next to each other")
    outputs = torch.empty(
        num_tokens, num_heads, head_dim, dtype=queries.dtype, device=queries.device
    )
    launch = launch or launch_for(longest, queries.dtype)
    counts, places = (bounds, bounds[None]) if context is None else context
    grid = (triton.cdiv(longest, launch.rows), num_heads, len(bounds) - 1)
    with torch.cuda.device_of(queries):
        _attend[grid](
            queries,
            keys,
            values,
            outputs,
            bounds,
            counts,
            places,
            scale * LOG2_E,
            places.stride(0),
            *queries.stride()[:2],
            *keys.stride()[:2],
            *values.stride()[:2],
            HEADS=num_heads,
            GROUP=num_heads // num_key_heads,
            HEAD_DIM=head_dim,
            PADDED_DIM=max(triton.next_power_of_2(head_dim), MIN_DOT),
            BLOCK_ROWS=launch.rows,
            BLOCK_KEYS=launch.keys,
            HAS_CONTEXT=context is not None,
            WIDE=num_tokens * max(keys.stride(0), values.stride(0)) >= 2**31,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
    return outputs


@triton.jit
def _added(
    score: tl.tensor, value: tl.tensor, largest: tl.tensor, weight: tl.tensor, total: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A tile's largest score, sum of weights and weighted sum of values, with more keys."""
    larger = tl.maximum(largest, tl.max(score, 1))
    shrunk = tl.exp2(largest - larger)
    share = tl.exp2(score - larger[:, None])
    weight = weight * shrunk + tl.sum(share, 1)
    total = tl.dot(share.to(value.dtype), value, total * shrunk[:, None], input_precision="ieee")
    return larger, weight, total


@triton.jit
def _attend(
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    outputs: tl.tensor,
    bounds: tl.tensor,
    counts: tl.tensor,
    places: tl.tensor,
    scale: tl.float32,
    place_stride: tl.int32,
    query_stride: tl.int32,
    query_head_stride: tl.int32,
    key_stride: tl.int32,
    key_head_stride: tl.int32,
    value_stride: tl.int32,
    value_head_stride: tl.int32,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    HAS_CONTEXT: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    first_row = tl.program_id(0) * BLOCK_ROWS
    head = tl.program_id(1)
    start = tl.load(bounds + tl.program_id(2)).to(tl.int64)
    length = (tl.load(bounds + tl.program_id(2) + 1) - start).to(tl.int32)
    if first_row >= length:
        return
    row = first_row + tl.arange(0, BLOCK_ROWS)
    key = tl.arange(0, BLOCK_KEYS)
    column = tl.arange(0, PADDED_DIM)
    in_head = column < HEAD_DIM
    queries += start * query_stride + head * query_head_stride
    keys += (head // GROUP) * key_head_stride
    values += (head // GROUP) * value_head_stride
    wanted = (row < length)[:, None] & in_head[None, :]
    query = tl.load(queries + row[:, None] * query_stride + column[None, :], mask=wanted, other=0)
    largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_ROWS], tl.float32)
    total = tl.zeros([BLOCK_ROWS, PADDED_DIM], tl.float32)
    # The first step has a key for each row, so `largest` is finite from then on.
    if HAS_CONTEXT:
        count = tl.load(counts + tl.program_id(2)).to(tl.int32)
        places += tl.program_id(2) * place_stride
        for first_key in range(0, count, BLOCK_KEYS):
            number = first_key + key
            inside = number < count
            place = tl.load(places + number, mask=inside, other=0).to(tl.int32)
            if WIDE:
                place = place.to(tl.int64)
            of_keys = in_head[:, None] & inside[None, :]
            of_values = inside[:, None] & in_head[None, :]
            seen = tl.load(
                keys + place[None, :] * key_stride + column[:, None], mask=of_keys, other=0
            )
            value = tl.load(
                values + place[:, None] * value_stride + column[None, :], mask=of_values, other=0
            )
            score = tl.dot(query, seen, input_precision="ieee") * scale
            score = tl.where(inside[None, :], score, float("-inf"))
            largest, weight, total = _added(score, value, largest, weight, total)
    keys += start * key_stride
    values += start * value_stride
    # Rows see no key behind their own.
    for first_key in range(0, tl.minimum(length, first_row + BLOCK_ROWS), BLOCK_KEYS):
        place = first_key + key
        inside = place < length
        of_keys = in_head[:, None] & inside[None, :]
        of_values = inside[:, None] & in_head[None, :]
        seen = tl.load(keys + place[None, :] * key_stride + column[:, None], mask=of_keys, other=0)
        value = tl.load(
            values + place[:, None] * value_stride + column[None, :], mask=of_values, other=0
        )
        score = tl.dot(query, seen, input_precision="ieee") * scale
        score = tl.where(place[None, :] <= row[:, None], score, float("-inf"))
        largest, weight, total = _added(score, value, largest, weight, total)
    outputs += start * (HEADS * HEAD_DIM) + head * HEAD_DIM
    tl.store(
        outputs + row[:, None] * (HEADS * HEAD_DIM) + column[None, :],
        (total / weight[:, None]).to(query.dtype),
        mask=wanted,
    )
