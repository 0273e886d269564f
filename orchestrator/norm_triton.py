"""Layer norm behind a residual addition, both in one pass over the rows, on CUDA, in Triton.

Owns one kernel. It rounds the sum to the rows' dtype, as two operations would, and is float32 in
between. Knows nothing of models.

Ba et al., Layer Normalization, 2016.
"""

import torch
import triton
import triton.language as tl

COLUMNS_PER_WARP = 1024  # 32 lanes, each with two or more loads of 16 bytes
MAX_WARPS = 16


def add_layer_norm(
    rows: torch.Tensor,
    update: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    warps: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """rows + update, and its layer norm: two tensors like `rows` [rows, columns].

    `rows` and `update` are contiguous, of one shape and dtype; `weight` and `bias` [columns] scale
    and move the norm, unless None. Raises ValueError for what is not contiguous or not alike.
    """
    if rows.shape != update.shape or rows.dtype != update.dtype or rows.ndim != 2:
        raise ValueError(f"{rows.shape} {rows.dtype} and {update.shape} {update.dtype}")
    given = [part for part in (rows, update, weight, bias) if part is not None]
    if not all(part.is_contiguous() for part in given):
        raise ValueError("not contiguous")
    num_rows, columns = rows.shape
    block = triton.next_power_of_2(columns)
    summed, normed = torch.empty_like(rows), torch.empty_like(rows)
    if num_rows:
        with torch.cuda.device_of(rows):
            _add_layer_norm[(num_rows,)](
                rows,
                update,
                weight,
                bias,
                summed,
                normed,
                eps,
                COLUMNS=columns,
                BLOCK=block,
                num_warps=warps or min(max(block // COLUMNS_PER_WARP, 1), MAX_WARPS),
            )
    return summed, normed


@triton.jit
def _add_layer_norm(
    rows: tl.tensor,
    update: tl.tensor,
    weight: tl.tensor | None,
    bias: tl.tensor | None,
    summed: tl.tensor,
    normed: tl.tensor,
    eps: tl.float32,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    place = tl.program_id(0).to(tl.int64) * COLUMNS + column
    row = tl.load(rows + place, mask=inside, other=0)
    total = row.to(tl.float32) + tl.load(update + place, mask=inside, other=0).to(tl.float32)
    rounded = total.to(row.dtype)
    tl.store(summed + place, rounded, mask=inside)
    value = rounded.to(tl.float32)
    mean = tl.sum(value, 0) / COLUMNS
    centred = tl.where(inside, value - mean, 0.0)
    norm = centred * tl.rsqrt(tl.sum(centred * centred, 0) / COLUMNS + eps)
    if weight is not None:
        norm *= tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    if bias is not None:
        norm += tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    tl.store(normed + place, norm.to(row.dtype), mask=inside)
