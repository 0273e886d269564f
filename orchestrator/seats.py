"""Seats: the replicas of a fleet as it sees them, places that one actor after another may hold.

Owns what is known of each, and which are opened and let go as the cluster grows and shrinks. Knows
nothing of Ray: actors and calls are handed in.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["placing", "loading", "replaying", "catching up", "ready", "writing", "empty"]
"""replaying: updates of the past, as many as a call takes; catching up: the last of them, and the
task that the others are at; writing: lent by the dispatcher, while it writes a snapshot."""


@dataclass(slots=True, eq=False)
class Call:
    """What all ranks of a replica were asked at once."""

    references: list[Any]
    """By rank."""
    num_sent: int
    """Updates that the replica has with it."""
    num_awaited: int
    """Ranks that have not answered yet."""
    answer: Any = None
    """Rank 0's, which counts."""


@dataclass(slots=True, eq=False)
class Seat:
    """A place that one actor after another may hold, or one group of actors, one a rank."""

    number: int
    actors: list[Any] = field(default_factory=list)
    """By rank; none while the seat is empty."""
    group: Any = None
    """Holds the actors together, if they are several."""
    state: State = "empty"
    kind: str = ""
    """Of the task that the actor computes, or computed last."""
    since: float = 0.0
    """When the state began."""
    failures: int = 0
    """Actors that were lost since one last answered a task."""
    was_placed: bool = False
    """Whether the actor that was lost last had begun to load."""
    num_applied: int = 0
    """Updates that the actor was sent, or found in a snapshot."""
    num_confirmed: int = 0
    """Those of them that it is known to have taken."""
    calls: deque[Call] = field(default_factory=deque)
    """Those under way, in the order in which the ranks take them."""

    @property
    def name(self) -> str:
        return f"replica {self.number}"

    @property
    def actor(self) -> Any:
        """Rank 0's."""
        return self.actors[0] if self.actors else None

    def ask(self, references: Sequence[Any]) -> None:
        """One more call to all ranks is under way."""
        self.calls.append(Call(list(references), self.num_applied, len(references)))

    def call_of(self, reference: Any) -> Call:
        """The call under way that a rank's is part of."""
        return next(call for call in self.calls if reference in call.references)

    def hear(self, reference: Any, answer: Any) -> Iterator[Any]:
        """Take a rank's answer: those of the calls that all ranks have answered now, in order."""
        call = self.call_of(reference)
        if reference == call.references[0]:
            call.answer = answer
        call.num_awaited -= 1
        while self.calls and not self.calls[0].num_awaited:
            done = self.calls.popleft()
            self.num_confirmed = done.num_sent
            yield done.answer

    def enter(self, state: State, now: float) -> None:
        self.state, self.since = state, now


class Seats:
    """All seats, by number."""

    def __init__(self) -> None:
        self._seats: dict[int, Seat] = {}

    def __iter__(self) -> Iterator[Seat]:
        """In the order of their numbers."""
        seats = self._seats.copy()  # at once: other threads look while seats come and go
        return iter([seats[number] for number in sorted(seats)])

    def __len__(self) -> int:
        return len(self._seats)

    def __getitem__(self, number: int) -> Seat:
        return self._seats[number]

    def __contains__(self, seat: Seat) -> bool:
        return self._seats.get(seat.number) is seat

    def clear(self) -> None:
        self._seats.clear()

    def of(self, *states: State) -> list[Seat]:
        """Those in one of these states."""
        return [seat for seat in self if seat.state in states]

    def resize(self, number: int) -> tuple[list[Seat], list[Seat]]:
        """Open or let go seats until there are `number`: those opened, and those let go.

        None goes whose actor has found its place; the last ones go first, and come back first.
        """
        opened: list[Seat] = []
        free = (each for each in range(number) if each not in self._seats)
        while len(self) < number:
            opened.append(Seat(next(free)))
            self._seats[opened[-1].number] = opened[-1]
        surplus = len(self) - number
        gone = self.of("empty", "placing")[::-1][: max(0, surplus)]
        for seat in gone:
            del self._seats[seat.number]
        return opened, gone
