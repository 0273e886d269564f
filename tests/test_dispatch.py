"""The fleet's policy, over replicas that are simulated in virtual time, and call by call."""

import itertools
import json
import statistics
from pathlib import Path

import pytest

from benchmarks.fleet import PATIENT, Simulation, cost, main, percentile, step_times
from orchestrator.dispatch import (
    MIN_KNOWN,
    PULSE_S,
    Dispatcher,
    Limits,
    TaskLost,
    pause_before_attempt,
)

STEP_COST_S = 0.025  # what a step at 256 replicas may cost
MANY = 256
SHORT = 0.1  # seconds of a call that is worth having at hand


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def dispatcher(
    clock: Clock,
    num_replicas: int,
    limits: Limits = Limits(),  # noqa: B008
    seconds: float = 1.0,
) -> Dispatcher:
    """With calls of so many seconds each known, and no replica new to them."""
    made = Dispatcher(limits, clock)
    for replica in range(num_replicas):
        made.join(replica)
    for _ in range(1 + MIN_KNOWN):
        made.begin("evaluate", [1] * num_replicas)
        pairs = made.assign()
        clock.now += seconds
        for replica, _ in pairs:
            made.answered(replica)
        assert made.is_done
    return made


def test_a_free_replica_takes_its_own_share_first_and_then_others() -> None:
    """At an even pace always the same replica takes a task; at any pace none is left."""

    def takers(pace: list[int]) -> dict[int, int]:
        made, found = dispatcher(Clock(), 3), {}
        made.begin("score", [1] * 11)
        computing: dict[int, list[int]] = {0: [], 1: [], 2: []}
        for replica in itertools.chain([-1], pace * 11):
            if computing.get(replica):
                found[computing[replica].pop(0)] = replica
                made.answered(replica)
            for taker, task in made.assign():
                computing[taker].append(task)
            if made.is_done:
                return found
        raise AssertionError

    assert takers([0, 1, 2]) == {number: number % 3 for number in range(11)}
    hurried = takers([2, 0, 2, 2, 1])
    assert sorted(hurried) == list(range(11))
    assert all(hurried[number] == 2 for number in (2, 5, 8))


def in_step(made: Dispatcher, homes: list[int]) -> dict[int, int]:
    """Who answers each task of a round where all replicas take as long; none is ever idle."""
    found: dict[int, int] = {}
    computing: dict[int, list[int]] = {replica: [] for replica in made.replicas}
    made.begin("evaluate", [1] * len(homes), homes)
    while not made.is_done:
        for replica, task in made.assign():
            computing[replica].append(task)
        busy = [replica for replica, tasks in computing.items() if tasks]
        assert len(busy) == min(len(computing), len(homes) - len(found))
        for replica in busy:
            found[computing[replica].pop(0)] = replica
            made.answered(replica)
    return found


def homes_of(made: Dispatcher, pieces: int) -> list[int]:
    """Which replica each of so many pieces goes to, where all are free to take it."""
    return [in_step(made, [piece])[0] for piece in range(pieces)]


def test_tasks_go_home_and_only_those_of_a_lost_replica_move_and_come_back() -> None:
    made = dispatcher(Clock(), 4)
    usual = [piece % 4 for piece in range(12)]
    homes = [piece for piece in range(12) for _ in range(3)]
    for _ in range(3):
        found = in_step(made, homes)
        assert [found[task] for task in range(36)] == [usual[piece] for piece in homes]
    made.lost(2)
    without_one = homes_of(made, 12)
    moved = [piece for piece in range(12) if without_one[piece] != usual[piece]]
    assert moved == [2, 6, 10]
    assert len({without_one[piece] for piece in moved}) > 1
    made.lost(0)
    without_two = homes_of(made, 12)
    assert all(
        new == old or (old == 0 and new in (1, 3))
        for new, old in zip(without_two, without_one, strict=True)
    )
    made.join(0)
    assert homes_of(made, 12) == without_one
    made.join(2)
    assert homes_of(made, 12) == usual


def test_a_replica_without_work_of_its_own_takes_what_lies_together() -> None:
    """The last of a queue, but never what another one that is free could take home."""
    clock = Clock()
    made = dispatcher(clock, 3, seconds=SHORT)
    made.begin("evaluate", [1] * 8, [0, 0, 0, 0, 3, 3, 3, 1])
    assert made.assign() == [(0, 0), (1, 7), (2, 6), (0, 1)]  # the first has one more at hand
    made.answered(2)
    assert made.assign() == [(2, 5)]
    made.answered(0)
    made.answered(1)
    made.answered(2)
    assert made.assign() == [(1, 4), (2, 3)]  # while the first is at its second
    made.answered(2)
    made.answered(0)
    assert made.assign() == [(0, 2)]  # its own, though the other came first
    made.lost(0)
    assert made.assign() == [(2, 2)]


