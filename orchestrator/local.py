"""The fleet in one process: the calls and the policy of the actors' fleet, without the actors.

For tests and small runs. `dist_patch.apply()` must have run before this module is imported.
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.config import Config
from orchestrator.dispatch import Dispatcher, Limits
from orchestrator.pieces import Assignment, joined
from orchestrator.records import (
    MARK_SIZE,
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
)
from orchestrator.replica import Replica

logger = logging.getLogger(__name__)


class LocalFleet:
    """Replicas that are all as fast: each computes a task, and then each its next one."""

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
        self._dispatcher = Dispatcher(Limits(), lambda: 0.0)
        self._computing: int | None = None
        self._seconds: dict[int, float] = {}  # a probe, in a replica's latest answer

    def start(self) -> ReplicaInfo:
        number = self._config.fleet.num_replicas
        for index in range(1 if number == "auto" else number):
            replica = Replica(self._config, self._device, marks=self._updates.marks)
            self._replicas.append(replica)
            self._applied.append(replica.num_applied)
            self._dispatcher.join(index)
        if self._applied[0]:
            self._say(f"starting from the snapshot of step {self._applied[0]}")
        return self._replicas[0].info

    def apply(self, update: StepUpdate) -> None:
        self._updates.append(update)

    def evaluate(self, probes: Sequence[Probe]) -> list[ProbeLoss]:
        pieces = self._replicas[0].pieces
        work = pieces.assignments(probes, self._config.space.probes_per_group)
        losses = self._shared(
            "evaluate",
            [assignment.size for assignment in work],
            lambda index, task: self._evaluated(index, work[task]),
            pieces.homes(work),
        )
        return joined(work, [loss for some in losses for loss in some])

    def _evaluated(self, index: int, work: Assignment) -> list[ProbeLoss]:
        started, self._computing = time.monotonic(), index
        losses = self._replicas[index].evaluate(self._missing(index), work.probes)
        self._computing = None
        self._seconds[index] = (time.monotonic() - started) / work.size
        return losses

    def score(
        self, split: Split, examples: Sequence[int], *, calibrated: bool = False
    ) -> list[ChunkScores]:
        chunks = example_chunks(examples)
        return self._shared(
            "score",
            [len(chunk) for chunk in chunks],
            lambda index, task: self._replicas[index].score(
                self._missing(index), split, chunks[task], calibrated
            ),
        )

    def _shared(
        self,
        kind: str,
        sizes: Sequence[float],
        call: Callable[[int, int], Any],
        homes: Sequence[int] | None = None,
    ) -> list[Any]:
        """Tasks' answers, in their order; `call` has a replica compute one."""
        answers: dict[int, Any] = {}
        self._dispatcher.begin(kind, sizes, homes)
        while not self._dispatcher.is_done:
            pairs = self._dispatcher.assign()
            for index, task in pairs:
                answers[task] = call(index, task)
            for index, _ in pairs:
                self._dispatcher.answered(index)
        return [answers[task] for task in range(len(sizes))]

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

    def state(self) -> FleetState:
        replicas = tuple(
            ReplicaState(
                f"replica {index}",
                "computing" if index == self._computing else "ready",
                num_probes=round(self._dispatcher.work["evaluate"].done[index]),
                num_applied=applied,
                seconds=self._seconds.get(index),
            )
            for index, applied in enumerate(list(self._applied))
        )
        return FleetState(replicas, len(self._updates))

    def close(self) -> None:
        for replica in self._replicas:
            replica.close()
        self._replicas.clear()

    def _missing(self, index: int) -> list[StepUpdate]:
        missing = self._updates[self._applied[index] :]
        self._applied[index] = len(self._updates)
        return missing
