"""The fleet as Ray actors: placement, environment, and how replicas are started, killed, replaced.

The only importer of ray. Only probes, updates, losses and digests travel. Knows nothing of how a
replica computes; who computes what, and when a call is given up, is `dispatch`'s to say.
"""

import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray

from orchestrator import dist_patch, environment, output
from orchestrator.config import Config, ConfigError
from orchestrator.dispatch import Dispatcher, Limits, TaskLost, pause_before_attempt
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
)

logger = logging.getLogger(__name__)
NEWS_S = 15.0  # between two messages about what is being waited for
GPU_SHARES = 10_000  # Ray counts parts of a GPU in these
# What Ray says when a process or a node is gone.
DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.NodeDiedError,
)
# Exceptions in a replica that are the machine's doing: memory that ran out, a GPU that fell off.
# By name, for torch's are not known here.
MACHINE_FAILURES = ("MemoryError", "OutOfMemoryError", "AcceleratorError")


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


class _Lost(Exception):
    """A replica can compute nothing more."""


@dataclass(slots=True)
class _Seat:
    """A replica as the fleet sees it: a place that one actor after another may hold."""

    number: int
    actor: Any = None
    state: Literal["placing", "loading", "ready", "empty"] = "empty"
    kind: str = ""
    """Of the task that the actor computes, or computed last."""
    since: float = 0.0
    """When the state began."""
    failures: int = 0
    """Actors that were lost since one last answered a task."""
    num_applied: int = 0

    @property
    def name(self) -> str:
        return f"replica {self.number}"


