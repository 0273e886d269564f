"""Rewards as objective and metric: what a probe's loss is, and that no failure moves a ledger.

A tiny model that writes random words, rewarded by a module of the user's.
"""

import json
import math
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import DEVICE, WORDS
from test_launch import launch, mistake
from test_training import ACTIVATED, LORA, train

from orchestrator import noise, tasks
from orchestrator.batches import Batches
from orchestrator.config import Config, ConfigError
from orchestrator.driver import Driver
from orchestrator.local import LocalFleet
from orchestrator.metrics import Evaluation, StepMetrics
from orchestrator.records import Probe, ProbeLoss
from orchestrator.replica import Replica
from orchestrator.sampling import Sampling
from orchestrator.seed_sync import Header, Ledger

MODULE = """
    import os

    def score(row, text):
        words = text.split()
        if "poor" in words:
            raise ValueError("poor")
        if words[-1:] == ["bad"]:
            os._exit(7)
        if "film" in words:
            return float("nan")
        return len(set(words)) + 0.25 * row["bonus"] - 3

    def goodness(row, text):
        words = text.split()
        return sum(word in ("good", "great", "lovely") for word in words) / 5

    def nothing(row, text):
        assert text == "", text
        return 0.5
"""
SAMPLES, FAILED = 3, -2.0
LOST = {"raised": "poor", "crash": "bad", "not_finite": "film"}


def expected(row: dict[str, Any], text: str) -> tuple[float, str | None]:
    """What the module's function gives, and how it fails."""
    words = text.split()
    if "poor" in words:
        return FAILED, "raised"
    if words[-1:] == ["bad"]:
        return FAILED, "crash"
    if "film" in words:
        return FAILED, "not_finite"
    return len(set(words)) + 0.25 * row["bonus"] - 3, None


@pytest.fixture
def values(tmp_path: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe, as a dictionary; its rows have no right answers."""
    (tmp_path / "mine.py").write_text(textwrap.dedent(MODULE))
    rows = tmp_path / "rows.jsonl"
    made = [{"text": WORDS[n % len(WORDS)], "bonus": n, "list": [n, None]} for n in range(50)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    task = {
        "template": "so {text} was{option}",
        "objective": "reward",
        "metric": "reward",
        "reward": {
            "function": "mine:score",
            "path": str(tmp_path),
            "samples": SAMPLES,
            "failed": FAILED,
        },
        "train": {"path": str(rows)},
        "holdout": 10,
        "max_new_tokens": 5,
    }
    found: dict[str, Any] = yaml.safe_load(yaml.safe_dump(recipe))
    found |= {"task": task, "space": dict(LORA)}
    found["estimator"] |= {"eps": 0.3, "num_seeds": 4}
    found["run"]["steps"] = 3
    return found


def config(values: dict[str, Any]) -> Config:
    return Config.model_validate(values)


@pytest.fixture
def replica(values: dict[str, Any]) -> Iterator[Replica]:
    made = Replica(config(values), DEVICE)
    yield made
    made.close()


@pytest.mark.parametrize("space", [LORA, ACTIVATED])
def test_a_probes_loss_is_minus_its_samples_mean_reward(
    space: dict[str, Any], values: dict[str, Any]
) -> None:
    """Against the engine's own continuations, by seeds of run, step, example and sample."""
    values["space"] = dict(space)
    if space is ACTIVATED:
        values["task"]["template"] = "so {text} {*}was{option}"
    replica = Replica(config(values), DEVICE)
    examples = (3, 1, 30)
    data = tasks.load(config(values).task)
    (found,) = replica.evaluate([], [Probe(0, 7, 0, 0.3, examples)])
    prompts = replica._prompts("train", examples)
    parts, lost = [], dict.fromkeys(LOST, 0)
    for id, prompt in zip(examples, prompts, strict=True):
        seeds = noise.sample_seeds(3, 0, [id], SAMPLES)
        answers = replica.engine.generate(
            [prompt.tokens] * SAMPLES,
            Sampling(5, 1.0, stop_tokens=frozenset({1})),
            adapters=(replica.space.adapter,),
            seeds=seeds,
            decode=replica._decode,
            contexts=[prompt.context] * SAMPLES,
        )
        assert len({tuple(answer.tokens) for answer in answers}) > 1
        row = data.train[id].row
        assert row is not None
        worth = [expected(row, answer.text or "") for answer in answers]
        for _, kind in worth:
            if kind is not None:
                lost[kind] += 1
        parts.append(-math.fsum(value for value, _ in worth) / SAMPLES)
    assert found.parts == pytest.approx(parts)
    assert found.value == pytest.approx(sum(parts) / 3)
    assert sum(found.lost) == sum(lost.values()) > 0
    assert any(prompt.context for prompt in prompts) == (space is ACTIVATED)
    replica.close()


def test_samples_depend_on_their_example_alone_and_are_the_same_for_both_signs(
    replica: Replica,
) -> None:
    many = tuple(range(12))
    first, second = replica.evaluate([], [Probe(0, 7, sign, 1e-7, many) for sign in (1, -1)])
    assert first.parts == second.parts  # the same numbers draw from all but the same weights
    (alone,) = replica.evaluate([], [Probe(0, 9, 1, 1e-7, (5,))])
    assert alone.parts == first.parts[5:6]
    twice, other = replica.evaluate([], [Probe(0, 7, s, 0.3, (5, 4, 5)) for s in (1, -1)])
    assert twice.parts[0] == twice.parts[2]
    assert twice.parts != other.parts


class Seen:
    def __init__(self) -> None:
        self.steps: list[StepMetrics] = []
        self.looks: list[Evaluation] = []

    def step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)

    def evaluation(self, evaluation: Evaluation) -> None:
        self.looks.append(evaluation)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("space", "estimator"),
    [
        ({"kind": "dense"}, {"eps": 0.02}),
        (LORA, {"kind": "es", "shaping": "z_score", "baseline": "prompt"}),
        ({"kind": "prefix", "slots": 2}, {"kind": "es", "shaping": "rank"}),
    ],
)
def test_runs_whose_rewards_fail_are_the_same_for_any_fleet_and_after_a_resume(
    space: dict[str, Any], estimator: dict[str, Any], values: dict[str, Any], tmp_path: Path
) -> None:
    values["space"] = space
    values["estimator"] |= estimator
    whole = train(config(values), tmp_path / "one.jsonl")
    losses = [pair for line in whole for pair in json.loads(line)["losses"]]
    assert len({value for pair in losses for value in pair}) > 6
    assert all(value is not None for pair in losses for value in pair)
    assert all(any(json.loads(line)["coefficients"]) for line in whole)
    values["fleet"]["num_replicas"] = 2
    values["task"]["reward"] |= {"workers": 1, "timeout": 60.0}
    assert train(config(values), tmp_path / "two.jsonl") == whole
    cut = tmp_path / "cut.jsonl"
    header = (tmp_path / "one.jsonl").read_bytes().splitlines(keepends=True)[0]
    cut.write_bytes(header + whole[0])
    assert train(config(values), cut) == whole
    assert "mine" not in sys.modules


