"""The fleet as Ray actors: placement, environment, and how replicas are started, killed, replaced.

The only importer of ray. Only probes, updates, losses and digests travel. Knows nothing of how a
replica computes; who computes what, and when a call is given up, is `dispatch`'s to say.
"""

import logging
import math
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.util.metrics
import ray.util.scheduling_strategies

from orchestrator import dist_patch, environment, output, placement, reward_worker, run_log
from orchestrator.config import Config, ConfigError
from orchestrator.dispatch import Dispatcher, Limits, TaskLost, pause_before_attempt
from orchestrator.pieces import Pieces, joined
from orchestrator.records import (
    MARK_SIZE,
    ChunkScores,
    ExampleScore,
    FleetError,
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
from orchestrator.seats import Seat, Seats, State

logger = logging.getLogger(__name__)
Exporter = Callable[[str, str], Any]
MOST_PLACEMENTS = 4  # failures to make a process, or to load in it, some seconds apart
NEWS_S = 15.0  # between two messages about what is being waited for
# A seat's states before its actor is up, and what is then waited for.
ON_THE_WAY: dict[State, str] = {
    "loading": "to load the model",
    "replaying": "to replay the ledger",
    "catching up": "to catch up",
}
REPLAYED_AT_ONCE = 100  # updates: of the largest models a call's take minutes, not hours
NEWS_OF_DEATH_S = 10.0  # until Ray tells of a process that has died
LOOK_S = 3.0  # between two looks at the cluster's nodes
# What Ray says when a process or a node is gone, or a node could not start a process.
DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,  # a large answer stays on its node until it is read
    ray.exceptions.RuntimeEnvSetupError,
)
# Exceptions in a replica that are the machine's doing: memory that ran out or has changed, a GPU
# that fell off. By name, for torch's and those of modules that import it are not known here.
MACHINE_FAILURES = ("MemoryError", "OutOfMemoryError", "AcceleratorError", "StateError")


class ReplicaActor:
    """A replica in a process of its own, or a rank of one."""

    def __init__(self, fields: Mapping[str, str | int]) -> None:
        """`fields` are what its lines in the run's log tell."""
        run_log.note(**fields)
        run_log.begin()

    def meeting_place(self) -> str:
        """A fresh URL at which the ranks of this replica can meet; they are all on this node."""
        self._folder = tempfile.TemporaryDirectory(prefix="orchestrator-ranks-")
        return f"file://{self._folder.name}/rendezvous"

    def load(
        self,
        config: Config,
        device: str,
        log: Path,
        marks: bytes = b"",
        rank: int = 0,
        meeting_place: str = "",
    ) -> tuple[ReplicaInfo, int]:
        """Load everything; and how many updates are applied then, see `Replica`.

        Not in the constructor: Ray tells why a call failed, but not why a constructor did. All
        ranks must be loading for one to end."""
        # With its node's Ray, even if it hangs then: else its memory would never be given back.
        reward_worker.end_with(os.getppid())
        if log.parent.is_dir():  # another node may not have the run folder
            output.divert(log)
        with environment.importing():
            dist_patch.apply(device)
            # SGLang may be imported only after the patches, so not at this module's top.
            from orchestrator.replica import Replica
            from orchestrator.runner import World

        world = World(rank, config.fleet.tp_size, meeting_place)
        self._replica = Replica(config, device, world, marks)
        logger.info("the model is loaded")
        return self._replica.info, self._replica.num_applied

    def evaluate(self, updates: Sequence[StepUpdate], probes: Sequence[Probe]) -> list[ProbeLoss]:
        if probes:
            run_log.note(step=probes[0].step)
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

    def snapshot(self, updates: Sequence[StepUpdate], mark: bytes, digest: str) -> str:
        return self._replica.snapshot(updates, mark, digest)

    def export(self, updates: Sequence[StepUpdate], folder: Path) -> None:
        self._replica.export(updates, folder)


class _Lost(Exception):
    """A replica can compute nothing more."""


