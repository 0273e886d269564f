"""Every epoch is a permutation, and a balanced one spreads its labels evenly."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from orchestrator.batches import Batches, spread
from orchestrator.config import Config


def batches(labels: list[int], *, seed: int = 5, size: int = 6, balanced: bool = False) -> Batches:
    task = {"preset": "sst2", "train": {"path": "rows.jsonl"}, "holdout": 5}
    values = {
        "model": {"path": "toy"},
        "estimator": {"batch_size": size, "balanced": balanced},
        "task": task,
        "run": {"steps": 9, "seed": seed},
    }
    return Batches(Config.model_validate(values), labels)


@pytest.mark.parametrize("balanced", [False, True])
def test_every_epoch_shows_every_example_once_in_an_order_of_its_own(balanced: bool) -> None:
    labels = [index % 3 for index in range(40)]
    ids = [id for step in range(20) for id in batches(labels, balanced=balanced).of(step)]
    epochs = [ids[start : start + 40] for start in (0, 40, 80)]
    assert all(Counter(epoch) == Counter(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(40))
    other = batches(labels, seed=6, balanced=balanced)
    assert other.of(0) != batches(labels, balanced=balanced).of(0)


def test_balanced_batches_hold_each_label_in_its_share() -> None:
    labels = [0] * 300 + [1] * 100
    counts = [
        sum(labels[id] for id in batches(labels, size=16, balanced=True).of(step))
        for step in range(25)
    ]
    assert set(counts) <= {3, 4, 5}
    assert sum(counts) == 100
    drawn = [sum(labels[id] for id in batches(labels, size=16).of(step)) for step in range(25)]
    assert not set(drawn) <= {3, 4, 5}


def test_examples_of_a_label_keep_their_order_and_stand_apart() -> None:
    labels = np.array([0] * 10 + [1] * 5)
    order = np.random.default_rng(0).permutation(15)
    changed = spread(order, labels)
    for label in (0, 1):
        of_label = [id for id in order if labels[id] == label]
        assert [id for id in changed if labels[id] == label] == of_label
    places = [place for place, id in enumerate(changed) if labels[id] == 1]
    assert {after - before for before, after in pairwise(places)} == {3}
