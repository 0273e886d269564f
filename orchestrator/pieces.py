"""A step's batch cut by context into pieces, and the losses of its pieces joined.

Owns which piece an example belongs to, and how the answers become those of the batch. The cut is a
function of the recipe and the rows: of the fleet's size it knows nothing, for the shapes of batches
decide the last bits of losses. How many probes of a piece a replica is given at a time is the
fleet's choice, which replica that is `dispatch`'s; a space parts them into the same forwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from orchestrator.config import Config
from orchestrator.objectives import mean_loss
from orchestrator.records import Probe, ProbeLoss, probe_groups

T = TypeVar("T")
Positions = tuple[int, ...]
"""Places in a batch, in their order."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one replica is given at a time: probes of the same examples."""

    probes: tuple[Probe, ...]
    first: int
    """The place of the first of them among all probes of the call."""
    piece: int
    positions: Positions
    """Where in the batch their examples stand."""
    size: float
    """How much work it is: probes, of which a piece is its part of the batch."""


class Pieces:
    """The pieces of a run's batches: one, unless `fleet.affinity` has them cut."""

    def __init__(self, config: Config, contexts: Sequence[str] = ()) -> None:
        """`contexts` has what decides each training example's piece; needed only for the cut."""
        self.number = 1 if config.fleet.affinity == "none" else config.fleet.pieces
        assert contexts or self.number == 1, "a cut wants contexts"
        numbers: dict[str, int] = {}
        # Dealt round and round, so that no piece has more than one context more than another.
        self.of_example = [
            numbers.setdefault(context, len(numbers)) % self.number
            for context in (contexts if self.number > 1 else ())
        ]
        """The piece of each training example; empty where batches are not cut."""

    def cut(self, examples: Sequence[int]) -> list[tuple[int, Positions]]:
        """The pieces that a batch of these training examples has, with each one's positions."""
        if not self.of_example:
            return [(0, tuple(range(len(examples))))]
        found: dict[int, list[int]] = {}
        for position, example in enumerate(examples):
            found.setdefault(self.of_example[example], []).append(position)
        return [(piece, tuple(found[piece])) for piece in sorted(found)]

    def counterpart(self, examples: Sequence[int], batch: Sequence[int]) -> tuple[int, ...]:
        """The examples of another batch that belong to the piece of the first of `examples`."""
        wanted = self.of_example[examples[0]] if self.of_example else 0
        return tuple(
            batch[position]
            for piece, positions in self.cut(batch)
            for position in positions
            if piece == wanted
        )

    def assignments(self, probes: Sequence[Probe], size: int) -> list[Assignment]:
        """The probes cut into what one replica is given, up to `size` at a time; piece by piece,
        so that those of a piece follow each other."""
        found = []
        for number, group in enumerate(probe_groups(probes, size)):
            for piece, positions in self.cut(group[0].examples):
                cut = tuple(_on(probe, positions) for probe in group)
                work = len(group) * len(positions) / len(group[0].examples)
                found.append(Assignment(cut, number * size, piece, positions, work))
        return sorted(found, key=lambda assignment: assignment.piece)

    def homes(self, assignments: Sequence[Assignment]) -> list[int] | None:
        """For `dispatch`: what tells assignments that belong to the same replica, step by step."""
        return [assignment.piece for assignment in assignments] if self.of_example else None


def _on(probe: Probe, positions: Positions) -> Probe:
    return replace(probe, examples=tuple(probe.examples[position] for position in positions))


def joined(assignments: Sequence[Assignment], answers: Sequence[ProbeLoss]) -> list[ProbeLoss]:
    """The losses of the probes that were cut, in their order, from those of all assignments' probes
    in theirs."""
    found: dict[int, list[tuple[Positions, ProbeLoss]]] = {}
    losses = iter(answers)
    for assignment in assignments:
        for number in range(len(assignment.probes)):
            piece = assignment.positions, next(losses)
            found.setdefault(assignment.first + number, []).append(piece)
    return [_whole(found[number]) for number in sorted(found)]


def _whole(pieces: Sequence[tuple[Positions, ProbeLoss]]) -> ProbeLoss:
    """The loss of a batch from those of its pieces: what it would be, had they been computed
    together."""
    places = [positions for positions, _ in pieces]
    losses = [loss for _, loss in pieces]
    if len(losses) == 1:
        return losses[0]
    parts = _in_order(places, [loss.parts for loss in losses])
    weights = _in_order(places, [loss.weights for loss in losses])
    return ProbeLoss(
        value=mean_loss(parts, weights),
        num_tokens=sum(loss.num_tokens for loss in losses),
        num_asked=sum(loss.num_asked for loss in losses),
        num_across=sum(loss.num_across for loss in losses),
        parts=parts,
        weights=weights,
        lost=tuple(map(sum, zip(*(loss.lost for loss in losses), strict=True))),
    )


def _in_order(places: Sequence[Positions], values: Sequence[Sequence[T]]) -> tuple[T, ...]:
    """What the pieces have an example, in the batch's order; nothing where they have nothing."""
    placed = [
        pair
        for positions, of_piece in zip(places, values, strict=True)
        if of_piece
        for pair in zip(positions, of_piece, strict=True)
    ]
    return tuple(value for _, value in sorted(placed, key=lambda pair: pair[0]))
