"""What the user sees while a run goes on: a live view on a terminal, plain lines elsewhere.

Knows metrics and what a fleet says of its replicas; knows nothing of where they come from.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from orchestrator.evaluate import told
from orchestrator.metrics import LOG_FILE, Evaluation, StepMetrics, Summary
from orchestrator.records import FleetState, ReplicaState

logger = logging.getLogger(__name__)
PLAIN_LINE_EVERY_S = 10.0
FLEET_LINE_EVERY_S = 60.0
MOST_LINES = 8  # replicas that are shown one by one
LIVE_PER_SECOND = 4.0
WATCHED_STEPS, MOST_BELOW_FLOOR = 20, 14  # one step's signal-to-noise says little
STYLES = {"computing": "green", "ready": "green", "empty": "red"}  # other states are on the way


class _StepsPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.2f} steps/s" if speed else "- steps/s")


class Display:
    """A run's face on a terminal."""

    def __init__(self, terminal: TextIO, num_steps: int) -> None:
        self._console = Console(file=terminal, highlight=False)
        self._num_steps = num_steps
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=20),
            TextColumn("loss {task.fields[loss]}  |g| {task.fields[gradient]}"),
            _StepsPerSecond(),
            TimeRemainingColumn(),
            TextColumn("left  held-out {task.fields[accuracy]}{task.fields[lost]}"),
            console=self._console,
        )
        self._bar = self._progress.add_task(
            "train",
            total=num_steps,
            start=False,
            visible=False,
            loss="-",
            gradient="-",
            accuracy="-",
            lost="",
        )
        self._state: Callable[[], FleetState] = FleetState  # of no replicas, until there are some
        self._last_plain = self._last_fleet_line = 0.0
        self._counts: Counter[str] = Counter()
        self._accuracy = "-"
        self._num_lost = 0
        self._below_floor: deque[bool] = deque(maxlen=WATCHED_STEPS)
        self._has_warned = False

    def say(self, text: str) -> None:
        """One line about what is going on; shown at once, and logged."""
        logger.info(text)
        self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def watch(self, state: Callable[[], FleetState]) -> None:
        """Show the replicas that `state` tells of from now on."""
        self._state = state

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show the live view within; on a terminal only."""
        if not self._console.is_terminal:
            yield
            return
        with Live(
            console=self._console,
            get_renderable=self._view,
            refresh_per_second=LIVE_PER_SECOND,
            redirect_stdout=False,  # what libraries print goes to the log
            redirect_stderr=False,
        ):
            yield

    def begin(self, next_step: int) -> None:
        """Training goes on from this step; what came before is not counted into its speed."""
        self._progress.update(self._bar, completed=next_step, visible=True)
        self._progress.start_task(self._bar)

    def _view(self) -> Group:
        """The fleet, and the step that it is at."""
        state = self._state()
        if len(state.replicas) > MOST_LINES:
            return Group(summary_line(state), self._progress)
        if state.replicas:
            return Group(table(state), self._progress)
        return Group(self._progress)

    def step(self, metrics: StepMetrics) -> None:
        loss, gradient = f"{metrics.loss:.4f}", f"{metrics.gradient:.2f}"
        done = metrics.step + 1
        self._progress.update(self._bar, completed=done, loss=loss, gradient=gradient)
        if metrics.num_dropped:
            self.say(f"step {done}: dropped {metrics.num_dropped} seeds whose loss was not finite")
        lost = self._count_lost(metrics)
        self._below_floor.append(metrics.is_below_floor)
        if sum(self._below_floor) > MOST_BELOW_FLOOR and not self._has_warned:
            self._has_warned = True
            self.say(
                f"step {done}: in {sum(self._below_floor)} of the last {len(self._below_floor)} "
                "steps losses differed by little more than a repeated loss does; raise "
                "estimator.eps or the precision of model.dtype (launch.py tune proposes an eps)"
            )
        if self._console.is_terminal:
            return
        now = time.monotonic()
        if now - self._last_plain > PLAIN_LINE_EVERY_S or done == self._num_steps:
            self._last_plain = now
            left = metrics.seconds * (self._num_steps - done)
            self._print(
                f"step {done}/{self._num_steps}  loss {loss}  |g| {gradient}  "
                f"{1 / metrics.seconds:.2f} steps/s  {left:.0f} s left  "
                f"held-out {self._accuracy}{lost}"
            )
            self._print_fleet(now)

    def _print_fleet(self, now: float) -> None:
        """A line about the replicas, where they are several: every minute, and when one has gone or
        come."""
        state = self._state()
        counts = counted(state)
        is_due = counts != self._counts or now - self._last_fleet_line > FLEET_LINE_EVERY_S
        if len(state.replicas) > 1 and is_due:
            self._counts, self._last_fleet_line = counts, now
            self._print(plain_line(state))

    def _count_lost(self, metrics: StepMetrics) -> str:
        """What the line tells of rewards that failed; the first of them are told at once."""
        if metrics.lost and not self._num_lost:
            kinds = ", ".join(f"{count} {kind}" for kind, count in metrics.lost.items())
            self.say(
                f"step {metrics.step + 1}: the reward failed at some samples ({kinds}); {LOG_FILE} "
                "tells of the first"
            )
        self._num_lost += sum((metrics.lost or {}).values())
        lost = f"  lost {self._num_lost:,}" if self._num_lost else ""
        self._progress.update(self._bar, lost=lost)
        return lost

    def evaluation(self, evaluation: Evaluation) -> None:
        self._accuracy = told(evaluation.metric, evaluation.accuracy)
        self._progress.update(self._bar, accuracy=self._accuracy)
        rows = "held-out" if evaluation.split == "test" else evaluation.split
        share = told(evaluation.metric, evaluation.accuracy, evaluation.interval)
        lost = f"; the reward failed at {evaluation.lost}" if evaluation.lost else ""
        self.say(
            f"after {evaluation.step} steps: {evaluation.metric} {share} on "
            f"{evaluation.num_examples} {rows} examples ({evaluation.seconds:.0f} s){lost}"
        )

    def result(self, summary: Summary, folder: Path) -> None:
        """The closing table."""
        metric = summary.metric
        table = Table(title=f"Held-out {metric}")
        table.add_column("")
        table.add_column(f"{metric} (95 % interval)", justify="right")
        table.add_column("examples", justify="right")
        examples = str(summary.num_held_out)
        if summary.baseline_accuracy is not None:
            share = told(metric, summary.baseline_accuracy, summary.baseline_interval)
            table.add_row("zero-shot", share, examples)
        share = told(metric, summary.final_accuracy, summary.final_interval)
        table.add_row(f"after {summary.steps} steps", share, examples)
        self._console.print(table)
        if summary.lost:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in summary.lost.items())
            self.say(f"samples at which the reward failed: {kinds}")
        if summary.best_step is not None and summary.best_dev is not None:
            self.say(
                f"best on dev rows: {told(metric, summary.best_dev)} after {summary.best_step} "
                f"steps; to evaluate or export that state, use --at best"
            )
        if summary.kv is not None and summary.kv.get("reused_share"):
            kv = summary.kv
            self.say(
                f"{kv['asked']:,} prompt tokens asked, {kv['computed']:,} computed: "
                f"{kv['reused_share']:.0%} reused ({kv['inside']:,} inside a forward, "
                f"{kv['across']:,} across forwards)"
            )
        self._tell_of_fleet(summary.fleet or {})
        speeds = ""
        if summary.evaluations_per_s is not None and summary.trained_tokens_per_s is not None:
            speeds = (
                f", {summary.evaluations_per_s:.2f} probes/s, "
                f"{summary.trained_tokens_per_s:.0f} tokens/s"
            )
        self.say(f"{summary.wall_s:.0f} s{speeds}\nrun folder: {folder}")

    def _tell_of_fleet(self, numbers: dict[str, Any]) -> None:
        """What a finished run tells of its replicas, where they were several."""
        probes = numbers.get("probes", {})
        if 1 < len(probes) <= MOST_LINES:
            total = sum(probes.values()) or 1
            shares = (f"{name} {number / total:.0%}" for name, number in probes.items())
            self.say(f"probes: {', '.join(shares)}")
        if numbers.get("copied") or numbers.get("requeued"):
            self.say(
                f"{numbers['copied']:,} probes were slow and computed once more; "
                f"{numbers['requeued']:,} were given to another replica, theirs being lost"
            )


def counted(state: FleetState) -> Counter[str]:
    """How many replicas are ready, be it with work or without, are loading, are lost, and so on."""
    names = {"computing": "ready", "writing": "ready", "empty": "lost"}
    return Counter(names.get(replica.state, replica.state) for replica in state.replicas)


def summary_line(state: FleetState) -> str:
    """A fleet in one line."""
    counts = (f"{number} {name}" for name, number in counted(state).most_common())
    return f"{len(state.replicas)} replicas: {', '.join(counts)}{_behind(state)}"


def plain_line(state: FleetState) -> str:
    """The same, with each replica and its share of the probes where they are few."""
    if len(state.replicas) > MOST_LINES:
        return summary_line(state)
    each = (
        f"{_number(replica)} {_state(replica)} {share:.0%}"
        for replica, share in zip(state.replicas, state.shares(), strict=True)
    )
    return f"{len(state.replicas)} replicas: {', '.join(each)}{_behind(state)}"


def table(state: FleetState) -> Table:
    """A line a replica."""
    shown = Table(box=None, pad_edge=False, header_style="dim")
    shown.add_column("replica")
    shown.add_column("state", min_width=len("catching up"))
    for title in ("probes", "share", "step", "s a probe"):
        shown.add_column(title, justify="right", min_width=7)
    for replica, share in zip(state.replicas, state.shares(), strict=True):
        shown.add_row(
            _number(replica),
            Text(_state(replica), STYLES.get(replica.state, "yellow")),
            f"{replica.num_probes:,}",
            f"{share:.0%}",
            f"{replica.num_applied:,}",
            "-" if replica.seconds is None else f"{replica.seconds:.3g}",
        )
    return shown


def _behind(state: FleetState) -> str:
    return f"; {state.lag} steps behind" if state.lag > 1 else ""


def _state(replica: ReplicaState) -> str:
    return "lost" if replica.state == "empty" else replica.state


def _number(replica: ReplicaState) -> str:
    return replica.name.removeprefix("replica ")
