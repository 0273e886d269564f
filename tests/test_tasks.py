"""Rows to prompts to tokens, and what is wrong with rows, told by file, line and field."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator import tasks
from orchestrator.config import ConfigError, Task

ROWS: list[dict[str, Any]] = [
    {"sentence": "a dull film", "label": 0},
    {"sentence": "it {was} great", "label": "great"},
    {"sentence": "line\u2028separator, so good", "label": "1"},
]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def task(path: str, **others: Any) -> Task:
    values = {"preset": "sst2", "train": {"path": path}, "holdout": 1} | others
    return Task.model_validate(values)


def test_rows_become_prompts_with_every_option(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    data = tasks.load(task(path, holdout=None, test={"path": path}))
    assert [row.texts for row in data.train] == [row.texts for row in data.test]
    assert data.train[1].prompt == "it {was} great It was"
    assert data.train[1].texts == ("it {was} great It was terrible", "it {was} great It was great")
    assert [example.label for example in data.train] == [0, 1, 1]
    assert [example.id for example in data.train] == [0, 1, 2]


def test_held_out_rows_are_fixed_and_disjoint(tmp_path: Path) -> None:
    rows = [{"sentence": str(number), "label": 0} for number in range(50)]
    settings = task(write(tmp_path / "rows.jsonl", rows), holdout=20)
    data = tasks.load(settings)
    train, test = ({example.prompt for example in part} for part in (data.train, data.test))
    assert (len(train), len(test), len(train | test)) == (30, 20, 50)
    assert tasks.load(settings) == data
    assert tasks.load(settings).fingerprint() == data.fingerprint()


def test_the_fingerprint_follows_texts_and_labels(tmp_path: Path) -> None:
    first = tasks.load(task(write(tmp_path / "a.jsonl", ROWS)))
    changed = [{**ROWS[0], "label": 1}, *ROWS[1:]]
    second = tasks.load(task(write(tmp_path / "b.jsonl", changed)))
    assert first.fingerprint() != second.fingerprint()


def test_the_fingerprint_tells_which_rows_are_in_which_split(tmp_path: Path) -> None:
    """Though the rows, split after split, are the same."""
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    found = []
    for size in (1, 2):
        write(train, ROWS[:size])
        write(test, ROWS[size:])
        settings = task(str(train), holdout=None, test={"path": str(test)})
        found.append(tasks.load(settings).fingerprint())
    hashes = [each.partition("-") for each in found]
    assert hashes[0][0] == hashes[1][0]
    assert [sizes for _, _, sizes in hashes] == ["1-0-2", "2-0-1"]


REFUSALS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    r"rows.jsonl: holds no rows$": ([], {}),
    r"holds no rows where \{'label': '7'\}": (ROWS, {"where": {"label": "7"}}),
    r"rows.jsonl:2: must be an object, is 3": ([ROWS[0], 3], {}),
    r"task.template: sentence is not a field of .*:1; it has text, label": (
        [{"text": "a", "label": 0}],
        {},
    ),
    r"task.label: label is not a field of .*:1; it has sentence": ([{"sentence": "a"}], {}),
    r"task.label: .*:2: 2 is not an option; accepted: 0 to 1 or one of terrible, great, neg": (
        [ROWS[0], {"sentence": "a", "label": 2}],
        {},
    ),
    r"task.template: sentence has no value in .*:2": (
        [ROWS[0], {"sentence": None, "label": 0}],
        {},
    ),
    r"task.train: film is not a field of .*:1": (ROWS, {"rename": {"film": "sentence"}}),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_bad_rows_are_refused_by_name(message: str, tmp_path: Path) -> None:
    rows, source = REFUSALS[message]
    train = {"path": write(tmp_path / "rows.jsonl", rows), **source}
    settings = task("", train=train, holdout=None, test=train)
    with pytest.raises(ConfigError, match=message):
        tasks.load(settings)


def test_nothing_left_to_train_on_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ConfigError, match="task.holdout: 3 rows cannot be held out of 3"):
        tasks.load(task(path, holdout=3))


def numbered(path: Path, count: int) -> str:
    return write(path, [{"sentence": str(number), "label": number % 2} for number in range(count)])


def sentences(examples: tuple[tasks.Example, ...]) -> list[str]:
    return [example.prompt.split()[0] for example in examples]


def test_splits_are_drawn_by_fixed_permutations(tmp_path: Path) -> None:
    path = numbered(tmp_path / "rows.jsonl", 60)
    sizes: dict[str, Any] = {"num_train": 20, "num_dev": 10, "num_test": 15}
    data = tasks.load(task(path, holdout=None, test={"path": path}, **sizes))
    train, dev, test = map(sentences, (data.train, data.dev, data.test))
    assert (len(train), len(dev), len(test)) == (20, 10, 15)
    assert len({*train, *dev}) == 30
    assert tasks.load(task(path, holdout=None, test={"path": path}, **sizes)) == data
    # as in MeZO, the first rows of one order are trained on and those after them choose
    more = tasks.load(task(path, holdout=None, test={"path": path}, num_train=30))
    assert sentences(more.train) == train + dev
    rest = tasks.load(task(path, holdout=20, num_dev=10))
    assert (len(rest.train), len(rest.dev), len(rest.test)) == (30, 10, 20)
    parts = (rest.train, rest.dev, rest.test)
    assert len({text for part in parts for text in sentences(part)}) == 60


def test_dev_rows_and_demonstrations_are_in_the_fingerprint(tmp_path: Path) -> None:
    path = numbered(tmp_path / "rows.jsonl", 30)
    settings: list[dict[str, Any]] = [{}, {"num_dev": 3}, {"demonstrations": 2}]
    prints = {tasks.load(task(path, **others)).fingerprint() for others in settings}
    assert len(prints) == 3


def test_demonstrations_are_answered_rows_that_are_not_trained_on(tmp_path: Path) -> None:
    path = numbered(tmp_path / "rows.jsonl", 30)
    data = tasks.load(task(path, demonstrations=3))
    shown = data.demonstrations.split("\n\n")
    assert shown.pop() == ""
    assert len(shown) == 3
    for text in shown:
        number, answer = text.split(" It was ")
        assert answer == ("great" if int(number) % 2 else "terrible")
        assert number not in sentences(data.train)
    assert len(data.train) == 30 - 1 - 3
    assert all("\n" not in example.prompt for example in data.test)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (
            {"num_train": 9, "num_dev": 2},
            "num_train: 9, task.num_dev: 2 and task.demonstr.* 10 rows",
        ),
        ({"num_dev": 10}, "task.num_dev: 10 .* more than the 10 rows of task.train; lower them"),
        ({"demonstrations": 10}, "task.demonstrations: 10 are more than the 10 rows of task.train"),
        ({"num_test": 2}, "task.num_test: 2 is more than the 1 rows to test on"),
    ],
)
def test_more_rows_than_there_are_cannot_be_drawn(
    others: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        tasks.load(task(numbered(tmp_path / "rows.jsonl", 11), **others))


def one(tmp_path: Path, row: dict[str, Any], **values: Any) -> tasks.Example:
    """A single row under a task of one's own."""
    source = {"path": write(tmp_path / "rows.jsonl", [row])}
    values = {"template": "{text} {option}", "train": source, "test": source} | values
    return tasks.load(Task.model_validate(values)).test[0]


