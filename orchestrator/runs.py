"""A run from its recipe to its result: folder, fleet, ledger, records and display, wired.

Owns what a run folder is and what may change when it is reopened. Knows no tensors and no
algorithm: the driver has that.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from orchestrator import assets, metrics, output, rewards, tasks
from orchestrator.batches import Batches
from orchestrator.config import Config, ConfigError, load
from orchestrator.driver import Driver
from orchestrator.evaluate import measured, scores_of, share_computed, write_scores
from orchestrator.metrics import Evaluation, KvUse, Records, StepMetrics, Summary
from orchestrator.noise import NOISE_VERSION
from orchestrator.progress import Display
from orchestrator.records import Fleet, ReplicaInfo
from orchestrator.seed_sync import LEDGER_FORMAT, Header, Ledger, same_data
from orchestrator.tasks import TaskData

RUNS_FOLDER = Path("runs")
LOCK_FILE = "training.lock"
RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for what `ray job submit` starts
Say = Callable[[str], None]
At = int | Literal["best"]
"""A state of a run: after so many steps, or the best by dev rows."""


@dataclass(frozen=True, slots=True)
class Run:
    """A checked recipe, its data, and the folder that its records go to."""

    config: Config
    data: TaskData
    folder: Path

    @property
    def ledger_path(self) -> Path:
        return self.folder / metrics.LEDGER_FILE

    @property
    def log_path(self) -> Path:
        return self.folder / metrics.LOG_FILE

    def summary(self) -> Summary | None:
        """What the run came to, once a process took it to its end."""
        return metrics.read_summary(self.folder)


# -------------------------------------------------------------------- folders


def choose(path: Path, overrides: Sequence[str]) -> Run:
    """A new run of a recipe. Raises ConfigError before anything is written or started."""
    config = load(path, overrides)
    if config.run.dir is None and RAY_JOB_VARIABLE in os.environ:
        raise ConfigError(
            "run.dir: must be given in a Ray job, best on storage that the nodes share: Ray "
            "deletes the job's own working directory"
        )
    folder = config.run.dir or RUNS_FOLDER / f"{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = _checked(config, Path(folder))
    if run.ledger_path.exists():
        raise ConfigError(
            f"run.dir: {folder} holds a run already; continue it with --resume {folder}, or "
            "choose another folder"
        )
    return run


def reopen(folder: Path, overrides: Sequence[str] = ()) -> Run:
    """The run in a folder; overrides may change what does not decide its ledger."""
    path = folder / metrics.CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"{folder}: no run folder, it holds no {metrics.CONFIG_FILE}")
    culprit = _culprit(path, overrides, Config.identity)
    if culprit is not None:
        raise ConfigError(
            f"{culprit}: the run in {folder} has steps that depend on this key; what may change is "
            "model.path, model.device, space.init, task.train, task.test, task.label_names, "
            "task.unconditional, task.reward.path, task.reward.timeout, task.reward.workers, "
            "task.reward.environment, fleet.kind, fleet.num_replicas, fleet.gpus_per_replica, "
            "run.eval_every, "
            "run.eval_examples, run.check_every, run.verify_cache and, with "
            "model.score_graphs=false, space.master between float32 and host"
        )
    run = _checked(load(path, overrides), folder)
    if run.ledger_path.exists():
        Ledger.read(run.ledger_path)  # refuse a damaged one before anything starts
    return run


def branch(folder: Path, new_folder: Path, overrides: Sequence[str]) -> Run:
    """The run that is to fork off the one in `folder`: its recipe, changed by the overrides.

    Refuses to change what the steps so far mean, which the fork takes over.
    """
    path = folder / metrics.CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"{folder}: no run folder, it holds no {metrics.CONFIG_FILE}")
    if new_folder.exists():
        raise ConfigError(f"{new_folder}: exists already; name a folder that is to be made")
    culprit = _culprit(path, overrides, _meaning)
    if culprit is not None:
        raise ConfigError(
            f"{culprit}: the steps that a fork takes over depend on this key; space (but for "
            "space.slots, and space.master between float32 and host), estimator.noise, "
            "estimator.decay_towards and, unless space.kind is dense, run.seed must stay"
        )
    return _checked(load(path, overrides), new_folder)


def _culprit(path: Path, overrides: Sequence[str], kept: Callable[[Config], object]) -> str | None:
    """The override that changes what is to be kept of a recipe; None if together they keep it."""
    recorded = kept(load(path))
    if kept(load(path, overrides)) == recorded:
        return None
    for override in overrides:
        with suppress(ConfigError):  # some are valid only together
            if kept(load(path, [override])) != recorded:
                return override
    return " ".join(overrides)


def _meaning(config: Config) -> tuple[object, ...]:
    """What a ledger's seeds and coefficients lead to depends on these keys, and no others."""
    space = config.space.model_dump(mode="json", exclude={"slots", "init"})
    if space["master"] == "host":  # the bits are those of float32
        space["master"] = "float32"
    drawn_from = None if config.space.kind == "dense" else config.run.seed
    estimator = config.estimator
    return space, estimator.noise, estimator.decay_towards, drawn_from


