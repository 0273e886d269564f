"""Labelled rows, the prompts made of them, and their tokens.

Owns reading, rendering and encoding. Needs no model: a tokenizer is handed in where tokens are
wanted, so that rows can be checked before anything heavy is imported.
"""

import csv
import functools
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from orchestrator import noise
from orchestrator.assets import resolve_file
from orchestrator.config import ConfigError, Source, Task
from orchestrator.records import Split

HOLDOUT_PERMUTATION_SEED = 0  # fixed, so that every run of a task has the same held-out rows


@dataclass(frozen=True, slots=True)
class Example:
    """A row as text: the prompt alone, the prompt with each option, and the right option."""

    id: int
    prompt: str
    texts: tuple[str, ...]
    label: int


@dataclass(frozen=True, slots=True)
class Encoding:
    """An example as tokens: a sequence per option, and where the option's tokens stand in it."""

    sequences: tuple[tuple[int, ...], ...]
    spans: tuple[tuple[int, int], ...]
    label: int


@dataclass(frozen=True, slots=True)
class TaskData:
    """The examples of both splits; an example's id is its place in its split."""

    train: tuple[Example, ...]
    test: tuple[Example, ...]

    def split(self, name: Split) -> tuple[Example, ...]:
        return self.train if name == "train" else self.test

    def fingerprint(self) -> str:
        """SHA-256 (hex) over all examples' texts and labels."""
        digest = hashlib.sha256()
        for example in (*self.train, *self.test):
            digest.update(json.dumps([example.texts, example.label]).encode())
        return digest.hexdigest()


def load(task: Task) -> TaskData:
    """Read and render all rows. Raises ConfigError for whatever is wrong with file or rows."""
    rows = _read_rows("task.train", task.train)
    if task.test is not None:
        test_rows = _read_rows("task.test", task.test)
    else:
        assert task.holdout is not None  # the configuration has one of the two
        if task.holdout >= len(rows):
            raise ConfigError(
                f"task.holdout: {task.holdout} rows cannot be held out of {len(rows)}; "
                "at least one must be left to train on"
            )
        order = noise.permutation(HOLDOUT_PERMUTATION_SEED, 0, len(rows))
        shuffled = [rows[index] for index in order]
        rows, test_rows = shuffled[: -task.holdout], shuffled[-task.holdout :]
    return TaskData(
        train=tuple(_render(task, index, row) for index, row in enumerate(rows)),
        test=tuple(_render(task, index, row) for index, row in enumerate(test_rows)),
    )


@dataclass(frozen=True, slots=True)
class _Row:
    fields: dict[str, Any]
    origin: str
    """File and line, for messages."""


def _read_rows(key: str, source: Source) -> list[_Row]:
    path = resolve_file(f"{key}.path", source.path)
    readers = {".jsonl": _read_json_lines, ".csv": _read_csv}
    if path.suffix not in readers:
        raise ConfigError(f"{key}.path: {source.path}: must end in {' or '.join(readers)}")
    rows = []
    for row in readers[path.suffix](key, path):
        for field in (*source.where, *source.rename):
            if field not in row.fields:
                raise ConfigError(
                    f"{key}: {field} is not a field of {row.origin}; it has {_names(row.fields)}"
                )
        if all(str(row.fields[field]) == value for field, value in source.where.items()):
            renamed = {source.rename.get(name, name): row.fields[name] for name in row.fields}
            rows.append(_Row(renamed, row.origin))
    if not rows:
        chosen = f" where {source.where}" if source.where else ""
        raise ConfigError(f"{key}.path: {source.path}: holds no rows{chosen}")
    return rows


def _read_json_lines(key: str, path: Path) -> list[_Row]:
    rows = []
    for number, line in enumerate(_text(key, path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{key}.path: {path}:{number}: not JSON: {error.msg}") from None
        if not isinstance(fields, dict):
            raise ConfigError(f"{key}.path: {path}:{number}: must be an object, is {line[:40]}")
        rows.append(_Row(fields, f"{path}:{number}"))
    return rows


def _read_csv(key: str, path: Path) -> list[_Row]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(_text(key, path), newline=""))
    try:
        return [_Row(dict(fields), f"{path}:{reader.line_num}") for fields in reader]
    except csv.Error as error:
        raise ConfigError(f"{key}.path: {path}:{reader.line_num}: not CSV: {error}") from None


def _text(key: str, path: Path) -> str:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}.path: {path}: cannot be read: {error}") from None


