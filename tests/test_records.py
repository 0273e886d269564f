"""The fleets' memory of updates: the same ones, in little space; and who takes what is next."""

import random
import sys
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.records import MARK_SIZE, FleetState, ReplicaState, StepUpdate, UpdateLog


def test_a_log_gives_the_updates_that_were_appended() -> None:
    draw = random.Random(0)
    updates = []
    log = UpdateLog()
    for step in range(50):
        number = draw.randrange(4)  # none, where all of a step's seeds were dropped
        seeds = tuple(draw.getrandbits(64) for _ in range(number))
        coefficients = tuple(draw.gauss(0, 1) for _ in range(number))
        updates.append(StepUpdate(step, seeds, coefficients, 1 - draw.random()))
        log.append(updates[-1])
    assert len(log) == 50
    for part in (slice(None), slice(49, None), slice(50, None), slice(3, 9), slice(-2, None)):
        assert log[part] == updates[part]


def test_a_log_takes_only_the_next_step() -> None:
    log = UpdateLog()
    first = StepUpdate(0, (1,), (0.5,), 1.0)
    for _ in range(2):
        log.append(first)
    for update in (replace(first, seeds=(2,)), replace(first, decay=0.5), replace(first, step=2)):
        with pytest.raises(AssertionError, match=f"{update.step} after 1 steps"):
            log.append(update)
    assert log[:] == [first]


def test_marks_are_of_all_updates_up_to_a_step() -> None:
    """A change of any value of any step changes its mark and those of all later ones."""

    def marks(updates: list[StepUpdate]) -> list[bytes]:
        log = UpdateLog()
        for update in updates:
            log.append(update)
        whole = log.marks
        return [whole[start : start + MARK_SIZE] for start in range(0, len(whole), MARK_SIZE)]

    updates = [StepUpdate(step, (step, 7), (0.5, -0.25), 0.9) for step in range(6)]
    expected = marks(updates)
    assert len(set(expected)) == 6
    assert marks(updates[:4]) == expected[:4]
    changed: list[dict[str, Any]] = [
        {"seeds": (3, 8)},
        {"seeds": (7, 3)},
        {"coefficients": (0.5, 0.25)},
        {"decay": 1.0},
        {"seeds": (3,), "coefficients": (0.5,)},
        {"seeds": (), "coefficients": ()},
    ]
    for values in changed:
        found = marks([*updates[:3], replace(updates[3], **values), *updates[4:]])
        assert found[:3] == expected[:3]
        assert not set(found[3:]) & set(expected)


def test_a_log_is_small() -> None:
    log = UpdateLog()
    for step in range(2000):
        log.append(StepUpdate(step, tuple(range(16)), (0.5,) * 16, 1.0))
    held = log._seeds, log._coefficients, log._decays, log._ends, log._marks
    assert sum(map(sys.getsizeof, held)) < 1.2 * 2000 * (16 * 16 + 40)


def test_the_slowest_replica_that_is_up_tells_how_far_the_fleet_lags() -> None:
    replicas = (
        ReplicaState("replica 0", "computing", 30, 9),
        ReplicaState("replica 1", "ready", 10, 7),
        ReplicaState("replica 2", "catching up", 0, 0),
        ReplicaState("replica 3", "empty", 0, 2),
    )
    fleet = FleetState(replicas, num_steps=10)
    assert (fleet.num_up, fleet.lag, fleet.shares()) == (2, 3, [0.75, 0.25, 0, 0])
    down = FleetState(replicas[2:], num_steps=10)
    assert (down.num_up, down.lag, down.shares()) == (0, 0, [0, 0])