class ActorFleet:
    """Replicas as actors. Those that die, hang or differ are replaced while the others go on."""

    def __init__(
        self,
        config: Config,
        log: Path,
        say: Callable[[str], None],
        limits: Limits = Limits(),  # noqa: B008 -- frozen
    ) -> None:
        """`say` is told, in a sentence, what is being waited for and what became of replicas."""
        self._config = config
        self._log = log
        self._say = say
        self._limits = limits
        self._seats: list[_Seat] = []
        self._updates = UpdateLog()
        self._dispatcher = Dispatcher(limits, time.monotonic)
        self._info: ReplicaInfo | None = None
        self._pending: dict[Any, _Seat] = {}  # calls that are not answered, one an actor
        self._answers: dict[int, Any] = {}
        self._proven: set[str] = set()  # kinds of tasks that some replica has answered
        self._has_started = False
        self._last_loss = ""
        self._reason = ""  # what a round is for, if the user is to be told
        self._last_news = 0.0

    # ---------------------------------------------------------------- life

    def start(self) -> ReplicaInfo:
        """Place the actors and wait until all of them have loaded the model, or have failed to.

        Raises what is wrong with the recipe as the replica told it. One that dies while it loads
        is tried again later, unless it was the only one.
        """
        self._connect()
        device = self._device()
        threads = self._config.fleet.threads_per_replica
        self._create = ray.remote(ReplicaActor).options(
            num_cpus=threads,
            num_gpus=self._config.fleet.gpus_per_replica if device == "cuda" else 0,
            runtime_env={"env_vars": _environment(threads)},
        )
        self._load_arguments = (self._config, device, self._log)
        self._seats = [_Seat(number) for number in range(self._num_replicas(device))]
        self._last_news = time.monotonic()
        for seat in self._seats:
            self._place(seat)
        while any(seat.state != "ready" and not seat.failures for seat in self._seats):
            self._attend()
        if self._info is None:
            raise FleetError(f"{self._last_loss}, and no replica is left; see {self._log}")
        self._has_started = True
        return self._info

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
        number = 1 if fleet.num_replicas == "auto" else fleet.num_replicas
        wanted = max(number * fleet.threads_per_replica, os.cpu_count() or 1)
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
        """What all replicas run on."""
        wanted = self._config.model.device
        if wanted != "auto":
            return wanted
        return "cuda" if ray.cluster_resources().get("GPU", 0) else "cpu"

    def _num_replicas(self, device: str) -> int:
        """How many replicas there are to be; refuses more than could ever be placed on GPUs."""
        fleet = self._config.fleet
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        num_gpus = int(sum(node.get("GPU", 0) for node in nodes))
        if fleet.num_replicas != "auto":
            room = sum(_room_on_gpus(node, fleet.gpus_per_replica) for node in nodes)
            if device == "cuda" and room < fleet.num_replicas:
                each = "a GPU" if fleet.gpus_per_replica == 1 else f"{fleet.gpus_per_replica:g} GPU"
                raise ConfigError(
                    f"fleet.num_replicas: {fleet.num_replicas} replicas want {each} each, and the "
                    f"cluster has {num_gpus}; lower it, or set model.device=cpu"
                )
            return fleet.num_replicas
        number = 0
        for node in nodes:
            room = int(node.get("CPU", 0)) // fleet.threads_per_replica
            if device == "cuda":
                room = min(room, _room_on_gpus(node, fleet.gpus_per_replica))
            number += room
        if not number:
            raise ConfigError(
                f"fleet.num_replicas: auto: no node of the cluster has room for a replica, with "
                f"{fleet.threads_per_replica} CPUs"
                + (f" and {fleet.gpus_per_replica:g} GPU" if device == "cuda" else "")
                + "; lower fleet.threads_per_replica"
            )
        self._say(f"the cluster has room for {number} replica{'s' * (number > 1)}")
        return number

    # ---------------------------------------------------------------- work

    def apply(self, update: StepUpdate) -> None:
        self._updates.append(update)

    def evaluate(self, probes: Sequence[Probe]) -> list[ProbeLoss]:
        groups = probe_groups(probes, self._config.space.probes_per_group)
        return self._shared(
            "evaluate",
            [len(group) for group in groups],
            lambda seat, task: seat.actor.evaluate.remote(self._missing(seat), groups[task]),
        )

    def score(
        self, split: Split, examples: Sequence[int], *, calibrated: bool = False
    ) -> list[ChunkScores]:
        chunks = example_chunks(examples)
        return self._shared(
            "score, calibrated" if calibrated else "score",
            [len(chunk) for chunk in chunks],
            lambda seat, task: seat.actor.score.remote(
                self._missing(seat), split, chunks[task], calibrated
            ),
        )

    def linear_probe(self) -> list[ExampleScore]:
        return self._shared(
            "linear probe", [1], lambda seat, _: seat.actor.linear_probe.remote(self._missing(seat))
        )

    def digests(self) -> dict[str, str]:
        """Digests of the replicas that are up. One that differs from most is rebuilt, by replay
        of the ledger, before it is asked again; so are all where there is no majority."""
        digests = self._digests()
        astray = _astray(digests)
        if not astray:
            return digests
        logger.warning("digests differ: %s", digests)
        rebuilt = [seat for seat in self._seats if seat.name in astray]
        for seat in rebuilt:
            self._lose(seat, _Lost("differs"))
        while any(seat.state != "ready" and seat.failures == 1 for seat in rebuilt):
            self._attend()
        return self._digests()

    def _digests(self) -> dict[str, str]:
        return self._each(
            "digest",
            lambda seat: seat.actor.digest.remote(self._missing(seat)),
            "to catch up and compute its digest",
        )

    def export(self, folder: Path) -> None:
        self._each(
            "export",
            lambda seat: seat.actor.export.remote(self._missing(seat), folder),
            "to replay the ledger and write the model",
        )

    def _missing(self, seat: _Seat) -> list[StepUpdate]:
        missing = self._updates[seat.num_applied :]
        seat.num_applied = len(self._updates)
        return missing

    def _shared(
        self, kind: str, sizes: Sequence[int], call: Callable[[_Seat, int], Any]
    ) -> list[Any]:
        """Tasks on whichever replicas are free; answers, which are lists, joined in their order."""
        self._dispatcher.begin(kind, sizes)
        self._finish(kind, call)
        return [answer for task in range(len(sizes)) for answer in self._answers[task]]

    def _each(self, kind: str, call: Callable[[_Seat], Any], reason: str) -> dict[str, Any]:
        """One answer of every replica that is up and stays so; of one at least. The user is told
        what is waited for and why."""
        while True:
            numbers = self._dispatcher.begin_each(kind)
            self._finish(kind, lambda seat, _: call(seat), reason)
            if self._answers:
                names = {task: self._seats[number].name for task, number in enumerate(numbers)}
                return {names[task]: self._answers[task] for task in sorted(self._answers)}
            self._attend()

    def _finish(self, kind: str, call: Callable[[_Seat, int], Any], reason: str = "") -> None:
        """See the round through that the dispatcher has begun."""
        self._answers, self._reason = {}, reason
        self._last_news = time.monotonic()
        while not self._dispatcher.is_done:
            for number, task in self._dispatcher.assign():
                seat = self._seats[number]
                seat.kind = kind
                self._pending[call(seat, task)] = seat
            self._attend()

    # ---------------------------------------------------------------- replicas come and go

    def _attend(self) -> None:
        """Sleep until something has happened, and see to it."""
        for reference in _ready(list(self._pending), self._dispatcher.pause()):
            seat = self._pending.pop(reference)
            try:
                self._take(seat, _result(seat, reference, self._is_proven(seat)))
            except _Lost as error:
                self._lose(seat, error)
        for number in self._dispatcher.overdue():
            self._lose(self._seats[number], _Lost("did not answer in time"))
        now = time.monotonic()
        for seat in [seat for seat in self._seats if seat.state != "ready"]:
            if seat.state == "loading" and now - seat.since > self._limits.first_call_s:
                self._lose(seat, _Lost("did not load in time"))
            if seat.state == "empty" and now - seat.since >= pause_before_attempt(seat.failures):
                self._place(seat)
        is_loading = any(seat.state == "loading" for seat in self._seats)
        if self._has_started and self._dispatcher.is_hopeless(is_loading=is_loading):
            raise FleetError(f"{self._last_loss}, and no replica is left; see {self._log}")
        if now - self._last_news >= NEWS_S:
            self._last_news = now
            self._tell_what_is_awaited()

    def _is_proven(self, seat: _Seat) -> bool:
        """Whether what the seat's actor is doing is known to succeed where nothing is broken."""
        return seat.kind in self._proven if seat.state == "ready" else self._has_started

    def _take(self, seat: _Seat, answer: Any) -> None:
        """What an actor has answered, be it a task's or one on the way to its first."""
        if seat.state == "placing":
            seat.state, seat.since = "loading", time.monotonic()
            self._pending[seat.actor.load.remote(*self._load_arguments)] = seat
        elif seat.state == "loading":
            if self._info is None:
                self._info = answer
            elif answer != self._info:
                difference = f"differs from the others: {answer}, {self._info}"
                if not self._has_started:
                    raise FleetError(f"{seat.name} {difference}")
                raise _Lost(difference)
            seat.state, seat.since = "ready", time.monotonic()
            self._dispatcher.join(seat.number)
        else:
            seat.failures = 0
            self._proven.add(seat.kind)
            task = self._dispatcher.answered(seat.number)
            if task is not None:
                self._answers[task] = answer

    def _place(self, seat: _Seat) -> None:
        """Ask for an actor. It stands at the base model: its first call brings all updates."""
        seat.actor, seat.num_applied = self._create.remote(), 0
        seat.state, seat.since = "placing", time.monotonic()
        self._pending[seat.actor.__ray_ready__.remote()] = seat

    def _lose(self, seat: _Seat, reason: _Lost) -> None:
        """Give a replica up, dead or not, and have it replaced; it held nothing that is lost."""
        logger.warning("%s %s while %s: %s", seat.name, reason, seat.state, reason.__cause__)
        self._last_loss = f"{seat.name} {reason}"
        ray.kill(seat.actor)
        was_ready = seat.state == "ready"
        seat.actor = None
        self._pending = {call: other for call, other in self._pending.items() if other is not seat}
        seat.state, seat.since = "empty", time.monotonic()
        seat.failures += 1
        if was_ready:
            try:
                self._dispatcher.lost(seat.number)
            except TaskLost:
                raise FleetError(
                    f"{self._last_loss}, at work that had ended "
                    f"{self._limits.most_losses - 1} replicas before; see {self._log}"
                ) from reason
        left = len(self._dispatcher.replicas)
        self._say(f"{self._last_loss}; starting it anew, going on with {left}")

    def _tell_what_is_awaited(self) -> None:
        """Not of replicas that come back while others go on."""
        if self._dispatcher.replicas and self._has_started:
            computing = [seat.name for seat in self._pending.values() if seat.state == "ready"]
            if self._reason and computing:
                self._say(f"waiting for {', '.join(sorted(computing))} {self._reason}")
            return
        for state, reason in (("placing", _free_resources()), ("loading", "to load the model")):
            names = [seat.name for seat in self._seats if seat.state == state]
            if names:
                self._say(f"waiting for {', '.join(names)} {reason}")


