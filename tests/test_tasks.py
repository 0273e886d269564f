"""Rows to prompts to tokens, and what is wrong with rows, told by file, line and field."""

import json
from collections import Counter
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


def encoder(data: tasks.TaskData, max_length: int = 64, bos: int | None = None) -> tasks.Encoder:
    """A tokenizer of one token a word; numbers are the words' lengths."""
    first = [] if bos is None else [bos]

    def tokenize(texts: list[str]) -> list[list[int]]:
        return [first + [*map(len, text.split())] for text in texts]

    return tasks.Encoder(data, tokenize, bos=bos, max_length=max_length)


def test_rows_become_prompts_with_every_option(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    data = tasks.load(task(path, holdout=None, test={"path": path}))
    assert data.train == data.test
    assert data.train[1].prompt == "it {was} great It was"
    assert data.train[1].texts == ("it {was} great It was terrible", "it {was} great It was great")
    assert [example.label for example in data.train] == [0, 1, 1]
    assert [example.id for example in data.train] == [0, 1, 2]


def test_csv_rows_are_selected_and_renamed(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,label,source\n"two\nlines",1,a\nno,0,b\nyes,1,a\n')
    source = {"path": str(path), "where": {"source": "a"}, "rename": {"text": "sentence"}}
    data = tasks.load(Task.model_validate({"preset": "sst2", "train": source, "test": source}))
    assert [example.prompt for example in data.train] == ["two\nlines It was", "yes It was"]


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


REFUSALS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    r"rows.jsonl: holds no rows$": ([], {}),
    r"holds no rows where \{'label': '7'\}": (ROWS, {"where": {"label": "7"}}),
    r"rows.jsonl:2: must be an object, is 3": ([ROWS[0], 3], {}),
    r"task.template: \{sentence\} is not a field of .*:1; it has text, label": (
        [{"text": "a", "label": 0}],
        {},
    ),
    r"task.label: label is not a field of .*:1; it has sentence": ([{"sentence": "a"}], {}),
    r"task.label: .*:2: '2' is not an option; accepted: 0 to 1 or one of terrible, great": (
        [ROWS[0], {"sentence": "a", "label": 2}],
        {},
    ),
    r"task.template: \{sentence\} has no value in .*:2": (
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


def test_bad_files_are_refused_by_name(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"sentence": "a", "label": 0}\n{"sentence"\n')
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"sentence": "\xe9", "label": 0}\n')
    for path, message in {
        str(tmp_path / "none.jsonl"): r"task.train.path: .*none.jsonl: no such file",
        str(broken): r"broken.jsonl:2: not JSON",
        str(latin): r"latin.jsonl: cannot be read: .*utf-8",
        "package:nowhere/rows.csv": r"the package nowhere is not installed",
        "package:numpy/rows.csv": r"the package numpy holds no file rows.csv",
        __file__: r"must end in .jsonl or .csv",
    }.items():
        with pytest.raises(ConfigError, match=message):
            tasks.load(task(path))


def test_nothing_left_to_train_on_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ConfigError, match="task.holdout: 3 rows cannot be held out of 3"):
        tasks.load(task(path, holdout=3))


def test_spans_are_the_options_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    settings = task(path, holdout=None, test={"path": path}, options=["great", "not so bad"])
    encoding = encoder(tasks.load(settings)).encode("test", [1])[0]
    assert encoding.sequences == ((2, 5, 5, 2, 3, 5), (2, 5, 5, 2, 3, 3, 2, 3))
    assert encoding.spans == ((5, 6), (5, 8))


def test_long_prompts_lose_their_left_end_but_not_bos(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"sentence": "1 22 333 4444 55555", "label": 0}] * 2)
    data = tasks.load(task(path))
    assert encoder(data, 5).encode("train", [0])[0].sequences[0] == (4, 5, 2, 3, 8)
    encoding = encoder(data, 5, bos=77).encode("train", [0])[0]
    assert encoding.sequences[0] == (77, 5, 2, 3, 8)
    assert encoding.spans[0] == (4, 5)


@pytest.mark.parametrize("template", ["{sentence}{option}", "{option}"])
def test_options_that_cannot_be_told_from_the_prompt_are_refused(
    template: str, tmp_path: Path
) -> None:
    data = tasks.load(task(write(tmp_path / "rows.jsonl", ROWS), template=template))
    with pytest.raises(ConfigError, match=r"task.template: the tokenizer merges .*put text"):
        encoder(data)


def test_no_room_for_a_prompt_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ConfigError, match="task.max_length: 2 leaves no room"):
        encoder(tasks.load(task(path)), max_length=2)


def test_a_prompt_of_one_token_is_accepted(tmp_path: Path) -> None:
    data = tasks.load(task(write(tmp_path / "rows.jsonl", ROWS), template="So: {option}"))
    assert encoder(data).encode("train", [0])[0].spans == ((1, 2), (1, 2))
    assert encoder(data).longest == 2


def test_every_epoch_shows_every_example_once_in_an_order_of_its_own() -> None:
    ids = [id for step in range(20) for id in tasks.batch(5, step, size=6, num_examples=40)]
    epochs = [ids[start : start + 40] for start in (0, 40, 80)]
    assert all(Counter(epoch) == Counter(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(40))
    assert tasks.batch(6, 0, 6, 40) != tasks.batch(5, 0, 6, 40)
