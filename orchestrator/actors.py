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
from typing import Any

import ray

from orchestrator import dist_patch, environment, output
from orchestrator.config import Config, ConfigError
from orchestrator.records import (
    ChunkScores,
    ExampleScore,
    FleetError,
    Probe,
    ProbeLoss,
    ReplicaInfo,
    Split,
    StepUpdate,
    UpdateLog,
    example_chunks,
    probe_groups,
    taken_next,
)

logger = logging.getLogger(__name__)
PATIENCE_S = 15.0  # between two messages about what is being waited for


class ReplicaActor:
    """A replica in a process of its own."""

    def load(self, config: Config, device: str, log: Path) -> ReplicaInfo:
        """Load everything. Not in the constructor: Ray tells why a call failed, but not why a
        constructor did."""
        if log.parent.is_dir():  # another node may not have the run folder
            output.divert(log)
        dist_patch.apply(device)
        # SGLang may be imported only after the patches, so not at this module's top.
        from orchestrator.replica import Replica

        self._replica = Replica(config, device)
        return self._replica.info

    def evaluate(self, updates: Sequence[StepUpdate], probes: Sequence[Probe]) -> list[ProbeLoss]:
        return self._replica.evaluate(updates, probes)

    def score(
        self,
        updates: Sequence[StepUpdate],
        split: Split,
        examples: Sequence[int],
        calibrated: bool,
    ) -> list[ChunkScores]:
        return [self._replica.score(updates, split, examples, calibrated)]

    def linear_probe(self, updates: Sequence[StepUpdate]) -> list[ExampleScore]:
        return self._replica.linear_probe(updates)

    def digest(self, updates: Sequence[StepUpdate]) -> str:
        return self._replica.digest(updates)

    def export(self, updates: Sequence[StepUpdate], folder: Path) -> None:
        self._replica.export(updates, folder)


@dataclass(slots=True)
class _Seat:
    """A replica as the fleet sees it."""

    name: str
    actor: Any
    num_applied: int = 0


class ActorFleet:
    """Replicas as actors; work goes to whichever is free, its own share first, and back into the
    queue if one dies."""

    def __init__(self, config: Config, log: Path, say: Callable[[str], None]) -> None:
        """`say` is told, in a sentence, what is being waited for."""
        self._config = config
        self._log = log
        self._say = say
        self._seats: list[_Seat] = []
        self._updates = UpdateLog()

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
            self._seats.append(_Seat(f"replica {index}", create.remote()))
        self._gather(lambda seat: seat.actor.__ray_ready__.remote(), _free_resources)
        infos: dict[str, ReplicaInfo] = self._gather(
            lambda seat: seat.actor.load.remote(self._config, device, self._log),
            lambda: "to load the model",
        )
        first = next(iter(infos))
        for name, info in infos.items():
            if info != infos[first]:
                raise FleetError(f"{name} differs from {first}: {info}, {infos[first]}")
        return infos[first]

    def close(self) -> None:
        self._seats.clear()
        ray.shutdown()

    def _connect(self) -> None:
        """Join the cluster that RAY_ADDRESS names, as in a Ray job; else start one here.

        Without the variable nothing is joined: what Ray would find by itself may be the private
        cluster of another run on this machine.
        """
        if ray.is_initialized():
            return
        fleet = self._config.fleet
        wanted = max(fleet.num_replicas * fleet.threads_per_replica, os.cpu_count() or 1)
        where: dict[str, Any] = {"address": os.environ.get("RAY_ADDRESS")}
        if not where["address"]:
            where = {"address": "local", "num_cpus": wanted, "include_dashboard": False}
        # Ray replaces the driver's handler by one that exits without a word.
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise FleetError(f"RAY_ADDRESS={where['address']}: {error}") from None
        finally:
            signal.signal(signal.SIGTERM, on_sigterm)

    def _device(self) -> str:
        """What all replicas run on; refuses more of them than could ever be placed."""
        wanted = self._config.model.device
        num_gpus = int(ray.cluster_resources().get("GPU", 0))
        device = wanted if wanted != "auto" else "cuda" if num_gpus else "cpu"
        num_replicas = self._config.fleet.num_replicas
        if device == "cuda" and num_gpus < num_replicas:
            raise ConfigError(
                f"fleet.num_replicas: {num_replicas} replicas want a GPU each, and the cluster has "
                f"{num_gpus}; lower it, or set model.device=cpu"
            )
        return device

    # ---------------------------------------------------------------- work

    def apply(self, update: StepUpdate) -> None:
        self._updates.append(update)

    def evaluate(self, probes: Sequence[Probe]) -> list[ProbeLoss]:
        def assign(group: Sequence[Probe]) -> Callable[[_Seat], Any]:
            return lambda seat: seat.actor.evaluate.remote(self._missing(seat), group)

        return self._dispatch(
            [assign(group) for group in probe_groups(probes, self._config.space.probes_per_group)]
        )

    def score(
        self, split: Split, examples: Sequence[int], *, calibrated: bool = False
    ) -> list[ChunkScores]:
        def assign(chunk: Sequence[int]) -> Callable[[_Seat], Any]:
            return lambda seat: seat.actor.score.remote(
                self._missing(seat), split, chunk, calibrated
            )

        return self._dispatch([assign(chunk) for chunk in example_chunks(examples)])

    def linear_probe(self) -> list[ExampleScore]:
        return self._dispatch([lambda seat: seat.actor.linear_probe.remote(self._missing(seat))])

    def digests(self) -> dict[str, str]:
        return self._gather(
            lambda seat: seat.actor.digest.remote(self._missing(seat)),
            lambda: "to catch up and compute its digest",
        )

    def export(self, folder: Path) -> None:
        self._gather(
            lambda seat: seat.actor.export.remote(self._missing(seat), folder),
            lambda: "to replay the ledger and write the model",
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
                    index = taken_next(waiting, self._seats.index(seat), len(self._seats))
                    waiting.remove(index)
                    flying[assignments[index](seat)] = (index, seat)
            ready, _ = ray.wait(list(flying), num_returns=1)
            index, seat = flying.pop(ready[0])
            try:
                answers[index] = _result(seat, ready[0])
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

    def _gather(self, call: Callable[[_Seat], Any], reason: Callable[[], str]) -> dict[str, Any]:
        """One answer of every replica that lives; the user is told what is waited for and why."""
        seats = {call(seat): seat for seat in self._seats}
        answers: dict[str, Any] = {}
        pending = list(seats)
        while pending:
            ready, pending = ray.wait(pending, num_returns=len(pending), timeout=PATIENCE_S)
            for reference in ready:
                seat = seats[reference]
                try:
                    answers[seat.name] = _result(seat, reference)
                except ray.exceptions.RayActorError as error:
                    self._lose(seat, error)
            if pending:
                names = ", ".join(seats[reference].name for reference in pending)
                self._say(f"waiting for {names} {reason()}")
        return {seat.name: answers[seat.name] for seat in self._seats}


def _free_resources() -> str:
    free = ray.available_resources()
    return (
        f"to find a place in the cluster, which has {free.get('CPU', 0):.0f} CPUs and "
        f"{free.get('GPU', 0):.0f} GPUs free"
    )


def _result(seat: _Seat, reference: Any) -> Any:
    """A call's answer. What went wrong in the replica is told as it was there."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ConfigError):
            raise error.cause from None
        cause = error.cause or error
        raise FleetError(f"{seat.name}: {type(cause).__name__}: {cause}") from error


def _environment(threads: int) -> dict[str, str]:
    """What an actor's process needs before its first import."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, os.environ.get("PYTHONPATH", "")]
    return {
        **environment.variables(threads),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
