"""Templates: what stands before the option, what begins with it, and what functions do."""

from pathlib import Path

import pytest

from orchestrator.templates import TEXT_FUNCTIONS, WITH_OPTION, Template

FIELDS = {"text": " some  text ", "inner.text": "deep", "braces": "{option} {text}", "q": "is it"}


def render(template: str, option: str = "yes") -> tuple[str, str]:
    return Template.parse(template).render(FIELDS.__getitem__, option)


@pytest.mark.parametrize(
    ("template", "stem", "whole"),
    [
        ("{inner.text} was {option}", "deep was", "deep was yes"),  # spaces are the option's
        ("{q}?\n{option}", "is it?\n", "is it?\nyes"),  # line breaks the prompt's
        ("{text}{option}", "some  text", "some  text yes"),
        ("{text|strip}{option}", "some  text", "some  textyes"),
        (" \n{q} {option} ", "is it", "is it yes"),
        ("{q}: {option}\n", "is it:", "is it: yes\n"),
        ("{option}", "", "yes"),
        ("{braces}: {option}", "{option} {text}:", "{option} {text}: yes"),
        ('{"a": {q}, {}} {option}', '{"a": is it, {}}', '{"a": is it, {}} yes'),
        ("{q|as_question|lower} {option|lower}", "is it?", "is it? yes"),
    ],
)
def test_spaces_before_the_option_belong_to_it(template: str, stem: str, whole: str) -> None:
    assert render(template) == (stem, whole)


def test_a_field_with_the_option_in_it_is_scored_whole() -> None:
    fields = {"q": "@placeholder met the brother of @placeholder"}
    template = Template.parse("- {q|with_option}.")
    assert template.render(fields.__getitem__, "Ada") == ("-", "- Ada met the brother of Ada.")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("as_question", "is it", "Is it?"),
        ("as_question", "Is it?", "Is it?"),
        ("as_question", "", "?"),
        ("as_question", "élan", "Élan?"),
        ("without_full_stop", "It fell. ", "It fell"),
        ("without_full_stop", "It fell...", "It fell.."),
        ("without_full_stop", 'He said "no."', 'He said "no."'),
        ("as_connective", "cause", "because"),
        ("as_connective", "effect", "so"),
        ("lower_first", "The Sun rose", "the Sun rose"),
        ("lower_first", "I rose", "I rose"),
        ("lower_first", "I'm up", "i'm up"),
        ("lower_first", "", ""),
        ("as_bullets", "A.\n@highlight\nB\n@highlight\nC", "A.\n- B\n- C"),
        ("lower", "The ÉCOLE", "the école"),
        ("strip", "\n a b ", "a b"),
    ],
)
def test_functions_change_texts(name: str, text: str, expected: str) -> None:
    assert TEXT_FUNCTIONS[name](text) == expected


def test_the_readme_of_the_recipes_explains_every_function() -> None:
    text = (Path(__file__).parent.parent / "configs" / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in (*TEXT_FUNCTIONS, WITH_OPTION))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{a} {option} {option}", "has a place for the option more than once"),
        ("{a|with_option} {option}", "has a place for the option more than once"),
        ("{a|eval} {option}", r"\{a\|eval\}: no text function is called eval; there are: as_bull"),
    ],
)
def test_what_a_template_cannot_hold_is_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Template.parse(template)


def test_a_field_alone_is_known_as_such() -> None:
    slot = Template.parse("{inner.text|strip}").only_field
    assert slot is not None
    assert (slot.path, slot.apply(" a ", "")) == ("inner.text", "a")
    for text in ("{a} b", "a", "", "{option}", "{a}{b}"):
        assert Template.parse(text).only_field is None
