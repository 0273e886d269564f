"""Rows as they stand in files, folders and on the hub, each with its origin for messages.

Owns reading; knows nothing of what rows are for. The library `datasets` is imported only where
rows come by way of it.
"""

import csv
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.assets import resolve_file
from orchestrator.config import ConfigError, Source

HUB_PREFIX = "hub:"
SAVED_BY_DATASETS = ("dataset_dict.json", "state.json")


@dataclass(frozen=True, slots=True)
class Row:
    """A row's fields, and the file and line that it stands in."""

    fields: dict[str, Any]
    origin: str

    def find(self, key: str, path: str) -> Any:
        """The value at a path such as answers.text; in a list of objects, that of each of them.

        Raises ConfigError, naming the configuration's `key`, where there is none.
        """
        if path in self.fields:  # a name may hold a dot
            return self.fields[path]
        value: Any = self.fields
        for name in path.split("."):
            objects = value if isinstance(value, list) else [value]
            if not all(isinstance(item, dict) and name in item for item in objects):
                raise ConfigError(f"{key}: {self.missing(path)}")
            values = [item[name] for item in objects]
            value = values if isinstance(value, list) else values[0]
        return value

    def missing(self, path: str) -> str:
        """Says that a field is not there."""
        return f"{path} is not a field of {self.origin}; it has {', '.join(map(str, self.fields))}"


def read(key: str, source: Source) -> list[Row]:
    """The source's rows, selected and renamed. Raises ConfigError, naming the key, file and line
    or the field that is wrong."""
    rows = []
    for row in _all(key, source):
        for field in (*source.where, *source.rename):
            if field not in row.fields:
                raise ConfigError(f"{key}: {row.missing(field)}")
        if all(str(row.fields[field]) == value for field, value in source.where.items()):
            renamed = {source.rename.get(name, name): row.fields[name] for name in row.fields}
            if len(renamed) < len(row.fields):
                raise ConfigError(
                    f"{key}.rename: {source.rename}: gives two fields of {row.origin} one name; "
                    "rename the other one too"
                )
            rows.append(Row(renamed, row.origin))
    if not rows:
        chosen = f" where {source.where}" if source.where else ""
        raise ConfigError(f"{key}.path: {source.path}: holds no rows{chosen}")
    return rows


def _all(key: str, source: Source) -> list[Row]:
    if source.path.startswith(HUB_PREFIX):
        return _by_datasets(key, source, source.path.removeprefix(HUB_PREFIX))
    if source.revision is not None:
        raise ConfigError(f"{key}.revision: {source.revision}: is of use to hub ids only")
    if Path(source.path).is_dir():
        return _by_datasets(key, source, source.path)
    for name, value in (("name", source.name), ("split", source.split)):
        if value is not None:
            raise ConfigError(f"{key}.{name}: {value}: is of no use to a single file; leave it out")
    path = resolve_file(f"{key}.path", source.path)
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise ConfigError(
            f"{key}.path: {source.path}: must end in {', '.join(READERS)}, or be a folder or a "
            f"hub id ({HUB_PREFIX}OWNER/NAME)"
        )
    return READERS[suffix](key, path)


def _by_datasets(key: str, source: Source, place: str) -> list[Row]:
    """Rows of a folder, or of a data set on the hub, by the library `datasets`."""
    import datasets

    is_saved = any((Path(place) / name).is_file() for name in SAVED_BY_DATASETS)
    if is_saved and source.name is not None:
        raise ConfigError(
            f"{key}.name: {source.name}: {source.path} is but one data set; leave it out"
        )
    try:
        if is_saved:
            found = datasets.load_from_disk(place)
        else:
            found = datasets.load_dataset(place, source.name, revision=source.revision)
    except Exception as error:  # of many kinds, from the libraries below it too
        message = " ".join(str(error).split())
        raise ConfigError(f"{key}.path: {source.path}: cannot be read: {message}") from None
    if isinstance(found, dict):
        found = _chosen(key, source, found)
    elif source.split is not None:
        raise ConfigError(f"{key}.split: {source.split}: {source.path} has no splits; leave it out")
    names = [source.path, source.name, source.split]
    origin = " ".join(name for name in names if name is not None)
    rows = found.to_list()
    return [Row(fields, f"{origin}:{number}") for number, fields in enumerate(rows, start=1)]


def _chosen(key: str, source: Source, splits: dict[str, Any]) -> Any:
    if source.split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if source.split not in splits:
        wanted = "missing" if source.split is None else f"{source.split}: no such split"
        raise ConfigError(f"{key}.split: {wanted}; {source.path} has {', '.join(splits)}")
    return splits[source.split]


def _read_parquet(key: str, path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        message = " ".join(str(error).split())
        raise ConfigError(f"{key}.path: {path}: cannot be read: {message}") from None
    return [Row(fields, f"{path}:{number}") for number, fields in enumerate(rows, start=1)]


def _read_json_lines(key: str, path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(_text(key, path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{key}.path: {path}:{number}: not JSON: {error.msg}") from None
        except (ValueError, RecursionError):
            raise ConfigError(
                f"{key}.path: {path}:{number}: not JSON that can be read: a number is too long, or "
                "it is nested too deeply"
            ) from None
        if not isinstance(fields, dict):
            raise ConfigError(f"{key}.path: {path}:{number}: must be an object, is {line[:40]}")
        rows.append(Row(fields, f"{path}:{number}"))
    return rows


def _read_csv(key: str, path: Path) -> list[Row]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(_text(key, path), newline=""))
    rows = []
    try:
        names = [name for name in reader.fieldnames or [] if name]
        if len(set(names)) < len(names):
            raise csv.Error(f"the first line names a field twice: {', '.join(names)}")
        for fields in reader:
            if any(fields.pop(None, None) or ()):
                raise csv.Error("more fields than the first line has; quote texts with commas")
            rows.append(Row(dict(fields), f"{path}:{reader.line_num}"))
    except csv.Error as error:
        raise ConfigError(f"{key}.path: {path}:{reader.line_num}: not CSV: {error}") from None
    return rows


READERS: dict[str, Callable[[str, Path], list[Row]]] = {
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _text(key: str, path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}.path: {path}: cannot be read: {error}") from None
