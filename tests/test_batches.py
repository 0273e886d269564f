"""Every epoch is a permutation of its own."""

from collections import Counter

from orchestrator.batches import Batches
from orchestrator.config import Config


def batches(seed: int) -> Batches:
    values = {
        "model": {"path": "toy"},
        "estimator": {"batch_size": 6},
        "task": {"preset": "sst2", "train": {"path": "rows.jsonl"}, "holdout": 5},
        "run": {"steps": 9, "seed": seed},
    }
    return Batches(Config.model_validate(values), 40)


def test_every_epoch_shows_every_example_once_in_an_order_of_its_own() -> None:
    ids = [id for step in range(20) for id in batches(5).of(step)]
    epochs = [ids[start : start + 40] for start in (0, 40, 80)]
    assert all(Counter(epoch) == Counter(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(40))
    assert batches(6).of(0) != batches(5).of(0)
