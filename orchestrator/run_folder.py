"""The folder of a run: its recipe, its ledger, and what may change when it is opened again.

Owns what a recipe's paths mean, who may train in a folder, and how one run forks off another.
Knows neither fleets nor the algorithm.
"""

import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from orchestrator import assets, metrics, tasks, whole_file
from orchestrator.config import Config, ConfigError
from orchestrator.metrics import Summary
from orchestrator.noise import NOISE_VERSION
from orchestrator.pieces import Pieces
from orchestrator.recipe_file import load
from orchestrator.records import ReplicaInfo
from orchestrator.seed_sync import LEDGER_FORMAT, Header, Ledger, same_data
from orchestrator.tasks import TaskData

RUNS_FOLDER = Path("runs")
LOCK_FILE = "training.lock"
RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for what `ray job submit` starts


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

    @property
    def pieces(self) -> Pieces:
        """How its batches are cut."""
        return Pieces(self.config, self.data.contexts)

    def summary(self) -> Summary | None:
        """What the run came to, once a process took it to its end."""
        return metrics.read_summary(self.folder)


def choose(path: Path, overrides: Sequence[str]) -> Run:
    """A new run of a recipe. Raises ConfigError before anything is written or started."""
    config = load(path, overrides)
    if config.run.dir is None and RAY_JOB_VARIABLE in os.environ:
        raise ConfigError(
            "run.dir: must be given in a Ray job, best on storage that the nodes share: Ray "
            "deletes the job's own working directory"
        )
    name = f"{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(os.path.expanduser(config.run.dir)) if config.run.dir else RUNS_FOLDER / name
    refuse_what_leads_elsewhere(folder)
    run = _checked(config, folder)
    if run.ledger_path.exists():
        raise ConfigError(
            f"run.dir: {folder} holds a run already; continue it with --resume {folder}, or "
            "choose another folder"
        )
    for left in (metrics.SUMMARY_FILE, metrics.METRICS_FILE):
        if (folder / left).exists():
            raise ConfigError(
                f"run.dir: {folder} holds {left} of a run whose ledger is gone; choose another "
                "folder, or remove this one"
            )
    return run


def reopen(folder: Path, overrides: Sequence[str] = (), *, judges: bool = True) -> Run:
    """The run in a folder; overrides may change what does not decide its ledger.

    What lets code run must be among them again, for the folder may be a stranger's; a reward only
    if what is to be done with the run `judges` texts.
    """
    path = recipe_in(folder)
    culprit = _culprit(path, overrides, Config.identity)
    if culprit is not None:
        raise ConfigError(
            f"{culprit}: the run in {folder} has steps that depend on this key; what may change is "
            "model.path, model.device, space.init, task.train, task.test, task.label_names, "
            "task.unconditional, task.reward.path, task.reward.timeout, task.reward.workers, "
            "task.reward.environment, fleet (but for fleet.threads_per_replica, fleet.tp_size, "
            "fleet.affinity and fleet.pieces), run (but for run.steps and run.seed) and, with "
            "model.score_graphs=false, space.master between float32 and host"
        )
    config = load(path, overrides)
    said_again = {override.partition("=")[0] for override in overrides}
    for override in code_overrides(config, judges=judges):
        if override.partition("=")[0] not in said_again:
            raise ConfigError(
                f"{override}: {path} has code run that comes from elsewhere; if you trust it, add "
                f"{override} to the command"
            )
    run = _checked(config, folder)
    if run.ledger_path.exists():
        Ledger.read(run.ledger_path)  # refuse a damaged one before anything starts
    return run


def recipe_in(folder: Path) -> Path:
    """The recipe of the run in a folder. Refuses a folder that is no run's."""
    require(folder)
    path = folder / metrics.CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"{folder}: no run folder, it holds no {metrics.CONFIG_FILE}")
    return path


def require(folder: Path) -> None:
    """Refuse a folder that holds nothing of a run, or what a run's never holds."""
    names = metrics.CONFIG_FILE, metrics.LEDGER_FILE
    if not any(os.path.lexists(folder / name) for name in names):
        raise ConfigError(f"{folder}: no run folder, it holds no {' and no '.join(names)}")
    refuse_what_leads_elsewhere(folder)


def refuse_what_leads_elsewhere(folder: Path) -> None:
    """Refuse a folder with links out of it, through which a stranger's run would have ours write
    into other files; or with pipes and the like, on which reading it would hang."""
    root = _resolved(folder)
    for place, folders, files in os.walk(root):
        for path in (Path(place, name) for name in (*folders, *files)):
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # a run that goes on has given a file its final name
                continue
            if stat.S_ISLNK(mode) and not _resolved(path).is_relative_to(root):
                raise ConfigError(f"{path}: leads out of the run folder, to {path.resolve()}")
            if not (stat.S_ISLNK(mode) or stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ConfigError(f"{path}: is no plain file; a run folder holds no others")


def _resolved(path: Path) -> Path:
    """Where a path leads, be there something or not."""
    try:
        return path.resolve()
    except RuntimeError:
        raise ConfigError(f"{path}: leads nowhere; its links lead to each other") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def code_overrides(config: Config, *, judges: bool = True) -> list[str]:
    """The keys by which a recipe lets code run that is not ours, as overrides."""
    said = []
    if config.model.trust_remote_code:
        said.append("model.trust_remote_code=true")
    if judges and config.task.reward is not None:
        said.append(f"task.reward.path={config.task.reward.path}")
    return said


def branch(folder: Path, new_folder: Path, overrides: Sequence[str]) -> Run:
    """The run that is to fork off the one in `folder`: its recipe, changed by the overrides.

    Refuses to change what the steps so far mean, which the fork takes over.
    """
    path = recipe_in(folder)
    if new_folder.exists():
        raise ConfigError(f"{new_folder}: exists already; name a folder that is to be made")
    culprit = _culprit(path, overrides, Config.meaning)
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


@contextmanager
def locked(run: Run) -> Iterator[None]:
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
def opened_ledger(run: Run, info: ReplicaInfo, say: Callable[[str], None]) -> Iterator[Ledger]:
    """The run's ledger, new or continued; what was repaired is told.

    The recipe is written beside it only once the two are known to belong together.
    """
    header = header_of(run, info)
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


def header_of(run: Run, info: ReplicaInfo) -> Header:
    return Header(
        format=LEDGER_FORMAT,
        noise_version=NOISE_VERSION,
        model=run.config.model.path,
        weights_hash=info.weights_hash,
        config_hash=run.config.identity(),
        data_hash=info.data_hash,
        versions=info.versions,
    )


def _write_config(run: Run) -> None:
    whole_file.write(run.folder / metrics.CONFIG_FILE, run.config.dump())
