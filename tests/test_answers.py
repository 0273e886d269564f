"""SQuAD's metrics on the cases that its definition decides."""

import pytest

from orchestrator.answers import cut, exact_match, f1, normalise

# answer, golds, exact match, F1
CASES: list[tuple[str, list[str], float, float]] = [
    ("Normandy", ["Normandy"], 1, 1),
    ("the  Normandy.", ["NORMANDY"], 1, 1),  # article, punctuation, spaces, case
    ("in Normandy", ["Normandy"], 0, 2 / 3),
    ("Normandy", ["in Normandy", "in northern France", "Normandy"], 1, 1),  # best of several
    ("northern Normandy", ["in Normandy", "northern France"], 0, 1 / 2),
    ("Paris", ["Normandy"], 0, 0),
    ("", ["Normandy"], 0, 0),
    ("Normandy", [""], 0, 0),
    ("The", ["a"], 1, 1),  # nothing is left of either
    ("", ["", "Normandy"], 1, 1),
    ("well-known", ["wellknown"], 1, 1),  # punctuation goes, words do not part
    ("well known", ["well-known"], 0, 0),
    ("another", ["other"], 0, 0),  # an article is a word of its own
    ("theatre", ["atre"], 0, 0),
    ("7 7 7", ["7"], 0, 1 / 2),  # a word counts as often as in both
    ("7 7", ["7 7 8"], 0, 4 / 5),
    ("$5.50", ["550"], 1, 1),
    ("ÉCOLE", ["école"], 1, 1),
    ("“Yes”", ["Yes"], 0, 0),  # only ASCII marks are punctuation
    ("a\tb\nc", ["b c"], 1, 1),
]


@pytest.mark.parametrize(("answer", "golds", "exact", "overlap"), CASES)
def test_an_answer_is_worth_what_squad_says(
    answer: str, golds: list[str], exact: float, overlap: float
) -> None:
    assert exact_match(answer, golds) == exact
    assert f1(answer, golds) == pytest.approx(overlap)


def test_a_text_is_normalised_once_and_for_all() -> None:
    text = " The quick, brown fox -- an  animal -- isn't a dog! "
    assert normalise(text) == "quick brown fox animal isnt dog"
    assert normalise(normalise(text)) == normalise(text)


def test_a_generated_text_is_cut_at_the_first_stop() -> None:
    assert cut(" Normandy\nQuestion: ", ["\n"]) == "Normandy"
    assert cut(" Normandy, in France. So", [". ", ", "]) == "Normandy"
    assert cut(" Normandy ", ["\n"]) == "Normandy"
    assert cut("\nNormandy", ["\n"]) == ""