@pytest.mark.parametrize(
    ("label", "right"),
    [(1, 1), ("0", 0), ("No", 1), (True, 0), (False, 1), ("TRUE", 0), ("false", 1), (["No"], 1)],
)
def test_labels_are_numbers_texts_or_names(label: Any, right: int, tmp_path: Path) -> None:
    names = {"options": ["Yes", "No"], "label_names": ["true", "false"]}
    assert one(tmp_path, {"text": "a", "label": label}, **names).label == right


@pytest.mark.parametrize("label", [True, 2, -1, "maybe", "1.0", ["maybe", 1], [], None, {"a": 1}])
def test_a_label_that_is_no_option_is_refused(label: Any, tmp_path: Path) -> None:
    """True is no number here: the first option may well be the one for yes."""
    with pytest.raises(ConfigError, match=r"task.label: .*rows.jsonl:1: .* is not an option"):
        one(tmp_path, {"text": "a", "label": label}, options=["Yes", "No"])


def test_options_may_come_from_the_row(tmp_path: Path) -> None:
    row = {"text": "a", "first": " x ", "more": ["y", 3, "y"], "label": ["y", "q"]}
    example = one(tmp_path, row, options=["{first|strip}", "{more}", "z"])
    assert example.texts == ("a x", "a y", "a 3", "a y", "a z")
    assert (example.label, example.also_right) == (1, (3,))


