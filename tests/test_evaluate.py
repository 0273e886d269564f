"""Means of example scores, their intervals, and the file that they go to."""

import json
import math
import random
from pathlib import Path

import pytest

from orchestrator.evaluate import interval, mean_interval, measured, write_scores
from orchestrator.records import ExampleScore


def scores(values: list[float]) -> list[ExampleScore]:
    return [ExampleScore(id, value) for id, value in enumerate(values)]


@pytest.mark.parametrize(
    ("right", "number", "low", "high"),
    [  # Newcombe 1998, table I, method 3: the score method without continuity correction
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_shares_have_the_published_intervals(
    right: int, number: int, low: float, high: float
) -> None:
    assert interval(right / number, number) == pytest.approx((low, high), abs=5e-5)
    mirrored = interval((number - right) / number, number)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_a_share_is_within_its_interval_which_narrows() -> None:
    widths = []
    for number in (1, 2, 10, 1000):
        for right in (0, number // 2, number):
            low, high = interval(right / number, number)
            assert 0 <= low <= right / number <= high <= 1
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)


def test_means_intervals_hold_the_mean_nineteen_times_in_twenty() -> None:
    draw = random.Random(0)
    number, held = 2000, 0
    for _ in range(number):
        low, high = mean_interval([draw.betavariate(0.5, 1) for _ in range(100)])
        held += low <= 1 / 3 <= high
    assert held / number == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / number))
    assert mean_interval([0.4]) == (0.0, 1.0)
    assert mean_interval([1.0, 1.0, 0.0]) == pytest.approx((0.0133, 1.0), abs=1e-4)


def test_the_metric_chooses_the_interval() -> None:
    values = [1.0, 0.0, 1.0, 1.0]
    for metric in ("accuracy", "exact_match"):
        found = measured(metric, scores(values))
        assert (found.value, found.num_examples) == (0.75, 4)
        assert (found.low, found.high) == interval(0.75, 4)
    found = measured("f1", scores([*values, 0.5]))
    assert (found.low, found.high) == mean_interval([*values, 0.5])
    assert str(found) == "70.0% (30.8% to 100.0%)"


def test_rewards_have_no_bounds_and_those_that_failed_are_counted() -> None:
    values = [-3.0, 5.0, 4.0, -2.0]
    found = measured("reward", [*scores(values), ExampleScore(4, -2.0, failure="timeout")])
    deviation = math.sqrt(sum((value - 0.4) ** 2 for value in [*values, -2.0]) / 4)
    reach = 1.959964 * deviation / math.sqrt(5)
    assert found.value == pytest.approx(0.4) and found.lost == 1
    assert (found.low, found.high) == pytest.approx((0.4 - reach, 0.4 + reach))
    assert str(found) == f"0.400 ({0.4 - reach:.3f} to {0.4 + reach:.3f})"
    alone = measured("reward", scores([2.0]))
    assert (alone.interval, str(alone)) == (None, "2.000")


def test_the_file_of_scores_has_a_line_an_example(tmp_path: Path) -> None:
    chosen = ExampleScore(0, 1.0, label=1, scores=(-2.0, -1.0), prediction=1)
    undefined = ExampleScore(2, 0.0, label=0, scores=(math.nan, -math.inf), prediction=0)
    found = [chosen, ExampleScore(1, 0.5, answer="a b"), undefined]
    write_scores(tmp_path / "scores.jsonl", found)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.jsonl"]
    first, second, third = map(json.loads, (tmp_path / "scores.jsonl").read_text().splitlines())
    assert third["scores"] == [None, None]  # of which JSON knows nothing
    assert first == {
        "id": 0,
        "value": 1.0,
        "label": 1,
        "also_right": [],
        "scores": [-2.0, -1.0],
        "prediction": 1,
        "answer": None,
        "failure": None,
    }
    assert (second["value"], second["answer"], second["prediction"]) == (0.5, "a b", None)
