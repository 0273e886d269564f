"""Which training examples a step scores: a function of the run's seed and the step alone.

Each epoch goes through all examples in an order of its own, and a batch may reach into the next
epoch. Examples of a group follow each other, so that a batch of a few groups' sizes holds few
groups; it may end within one, and the next goes on there. Where batches are cut into pieces, groups
(or examples) of the pieces take turns, so that a batch's pieces are of a size, and no replica is
left without work of its own. Driver and replicas find out the same ones, each for itself.
"""

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator import noise
from orchestrator.config import Config
from orchestrator.pieces import Pieces


class Batches:
    """A run's batches."""

    def __init__(
        self,
        config: Config,
        num_examples: int,
        groups: Sequence[str] = (),
        pieces: Pieces | None = None,
    ) -> None:
        """Examples' ids are 0 to num_examples - 1; `groups` has the group of each, or is empty.

        `pieces` are those of the same config, and may be left out where batches are not cut.
        """
        self._seed, self._size = config.run.seed, config.estimator.batch_size
        self._num_examples = num_examples
        numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        self._groups = np.array([numbers[group] for group in groups], np.int64)
        self._num_groups = len(numbers)
        self.pieces = pieces = pieces or Pieces(config)
        """How they are cut."""
        units = self._groups if self._num_groups else np.arange(num_examples)
        self._pieces = np.zeros(self._num_groups or num_examples, np.int64)
        if pieces.of_example:
            self._pieces[units] = pieces.of_example
        self._order = functools.lru_cache(maxsize=2)(self._epoch_order)

    def of(self, step: int) -> tuple[int, ...]:
        """Ids of a step's training examples."""
        positions = range(step * self._size, (step + 1) * self._size)
        places = [divmod(position, self._num_examples) for position in positions]
        return tuple(int(self._order(epoch)[place]) for epoch, place in places)

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        order = noise.permutation(self._seed, epoch, self._num_examples)
        if not self._num_groups:
            return self._taking_turns(order)
        groups = self._taking_turns(noise.permutation(self._seed, epoch, self._num_groups))
        places = np.argsort(groups)
        return order[np.argsort(places[self._groups[order]], kind="stable")]

    def _taking_turns(self, units: NDArray[np.int64]) -> NDArray[np.int64]:
        """Groups or examples, reordered so that one of each piece follows one of each piece."""
        pieces = self._pieces[units]
        turns = np.empty_like(units)
        for piece in np.unique(pieces):
            of_piece = pieces == piece
            turns[of_piece] = np.arange(np.count_nonzero(of_piece))
        reordered: NDArray[np.int64] = units[np.lexsort((pieces, turns))]
        return reordered