def test_a_replica_at_work_has_its_next_task_at_hand_while_there_is_as_much_for_all() -> None:
    clock = Clock()
    made = dispatcher(clock, 2, seconds=SHORT)
    made.begin("evaluate", [1] * 7)
    assert made.assign() == [(0, 0), (1, 1), (0, 2), (1, 3)]
    clock.now += SHORT
    assert made.answered(0) == 0 and made.answered(1) == 1
    assert made.assign() == [(0, 4), (1, 5)]
    clock.now += SHORT
    assert made.answered(1) == 3
    assert made.work["evaluate"].seconds[1] == pytest.approx(SHORT)  # since it could begin
    assert made.assign() == [] and made.lend() is None  # the last waits for whom is free first
    assert made.answered(1) == 5
    assert made.assign() == [(1, 6)]
    assert [made.answered(replica) for replica in (0, 0, 1)] == [2, 4, 6]
    assert made.is_done and made.work["evaluate"].num_copied == 0


@pytest.mark.parametrize(
    ("number", "size", "expected"),
    [
        (8, 0.002, 4),  # all of a replica's share
        (7, 0.002, 4),
        (1, 0.002, 1),
        (8, 0.02, 2),  # two of 20 ms are as long as a task may be
        (10, 0.0166, 1),  # in pairs one replica would have three of them and the other two
        (8, 0.1, 1),
        (0, 0.002, 1),
    ],
)
def test_brief_work_is_given_together_and_evenly(number: int, size: float, expected: int) -> None:
    made = dispatcher(Clock(), 2)  # a unit takes a second
    assert made.together("evaluate", number, size) == expected
    assert made.together("score", number, size) == 1  # nothing is known of it


def test_only_work_that_is_known_to_be_short_is_given_ahead() -> None:
    """A slow machine, which has one more task at hand than it should, costs no more than that."""
    clock = Clock()
    long, new = dispatcher(clock, 1), dispatcher(clock, 1, seconds=SHORT)
    for made, kind in ((long, "evaluate"), (new, "score")):
        made.begin(kind, [1] * 3)
        for task in range(3):
            assert made.assign() == [(0, task)]
            clock.now += SHORT
            made.answered(0)


def test_a_replica_is_not_given_the_task_that_it_is_at() -> None:
    """Which waits anew, since the replica that had the copy is lost."""
    clock = Clock()
    made = dispatcher(clock, 2, seconds=SHORT)
    made.begin("evaluate", [1, 1])
    assert made.assign() == [(0, 0), (1, 1)]
    clock.now += SHORT
    made.answered(1)
    clock.now += 1.5 * SHORT
    assert made.assign() == [(1, 0)]
    made.lost(1)
    assert made.assign() == []
    assert made.answered(0) == 0 and made.is_done
    made.begin("evaluate", [1])
    assert made.assign() == [(0, 0)]


def test_a_fleet_that_is_too_small_waits_without_haste() -> None:
    clock = Clock()
    made = dispatcher(clock, 3, seconds=SHORT)
    made._min_replicas = 3
    made.begin("evaluate", [1] * 2)
    made.assign()
    made.lost(2)
    made.answered(0)
    clock.now += 5 * SHORT
    assert made.assign() == [] and made.pause() == PULSE_S


def test_what_a_lost_or_late_replica_had_at_hand_goes_to_others() -> None:
    clock = Clock()
    made = dispatcher(clock, 2, seconds=SHORT)
    made.begin("evaluate", [1, 2, 4, 8])
    assert made.assign() == [(0, 0), (1, 1), (0, 2), (1, 3)]
    made.lost(1)
    assert made.work["evaluate"].num_requeued == 2 + 8
    made.join(1)
    assert made.assign() == [(1, 1)]  # in their order; it is new to the work
    made.answered(1)
    assert made.assign() == [(1, 3)]
    clock.now += 4 * SHORT
    made.answered(1)
    assert made.assign() == [(1, 0)]  # slow by now
    assert made.answered(1) == 0
    assert made.assign() == [(1, 2)]  # what could not begin
    assert made.answered(1) == 2 and made.is_done
    made.begin("evaluate", [1])  # the late one is still at the round before
    assert made.assign() == [(1, 0)]
    assert made.answered(1) == 0
    assert made.answered(0) is None and made.answered(0) is None
    made.begin("evaluate", [1] * 2)
    assert dict(made.assign()) == {0: 0, 1: 1}


