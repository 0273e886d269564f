"""A run from its recipe to its result: what each verb of the command line does.

Wires folder, fleet, ledger, records and display. Knows no tensors and no algorithm: the driver has
that.
"""

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from orchestrator import estimator, fleets, metrics, output, rewards, run_folder, run_log
from orchestrator.batches import Batches
from orchestrator.config import ConfigError
from orchestrator.driver import Driver
from orchestrator.evaluate import measured, scores_of, share_computed, write_scores
from orchestrator.metrics import Evaluation, KvUse, Records, StepMetrics, Summary
from orchestrator.progress import Display
from orchestrator.records import Fleet, ReplicaInfo, Split, StepUpdate
from orchestrator.run_folder import Run
from orchestrator.seed_sync import Ledger

At = int | Literal["best"]
"""A state of a run: after so many steps, or the best by dev rows."""


# -------------------------------------------------------------------- verbs


def train(run: Run) -> None:
    """Take the run to its last step; the held-out metric before and after goes to the user."""
    steps = run.config.run.steps
    _check_reward(run)
    with run_folder.locked(run):
        summary = run.summary()
        if summary is not None:
            display = Display(output.terminal(), steps)
            display.say(f"all {steps} steps are done; nothing is left to do")
            display.result(summary, run.folder)
        else:
            _train(run, _display(run, run.log_path))


def _train(run: Run, display: Display) -> None:
    started = time.monotonic()
    steps, num_held_out = run.config.run.steps, len(run.data.test)
    with (
        display.live(),
        fleets.started(run, run.log_path, display.say, _past(run), watch=display.watch) as (
            fleet,
            info,
        ),
        run_folder.opened_ledger(run, info, display.say) as ledger,
        _closing(Records(run.folder)) as records,
        fleets.monitored(run, fleet) as monitors,
    ):
        speed, looks = Speed(), Looks(run.folder, ledger.next_step)
        driver = Driver(
            run.config,
            fleet,
            ledger,
            [records, display, speed, looks, *monitors],
            batches=_batches(run),
            num_test=num_held_out,
            num_dev=len(run.data.dev),
        )
        for sentence in estimator.notes(run.config.estimator, steps):
            display.say(sentence)
        if ledger.next_step:
            display.say(f"replaying {ledger.next_step} steps ...")
            driver.check_digests()
            baseline = metrics.baseline(looks.all)
            split: Split = "dev" if run.data.dev else "test"
            is_over = ledger.next_step == steps
            if not is_over and looks.is_missing(run.config.run.eval_every, split):
                driver.look(ledger.next_step)
        else:
            metric = run.config.task.metric
            display.say(f"zero-shot {metric} on {num_held_out} held-out examples ...")
            baseline = driver.evaluate(0)
            if run.data.dev:
                driver.look(0)
        display.begin(ledger.next_step)
        driver.train()
        if run.data.dev:
            driver.look(steps)
        final = driver.evaluate(steps)
        best = metrics.best(looks.all)
        summary = Summary(
            steps=steps,
            wall_s=time.monotonic() - started,
            evaluations_per_s=speed.per_second(speed.num_probes),
            trained_tokens_per_s=speed.per_second(speed.num_tokens),
            baseline_accuracy=baseline.accuracy if baseline else None,
            final_accuracy=final.accuracy,
            num_held_out=num_held_out,
            digest=driver.check_digests(),
            versions=dict(info.versions),
            metric=final.metric,
            baseline_interval=baseline.interval if baseline else None,
            final_interval=final.interval,
            best_step=best.step if best else None,
            best_dev=best.accuracy if best else None,
            lost=metrics.lost(run.folder),
            kv=speed.kv.numbers() if speed.num_probes else None,
            fleet=fleet.state().numbers(),
        )
        records.summary(summary)
    display.result(summary, run.folder)


