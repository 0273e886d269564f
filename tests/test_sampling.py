"""The choice of tokens against transformers' own, and stop strings in text that grows."""

from collections.abc import Sequence

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from orchestrator.sampling import (
    SHORT,
    UNDEFINED,
    Sampling,
    Transcript,
    choose,
    continuation,
    remembering,
)

GRID = 4000
VOCABULARY = 100


def some_logits(rows: int) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(0))


def frequencies(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """How often a row's tokens are drawn by numbers that are spread evenly over (0, 1)."""
    uniforms = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    tokens = choose(logits[None], [0] * GRID, sampling, uniforms)
    return torch.bincount(torch.tensor(tokens), minlength=VOCABULARY) / GRID


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 20, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
def test_draws_are_spread_as_transformers_probabilities(
    temperature: float, top_k: int, top_p: float
) -> None:
    for logits in some_logits(rows=3):
        scores = (logits / temperature)[None]
        if top_k:
            scores = TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)
        expected = scores.double().softmax(-1)[0]
        found = frequencies(logits, Sampling(1, temperature, top_p, top_k))
        # A token's share of the grid is right to one number at either end.
        torch.testing.assert_close(found.double(), expected, atol=2 / GRID, rtol=0)
        assert found[expected == 0].sum() == 0


def test_without_a_temperature_the_most_likely_token_is_taken() -> None:
    logits = some_logits(rows=5)
    rows = [3, 3, 0, 4]
    assert choose(logits, rows, Sampling(1), None) == [int(logits[r].argmax()) for r in rows]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_give_no_token(value: float) -> None:
    logits = some_logits(rows=3)
    logits[1, 7] = value
    uniforms = torch.full((3,), 0.5, dtype=torch.float64)
    for numbers, sampling in ((None, Sampling(1)), (uniforms, Sampling(1, 1.0, 0.9, 10))):
        tokens = choose(logits, range(3), sampling, numbers)
        assert tokens[1] == UNDEFINED
        assert min(tokens[0], tokens[2]) >= 0


@pytest.mark.parametrize(
    "values",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_k": -1},
        {"stop_strings": ("",)},
    ],
)
def test_values_that_mean_nothing_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Sampling(**{"max_new_tokens": 1, **values})  # type: ignore[arg-type]


def byte_text(tokens: Sequence[int]) -> str:
    """As byte-level tokenizers: a character may take several tokens."""
    return bytes(tokens).decode("utf-8", "replace")


def word_text(tokens: Sequence[int]) -> str:
    """As tokenizers that put spaces before words, and none at the start of a text."""
    words = ["", " a", " stop", "ped", " sto", "p", "\n", "\n\n"]
    return "".join(words[token] for token in tokens).removeprefix(" ")


def stopped_at(tokens: Sequence[int], decode: object, stops: tuple[str, ...]) -> int | None:
    """After how many tokens a transcript says that they hold a stop string."""
    transcript = Transcript(decode, stops)  # type: ignore[arg-type]
    counts = range(1, len(tokens) + 1)
    return next((count for count in counts if transcript.has_stopped(tokens[:count])), None)


def test_a_stop_string_is_found_as_soon_as_it_is_whole() -> None:
    text = "Größe → 日本 ✓ \ufffd end"
    tokens = list(text.encode())
    for stop in ("G", "öß", "→ 日", "本 ✓", "\ufffd end", "d", "Größe → 日本 ✓ \ufffd end"):
        whole = len(text[: text.index(stop) + len(stop)].encode())
        assert stopped_at(tokens, byte_text, (stop, "absent")) == whole
    assert stopped_at(tokens, byte_text, ("✓\ufffd",)) is None


def test_a_stop_string_may_span_tokens_and_begin_inside_one() -> None:
    assert stopped_at([1, 4, 5, 3], word_text, (" stop",)) == 3
    assert stopped_at([0, 0, 2, 0, 3], word_text, ("pped",)) == 5
    assert stopped_at([2, 1], word_text, (" stop",)) is None  # no space at the start of the text
    assert stopped_at([2, 1, 2], word_text, (" stop",)) == 3
    assert stopped_at([1, 7], word_text, ("\n",)) == 2


def test_a_transcript_agrees_with_the_text_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        tokens = torch.randint(0, 8, (12,), generator=generator).tolist()
        for stops in (("stop",), (" a\n", "ped"), (" stopped", "\n a")):
            held = [
                any(stop in word_text(tokens[:count]) for stop in stops) for count in range(1, 13)
            ]
            expected = held.index(True) + 1 if True in held else None
            assert stopped_at(tokens, word_text, stops) == expected


def test_texts_of_short_sequences_are_decoded_once() -> None:
    asked: list[tuple[int, ...]] = []

    def decode(tokens: Sequence[int]) -> str:
        asked.append(tuple(tokens))
        return word_text(tokens)

    kept = remembering(decode)
    generator = torch.Generator().manual_seed(2)
    for _ in range(300):
        tokens = torch.randint(0, 8, (12,), generator=generator).tolist()
        stops = (" a\n", "ped")
        assert stopped_at(tokens, kept, stops) == stopped_at(tokens, word_text, stops)
    short = [tokens for tokens in asked if len(tokens) <= SHORT]
    assert len(short) == len(set(short)) > 64


def test_a_continuation_is_cut_before_its_first_stop_string() -> None:
    tokens = [1, 4, 5, 3, 1]
    cut = continuation(tokens, "length", word_text, ("ed", "op"))
    assert (cut.text, cut.tokens, cut.ended) == ("a st", [1, 4], "stop")
    assert continuation(tokens, "stop", word_text, ("a",)).tokens == []
    whole = continuation(tokens, "length", word_text, ("absent",))
    assert (whole.text, whole.tokens, whole.ended) == ("a stopped a", tokens, "length")
    assert continuation(tokens, "stop", None, ()).text is None
