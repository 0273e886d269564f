"""A task's rows as prompts with options, split into what is trained on and what is held out.

Owns which row is in which split and how it reads as text. Knows no tokens, so that rows can be
checked before anything heavy is imported.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from orchestrator import noise, rows
from orchestrator.config import ConfigError, Task
from orchestrator.records import Split
from orchestrator.rows import Row
from orchestrator.templates import MARK, Template

PERMUTATION_SEED = 0  # fixed, so that every run of a task has the same rows in each split
HOLDOUT, DRAW_TRAIN, DRAW_TEST = range(3)  # permutations of their own
DEMONSTRATION_END = "\n\n"


@dataclass(frozen=True, slots=True)
class Example:
    """A row as text: the prompt alone, the prompt with each option, and the right option.

    Where answers are generated, the first right answer is the one option; where nothing but a
    reward is asked for, there is none.
    """

    id: int
    prompt: str
    texts: tuple[str, ...]
    label: int
    also_right: tuple[int, ...]
    """Other right options."""
    answers: tuple[str, ...]
    """All right answers, where answers are generated."""
    context: tuple[str, str] | None
    """What stands before the template's mark, alone and with the fixed text behind the mark; None
    where the template has no mark."""
    unconditional: tuple[str, tuple[str, ...]] | None
    """For calibration: prompt and texts without the row; None where nothing is calibrated."""
    origin: str
    """File and line, for messages."""
    row: dict[str, Any] | None = None
    """All of its fields, where a reward function is to see them."""
    group: str | None = None
    """What examples that are drawn together have in common, as JSON; None where none are."""


@dataclass(frozen=True, slots=True)
class TaskData:
    """The examples of the splits; an example's id is its place in its split.

    Those of `train` have the right option alone where the objective asks for no other.
    """

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]
    demonstrations: str
    """Stands before every prompt."""

    def split(self, name: Split) -> tuple[Example, ...]:
        return {"train": self.train, "dev": self.dev, "test": self.test}[name]

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of `train`'s examples; empty where none are drawn together."""
        groups = (example.group for example in self.train)
        return tuple(group for group in groups if group is not None)

    @property
    def contexts(self) -> tuple[str, ...]:
        """What each of `train`'s examples has in common with those that share its keys and values:
        its group, or else the text before the mark; empty where there is neither."""
        texts = (example.context[0] for example in self.train if example.context is not None)
        return self.groups or tuple(texts)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over all examples' texts and labels, split after split, and the splits'
        sizes: HASH-TRAIN-DEV-TEST.
        """
        digest = hashlib.sha256(self.demonstrations.encode())
        for example in (*self.train, *self.dev, *self.test):
            parts = (example.also_right, example.answers, example.group)
            others = [part for part in parts if part]
            digest.update(json.dumps([example.texts, example.label, *others]).encode())
            if example.row is not None:
                fields = json.dumps(example.row, sort_keys=True, default=str)
                digest.update(json.dumps([example.prompt, fields]).encode())
        return f"{digest.hexdigest()}-{len(self.train)}-{len(self.dev)}-{len(self.test)}"


def load(task: Task) -> TaskData:
    """Read and render all rows. Raises ConfigError for whatever is wrong with file or rows."""
    train = rows.read("task.train", task.train)
    if task.test is not None:
        test = rows.read("task.test", task.test)
    else:
        assert task.holdout is not None  # the configuration has one of the two
        if task.holdout >= len(train):
            raise ConfigError(
                f"task.holdout: {task.holdout} rows cannot be held out of {len(train)}; "
                "at least one must be left to train on"
            )
        train = _permuted(train, HOLDOUT)
        train, test = train[: -task.holdout], train[-task.holdout :]
    if task.num_test is not None:
        if task.num_test > len(test):
            raise ConfigError(
                f"task.num_test: {task.num_test} is more than the {len(test)} rows to test on"
            )
        test = _permuted(test, DRAW_TEST)[: task.num_test]
    shown, train, dev = _drawn(task, train)
    render = Renderer(task)
    return TaskData(
        train=tuple(render(index, row, training=True) for index, row in enumerate(train)),
        dev=tuple(render(index, row) for index, row in enumerate(dev)),
        test=tuple(render(index, row) for index, row in enumerate(test)),
        demonstrations="".join(render.answered(row) + DEMONSTRATION_END for row in shown),
    )


def _permuted(chosen: Sequence[Row], stream: int) -> list[Row]:
    return [chosen[index] for index in noise.permutation(PERMUTATION_SEED, stream, len(chosen))]


def _drawn(task: Task, train: list[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    """Demonstrations, rows to train on, and dev rows: as MeZO's, dev rows are drawn last."""
    num_shown, num_dev = task.demonstrations, task.num_dev or 0
    if not num_shown and not num_dev and task.num_train is None:
        return [], train, []
    num_train = task.num_train or max(1, len(train) - num_shown - num_dev)
    if num_shown + num_train + num_dev > len(train):
        raise ConfigError(
            f"task.num_train: {num_train}, task.num_dev: {num_dev} and task.demonstrations: "
            f"{num_shown} are more than the {len(train)} rows of task.train; lower them"
        )
    order = iter(_permuted(train, DRAW_TRAIN))
    shown, trained, dev = (
        list(itertools.islice(order, size)) for size in (num_shown, num_train, num_dev)
    )
    return shown, trained, dev