class ActorFleet:
    """Replicas as actors. Those that die, hang or differ are replaced while the others go on; an
    elastic fleet follows the nodes of its cluster."""

    def __init__(
        self,
        config: Config,
        log: Path,
        say: Callable[[str], None],
        limits: Limits = Limits(),  # noqa: B008 -- frozen
        pieces: Pieces | None = None,
    ) -> None:
        """`say` is told, in a sentence, what is being waited for and what became of replicas.

        `pieces` are those of the same config, and may be left out where batches are not cut.
        """
        self._config = config
        self._log = log
        self._say = say
        self._limits = limits
        self._seats = Seats()
        self._pieces = pieces or Pieces(config)
        self._updates = UpdateLog()
        self._dispatcher = Dispatcher(limits, time.monotonic, config.fleet.min_replicas)
        self._info: ReplicaInfo | None = None
        self._pending: dict[Any, Seat] = {}  # calls that are not answered, one a rank
        self._answers: dict[int, Any] = {}
        self._proven: set[str] = set()  # kinds of tasks that some replica has answered
        self._has_started = self._is_paused = False
        self._rehearsal: Callable[[Seat], None] | None = None
        self._room, self._last_look = 0, 0.0
        self._last_loss = ""
        self._is_told_of_snapshots = False  # that they cannot be written
        self._reason = ""  # what a round is for, if the user is to be told
        self._last_news = 0.0

    # ---------------------------------------------------------------- life

    def start(self) -> ReplicaInfo:
        """Place the actors and wait until fleet.min_replicas of them have loaded the model.

        Raises what is wrong with the recipe as the replica told it. One that dies while it loads
        is tried again later, see `_cannot_start`.
        """
        self._connect()
        device = self._device()
        fleet = self._config.fleet
        self._needs = placement.Needs.of(fleet, device)
        self._actor_options = {
            "num_cpus": self._needs.cpus,
            "num_gpus": self._needs.gpus,
            "runtime_env": {"env_vars": _environment(fleet.threads_per_replica)},
        }
        self._load_arguments = (self._config, device, self._log)
        nodes = _nodes()
        placement.check(fleet, self._needs, nodes)
        if fleet.is_elastic:
            self._say(f"the cluster has room for {_some(self._needs.room(nodes))}")
        self._last_news = time.monotonic()
        self._resize(nodes)
        while self._dispatcher.is_short:
            if self._cannot_start():
                raise self._too_few_left()
            self._attend()
        assert self._info is not None  # a replica is up
        self._has_started = True
        return self._info

    def _cannot_start(self) -> bool:
        """Whether too few seats are left that may come up: before any has, those that have not
        failed yet; then those that have not again and again, for what they load can be loaded."""
        if self._info is None:
            return len(self._seats) > 0 and all(map(_has_failed_to_start, self._seats))
        hopeful = [
            seat for seat in self._seats if seat.state == "ready" or seat.failures < MOST_PLACEMENTS
        ]
        return len(hopeful) < self._config.fleet.min_replicas <= len(self._seats)

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
        wanted = max(number * fleet.threads_per_replica * fleet.tp_size, os.cpu_count() or 1)
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

    # ---------------------------------------------------------------- work

    def apply(self, update: StepUpdate) -> None:
        self._updates.append(update)

    def evaluate(self, probes: Sequence[Probe]) -> list[ProbeLoss]:
        size = self._config.space.probes_per_group
        size *= self._dispatcher.together("evaluate", math.ceil(len(probes) / size), size)
        work = self._pieces.assignments(probes, size)
        losses = self._shared(
            "evaluate",
            [assignment.size for assignment in work],
            lambda seat, task: self._call(seat, "evaluate", work[task].probes),
            self._pieces.homes(work),
        )
        return joined(work, losses)

    def score(
        self, split: Split, examples: Sequence[int], *, calibrated: bool = False
    ) -> list[ChunkScores]:
        chunks = example_chunks(examples)
        return self._shared(
            "score, calibrated" if calibrated else "score",
            [len(chunk) for chunk in chunks],
            lambda seat, task: self._call(seat, "score", split, chunks[task], calibrated),
        )

    def linear_probe(self) -> list[ExampleScore]:
        return self._shared("linear probe", [1], lambda seat, _: self._call(seat, "linear_probe"))

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
        while any(
            seat.state != "ready" and seat.failures == 1 and seat in self._seats for seat in rebuilt
        ):
            self._attend()
        return self._digests()

    def _digests(self) -> dict[str, str]:
        return self._each(
            "digest",
            lambda seat: self._call(seat, "digest"),
            "to catch up and compute its digest",
        )

    def export(self, folder: Path) -> None:
        self._each(
            "export",
            lambda seat: self._call(seat, "export", folder),
            "to replay the ledger and write the model",
        )

    def snapshot(self, digest: str) -> None:
        """A replica writes while the others go on. None does while another still writes."""
        if self._seats.of("writing"):
            return
        while (number := self._dispatcher.lend()) is None:
            self._attend()
        seat = self._seats[number]
        seat.enter("writing", time.monotonic())
        self._call(seat, "snapshot", self._updates.marks[-MARK_SIZE:], digest)

    def state(self) -> FleetState:
        work = self._dispatcher.work["evaluate"]
        return FleetState(
            tuple(
                ReplicaState(
                    seat.name,
                    "computing" if seat.state == "ready" and seat.calls else seat.state,
                    num_probes=round(work.done[seat.number]),
                    num_applied=seat.num_confirmed,
                    seconds=work.seconds.get(seat.number),
                )
                for seat in self._seats
            ),
            len(self._updates),
            round(work.num_copied),
            round(work.num_requeued),
        )

    def _call(self, seat: Seat, method: str, *arguments: Any, upto: int | None = None) -> None:
        """Ask all ranks of a replica, with the updates that it has not been sent: all, or those
        before the `upto`-th."""
        missing = self._updates[seat.num_applied : upto]
        seat.num_applied += len(missing)
        self._ask(
            seat, [getattr(actor, method).remote(missing, *arguments) for actor in seat.actors]
        )

    def _ask(self, seat: Seat, references: Sequence[Any]) -> None:
        """Wait for the answers to a call, by rank."""
        seat.ask(references)
        self._pending.update(dict.fromkeys(references, seat))

    def _shared(
        self,
        kind: str,
        sizes: Sequence[float],
        call: Callable[[Seat, int], None],
        homes: Sequence[int] | None = None,
    ) -> list[Any]:
        """Tasks on whichever replicas are free; answers, which are lists, joined in their order."""
        self._dispatcher.begin(kind, sizes, homes)
        self._rehearsal = lambda seat: call(seat, 0)
        self._finish(kind, call)
        self._rehearsal = None
        return [answer for task in range(len(sizes)) for answer in self._answers[task]]

    def _each(self, kind: str, call: Callable[[Seat], None], reason: str) -> dict[str, Any]:
        """One answer of every replica that is up and stays so; of one at least. The user is told
        what is waited for and why."""
        while True:
            names = [self._seats[number].name for number in self._dispatcher.begin_each(kind)]
            self._finish(kind, lambda seat, _: call(seat), reason)
            if self._answers:
                return {names[task]: self._answers[task] for task in sorted(self._answers)}
            self._attend()

    def _finish(self, kind: str, call: Callable[[Seat, int], None], reason: str = "") -> None:
        """See the round through that the dispatcher has begun."""
        self._answers, self._reason = {}, reason
        self._last_news = time.monotonic()
        while not self._dispatcher.is_done:
            for number, task in self._dispatcher.assign():
                seat = self._seats[number]
                seat.kind = kind
                call(seat, task)
            self._attend()

    # ---------------------------------------------------------------- replicas come and go

    def _attend(self) -> None:
        """Sleep until something has happened, and see to it. Whoever is free has been given work
        before, so that what is done here costs a step nothing."""
        self._look()
        for reference in _ready(list(self._pending), self._dispatcher.pause()):
            if reference not in self._pending:  # of a replica that was given up just now
                continue
            seat = self._pending.pop(reference)
            try:
                answer = _result(seat, reference, self._is_proven(seat))
                for each in seat.hear(reference, answer):
                    self._take(seat, each)
            except _Lost as error:
                self._lose(seat, error)
        for number in self._dispatcher.overdue():
            self._lose(self._seats[number], _Lost("did not answer in time"))
        now = time.monotonic()
        for seat in self._seats.of(*ON_THE_WAY, "writing"):
            if now - seat.since > self._limits.first_call_s:
                self._lose(seat, _Lost(f"was not done {seat.state} in time"))
        for seat in self._seats.of("empty"):
            if now - seat.since >= pause_before_attempt(seat.failures):
                self._place(seat)
        if self._has_started:
            self._tell_of_pauses()
            is_loading = bool(self._seats.of(*ON_THE_WAY))
            if self._dispatcher.is_hopeless(is_loading=is_loading):
                raise self._too_few_left()
        if now - self._last_news >= NEWS_S:
            self._last_news = now
            self._tell_what_is_awaited()

    def _is_proven(self, seat: Seat) -> bool:
        """Whether what the seat's actor is doing is known to succeed where nothing is broken."""
        return seat.kind in self._proven if seat.state == "ready" else self._has_started

    def _take(self, seat: Seat, answer: Any) -> None:
        """What an actor has answered, be it a task's or one on the way to its first."""
        if seat.state == "placing":
            seat.enter("loading", time.monotonic())
            calls = [
                actor.load.remote(*self._load_arguments, self._updates.marks, rank, answer)
                for rank, actor in enumerate(seat.actors)
            ]
            self._ask(seat, calls)
        elif seat.state == "loading":
            info, seat.num_applied = answer
            seat.num_confirmed = seat.num_applied
            if self._info is None:
                self._info = info
            elif info != self._info:
                difference = f"differs from the others: {info}, {self._info}"
                if not self._has_started:
                    raise FleetError(f"{seat.name} {difference}")
                raise _Lost(difference)
            if seat.num_applied:
                self._say(f"{seat.name} starts from the snapshot of step {seat.num_applied}")
            self._catch_up(seat)
        elif seat.state == "replaying":
            self._catch_up(seat)
        elif seat.state == "catching up":
            self._join(seat)
        elif seat.state == "writing":
            seat.enter("ready", time.monotonic())
            self._dispatcher.give_back(seat.number)
            if answer and not self._is_told_of_snapshots:
                self._is_told_of_snapshots = True
                self._say(f"{answer}; the run goes on without")
        else:
            seat.failures = 0
            self._proven.add(seat.kind)
            task = self._dispatcher.answered(seat.number)
            if task is not None:
                self._answers[task] = answer

    def _place(self, seat: Seat) -> None:
        """Ask for actors, which will stand at the base model, or at a snapshot, and are then sent
        the updates that follow.

        Several ranks are placed on one node, or not at all.
        """
        ranks = range(self._needs.ranks)
        options: list[dict[str, Any]] = [{}]
        if len(ranks) > 1:
            bundle = {"CPU": self._needs.cpus, "GPU": self._needs.gpus}
            bundle = {name: amount for name, amount in bundle.items() if amount}
            seat.group = ray.util.placement_group([bundle for _ in ranks], strategy="STRICT_PACK")
            options = [{"scheduling_strategy": _in_group(seat.group, rank)} for rank in ranks]
        create, fields = ray.remote(ReplicaActor), {**run_log.fields(), "replica": seat.number}
        seat.actors = [
            create.options(**self._actor_options, **each).remote(fields) for each in options
        ]
        seat.num_applied = seat.num_confirmed = 0
        seat.enter("placing", time.monotonic())
        others = [actor.__ray_ready__.remote() for actor in seat.actors[1:]]
        self._ask(seat, [seat.actor.meeting_place.remote(), *others])

    def _catch_up(self, seat: Seat) -> None:
        """Bring a replica to where the others are before it is given work, which would wait for
        it: all updates, many of them in several calls, for each of which it has its time; with
        the last the task that the others are at, so that it compiles and captures what that
        takes. Its answer is dropped."""
        missing = len(self._updates) - seat.num_applied
        if missing > REPLAYED_AT_ONCE:
            seat.enter("replaying", time.monotonic())
            self._call(seat, "evaluate", [], upto=seat.num_applied + REPLAYED_AT_ONCE)
        elif self._rehearsal is not None:
            seat.enter("catching up", time.monotonic())
            self._rehearsal(seat)
        elif missing:
            seat.enter("catching up", time.monotonic())
            self._call(seat, "evaluate", [])
        else:
            self._join(seat)

    def _join(self, seat: Seat) -> None:
        seat.enter("ready", time.monotonic())
        self._dispatcher.join(seat.number)

    def _look(self) -> None:
        """Every few seconds an elastic fleet sees which nodes there are."""
        now = time.monotonic()
        if self._config.fleet.is_elastic and now - self._last_look >= LOOK_S:
            self._last_look = now
            self._resize(_nodes())

    def _resize(self, nodes: Sequence[placement.Node]) -> None:
        """Open as many seats as there are to be, and let go of those that wait in vain."""
        self._room = self._needs.room(nodes)
        number = placement.wanted(self._config.fleet, self._room, has_started=self._has_started)
        opened, gone = self._seats.resize(number)
        for seat in opened:
            self._place(seat)
        for seat in gone:
            self._dismiss(seat)
        if self._has_started and (opened or gone):
            does = "starting" if opened else "letting go of"
            names = ", ".join(seat.name for seat in opened or gone)
            self._say(f"the cluster has room for {_some(self._room)}; {does} {names}")

    def _dismiss(self, seat: Seat) -> None:
        """End a seat's actors, dead or not, and what they were asked."""
        for actor in seat.actors:
            ray.kill(actor)
        if seat.group is not None:
            ray.util.remove_placement_group(seat.group)
        seat.actors, seat.group = [], None
        seat.calls.clear()
        self._pending = {call: other for call, other in self._pending.items() if other is not seat}

    def _lose(self, seat: Seat, reason: _Lost) -> None:
        """Give a replica up, dead or not, and have it replaced; it held nothing that is lost."""
        logger.warning("%s %s while %s: %s", seat.name, reason, seat.state, reason.__cause__)
        self._last_loss = f"{seat.name} {reason}"
        was_ready = seat.state in ("ready", "writing")
        seat.was_placed = seat.state != "placing"
        self._dismiss(seat)
        seat.enter("empty", time.monotonic())
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
        if self._has_started and not self._dispatcher.is_short:
            computing = {seat.name for seat in self._pending.values() if seat.state == "ready"}
            if self._reason and computing:
                self._say(f"waiting for {', '.join(sorted(computing))} {self._reason}")
            return
        is_elastic = self._config.fleet.is_elastic
        if is_elastic and (self._dispatcher.replicas or not len(self._seats)):
            self._say(
                f"waiting, with {_some(len(self._dispatcher.replicas))}, for fleet.min_replicas, "
                f"{self._config.fleet.min_replicas}; the cluster has room for {_some(self._room)}"
            )
        for state, reason in (("placing", _free_resources()), *ON_THE_WAY.items()):
            names = [seat.name for seat in self._seats if seat.state == state]
            if names:
                self._say(f"waiting for {', '.join(names)} {reason}")

    def _tell_of_pauses(self) -> None:
        if self._dispatcher.is_short == self._is_paused:
            return
        self._is_paused = self._dispatcher.is_short
        up = _some(len(self._dispatcher.replicas))
        if self._is_paused:
            least = self._config.fleet.min_replicas
            self._say(f"the run pauses with {up}: fleet.min_replicas is {least}")
        else:
            self._say(f"the run goes on with {up}")

    def _too_few_left(self) -> FleetError:
        number, least = len(self._dispatcher.replicas), self._config.fleet.min_replicas
        what = f"{_some(number)} {'are' if number > 1 else 'is'} left"
        if least > 1:
            what += f", and fleet.min_replicas is {least}"
        return FleetError(f"{self._last_loss}, and {what}; see {self._log}")