def _checked(config: Config, folder: Path) -> Run:
    """The run, with paths that mean the same in every replica's process."""
    model, task, space = config.model, config.task, config.space
    assets.check_model(model.path)
    if space.init is not None:
        assets.check_adapter(space.init)
        space = space.model_copy(update={"init": assets.absolute(space.init)})
    sources = {
        name: source.model_copy(update={"path": assets.absolute(source.path)})
        for name, source in (("train", task.train), ("test", task.test))
        if source is not None
    }
    folder = folder.absolute()
    changes: dict[str, object] = dict(sources)
    if task.reward is not None:
        place = assets.absolute(task.reward.path)
        changes["reward"] = task.reward.model_copy(update={"path": place})
    config = config.model_copy(
        update={
            "model": model.model_copy(update={"path": assets.absolute(model.path)}),
            "space": space,
            "task": task.model_copy(update=changes),
            "run": config.run.model_copy(update={"dir": str(folder)}),
        }
    )
    return Run(config, tasks.load(config.task), folder)


# -------------------------------------------------------------------- verbs


def train(run: Run) -> None:
    """Take the run to its last step; the held-out metric before and after goes to the user."""
    steps = run.config.run.steps
    _check_reward(run)
    with _locked_folder(run):
        summary = run.summary()
        if summary is not None:
            display = Display(output.terminal(), steps)
            display.say(f"all {steps} steps are done; nothing is left to do")
            display.result(summary, run.folder)
        else:
            output.divert(run.log_path)
            _train(run, Display(output.terminal(), steps))


