"""What a run writes down beside its ledger: metrics.jsonl, TensorBoard events, summary.json.

Owns the run folder's names. Nothing here is needed to resume: the ledger alone decides.
"""

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field, TypeAdapter, ValidationError
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary as EventSummary
from tensorboard.summary.writer.record_writer import RecordWriter

from orchestrator import strict_json, whole_file

CONFIG_FILE = "config.yaml"
LEDGER_FILE = "ledger.jsonl"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
LOG_FILE = "log.txt"
LONGEST_LINE = 1 << 20  # bytes; more is no line of ours, and is not read into memory
DEV_EVALUATION = "dev_evaluation"  # kind of a line; "evaluation" is of test rows


@dataclass(frozen=True, slots=True)
class KvUse:
    """Tokens of probes' sequences, and where their keys and values came from."""

    asked: int = 0
    """All, had every sequence been computed whole."""
    computed: int = 0
    """Those that went through the model."""
    across: int = 0
    """Those that an earlier forward had left in the cache, under the same weights."""

    @property
    def inside(self) -> int:
        """Those that another sequence of the same forward computed."""
        return self.asked - self.computed - self.across

    @property
    def reused_share(self) -> float:
        return 1 - self.computed / self.asked if self.asked else 0.0

    def __add__(self, other: "KvUse") -> "KvUse":
        return KvUse(
            self.asked + other.asked, self.computed + other.computed, self.across + other.across
        )

    def numbers(self) -> dict[str, float]:
        """As it is written down."""
        return {
            **asdict(self),
            "inside": self.inside,
            "reused_share": self.reused_share,
        }


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """A step that was taken."""

    step: int
    loss: float
    """Mean over the step's finite losses."""
    gradient: float
    """Mean of |g| over the step's seeds."""
    lr: float
    num_dropped: int
    num_probes: int
    num_tokens: int
    seconds: float
    signal_to_noise: float | None = None
    """Of the step's slopes, against the loss's own noise (`noise_floor`): below 1 the step is
    mostly noise. None where it is not known."""
    lost: dict[str, int] | None = None
    """With a reward: how many of the step's samples failed, by kind; kinds that did not occur are
    left out."""
    kv: KvUse = KvUse()

    @property
    def is_below_floor(self) -> bool:
        return self.signal_to_noise is not None and self.signal_to_noise < 1


Interval = tuple[float, float]
"""The ends of a 95 % interval."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A look at held-out examples, after `step` steps."""

    step: int
    accuracy: float
    """The mean of `metric`, whichever that is."""
    num_examples: Annotated[int, Field(ge=1)]
    seconds: float
    metric: str = "accuracy"
    interval: Interval | None = None
    split: str = "test"
    lost: int = 0
    """Examples at which the reward failed."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run came to."""

    steps: int
    wall_s: float
    """Of this process, from the fleet's start to the last evaluation; less than the run's whole
    time if it was resumed."""
    evaluations_per_s: float | None
    """Probes a second, while stepping; None for a process that took no step."""
    trained_tokens_per_s: float | None
    """Tokens that went through the model for probes, a second, while stepping."""
    baseline_accuracy: float | None
    final_accuracy: float
    num_held_out: Annotated[int, Field(ge=1)]
    digest: str
    versions: dict[str, str]
    metric: str = "accuracy"
    """What the two accuracies are the mean of."""
    baseline_interval: Interval | None = None
    final_interval: Interval | None = None
    best_step: int | None = None
    """With dev rows: after so many steps their metric was best; `--at best`."""
    best_dev: float | None = None
    """Its mean over the dev rows then."""
    lost: dict[str, int] | None = None
    """With a reward: how many samples of all steps failed, by kind."""
    kv: dict[str, int | float] | None = None
    """`KvUse.numbers` of all probes, while stepping."""
    fleet: dict[str, Any] | None = None
    """`FleetState.numbers` of this process: who computed how many probes."""


# Files may be of an earlier version, of another program, or damaged.
EVALUATIONS, SUMMARIES = TypeAdapter(Evaluation), TypeAdapter(Summary)


def _required(kind: type[StepMetrics] | type[Evaluation]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind) if field.default is MISSING)


NUMBERS = {
    "step": _required(StepMetrics),
    "evaluation": _required(Evaluation),
    DEV_EVALUATION: _required(Evaluation),
}
"""What every line of a kind holds; later versions may add to it."""
UNDEFINED = ("loss", "gradient")  # null where no loss of a step was finite


class Observer(Protocol):
    """Who is told what happens during a run."""

    def step(self, metrics: StepMetrics) -> None: ...

    def evaluation(self, evaluation: Evaluation) -> None: ...


