"""Logistic regression on hidden states, against the same objective minimised by torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold
from test_launch import DONE, launch, mistake
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator import tasks
from orchestrator.config import Config, ConfigError
from orchestrator.linear_probe import INVERSE_STRENGTHS, NUM_FOLDS, check, fitted_scores

Values = NDArray[np.float64]


def reference_fit(states: Values, labels: NDArray[np.int64], inverse: float) -> torch.nn.Linear:
    """Minimises inverse * sum of cross-entropies + half the square of the weights."""
    inputs, wanted = torch.from_numpy(states), torch.from_numpy(labels)
    layer = torch.nn.Linear(inputs.shape[1], int(wanted.max()) + 1, dtype=torch.float64)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(
        layer.parameters(), max_iter=2000, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(layer(inputs), wanted, reduction="sum")
        total: torch.Tensor = loss + layer.weight.square().sum() / (2 * inverse)
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    return layer


@torch.no_grad()
def log_probabilities(layer: torch.nn.Linear, states: Values) -> Values:
    found: Values = layer(torch.from_numpy(states)).log_softmax(1).numpy()
    return found


def test_scores_equal_an_independent_regression() -> None:
    """Three classes that overlap, so that the strength matters; its choice is made here too."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 120)
    centres = draw.normal(size=(3, 8))
    states = 5 * (centres[labels] + 1.5 * draw.normal(size=(120, 8)))
    held_out = 5 * draw.normal(size=(30, 8))
    scaled = states / np.sqrt(np.mean(states**2))
    right: Values = np.zeros(len(INVERSE_STRENGTHS))
    for train, test in StratifiedKFold(NUM_FOLDS).split(scaled, labels):
        for number, inverse in enumerate(INVERSE_STRENGTHS):
            layer = reference_fit(scaled[train], labels[train], inverse)
            chosen = log_probabilities(layer, scaled[test]).argmax(1)
            right[number] += np.mean(chosen == labels[test])
    best = INVERSE_STRENGTHS[right.argmax()]
    assert right.max() > right.min()
    layer = reference_fit(scaled, labels, best)
    expected = log_probabilities(layer, held_out / np.sqrt(np.mean(states**2)))
    found = fitted_scores(states.astype(np.float32), labels.tolist(), held_out.astype(np.float32))
    np.testing.assert_allclose(found, expected, atol=2e-2)
    again = fitted_scores(states.astype(np.float32), labels.tolist(), held_out.astype(np.float32))
    assert np.array_equal(found, again)


def test_tasks_without_classes_or_rows_are_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    def refused(**task: Any) -> str:
        config = Config.model_validate({**recipe, "task": {**recipe["task"], **task}})
        with pytest.raises(ConfigError) as error:
            check(config.task, tasks.load(config.task))
        return str(error.value)

    rows = tmp_path / "rows.jsonl"
    row = {"sentence": "a film", "other": "so", "label": "a film", "answers": {"text": ["so"]}}
    rows.write_text(json.dumps(row) + "\n")
    one = {"train": {"path": str(rows)}, "test": {"path": str(rows)}}
    assert "task.loss is lm" in refused(loss="lm")
    assert "of 6 training rows are" in refused(num_train=6)
    assert "{sentence} differs by row" in refused(**one, options=["{sentence}", "{other}"])
    written = {"options": [], "label_names": [], "loss": "lm", "label": "answers.text"}
    assert "task.metric is f1" in refused(**one, **written, metric="f1")


@torch.no_grad()
def states_of(folder: Path, rows: Path) -> tuple[NDArray[np.float32], list[int]]:
    """Final hidden states of sst2's prompts, by transformers, and their labels."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    states, labels = [], []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        tokens = torch.tensor([tokenizer(f"{row['sentence']} It was").input_ids])
        states.append(model.model(tokens).last_hidden_state[0, -1].numpy())
        labels.append(row["label"])
    return np.stack(states), labels


@pytest.mark.slow
def test_eval_scores_by_a_linear_probe(recipe: dict[str, Any], tmp_path: Path) -> None:
    path, base, start = (tmp_path / name for name in ("tiny.yaml", "base.jsonl", "start.jsonl"))
    path.write_text(yaml.safe_dump(recipe))
    done = launch("eval", path, "--linear-probe", "--out", base)
    assert done.returncode == DONE, done.stdout + done.stderr
    lines = [json.loads(line) for line in base.read_text().splitlines()]
    folder, task = Path(recipe["model"]["path"]), recipe["task"]
    states, labels = states_of(folder, Path(task["train"]["path"]))
    held_out, right = states_of(folder, Path(task["test"]["path"]))
    expected = fitted_scores(states, labels, held_out)
    np.testing.assert_allclose([line["scores"] for line in lines], expected, atol=1e-2)
    assert [line["label"] for line in lines] == right
    assert [line["value"] for line in lines] == [
        float(line["prediction"] == line["label"]) for line in lines
    ]
    share = sum(line["value"] for line in lines) / len(lines)
    assert f"linear probe of 40 training rows, accuracy {share:.1%} (" in done.stdout

    # Two actors, of which one fits; a run's state before its first step is the base model.
    run = tmp_path / "run"
    trained = launch("train", path, f"run.dir={run}", "run.steps=1", "estimator.lr=0.1")
    assert trained.returncode == DONE, trained.stdout + trained.stderr
    assert launch("eval", run, "--linear-probe", "--at", "0", "--out", start).returncode == DONE
    assert start.read_text() == base.read_text()
    last = launch(
        "eval", run, "fleet={kind: ray, num_replicas: 2}", "--linear-probe", "--out", start
    )
    assert "after 1 steps: linear probe of 40" in last.stdout, last.stdout + last.stderr
    assert start.read_text() != base.read_text()
    assert "--calibrated: a linear probe" in mistake(
        "eval", path, "--linear-probe", "--calibrated", "--out", start
    )