def test_only_the_task_that_a_replica_was_at_is_taken_to_have_ended_it() -> None:
    made = dispatcher(Clock(), 2, seconds=SHORT)
    made.begin("evaluate", [1] * 4)
    assert made.assign() == [(0, 0), (1, 1), (0, 2), (1, 3)]
    for replica in (0, 1):
        made.lost(replica)
        made.join(replica)
    for _ in range(Limits().most_losses - 2):
        assert dict(made.assign()) == {0: 0, 1: 1}
        for replica in (0, 1):
            made.lost(replica)
            made.join(replica)
    assert dict(made.assign()) == {0: 0, 1: 1}
    assert made.answered(0) == 0 and made.answered(1) == 1
    for _ in range(Limits().most_losses - 1):
        assert {task for _, task in made.assign()} == {2, 3}
        for replica in (0, 1):
            made.lost(replica)
            made.join(replica)
    made.assign()
    with pytest.raises(TaskLost):
        made.lost(0)


@pytest.mark.parametrize(
    ("stall", "death"), [(0.0, 0.0), (0.001, 0.0), (0.0, 0.003), (0.002, 0.002)]
)
def test_each_task_is_answered_once_whatever_befalls_the_fleet(stall: float, death: float) -> None:
    simulation = Simulation(MANY, stall=stall, death=death)
    for _ in range(12):
        answers, _ = simulation.step(600)
        assert answers == [1] * 600
    assert (simulation.num_deaths > 0) == (death > 0)
    assert (simulation.num_given_up > 0) == (stall > 0)


def test_long_tails_and_stalls_cost_less_than_without_the_policy() -> None:
    ours, patient = (step_times(MANY, 30, limits) for limits in (Limits(), PATIENT))
    assert statistics.median(ours) < 0.6 * statistics.median(patient)
    assert percentile(ours, 0.95) < 0.6 * percentile(patient, 0.95)


def test_without_a_tail_nothing_is_computed_twice() -> None:
    simulation = Simulation(16, delay=lambda draw: draw.uniform(0.9, 1.1))
    for _ in range(20):
        before = simulation.num_events
        simulation.step(40)
        assert simulation.num_events - before == 40


def test_a_step_of_many_replicas_is_scheduled_in_milliseconds() -> None:
    assert cost(MANY, 10) < STEP_COST_S


