"""The scoring head: what a model's last hidden states are turned into.

Owns which rows get logits, and that no more of these exist at a time than is needed. Knows nothing
of which tokens are scored, or why.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsMetadata, LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from torch import nn

from orchestrator.log_softmax_triton import chosen_logprobs

MAX_ROWS_PER_SOFTMAX = 1024  # bounds the float32 logits that exist at one time


class ScoringHead(nn.Module):
    """Stands in for a model's logits processor: logits only at the rows that are scored.

    Outside of `scoring(...)` and `showing(...)` it is the original.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.original: Any = original
        self._rows: torch.Tensor | None = None
        self._tokens: torch.Tensor | None = None
        self._shown: torch.Tensor | None = None

    @contextmanager
    def scoring(self, rows: torch.Tensor, tokens: torch.Tensor) -> Iterator[None]:
        """Score `tokens[i]` (int64) at row `rows[i]` (int64) of the batch's flat positions."""
        self._rows, self._tokens = rows, tokens
        try:
            yield
        finally:
            self._rows = self._tokens = None

    @contextmanager
    def showing(self, rows: torch.Tensor) -> Iterator[None]:
        """Give the hidden states at these rows (int64), behind the final norm, and no logits."""
        self._shown = rows
        try:
            yield
        finally:
            self._shown = None

    def forward(
        self,
        input_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        lm_head: nn.Module,
        metadata: ForwardBatch | LogitsMetadata,
        *others: Any,
        **named: Any,
    ) -> LogitsProcessorOutput:
        if self._shown is not None:
            shown = hidden_states[self._shown].float()
            return LogitsProcessorOutput(next_token_logits=None, hidden_states=shown)
        if self._rows is None or self._tokens is None:
            return self.original(input_ids, hidden_states, lm_head, metadata, *others, **named)
        if isinstance(metadata, ForwardBatch):
            metadata = LogitsMetadata.from_forward_batch(metadata)
        scored = []
        for start in range(0, len(self._rows), MAX_ROWS_PER_SOFTMAX):
            rows = self._rows[start : start + MAX_ROWS_PER_SOFTMAX]
            tokens = self._tokens[start : start + MAX_ROWS_PER_SOFTMAX]
            logits = self.original._get_logits(hidden_states[rows], lm_head, metadata)
            scored.append(_logprobs(logits[:, : self.original.config.vocab_size].float(), tokens))
        return LogitsProcessorOutput(next_token_logits=None, input_token_logprobs=torch.cat(scored))


def _logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of `tokens[i]` in row i of the logits: float32 [rows]."""
    if logits.is_cuda:
        return chosen_logprobs(logits, tokens)
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=1)
