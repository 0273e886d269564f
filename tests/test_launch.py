"""The command line as a user meets it: exit codes, one-line mistakes, files that are written."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import renamed, write_questions
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.recipe_file import load

ROOT = Path(__file__).parent.parent
DONE, MISTAKE = 0, 2


def launch(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def mistake(*arguments: str | Path) -> str:
    """The one line that a user's mistake is told in."""
    done = launch(*arguments)
    assert done.returncode == MISTAKE, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory, recipe: dict[str, Any]) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe_path: Path) -> Path:
    """The folder of a finished run; its standard output is beside it in stdout.txt."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    done = launch("train", recipe_path, f"run.dir={folder}", "run.eval_every=2")
    assert done.returncode == DONE, done.stdout + done.stderr
    (folder / "stdout.txt").write_text(done.stdout + done.stderr)
    return folder


def test_help_tells_the_verbs() -> None:
    done = launch("--help")
    assert done.returncode == DONE
    for word in ("train", "eval", "--resume", "ray job submit", "Exit codes"):
        assert word in done.stdout


def test_mistakes_are_told_in_one_line(recipe_path: Path, tmp_path: Path) -> None:
    for override, words in {
        "estimator.lrr=1": "estimator.lrr: unknown key; did you mean estimator.lr?",
        "model.path=./nowhere": "model.path: ./nowhere: no such folder",
        "model.path=package:numpy/x.gguf": "the package numpy holds no file x.gguf",
        f"model.path={tmp_path}": "holds no config.json",
        "task.train.path=none.jsonl": "task.train.path: none.jsonl: no such file",
        "space={kind: lora, init: nowhere}": "space.init: nowhere: no PEFT adapter",
        "space={kind: lora, rank: 0}": "space.rank: 0 is not accepted",
        "space={kind: lora, slots: 3}": "space.slots: 3 is not accepted",
        "space={kind: dense, slots: 4}": "space.slots: is of no use to space.kind=dense",
        "model.quantization=fp8": "space.kind=dense trains the base weights",
        "task.template={film} {option}": "task.template: film is not a field of",
        "task.template={sentence} It was": "has no place for {option}",
    }.items():
        assert words in mistake("train", recipe_path, override, f"run.dir={tmp_path}/run")
    assert "nowhere.yaml: cannot be read" in mistake("train", tmp_path / "nowhere.yaml")
    assert "holds no config.yaml" in mistake("train", "--resume", tmp_path)
    assert "holds no config.yaml" in mistake("report", tmp_path)
    assert "the folder" in mistake("eval", recipe_path, "--out", tmp_path / "no" / "x.jsonl")
    assert "ends in .jsonl" in mistake("eval", recipe_path, "--out", tmp_path)
    rows = yaml.safe_load(recipe_path.read_text())["task"]["test"]["path"]
    assert "is a file that the run needs" in mistake("eval", recipe_path, "--out", rows)
    assert "estimator.lr: 0" in mistake(
        "eval", recipe_path, "--out", tmp_path / "x.jsonl", "estimator.lr=0"
    )
    assert not (tmp_path / "run").exists()  # nothing was started


def test_empty_data_and_foreign_labels_are_told_by_name(recipe_path: Path, tmp_path: Path) -> None:
    empty, foreign = tmp_path / "empty.jsonl", tmp_path / "foreign.jsonl"
    empty.write_text("")
    foreign.write_text('{"sentence": "a", "label": "so-so"}\n')
    assert "empty.jsonl: holds no rows" in mistake("train", recipe_path, f"task.train.path={empty}")
    line = mistake("train", recipe_path, f"task.test.path={foreign}")
    assert "foreign.jsonl:1: 'so-so' is not an option; accepted: 0 to 1 or one of" in line


@pytest.mark.slow
def test_a_run_leaves_its_records(finished: Path, recipe: dict[str, Any]) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"config.yaml", "ledger.jsonl", "metrics.jsonl", "summary.json", "log.txt"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    steps = recipe["run"]["steps"]
    entries = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if e["kind"] == "step"] == list(range(steps))
    assert [e["step"] for e in entries if e["kind"] == "evaluation"] == [0, 2, 4, steps]
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["steps"] == steps
    assert summary["evaluations_per_s"] > 0 < summary["trained_tokens_per_s"]
    assert summary["baseline_accuracy"] == entries[0]["accuracy"]
    assert summary["final_accuracy"] == entries[-1]["accuracy"]
    assert set(summary["versions"]) >= {"sglang", "torch", "transformers"}


@pytest.mark.slow
def test_the_console_shows_the_run_and_none_of_the_chatter(finished: Path) -> None:
    """The chatter goes to the log instead, which is not empty for it."""
    shown = (finished / "stdout.txt").read_text()
    for words in ("zero-shot", "step 1/6", "held-out", "steps/s", f"run folder: {finished}"):
        assert words in shown
    for chatter in ("Warning", "warning", "WARNING", "Init torch", "Loading", "shards"):
        assert chatter not in shown
    assert (finished / "log.txt").stat().st_size > 100


@pytest.mark.slow
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_eval_writes_the_scores_that_transformers_gives(
    family: str, recipe_path: Path, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder, out = model_folders[family], tmp_path / "scores.jsonl"
    done = launch("eval", recipe_path, f"model.path={folder}", "--out", out)
    assert done.returncode == DONE, done.stdout + done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    recipe = yaml.safe_load(recipe_path.read_text())
    rows_text = Path(recipe["task"]["test"]["path"]).read_text()
    rows = [json.loads(line) for line in rows_text.splitlines()]
    assert len(lines) == len(rows) == 50
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for index, (line, row) in enumerate(zip(lines, rows, strict=True)):
        expected = []
        for option in ("terrible", "great"):
            ids = tokenizer(f"{row['sentence']} It was {option}").input_ids
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0, -2].log_softmax(0)
            expected.append(float(logprobs[ids[-1]]))
        assert (line["id"], line["label"]) == (index, row["label"])
        assert line["scores"] == pytest.approx(expected, abs=1e-4)
        assert line["prediction"] == expected.index(max(expected))


@pytest.fixture(scope="module")
def trained_scores(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> Path:
    """What `eval` writes of the finished run."""
    out = tmp_path_factory.mktemp("scores") / "trained.jsonl"
    done = launch("eval", finished, "--out", out)
    assert done.returncode == DONE, done.stdout + done.stderr
    assert "after 6 steps" in done.stdout
    return out


@pytest.mark.slow
def test_eval_of_a_run_folder_scores_its_trained_state(
    finished: Path, trained_scores: Path
) -> None:
    lines = [json.loads(line) for line in trained_scores.read_text().splitlines()]
    right = sum(line["prediction"] == line["label"] for line in lines)
    summary = json.loads((finished / "summary.json").read_text())
    assert right / len(lines) == summary["final_accuracy"]


@pytest.mark.slow
def test_an_exported_model_scores_as_the_run_does(
    finished: Path, trained_scores: Path, recipe_path: Path, tmp_path: Path
) -> None:
    exported, folder = tmp_path / "scores.jsonl", tmp_path / "tuned"
    done = launch("export", finished, folder)
    assert (done.returncode, "what 6 steps have trained" in done.stdout) == (DONE, True)
    assert launch("eval", recipe_path, f"model.path={folder}", "--out", exported).returncode == DONE
    assert exported.read_text() == trained_scores.read_text()
    assert "exists already" in mistake("export", finished, folder)
    assert "cannot be written to" in mistake("export", finished, tmp_path / "no" / "folder")
    assert "holds no config.yaml" in mistake("export", tmp_path, tmp_path / "other")


@pytest.mark.slow
def test_inspect_tells_what_a_ledger_holds(finished: Path, tmp_path: Path) -> None:
    done = launch("inspect", finished)
    assert (done.returncode, done.stderr) == (DONE, "")
    told = {line[:16].strip(): line[16:] for line in done.stdout.splitlines()}
    size = (finished / "ledger.jsonl").stat().st_size
    assert told["steps"] == "0 to 5, 6 in all, no gaps"
    assert told["seeds"] == "12, of which 0 dropped, in 0 steps"
    assert told["bytes"].startswith(f"{size:,}, ")
    assert float(told["steps a second"].partition(";")[0]) > 0
    assert "torn" not in told and "without metrics" not in told

    damaged = tmp_path / "damaged"
    damaged.mkdir()
    whole = (finished / "ledger.jsonl").read_bytes()
    (damaged / "ledger.jsonl").write_bytes(whole[:-9])
    done = launch("inspect", damaged)
    assert done.returncode == DONE
    for words in ("0 to 4, 5 in all", "torn", "without metrics 5 steps"):
        assert words in done.stdout
    (damaged / "ledger.jsonl").write_bytes(whole.replace(b'{"step":3,', b'{"step":4,'))
    done = launch("inspect", damaged)
    assert done.returncode == MISTAKE
    assert "0 to 2, 3 in all" in done.stdout
    assert "line 5: is damaged" in done.stderr and done.stderr.count("\n") == 1
    assert "holds no config.yaml and no ledger.jsonl" in mistake("inspect", tmp_path)


@pytest.mark.slow
def test_a_fork_goes_on_from_its_parents_steps(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fork"
    for arguments, words in {
        ("--at", "7"): "--at: 7: ",
        ("--at", "0"): "has steps to fork at from 1 to 6",
        ("--at", "6"): "run.steps: 6 leaves no step after --at 6",
        ("--at", "3", "space={kind: lora}"): "space={kind: lora}: the steps that a fork takes",
        ("--at", "3", "estimator.noise=rademacher"): "the steps that a fork takes over depend",
        ("--at", "3", "estimator.lrr=1"): "estimator.lrr: unknown key",
    }.items():
        assert words in mistake("fork", finished, folder, *arguments)
    assert not folder.exists()
    assert "exists already" in mistake("fork", finished, finished, "--at", "3")

    done = launch("fork", finished, folder, "--at", "3", "estimator.lr=5e-4", "run.seed=9")
    assert done.returncode == DONE, done.stderr
    assert done.stdout == f"continue with: python launch.py train --resume {folder}\n"
    parents = (finished / "ledger.jsonl").read_bytes().splitlines()
    assert (folder / "ledger.jsonl").read_bytes().splitlines()[1:] == parents[1:4]
    trained = launch("train", "--resume", folder)
    assert trained.returncode == DONE, trained.stdout + trained.stderr
    lines = (folder / "ledger.jsonl").read_bytes().splitlines()
    assert lines[1:4] == parents[1:4] and len(lines) == 7
    for line, other in zip(lines[4:], parents[4:], strict=True):
        assert json.loads(line)["seeds"] != json.loads(other)["seeds"]
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if entry["kind"] == "step"] == list(range(6))
    # Replayed from its first step, the fork is where training left it.
    scored = launch("eval", folder, "--out", tmp_path / "scores.jsonl")
    summary = json.loads((folder / "summary.json").read_text())
    assert f"after 6 steps: accuracy {summary['final_accuracy']:.1%}" in scored.stdout
    assert "at step 3 from config" in launch("inspect", folder).stdout
    assert launch("report", folder).returncode == DONE


@pytest.mark.slow
def test_the_report_of_a_run_is_written_without_the_engine(finished: Path) -> None:
    """It says where it is, and tells what the summary does."""
    code = (
        "import sys, launch; code = launch.main(); "
        "assert not {'torch', 'ray', 'sglang'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "report", str(finished)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (DONE, "")
    assert done.stdout == f"{finished}/report/index.html\n"
    page = (finished / "report" / "index.html").read_text().replace("\xa0", " ")
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["digest"] in page
    assert f"{100 * summary['final_accuracy']:.1f} %" in page


@pytest.mark.slow
def test_a_damaged_weight_file_is_told_by_name(
    recipe_path: Path, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = renamed(model_folders["llama"], tmp_path / "damaged", lambda name: name)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    done = launch("eval", recipe_path, f"model.path={folder}", "--out", tmp_path / "x.jsonl")
    assert done.returncode == MISTAKE
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert f"model.path: {file}: not a readable weight file" in line
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_folder_is_not_trained_into_twice(finished: Path, recipe_path: Path) -> None:
    before = (finished / "ledger.jsonl").read_bytes()
    summary = (finished / "summary.json").read_text()
    assert "holds a run already" in mistake("train", recipe_path, f"run.dir={finished}")
    line = mistake("train", "--resume", finished, "estimator.lr=1")
    assert "estimator.lr=1: the run in" in line
    done = launch("train", "--resume", finished)
    assert (done.returncode, "nothing is left to do" in done.stdout) == (DONE, True)
    assert (finished / "summary.json").read_text() == summary
    assert (finished / "ledger.jsonl").read_bytes() == before


@pytest.mark.slow
def test_damage_to_a_ledger_is_told_and_nothing_is_lost(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for name in ("config.yaml", "ledger.jsonl", "metrics.jsonl"):
        (folder / name).write_bytes((finished / name).read_bytes())
    whole = (finished / "ledger.jsonl").read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b'"losses"', whole.index(b'"step":3')) + 12] ^= 1
    (folder / "ledger.jsonl").write_bytes(flipped)
    assert "ledger.jsonl: line 5" in mistake("train", "--resume", folder)
    assert (folder / "ledger.jsonl").read_bytes() == bytes(flipped)

    (folder / "ledger.jsonl").write_bytes(whole[:-20])  # torn: cut off, said, and taken again
    done = launch("train", "--resume", folder)
    assert done.returncode == DONE, done.stdout + done.stderr
    assert "cut short" in done.stdout
    assert (folder / "ledger.jsonl").read_bytes() == whole


@pytest.mark.slow
def test_a_ledger_of_another_model_is_refused(
    finished: Path, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "moved"
    folder.mkdir()
    (folder / "ledger.jsonl").write_bytes((finished / "ledger.jsonl").read_bytes())
    config = yaml.safe_load((finished / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for override, words in {
        f"model.path={model_folders['qwen3']}": "ledger.jsonl: belongs to another model",
        f"task.train.path={config['task']['test']['path']}": "ledger.jsonl: belongs to other data",
    }.items():
        done = launch("train", "--resume", folder, override)
        assert done.returncode == MISTAKE
        assert words in done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        assert yaml.safe_load((folder / "config.yaml").read_text()) == config


def test_a_ray_job_must_say_where_its_records_go(
    recipe_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray deletes a job's own working directory, where the default run folder would lie."""
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}")
    assert "run.dir: must be given in a Ray job" in mistake("train", recipe_path)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory, recipe: dict[str, Any]) -> Path:
    """The folder of a finished run whose answers are generated, with dev rows."""
    folder = tmp_path_factory.mktemp("generated")
    rows = write_questions(folder / "rows.jsonl", 40)
    values = yaml.safe_load(yaml.safe_dump(recipe))
    task = {"preset": "squad", "train": {"path": str(rows)}, "holdout": 12, "num_dev": 10}
    values["task"] = {**task, "max_new_tokens": 6}
    values["estimator"] |= {"lr": 0.05}  # far enough that looks differ
    (folder / "squad.yaml").write_text(yaml.safe_dump(values))
    done = launch("train", folder / "squad.yaml", f"run.dir={folder}/run", "run.eval_every=1")
    assert done.returncode == DONE, done.stdout + done.stderr
    assert "zero-shot f1 on 12 held-out examples" in done.stdout
    assert "best on dev rows:" in done.stdout
    return folder / "run"