class Renderer:
    """Makes a task's rows into examples."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._template = Template.parse(task.template)
        self._unconditional = Template.parse(task.unconditional)
        self._fields = [Template.parse(option).only_field for option in task.options]

    def _refuse_near_misses(self, row: Row) -> None:
        """What was meant for a field would stand in every prompt as it is written."""
        for key, template in (("template", self._template), ("unconditional", self._unconditional)):
            for name, braced in template.braced().items():
                if name in row.fields:
                    raise ConfigError(
                        f"task.{key}: {braced} is no field as it is written: {{name}} or "
                        "{name|function}, without spaces or hyphens; task.train.rename gives a "
                        "field another name"
                    )

    def __call__(self, id: int, row: Row, training: bool = False) -> Example:
        """Raises ConfigError, naming file and line, for a row without what the task asks for."""
        if not id:
            self._refuse_near_misses(row)
        answers: tuple[str, ...] = ()
        if self._task.is_generated:
            answers = self._answers(row) if self._task.needs_answers else ()
            options, right = list(answers[:1]), [0]
        else:
            options = self._option_texts(row)
            right = self._right(row, options)
            if training and self._task.loss == "lm" and self._task.objective == "loss":
                options, right = [options[right[0]]], [0]
        prompt, texts = self._fill("template", self._template, row, options)
        is_calibrated = not training and not self._task.is_generated
        return Example(
            id=id,
            prompt=prompt,
            texts=texts,
            label=right[0],
            also_right=tuple(right[1:]),
            answers=answers,
            context=self._context(row),
            unconditional=self._fill("unconditional", self._unconditional, row, options)
            if is_calibrated
            else None,
            origin=row.origin,
            row=row.fields if self._task.reward is not None else None,
            group=self._group(row) if training else None,
        )

    def _group(self, row: Row) -> str | None:
        field = self._task.group_by
        if field is None:
            return None
        return json.dumps(row.find("task.group_by", field), sort_keys=True, default=str)

    def answered(self, row: Row) -> str:
        """The row with its right option, as a demonstration."""
        example = self(0, row)
        return example.texts[example.label].strip()

    def _fill(
        self, key: str, template: Template, row: Row, options: Sequence[str]
    ) -> tuple[str, tuple[str, ...]]:
        """The text before the option, and the whole text with each; there may be none."""
        value = partial(_single, key, row)
        try:
            rendered = [template.render(value, option) for option in options or [""]]
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"task.{key}: {row.origin}: {error}") from None
        return rendered[0][0], tuple(whole for _, whole in rendered[: len(options)])

    def _context(self, row: Row) -> tuple[str, str] | None:
        """The text before the mark, alone and with the fixed text behind the mark."""
        if self._template.mark is None:
            return None
        context, cued = self._template.render_context(partial(_single, "template", row))
        if not context:
            raise ConfigError(f"task.template: nothing stands before {MARK} in {row.origin}")
        return context, cued

    def _option_texts(self, row: Row) -> list[str]:
        """The row's candidates; a field that holds a list stands for all of its texts."""
        options: list[str] = []
        for text, slot in zip(self._task.options, self._fields, strict=True):
            if slot is None:
                options.append(text)
            else:
                found = self._texts("task.options", row, slot.path)
                try:
                    options += [slot.apply(value, "") for value in found]
                except ValueError as error:
                    raise ConfigError(f"task.options: {row.origin}: {error}") from None
        if not options:
            raise ConfigError(f"task.options: {row.origin} holds none")
        return options

    def _answers(self, row: Row) -> tuple[str, ...]:
        answers = self._texts("task.label", row, self._task.label)
        if not answers:
            raise ConfigError(f"task.label: {self._task.label} of {row.origin} holds no answer")
        return tuple(answers)

    def _texts(self, key: str, row: Row, path: str) -> list[str]:
        """A field's text, or its texts where it holds a list."""
        found = row.find(key, path)
        values = found if isinstance(found, list) else [found]
        for value in values:
            if value is None or isinstance(value, list | dict):
                raise ConfigError(f"{key}: {path} of {row.origin} holds no text: {value!r:.40}")
        return [str(value) for value in values]

    def _right(self, row: Row, options: list[str]) -> list[int]:
        """Numbers of the right options, in the order in which the row names them."""
        found = row.find("task.label", self._task.label)
        if isinstance(found, list):
            golds = dict.fromkeys(map(str, found))
            right = [i for gold in golds for i, text in enumerate(options) if text == gold]
        else:
            right = self._named(str(found), options)
        if not right:
            names = self._task.label_names
            accepted = f"0 to {len(options) - 1} or one of {', '.join([*options, *names])}"
            raise ConfigError(
                f"task.label: {row.origin}: {found!r} is not an option; accepted: {accepted}"
            )
        return right

    def _named(self, value: str, options: list[str]) -> list[int]:
        """The option of a name, a text or a number."""
        names = [name.lower() for name in self._task.label_names]
        if value.lower() in names:
            return [names.index(value.lower())]
        if value in options:
            return [options.index(value)]
        is_number = value.isdecimal() and len(value) < 10  # an int of thousands of digits raises
        return [int(value)] if is_number and int(value) < len(options) else []


def _single(key: str, row: Row, path: str) -> str:
    """A field's text, for a template of the task's."""
    found = row.find(f"task.{key}", path)
    if found is None or isinstance(found, list | dict):
        what = "has no value" if found is None else "is not a single text"
        raise ConfigError(f"task.{key}: {path} {what} in {row.origin}")
    return str(found)
