"""Held-out accuracy from example scores, and the file that `launch.py eval` writes."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from orchestrator.records import ExampleScore


def accuracy(scores: Sequence[ExampleScore]) -> float:
    """Share (0 to 1) of examples whose best-scored option is a right one."""
    return sum(score.is_right for score in scores) / len(scores)


def interval(share: float, number: int) -> tuple[float, float]:
    """The 95 % interval (Wilson 1927) of a share (0 to 1) that was seen in `number` examples."""
    z = 1.959964  # the normal distribution's quantile at 0.975
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
