"""The tasks' losses and scores by our engine, against transformers on the tables' texts."""

import json
import math
import string
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small_tokenizers
import suite
import torch
from conftest import DEVICE
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from orchestrator import answers, tasks
from orchestrator.config import Config, ConfigError, Task
from orchestrator.objectives import mean_loss, option_accuracy
from orchestrator.records import Probe, StepUpdate
from orchestrator.replica import Replica

NUM_ROWS = 20


@dataclass
class Model:
    """One small Llama, as a folder, in transformers and in our engine."""

    folder: Path
    tokenizer: PreTrainedTokenizerFast
    reference: PreTrainedModel

    @torch.no_grad()
    def logprobs(self, before: str, after: str) -> torch.Tensor:
        """Of the tokens that the text has more than `before`, one by one."""
        tokens = self.tokenizer(before + after)["input_ids"]
        start = len(self.tokenizer(before)["input_ids"])
        rows = self.reference(torch.tensor([tokens])).logits[0].log_softmax(-1)
        wanted: torch.Tensor = rows[range(start - 1, len(tokens) - 1), tokens[start:]]
        return wanted


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("models") / "llama"
    cases = [suite.case(name, row) for name in suite.TASKS for row in suite.rows(name, 4, seed=1)]
    texts = [case.stem + option for case in cases for option in case.options]
    tokenizer = small_tokenizers.llama(texts)
    torch.manual_seed(0)
    reference = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
        )
    )
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    reference.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Model(folder, tokenizer, reference.eval())


def task(name: str, folder: Path, rows: list[dict[str, Any]]) -> Task:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(path)}
    return Task.model_validate({"preset": name, "train": source, "test": source})


def expected_loss(model: Model, cases: list[suite.Case], kind: str | None = None) -> float:
    """As MeZO's, over the batch; of the table's kind, or of another."""
    if (kind or cases[0].loss) == "lm":
        right = [model.logprobs(case.stem, case.options[case.right[0]]) for case in cases]
        return -float(torch.cat(right).mean())
    losses = []
    for case in cases:
        logits = torch.stack([model.logprobs(case.stem, text).mean() for text in case.options])
        losses.append(cross_entropy(logits, torch.tensor(case.right[0])))
    return float(torch.stack(losses).mean())


def overlap(answer: str, gold: str) -> float:
    """F1 of words without case, articles and punctuation."""
    words = []
    for text in (answer, gold):
        plain = "".join(mark for mark in text.lower() if mark not in string.punctuation)
        words.append([word for word in plain.split() if word not in ("a", "an", "the")])
    shared = sum((Counter(words[0]) & Counter(words[1])).values())
    if not shared:
        return float(words[0] == words[1])
    return 2 * shared / (len(words[0]) + len(words[1]))


WRITTEN = ("squad", "drop")
CHOSEN = [name for name in suite.TASKS if name not in WRITTEN]


@pytest.mark.parametrize("loss", ["option_ce", "lm"])
@pytest.mark.parametrize("name", CHOSEN)
def test_losses_scores_and_accuracy_equal_transformers(
    name: str, loss: str, model: Model, tmp_path: Path
) -> None:
    """Under the table's loss and the other one; options as they are, and calibrated."""
    rows = suite.rows(name, NUM_ROWS)
    cases = [suite.case(name, row) for row in rows]
    made = replica(name, model, tmp_path, rows, loss=loss)
    ids = tuple(range(NUM_ROWS))
    (answer,) = made.evaluate([], [Probe(0, 7, 0, 1e-3, ids)])
    plain, fair = (made.score([], "test", ids, calibrated=each).examples for each in (False, True))
    made.close()
    assert answer.value == pytest.approx(expected_loss(model, cases, loss), abs=1e-4)
    for case, by_mean, by_difference in zip(cases, plain, fair, strict=True):
        assert case.alone is not None
        before, texts = case.alone
        given = [model.logprobs(case.stem, text) for text in case.options]
        alone = [float(model.logprobs(before, text).sum()) for text in texts]
        sums = [float(each.sum()) - less for each, less in zip(given, alone, strict=True)]
        for score, expected in (
            (by_mean, [float(each.mean()) for each in given]),
            (by_difference, sums),
        ):
            assert score.scores == pytest.approx(expected, abs=1e-4)
            best = max(range(len(expected)), key=expected.__getitem__)
            assert (score.prediction, score.value) == (best, float(best in case.right))