class Records:
    """Writes a run's metrics as they come."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        path = folder / METRICS_FILE
        is_torn = _last_byte(path) not in (b"", b"\n")
        self._metrics = path.open("a", encoding="utf-8")
        if is_torn:  # a crash cut the last line short; the next must not become part of it
            self._metrics.write("\n")
        self._events = _Events(folder)

    def step(self, metrics: StepMetrics) -> None:
        more = {"below_floor": metrics.is_below_floor, "kv": metrics.kv.numbers()}
        self._write("step", {**asdict(metrics), **more})
        values = {
            "train/loss": metrics.loss,
            "train/projected_gradient": metrics.gradient,
            "train/lr": metrics.lr,
            "speed/probes_per_s": metrics.num_probes / metrics.seconds,
            "speed/kv_reused_share": metrics.kv.reused_share,
        }
        if metrics.signal_to_noise is not None:
            values["train/signal_to_noise"] = metrics.signal_to_noise
        if metrics.lost is not None:
            values["train/lost_samples"] = sum(metrics.lost.values())
        self._draw(metrics.step, values)

    def evaluation(self, evaluation: Evaluation) -> None:
        is_test = evaluation.split == "test"
        self._write("evaluation" if is_test else DEV_EVALUATION, asdict(evaluation))
        tag = f"{'held_out' if is_test else evaluation.split}/{evaluation.metric}"
        self._draw(evaluation.step, {tag: evaluation.accuracy})

    def summary(self, summary: Summary) -> None:
        """Write it whole or not at all, since a run that has one is finished."""
        text = strict_json.text(asdict(summary), indent=2)
        whole_file.write(self._folder / SUMMARY_FILE, text + "\n")

    def close(self) -> None:
        self._metrics.close()
        self._events.close()

    def _write(self, kind: str, fields: dict[str, Any]) -> None:
        self._metrics.write(strict_json.text({"kind": kind, **fields}) + "\n")
        self._metrics.flush()

    def _draw(self, step: int, values: dict[str, float]) -> None:
        drawn = [EventSummary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._events.write(step=step, summary=EventSummary(value=drawn))


class _Events:
    """A file of TensorBoard's, each event in it at once.

    TensorBoard's own writer hands events to a thread, for which a run that is interrupted in the
    middle of that may wait for ever.
    """

    def __init__(self, folder: Path) -> None:
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.0"
        self._file = (folder / name).open("ab", buffering=0)
        self._records = RecordWriter(self._file)
        self.write(file_version="brain.Event:2")

    def write(self, **fields: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def close(self) -> None:
        self._file.close()


def _last_byte(path: Path) -> bytes:
    """Empty where there is none."""
    if not path.is_file() or not path.stat().st_size:
        return b""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)


def entries(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl in their order, but for those that a crash cut short, and those
    that lack a number of their kind's; null is the loss of a step of which no loss was finite.

    A resumed run may have noted a step or an evaluation twice; the later entry holds.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        return
    with path.open("rb") as file:
        while line := file.readline(LONGEST_LINE):
            try:
                entry = json.loads(line.decode(errors="replace"))
            except (ValueError, RecursionError):
                continue
            if _is_whole(entry):
                yield entry


def _is_whole(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    kind, step = entry.get("kind"), entry.get("step")
    if not isinstance(kind, str) or type(step) is not int:
        return False
    return all(
        type(entry.get(name)) in (int, float) or (name in UNDEFINED and entry.get(name, 0) is None)
        for name in NUMBERS.get(kind, ())
    )


def fork(folder: Path, new_folder: Path, step: int, *, same_data: bool) -> None:
    """Give a fork what its parent noted up to `step`; evaluations only if the rows are the same."""
    with (new_folder / METRICS_FILE).open("w", encoding="utf-8") as file:
        for entry in entries(folder):
            is_step = entry["kind"] == "step"
            is_before = entry["step"] < step + (not is_step)  # looks are counted in steps done
            if is_before and (is_step or same_data):
                file.write(strict_json.text(entry) + "\n")


def baseline(looks: Iterable[Evaluation]) -> Evaluation | None:
    """Of a run's looks that at test rows before its first step, the last of several; None of
    none."""
    found = [look for look in looks if look.split == "test" and look.step == 0]
    return found[-1] if found else None


def evaluations(folder: Path) -> Iterator[Evaluation]:
    """What a run noted of its looks at test and dev rows."""
    for entry in entries(folder):
        if entry["kind"] in ("evaluation", DEV_EVALUATION):
            with suppress(ValidationError):  # of another program, or damaged
                yield evaluation(entry)


def evaluation(entry: dict[str, Any]) -> Evaluation:
    """What a line tells of a look; an earlier version's may lack what has a default."""
    return EVALUATIONS.validate_python(entry)


def best(looks: Iterable[Evaluation]) -> Evaluation | None:
    """Of looks at dev rows the one with the largest mean, the earliest of several; None of none.

    Of a step that was looked at twice the later look counts; of looks of different sizes, since
    a mean of few rows is large by chance, those at the most rows.
    """
    latest = {look.step: look for look in looks if look.split == "dev"}
    most = max((look.num_examples for look in latest.values()), default=0)
    order = [latest[step] for step in sorted(latest) if latest[step].num_examples == most]
    return max(order, key=lambda look: look.accuracy, default=None)


def lost_in(entry: dict[str, Any]) -> dict[str, int] | None:
    """How many samples a reward failed at in a step, by kind; None where it is not noted."""
    counts = entry.get("lost")
    if not isinstance(counts, dict) or any(type(count) is not int for count in counts.values()):
        return None
    return counts


def lost(folder: Path) -> dict[str, int] | None:
    """How many samples a reward failed at in all steps, by kind; None for a run without one."""
    noted = {
        entry["step"]: counts
        for entry in entries(folder)
        if entry["kind"] == "step" and (counts := lost_in(entry)) is not None
    }
    if not noted:
        return None
    kinds = sorted(set().union(*noted.values()))
    return {kind: sum(each.get(kind, 0) for each in noted.values()) for kind in kinds}


def read_summary(folder: Path) -> Summary | None:
    """What a finished run came to; None for one that has no summary, or none that can be read."""
    try:
        with (folder / SUMMARY_FILE).open("rb") as file:
            return SUMMARIES.validate_json(file.read(LONGEST_LINE))
    except (OSError, ValidationError):
        return None