def evaluate(
    run: Run,
    out: Path,
    *,
    trained: bool,
    at: At | None = None,
    calibrated: bool = False,
    linear_probe: bool = False,
) -> None:
    """Score all held-out examples, under the base model or the run's trained state.

    That is the ledger's last, or that after `at` steps, or that which dev rows chose. With
    `linear_probe` a regression on its hidden states chooses; one replica fits it.
    """
    _check_evaluation(run, out, calibrated=calibrated, linear_probe=linear_probe)
    if at is not None and not trained:
        raise ConfigError(f"--at: {at}: a recipe has no steps yet; name a run folder")
    if linear_probe:
        run = fleets.with_one_replica(run)
    num_steps = _num_steps(run, at) if trained else 0
    log = out.with_suffix(".log")
    display = _display(run, log)
    past = _past(run, num_steps) if trained else ()
    with fleets.started(run, log.absolute(), display.say, past) as (fleet, info):
        if trained:
            _replay(run, info, fleet, num_steps)
        if linear_probe:
            chunks, scores = [], fleet.linear_probe()
        else:
            chunks = fleet.score("test", range(len(run.data.test)), calibrated=calibrated)
            scores = scores_of(chunks)
    write_scores(out, scores)
    state = f"after {num_steps} steps" if trained else "base model"
    task = run.config.task
    if task.demonstrations:
        state += f", {task.demonstrations} demonstrations"
    found = measured(task.metric, scores)
    name = f"calibrated {found.metric}" if calibrated else found.metric
    if linear_probe:
        name = f"linear probe of {len(run.data.train)} training rows, {name}"
    lost = f"; the reward failed at {found.lost}, see {log}" if found.lost else ""
    display.say(f"{state}: {name} {found} on {found.num_examples} held-out examples{lost}")
    if chunks and task.demonstrations:
        computed, asked = share_computed(chunks)
        display.say(
            f"{computed:,} of {asked:,} tokens computed ({computed / asked:.0%}); the others' "
            "keys and values were in the cache"
        )
    display.say(f"scores: {out}")


def _check_evaluation(run: Run, out: Path, *, calibrated: bool, linear_probe: bool) -> None:
    """Refuse what cannot be scored, or written, before anything is loaded."""
    task = run.config.task
    if calibrated and task.is_generated:
        raise ConfigError(
            f"--calibrated: task.metric is {task.metric}: options are calibrated, and generated "
            "answers have none; leave it out"
        )
    if calibrated and run.config.space.activation == "suffix":
        raise ConfigError(
            "--calibrated: options without the row have no place from which the adapter acts "
            "(space.activation is suffix); leave it out"
        )
    if linear_probe:
        from orchestrator import linear_probe as probing  # imports scikit-learn

        if calibrated:
            raise ConfigError("--calibrated: a linear probe has no options' texts; leave it out")
        probing.check(task, run.data)
    if out.suffix != ".jsonl" or out.is_dir():
        raise ConfigError(f"--out: {out}: must be the name of a file that ends in .jsonl")
    own = [str(run.ledger_path), str(run.folder / metrics.METRICS_FILE)]
    own += [source.path for source in (task.train, task.test) if source is not None]
    if any(Path(path).resolve() == out.resolve() for path in own):
        raise ConfigError(f"--out: {out}: is a file that the run needs; name another")
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(f"--out: {out}: the folder {out.parent} cannot be written to")
    _check_reward(run)


def export(run: Run, folder: Path, at: At | None = None) -> None:
    """Write what the run's ledger leads to: a Hugging Face folder, or an adapter in PEFT's form.

    That is its last state, or that after `at` steps, or that which dev rows chose.

    One replica replays the ledger and writes; on a cluster the folder lies on its node, or better
    on storage that the nodes share.
    """
    folder = folder.absolute()
    if folder.exists():
        raise ConfigError(f"{folder}: exists already; name a folder that is to be made")
    if not os.access(folder.parent, os.W_OK):
        raise ConfigError(f"{folder}: the folder {folder.parent} cannot be written to")
    num_steps = _num_steps(run, at)
    log = folder.with_name(f"{folder.name}.log")
    display = _display(run, log)
    run = fleets.with_one_replica(run)
    with fleets.started(run, log, display.say, _past(run, num_steps)) as (fleet, info):
        _replay(run, info, fleet, num_steps)
        fleet.export(folder)
    display.say(f"what {num_steps} steps have trained: {folder}")