@pytest.mark.parametrize("name", WRITTEN)
def test_losses_answers_and_f1_equal_transformers(name: str, model: Model, tmp_path: Path) -> None:
    """Half of the right answers are given words that the model will write."""
    rows = suite.rows(name, NUM_ROWS)
    texts = [
        written(model, model.reference, suite.case(name, row).stem, "e", max_new_tokens=12)
        for row in rows
    ]
    for row, text in list(zip(rows, texts, strict=True))[::2]:
        golds = row["answers"]["text"] if name == "squad" else row["answers_spans"]["spans"]
        golds[1] = f"the {text[: len(text) // 2]} tale."
    made = replica(name, model, tmp_path, rows, stop=["e"], max_new_tokens=12)
    ids = tuple(range(NUM_ROWS))
    (answer,) = made.evaluate([], [Probe(0, 7, 0, 1e-3, ids)])
    found = made.score([], "test", ids).examples
    made.close()
    cases = [suite.case(name, row) for row in rows]
    assert answer.value == pytest.approx(expected_loss(model, cases), abs=1e-4)
    for row, text, score in zip(rows, texts, found, strict=True):
        golds = row["answers"]["text"] if name == "squad" else row["answers_spans"]["spans"]
        assert score.answer == text
        assert score.value == pytest.approx(max(overlap(text, gold) for gold in golds))
    assert len({score.value for score in found}) > 3


def replica(
    name: str,
    model: Model,
    folder: Path,
    rows: list[dict[str, Any]],
    space: str = "dense",
    **settings: Any,
) -> Replica:
    config = Config.model_validate(
        {
            "model": {"path": str(model.folder), "dtype": "float32", "kv_tokens": 2048},
            "space": {"kind": space},
            "task": task(name, folder, rows).model_dump() | settings,
            "fleet": {"kind": "local"},
            "run": {"steps": 1},
        }
    )
    return Replica(config, DEVICE)


def test_a_replica_trains_on_and_scores_options_that_differ_by_row(
    model: Model, tmp_path: Path
) -> None:
    rows = suite.rows("record", NUM_ROWS, seed=2)
    cases = [suite.case("record", row) for row in rows]
    made = replica("record", model, tmp_path, rows)
    examples = (3, 1, 4, 15)
    (answer,) = made.evaluate([], [Probe(0, 7, 0, 1e-3, examples)])
    assert answer.value == pytest.approx(
        expected_loss(model, [cases[id] for id in examples]), abs=1e-4
    )
    found = made.score([], "test", range(NUM_ROWS)).examples
    for case, score in zip(cases, found, strict=True):
        means = [float(model.logprobs(case.stem, text).mean()) for text in case.options]
        assert score.scores == pytest.approx(means, abs=1e-4)
        best = max(range(len(means)), key=means.__getitem__)
        assert (score.prediction, score.value) == (best, best in case.right)
    assert {score.value for score in found} == {1.0, 0.0}
    made.close()


@pytest.mark.parametrize(("name", "space"), [("rte", "dense"), ("copa", "lora"), ("squad", "lora")])
def test_demonstrations_are_computed_once_a_state(
    name: str, space: str, model: Model, tmp_path: Path
) -> None:
    """What is found in the cache is of the state that is scored, not of one before."""
    rows = suite.rows(name, NUM_ROWS, seed=3)
    settings = {"demonstrations": 4, "max_new_tokens": 8, "stop": ["e"]}
    made = replica(name, model, tmp_path, rows, space, **settings)
    chunk = made.score([], "test", range(NUM_ROWS))
    shown = tasks.load(made._task).demonstrations
    for row, score in zip(rows, chunk.examples, strict=True):
        case = suite.case(name, row)
        stem = shown + case.stem
        if name == "squad":
            assert score.answer == written(model, model.reference, stem, "e", max_new_tokens=8)
        else:
            means = [float(model.logprobs(stem, text).mean()) for text in case.options]
            assert score.scores == pytest.approx(means, abs=1e-4)
    size = len(model.tokenizer(shown)["input_ids"])
    assert chunk.num_reused >= (size - 1) * NUM_ROWS
    again = made.score([], "test", range(NUM_ROWS))
    assert again.num_tokens < chunk.num_tokens - size + 2

    update = StepUpdate(0, (7, 8), (0.2, -0.1) if space == "lora" else (0.02, -0.01), 1.0)
    moved = made.score([update], "test", range(NUM_ROWS))
    made.close()
    fresh = replica(name, model, tmp_path, rows, space, **settings)
    expected_chunk = fresh.score([update], "test", range(NUM_ROWS))
    fresh.close()
    for score, other in zip(moved.examples, expected_chunk.examples, strict=True):
        assert score.scores == pytest.approx(other.scores, abs=1e-5)
        assert score.answer == other.answer
    assert moved.examples != chunk.examples


@torch.no_grad()
def written(model: Model, reference: Any, stem: str, stop: str, max_new_tokens: int = 12) -> str:
    """What transformers continues a text with, greedily, before `stop`."""
    tokens = torch.tensor([model.tokenizer(stem)["input_ids"]])
    found = reference.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=model.tokenizer.eos_token_id,
        pad_token_id=0,
    )
    text: str = model.tokenizer.decode(found[0, tokens.shape[1] :], skip_special_tokens=True)
    return text.split(stop)[0].strip()


