"""SQuAD's published file as rows: what examples.squad writes, `task.preset: squad` reads."""

import json
import sys
from pathlib import Path

import pytest

from examples import squad
from orchestrator import tasks
from orchestrator.recipe_file import load

RECIPE = Path(__file__).parent.parent / "configs" / "squad.yaml"
QUESTIONS = [
    {"question": " What fell?", "answers": [{"text": "rain"}, {"text": "the rain"}]},
    {"question": "Who saw it?", "answers": []},
    {"question": "Where?", "answers": [{"text": "in Spain"}]},
]


def test_a_row_is_a_question_with_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published, out = tmp_path / "dev.json", tmp_path / "squad.jsonl"
    paragraph = {"context": "Rain fell in Spain.", "qas": QUESTIONS}
    published.write_text(json.dumps({"data": [{"title": "Rain", "paragraphs": [paragraph]}]}))
    monkeypatch.setattr(sys, "argv", ["examples.squad", str(published), str(out)])
    squad.main()
    settings = ("holdout=1", "num_train=1", "num_test=1")
    config = load(RECIPE, [f"task.train.path={out}", *(f"task.{each}" for each in settings)])
    data = tasks.load(config.task)
    examples = sorted((*data.train, *data.test), key=lambda example: example.prompt)
    assert [example.prompt for example in examples] == [
        f"Title: Rain\nContext: Rain fell in Spain.\nQuestion: {question}\nAnswer:"
        for question in ("What fell?", "Where?")
    ]
    assert [example.answers for example in examples] == [("rain", "the rain"), ("in Spain",)]