@pytest.mark.slow
def test_a_run_with_dev_rows_knows_its_best_step(generated: Path, tmp_path: Path) -> None:
    entries = [json.loads(line) for line in (generated / "metrics.jsonl").read_text().splitlines()]
    looks = [entry for entry in entries if entry["kind"] == "dev_evaluation"]
    assert [look["step"] for look in looks] == list(range(7))
    tests = [entry for entry in entries if entry["kind"] == "evaluation"]
    assert [look["step"] for look in tests] == [0, 6]
    values = [look["accuracy"] for look in looks]
    assert len(set(values)) > 1
    summary = json.loads((generated / "summary.json").read_text())
    assert (summary["metric"], summary["best_step"]) == ("f1", values.index(max(values)))
    low, high = summary["final_interval"]
    assert low < summary["final_accuracy"] < high

    best, named, first = (tmp_path / f"{name}.jsonl" for name in ("best", "named", "first"))
    done = launch("eval", generated, "--at", "best", "--out", best)
    assert (done.returncode, f"after {summary['best_step']} steps: f1" in done.stdout) == (
        DONE,
        True,
    )
    assert launch("eval", generated, "--at", summary["best_step"], "--out", named).returncode == 0
    assert best.read_text() == named.read_text()
    assert launch("eval", generated, "--at", "0", "--out", first).returncode == DONE
    lines = [json.loads(line) for line in first.read_text().splitlines()]
    assert tests[0]["accuracy"] == pytest.approx(sum(line["value"] for line in lines) / 12)
    assert first.read_text() != best.read_text()


