"""Examples as tokens: spans, cuts, borders that tokenizers draw elsewhere, calibration, prompts."""

import json
from pathlib import Path
from typing import Any

import pytest
import small_tokenizers
from transformers import PreTrainedTokenizerFast

from orchestrator import tasks
from orchestrator.config import ConfigError, Task
from orchestrator.encoder import Encoder

ROW: dict[str, Any] = {"sentence": "it was great", "label": 0}


def data(path: Path, rows: list[dict[str, Any]], **others: Any) -> tasks.TaskData:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(path)}
    values = {"template": "{sentence} It was {option}", "options": ["terrible", "great"]} | others
    return tasks.load(Task.model_validate({"train": source, "test": source, **values}))


def by_words(found: tasks.TaskData, max_length: int = 64, bos: int | None = None) -> Encoder:
    """A tokenizer of one token a word; numbers are the words' lengths."""
    first = [] if bos is None else [bos]

    def tokenize(texts: list[str]) -> list[list[int]]:
        return [first + [*map(len, text.split())] for text in texts]

    return Encoder(found, tokenize, bos=bos, max_length=max_length)


def made(kind: str, *texts: str) -> PreTrainedTokenizerFast:
    return small_tokenizers.KINDS[kind](["it was great", *texts] * 3)


def by_pieces(found: tasks.TaskData, tokenizer: PreTrainedTokenizerFast, size: int = 99) -> Encoder:
    return Encoder(
        found,
        small_tokenizers.tokenize(tokenizer),
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        max_length=size,
    )


def test_spans_are_the_options_tokens(tmp_path: Path) -> None:
    found = data(tmp_path / "rows.jsonl", [ROW], options=["great", "not so bad"])
    (encoding,) = by_words(found).encode("test", [0])
    assert encoding.sequences == ((2, 3, 5, 2, 3, 5), (2, 3, 5, 2, 3, 3, 2, 3))
    assert encoding.spans == ((5, 6), (5, 8))


def test_long_prompts_lose_their_left_end_but_not_bos(tmp_path: Path) -> None:
    row = {"sentence": "1 22 333 4444 55555", "label": 0}
    found = data(tmp_path / "rows.jsonl", [row])
    (encoding,) = by_words(found, 5).encode("train", [0])
    assert encoding.sequences[0] == (4, 5, 2, 3, 8)
    (encoding,) = by_words(found, 5, bos=77).encode("train", [0])
    assert (encoding.sequences[0], encoding.spans[0]) == ((77, 5, 2, 3, 8), (4, 5))


@pytest.mark.parametrize("kind", small_tokenizers.KINDS)
def test_a_row_of_ten_thousand_tokens_keeps_its_end(kind: str, tmp_path: Path) -> None:
    row = {"sentence": "it was great " * 4000 + "so", "label": 1}
    tokenizer = made(kind, "It was terrible")
    encoder = by_pieces(data(tmp_path / "rows.jsonl", [row]), tokenizer, 50)
    whole = tokenizer(f"{row['sentence']} It was great")["input_ids"]
    assert len(whole) > 10_000
    (encoding,) = encoder.encode("test", [0])
    start, end = encoding.spans[1]
    tokens = list(encoding.sequences[1])
    assert max(map(len, encoding.sequences)) == encoder.longest == 50
    assert tokenizer.decode(tokens[start:end]).strip() == "great"
    if kind in ("opt", "llama"):
        assert tokens == [whole[0], *whole[1 - len(tokens) :]]
    else:
        assert tokens == whole[-len(tokens) :]


def test_an_option_that_leaves_no_room_is_refused_by_line(tmp_path: Path) -> None:
    found = data(tmp_path / "rows.jsonl", [ROW, {"sentence": "a b c d", "label": 0}])
    with pytest.raises(ConfigError, match=r"max_length: 2 leaves no room .*1 tokens, in .*jsonl:1"):
        by_words(found, max_length=2)


