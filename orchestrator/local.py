"""The fleet in one process: the same calls as the actors' fleet, one replica after another.

For tests and small runs. `dist_patch.apply()` must have run before this module is imported.
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.config import Config
from orchestrator.records import (
    MARK_SIZE,
    ChunkScores,
    ExampleScore,
    Probe,
    ProbeLoss,
    ReplicaInfo,
    Split,
    StepUpdate,
    UpdateLog,
    example_chunks,
    probe_groups,
)
from orchestrator.replica import Replica

logger = logging.getLogger(__name__)


class LocalFleet:
    """Replicas that take turns."""

    def __init__(
        self, config: Config, device: str, say: Callable[[str], None] = logger.warning
    ) -> None:
        """`say` is told, in a sentence, what the user should know."""
        self._config = config
        self._device = device
        self._say = say
        self._is_told_of_snapshots = False  # that they cannot be written
        self._replicas: list[Replica] = []
        self._updates = UpdateLog()
        self._applied: list[int] = []

    def start(self) -> ReplicaInfo:
        number = self._config.fleet.num_replicas
        for _ in range(1 if number == "auto" else number):
            replica = Replica(self._config, self._device, marks=self._updates.marks)
            self._replicas.append(replica)
            self._applied.append(replica.num_applied)
        if self._applied[0]:
            self._say(f"starting from the snapshot of step {self._applied[0]}")
        return self._replicas[0].info

    def apply(self, update: StepUpdate) -> None:
        self._updates.append(update)

    def evaluate(self, probes: Sequence[Probe]) -> list[ProbeLoss]:
        losses = []
        for index, group in zip(
            self._turns(), probe_groups(probes, self._config.space.probes_per_group), strict=False
        ):
            losses += self._replicas[index].evaluate(self._missing(index), group)
        return losses

    def score(
        self, split: Split, examples: Sequence[int], *, calibrated: bool = False
    ) -> list[ChunkScores]:
        return [
            self._replicas[index].score(self._missing(index), split, chunk, calibrated)
            for index, chunk in zip(self._turns(), example_chunks(examples), strict=False)
        ]

    def linear_probe(self) -> list[ExampleScore]:
        return self._replicas[0].linear_probe(self._missing(0))

    def digests(self) -> dict[str, str]:
        return {
            f"replica {index}": replica.digest(self._missing(index))
            for index, replica in enumerate(self._replicas)
        }

    def snapshot(self, digest: str) -> None:
        mark = self._updates.marks[-MARK_SIZE:]
        trouble = self._replicas[0].snapshot(self._missing(0), mark, digest)
        if trouble and not self._is_told_of_snapshots:
            self._is_told_of_snapshots = True
            self._say(f"{trouble}; the run goes on without")

    def export(self, folder: Path) -> None:
        self._replicas[0].export(self._missing(0), folder)

    def close(self) -> None:
        for replica in self._replicas:
            replica.close()
        self._replicas.clear()

    def _turns(self) -> "itertools.cycle[int]":
        return itertools.cycle(range(len(self._replicas)))

    def _missing(self, index: int) -> list[StepUpdate]:
        missing = self._updates[self._applied[index] :]
        self._applied[index] = len(self._updates)
        return missing