def _train(run: Run, display: Display) -> None:
    started = time.monotonic()
    steps, num_held_out = run.config.run.steps, len(run.data.test)
    with (
        _started_fleet(run, run.log_path, display.say) as (fleet, info),
        _opened_ledger(run, info, display.say) as ledger,
        _closing(Records(run.folder)) as records,
    ):
        speed, looks = Speed(), Looks(run.folder, ledger.next_step)
        driver = Driver(
            run.config,
            fleet,
            ledger,
            [records, display, speed, looks],
            batches=_batches(run),
            num_test=num_held_out,
            num_dev=len(run.data.dev),
        )
        if ledger.next_step:
            display.say(f"replaying {ledger.next_step} steps ...")
            driver.check_digests()
            baseline = metrics.baseline(run.folder)
        else:
            metric = run.config.task.metric
            display.say(f"zero-shot {metric} on {num_held_out} held-out examples ...")
            baseline = driver.evaluate(0)
            if run.data.dev:
                driver.look(0)
        with display.live(ledger.next_step):
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
            kv=speed.kv.numbers(),
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
        run = _with_one_replica(run)
    if at is not None and not trained:
        raise ConfigError(f"--at: {at}: a recipe has no steps yet; name a run folder")
    num_steps = _num_steps(run, at) if trained else 0
    if out.suffix != ".jsonl" or out.is_dir():
        raise ConfigError(f"--out: {out}: must be the name of a file that ends in .jsonl")
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(f"--out: {out}: the folder {out.parent} cannot be written to")
    _check_reward(run)
    log = out.with_suffix(".log")
    output.divert(log)
    display = Display(output.terminal(), run.config.run.steps)
    with _started_fleet(run, log.absolute(), display.say) as (fleet, info):
        if trained:
            _replay(run, info, fleet, num_steps)
        if linear_probe:
            chunks, scores = [], fleet.linear_probe()
        else:
            chunks = fleet.score("test", range(len(run.data.test)), calibrated=calibrated)
            scores = scores_of(chunks)
    write_scores(out, scores)
    state = f"after {num_steps} steps" if trained else "base model"
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
    output.divert(log)
    display = Display(output.terminal(), run.config.run.steps)
    run = _with_one_replica(run)
    with _started_fleet(run, log, display.say) as (fleet, info):
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
    output.divert(log)
    display = Display(output.terminal(), run.config.run.steps)
    batches = _batches(run)
    with _started_fleet(run, log, display.say) as (fleet, _):
        proposal = tuning.measure(run.config, fleet, batches, display.say)
    page = tune_page.write(folder, run.config, proposal)
    for line in tuning.lines(run.config.estimator, proposal):
        display.say(line)
    display.say(f"drawn: {page}")


def fork(run: Run, parent: Path, step: int) -> None:
    """Make the run's folder, with the first `step` steps of the run in `parent`."""
    ledger = parent / metrics.LEDGER_FILE
    header, records = Ledger.read(ledger)
    if not 1 <= step <= len(records):
        raise ConfigError(f"--at: {step}: {ledger} has steps to fork at from 1 to {len(records)}")
    if run.config.run.steps <= step:
        raise ConfigError(
            f"run.steps: {run.config.run.steps} leaves no step after --at {step}; set it higher"
        )
    try:
        run.folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{run.folder}: cannot be made: {error.strerror}") from None
    data_hash = run.data.fingerprint()
    same_task = load(parent / metrics.CONFIG_FILE).task == run.config.task
    same_looks = same_task and same_data(header.data_hash, data_hash)
    metrics.fork(parent, run.folder, step, same_data=same_looks)
    Ledger.fork(
        ledger,
        run.ledger_path,
        step,
        config_hash=run.config.identity(),
        data_hash=data_hash,
    )
    _write_config(run)  # last: a folder with a recipe is a run, which without a ledger is a new one


def report(folder: Path) -> Path:
    """Write the page that tells of the run in a folder, finished or not; the page's path."""
    from orchestrator import report as page  # imports matplotlib

    return page.write(folder)


# -------------------------------------------------------------------- parts


def _check_reward(run: Run) -> None:
    """Refuse, before anything is loaded, a reward that cannot be called."""
    if run.config.task.reward is not None:
        rewards.check(run.config.task.reward)


def _batches(run: Run) -> Batches:
    return Batches(run.config, len(run.data.train), run.data.groups)


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


def _with_one_replica(run: Run) -> Run:
    fleet = run.config.fleet.model_copy(update={"num_replicas": 1})
    return replace(run, config=run.config.model_copy(update={"fleet": fleet}))


def _replay(run: Run, info: ReplicaInfo, fleet: Fleet, num_steps: int) -> None:
    """Queue the first steps of the run's ledger."""
    _, records = Ledger.read(run.ledger_path, _header(run, info))
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

    def per_second(self, count: int) -> float:
        return count / self.seconds if self.seconds else 0.0