def test_another_tokenizer_has_another_fingerprint(tmp_path: Path) -> None:
    found = data(tmp_path / "rows.jsonl", [ROW])
    assert by_words(found).fingerprint == by_words(found).fingerprint
    assert by_words(found, bos=77).fingerprint != by_words(found).fingerprint


def test_a_prompt_of_one_token_is_accepted(tmp_path: Path) -> None:
    encoder = by_words(data(tmp_path / "rows.jsonl", [ROW], template="So: {option}"))
    assert encoder.encode("train", [0])[0].spans == ((1, 2), (1, 2))
    assert encoder.longest == 2


@pytest.mark.parametrize("template", ["{sentence}{option}", "{option}"])
def test_options_that_cannot_be_told_from_the_prompt_are_refused(
    template: str, tmp_path: Path
) -> None:
    found = data(tmp_path / "rows.jsonl", [ROW], template=template)
    with pytest.raises(ConfigError, match=r"the tokenizer merges .*rows.jsonl:1; put text"):
        by_words(found)


@pytest.mark.parametrize("kind", small_tokenizers.KINDS)
def test_white_space_that_a_tokenizer_draws_to_an_option_is_the_options(
    kind: str, tmp_path: Path
) -> None:
    """Qwen's pattern takes a tab with the word after it; for the others it is a token."""
    tab = " " if kind == "llama" else "\t"  # not in its vocabulary
    tokenizer = made(kind, f"So:{tab}great", f"So:{tab}terrible")
    encoder = by_pieces(data(tmp_path / "rows.jsonl", [ROW], template="So:\t{option}"), tokenizer)
    (encoding,) = encoder.encode("test", [0])
    start, end = encoding.spans[1]
    assert start == encoding.spans[0][0]
    text = tokenizer.decode(encoding.sequences[1][start:end])
    assert text == ("\tgreat" if kind == "qwen" else "great")


@pytest.mark.parametrize("kind", small_tokenizers.KINDS)
def test_a_merge_across_the_border_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    """`un` and `well` are a token together where there is such a word."""
    tokenizer = made(kind, *["it was unwell"] * 9)
    found = data(
        tmp_path / "rows.jsonl", [ROW], template="it was un{option}", options=["well", "x"]
    )
    with pytest.raises(ConfigError, match=r"'it was unwell', .*rows.jsonl:1; put .* before \{opt"):
        by_pieces(found, tokenizer)


@pytest.mark.parametrize("kind", small_tokenizers.KINDS)
def test_calibration_scores_options_without_the_row(kind: str, tmp_path: Path) -> None:
    tokenizer = made(kind, "It was terrible")
    for before in ("It was ", ""):
        unconditional = f"{before}{{option}}"
        found = data(tmp_path / "rows.jsonl", [ROW], unconditional=unconditional)
        (encoding,) = by_pieces(found, tokenizer).unconditional("test", [0])
        for option, tokens, (start, end) in zip(
            ("terrible", "great"), encoding.sequences, encoding.spans, strict=True
        ):
            text = tokenizer(before + option)["input_ids"]
            own_start = tokenizer(before.strip())["input_ids"]
            if not own_start:  # something must stand before the first token that is scored
                own_start = [tokenizer.eos_token_id]
                text = [*own_start, *text]
            assert (list(tokens), start, end) == (text, len(own_start), len(text))


@pytest.mark.parametrize("kind", ["qwen", "opt"])
def test_borders_without_the_row_are_drawn_by_the_template_without_it(
    kind: str, tmp_path: Path
) -> None:
    """Qwen's pattern takes a tab with the word after it, though the row's prompt ends in none."""
    tokenizer = made(kind, "So:\tgreat", "So:\tterrible", "It was terrible")
    found = data(tmp_path / "rows.jsonl", [ROW], unconditional="So:\t{option}")
    (encoding,) = by_pieces(found, tokenizer).unconditional("test", [0])
    start, end = encoding.spans[1]
    assert (
        tokenizer.decode(encoding.sequences[1][:start], skip_special_tokens=True).strip() == "So:"
    )
    assert tokenizer.decode(encoding.sequences[1][start:end]).strip() == "great"