def test_lost_samples_are_counted_in_steps_and_looks(
    values: dict[str, Any], tmp_path: Path
) -> None:
    seen, fleet = Seen(), LocalFleet(config(values), DEVICE)
    info = fleet.start()
    header = Header(1, 1, "tiny", info.weights_hash, "", info.data_hash, ())
    with Ledger.create(tmp_path / "ledger.jsonl", header) as ledger:
        batches = Batches(config(values), 40)
        driver = Driver(config(values), fleet, ledger, [seen], batches=batches, num_test=10)
        driver.train()
        look = driver.evaluate(3)
        (chunk,) = fleet.score("test", range(10))
    fleet.close()
    for step in seen.steps:
        assert step.lost is not None and set(step.lost) <= set(LOST)
    assert sum(sum(step.lost.values()) for step in seen.steps if step.lost) > 0
    data = tasks.load(config(values).task)
    for score in chunk.examples:
        row = data.test[score.id].row
        assert row is not None and score.answer is not None
        assert (score.value, score.failure) == expected(row, score.answer)
    assert look.accuracy == pytest.approx(sum(score.value for score in chunk.examples) / 10)
    assert look.lost == sum(score.failure is not None for score in chunk.examples)
    assert look.interval is not None and look.interval[0] < look.accuracy < look.interval[1]


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["batch", "prompt"])
def test_a_reward_rises(baseline: str, values: dict[str, Any], tmp_path: Path) -> None:
    """Random weights learn to write good words: from one word in six or so to most."""
    values["task"]["reward"] |= {"function": "mine:goodness", "failed": 0.0}
    values["estimator"] |= {"kind": "es", "shaping": "z_score", "baseline": baseline}
    values["estimator"] |= {"num_seeds": 8, "batch_size": 8, "eps": 0.2, "weight_decay": 0.0}
    values["estimator"] |= {"lr": 0.2 if baseline == "batch" else 0.5}
    values["run"]["steps"] = 40
    lines = train(config(values), tmp_path / "ledger.jsonl")
    means = [-sum(pair[0] for pair in json.loads(line)["losses"]) / 8 for line in lines]
    assert sum(means[-5:]) / 5 > sum(means[:5]) / 5 + 0.3


