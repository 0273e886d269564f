"""The fleet as Ray actors: placement, environment, the queue of work, and the loss of actors.

The only importer of ray. Only probes, updates, losses and digests travel. Knows nothing of how a
replica computes.
"""

import logging
import os
import signal
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray

from orchestrator import dist_patch, environment, output
from orchestrator.config import Config, ConfigError
from orchestrator.records import (
    ExampleScore,
    FleetError,
    Probe,
    ProbeLoss,
    ReplicaInfo,
    Split,
    StepUpdate,
    example_chunks,
    probe_groups,
)

logger = logging.getLogger(__name__)
PATIENCE_S = 15.0  # between two messages about what is being waited for
Answer = TypeVar("Answer")


class ReplicaActor:
    """A replica in a process of its own."""

    def __init__(self, config: Config, device: str, log: Path) -> None:
        if log.parent.is_dir():  # another node may not have the run folder
            output.divert(log)
        dist_patch.apply(device)
        # SGLang may be imported only after the patches, so not at this module's top.
        from orchestrator.replica import Replica

        self._replica = Replica(config, device)

    def info(self) -> ReplicaInfo:
        return self._replica.info

    def evaluate(self, updates: Sequence[StepUpdate], probes: Sequence[Probe]) -> list[ProbeLoss]:
        return self._replica.evaluate(updates, probes)

    def score(
        self, updates: Sequence[StepUpdate], split: Split, examples: Sequence[int]
    ) -> list[ExampleScore]:
        return self._replica.score(updates, split, examples)

    def digest(self, updates: Sequence[StepUpdate]) -> str:
        return self._replica.digest(updates)


@dataclass(slots=True)
class _Seat:
    """A replica as the fleet sees it."""

    name: str
    actor: Any
    num_applied: int = 0