def test_fields_are_found_by_their_path(tmp_path: Path) -> None:
    row = {"text": {"body": ["no", {"en": "hello"}]}, "answers": [{"t": "b"}, {"t": "c"}]}
    values = {"template": "{text.title} {option}", "metric": "f1", "loss": "lm"}
    with pytest.raises(ConfigError, match=r"text.title is not a field of .*:1; it has text, ans"):
        one(tmp_path, row, label="answers.t", **values)
    row["text"] = {"title": "T"}
    example = one(tmp_path, row, label="answers.t", **values)
    assert (example.answers, example.texts) == (("b", "c"), ("T b",))


NO_ANSWER: dict[str, Any] = {"metric": "f1", "loss": "lm", "label": "gold"}
BAD_ROWS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"text": "a", "some": []}, {"options": ["{some}"]}, "task.options: .*rows.jsonl:1 holds none"),
    ({"text": "a", "some": None}, {"options": ["{some}"]}, "task.options: some of .*:1 holds no t"),
    ({"text": "a"}, {"options": ["{some}"]}, "task.options: some is not a field of .*:1; it has t"),
    ({"text": "a", "gold": []}, NO_ANSWER, "task.label: gold of .*rows.jsonl:1 holds no answer"),
    ({"text": "a", "gold": [{}]}, NO_ANSWER, r"task.label: gold of .*:1 holds no text: \{\}"),
    ({"text": ["a"], "gold": "b"}, NO_ANSWER, "task.template: text is not a single text in .*:1"),
    (
        {"text": "a", "gold": "b"},
        {**NO_ANSWER, "template": "{text|as_connective} {option}"},
        "task.template: .*rows.jsonl:1: 'a' is neither cause nor effect",
    ),
    (
        {"text": "a"},
        {"options": ["{text|as_connective}", "b"]},
        "task.options: .*rows.jsonl:1: 'a' is neither cause nor effect",
    ),
]


@pytest.mark.parametrize(("row", "values", "message"), BAD_ROWS)
def test_a_row_without_what_the_task_asks_for_is_refused(
    row: dict[str, Any], values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        one(tmp_path, row, **values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("written", ["{ sentence }", "{sentence | strip}", "{product-title|strip}"])
def test_what_was_meant_for_a_field_is_refused(written: str, tmp_path: Path) -> None:
    """Else it would stand in every prompt as it is written; braces that name no field do."""
    row = {"sentence": "fine", "label": 0, "product-title": "x"}
    boxed = "\\boxed{the answer} {sentence} {option}"
    found = one(tmp_path, row, options=["a", "b"], template=boxed)
    assert found.prompt == "\\boxed{the answer} fine"
    with pytest.raises(ConfigError, match=r"task\.template: \{.*\} is no field as it is written"):
        one(tmp_path, row, options=["a", "b"], template=f"{written} {{sentence}}{{option}}")
