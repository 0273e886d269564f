"""The KV slots and request slots of one runner, and its RadixCache: lent to requests, taken back.

Owns how a sequence becomes one of SGLang's requests, and requests become a batch. Knows token ids
and names of slots; knows nothing of what is computed, or why.
"""

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, EvictResult, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from orchestrator.prefix_slots import PrefixSlots
from orchestrator.score_plan import owners

VIRTUAL_TOKEN = 0  # holds the place of a prefix slot's; never computed


class Cache(RadixCache):  # type: ignore[misc]  # SGLang's is untyped
    """SGLang's tree, which also counts what it gives up to make room."""

    num_evicted = 0
    """Tokens."""

    def evict(self, params: EvictParams) -> EvictResult:
        result = super().evict(params)
        self.num_evicted += result.num_tokens_evicted
        return result


@dataclass(frozen=True, slots=True)
class Hold:
    """KV entries that stay where they are until they are let go."""

    entries: torch.Tensor
    """Where in the pool they are: int64 [tokens]."""
    node: Any
    """Of the tree, locked; None where the entries are the holder's own."""


class Pools:
    """What a runner's sequences take while they are in it."""

    def __init__(self, model_runner: Any, prefixes: PrefixSlots | None, margin: int) -> None:
        """`margin` is how many KV slots are never to be counted as room for sequences; where there
        is one, neither is one request slot: a graph's batch may have a sequence of padding."""
        self._model_runner, self._prefixes, self._margin = model_runner, prefixes, margin
        self.allocator = model_runner.token_to_kv_pool_allocator
        self.requests = model_runner.req_to_token_pool
        self.cache = Cache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=self.requests,
                token_to_kv_pool_allocator=self.allocator,
                page_size=1,
            )
        )
        self.kv_tokens = int(self.allocator.available_size()) - margin
        """Tokens that sequences may hold, without the entries of prefix slots."""
        # SGLang lowers it to suit the pool.
        self.max_sequences = len(self.requests.free_slots) - (margin > 0)
        """Requests that there may be at a time."""
        self._ids = itertools.count()
        # Holds the place of entries that are not allocated yet; SGLang's slot for padding.
        self._unknown = torch.zeros(
            self.requests.req_to_token.shape[1], dtype=torch.int64, device=model_runner.device
        )

    def free(self) -> tuple[int, int]:
        """KV slots (tokens) and request slots that are free or held by evictable entries."""
        kv = self.allocator.available_size() + self.cache.evictable_size() - self._margin
        return int(kv), len(self.requests.free_slots) - (self._margin > 0)

    def request(
        self,
        tokens: Sequence[int],
        namespace: str | None,
        first_needed: int,
        adapter: str | None = None,
    ) -> Req:
        """A request whose hidden states are computed from position `first_needed` on, at least."""
        prefix = self.prefix(adapter)
        virtual = [] if prefix is None else [VIRTUAL_TOKEN] * len(prefix)
        # SGLang itself looks up all tokens but the last, unless log-probabilities are asked for;
        # a batch that decodes must not ask for any.
        is_scored = first_needed < len(tokens) - 1
        request = self._new([*virtual, *tokens], adapter, namespace, is_scored)
        request.logprob_start_len = len(virtual) + first_needed
        is_cached = namespace is not None and prefix is None
        request.init_next_round_input(self.cache if is_cached else None)
        if prefix is not None:
            _begin_with(request, prefix)
        if request.last_node is not None:
            self.cache.inc_lock_ref(request.last_node)  # or making room could evict it
        request.set_extend_range(len(request.prefix_indices), len(request.origin_input_ids))
        return request

    def branch(self, tokens: Sequence[int], entries: torch.Tensor, adapter: str | None) -> Req:
        """A request whose first tokens' KV entries are another's, to be released after it.

        Nothing of it is looked up, and nothing may be kept: what it computes depends on more than
        its tokens and adapter.
        """
        request = self._new(tokens, adapter, None, is_scored=False)
        request.init_next_round_input(None)
        _begin_with(request, entries)
        request.set_extend_range(len(entries), len(request.origin_input_ids))
        return request

    def entries(self, request: Req) -> torch.Tensor:
        """Where in the KV pool a request's input lies, once computed: int64 [tokens]."""
        row: torch.Tensor = self.requests.req_to_token[request.req_pool_idx]
        return row[: len(request.origin_input_ids)].to(torch.int64)

    def find(self, tokens: Sequence[int], namespace: str) -> Hold | None:
        """Entries of all these tokens, locked until they are let go; None where any is missing."""
        match = self.cache.match_prefix(
            MatchPrefixParams(key=RadixKey(array("q", tokens), namespace))
        )
        if len(match.device_indices) < len(tokens):
            return None
        self.cache.inc_lock_ref(match.last_device_node)
        return Hold(match.device_indices, match.last_device_node)

    def hold(self, request: Req, keep: bool) -> Hold:
        """The entries of a computed request, which is given back; found later if kept."""
        if keep:
            self.release(request, keep=True)
            found = self.find(request.origin_input_ids, request.extra_key)
            assert found is not None, "what was inserted is found"
            return found
        own = Hold(self.entries(request).clone(), None)
        self.requests.free(request)
        return own

    def let_go(self, hold: Hold) -> None:
        if hold.node is not None:
            self.cache.dec_lock_ref(hold.node)
        else:
            self.allocator.free(hold.entries)

    def prefix(self, adapter: str | None) -> torch.Tensor | None:
        """The KV entries that a row begins with; None where it names no prefix slot."""
        if self._prefixes is None or adapter not in self._prefixes.names:
            return None
        return self._prefixes.entries(adapter)

    def num_begun(self, adapter: str | None, request: Req) -> int:
        """Tokens of a row that are computed elsewhere; virtual ones are no tokens of it."""
        prefix = self.prefix(adapter)
        return len(request.prefix_indices) - (0 if prefix is None else len(prefix))

    def follow(
        self, requests: Sequence[Req], adapters: Sequence[str | None], shared: Sequence[int]
    ) -> list[int]:
        """Let the rows of a batch begin with tokens of the rows before them.

        Row i has its first `shared[i]` tokens in common with the row before it, and begins with
        those unless the cache has given it more. The answer has how many entries each row takes
        from the row before it, a prefix slot's included; `share` puts them in place.
        """
        taken = [
            self._followed(*row, always=False)
            for row in zip(requests, adapters, shared, strict=True)
        ]
        num_new = sum(
            len(request.origin_input_ids) - len(request.prefix_indices) for request in requests
        )
        if num_new > self.free()[0]:
            # A position may be scored in one row, and so be computed anew, while another holds on
            # to its entry in the cache. Where there is no room for both, the cache's goes.
            taken = [
                self._followed(*row, always=True)
                for row in zip(requests, adapters, shared, strict=True)
            ]
        return taken

    def _followed(self, request: Req, adapter: str | None, shared: int, *, always: bool) -> int:
        prefix = self.prefix(adapter)
        size = shared + (0 if prefix is None else len(prefix))
        if not shared or (len(request.prefix_indices) >= size and not always):
            return 0
        if request.last_node is not None:  # what was found is not used
            self.cache.dec_lock_ref(request.last_node)
            request.last_node = None
        _begin_with(request, self._unknown[:size])
        request.set_extend_range(size, len(request.origin_input_ids))
        return size

    def share(self, requests: Sequence[Req], taken: Sequence[int]) -> None:
        """Give the rows of a scheduled batch the entries that they take from rows before them.

        The entries stay those rows', which are released together with these. The first `taken[i]`
        entries of row i are those of the row before it.
        """
        if not any(taken):
            return
        sources, targets, columns = [], [], []
        owning = owners([len(request.origin_input_ids) for request in requests], taken)
        slots = np.array([request.req_pool_idx for request in requests])
        for slot, of_row, size in zip(slots, owning, taken, strict=True):
            sources.append(slots[of_row[:size]])
            targets.append(np.full(size, slot))
            columns.append(np.arange(size))
        table = self.requests.req_to_token
        source, target, column = (
            torch.from_numpy(np.concatenate(parts)).to(table.device)
            for parts in (sources, targets, columns)
        )
        table[target, column] = table[source, column]

    def schedule(self, requests: list[Req]) -> ScheduleBatch:
        """Allocate slots for the requests, and lay them out as one prefill batch."""
        schedule = ScheduleBatch.init_new(
            reqs=requests,
            req_to_token_pool=self.requests,
            token_to_kv_pool_allocator=self.allocator,
            tree_cache=self.cache,
            model_config=self._model_runner.model_config,
            enable_overlap=False,
            spec_algorithm=SpeculativeAlgorithm.NONE,
        )
        schedule.return_logprob = False  # the scoring head takes them itself
        schedule.prepare_for_extend()
        if schedule.input_ids is None:
            schedule.input_ids = schedule.prefill_input_ids_cpu.to(schedule.device)
        return schedule

    def forward_batch(self, schedule: ScheduleBatch) -> ForwardBatch:
        return ForwardBatch.init_new(
            schedule, self._model_runner, return_hidden_states_before_norm=False
        )

    def release(self, request: Req, keep: bool) -> None:
        """Give a request's slots back, however far it came; keep its KV entries if asked."""
        if request.kv_committed_len:  # its KV slots were allocated
            self.cache.cache_finished_req(
                request, is_insert=keep, kv_len_to_handle=request.kv_committed_len
            )
        elif request.last_node is not None:
            self.cache.dec_lock_ref(request.last_node)
        if request.req_pool_idx is not None:
            self.requests.free(request)

    def _new(
        self, tokens: Sequence[int], adapter: str | None, namespace: str | None, is_scored: bool
    ) -> Req:
        return Req(
            rid=str(next(self._ids)),
            origin_input_text="",
            origin_input_ids=array("q", tokens),
            sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
            return_logprob=is_scored,
            extra_key=namespace,
            lora_id=adapter if self.prefix(adapter) is None else None,
        )


def _begin_with(request: Req, entries: torch.Tensor) -> None:
    """Let a request begin with KV entries that are another's, and are not freed with its own."""
    request.prefix_indices = entries
    request.cache_protected_len = len(entries)
