"""How a next token is chosen, and when a continuation ends.

Owns the choice out of logits, by numbers that are handed in, and the search for stop strings in
text that grows. Knows neither models nor batches: a row's choice depends on its own logits and its
own number alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch

Decode = Callable[[Sequence[int]], str]
"""The text of token ids, as a tokenizer's `decode` gives it."""
Ending = Literal["stop", "length", "undefined"]

UNDEFINED = -1  # stands for a token where logits are not finite
UNFINISHED_CHARACTER = "\ufffd"  # how a decoder writes bytes that are no whole character yet
WEIGHT_UNITS = 2**40
KEPT_TEXTS, SHORT = 2**17, 3  # sequences, of so many tokens at most
MAX_WEIGHTS_AT_ONCE = 2**23  # bounds the float64 values that exist at one time


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to continue a prompt. Raises ValueError for values that mean nothing."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Keep the most likely tokens up to this share of the probability, the one across included."""
    top_k: int = 0
    """Keep so many of the most likely tokens, and what is as likely as the last; 0 keeps all."""
    stop_tokens: frozenset[int] = frozenset()
    """A continuation ends before the first of these, see `Engine.eos_tokens`."""
    stop_strings: tuple[str, ...] = ()
    """A continuation's text ends before the first of these."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not (0 <= self.temperature < float("inf") and 0 < self.top_p <= 1 and self.top_k >= 0):
            raise ValueError(
                f"temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k}: they "
                "must be finite and not below 0, in (0, 1], and not below 0"
            )
        if not all(self.stop_strings):
            raise ValueError("a stop string is empty")


@dataclass(frozen=True, slots=True)
class Continuation:
    """What followed a prompt."""

    tokens: list[int]
    """Without the stop token; with a stop string, the fewest that spell all text before it."""
    text: str | None
    """Up to the stop string; None where no `decode` was handed in."""
    ended: Ending
    """By a stop token or string, by `max_new_tokens`, or because logits were not finite."""
    num_reused: int = field(default=0, compare=False)
    """Tokens of the prompt whose KV entries were found in the cache, or were those of another row
    with the same prompt: not what followed, but how."""


def choose(
    logits: torch.Tensor,
    rows: Sequence[int],
    sampling: Sampling,
    uniforms: torch.Tensor | None,
) -> list[int]:
    """The next token of each of `rows`, numbers of rows of `logits` [rows, vocabulary].

    Several draws may be made from one row. With a temperature, draw i takes the token at which the
    sum of probabilities, in the order of token ids, passes `uniforms[i]` (float64, in (0, 1)).
    Probabilities are whole numbers of 2**-40ths of the most likely token's, so that sums are exact
    in any order. UNDEFINED where the largest logit is not finite.
    """
    step = max(1, MAX_WEIGHTS_AT_ONCE // logits.shape[1])
    chosen: list[torch.Tensor] = []
    for first in range(0, len(rows), step):
        some = torch.tensor(rows[first : first + step], device=logits.device)
        chunk = logits[some]
        best = chunk.amax(dim=1, keepdim=True)
        if uniforms is None:
            tokens = chunk.argmax(dim=1)
        else:
            numbers = uniforms[first : first + step].to(logits.device)
            tokens = _drawn(_weights(chunk, best, sampling), numbers)
        chosen.append(tokens.where(best[:, 0].isfinite(), UNDEFINED))
    return torch.cat(chosen).tolist() if chosen else []


def _weights(logits: torch.Tensor, best: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities in WEIGHT_UNITSths of the largest, 0 for what is left out: int64."""
    scaled = (logits - best).double() / sampling.temperature
    weights = (scaled.exp() * WEIGHT_UNITS).long()
    if 0 < sampling.top_k < weights.shape[1]:
        least = weights.topk(sampling.top_k, dim=1).values[:, -1:]
        weights = weights.where(weights >= least, 0)
    if sampling.top_p < 1:
        descending = weights.sort(dim=1, descending=True).values
        before = descending.cumsum(dim=1) - descending
        is_kept = before < sampling.top_p * weights.sum(dim=1, keepdim=True).double()
        least = descending.gather(1, is_kept.sum(dim=1, keepdim=True).clamp(min=1) - 1)
        weights = weights.where(weights >= least, 0)
    return weights


def _drawn(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The first token of each row at which the sum of weights passes its share: int64 [rows]."""
    sums = weights.cumsum(dim=1)
    share = (uniforms * sums[:, -1].double()).long()
    return torch.searchsorted(sums, share[:, None], right=True)[:, 0]


def remembering(decode: Decode) -> Decode:
    """The same function, which keeps the texts of short sequences: a transcript asks twice a token,
    and tokenizers take longer over a few tokens than the device does over all rows."""
    kept = lru_cache(maxsize=KEPT_TEXTS)(decode)

    def text(tokens: Sequence[int]) -> str:
        return kept(tuple(tokens)) if len(tokens) <= SHORT else decode(tokens)

    return text


class Transcript:
    """The text of one continuation, decoded a few tokens at a time as it grows.

    A decoder's text of some tokens is not the end of its text of more: spaces are dropped at the
    start, and a character may take several tokens. So the last tokens are decoded with and without
    the new ones, and the difference is what these add.
    """

    def __init__(self, decode: Decode, stop_strings: Sequence[str]) -> None:
        self._decode = decode
        self._stop_strings = stop_strings
        self._longest = max(map(len, stop_strings))
        self._tail = ""  # of the text, as much as a stop string may have begun in
        self._first = self._read = 0  # tokens that are decoded again, tokens whose text is known

    def has_stopped(self, tokens: Sequence[int]) -> bool:
        """Whether there is a stop string in the text, now that `tokens` are all there is."""
        known = self._decode(tokens[self._first : self._read])
        text = self._decode(tokens[self._first :])
        if len(text) <= len(known) or text.endswith(UNFINISHED_CHARACTER):
            return False
        self._tail += text[len(known) :]
        self._first, self._read = self._read, len(tokens)
        found = any(string in self._tail for string in self._stop_strings)
        self._tail = self._tail[max(0, len(self._tail) - self._longest + 1) :]
        # What a decoder makes of the whole decides.
        return found and _first_stop(self._decode(tokens), self._stop_strings) is not None


def continuation(
    tokens: list[int], ended: Ending, decode: Decode | None, stop_strings: Sequence[str]
) -> Continuation:
    """What is left of a row's tokens once they are cut before the first stop string."""
    if decode is None:
        return Continuation(tokens, None, ended)
    text = decode(tokens)
    stop = _first_stop(text, stop_strings)
    if stop is None:
        return Continuation(tokens, text, ended)
    text, tokens = text[:stop], list(tokens)
    while tokens and decode(tokens[:-1]).startswith(text):
        tokens.pop()
    return Continuation(tokens, text, "stop")


def _first_stop(text: str, stop_strings: Sequence[str]) -> int | None:
    """Where in a text the first stop string begins."""
    places = [text.find(string) for string in stop_strings]
    return min((place for place in places if place >= 0), default=None)