class ActorFleet:
    """Replicas as actors; work goes to whichever is free, and back into the queue if one dies."""

    def __init__(self, config: Config, log: Path, say: Callable[[str], None]) -> None:
        """`say` is told, in a sentence, what is being waited for."""
        self._config = config
        self._log = log
        self._say = say
        self._seats: list[_Seat] = []
        self._updates: list[StepUpdate] = []

    # ---------------------------------------------------------------- life

    def start(self) -> ReplicaInfo:
        """Place the actors and wait until all of them have loaded the model."""
        self._connect()
        device = self._device()
        threads = self._config.fleet.threads_per_replica
        create = ray.remote(ReplicaActor).options(
            num_cpus=threads,
            num_gpus=1 if device == "cuda" else 0,
            runtime_env={"env_vars": _environment(threads)},
        )
        for index in range(self._config.fleet.num_replicas):
            actor = create.remote(self._config, device, self._log)
            self._seats.append(_Seat(f"replica {index}", actor))
        infos: dict[str, ReplicaInfo] = self._gather(
            [(seat, seat.actor.info.remote()) for seat in self._seats]
        )
        for name, info in infos.items():
            if info != infos[self._seats[0].name]:
                raise FleetError(f"{name} differs from {self._seats[0].name}: {info}")
        return infos[self._seats[0].name]

    def close(self) -> None:
        self._seats.clear()
        ray.shutdown()

    def _connect(self) -> None:
        """Join the cluster that this job runs on, or start one on this machine."""
        if ray.is_initialized():
            return
        # Ray replaces the driver's handler by one that exits without a word.
        on_sigterm = signal.getsignal(signal.SIGTERM)
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            ray.init(address="auto", **quiet)
        except ConnectionError:
            fleet = self._config.fleet
            wanted = fleet.num_replicas * fleet.threads_per_replica
            ray.init(
                address="local",
                num_cpus=max(wanted, os.cpu_count() or 1),
                include_dashboard=False,
                **quiet,
            )
        signal.signal(signal.SIGTERM, on_sigterm)

    def _device(self) -> str:
        wanted = self._config.model.device
        num_gpus = ray.cluster_resources().get("GPU", 0)
        if wanted == "cuda" and num_gpus < self._config.fleet.num_replicas:
            raise ConfigError(
                f"fleet.num_replicas: {self._config.fleet.num_replicas} replicas want a GPU each, "
                f"and the cluster has {num_gpus:.0f}; lower it, or set model.device=cpu"
            )
        if wanted == "auto":
            return "cuda" if num_gpus else "cpu"
        return wanted

    # ---------------------------------------------------------------- work

    def apply(self, update: StepUpdate) -> None:
        self._updates.append(update)

    def evaluate(self, probes: Sequence[Probe]) -> list[ProbeLoss]:
        def assign(group: Sequence[Probe]) -> Callable[[_Seat], Any]:
            return lambda seat: seat.actor.evaluate.remote(self._missing(seat), group)

        return self._dispatch([assign(group) for group in probe_groups(probes)])

    def score(self, split: Split, examples: Sequence[int]) -> list[ExampleScore]:
        def assign(chunk: Sequence[int]) -> Callable[[_Seat], Any]:
            return lambda seat: seat.actor.score.remote(self._missing(seat), split, chunk)

        return self._dispatch([assign(chunk) for chunk in example_chunks(examples)])

    def digests(self) -> dict[str, str]:
        return self._gather(
            [(seat, seat.actor.digest.remote(self._missing(seat))) for seat in self._seats]
        )

    def _missing(self, seat: _Seat) -> list[StepUpdate]:
        missing = self._updates[seat.num_applied :]
        seat.num_applied = len(self._updates)
        return missing

    def _dispatch(self, assignments: Sequence[Callable[[_Seat], Any]]) -> list[Any]:
        """Run all assignments on whichever replicas are free; answers in the order given."""
        answers: list[list[Any]] = [[] for _ in assignments]
        waiting = deque(range(len(assignments)))
        flying: dict[Any, tuple[int, _Seat]] = {}
        while waiting or flying:
            busy = {seat.name for _, seat in flying.values()}
            for seat in [seat for seat in self._seats if seat.name not in busy]:
                if waiting:
                    index = waiting.popleft()
                    flying[assignments[index](seat)] = (index, seat)
            ready, _ = ray.wait(list(flying), num_returns=1)
            index, seat = flying.pop(ready[0])
            try:
                answers[index] = _result(ready[0])
            except ray.exceptions.RayActorError as error:
                self._lose(seat, error)
                waiting.appendleft(index)
        return [answer for part in answers for answer in part]

    def _lose(self, seat: _Seat, error: Exception) -> None:
        """Go on without a dead actor; it held nothing that the others lack."""
        self._seats.remove(seat)
        logger.warning("%s died: %s", seat.name, error)
        if not self._seats:
            raise FleetError(
                f"{seat.name} died, and no replica is left; see {self._log}"
            ) from error
        self._say(f"{seat.name} died; going on with {len(self._seats)}")

    def _gather(self, calls: Sequence[tuple[_Seat, Any]]) -> dict[str, Any]:
        """Wait for one answer of every replica, saying what is waited for."""
        seats = {reference: seat for seat, reference in calls}
        pending = list(seats)
        while pending:
            ready, pending = ray.wait(pending, num_returns=len(pending), timeout=PATIENCE_S)
            for reference in ready:
                try:
                    _result(reference)
                except ray.exceptions.RayActorError as error:
                    raise FleetError(f"{seats[reference].name} died: {error}") from error
            if pending:
                names = ", ".join(seats[reference].name for reference in pending)
                free = ray.available_resources()
                self._say(
                    f"waiting for {names} (free in the cluster: {free.get('CPU', 0):.0f} CPUs, "
                    f"{free.get('GPU', 0):.0f} GPUs)"
                )
        return {seat.name: _result(reference) for seat, reference in calls}


def _result(reference: Any) -> Any:
    """A call's answer; a replica's own exception comes back as it was raised there."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ConfigError):
            raise error.cause from None
        raise


def _environment(threads: int) -> dict[str, str]:
    """What an actor's process needs before its first import."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, os.environ.get("PYTHONPATH", "")]
    return {
        **environment.variables(threads),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
