"""What a call for scores comes down to: a tree of prompts, what to score on them, in which rows.

Owns how sequences share the work, and how a flat list of log-probabilities becomes the answer.
Knows neither models nor batches' memory.

The rows of a batch are the leaves of the tree, in its order. So what a row shares with any row
before it, it shares with the one right before it: a number of tokens a row tells the whole tree,
of any depth. A row computes what lies behind that, and attends to keys and values that other rows
of the same forward compute; each layer writes those of all rows before it reads any. Thus every
distinct beginning is computed once, in one forward, and there is nothing that a later forward
could find.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

# Of a plan's tokens: where sharing spares fewer, such as the one that all texts begin with, rows
# are computed as they are. They then read their keys where they lie, and not by way of an index.
LEAST_SHARE = 1 / 16
Pair = tuple[int, int]
"""Something to score: the position whose logits are needed, and the token that follows it."""


@dataclass(frozen=True, slots=True)
class SpanScore:
    """Log-probability (natural logarithm) of a span's tokens, given all tokens before each."""

    mean: float
    sum: float


@dataclass(frozen=True, slots=True)
class Scores:
    """Answer of `Engine.score`: one entry a sequence, and the work it took."""

    spans: list[SpanScore]
    num_tokens: int
    """Tokens that went through the model."""
    num_reused: int
    """Tokens that would have, had an earlier forward not left their KV entries in the cache."""
    num_asked: int
    """Tokens that whole sequences would have put through the model. What is neither computed nor
    found in the cache was shared inside a forward."""


@dataclass(slots=True, eq=False)
class Prompt:
    """Distinct input tokens."""

    tokens: tuple[int, ...]
    context: int = 0
    """So many first tokens the model computes without any adapter."""
    shared: int = 0
    """So many first tokens are those of the prompt before it in its batch, which, or one before,
    computes them. If any, they are more than the context."""
    targets: dict[Pair, None] = field(default_factory=dict)
    """What is scored on tokens behind those, in order."""

    @property
    def begun(self) -> int:
        """How many first tokens are computed elsewhere."""
        return max(self.context, self.shared)

    @property
    def own(self) -> tuple[int, ...]:
        """The tokens that no prompt before it has, and that are no context."""
        return self.tokens[self.begun :]

    @property
    def before(self) -> tuple[int, ...]:
        """The context's tokens."""
        return self.tokens[: self.context]

    @property
    def first_scored(self) -> int:
        """The first position whose logits are needed here."""
        return min(position for position, _ in self.targets)


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt, and the adapter to compute it under."""

    adapter: str | None
    prompt: Prompt


@dataclass(frozen=True, slots=True, eq=False)
class PlanBatch:
    """Rows that go through the model together. The first row of an adapter shares nothing."""

    rows: list[Row]
    positions: list[int]
    """What is scored, as positions of the rows' own tokens laid end to end."""
    tokens: list[int]
    """The token to score at each."""

    @property
    def lengths(self) -> list[int]:
        """Of the rows' own tokens."""
        return [len(row.prompt.own) for row in self.rows]

    @property
    def shared(self) -> list[int]:
        """How many tokens each row takes from the row before it."""
        return [row.prompt.shared for row in self.rows]

    @property
    def is_shared(self) -> bool:
        """Whether any row needs what another computes."""
        return any(self.shared)

    def places(self) -> list[NDArray[np.int64]]:
        """Per row, where the tokens that it takes lie among the rows' own tokens, end to end."""
        lengths, shared = np.array(self.lengths), np.array(self.shared)
        first_places = np.cumsum(lengths) - lengths - shared  # of a row's position 0, if it had it
        return [
            first_places[of_row[:size]] + np.arange(size)
            for of_row, size in zip(owners(lengths + shared, shared), shared, strict=True)
        ]


def laid_out(rows: list[Row]) -> PlanBatch:
    positions, tokens = [], []
    start = 0
    for row in rows:
        prompt = row.prompt
        for position, token in prompt.targets:
            positions.append(start + position - prompt.begun)
            tokens.append(token)
        start += len(prompt.own)
    return PlanBatch(rows, positions, tokens)


