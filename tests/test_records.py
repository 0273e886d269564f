"""The fleets' memory of updates: the same ones, in little space; and who takes what is next."""

import random
import sys

import pytest

from orchestrator.records import FleetState, ReplicaState, StepUpdate, UpdateLog


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
    log.append(StepUpdate(0, (1,), (0.5,), 1.0))
    for step in (0, 2):
        with pytest.raises(AssertionError, match=f"{step} after 1 steps"):
            log.append(StepUpdate(step, (1,), (0.5,), 1.0))


def test_a_log_is_small() -> None:
    log = UpdateLog()
    for step in range(2000):
        log.append(StepUpdate(step, tuple(range(16)), (0.5,) * 16, 1.0))
    size = sum(map(sys.getsizeof, (log._seeds, log._coefficients, log._decays, log._ends)))
    assert size < 1.2 * 2000 * (16 * 16 + 24)


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