def _ready(references: list[Any], timeout: float) -> list[Any]:
    """All that have been answered, once one has, or after `timeout` seconds."""
    if not references:
        time.sleep(timeout)
        return []
    ready, _ = ray.wait(references, num_returns=1, timeout=timeout)
    if ready and len(references) > 1:
        ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
    return list(ready)


def _astray(digests: Mapping[str, str]) -> list[str]:
    """Whose digests differ from that of most; all, where there is no majority."""
    common, count = Counter(digests.values()).most_common(1)[0]
    if count * 2 <= len(digests):
        return list(digests) if count < len(digests) else []
    return [name for name, digest in digests.items() if digest != common]


def _room_on_gpus(node: Mapping[str, float], gpus_per_replica: float) -> int:
    """Replicas that a node's GPUs hold; each lies on one GPU."""
    share = round(gpus_per_replica * GPU_SHARES)
    return int(node.get("GPU", 0)) * (GPU_SHARES // share)


def _free_resources() -> str:
    free = ray.available_resources()
    return (
        f"to find a place in the cluster, which has {free.get('CPU', 0):.0f} CPUs and "
        f"{free.get('GPU', 0):.0f} GPUs free"
    )


def _result(seat: _Seat, reference: Any, is_proven: bool) -> Any:
    """A call's answer. Raises _Lost if the replica's process or machine failed.

    What else went wrong in the replica is told as it was there. So is memory that runs out, unless
    the call `is_proven`, for that may be the recipe's doing. To load is proven once a fleet has.
    """
    try:
        return ray.get(reference)
    except DEATHS as error:
        raise _Lost("died") from error
    except ray.exceptions.RayTaskError as error:
        cause = error.cause or error
        what = f"{type(cause).__name__}: {cause}"
        is_machine = type(cause).__name__ in MACHINE_FAILURES or seat.state == "loading"
        if is_proven and is_machine:
            raise _Lost(f"failed with {what}") from error
        if isinstance(cause, ConfigError):
            raise cause from None
        raise FleetError(f"{seat.name}: {what}") from error


def _environment(threads: int) -> dict[str, str]:
    """What an actor's process needs before its first import."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, os.environ.get("PYTHONPATH", "")]
    return {
        **environment.variables(threads),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
