"""Continuous batches: rows leave when they end, waiting ones enter as slots become free.

Owns which rows are computed together, and their requests while they are. A prompt that several
rows share under an adapter is computed once, as their stem; the rows then branch off it, over its
KV entries. (SGLang's requests of one batch do not find each other's entries, and its radix tree
cannot tell prefix slots apart, so stems lend their entries themselves.) Rows reserve the room of
all tokens that they may come to, so that none has to be taken out half way. Stems of prompts that
begin with a context, on which no adapter acts, begin with its entries, and all share them. Knows
token ids and names of slots; knows nothing of what the text is for.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from orchestrator.contexts import Contexts
from orchestrator.noise import token_uniforms
from orchestrator.pools import Hold, Pools
from orchestrator.sampling import (
    UNDEFINED,
    Continuation,
    Decode,
    Ending,
    Sampling,
    Transcript,
    choose,
    continuation,
)

MAX_PREFILL_TOKENS = 16_384  # more keep no device busier, and need memory all at once
CROWD_SHARE = 0.75  # rows that may be left when others enter: a prefill is to serve many


@dataclass(slots=True, eq=False)
class Row:
    """One continuation, as it grows."""

    stem: "Stem"
    seed: int
    tokens: list[int] = field(default_factory=list)
    transcript: Transcript | None = None
    request: Req | None = None
    """A branch's own; None for the only row of a stem, which goes on in the stem's."""
    ended: Ending | None = None


@dataclass(slots=True, eq=False)
class Stem:
    """A prompt under an adapter, and the rows that continue it."""

    prompt: Sequence[int]
    adapter: str | None
    context: tuple[int, ...] = ()
    """The prompt's first tokens, if they are computed without any adapter."""
    rows: list[Row] = field(default_factory=list)
    request: Req | None = None
    entries: torch.Tensor | None = None
    """The KV entries that its rows begin with; None where it has one row, or is not computed."""
    num_reused: int = 0

    @property
    def is_shared(self) -> bool:
        return len(self.rows) > 1


Entrant = Stem | Row


@dataclass(frozen=True, slots=True)
class Room:
    """What a stem or row takes of the pools, or what is left of them."""

    tokens: int
    requests: int

    def __add__(self, other: "Room") -> "Room":
        return Room(self.tokens + other.tokens, self.requests + other.requests)

    def __sub__(self, other: "Room") -> "Room":
        return Room(self.tokens - other.tokens, self.requests - other.requests)

    def holds(self, other: "Room") -> bool:
        return other.tokens <= self.tokens and other.requests <= self.requests


@dataclass(slots=True)
class Lent:
    """A context's entries, and how many stems that are in begin with them."""

    hold: Hold | None = None
    """None until it is found or computed."""
    num_stems: int = 0
    is_paid: bool = True
    """Whether it was found, or a stem has been told that it was computed for it."""


