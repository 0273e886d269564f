"""Held-out accuracy from example scores, and the file that `launch.py eval` writes."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from orchestrator.records import ExampleScore


def accuracy(scores: Sequence[ExampleScore]) -> float:
    """Share (0 to 1) of examples whose best-scored option is the right one."""
    return sum(score.prediction == score.label for score in scores) / len(scores)


def write_scores(path: Path, scores: Sequence[ExampleScore]) -> None:
    """One JSON object a line: id, label, scores (mean log-probability per option), prediction."""
    with path.open("w", encoding="utf-8") as file:
        for score in scores:
            file.write(json.dumps(asdict(score)) + "\n")
