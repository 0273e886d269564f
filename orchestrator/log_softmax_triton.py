"""Log-probabilities of chosen tokens, in one pass over the logits, on CUDA, in Triton.

Owns one kernel: a program reads a row once, keeps its largest logit and the sum of exponentials
below it as it goes, and picks the chosen one. Everything is float32. Knows nothing of models.

Online softmax: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018.
"""

import torch
import triton
import triton.language as tl

BLOCK = 4096  # logits of a step of a row's sums
WARPS = 8


def chosen_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log_softmax(logits)[i, tokens[i]]: float32 [rows].

    `logits` are float32 [rows, vocabulary], a slice of wider rows too; `tokens` int64 [rows]. A
    row that holds a NaN gives NaN. Raises ValueError for other dtypes and shapes.
    """
    if logits.dtype is not torch.float32 or logits.ndim != 2 or logits.stride(1) != 1:
        raise ValueError(f"logits: {logits.dtype}, {logits.shape}, strides {logits.stride()}")
    if tokens.dtype is not torch.int64 or tokens.shape != logits.shape[:1]:
        raise ValueError(f"tokens: {tokens.dtype}, {tokens.shape}, for {len(logits)} rows")
    logprobs = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        with torch.cuda.device_of(logits):
            _chosen_logprobs[(len(logits),)](
                logits,
                tokens.contiguous(),
                logprobs,
                logits.stride(0),
                logits.shape[1],
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return logprobs


@triton.jit
def _chosen_logprobs(
    logits: tl.tensor,
    tokens: tl.tensor,
    logprobs: tl.tensor,
    stride: tl.int64,
    vocabulary: tl.int32,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * stride
    column = tl.arange(0, BLOCK)
    # The lowest finite value: from -inf, logits that are all -inf would lead to -inf - -inf.
    largest = tl.full((), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        inside = first + column < vocabulary
        values = tl.load(start + first + column, mask=inside, other=float("-inf"))
        now = tl.maximum(largest, tl.max(values, 0))
        total = total * tl.exp(largest - now) + tl.sum(tl.exp(values - now), 0)
        largest = now
    chosen = tl.load(start + tl.load(tokens + row))
    tl.store(logprobs + row, chosen - largest - tl.log(total))