class Generation:
    """One call for continuations of prompts that each fit the pools, with one row's new tokens."""

    def __init__(
        self,
        pools: Pools,
        forward: Callable[[ForwardBatch], LogitsProcessorOutput],
        sampling: Sampling,
        decode: Decode | None = None,
        namespace: str | None = None,
        contexts: Contexts | None = None,
        base: str | None = None,
    ) -> None:
        """`contexts` are needed where prompts begin with any, and are kept under `base`."""
        self._pools, self._forward = pools, forward
        self._contexts, self._base = contexts, base
        self._lent: dict[tuple[int, ...], Lent] = {}
        self._sampling, self._decode, self._namespace = sampling, decode, namespace
        self._free = Room(pools.kv_tokens, pools.max_sequences)
        self._waiting: deque[Entrant] = deque()
        self._inside: set[Stem] = set()
        self._running: list[Row] = []
        """In the order of the batch's requests."""
        self._batch: ScheduleBatch | None = None

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[str | None],
        seeds: Sequence[int],
        contexts: Sequence[int] | None = None,
    ) -> list[Continuation]:
        """All prompts' continuations under the first adapter, then those under the second, ...

        `contexts` are how many tokens of each prompt are computed without any adapter.
        """
        rows = self._lay_out(prompts, adapters, seeds, contexts or [0] * len(prompts))
        crowd = 0
        try:
            while self._waiting or self._running:
                if len(self._running) <= crowd * CROWD_SHARE:
                    while entrants := self._admitted():
                        self._enter(entrants)
                    crowd = len(self._running)
                if self._running:
                    self._step()
        finally:
            for row in rows:  # what a failure has left
                if row.request is not None:
                    self._pools.release(row.request, keep=False)
            for stem in self._inside:
                if stem.request is not None:
                    self._pools.release(stem.request, keep=False)
            for lent in self._lent.values():
                if lent.hold is not None:
                    self._pools.let_go(lent.hold)
        return [self._answer(row) for row in rows]

    def _lay_out(
        self,
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[str | None],
        seeds: Sequence[int],
        contexts: Sequence[int],
    ) -> list[Row]:
        """Let stems wait, a prompt's adapters next to each other; the rows are as the answer's."""
        stems: dict[tuple[tuple[int, ...], int, int, int], Stem] = {}
        rows: list[list[Row]] = [[] for _ in adapters]
        can_share = self._pools.max_sequences > 1  # a stem and a row
        each = zip(prompts, seeds, contexts, strict=True)
        for number, (prompt, seed, context) in enumerate(each):
            for place, adapter in enumerate(adapters):
                key = tuple(prompt), context, place, 0 if can_share else number
                stem = stems.setdefault(key, Stem(prompt, adapter, tuple(prompt[:context])))
                row = Row(stem, seed)
                if self._sampling.stop_strings and self._decode is not None:
                    row.transcript = Transcript(self._decode, self._sampling.stop_strings)
                stem.rows.append(row)
                rows[place].append(row)
        self._waiting.extend(stems.values())
        return [row for of_adapter in rows for row in of_adapter]

    def _room(self, entrant: Entrant) -> Room:
        """What an entrant takes until it leaves."""
        if isinstance(entrant, Row):
            return Room(self._sampling.max_new_tokens, 1)
        num_own = 0 if entrant.is_shared else self._sampling.max_new_tokens
        return Room(len(entrant.prompt) - len(entrant.context) + num_own, 1)

    def _room_before(self, entrant: Entrant) -> Room:
        """What the entrant's context takes, if it is the first of those inside to need it."""
        if isinstance(entrant, Row) or entrant.context in self._lent:
            return Room(0, 0)
        return Room(len(entrant.context), 0)

    def _admitted(self) -> list[Entrant]:
        """Take waiting entrants, in order, as far as there is room for them.

        A shared stem waits until there is room for all its rows, or nothing else is in.
        """
        entrants: list[Entrant] = []
        num_tokens = 0
        left = self._free  # once all rows of the stems that are taken have entered too
        while self._waiting:
            entrant = self._waiting[0]
            before = self._room_before(entrant)
            whole, length = self._room(entrant) + before, 1
            if isinstance(entrant, Stem):
                length = len(entrant.prompt) - len(entrant.context)
                if entrant.is_shared:
                    count = len(entrant.rows)
                    whole += Room(count * self._sampling.max_new_tokens, count)
            must_enter = not self._inside and not entrants
            if not must_enter and not left.holds(whole):
                break
            if entrants and num_tokens + length > MAX_PREFILL_TOKENS:
                break
            left -= whole
            num_tokens += length
            self._free -= self._room(entrant) + before
            if isinstance(entrant, Stem) and entrant.context:
                self._lent.setdefault(entrant.context, Lent()).num_stems += 1
            entrants.append(self._waiting.popleft())
        return entrants

    def _enter(self, entrants: Sequence[Entrant]) -> None:
        """Compute prompts, and the first tokens of branches, in one batch; draw what follows."""
        self._lend()
        order = {adapter: number for number, adapter in enumerate(map(_adapter, entrants))}
        entrants = sorted(entrants, key=lambda entrant: order[_adapter(entrant)])
        requests = [self._requested(entrant) for entrant in entrants]
        schedule = self._pools.schedule(requests)
        logits = self._forward(self._pools.forward_batch(schedule)).next_token_logits
        rows: list[Row] = []
        sources: list[int] = []
        for source, entrant in enumerate(entrants):
            members = [entrant] if isinstance(entrant, Row) else entrant.rows
            rows += members
            sources += [source] * len(members)
        self._draw(logits, sources, rows)
        branches: list[Row] = []
        for entrant in entrants:
            if isinstance(entrant, Stem) and entrant.is_shared:
                assert entrant.request is not None
                entrant.entries = self._pools.entries(entrant.request)
                branches += [row for row in entrant.rows if row.ended is None]
        self._waiting.extendleft(reversed(branches))
        carried = [  # per request, the row that goes on in it
            entrant if isinstance(entrant, Row) else None if entrant.is_shared else entrant.rows[0]
            for entrant in entrants
        ]
        kept = [index for index, row in enumerate(carried) if row and row.ended is None]
        schedule.filter_batch(keep_indices=kept)
        self._running += [row for row in carried if row and row.ended is None]
        if self._batch is None:
            self._batch = schedule if kept else None
        elif kept:
            self._batch.merge_batch(schedule)
        for row in rows:
            if row.ended is not None:
                self._leave(row)

    def _lend(self) -> None:
        """Find or compute the contexts that newcomers begin with.

        Those that are found are held before what is missing takes their place.
        """
        new = {tokens: lent for tokens, lent in self._lent.items() if lent.hold is None}
        if not new:
            return
        assert self._contexts is not None
        for tokens, lent in new.items():
            lent.hold = self._contexts.find(tokens, self._base)
        for tokens, lent in new.items():
            if lent.hold is None:
                lent.hold = self._contexts.compute(tokens, self._base)
                lent.is_paid = False

    def _requested(self, entrant: Entrant) -> Req:
        if isinstance(entrant, Stem):
            self._inside.add(entrant)
            if entrant.context:
                return self._begun(entrant)
            last = len(entrant.prompt) - 1
            entrant.request = self._pools.request(
                entrant.prompt, self._namespace, last, entrant.adapter
            )
            entrant.num_reused = self._pools.num_begun(entrant.adapter, entrant.request)
            return entrant.request
        stem = entrant.stem
        assert stem.request is not None and stem.entries is not None
        tokens = [*stem.request.origin_input_ids, entrant.tokens[-1]]
        entrant.request = self._pools.branch(tokens, stem.entries, stem.adapter)
        return entrant.request

    def _begun(self, stem: Stem) -> Req:
        """The request of a stem behind its context; the context counts as computed by one stem."""
        lent = self._lent[stem.context]
        assert lent.hold is not None
        stem.request = self._pools.branch(stem.prompt, lent.hold.entries, stem.adapter)
        stem.num_reused = len(stem.context) if lent.is_paid else 0
        lent.is_paid = True
        return stem.request

    def _step(self) -> None:
        """One more token of every row that runs."""
        batch, rows = self._batch, self._running
        assert batch is not None
        batch.input_ids = torch.tensor([row.tokens[-1] for row in rows], device=batch.device)
        for row in rows:
            _carrier(row).output_ids.append(row.tokens[-1])
        batch.prepare_for_decode()
        logits = self._forward(self._pools.forward_batch(batch)).next_token_logits
        self._draw(logits, range(len(rows)), rows)
        kept = [index for index, row in enumerate(rows) if row.ended is None]
        if len(kept) < len(rows):
            batch.filter_batch(keep_indices=kept)
            self._running = [rows[index] for index in kept]
            self._batch = batch if kept else None
            for row in rows:
                if row.ended is not None:
                    self._leave(row)

    def _draw(self, logits: torch.Tensor, sources: Sequence[int], rows: Sequence[Row]) -> None:
        """Give each row its next token, out of row `sources[i]` of the logits; see which end."""
        uniforms = None
        if self._sampling.temperature > 0:
            uniforms = torch.from_numpy(
                token_uniforms([row.seed for row in rows], [len(row.tokens) for row in rows])
            )
        tokens = choose(logits, sources, self._sampling, uniforms)
        for row, token in zip(rows, tokens, strict=True):
            if token == UNDEFINED:
                row.ended = "undefined"
            elif token in self._sampling.stop_tokens:
                row.ended = "stop"
            else:
                row.tokens.append(token)
                if row.transcript is not None and row.transcript.has_stopped(row.tokens):
                    row.ended = "stop"
                elif len(row.tokens) == self._sampling.max_new_tokens:
                    row.ended = "length"

    def _leave(self, row: Row) -> None:
        """Give back what a row that has ended took, and its stem if it was the last of it."""
        stem = row.stem
        if row.request is not None:
            self._pools.release(row.request, keep=False)
            row.request = None
            self._free += self._room(row)
        if stem in self._inside and all(other.ended is not None for other in stem.rows):
            assert stem.request is not None
            is_own = not stem.context and self._pools.prefix(stem.adapter) is None
            self._pools.release(stem.request, keep=self._namespace is not None and is_own)
            stem.request = stem.entries = None
            self._inside.remove(stem)
            self._free += self._room(stem)
            if stem.context:
                self._take_back(stem.context)

    def _take_back(self, context: tuple[int, ...]) -> None:
        """One stem less that begins with a context; the last of them lets it go."""
        lent = self._lent[context]
        lent.num_stems -= 1
        if not lent.num_stems:
            assert lent.hold is not None
            self._pools.let_go(lent.hold)
            del self._lent[context]
            self._free += Room(len(context), 0)

    def _answer(self, row: Row) -> Continuation:
        assert row.ended is not None
        found = continuation(row.tokens, row.ended, self._decode, self._sampling.stop_strings)
        stem = row.stem
        is_first = row is stem.rows[0]  # what the stem computed counts once
        return replace(found, num_reused=stem.num_reused if is_first else len(stem.prompt))


def _adapter(entrant: Entrant) -> str | None:
    return entrant.adapter if isinstance(entrant, Stem) else entrant.stem.adapter


def _carrier(row: Row) -> Req:
    """The request that a row goes on in."""
    request = row.request or row.stem.request
    assert request is not None
    return request
