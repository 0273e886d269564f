"""MeZO's tasks: the prompts of fixed rows, and their tokens by several tokenizers."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import small_tokenizers
import suite
from transformers import PreTrainedTokenizerFast

from orchestrator import tasks
from orchestrator.config import Task
from orchestrator.encoder import Encoder
from orchestrator.presets import PRESETS

ROWS: dict[str, dict[str, Any]] = {
    "sst2": {"sentence": "a gorgeous , witty film ", "label": 1, "idx": 0},
    "rte": {
        "premise": "No weapons were found in Iraq.",
        "hypothesis": "Weapons were found in Iraq.",
        "label": 1,
        "idx": 0,
    },
    "cb": {
        "premise": "It was a good day. We all knew that.",
        "hypothesis": "it was a good day",
        "label": 0,
        "idx": 0,
    },
    "boolq": {
        "question": "is france the same as paris",
        "answer": False,
        "passage": "Paris is in France.",
    },
    "wsc": {
        "text": "Mark told Pete lies about himself. He should have been more honest.",
        "span1_text": "Mark",
        "span2_text": "He",
        "span1_index": 0,
        "span2_index": 6,
        "label": 1,
        "idx": 0,
    },
    "wic": {
        "word": "place",
        "sentence1": "Do you want to come over to my place later?",
        "sentence2": "A political system with no place for women.",
        "start1": 31,
        "label": 0,
        "idx": 0,
    },
    "multirc": {
        "paragraph": "Sent 1: Susan wanted a party. Sent 2: She called her friends.",
        "question": "Whom did Susan call?",
        "answer": "Her friends",
        "label": 1,
        "idx": {"paragraph": 0, "question": 0, "answer": 0},
    },
    "copa": {
        "premise": "My body cast a shadow over the grass.",
        "choice1": "The sun was rising.",
        "choice2": "I cut the grass.",
        "question": "cause",
        "label": 0,
        "idx": 0,
    },
    "record": {
        "passage": "Ada met Bob in Paris.\n@highlight\nThey talked\n@highlight\nBob left",
        "query": "In the city, @placeholder spoke first",
        "entities": ["Ada", "Bob", "Paris"],
        "answers": ["Bob", "Ada"],
        "idx": {"passage": 0, "query": 0},
    },
    "squad": {
        "id": "1",
        "title": "Normans",
        "context": "The Normans lived in Normandy, in France.",
        "question": " Where did the Normans live?",
        "answers": {"text": ["Normandy", "in Normandy"], "answer_start": [21, 18]},
    },
    "drop": {
        "section_id": "s",
        "query_id": "q",
        "passage": "The Bears scored 7 points, then 3.",
        "question": "How many points were scored?",
        "answers_spans": {"spans": ["10"], "types": ["number"]},
    },
}
PROMPTS = {
    "sst2": "a gorgeous , witty film It was",
    "rte": (
        "No weapons were found in Iraq.\n"
        'Does this mean that "Weapons were found in Iraq." is true? Yes or No?\n'
    ),
    "cb": (
        "Suppose It was a good day. We all knew that. "
        'Can we infer that "it was a good day"? Yes, No, or Maybe?\n'
    ),
    "boolq": "Paris is in France. Is france the same as paris?\n",
    "wsc": (
        "Mark told Pete lies about himself. He should have been more honest.\n"
        'In the previous sentence, does the pronoun "he" refer to Mark? Yes or No?\n'
    ),
    "wic": (
        'Does the word "place" have the same meaning in these two sentences? Yes, No?\n'
        "Do you want to come over to my place later?\n"
        "A political system with no place for women.\n"
    ),
    "multirc": (
        "Sent 1: Susan wanted a party. Sent 2: She called her friends.\n"
        "Question: Whom did Susan call?\n"
        'I found this answer "Her friends". Is that correct? Yes or No?\n'
    ),
    "copa": "My body cast a shadow over the grass because",
    "record": "Ada met Bob in Paris.\n- They talked\n- Bob left\n-",
    "squad": (
        "Title: Normans\nContext: The Normans lived in Normandy, in France.\n"
        "Question: Where did the Normans live?\nAnswer:"
    ),
    "drop": (
        "Passage: The Bears scored 7 points, then 3.\n"
        "Question: How many points were scored?\nAnswer:"
    ),
}
OPTIONS = {  # what follows the prompt, and the numbers of the right ones
    "sst2": ([" terrible", " great"], [1]),
    "rte": (["Yes", "No"], [1]),
    "cb": (["Yes", "No", "Maybe"], [0]),
    "boolq": (["No", "Yes"], [0]),
    "wsc": (["No", "Yes"], [1]),
    "wic": (["No", "Yes"], [0]),
    "multirc": (["No", "Yes"], [1]),
    "copa": ([" the sun was rising.", " I cut the grass."], [0]),
    "record": (
        [
            " In the city, Ada spoke first",
            " In the city, Bob spoke first",
            " In the city, Paris spoke first",
        ],
        [1, 0],
    ),
    "squad": ([" Normandy\n"], [0]),
    "drop": ([" 10\n"], [0]),
}
UNCONDITIONAL = {
    "sst2": ("It was", [" terrible", " great"]),
    "copa": ("because", [" the sun was rising.", " I cut the grass."]),
    "record": ("-", OPTIONS["record"][0]),
}
# The right option's tokens where the border is a space, a line break, or a dash; the last token
# before them is `border`. `Ġ` and `▁` are spaces, `Ċ` and `<0x0A>` line breaks.
PIECES: dict[tuple[str, str], tuple[str, list[str]]] = {
    ("sst2", "gpt2"): ("Ġwas", ["Ġgreat"]),
    ("sst2", "opt"): ("Ġwas", ["Ġgreat"]),
    ("sst2", "llama"): ("▁was", ["▁great"]),
    ("sst2", "qwen"): ("Ġwas", ["Ġgreat"]),
    ("rte", "gpt2"): ("Ċ", ["No"]),
    ("rte", "opt"): ("Ċ", ["No"]),
    ("rte", "llama"): ("<0x0A>", ["No"]),
    ("rte", "qwen"): ("?Ċ", ["No"]),
    ("record", "gpt2"): ("-", ["ĠIn", "Ġthe", "Ġcity", ",", "ĠBob", "Ġspoke", "Ġfirst"]),
    ("record", "opt"): ("-", ["ĠIn", "Ġthe", "Ġcity", ",", "ĠBob", "Ġspoke", "Ġfirst"]),
    ("record", "llama"): ("-", ["▁In", "▁the", "▁city,", "▁Bob", "▁spoke", "▁first"]),
    ("record", "qwen"): ("-", ["ĠIn", "Ġthe", "Ġcity", ",", "ĠBob", "Ġspoke", "Ġfirst"]),
    ("squad", "gpt2"): (":", ["ĠNormandy", "Ċ"]),
    ("squad", "opt"): (":", ["ĠNormandy", "Ċ"]),
    ("squad", "llama"): (":", ["▁Normandy", "<0x0A>"]),
    ("squad", "qwen"): (":", ["ĠNormandy", "Ċ"]),
    ("drop", "qwen"): (":", ["Ġ", "1", "0", "Ċ"]),
}


def preset(name: str, path: Path, rows: list[dict[str, Any]], **others: Any) -> Task:
    """The preset over rows of its own."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(path)}
    return Task.model_validate({"preset": name, "train": source, "test": source, **others})


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    texts = [PROMPTS[name] + option for name in PROMPTS for option in OPTIONS[name][0]]
    return small_tokenizers.KINDS[kind](texts * 3)


