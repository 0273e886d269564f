"""Run folders: what reopening and forking one may change, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_rows

from orchestrator import metrics, run_folder
from orchestrator.config import ConfigError
from orchestrator.metrics import Evaluation, Records, StepMetrics
from orchestrator.recipe_file import load
from orchestrator.run_folder import Run
from orchestrator.seed_sync import Header, Ledger, StepRecord

NUM_STEPS = 6


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """The folder of a finished run, but for its summary."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    recipe: dict[str, Any] = {
        "model": {"path": str(model)},
        "estimator": {"num_seeds": 1},
        "task": {
            "preset": "sst2",
            "train": {"path": str(write_rows(tmp_path / "train.jsonl", 20))},
            "holdout": 8,
        },
        "run": {"steps": NUM_STEPS},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = run_folder.choose(tmp_path / "recipe.yaml", [f"run.dir={tmp_path / 'parent'}"])
    run.folder.mkdir()
    (run.folder / "config.yaml").write_text(run.config.dump())
    header = Header(1, 1, "tiny", "aa", run.config.identity(), run.data.fingerprint(), ())
    records = Records(run.folder)
    records.evaluation(Evaluation(0, 0.5, 8, 1.0))
    with Ledger.create(run.ledger_path, header) as ledger:
        for step in range(NUM_STEPS):
            ledger.append(StepRecord(step, (step,), ((0.1, 0.2),), (0.5,), 1.0, 1e-3, 1e-6, "ab"))
            records.step(StepMetrics(step, 0.1, 2.0, 1e-6, 0, 2, 100, 0.5))
    records.close()
    return run.folder


def branched(parent: Path, *overrides: str) -> Run:
    return run_folder.branch(parent, parent.with_name("fork"), [*overrides, "run.steps=9"])


def kinds(folder: Path) -> list[str]:
    """Of the folder's metrics, line by line."""
    return [entry["kind"] for entry in metrics.entries(folder)]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("part", ["metrics.fork", "Ledger.fork", "_write_config"])
def test_a_fork_that_stopped_half_way_is_no_run(
    part: str, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise Stopped

    run = branched(parent)
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(f"orchestrator.run_folder.{part}", stop)
        run_folder.fork(run, parent, 3)
    with pytest.raises(ConfigError, match=r"no run folder, it holds no config\.yaml"):
        run_folder.reopen(run.folder)


def test_a_fork_can_be_reopened(parent: Path) -> None:
    run = branched(parent, "estimator.lr=5e-4")
    run_folder.fork(run, parent, 3)
    assert run_folder.reopen(run.folder) == run
    assert len(Ledger.read(run.ledger_path)[1]) == 3
    assert load(run.folder / "config.yaml") == run.config
    assert kinds(run.folder) == ["evaluation", "step", "step", "step"]


def test_overrides_may_be_valid_only_together(parent: Path) -> None:
    pair = ["estimator.kind=fzoo", "estimator.num_seeds=8"]
    for order in (pair, pair[::-1]):
        assert branched(parent, *order).config.estimator.num_seeds == 8
        with pytest.raises(ConfigError, match=r"^estimator\.num_seeds=8: the run in .* depend on"):
            run_folder.reopen(parent, order)
    with pytest.raises(ConfigError, match=r"^space\.master=bfloat16: the steps that a fork takes"):
        branched(parent, *pair, "space.master=bfloat16")
    with pytest.raises(ConfigError, match=r"^estimator\.decay_towards=start: the steps that a"):
        branched(parent, "estimator.decay_towards=start")
    with pytest.raises(ConfigError, match=r"^estimator\.decay_towards=start: the run in"):
        run_folder.reopen(parent, ["estimator.decay_towards=start"])
    with pytest.raises(ConfigError, match="num_seeds: 1: estimator.kind=fzoo compares"):
        branched(parent, pair[0])


def test_a_fork_may_move_its_master_to_the_host_and_back(parent: Path) -> None:
    run = branched(parent, "space.master=host")
    run_folder.fork(run, parent, 3)
    back = run_folder.branch(run.folder, parent.with_name("back"), ["space.master=float32"])
    assert back.config.space.master == "float32"


def test_a_new_runs_folder_holds_nothing_of_another(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path, folder = tmp_path / "tiny.yaml", tmp_path / "runs"
    path.write_text(yaml.safe_dump(recipe))
    assert run_folder.choose(path, ["run.dir=~/runs"]).folder == folder
    folder.mkdir()
    for name in ("metrics.jsonl", "summary.json"):
        (folder / name).write_text("")
        with pytest.raises(ConfigError, match=rf"run\.dir: .*runs holds {name} of a run whose"):
            run_folder.choose(path, [f"run.dir={folder}"])
        (folder / name).unlink()


def test_what_may_change_when_a_run_is_reopened_is_told(parent: Path) -> None:
    allowed = ["task.label_names=[bad, good]", "task.unconditional='So: {option}'"]
    fleet = ["fleet.kind=ray", "fleet.num_replicas=2", "fleet.min_replicas=2"]
    run_folder.reopen(parent, [*allowed, *fleet, "run.check_every=9", "run.verify_cache=3"])
    changes = {"run.seed": 1, "run.steps": 99, "fleet.threads_per_replica": 3, "fleet.tp_size": 2}
    for key, value in changes.items():
        with pytest.raises(ConfigError, match=rf"^{key}={value}: .* may .*[(]but for [^)]*{key}"):
            run_folder.reopen(parent, [f"{key}={value}"])


@pytest.mark.parametrize("earlier", [False, True], ids=["", "ledger without the splits' sizes"])
@pytest.mark.parametrize(
    ("change", "num_looks"),
    [("estimator.lr=5e-4", 1), ("task.holdout=7", 0), ("task.max_length=9", 0)],
)
def test_a_fork_takes_over_looks_at_the_same_rows_only(
    change: str, num_looks: int, earlier: bool, parent: Path
) -> None:
    if earlier:
        header, records = Ledger.read(parent / "ledger.jsonl")
        steps = list(records)
        (parent / "ledger.jsonl").unlink()
        header = replace(header, data_hash=header.data_hash.partition("-")[0])
        with Ledger.create(parent / "ledger.jsonl", header) as ledger:
            for record in steps:
                ledger.append(record)
    run = branched(parent, change)
    run_folder.fork(run, parent, 3)
    assert kinds(run.folder) == ["evaluation"] * num_looks + ["step"] * 3