def test_the_policy_is_measured_and_drawn(tmp_path: Path) -> None:
    main(["--replicas", "1", "4", "--steps", "3", "--results", str(tmp_path)])
    drawn, kept = sorted(tmp_path.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert [row["replicas"] for row in json.loads(kept.read_text())["rows"]] == [1, 4]
    assert "4 replicas" in drawn.read_text()


def test_a_slow_call_is_given_to_an_idle_replica_and_the_late_answer_is_dropped() -> None:
    clock = Clock()
    fleet = dispatcher(clock, 3)
    fleet.begin("evaluate", [1, 1])
    (first, slow), (second, quick) = fleet.assign()
    clock.now += 1
    assert fleet.answered(second) == quick
    assert fleet.assign() == []
    assert fleet.pause() == pytest.approx(1.0)
    clock.now += 1.1
    ((third, task),) = fleet.assign()
    assert (task, third == first) == (slow, False)
    assert fleet.assign() == []  # the copy is not slow yet
    assert fleet.answered(third) == slow
    assert fleet.is_done
    fleet.begin("evaluate", [1] * 3)  # the first is still busy
    assert sorted(replica for replica, _ in fleet.assign()) == sorted({0, 1, 2} - {first})
    assert fleet.answered(first) is None
    assert [replica for replica, _ in fleet.assign()] == [first]


def test_a_deadline_grows_with_the_fleets_own_times_and_spares_first_calls() -> None:
    clock = Clock()
    limits = Limits(deadline_floor_s=5)
    fresh = Dispatcher(limits, clock)
    fresh.join(0)
    fresh.begin("evaluate", [1])
    fresh.assign()
    clock.now += 10**6
    assert fresh.overdue() == []  # nothing is known yet
    fleet = dispatcher(clock, 2, limits)
    fleet.begin("evaluate", [2, 1])
    fleet.assign()
    clock.now += 10.5
    assert fleet.overdue() == [1]
    clock.now += 10
    assert fleet.overdue() == [0, 1]
    fleet.lost(1)
    fleet.join(1)
    assert fleet.assign() == [(1, 1)]  # at the head of the queue
    clock.now += limits.first_call_s - 1
    assert fleet.overdue() == [0]
    clock.now += 2
    assert fleet.overdue() == [0, 1]


def test_a_call_of_a_kind_that_is_rare_has_a_deadline_too() -> None:
    """Too few to tell a median: none before the first answer, then by the slowest one."""
    clock = Clock()
    for seconds, allowed in ((10.0, 1800.0), (500.0, 5000.0)):
        fleet = dispatcher(clock, 2)
        fleet.begin_each("export")
        fleet.assign()
        clock.now += seconds
        fleet.answered(0)
        clock.now += allowed - seconds - 1
        assert fleet.overdue() == []
        clock.now += 2
        assert fleet.overdue() == [1]
        fleet.answered(1)
        fleet.begin_each("export")
        fleet.assign()
        clock.now += 20
        fleet.answered(0)
        clock.now += 1790
        assert fleet.overdue() == [1]  # first calls' times say nothing of later ones
        fleet.answered(1)


def test_a_replica_that_is_lent_gets_no_work_and_no_deadline_until_it_is_back() -> None:
    clock = Clock()
    fleet = dispatcher(clock, 2)
    lent = fleet.lend()
    assert lent in (0, 1) and not fleet.is_short and fleet.replicas == [0, 1]
    other = 1 - lent
    fleet.begin("evaluate", [1, 1])
    for task in (other, lent):  # its own share's first
        assert fleet.assign() == [(other, task)]
        assert fleet.lend() is None
        assert fleet.answered(other) == task
    assert fleet.is_done
    clock.now += 10**6
    assert fleet.overdue() == []
    fleet.begin_each("digest")
    assert fleet.assign() == [(other, other)]
    fleet.answered(other)
    assert fleet.assign() == []  # the lent one is waited for
    fleet.give_back(lent)
    assert fleet.assign() == [(lent, lent)]
    fleet.answered(lent)
    assert fleet.is_done
    lent = fleet.lend()
    assert lent is not None
    fleet.begin_each("digest")
    ((other, task),) = fleet.assign()
    fleet.answered(other)
    fleet.lost(lent)
    assert fleet.is_done and fleet.replicas == [other]


def test_work_that_ends_replicas_and_fleets_without_any_are_given_up() -> None:
    clock = Clock()
    fleet = dispatcher(clock, 1)
    fleet.begin("evaluate", [1])
    for _ in range(Limits().most_losses - 1):
        assert fleet.assign() == [(0, 0)]
        fleet.lost(0)
        fleet.join(0)
    fleet.assign()
    with pytest.raises(TaskLost):
        fleet.lost(0)
    assert not fleet.is_hopeless(is_loading=False)
    clock.now += Limits().patience_s
    assert fleet.is_hopeless(is_loading=False)
    assert not fleet.is_hopeless(is_loading=True)
    pauses = [pause_before_attempt(failures) for failures in range(20)]
    assert pauses[:2] == [0, 0] and pauses == sorted(pauses) and pauses[-1] == 300


def test_a_round_of_one_task_each_goes_on_without_those_that_die() -> None:
    clock = Clock()
    fleet = dispatcher(clock, 3)
    assert fleet.begin_each("digest") == [0, 1, 2]
    fleet.lost(2)
    assert sorted(fleet.assign()) == [(0, 0), (1, 1)]
    fleet.lost(1)
    assert not fleet.is_done
    fleet.join(1)
    assert fleet.assign() == []  # it is another replica now
    assert fleet.answered(0) == 0
    assert fleet.is_done


def test_nothing_is_handed_out_while_too_few_replicas_are_up() -> None:
    clock = Clock()
    fleet = Dispatcher(Limits(), clock, min_replicas=2)
    fleet.join(0)
    fleet.begin("evaluate", [1, 1, 1])
    assert fleet.is_short and fleet.assign() == []
    fleet.join(1)
    assert len(fleet.assign()) == 2
    clock.now += Limits().patience_s
    fleet.lost(1)
    assert fleet.answered(0) == 0  # what was under way counts
    assert fleet.assign() == []
    assert not fleet.is_hopeless(is_loading=False)
    clock.now += Limits().patience_s
    assert fleet.is_hopeless(is_loading=False)
    fleet.join(1)
    assert not fleet.is_hopeless(is_loading=False)
    assert sorted(task for _, task in fleet.assign()) == [1, 2]


def test_work_that_is_given_out_again_is_counted_in_its_units() -> None:
    """Who was first counts as having done it; a copy, and what a lost replica leaves, as such."""
    clock = Clock()
    made = dispatcher(clock, 3)
    before = made.work["evaluate"].done[0]
    made.begin("evaluate", [2, 4, 8])
    assert dict(made.assign()) == {0: 0, 1: 1, 2: 2}
    clock.now += 2
    made.answered(0)
    assert made.assign() == []  # nothing is slow yet
    made.lost(2)
    assert made.assign() == [(0, 2)]
    clock.now += 7
    made.answered(0)
    assert made.assign() == [(0, 1)]  # slow: a copy
    clock.now += 1
    made.answered(0)
    made.answered(1)  # too late
    work = made.work["evaluate"]
    assert made.is_done
    assert work.done[0] - before == 2 + 8 + 4
    assert (work.num_copied, work.num_requeued) == (4, 8)
    assert work.seconds[0] == 1 / 4 and work.seconds[1] == 10 / 4
    assert not made.work["digest"].done
