"""How many replicas there are to be, by what the nodes of a cluster have."""

from typing import Any

import pytest

from orchestrator.config import ConfigError, FleetSection
from orchestrator.placement import Needs, check, wanted
from orchestrator.seats import Seats


@pytest.mark.parametrize(("share", "room"), [(1, 2), (0.5, 4), (0.3, 6), (0.1, 20)])
def test_a_replica_lies_on_one_gpu(share: float, room: int) -> None:
    assert Needs(1, share).room([{"CPU": 64.0, "GPU": 2.0}]) == room
    assert Needs(1, share).room([{"CPU": 64.0}]) == 0


def test_a_replica_lies_on_one_node() -> None:
    nodes = [{"CPU": 3.0}, {"CPU": 4.0, "GPU": 1.0}, {"memory": 1e9}]
    assert [Needs(cpus, 0).room(nodes) for cpus in (1, 2, 3, 4, 5)] == [7, 3, 2, 1, 0]
    assert Needs(1, 1).room(nodes) == 1


def test_ranks_of_a_replica_lie_on_one_node_with_a_gpu_each() -> None:
    nodes = [{"CPU": 16.0, "GPU": 3.0}, {"CPU": 5.0, "GPU": 8.0}, {"CPU": 16.0, "GPU": 1.0}]
    assert Needs(1, 1, ranks=2).room(nodes) == 1 + 2
    assert Needs(3, 1, ranks=2).room(nodes) == 1
    assert Needs(2, 0, ranks=4).room(nodes) == 2 + 0 + 2


def test_what_is_wanted_follows_the_room_where_the_fleet_is_elastic() -> None:
    def numbers(room: int, **section: Any) -> tuple[int, int]:
        fleet = FleetSection(**section)
        return tuple(wanted(fleet, room, has_started=has) for has in (False, True))  # type: ignore[return-value]

    assert numbers(1, num_replicas=3) == (3, 3)
    assert numbers(9, num_replicas=3) == (3, 3)
    assert numbers(9, num_replicas="auto") == (9, 9)
    assert numbers(9, num_replicas="auto", max_replicas=4) == (4, 4)
    assert numbers(9, num_replicas=3, max_replicas=4) == (3, 4)
    assert numbers(2, num_replicas=3, max_replicas=4) == (2, 2)


def test_what_could_never_be_placed_is_refused() -> None:
    def refused(nodes: list[dict[str, float]], **section: Any) -> None:
        fleet = FleetSection(**section)
        check(fleet, Needs.of(fleet, "cuda" if "GPU" in nodes[0] else "cpu"), nodes)

    refused([{"CPU": 4.0}], num_replicas=9)
    refused([{"CPU": 8.0, "GPU": 2.0}], num_replicas=4, gpus_per_replica=0.5)
    refused([{"CPU": 8.0, "GPU": 2.0}], num_replicas=4, max_replicas=4)  # others may come
    with pytest.raises(ConfigError, match="2 replicas want 2 GPUs of one node each, and"):
        refused([{"CPU": 8.0, "GPU": 3.0}, {"CPU": 8.0, "GPU": 1.0}], num_replicas=2, tp_size=2)
    with pytest.raises(ConfigError, match="3 replicas want a GPU each, and the cluster has 2;"):
        refused([{"CPU": 8.0, "GPU": 2.0}], num_replicas=3)
    with pytest.raises(ConfigError, match=r"num_replicas: auto: no node .* with 5 CPUs;"):
        refused([{"CPU": 4.0}, {"CPU": 4.0}], num_replicas="auto", threads_per_replica=5)
    few = [{"CPU": 8.0, "GPU": 1.0}]
    with pytest.raises(ConfigError, match=r"no node .* with 2 CPUs and 2 GPUs of one .*cpu$"):
        refused(few, num_replicas="auto", tp_size=2)
    with pytest.raises(ConfigError, match=r"; lower fleet.threads_per_replica$"):
        refused(few, num_replicas="auto", threads_per_replica=9)


def test_seats_without_a_placed_actor_are_let_go_and_come_back_first() -> None:
    seats = Seats()
    opened, gone = seats.resize(4)
    assert ([seat.number for seat in opened], gone) == ([0, 1, 2, 3], [])
    for number, state in enumerate(("placing", "ready", "empty", "loading")):
        seats[number].enter(state, 0.0)  # type: ignore[arg-type]
    assert [seat.number for seat in seats.resize(3)[1]] == [2]
    assert [seat.number for seat in seats.resize(1)[1]] == [0]  # the others are at work
    assert [seat.number for seat in seats] == [1, 3]
    assert [seat.number for seat in seats.resize(4)[0]] == [0, 2]
    assert opened[0] not in seats and opened[1] in seats