@pytest.mark.slow
def test_states_that_are_not_there_are_told(
    generated: Path, finished: Path, recipe_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.jsonl"
    assert "has 6 steps; name one of 0 to 6" in mistake(
        "eval", generated, "--at", "7", "--out", out
    )
    assert "has not looked at dev rows" in mistake("eval", finished, "--at", "best", "--out", out)
    assert "a recipe has no steps" in mistake("eval", recipe_path, "--at", "1", "--out", out)
    assert "--calibrated: task.metric is f1" in mistake(
        "eval", generated, "--calibrated", "--out", out
    )
    assert "has 6 steps" in mistake("export", generated, tmp_path / "model", "--at", "9")


@pytest.mark.slow
def test_an_export_is_of_the_state_that_is_named(
    generated: Path, recipe: dict[str, Any], tmp_path: Path
) -> None:
    assert launch("export", generated, tmp_path / "first", "--at", "0").returncode == DONE
    exported = load_file(tmp_path / "first" / "model.safetensors")
    base = load_file(Path(recipe["model"]["path"]) / "model.safetensors")
    assert exported.keys() == base.keys()
    assert all(torch.equal(exported[name], base[name]) for name in base)
    assert launch("export", generated, tmp_path / "third", "--at", "3").returncode == DONE
    third = load_file(tmp_path / "third" / "model.safetensors")
    assert not all(torch.equal(third[name], base[name]) for name in base)


@pytest.mark.slow
def test_eval_in_context_tells_what_was_computed(recipe_path: Path, tmp_path: Path) -> None:
    done = launch(
        "eval",
        recipe_path,
        "task.demonstrations=6",
        "--calibrated",
        "--out",
        tmp_path / "scores.jsonl",
    )
    assert done.returncode == DONE, done.stdout + done.stderr
    assert "base model, 6 demonstrations: calibrated accuracy" in done.stdout
    computed, asked = re.findall(r"([\d,]+) of ([\d,]+) tokens computed", done.stdout)[0]
    assert int(computed.replace(",", "")) < int(asked.replace(",", "")) / 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "lora"])
