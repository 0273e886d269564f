"""Contexts that the base model alone computes: found in the RadixCache or computed, and held.

An activated adapter acts behind the context, so the context's KV entries are the base's, and good
for every adapter. Owns when they are computed and under which key they are kept. A context is
computed alone, whole, and under a key of its own, so that its entries are a pure function of its
tokens: not of what was computed beside it, nor of what another run or replica had in its cache.
Knows nothing of the rows that begin with it.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from orchestrator.pools import Hold, Pools

Tokens = tuple[int, ...]


class Contexts:
    """The contexts of one engine."""

    def __init__(self, pools: Pools, forward: Callable[[Any], Any]) -> None:
        self._pools, self._forward = pools, forward

    @contextmanager
    def held(
        self, contexts: Iterable[Tokens], base: str | None
    ) -> Iterator[tuple[dict[Tokens, torch.Tensor], int]]:
        """Within, each context's KV entries (int64 [tokens]); and how many of them were found.

        `base` names the state of the weights without adapters. Without it nothing is found, and
        nothing stays.
        """
        wanted = list(dict.fromkeys(contexts))
        holds: dict[Tokens, Hold] = {}
        try:
            # What is there is locked before what is missing takes its place.
            for tokens in wanted:
                found = self.find(tokens, base)
                if found is not None:
                    holds[tokens] = found
            num_found = sum(map(len, holds))
            for tokens in wanted:
                if tokens not in holds:
                    holds[tokens] = self.compute(tokens, base)
            yield {tokens: hold.entries for tokens, hold in holds.items()}, num_found
        finally:
            for hold in holds.values():
                self._pools.let_go(hold)

    def find(self, tokens: Tokens, base: str | None) -> Hold | None:
        """A context's entries, to be let go by the pools; None where the cache lacks any."""
        return None if base is None else self._pools.find(tokens, key(base, tokens))

    def compute(self, tokens: Tokens, base: str | None) -> Hold:
        """The same, computed now; kept in the cache if there is a `base`."""
        namespace = None if base is None else key(base, tokens)
        request = self._pools.request(tokens, namespace, len(tokens) - 1)
        is_computed = False
        try:
            self._forward(self._pools.forward_batch(self._pools.schedule([request])))
            is_computed = True
        finally:
            if not is_computed:  # its entries must not be found later
                self._pools.release(request, keep=False)
        return self._pools.hold(request, keep=namespace is not None)


def key(base: str, tokens: Sequence[int]) -> str:
    """The namespace of one context under one state of the weights.

    Contexts that begin alike would share entries under a common one, and which of them had
    computed those would depend on the cache's past.
    """
    digest = hashlib.blake2b(array("q", tokens).tobytes(), digest_size=16).hexdigest()
    return f"{base} context {digest}"