def owners(
    lengths: Sequence[int] | NDArray[np.int64], taken: Sequence[int] | NDArray[np.int64]
) -> list[NDArray[np.int64]]:
    """Which row has the entry of each position of each row: [lengths[i]] numbers of rows.

    Row i has `lengths[i]` tokens, and takes the first `taken[i]` from the row before it, which may
    itself have taken them.
    """
    found: list[NDArray[np.int64]] = []
    for number, (length, size) in enumerate(zip(lengths, taken, strict=True)):
        row = np.full(length, number, np.int64)
        if size:
            row[:size] = found[-1][:size]
        found.append(row)
    return found


@dataclass(slots=True, eq=False)
class Branch:
    """A node of the tree: the tokens that lead to it from the node above."""

    tokens: tuple[int, ...]
    below: dict[int, "Branch"] = field(default_factory=dict)
    """By the first token of each, in the order in which they came."""
    first_leaf: int = 0


class PrefixTree:
    """Token sequences by their beginnings. Leaves stand in the order in which they first came."""

    def __init__(self, sequences: Sequence[tuple[int, ...]]) -> None:
        self._root = Branch(())
        for tokens in sequences:
            self._insert(tokens)
        self.leaves = self._numbered() if sequences else []
        """Each leaf's tokens, and how many of them are the leaf's before it, too."""

    def _insert(self, tokens: tuple[int, ...]) -> None:
        node, start = self._root, 0
        while start < len(tokens):
            child = node.below.get(tokens[start])
            if child is None:
                child = node.below[tokens[start]] = Branch(tokens[start:])
            size = _num_common(child.tokens, tokens[start : start + len(child.tokens)])
            if size < len(child.tokens):
                lower = Branch(child.tokens[size:], child.below)
                child.tokens, child.below = child.tokens[:size], {lower.tokens[0]: lower}
            node, start = child, start + size

    def _numbered(self) -> list[tuple[tuple[int, ...], int]]:
        leaves: list[tuple[tuple[int, ...], int]] = []
        waiting: list[tuple[Branch, tuple[int, ...], int]] = [(self._root, (), 0)]
        while waiting:
            node, before, shared = waiting.pop()
            node.first_leaf = len(leaves)
            tokens = before + node.tokens
            if not node.below:
                leaves.append((tokens, shared))
            # The first leaf below follows what came before this node, the others this node's own.
            order = list(node.below.values())
            depths = [shared, *[len(tokens)] * (len(order) - 1)]
            waiting += reversed([(b, tokens, d) for b, d in zip(order, depths, strict=False)])
        return leaves

    def leaf(self, tokens: tuple[int, ...]) -> int:
        """The number of the first leaf that begins with a sequence of the tree."""
        node, start = self._root, 0
        while start < len(tokens):
            node = node.below[tokens[start]]
            start += len(node.tokens)
        return node.first_leaf


def _num_common(some: tuple[int, ...], others: tuple[int, ...]) -> int:
    """How many tokens two sequences begin with alike."""
    if some == others:
        return len(some)
    pairs = zip(some, others, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(some), len(others)))


def _num_own(prompts: Sequence[Prompt]) -> int:
    return sum(len(prompt.own) for prompt in prompts)


class Behind:
    """Sequences as what stands behind their contexts, with one token for the whole context.

    So a tree has them share no token that one computes under an adapter and another without.
    """

    def __init__(self, inputs: Sequence[tuple[int, ...]], contexts: Sequence[int]) -> None:
        numbers: dict[tuple[int, ...], int] = {}
        self.sequences = []
        for tokens, context in zip(inputs, contexts, strict=True):
            number = numbers.setdefault(tokens[:context], len(numbers))
            self.sequences.append((-1 - number, *tokens[context:]) if context else tokens)
        self._contexts = list(numbers)

    def prompt(self, tokens: tuple[int, ...], shared: int) -> Prompt:
        """The whole prompt of one of the sequences."""
        if tokens[0] >= 0:
            return Prompt(tokens, shared=shared)
        context = self._contexts[-1 - tokens[0]]
        num_shared = len(context) + shared - 1 if shared > 1 else 0
        return Prompt((*context, *tokens[1:]), len(context), num_shared)


