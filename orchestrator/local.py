"""The fleet in one process: the same calls as the actors' fleet, one replica after another.

For tests and small runs. `dist_patch.apply()` must have run before this module is imported.
"""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

from orchestrator.config import Config
from orchestrator.dispatch import Work
from orchestrator.records import (
    ChunkScores,
    ExampleScore,
    FleetState,
    Probe,
    ProbeLoss,
    ReplicaInfo,
    ReplicaState,
    Split,
    StepUpdate,
    UpdateLog,
    example_chunks,
    probe_groups,
)
from orchestrator.replica import Replica


class LocalFleet:
    """Replicas that take turns."""

    def __init__(self, config: Config, device: str) -> None:
        self._config = config
        self._device = device
        self._replicas: list[Replica] = []
        self._updates = UpdateLog()
        self._applied: list[int] = []
        self._work = Work()
        self._computing: int | None = None

    def start(self) -> ReplicaInfo:
        number = self._config.fleet.num_replicas
        for _ in range(1 if number == "auto" else number):
            self._replicas.append(Replica(self._config, self._device))
            self._applied.append(0)
        return self._replicas[0].info

    def apply(self, update: StepUpdate) -> None:
        self._updates.append(update)

    def evaluate(self, probes: Sequence[Probe]) -> list[ProbeLoss]:
        losses = []
        for index, group in zip(
            self._turns(), probe_groups(probes, self._config.space.probes_per_group), strict=False
        ):
            started, self._computing = time.monotonic(), index
            losses += self._replicas[index].evaluate(self._missing(index), group)
            self._computing = None
            self._work.done[index] += len(group)
            self._work.seconds[index] = (time.monotonic() - started) / len(group)
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

    def export(self, folder: Path) -> None:
        self._replicas[0].export(self._missing(0), folder)

    def state(self) -> FleetState:
        replicas = tuple(
            ReplicaState(
                f"replica {index}",
                "computing" if index == self._computing else "ready",
                num_probes=self._work.done[index],
                num_applied=applied,
                seconds=self._work.seconds.get(index),
            )
            for index, applied in enumerate(list(self._applied))
        )
        return FleetState(replicas, len(self._updates))

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
