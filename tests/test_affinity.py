"""Fleets whose replicas each hold some of the contexts: the same run, and more of it reused."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import DEVICE, WORDS, write_questions
from test_training import ACTIVATED, MARKED_QUESTION, batches_of, train

from orchestrator.config import Config
from orchestrator.driver import Driver
from orchestrator.local import LocalFleet
from orchestrator.metrics import Evaluation, StepMetrics
from orchestrator.pieces import Assignment, Pieces
from orchestrator.records import Probe, ProbeLoss
from orchestrator.replica import Replica
from orchestrator.seed_sync import Header, Ledger

NUM_PASSAGES, QUESTIONS, WORDS_EACH = 24, 4, 100
A_STEP = 4  # passages of a batch
GROUPS = 2  # of probes a step
STEPS = 3 * NUM_PASSAGES // A_STEP  # three epochs
POOL = 1800  # tokens: more than half of the contexts with a batch's rows, and less than all
SMALL_POOL = 1000  # less than one replica's half


def write_passages(path: Path) -> Path:
    draw = random.Random(0)
    others = [word for word in WORDS if word != "what"]
    passages = [" ".join(draw.choices(others, k=WORDS_EACH)) for _ in range(NUM_PASSAGES)]
    rows = [
        {"passage": passage, "question": " ".join(draw.choices(others, k=3)), "label": 1}
        for _ in range(QUESTIONS)
        for passage in passages
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def passages(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe whose batches are all questions of a few passages, for a fleet of two replicas."""
    values: dict[str, Any] = yaml.safe_load(yaml.safe_dump(recipe))
    rows = str(write_passages(tmp_path / "rows.jsonl"))
    values["task"] = {
        "template": "{passage} {*}what was {question} It {option}",
        "options": ["good film", "bad", "so so dull"],
        "group_by": "passage",
        "train": {"path": rows},
        "test": {"path": rows},
        "num_test": 8,
    }
    values["space"] = {**ACTIVATED, "slots": 2}
    values["estimator"] |= {"num_seeds": GROUPS, "batch_size": A_STEP * QUESTIONS}
    values["fleet"] |= {"num_replicas": 2, "affinity": "context"}
    values["model"]["kv_tokens"] = POOL
    values["run"]["steps"] = STEPS
    return values


class Found:
    """Adds up the tokens of contexts that were in a replica's pool."""

    def __init__(self) -> None:
        self.tokens = 0

    def step(self, step: StepMetrics) -> None:
        self.tokens += step.kv.across

    def evaluation(self, evaluation: Evaluation) -> None:
        pass


def share_found(values: dict[str, Any], path: Path) -> tuple[float, int, list[bytes]]:
    """The share of the contexts that a run's probes needed, in tokens, that an earlier forward had
    left; how many tokens were evicted; and the ledger's steps."""
    config = Config.model_validate(values)
    fleet, found = LocalFleet(config, DEVICE), Found()
    info = fleet.start()
    header = Header(1, 1, config.model.path, info.weights_hash, config.identity(), "", ())
    batches, _ = batches_of(config)
    with Ledger.create(path, header) as ledger:
        driver = Driver(config, fleet, ledger, [found], batches=batches, num_test=0)
        for step in range(STEPS):
            driver.step(step)
    evicted = sum(replica.engine._pools.cache.num_evicted for replica in fleet._replicas)
    fleet.close()
    needed = STEPS * GROUPS * A_STEP * WORDS_EACH
    return found.tokens / needed, evicted, path.read_bytes().splitlines()[1:]