@pytest.mark.slow
def test_runs_with_actors_from_the_command_line(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same ledger as in one process; no failure ends them, and no secret is written."""
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(MODULE) + "def told(row, text):\n"
        "    assert os.environ['JUDGE_KEY'] == 'hidden-one'\n"
        "    print(dict.fromkeys(os.environ), os.environ.get('HUB_TOKEN'))\n"
        "    return score(row, text)\n"
    )
    monkeypatch.setenv("JUDGE_KEY", "hidden-one")
    monkeypatch.setenv("HUB_TOKEN", "hidden-two")
    values["task"]["reward"] |= {"function": "mine:told", "environment": ["JUDGE_KEY"]}
    values["run"] |= {"eval_every": 1}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    lines = []
    for kind in ("ray", "local"):
        folder = tmp_path / kind
        where = (f"fleet.kind={kind}", "fleet.num_replicas=2", f"run.dir={folder}")
        done = launch("train", path, *where)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "the reward failed at some samples (" in done.stdout
        assert "samples at which the reward failed: " in done.stdout
        assert "Held-out reward" in done.stdout
        lines.append((folder / "ledger.jsonl").read_bytes().splitlines()[1:])
        summary = json.loads((folder / "summary.json").read_text())
        assert set(summary["lost"]) <= set(LOST) and sum(summary["lost"].values()) > 0
        log = (folder / "log.txt").read_text()
        assert "further failures are only counted" in log and "JUDGE_KEY" in log
        for file in folder.rglob("*"):
            assert not file.is_file() or b"hidden" not in file.read_bytes(), file
        assert "hidden" not in done.stdout + done.stderr
    assert lines[0] == lines[1]
    out = tmp_path / "scores.jsonl"
    done = launch("eval", folder, "--out", out, f"task.reward.path={tmp_path}")
    assert done.returncode == 0 and "after 3 steps: reward " in done.stdout, done.stdout
    scores = [json.loads(line) for line in out.read_text().splitlines()]
    assert sum(score["value"] for score in scores) / 10 == pytest.approx(summary["final_accuracy"])


def test_a_reward_that_is_not_there_is_told_before_anything_is_written(
    values: dict[str, Any], tmp_path: Path
) -> None:
    path, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    values["task"]["reward"]["function"] = "mine:scores"
    path.write_text(yaml.safe_dump(values))
    line = mistake("train", path, f"run.dir={folder}")
    assert "task.reward.function: mine:scores: AttributeError: module 'mine' has no attr" in line
    assert not folder.exists()


def test_an_empty_generation_is_judged_as_any_text(values: dict[str, Any]) -> None:
    """Answers end before the first letter of any word."""
    values["task"] |= {"stop": sorted({word[0] for word in WORDS})}
    values["task"]["reward"]["function"] = "mine:nothing"
    replica = Replica(config(values), DEVICE)
    losses = replica.evaluate([], [Probe(0, 7, 1, 0.3, (0, 1))])
    # A prompt is computed once for all of its samples.
    size = sum(len(prompt.tokens) for prompt in replica._prompts("train", (0, 1)))
    asked, spared = SAMPLES * size, (SAMPLES - 1) * size
    assert losses == [ProbeLoss(-0.5, size, asked, spared, (-0.5, -0.5), (0, 0, 0, 0, 0))]
    replica.close()


def test_a_function_that_cannot_be_imported_there_stops_the_run(values: dict[str, Any]) -> None:
    """As on a node that lacks the module: the driver has checked its own."""
    values["task"]["reward"]["function"] = "theirs:score"
    replica = Replica(config(values), DEVICE)
    with pytest.raises(ConfigError, match="task.reward.function: theirs:score: ModuleNotFound"):
        replica.evaluate([], [Probe(0, 7, 1, 0.3, (0, 1))])
    replica.close()


def test_rows_that_a_reward_sees_are_in_the_datas_hash(
    values: dict[str, Any], tmp_path: Path
) -> None:
    task = config(values).task
    before = tasks.load(task)
    path = Path(task.train.path)
    path.write_text(path.read_text().replace('"bonus": 7,', '"bonus": 8,'))
    after = tasks.load(task)
    assert before.train[0].prompt == after.train[0].prompt
    assert before.fingerprint() != after.fingerprint()