def test_the_presets_are_mezos_tasks() -> None:
    assert set(PRESETS) == set(PROMPTS) == set(suite.TASKS)


@pytest.mark.parametrize("name", PROMPTS)
def test_a_row_reads_as_in_the_table(name: str, tmp_path: Path) -> None:
    (example,) = tasks.load(preset(name, tmp_path / "rows.jsonl", [ROWS[name]])).test
    options, right = OPTIONS[name]
    assert example.prompt == PROMPTS[name]
    assert example.texts == tuple(PROMPTS[name] + option for option in options)
    assert [example.label, *example.also_right] == right
    if name in ("squad", "drop"):
        assert example.unconditional is None
        assert example.answers == {"squad": ("Normandy", "in Normandy"), "drop": ("10",)}[name]
    else:
        before, after = UNCONDITIONAL.get(name, ("", options))
        assert example.unconditional == (before, tuple(before + option for option in after))


@pytest.mark.parametrize("kind", small_tokenizers.KINDS)
@pytest.mark.parametrize("name", PROMPTS)
def test_an_options_tokens_are_the_last_ones(name: str, kind: str, tmp_path: Path) -> None:
    made = tokenizer(kind)
    data = tasks.load(preset(name, tmp_path / "rows.jsonl", [ROWS[name]]))
    encoder = Encoder(data, small_tokenizers.tokenize(made), bos=made.bos_token_id, max_length=512)
    (encoding,) = encoder.encode("test", [0])
    options, right = OPTIONS[name]
    prompt = made(PROMPTS[name])["input_ids"]
    assert (prompt[0] == made.bos_token_id) == (kind in ("opt", "llama"))
    for option, tokens, (start, end) in zip(
        options, encoding.sequences, encoding.spans, strict=True
    ):
        assert list(tokens) == made(PROMPTS[name] + option)["input_ids"]
        assert (list(tokens[:start]), end) == (prompt, len(tokens))
        assert made.decode(tokens[start:]) == option
    if (name, kind) in PIECES:
        start, end = encoding.spans[right[0]]
        pieces = made.convert_ids_to_tokens(encoding.sequences[right[0]])
        before, pieces_of_option = PIECES[name, kind]
        assert pieces[start:end] == pieces_of_option
        assert pieces[start - 1].endswith(before)


@pytest.mark.parametrize("name", suite.TASKS)
def test_many_rows_read_as_the_table_says(name: str, tmp_path: Path) -> None:
    rows = suite.rows(name, 20)
    data = tasks.load(preset(name, tmp_path / "rows.jsonl", rows))
    for row, example, trained in zip(rows, data.test, data.train, strict=True):
        case = suite.case(name, row)
        assert example.prompt == case.stem
        assert example.texts == tuple(case.stem + option for option in case.options)
        assert [example.label, *example.also_right] == case.right
        if case.loss == "lm":  # the right option alone
            assert trained.texts == (case.stem + case.options[case.right[0]],)
        if case.alone:
            before, options = case.alone
            assert example.unconditional == (before, tuple(before + text for text in options))
