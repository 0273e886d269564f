"""Held-out accuracy from example scores, and the file that `launch.py eval` writes."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from orchestrator.records import ExampleScore


def accuracy(scores: Sequence[ExampleScore]) -> float:
    """Share (0 to 1) of examples whose best-scored option is a right one."""
    return sum(score.is_right for score in scores) / len(scores)


def write_scores(path: Path, scores: Sequence[ExampleScore]) -> None:
    """One JSON object a line: the fields of ExampleScore."""
    with path.open("w", encoding="utf-8") as file:
        for score in scores:
            file.write(json.dumps(asdict(score)) + "\n")
