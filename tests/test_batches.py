"""Every epoch is a permutation of its own."""

import itertools
import random
from collections import Counter
from collections.abc import Sequence

from orchestrator.batches import Batches
from orchestrator.config import Config


def batches(seed: int, groups: Sequence[str] = ()) -> Batches:
    values = {
        "model": {"path": "toy"},
        "estimator": {"batch_size": 6},
        "task": {"preset": "sst2", "train": {"path": "rows.jsonl"}, "holdout": 5},
        "run": {"steps": 9, "seed": seed},
    }
    return Batches(Config.model_validate(values), 40, groups)


def test_every_epoch_shows_every_example_once_in_an_order_of_its_own() -> None:
    ids = [id for step in range(20) for id in batches(5).of(step)]
    epochs = [ids[start : start + 40] for start in (0, 40, 80)]
    assert all(Counter(epoch) == Counter(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(40))
    assert batches(6).of(0) != batches(5).of(0)


def test_examples_of_a_group_follow_each_other_and_all_are_seen_as_often() -> None:
    draw = random.Random(0)
    names = [f"passage {draw.randrange(9)}" for _ in range(40)]
    made = [batches(5, names), batches(5, names)]
    ids = [id for step in range(20) for id in made[step % 2].of(step)]
    epochs = [ids[start : start + 40] for start in (0, 40, 80)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(range(40))
        followed = [name for name, _ in itertools.groupby(names[id] for id in epoch)]
        assert sorted(followed) == sorted(set(names))
    assert epochs[0] != epochs[1] != epochs[2]
    assert [names[id] for id in epochs[0]] != [names[id] for id in epochs[1]]
    assert batches(6, names).of(0) != made[0].of(0)
