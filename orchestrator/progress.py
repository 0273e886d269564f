"""What the user sees while a run goes on: a live line on a terminal, plain lines elsewhere.

Knows metrics; knows nothing of where they come from.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from orchestrator.evaluate import told
from orchestrator.metrics import LOG_FILE, Evaluation, StepMetrics, Summary

PLAIN_LINE_EVERY_S = 10.0
WATCHED_STEPS, MOST_BELOW_FLOOR = 20, 14  # one step's signal-to-noise says little


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
            "train", total=num_steps, start=False, loss="-", gradient="-", accuracy="-", lost=""
        )
        self._last_plain = 0.0
        self._accuracy = "-"
        self._num_lost = 0
        self._below_floor: deque[bool] = deque(maxlen=WATCHED_STEPS)
        self._has_warned = False

    def say(self, text: str) -> None:
        """One line about what is going on; shown at once."""
        self._console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def live(self, next_step: int) -> Iterator[None]:
        """Show the live line within; on a terminal only."""
        self._progress.update(self._bar, completed=next_step)
        self._progress.start_task(self._bar)
        if not self._console.is_terminal:
            yield
            return
        with self._progress:
            yield

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
            self.say(
                f"step {done}/{self._num_steps}  loss {loss}  |g| {gradient}  "
                f"{1 / metrics.seconds:.2f} steps/s  {left:.0f} s left  "
                f"held-out {self._accuracy}{lost}"
            )

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
        if summary.kv is not None and summary.kv["reused_share"]:
            kv = summary.kv
            self.say(
                f"{kv['asked']:,} prompt tokens asked, {kv['computed']:,} computed: "
                f"{kv['reused_share']:.0%} reused ({kv['inside']:,} inside a forward, "
                f"{kv['across']:,} across forwards)"
            )
        self.say(
            f"{summary.wall_s:.0f} s, {summary.evaluations_per_s:.2f} probes/s, "
            f"{summary.trained_tokens_per_s:.0f} tokens/s\nrun folder: {folder}"
        )
