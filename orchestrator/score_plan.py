"""What a call for scores comes down to: distinct prompts, what to score on them, and in which rows.

Owns how sequences share the work, and how a flat list of log-probabilities becomes the answer.
Knows neither models nor batches' memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


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
    """Tokens whose KV entries were found in the cache."""


@dataclass(slots=True, eq=False)
class Prompt:
    """Distinct input tokens, and the (position, token) pairs to score on them, in order."""

    tokens: tuple[int, ...]
    targets: dict[tuple[int, int], None] = field(default_factory=dict)

    @property
    def first_scored(self) -> int:
        """The first position whose logits are needed."""
        return min(position for position, _ in self.targets)


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt, and the adapter to compute it under."""

    adapter: str | None
    prompt: Prompt


@dataclass(frozen=True, slots=True, eq=False)
class PlanBatch:
    """Rows that go through the model together."""

    rows: list[Row]
    positions: list[int]
    """What is scored, as positions of the rows' tokens laid end to end."""
    tokens: list[int]
    """The token to score at each."""

    @property
    def lengths(self) -> list[int]:
        return [len(row.prompt.tokens) for row in self.rows]


def laid_out(rows: list[Row]) -> PlanBatch:
    positions, tokens = [], []
    start = 0
    for row in rows:
        for position, token in row.prompt.targets:
            positions.append(start + position)
            tokens.append(token)
        start += len(row.prompt.tokens)
    return PlanBatch(rows, positions, tokens)


class ScorePlan:
    """Sequences to be scored under adapters, once or again after weights have changed.

    The last token of a span is only a target, never an input: sequences that differ in no other
    token share a prompt.
    """

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        spans: Sequence[tuple[int, int]],
        adapters: Sequence[str | None],
    ) -> None:
        """Raises ValueError for a span that does not fit its sequence."""
        self.adapters = tuple(adapters)
        self._wanted = []  # per sequence: its prompt, and what of it makes up the span
        prompts: dict[tuple[int, ...], Prompt] = {}
        for tokens, (start, end) in zip(sequences, spans, strict=True):
            if not 1 <= start < end <= len(tokens):
                raise ValueError(f"span {start}..{end} in a sequence of {len(tokens)} tokens")
            inputs = tuple(tokens[: end - 1])
            prompt = prompts.setdefault(inputs, Prompt(inputs))
            wanted = [(position, tokens[position + 1]) for position in range(start - 1, end - 1)]
            prompt.targets.update(dict.fromkeys(wanted))
            self._wanted.append((prompt, wanted))
        self.prompts = list(prompts.values())
        self.batches: list[PlanBatch] = []

    def split(self, batches: Iterator[range]) -> None:
        """Decide which prompts go through the model together, under all adapters.

        So none is computed in other shapes than another. The rows of an adapter stand together:
        kernels then work on few, long segments.
        """
        self.batches = [
            laid_out(
                [Row(adapter, self.prompts[index]) for adapter in self.adapters for index in batch]
            )
            for batch in batches
        ]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return len(self.adapters) * sum(len(prompt.tokens) for prompt in self.prompts)

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
            for prompt, wanted in self._wanted:
                of_prompt = found[adapter, prompt]
                total = sum(of_prompt[pair] for pair in wanted)
                spans.append(SpanScore(mean=total / len(wanted), sum=total))
        return Scores(spans, self.num_tokens - num_reused, num_reused)
