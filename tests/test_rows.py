"""Where rows come from: files, folders and the hub's layout, and what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from orchestrator import rows
from orchestrator.config import ConfigError, Source

ROWS: list[dict[str, Any]] = [
    {"question": "What?", "answers": {"text": ["a", "b"], "answer_start": [0, 3]}, "label": 0},
    {
        "question": "line\nbreak, \u2028 and ü",
        "answers": {"text": [], "answer_start": []},
        "label": 1,
    },
    {"question": "Who?", "answers": {"text": ["c"], "answer_start": [1]}, "label": 1},
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` makes of a folder goes there, and progress bars go nowhere."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def json_lines(path: Path, some: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some))
    return path


def parquet(path: Path, some: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), path)
    return path


def read(path: Path | str, **others: Any) -> list[rows.Row]:
    return rows.read("task.train", Source(path=str(path), **others))


def fields(found: list[rows.Row]) -> list[dict[str, Any]]:
    return [row.fields for row in found]


def in_the_hubs_layout(folder: Path) -> Path:
    """A data set of two configurations, as the hub keeps them: a card, and files of Parquet."""
    card = """---
configs:
- config_name: whole
  data_files:
  - {split: train, path: whole/train-*}
  - {split: validation, path: whole/validation-*}
- config_name: half
  data_files:
  - {split: train, path: half/train-*}
---
"""
    for part, some in {
        "whole/train-00000-of-00002": ROWS[:2],
        "whole/train-00001-of-00002": ROWS[2:],
        "whole/validation-00000-of-00001": ROWS[1:],
        "half/train-00000-of-00001": ROWS[:1],
    }.items():
        parquet(folder / f"{part}.parquet", some)
    (folder / "README.md").write_text(card)
    return folder


def test_files_give_the_same_rows(tmp_path: Path) -> None:
    for path in (json_lines(tmp_path / "a.jsonl", ROWS), parquet(tmp_path / "a.parquet", ROWS)):
        found = read(path)
        assert fields(found) == ROWS
        assert [row.origin for row in found] == [f"{path}:{number}" for number in (1, 2, 3)]


def test_csv_rows_are_selected_and_renamed(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,label,source\n"two\nlines",1,a\nno,0,b\nyes,1,a\n')
    found = read(path, where={"source": "a"}, rename={"text": "sentence"})
    assert [row.fields["sentence"] for row in found] == ["two\nlines", "yes"]
    assert [row.origin for row in found] == [f"{path}:3", f"{path}:5"]


def test_files_as_spreadsheets_write_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.CSV"
    path.write_bytes("\ufefftext,label,a.b,,\r\ngood,1,x,,,\r\nbad,0\r\n".encode())
    first, second = read(path)
    assert first.fields == {"text": "good", "label": "1", "a.b": "x", "": ""}
    assert first.find("task.label", "a.b") == "x"
    assert second.find("task.label", "a.b") is None


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(tmp_path / "one")
    assert fields(read(tmp_path / "one")) == ROWS
    both = datasets.DatasetDict({"train": made, "validation": made.select([2])})
    both.save_to_disk(tmp_path / "both")
    assert fields(read(tmp_path / "both", split="validation")) == ROWS[2:]
    with pytest.raises(ConfigError, match=r"task.train.split: missing; .*both has train, valid"):
        read(tmp_path / "both")
    with pytest.raises(ConfigError, match=r"task.train.split: train: .*one has no splits"):
        read(tmp_path / "one", split="train")
    with pytest.raises(ConfigError, match=r"task.train.name: sst2: .*one is but one data set"):
        read(tmp_path / "one", name="sst2")


def test_folders_of_plain_files(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    json_lines(folder / "train.jsonl", ROWS)
    json_lines(folder / "test.jsonl", ROWS[:1])
    assert fields(read(folder, split="train")) == ROWS
    found = read(folder, split="test", where={"label": "0"}, rename={"question": "q"})
    assert [row.fields["q"] for row in found] == ["What?"]
    assert found[0].origin == f"{folder} test:1"


def test_the_hubs_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` takes an id for a folder where there is one, so the call is the hub's own."""
    folder = in_the_hubs_layout(tmp_path / "owner" / "name")
    assert fields(read(folder, name="whole", split="train")) == ROWS
    monkeypatch.chdir(tmp_path)
    found = read("hub:owner/name", name="whole", split="validation")
    assert fields(found) == ROWS[1:]
    assert found[0].origin == "hub:owner/name whole validation:1"
    assert fields(read("hub:owner/name", name="half")) == ROWS[:1]
    for others, message in (
        (
            {"name": "third", "split": "train"},
            r"task.train.path: hub:owner/name: cannot be .*third",
        ),
        ({"name": "whole", "split": "test"}, r"split: test: no such split; hub:owner/name has tr"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            read("hub:owner/name", **others)
        assert "\n" not in str(caught.value)


def test_bad_sources_are_refused_by_name(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"sentence": "a", "label": 0}\n{"sentence"\n')
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"sentence": "\xe9", "label": 0}\n')
    table = tmp_path / "table.parquet"
    table.write_bytes(b"PAR1 and no more")
    (tmp_path / "empty").mkdir()
    tables = {
        "wide": "label,text\n1,great, really",
        "twice": "text,label,text\na,1,b",
    }
    for name, text in tables.items():
        (tmp_path / f"{name}.csv").write_text(text)
    (tmp_path / "deep.jsonl").write_text('{"a":' + "[" * 100_000)
    (tmp_path / "long.jsonl").write_text('{"a":' + "9" * 10_000 + "}")
    refusals: dict[Path | str, str] = {
        tmp_path / "none.jsonl": r"task.train.path: .*none.jsonl: no such file",
        broken: r"broken.jsonl:2: not JSON",
        latin: r"latin.jsonl: cannot be read: .*utf-8",
        table: r"task.train.path: .*table.parquet: cannot be read: ",
        tmp_path / "wide.csv": r"wide.csv:2: not CSV: more fields than the first line has; quote",
        tmp_path / "twice.csv": r"twice.csv:1: not CSV: the first line names a field twice: text",
        tmp_path / "deep.jsonl": r"deep.jsonl:1: not JSON that can be read: .* too deeply",
        tmp_path / "long.jsonl": r"long.jsonl:1: not JSON that can be read: a number is too long",
        tmp_path / "empty": r"task.train.path: .*empty: cannot be read: ",
        "package:nowhere/rows.csv": r"the package nowhere is not installed",
        "package:numpy/rows.csv": r"the package numpy holds no file rows.csv",
        __file__: r"must end in .jsonl, .csv, .parquet, or be a folder or a hub id \(hub:OWNER/",
    }
    for path, message in refusals.items():
        with pytest.raises(ConfigError, match=message) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_keys_of_other_sources_are_refused(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"task.train.rename: .* two fields of .*:1 one name"):
        read(path, rename={"question": "label"})
    for key in ("name", "split", "revision"):
        with pytest.raises(ConfigError, match=rf"task.train.{key}: x: is of "):
            read(path, **{key: "x"})
    with pytest.raises(ConfigError, match=r"task.train.revision: x: is of use to hub ids only"):
        read(tmp_path, revision="x")
