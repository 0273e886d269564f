"""A recipe's file: YAML and overrides into a checked configuration.

Owns how values are read, and the one line that is told of a mistake in them: the file, the key,
the value, what to do. Knows nothing of what the keys mean.
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from orchestrator.config import Config, ConfigError, Section

LONGEST = 1 << 20  # characters; more is no recipe


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply `section.key=value` overrides.

    Raises ConfigError, in one line, for a missing file, bad YAML, an unknown key (by its full
    path, with the nearest known one) or a value that its key does not take.
    """
    path = Path(path)
    values = _read_yaml(path)
    for override in overrides:
        _apply_override(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first_message(error)}") from None


class _TwiceError(yaml.constructor.ConstructorError):
    """A key that stands twice."""


# What PyYAML raises for what it cannot read; some of it by mistake, as for `!!bool x`.
UNREADABLE = (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


class _Loader(yaml.SafeLoader):
    """Plain values only: no tags that make objects, and no aliases, of which a few lines could
    stand for more text than any memory holds. And no key twice, of which one would be lost."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias (*): write the value out", None)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):  # others cannot be keys, which is told below
                if (key.tag, key.value) in names:
                    raise _TwiceError(None, None, f"{key.value} stands twice", key.start_mark)
                names.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if len(text) > LONGEST:
        raise ConfigError(f"{path}: is longer than {LONGEST:,} characters, so no recipe")
    try:
        values = yaml.load(text, _Loader)
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: nested too deeply") from None
    except UNREADABLE as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold sections ({', '.join(Config.model_fields)})")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: overrides are written section.key=value")
    *parents, last = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if child is None:  # `section:` with nothing under it
            child = values[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{override!r}: {parent} is a value, not a section")
        values = child
    try:
        values[last] = yaml.load(text, _Loader)
    except _TwiceError as error:
        raise ConfigError(f"{override!r}: {error.problem}") from None
    except UNREADABLE:  # such as a template, which begins with a brace
        values[last] = text


def _first_message(error: ValidationError) -> str:
    """The first mistake, unknown keys before others: a misspelt key often causes the rest."""
    details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    detail = details[0]
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(path, list(known_keys()), n=1, cutoff=0.0)
        return f"{path}: unknown key; did you mean {nearest[0]}?"
    if detail["type"] == "missing":
        return f"{path}: missing; it has no default"
    if detail["type"] == "value_error":
        return f"{path}.{detail['ctx']['error']}".removeprefix(".")  # of several sections
    return f"{path}: {detail['input']!r} is not accepted: {_decapitalise(detail['msg'])}"


def _decapitalise(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def known_keys(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    """Every key's full path, such as estimator.num_seeds."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from known_keys(kind, f"{prefix}{name}.")
