"""Templates: text with {field} for a row's fields and {option} for a candidate.

A {*} marks the place from which an activated adapter acts. Owns their notation and the named
functions that change a value on its way into the text, as in {question|as_question}. Knows neither
rows nor files: a caller gives the fields' values.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

OPTION = "option"
WITH_OPTION = "with_option"
PLACEHOLDER = "@placeholder"
MARK = "{*}"


def as_question(text: str) -> str:
    """With a capital at the beginning and a question mark at the end."""
    text = text if text.endswith("?") else f"{text}?"
    return text[0].upper() + text[1:]


def without_full_stop(text: str) -> str:
    return text.rstrip().removesuffix(".")


def as_connective(text: str) -> str:
    """The word between a premise and its cause or effect. Raises ValueError for other words."""
    words = {"cause": "because", "effect": "so"}
    if text not in words:
        raise ValueError(f"{text!r} is neither cause nor effect")
    return words[text]


def lower_first(text: str) -> str:
    """With a small first word, unless that is `I`."""
    first, space, rest = text.partition(" ")
    return (first if first == "I" else first.lower()) + space + rest


def as_bullets(text: str) -> str:
    """With ReCoRD's highlights as lines that begin with a dash."""
    return text.replace("@highlight\n", "- ")


TEXT_FUNCTIONS: dict[str, Callable[[str], str]] = {
    "strip": str.strip,
    "lower": str.lower,
    "as_question": as_question,
    "without_full_stop": without_full_stop,
    "as_connective": as_connective,
    "lower_first": lower_first,
    "as_bullets": as_bullets,
}


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in a template: a field, by its path such as answers.text, and what is done to it."""

    path: str
    functions: tuple[str, ...]

    @property
    def takes_option(self) -> bool:
        return self.path == OPTION or WITH_OPTION in self.functions

    def fill(self, value: Callable[[str], str], option: str) -> str:
        return self.apply(option if self.path == OPTION else value(self.path), option)

    def apply(self, text: str, option: str) -> str:
        """The text after all functions. Raises ValueError for one that a function refuses."""
        for name in self.functions:
            if name == WITH_OPTION:
                text = text.replace(PLACEHOLDER, option)
            else:
                text = TEXT_FUNCTIONS[name](text)
        return text

    def __str__(self) -> str:
        return "{" + "|".join((self.path, *self.functions)) + "}"


Part = str | Slot


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed template: what stands before the option, and what begins with it."""

    stem: tuple[Part, ...]
    rest: tuple[Part, ...]
    mark: int | None = None
    """Parts of the stem before the mark; None where there is none."""

    @classmethod
    def parse(cls, text: str) -> "Template":
        """Raises ValueError for a function that there is not, a second option, a misplaced mark."""
        before, *others = text.split(MARK)
        if others:
            return cls._marked(text, cls.parse(before), *others)
        parts: list[Part] = []
        end = 0
        for match in re.finditer(r"\{([\w.]+)((?:\|\w+)*)\}", text):
            parts += [text[end : match.start()], Slot(match[1], tuple(match[2].split("|")[1:]))]
            end = match.end()
        parts.append(text[end:])
        places = []
        for index, part in enumerate(parts):
            if isinstance(part, Slot):
                _check_functions(part)
                if part.takes_option:
                    places.append(index)
        if len(places) > 1:
            raise ValueError(f"{text!r} has a place for the option more than once")
        first = places[0] if places else len(parts)
        return cls(tuple(parts[:first]), tuple(parts[first:]))

    @classmethod
    def _marked(cls, text: str, before: "Template", *others: str) -> "Template":
        """The template whose mark stands behind `before`."""
        if len(others) > 1:
            raise ValueError(f"{text!r} has {MARK} more than once")
        after = cls.parse(others[0])
        cue = (*after.stem, "")[0]
        if before.takes_option or not isinstance(cue, str) or not cue.strip():
            raise ValueError(
                f"{text!r}: {MARK} must stand before {{option}}, with a text behind it that is the "
                "same in every row"
            )
        if not any(isinstance(part, Slot) or part.strip() for part in before.stem):
            raise ValueError(f"{text!r}: {MARK} stands at the beginning, behind no context")
        return cls((*before.stem, *after.stem), after.rest, mark=len(before.stem))

    @property
    def takes_option(self) -> bool:
        return bool(self.rest)

    def braced(self) -> dict[str, str]:
        """Braces that are text and no slot, such as { name } or {a-b|lower}, by what is in them."""
        texts = [part for part in (*self.stem, *self.rest) if isinstance(part, str)]
        found = [match for text in texts for match in re.finditer(r"\{([^{}|]+)[^{}]*\}", text)]
        return {match[1].strip(): match[0] for match in found}

    @property
    def only_field(self) -> Slot | None:
        """The field that the template consists of; None where there is text or an option in it."""
        parts = [part for part in self.stem if part]
        is_field = not self.rest and len(parts) == 1
        return parts[0] if is_field and isinstance(parts[0], Slot) else None

    def render(self, value: Callable[[str], str], option: str) -> tuple[str, str]:
        """What stands before the option, and the whole text.

        Both lose white space at their left end and spaces at their right, so that spaces before
        the option are the option's, as tokenizers see them. `value` gives a field's text by path.
        """
        stem = _fill(self.stem, value, option).lstrip()
        whole = (stem + _fill(self.rest, value, option)).lstrip()
        return stem.rstrip(" "), whole.rstrip(" ")

    def render_context(self, value: Callable[[str], str]) -> tuple[str, str]:
        """What stands before the mark, and the same with the fixed text that follows the mark.

        Both lose white space at their left end, as in `render`.
        """
        assert self.mark is not None
        before = _fill(self.stem[: self.mark], value, "").lstrip()
        return before, before + _fill(self.stem[self.mark : self.mark + 1], value, "")


def _check_functions(slot: Slot) -> None:
    known = sorted((*TEXT_FUNCTIONS, WITH_OPTION))
    for name in slot.functions:
        if name not in known:
            raise ValueError(
                f"{slot}: no text function is called {name}; there are: {', '.join(known)}"
            )


def _fill(parts: Sequence[Part], value: Callable[[str], str], option: str) -> str:
    return "".join(part.fill(value, option) if isinstance(part, Slot) else part for part in parts)