@pytest.mark.slow
def test_two_pools_hold_what_one_does_not(
    passages: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each context is computed once, where it was twice a step; homes that change with each step
    would spoil that, and pools that are too small for it change no bit."""
    share, evicted, lines = share_found(passages, tmp_path / "affinity")
    assert share == pytest.approx((0.5 + 1 + 1) / 3)  # once an epoch is over, all is there
    assert evicted == 0

    changes = {"model": {"kv_tokens": SMALL_POOL}, "run": {"verify_cache": 3}}
    small = {**passages, **{key: {**passages[key], **value} for key, value in changes.items()}}
    less, evicted, same = share_found(small, tmp_path / "small")
    assert less < 0.7 and evicted > NUM_PASSAGES * WORDS_EACH
    assert same == lines

    draw = random.Random(0)

    def homeless(pieces: Pieces, work: Sequence[Assignment]) -> list[int]:
        return [draw.randrange(8) for _ in work]

    with monkeypatch.context() as patch:
        patch.setattr(Pieces, "homes", homeless)
        astray, _, same = share_found(passages, tmp_path / "astray")
    assert astray < 0.6
    assert same == lines

    passages["fleet"] = {**passages["fleet"], "affinity": "none"}
    plain, evicted, _ = share_found(passages, tmp_path / "plain")
    assert plain < 0.3
    assert evicted > 2 * NUM_PASSAGES * WORDS_EACH


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["option_ce", "lm", "accuracy", "f1"])
def test_the_ledger_is_the_same_for_any_fleet_and_losses_those_of_whole_batches(
    objective: str, passages: dict[str, Any], tmp_path: Path
) -> None:
    if objective == "lm":
        passages["task"]["loss"] = "lm"
    elif objective == "accuracy":
        passages["task"]["objective"] = "accuracy"
    elif objective == "f1":
        rows = write_questions(tmp_path / "questions.jsonl", 50)
        passages["task"] = {"preset": "squad", "train": {"path": str(rows)}, "holdout": 10}
        passages["task"] |= {"max_new_tokens": 8, "template": MARKED_QUESTION, "objective": "f1"}
    passages["estimator"] |= {"eps": 0.3, "batch_size": 10}  # ends within a passage
    passages["run"]["steps"] = 6
    ledgers = []
    for number in (1, 2, 3):
        passages["fleet"]["num_replicas"] = number
        ledgers.append(train(Config.model_validate(passages), tmp_path / f"{number}.jsonl"))
    assert len(ledgers[0]) == 6
    assert ledgers[0] == ledgers[1] == ledgers[2]
    lines = [json.loads(line) for line in ledgers[0]]
    assert len({loss for line in lines for pair in line["losses"] for loss in pair}) > 3

    examples = (*range(12), 3, 3)
    probes = [Probe(0, seed, sign, 0.3, examples) for seed in range(2) for sign in (1, -1)]
    cut = evaluated(passages, probes)
    passages["fleet"]["affinity"] = "none"
    whole = evaluated(passages, probes)
    for loss, other in zip(cut, whole, strict=True):
        assert loss.value == pytest.approx(other.value, abs=1e-5)
        assert loss.parts == pytest.approx(other.parts, abs=2e-4)
        assert loss.weights == other.weights
        assert loss.num_asked == other.num_asked


def evaluated(values: dict[str, Any], probes: Sequence[Probe]) -> list[ProbeLoss]:
    fleet = LocalFleet(Config.model_validate(values), DEVICE)
    fleet.start()
    losses = fleet.evaluate(probes)
    fleet.close()
    return losses


@pytest.mark.slow
def test_a_replica_plans_the_piece_that_it_is_asked_next(passages: dict[str, Any]) -> None:
    """While it waits for its forwards: the same piece of the next step's batch."""
    passages["fleet"]["pieces"] = A_STEP
    config = Config.model_validate(passages)
    replica, (batches, _) = Replica(config, DEVICE), batches_of(config)
    (piece, positions), *_ = replica.pieces.cut(batches.of(0))
    examples = tuple(batches.of(0)[position] for position in positions)
    replica.evaluate([], [Probe(0, 5, 1, 0.1, examples), Probe(0, 5, -1, 0.1, examples)])
    planned = [batch.examples for batch in replica._latest if batch.plans]
    following = replica.pieces.counterpart(examples, batches.of(1))
    assert planned == [following, examples]
    assert {replica.pieces.of_example[id] for each in planned for id in each} == {piece}
    replica.close()