def exporters(run: str) -> tuple[Exporter, Exporter]:
    """What makes a gauge, and what makes a counter, of a name and a description. Ray's agent on
    this node exports them, tagged with the run's name."""

    def of(kind: type[Any]) -> Exporter:
        return lambda name, description: kind(name, description, ("run",)).set_default_tags(
            {"run": run}
        )

    return of(ray.util.metrics.Gauge), of(ray.util.metrics.Counter)


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


def _nodes() -> list[placement.Node]:
    """What each node of the cluster has in all."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _some(number: int) -> str:
    return f"{number or 'no'} replica{'s' * (number > 1)}"


def _in_group(group: Any, rank: int) -> Any:
    return ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
        placement_group=group, placement_group_bundle_index=rank
    )


def _has_failed_to_start(seat: Seat) -> bool:
    """Whether a replica that has never answered will not: its process has died of what it loads,
    or the machines have failed again and again to make one."""
    return seat.failures >= (1 if seat.was_placed else MOST_PLACEMENTS)


def _free_resources() -> str:
    free = ray.available_resources()
    return (
        f"to find a place in the cluster, which has {free.get('CPU', 0):.0f} CPUs and "
        f"{free.get('GPU', 0):.0f} GPUs free"
    )


def _result(seat: Seat, reference: Any, is_proven: bool) -> Any:
    """A call's answer. Raises _Lost if the replica's process or machine failed.

    What else went wrong in the replica is told as it was there. So is memory that runs out, unless
    the call `is_proven`, for that may be the recipe's doing. To load is proven once a fleet has.
    """
    try:
        return ray.get(reference)
    except DEATHS as error:
        raise _Lost("died") from error
    except ray.exceptions.RayTaskError as error:
        ranks = seat.call_of(reference).references
        if _has_died([each for each in ranks if each != reference]):
            raise _Lost("died") from error  # what one rank says of another's death
        cause = error.cause or error
        what = f"{type(cause).__name__}: {cause}"
        is_machine = type(cause).__name__ in MACHINE_FAILURES or seat.state in ON_THE_WAY
        if is_proven and is_machine:
            raise _Lost(f"failed with {what}") from error
        if isinstance(cause, ConfigError):
            raise cause from None
        raise FleetError(f"{seat.name}: {what}") from error


def _has_died(references: list[Any]) -> bool:
    """Whether one of other ranks' processes is gone. One that computes is not waited for long."""
    if not references:
        return False
    ended, _ = ray.wait(references, num_returns=len(references), timeout=NEWS_OF_DEATH_S)
    for reference in ended:
        try:
            ray.get(reference)
        except DEATHS:
            return True
        except ray.exceptions.RayTaskError:
            pass
    return False


def _environment(threads: int) -> dict[str, str]:
    """What an actor's process needs before its first import."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, os.environ.get("PYTHONPATH", "")]
    return {
        **environment.variables(threads),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