def _names(fields: dict[str, Any]) -> str:
    return ", ".join(map(str, fields))


def _render(task: Task, index: int, row: _Row) -> Example:
    def fill(option: str) -> str:
        def value(match: re.Match[str]) -> str:
            name = match[1]
            if name == "option":
                return option
            if name not in row.fields:
                raise ConfigError(
                    f"task.template: {{{name}}} is not a field of {row.origin}; "
                    f"it has {_names(row.fields)}"
                )
            if row.fields[name] is None:
                raise ConfigError(f"task.template: {{{name}}} has no value in {row.origin}")
            return str(row.fields[name])

        return re.sub(r"\{(\w+)\}", value, task.template)

    return Example(
        id=index,
        prompt=fill("").rstrip(),
        texts=tuple(fill(option) for option in task.options),
        label=_label(task, row),
    )


def _label(task: Task, row: _Row) -> int:
    if task.label not in row.fields:
        raise ConfigError(
            f"task.label: {task.label} is not a field of {row.origin}; it has {_names(row.fields)}"
        )
    value = str(row.fields[task.label])
    if value in task.options:
        return task.options.index(value)
    if value.isdecimal() and int(value) < len(task.options):
        return int(value)
    accepted = f"0 to {len(task.options) - 1} or one of {', '.join(task.options)}"
    raise ConfigError(f"task.label: {row.origin}: {value!r} is not an option; accepted: {accepted}")


class Encoder:
    """All examples of a task as tokens."""

    def __init__(
        self,
        data: TaskData,
        tokenize: Callable[[list[str]], list[list[int]]],
        *,
        bos: int | None,
        max_length: int,
    ) -> None:
        """Encode everything, so that what is wrong is told before the first step.

        `tokenize` adds the special tokens that the model expects; a `bos` that stands first
        survives a cut. Raises ConfigError where an option cannot be told from its prompt in
        tokens, or nothing of a prompt would be left.
        """
        self._bos = bos
        self._max_length = max_length
        self._splits: dict[Split, list[Encoding]] = {}
        for split in get_args(Split):
            examples = data.split(split)
            texts = [text for example in examples for text in (example.prompt, *example.texts)]
            tokens = iter(tokenize(texts))
            self._splits[split] = [
                self._encode(example, next(tokens), [next(tokens) for _ in example.texts])
                for example in examples
            ]

    def encode(self, split: Split, ids: Sequence[int]) -> list[Encoding]:
        return [self._splits[split][id] for id in ids]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        encodings = [encoding for split in self._splits.values() for encoding in split]
        return max(len(tokens) for encoding in encodings for tokens in encoding.sequences)

    def _encode(self, example: Example, prompt: list[int], sequences: list[list[int]]) -> Encoding:
        for tokens, text in zip(sequences, example.texts, strict=True):
            if not prompt or tokens[: len(prompt)] != prompt or len(tokens) == len(prompt):
                raise ConfigError(
                    f"task.template: the tokenizer merges prompt and option in {text[-60:]!r}; "
                    "put text, and a space or a line break, before {option}"
                )
        excess = max(0, max(map(len, sequences)) - self._max_length)
        if excess and excess >= len(prompt) - 1:
            longest = max(len(tokens) - len(prompt) for tokens in sequences)
            raise ConfigError(
                f"task.max_length: {self._max_length} leaves no room for a prompt before an "
                f"option of {longest} tokens"
            )
        return Encoding(
            sequences=tuple(self._cut(tokens, excess) for tokens in sequences),
            spans=tuple((len(prompt) - excess, len(tokens) - excess) for tokens in sequences),
            label=example.label,
        )

    def _cut(self, tokens: list[int], excess: int) -> tuple[int, ...]:
        """Drop `excess` tokens from the left, but not a BOS token that stands first."""
        if excess and tokens[0] == self._bos:
            return (tokens[0], *tokens[1 + excess :])
        return tuple(tokens[excess:])


def batch(run_seed: int, step: int, size: int, num_examples: int) -> tuple[int, ...]:
    """Ids of a step's training examples: each epoch goes through all of them in an order of its
    own, and a batch may reach into the next epoch."""
    ids = []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, num_examples)
        ids.append(int(_epoch_order(run_seed, epoch, num_examples)[place]))
    return tuple(ids)


@functools.lru_cache(maxsize=2)
def _epoch_order(run_seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return noise.permutation(run_seed, epoch, num_examples)
