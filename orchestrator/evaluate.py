"""Held-out examples' values to their mean and its interval, and the file that `launch.py eval`
writes. Pure functions, but for the file."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator import strict_json, whole_file
from orchestrator.records import ChunkScores, ExampleScore

NORMAL_QUANTILE = 1.959964  # at 0.975: 95 % lie between it and its negative
SHARES = ("accuracy", "exact_match")  # metrics whose values are 0 or 1
PLAIN = ("reward",)  # metrics of any numbers, which are not told as per cent


@dataclass(frozen=True, slots=True)
class Measured:
    """A metric's mean over examples, and the ends of its 95 % interval: from 0 to 1, but rewards,
    which may be any numbers."""

    metric: str
    value: float
    low: float
    high: float
    num_examples: int
    lost: int = 0
    """Examples at which the reward failed."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """None where it has no ends."""
        ends = self.low, self.high
        return ends if all(map(math.isfinite, ends)) else None

    def __str__(self) -> str:
        return told(self.metric, self.value, self.interval)


def told(metric: str, value: float, ends: tuple[float, float] | None = None) -> str:
    """A mean as a user reads it, with the ends of its interval: per cent, but rewards as such."""
    form = ".3f" if metric in PLAIN else ".1%"
    return f"{value:{form}}" + (f" ({ends[0]:{form}} to {ends[1]:{form}})" if ends else "")


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
        bounds = (-math.inf, math.inf) if metric in PLAIN else (0.0, 1.0)
        low, high = mean_interval(values, bounds)
    lost = sum(score.failure is not None for score in scores)
    return Measured(metric, mean, low, high, len(values), lost)


def mean_interval(
    values: Sequence[float], bounds: tuple[float, float] = (0.0, 1.0)
) -> tuple[float, float]:
    """The 95 % interval of the mean of values within bounds, by the normal distribution.

    One value says nothing of its spread: the interval is then all that is possible.
    """
    number = len(values)
    if number == 1:
        return bounds
    mean = math.fsum(values) / number
    variance = math.fsum((value - mean) ** 2 for value in values) / (number - 1)
    reach = NORMAL_QUANTILE * math.sqrt(variance / number)
    return max(bounds[0], mean - reach), min(bounds[1], mean + reach)


def interval(share: float, number: int) -> tuple[float, float]:
    """The 95 % interval (Wilson 1927) of a share (0 to 1) that was seen in `number` examples."""
    z = NORMAL_QUANTILE
    spread = 1 + z**2 / number
    middle = (share + z**2 / (2 * number)) / spread
    reach = z / spread * math.sqrt(share * (1 - share) / number + z**2 / (4 * number**2))
    # With none or all right an end is 0 or 1, but for rounding.
    return max(0.0, min(share, middle - reach)), min(1.0, max(share, middle + reach))


def write_scores(path: Path, scores: Sequence[ExampleScore]) -> None:
    """One JSON object a line: the fields of ExampleScore. All, or the file stays as it was."""
    lines = [strict_json.text(asdict(score)) + "\n" for score in scores]
    whole_file.write(path, "".join(lines))