class ScorePlan:
    """Sequences to be scored under adapters, once or again after weights have changed.

    The last token of a span is only a target, never an input: sequences that differ in no other
    token are one prompt. Where prompts share, one that begins another is part of it.
    """

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        spans: Sequence[tuple[int, int]],
        adapters: Sequence[str | None],
        contexts: Sequence[int] | None = None,
        *,
        sharing: bool = True,
    ) -> None:
        """`contexts` are how many tokens of each sequence are computed without any adapter.
        Without `sharing` every distinct input is computed from its context on, in the order given;
        so it is where sharing would spare few tokens.

        Raises ValueError for a span that does not fit its sequence, or begins right behind its
        context.
        """
        self.adapters = tuple(adapters)
        inputs, wanted = [], []
        contexts = contexts or [0] * len(sequences)
        for tokens, (start, end), context in zip(sequences, spans, contexts, strict=True):
            if not 1 <= start < end <= len(tokens):
                raise ValueError(f"span {start}..{end} in a sequence of {len(tokens)} tokens")
            if not 0 <= context < start:
                raise ValueError(f"span {start}..{end} behind a context of {context} tokens")
            inputs.append(tuple(tokens[: end - 1]))
            wanted.append(
                [(position, tokens[position + 1]) for position in range(start - 1, end - 1)]
            )
        behind = Behind(inputs, contexts)
        numbers = {tokens: number for number, tokens in enumerate(dict.fromkeys(behind.sequences))}
        self.prompts = [behind.prompt(tokens, 0) for tokens in numbers]
        if sharing:
            tree = PrefixTree(behind.sequences)
            prompts = [behind.prompt(tokens, shared) for tokens, shared in tree.leaves]
            if _num_own(prompts) <= (1 - LEAST_SHARE) * _num_own(self.prompts):
                numbers = {tokens: tree.leaf(tokens) for tokens in behind.sequences}
                self.prompts = prompts
        self._wanted = [
            (numbers[tokens], pairs) for tokens, pairs in zip(behind.sequences, wanted, strict=True)
        ]
        self._owned: list[list[tuple[Prompt, Pair]]] = []  # per sequence: what makes up its span
        self._num_asked = sum(map(len, inputs))
        self._num_before = 0
        self.has_contexts = any(contexts)
        self.batches: list[PlanBatch] = []

    def split(self, batches: Sequence[range]) -> None:
        """Decide which prompts go through the model together, under all adapters.

        So none is computed in other shapes than another. The rows of an adapter stand together:
        kernels then work on few, long segments. The first prompt of a batch shares nothing.
        """
        for batch in batches:
            self.prompts[batch.start].shared = 0
            contexts = {self.prompts[index].before for index in batch}
            self._num_before += sum(map(len, contexts))
        for number, pairs in self._wanted:
            self._owned.append(
                [(self._owner(number, position), (position, token)) for position, token in pairs]
            )
        for of_sequence in self._owned:
            for prompt, pair in of_sequence:
                prompt.targets[pair] = None
        self.batches = [
            laid_out(
                [Row(adapter, self.prompts[index]) for adapter in self.adapters for index in batch]
            )
            for batch in batches
        ]

    def _owner(self, number: int, position: int) -> Prompt:
        """The prompt that computes a position of prompt `number`."""
        while position < self.prompts[number].shared:
            number -= 1
        return self.prompts[number]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, without those that another row computes, and of each batch's
        contexts."""
        return self._num_before + len(self.adapters) * _num_own(self.prompts)

    @property
    def num_targets(self) -> int:
        """Log-probabilities that a forward of all batches gives."""
        return len(self.adapters) * sum(len(prompt.targets) for prompt in self.prompts)

    def scores(self, logprobs: Sequence[float], num_reused: int) -> Scores:
        """The answer, out of all rows' targets' log-probabilities, in the order of the batches."""
        values = iter(logprobs)
        found = {
            (row.adapter, row.prompt): {pair: next(values) for pair in row.prompt.targets}
            for batch in self.batches
            for row in batch.rows
        }
        spans = []
        for adapter in self.adapters:
            for owned in self._owned:
                total = sum(found[adapter, prompt][pair] for prompt, pair in owned)
                spans.append(SpanScore(mean=total / len(owned), sum=total))
        num_asked = len(self.adapters) * self._num_asked
        return Scores(spans, self.num_tokens - num_reused, num_reused, num_asked)