@pytest.mark.parametrize("space", ["dense", "lora"])
def test_answers_are_generated_under_the_trained_state(
    space: str, model: Model, tmp_path: Path
) -> None:
    """Against transformers, or PEFT, on what the state is exported to.

    The right answers hold some of the words that the model will write.
    """
    update = StepUpdate(0, (7, 8), (0.2, -0.1) if space == "lora" else (0.02, -0.01), 1.0)
    rows, stop = suite.rows("squad", NUM_ROWS, seed=2), "e"
    settings = {"stop": [stop], "max_new_tokens": 12}
    made = replica("squad", model, tmp_path, rows, space, **settings)
    exported = tmp_path / "exported"
    made.export([update], exported)
    reference = AutoModelForCausalLM.from_pretrained(
        model.folder if space == "lora" else exported, dtype=torch.float32
    )
    if space == "lora":
        reference = PeftModel.from_pretrained(reference, str(exported))
    stems = [suite.case("squad", row).stem for row in rows]
    texts = [written(model, reference, stem, stop) for stem in stems]
    untrained = [written(model, model.reference, stem, stop) for stem in stems]
    assert len(set(texts)) > NUM_ROWS // 2 and texts != untrained
    found = made.score([], "test", range(NUM_ROWS)).examples
    assert [score.answer for score in found] == texts
    made.close()

    for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
        row["answers"]["text"] = [text[: len(text) // 2] or "x", text if index % 3 == 0 else "no"]
    made = replica("squad", model, tmp_path, rows, space, metric="exact_match", **settings)
    values = [score.value for score in made.score([update], "test", range(NUM_ROWS)).examples]
    golds = [row["answers"]["text"] for row in rows]
    assert values == [answers.exact_match(*pair) for pair in zip(texts, golds, strict=True)]
    assert 0 < sum(values) < NUM_ROWS
    made.close()


@pytest.mark.parametrize("space", ["dense", "lora", "low_rank", "prefix"])
def test_generated_answers_are_an_objective(space: str, model: Model, tmp_path: Path) -> None:
    """A probe's loss is minus the metric's mean at the state that its perturbation leads to."""
    rows = suite.rows("squad", NUM_ROWS, seed=4)
    settings = {"stop": ["e"], "max_new_tokens": 12}
    made = replica("squad", model, tmp_path, rows, space, **settings)
    for row, score in zip(rows, made.score([], "test", range(NUM_ROWS)).examples, strict=True):
        row["answers"]["text"] = [score.answer or "x"]
    made.close()
    settings["objective"] = "f1"
    made = replica("squad", model, tmp_path, rows, space, **settings)
    eps = 0.004 if space in ("dense", "low_rank") else 0.2
    examples = tuple(range(3, NUM_ROWS))
    probes = [Probe(0, 7, sign, eps, examples) for sign in (1, -1)]
    found = made.evaluate([], probes)
    before = made.score([], "test", examples)
    made.close()
    values = [loss.value for loss in found]
    assert sum(score.value for score in before.examples) == len(examples)
    assert len({-1.0, *values}) == 3  # both signs differ, from each other and from the base
    for probe, loss in zip(probes, found, strict=True):
        update = StepUpdate(0, (probe.seed,), (probe.sign * eps,), 1.0)
        fresh = replica("squad", model, tmp_path, rows, space, **settings)
        scores = fresh.score([update], "test", examples).examples
        fresh.close()
        assert loss.value == pytest.approx(-sum(s.value for s in scores) / len(scores))
        assert loss.num_tokens > len(examples)


@pytest.mark.parametrize("name", ["sst2", "record"])
def test_accuracy_is_an_objective(name: str, model: Model, tmp_path: Path) -> None:
    rows = suite.rows(name, NUM_ROWS, seed=4)
    made = replica(name, model, tmp_path, rows, objective="accuracy")
    examples = (3, 1, 4, 15, 9)
    (loss,) = made.evaluate([], [Probe(0, 7, 0, 1e-3, examples)])
    values = [score.value for score in made.score([], "test", examples).examples]
    assert loss.value == -sum(values) / len(values) != 0
    made.close()


def test_an_objective_is_nothing_where_a_score_is_not_finite() -> None:
    assert option_accuracy([-2.0, -1.0, -3.0], [1]) == option_accuracy([0.0, -1.0], [1, 0]) == 1
    assert option_accuracy([-2.0, -1.0], [0]) == 0
    assert math.isnan(option_accuracy([-2.0, math.nan], [0]))


def test_prompts_that_leave_no_room_for_an_answer_are_refused(model: Model, tmp_path: Path) -> None:
    rows = suite.rows("squad", 2)
    with pytest.raises(ConfigError, match="task.max_length: a sequence has 600 tokens"):
        replica("squad", model, tmp_path, rows, max_length=600, max_new_tokens=599)


def test_every_token_of_a_batch_weighs_the_same() -> None:
    assert mean_loss([2.0, 9.0], [1, 10]) == pytest.approx(1.0)
