"""Runs on questions of passages: what they reuse, what is told of it, wrong reuse found out."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import DEVICE, WORDS

from orchestrator import run_folder, runs
from orchestrator.batches import Batches
from orchestrator.cache_check import ReuseError
from orchestrator.config import Config, ConfigError
from orchestrator.local import LocalFleet
from orchestrator.pools import Pools
from orchestrator.progress import Display
from orchestrator.records import Probe, ProbeLoss
from orchestrator.tasks import load

SPACES: list[dict[str, Any]] = [
    {"kind": "dense"},
    {"kind": "lora", "slots": 4},
    {"kind": "low_rank", "slots": 2},
    {"kind": "prefix", "slots": 2, "tokens": 3},
]
OPTIONS = [" ".join(words) for words in (("so", "good"), ("so", "bad"), ("dull",), ("a", "film"))]
NUM_PASSAGES = 6
TOLERANCE = 1e-4 if DEVICE == "cuda" else 1e-5


def write_passages(path: Path) -> Path:
    """Four questions to each of a few passages, in an order that mixes the passages."""
    draw = random.Random(0)
    passages = [" ".join(draw.choices(WORDS, k=40)) for _ in range(NUM_PASSAGES)]
    rows = [
        {"passage": passage, "question": " ".join(draw.choices(WORDS, k=5)), "label": 1}
        for _ in range(4)
        for passage in passages
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def questions(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe whose batches are the questions of two passages."""
    task = {
        "template": "{passage} what {question} was {option}",
        "options": OPTIONS,
        "group_by": "passage",
        "train": {"path": str(write_passages(tmp_path / "rows.jsonl"))},
        "holdout": 4,
    }
    estimator = {**recipe["estimator"], "batch_size": 8}
    return {**recipe, "task": task, "estimator": estimator}


def losses(values: dict[str, Any], **run: Any) -> list[ProbeLoss]:
    """Both signs of two seeds, at the first step."""
    config = Config.model_validate({**values, "run": {**values["run"], **run}})
    data = load(config.task)
    examples = Batches(config, len(data.train), data.groups).of(0)
    assert 2 <= len({data.train[id].group for id in examples}) <= 3
    probes = [Probe(0, seed, sign, 0.05, examples) for seed in (7, 8) for sign in (1, -1)]
    fleet = LocalFleet(config, DEVICE)
    fleet.start()
    try:
        return fleet.evaluate(probes)
    finally:
        fleet.close()


@pytest.mark.parametrize("space", SPACES, ids=lambda space: str(space["kind"]))
def test_losses_are_those_of_whole_sequences_for_a_fraction_of_the_tokens(
    space: dict[str, Any], questions: dict[str, Any]
) -> None:
    values = {**questions, "space": space}
    shared = losses(values, verify_cache=1)
    model = {**values["model"], "share_contexts": False}
    whole = losses({**values, "model": model})
    assert [loss.value for loss in shared] == pytest.approx(
        [loss.value for loss in whole], abs=TOLERANCE
    )
    for loss, other in zip(shared, whole, strict=True):
        assert loss.num_asked == other.num_asked
        assert loss.num_tokens < 0.2 * loss.num_asked
        assert other.num_tokens > 2 * loss.num_tokens
    assert len({loss.value for loss in shared}) == 4


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rows that begin with entries of the row before them, but for the first, which they lack."""
    share = Pools.share

    def shifted(self: Pools, requests: Any, taken: Any) -> None:
        share(self, requests, taken)
        for request, size in zip(requests, taken, strict=True):
            row = self.requests.req_to_token[request.req_pool_idx]
            row[: max(0, size - 1)] = row[1:size].clone()

    monkeypatch.setattr(Pools, "share", shifted)
    yield


@pytest.mark.parametrize("space", SPACES, ids=lambda space: str(space["kind"]))
def test_a_wrong_reuse_ends_the_run(
    space: dict[str, Any], questions: dict[str, Any], wrong: None
) -> None:
    model = {**questions["model"], "score_graphs": False}  # which share in a way of their own
    values = {**questions, "space": space, "model": model}
    assert len(losses(values)) == 4  # nobody looks
    assert len(losses(values, verify_cache=9)) == 4  # the ninth does not come
    with pytest.raises(ReuseError, match=r"differs by .* rounding explains .*share_contexts=false"):
        losses(values, verify_cache=3)


def test_a_run_tells_what_it_has_reused(questions: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(questions))
    folder = tmp_path / "run"
    run = run_folder.choose(path, [f"run.dir={folder}", "run.steps=3", "run.verify_cache=2"])
    data = load(run.config.task)
    assert len(set(data.groups)) == NUM_PASSAGES
    folder.mkdir()
    with (folder / "said.txt").open("w") as said:
        runs._train(run, Display(said, 3))
    summary = json.loads((folder / "summary.json").read_text())
    kv = summary["kv"]
    assert kv["asked"] == kv["computed"] + kv["inside"] + kv["across"]
    assert kv["across"] == 0 and 0.8 < kv["reused_share"] < 1
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    noted = [step["kv"] for step in steps if step["kind"] == "step"]
    assert len(noted) == 3
    assert sum(step["asked"] for step in noted) == kv["asked"]
    assert "prompt tokens asked" in (folder / "said.txt").read_text()
    page = runs.report(folder).read_text()
    assert "KV reuse" in page


def test_a_group_that_no_row_has_is_a_mistake(questions: dict[str, Any]) -> None:
    task = {**questions["task"], "group_by": "paragraph"}
    config = Config.model_validate({**questions, "task": task})
    with pytest.raises(ConfigError, match=r"task\.group_by: paragraph is not a field of .*rows"):
        load(config.task)


def test_groups_are_of_the_data_that_a_ledger_belongs_to(questions: dict[str, Any]) -> None:
    config = Config.model_validate(questions)
    task = {**questions["task"], "group_by": None}
    ungrouped = Config.model_validate({**questions, "task": task})
    assert config.identity() != ungrouped.identity()
    assert load(config.task).fingerprint() != load(ungrouped.task).fingerprint()
    assert load(ungrouped.task).groups == ()
