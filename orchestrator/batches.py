"""Which training examples a step scores: a function of the run's seed and the step alone.

Each epoch goes through all examples in an order of its own, and a batch may reach into the next
epoch. Knows labels as numbers; nothing of texts.
"""

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator import noise
from orchestrator.config import Config


class Batches:
    """A run's batches. Driver and replicas make the same ones, each for itself."""

    def __init__(self, config: Config, labels: Sequence[int]) -> None:
        """`labels` are the training examples', by their ids."""
        self._seed, self._size = config.run.seed, config.estimator.batch_size
        self._labels = np.asarray(labels)
        self._balanced = config.estimator.balanced
        self._order = functools.lru_cache(maxsize=2)(self._epoch_order)

    def of(self, step: int) -> tuple[int, ...]:
        """Ids of a step's training examples."""
        positions = range(step * self._size, (step + 1) * self._size)
        places = [divmod(position, len(self._labels)) for position in positions]
        return tuple(int(self._order(epoch)[place]) for epoch, place in places)

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        order = noise.permutation(self._seed, epoch, len(self._labels))
        return spread(order, self._labels) if self._balanced else order


def spread(order: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The order changed so that every stretch of it holds each label in its share of all.

    Examples of a label keep their order, and stand as evenly spaced as they can.
    """
    shuffled = labels[order]
    due = np.empty(len(order))
    for label in np.unique(labels):
        members = np.flatnonzero(shuffled == label)
        due[members] = (np.arange(len(members)) + 0.5) / len(members)
    return order[np.argsort(due, kind="stable")]
