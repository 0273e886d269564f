"""What a seat makes of the answers to its calls; references are any values that differ."""

from orchestrator.seats import Seat


def test_calls_are_answered_in_their_order_each_when_all_ranks_have() -> None:
    seat = Seat(0)
    seat.num_applied = 3
    seat.ask(["a0", "a1"])
    seat.num_applied = 5
    seat.ask(["b0", "b1"])
    assert list(seat.hear("b0", "second")) == []
    assert list(seat.hear("b1", "not rank 0's")) == []  # whole, but not next
    assert list(seat.hear("a1", "not rank 0's")) == []
    assert seat.num_confirmed == 0
    assert seat.call_of("a0").references == ["a0", "a1"]
    assert list(seat.hear("a0", "first")) == ["first", "second"]
    assert seat.num_confirmed == 5 and not seat.calls


def test_a_call_may_be_asked_while_an_answer_is_taken() -> None:
    seat = Seat(0)
    seat.ask(["a"])
    for answer in seat.hear("a", 1):
        assert answer == 1
        seat.ask(["b"])
    assert list(seat.hear("b", 2)) == [2]
