"""Held-out examples' values to their mean and its interval, and the file that `launch.py eval`
writes. Pure functions, but for the file."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.records import ChunkScores, ExampleScore

NORMAL_QUANTILE = 1.959964  # at 0.975: 95 % lie between it and its negative
SHARES = ("accuracy", "exact_match")  # metrics whose values are 0 or 1


@dataclass(frozen=True, slots=True)
class Measured:
    """A metric's mean over examples, and the ends of its 95 % interval, all from 0 to 1."""

    metric: str
    value: float
    low: float
    high: float
    num_examples: int

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"


def share_computed(chunks: Sequence[ChunkScores]) -> tuple[int, int]:
    """Tokens that went through the model, and all that were asked for."""
    num_tokens = sum(chunk.num_tokens for chunk in chunks)
    return num_tokens, num_tokens + sum(chunk.num_reused for chunk in chunks)


def scores_of(chunks: Sequence[ChunkScores]) -> list[ExampleScore]:
    return [score for chunk in chunks for score in chunk.examples]


def measured(metric: str, scores: Sequence[ExampleScore]) -> Measured:
    """The mean of the examples' values; there is at least one."""
    values = [score.value for score in scores]
    mean = math.fsum(values) / len(values)
    if metric in SHARES:
        low, high = interval(mean, len(values))
    else:
        low, high = mean_interval(values)
    return Measured(metric, mean, low, high, len(values))


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of values from 0 to 1, by the normal distribution.

    One value says nothing of its spread: the interval is then all that is possible.
    """
    number = len(values)
    if number == 1:
        return 0.0, 1.0
    mean = math.fsum(values) / number
    variance = math.fsum((value - mean) ** 2 for value in values) / (number - 1)
    reach = NORMAL_QUANTILE * math.sqrt(variance / number)
    return max(0.0, mean - reach), min(1.0, mean + reach)


def interval(share: float, number: int) -> tuple[float, float]:
    """The 95 % interval (Wilson 1927) of a share (0 to 1) that was seen in `number` examples."""
    z = NORMAL_QUANTILE
    spread = 1 + z**2 / number
    middle = (share + z**2 / (2 * number)) / spread
    reach = z / spread * math.sqrt(share * (1 - share) / number + z**2 / (4 * number**2))
    # With none or all right an end is 0 or 1, but for rounding.
    return max(0.0, min(share, middle - reach)), min(1.0, max(share, middle + reach))


def write_scores(path: Path, scores: Sequence[ExampleScore]) -> None:
    """One JSON object a line: the fields of ExampleScore."""
    with path.open("w", encoding="utf-8") as file:
        for score in scores:
            file.write(json.dumps(asdict(score)) + "\n")