def test_tune_proposes_before_any_training(kind: str, recipe_path: Path, tmp_path: Path) -> None:
    """What it proposes is what the run can be started with, and stands in all it leaves."""
    out = tmp_path / "tuned"
    done = launch("tune", recipe_path, f"space.kind={kind}", "--out", out)
    assert done.returncode == DONE, done.stdout + done.stderr
    figures = json.loads((out / "tune.json").read_text())
    overrides = figures["overrides"]
    assert [text.partition("=")[0] for text in overrides] == ["estimator.eps", "estimator.lr"]
    assert " ".join(overrides) in done.stdout
    chosen = figures["eps"]
    assert chosen["is_linear"] and chosen["low"] <= chosen["eps"] <= chosen["high"]
    (row,) = [row for row in figures["curve"] if row["eps"] == chosen["eps"]]
    assert row["difference"] > 10 * chosen["noise"] > 0
    assert len(row["plus"]) == len(row["minus"]) == 4
    page = (out / "tune.html").read_text()
    assert page.count("<svg") == 4 and " ".join(overrides) in page
    assert not (out / "ledger.jsonl").exists()
    config = load(recipe_path, overrides)
    assert config.estimator.eps == chosen["eps"] and config.estimator.lr == figures["lr"]["lr"]


def test_tune_says_where_it_cannot_write(recipe_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = mistake("tune", recipe_path, "--out", tmp_path / "file" / "folder")
    assert "--out:" in line and "cannot be made" in line


def test_verify_cache_is_a_key_of_the_recipe(recipe_path: Path) -> None:
    told = mistake("train", recipe_path, "--verify-cache", "-1")
    assert "run.verify_cache: -1 is not accepted" in told