class Looks:
    """All looks of a run at held-out rows, this process's and those before it."""

    def __init__(self, folder: Path, next_step: int) -> None:
        """Those behind the ledger's end are of steps that are taken again."""
        self.all = [look for look in metrics.evaluations(folder) if look.step <= next_step]

    def step(self, step: StepMetrics) -> None:
        pass

    def evaluation(self, evaluation: Evaluation) -> None:
        self.all.append(evaluation)


@contextmanager
def _locked_folder(run: Run) -> Iterator[None]:
    """The run's folder, made if need be, and this process the only one that trains in it."""
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run.folder / LOCK_FILE)
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(f"{run.folder}: another process is training in this folder") from None
    except OSError as error:
        raise ConfigError(f"run.dir: {run.folder}: cannot be written: {error.strerror}") from None
    with lock:
        yield


@contextmanager
def _started_fleet(run: Run, log: Path, say: Say) -> Iterator[tuple[Fleet, ReplicaInfo]]:
    """A fleet whose replicas all stand at the base model, and see this process's data."""
    config = run.config
    _prepare_model(config, say)
    number, kind = config.fleet.num_replicas, config.fleet.kind
    if number == "auto":
        say(f"starting {kind} replicas ...")
    else:
        say(f"starting {number} {kind} replica{'s' * (number > 1)} ...")
    fleet = _make_fleet(config, log, say)
    try:
        info = fleet.start()
        if info.data_hash != run.data.fingerprint():
            raise ConfigError(
                "task: the replicas read other rows than this process does; task.train and "
                "task.test must hold the same on every node"
            )
        say(f"{info.model_class}, {info.num_parameters:,} parameters, on {info.device}")
        yield fleet, info
    finally:
        fleet.close()


def _prepare_model(config: Config, say: Say) -> None:
    """Let the user see what would otherwise be a silent first minute."""
    path = config.model.path
    if path.endswith(".gguf"):
        folder = assets.dequantized_folder(assets.resolve_file("model.path", path))
        if not folder.exists():
            say(f"de-quantising {path}, this once, into {folder} ...")
            from orchestrator import checkpoint

            checkpoint.locate(path)


def _make_fleet(config: Config, log: Path, say: Say) -> Fleet:
    """Imports what the kind of fleet needs: Ray here, or torch and SGLang."""
    if config.fleet.kind == "ray":
        from orchestrator.actors import ActorFleet

        return ActorFleet(config, log, say)
    import torch

    from orchestrator import dist_patch

    device = config.model.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dist_patch.apply(device)
    from orchestrator.local import LocalFleet  # imports SGLang, which has to follow the patches

    return LocalFleet(config, device)


def _header(run: Run, info: ReplicaInfo) -> Header:
    return Header(
        format=LEDGER_FORMAT,
        noise_version=NOISE_VERSION,
        model=run.config.model.path,
        weights_hash=info.weights_hash,
        config_hash=run.config.identity(),
        data_hash=info.data_hash,
        versions=info.versions,
    )


@contextmanager
def _opened_ledger(run: Run, info: ReplicaInfo, say: Say) -> Iterator[Ledger]:
    """The run's ledger, new or continued; what was repaired is told.

    The recipe is written beside it only once the two are known to belong together.
    """
    header = _header(run, info)
    if run.ledger_path.exists():
        ledger = Ledger.open(run.ledger_path, header)
        _write_config(run)
    else:
        _write_config(run)
        ledger = Ledger.create(run.ledger_path, header)
    with ledger:
        for sentence in (*ledger.repairs, *ledger.notes):
            say(sentence)
        if ledger.next_step:
            say(f"continuing after {ledger.next_step} steps")
        yield ledger


def _write_config(run: Run) -> None:
    unfinished = run.folder / f"{metrics.CONFIG_FILE}.new"
    unfinished.write_text(run.config.dump(), encoding="utf-8")
    unfinished.replace(run.folder / metrics.CONFIG_FILE)


@contextmanager
def _closing(records: Records) -> Iterator[Records]:
    try:
        yield records
    finally:
        records.close()