def tune(run: Run, folder: Path) -> None:
    """Measure before any training, and propose eps and lr: told, and written into `folder`."""
    from orchestrator import tune as tuning  # imports matplotlib
    from orchestrator import tune_page

    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {folder}: cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--out: {folder}: cannot be written to")
    _check_reward(run)
    log = folder / metrics.LOG_FILE
    display = _display(run, log)
    batches = _batches(run)
    with fleets.started(run, log, display.say) as (fleet, _):
        proposal = tuning.measure(run.config, fleet, batches, display.say)
    page = tune_page.write(folder, run.config, proposal)
    for line in tuning.lines(run.config.estimator, proposal):
        display.say(line)
    display.say(f"drawn: {page}")


def report(folder: Path) -> Path:
    """Write the page that tells of the run in a folder, finished or not; the page's path."""
    from orchestrator import report as page  # imports matplotlib

    return page.write(folder)


# -------------------------------------------------------------------- parts


def _display(run: Run, log: Path) -> Display:
    """What the user sees from now on; all else goes to the log."""
    output.divert(log)
    run_log.note(run=run.folder.resolve().name)
    run_log.begin()
    return Display(output.terminal(), run.config.run.steps)


def _check_reward(run: Run) -> None:
    """Refuse, before anything is loaded, a reward that cannot be called."""
    if run.config.task.reward is not None:
        rewards.check(run.config.task.reward)


def _batches(run: Run) -> Batches:
    return Batches(run.config, len(run.data.train), run.data.groups, run.pieces)


def _num_steps(run: Run, at: At | None) -> int:
    """How many of the ledger's steps lead to the state that is meant."""
    _, records = Ledger.read(run.ledger_path)
    last = len(records)
    if at is None:
        return last
    if at == "best":
        best = metrics.best(Looks(run.folder, last).all)
        if best is None:
            raise ConfigError(
                f"--at best: {run.folder} has not looked at dev rows; name a step, or train with "
                "task.num_dev"
            )
        return best.step
    if at > last:
        raise ConfigError(f"--at {at}: {run.ledger_path} has {last} steps; name one of 0 to {last}")
    return at


def _past(run: Run, num_steps: int | None = None) -> Iterator[StepUpdate]:
    """The first updates of the run, or all, where there may be a snapshot of them."""
    if run.config.run.snapshot_every and run.ledger_path.exists():
        _, records = Ledger.read(run.ledger_path)
        for record in itertools.islice(records, num_steps):
            yield record.update()


def _replay(run: Run, info: ReplicaInfo, fleet: Fleet, num_steps: int) -> None:
    """Queue the first steps of the run's ledger."""
    _, records = Ledger.read(run.ledger_path, run_folder.header_of(run, info))
    for record in itertools.islice(records, num_steps):
        fleet.apply(record.update())


class Speed:
    """Counts what the steps of this process did, and how long they took."""

    def __init__(self) -> None:
        self.num_probes = self.num_tokens = 0
        self.kv = KvUse()
        self.seconds = 0.0

    def step(self, step: StepMetrics) -> None:
        self.num_probes += step.num_probes
        self.num_tokens += step.num_tokens
        self.kv += step.kv
        self.seconds += step.seconds

    def evaluation(self, evaluation: Evaluation) -> None:
        pass

    def per_second(self, count: int) -> float | None:
        return count / self.seconds if self.seconds else None


class Looks:
    """All looks of a run at held-out rows, this process's and those before it."""

    def __init__(self, folder: Path, next_step: int) -> None:
        """Those behind the ledger's end are of steps that are taken again."""
        self.all = [look for look in metrics.evaluations(folder) if look.step <= next_step]
        self._next_step = next_step

    def is_missing(self, every: int, split: Split) -> bool:
        """Whether the run was to look at such rows where the ledger ends, and has not."""
        if not every or self._next_step % every:
            return False
        return all((look.step, look.split) != (self._next_step, split) for look in self.all)

    def step(self, step: StepMetrics) -> None:
        pass

    def evaluation(self, evaluation: Evaluation) -> None:
        self.all.append(evaluation)


@contextmanager
def _closing(records: Records) -> Iterator[Records]:
    try:
        yield records
    finally:
        records.close()