def test_a_merge_across_the_border_without_the_row_names_that_template(tmp_path: Path) -> None:
    tokenizer = made("opt", *["it was unwell"] * 9)
    found = data(
        tmp_path / "rows.jsonl",
        [ROW],
        unconditional="it was un{option}",
        options=["well", "x"],
    )
    with pytest.raises(ConfigError, match=r"unconditional: the tokenizer merges .*'it was unwell'"):
        by_pieces(found, tokenizer).unconditional("test", [0])


def test_prompts_alone_are_encoded_and_an_empty_one_is_refused(tmp_path: Path) -> None:
    reward = {"function": "mine:score"}
    values: dict[str, Any] = {"options": [], "objective": "reward", "metric": "reward"}
    row = {"sentence": "1 22 " * 5000, "label": 0}
    found = data(tmp_path / "rows.jsonl", [ROW, row], reward=reward, **values)
    encoder = by_words(found)
    assert encoder.encode("train", [0])[0].sequences == ()
    assert (encoder.longest, encoder.longest_continued(10)) == (0, 64)
    short, long = encoder.prompts("train", [0, 1], 10)
    assert short.tokens == [2, 3, 5, 2, 3] and len(long.tokens) == 54
    empty = data(tmp_path / "rows.jsonl", [ROW], template="{option}", reward=reward, **values)
    with pytest.raises(ConfigError, match=r"template: nothing stands before \{option\}, in .*:1"):
        by_words(empty)


def test_calibration_without_a_token_to_begin_with_is_refused(tmp_path: Path) -> None:
    encoder = by_words(data(tmp_path / "rows.jsonl", [ROW]))
    with pytest.raises(ConfigError, match="task.unconditional: begins with the option"):
        encoder.unconditional("test", [0])


def test_demonstrations_stand_before_prompts_and_are_cut_first(tmp_path: Path) -> None:
    rows = [{"sentence": f"{number} was it", "label": number % 2} for number in range(9)]
    tokenizer = made("llama", "It was terrible")
    found = data(tmp_path / "rows.jsonl", rows, demonstrations=2)
    encoder = by_pieces(found, tokenizer)
    (encoding,) = encoder.encode("test", [3])
    text = found.demonstrations + "3 was it It was great"
    assert text.count("\n\n") == 2
    assert list(encoding.sequences[1]) == tokenizer(text)["input_ids"]
    (plain,) = by_pieces(data(tmp_path / "plain.jsonl", rows), tokenizer).encode("test", [3])
    size = max(map(len, plain.sequences))
    (cut,) = by_pieces(found, tokenizer, size).encode("test", [3])
    assert cut.sequences[0][-3:] == plain.sequences[0][-3:]
    assert len(cut.sequences[0]) == len(plain.sequences[0])


@pytest.mark.parametrize("kind", small_tokenizers.KINDS)
def test_prompts_keep_room_for_what_is_generated(kind: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"q": "was it great " * 20, "gold": "it"},
        {"q": "it", "gold": ["a", "b"]},
    ]
    values: dict[str, Any] = {"template": "{q} It was: {option}\n", "options": [], "label": "gold"}
    found = data(tmp_path / "rows.jsonl", rows, metric="f1", loss="lm", **values)
    tokenizer = made(kind)
    long, short = by_pieces(found, tokenizer, 40).prompts("test", [0, 1], max_new_tokens=10)
    assert short.tokens == tokenizer("it It was:")["input_ids"]
    assert len(long.tokens) == 30
    assert long.tokens[-5:] == tokenizer(rows[0]["q"] + "It was:")["input_ids"][-5:]
    assert (long.tokens[0] == tokenizer.bos_token_id) == (kind in ("opt", "llama"))
