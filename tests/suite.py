"""MeZO's eleven tasks as its tables state them, apart from the presets: rows in the released
schema, and what a row's prompt, options and calibration read."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TASKS = ["sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc", "copa", "record", "squad", "drop"]
SENTENCE = (
    "the old film was a slow but honest look at three people who lost their way home in winter "
    "and found 12 letters from London under a stone near 1984 when it rained all day"
)
WORDS = SENTENCE.split()
NAMES = ["Ada Lovelace", "London", "the Times", "Mr. O'Neil", "I", "3M"]


@dataclass(frozen=True)
class Case:
    """What is read: `stem + option` is scored on the option. `alone` is calibration's text."""

    stem: str
    options: list[str]
    right: list[int]
    loss: str = "option_ce"
    alone: tuple[str, list[str]] | None = None


def rows(name: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Word salad in the released schema, with the odd cases of each field."""
    draw = random.Random(seed)

    def text(least: int = 3, most: int = 14) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    def sentence() -> str:
        return text().capitalize() + draw.choice([".", ".", "!", '."', ""])

    def label(size: int = 2) -> int:
        return draw.randrange(size)

    def record() -> dict[str, Any]:
        entities = draw.sample(NAMES, draw.randint(2, 5))
        return {
            "passage": f"{sentence()}\n@highlight\n{sentence()}\n@highlight\n{sentence()}",
            "query": f"{text()} @placeholder {text()}".strip(),
            "entities": entities,
            "answers": entities[1 : draw.randint(2, len(entities))],
            "idx": {"passage": 0, "query": 0},
        }

    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "sst2": lambda: {"sentence": text() + draw.choice(["", " "]), "label": label(), "idx": 0},
        "rte": lambda: {"premise": sentence(), "hypothesis": sentence(), "label": label()},
        "cb": lambda: {"premise": sentence(), "hypothesis": text(), "label": label(3)},
        "boolq": lambda: {"question": text(), "answer": draw.random() < 0.5, "passage": sentence()},
        "wsc": lambda: {
            "text": sentence(),
            "span1_text": draw.choice(NAMES),
            "span2_text": draw.choice(["He", "it", "They"]),
            "span1_index": 0,
            "span2_index": 3,
            "label": label(),
        },
        "wic": lambda: {
            "word": draw.choice(WORDS),
            "sentence1": sentence(),
            "sentence2": sentence(),
            "label": label(),
        },
        "multirc": lambda: {
            "paragraph": f"{sentence()} {sentence()}",
            "question": f"{text()}?",
            "answer": text(1, 4),
            "idx": {"paragraph": 0, "question": 0, "answer": 0},
            "label": label(),
        },
        "copa": lambda: {
            "premise": sentence(),
            "choice1": sentence(),
            "choice2": f"I {text()}.",
            "question": draw.choice(["cause", "effect"]),
            "idx": 0,
            "label": label(),
        },
        "record": record,
        "squad": lambda: {
            "id": "0",
            "title": draw.choice(NAMES),
            "context": sentence(),
            "question": draw.choice(["", " "]) + f"{text()}?",
            "answers": {"text": [text(1, 4), text(1, 4)], "answer_start": [0, 0]},
        },
        "drop": lambda: {
            "section_id": "0",
            "query_id": "0",
            "passage": sentence(),
            "question": f"{text()}?",
            "answers_spans": {"spans": [str(label(99)), text(1, 3)], "types": ["number", "span"]},
        },
    }
    return [makers[name]() for _ in range(count)]


def case(name: str, r: dict[str, Any]) -> Case:
    """The row by the table of the reference's facts."""
    no_yes = ["No", "Yes"]
    alone_no_yes = ("", no_yes)
    if name == "sst2":
        options = [" terrible", " great"]
        stem = f"{r['sentence'].strip()} It was"
        return Case(stem, options, [r["label"]], alone=("It was", options))
    if name == "rte":
        question = f'Does this mean that "{r["hypothesis"]}" is true? Yes or No?'
        options = ["Yes", "No"]
        return Case(f"{r['premise']}\n{question}\n", options, [r["label"]], alone=("", options))
    if name == "cb":
        question = f'Can we infer that "{r["hypothesis"]}"? Yes, No, or Maybe?'
        options = ["Yes", "No", "Maybe"]
        stem = f"Suppose {r['premise']} {question}\n"
        return Case(stem, options, [r["label"]], alone=("", options))
    if name == "boolq":
        question = r["question"][0].upper() + r["question"][1:] + "?"
        return Case(f"{r['passage']} {question}\n", no_yes, [int(r["answer"])], alone=alone_no_yes)
    if name == "wsc":
        question = (
            f'In the previous sentence, does the pronoun "{r["span2_text"].lower()}" refer to '
            f"{r['span1_text']}? Yes or No?"
        )
        return Case(f"{r['text']}\n{question}\n", no_yes, [r["label"]], alone=alone_no_yes)
    if name == "wic":
        question = (
            f'Does the word "{r["word"]}" have the same meaning in these two sentences? Yes, No?'
        )
        stem = f"{question}\n{r['sentence1']}\n{r['sentence2']}\n"
        return Case(stem, no_yes, [r["label"]], alone=alone_no_yes)
    if name == "multirc":
        stem = (
            f"{r['paragraph']}\nQuestion: {r['question']}\n"
            f'I found this answer "{r["answer"]}". Is that correct? Yes or No?\n'
        )
        return Case(stem, no_yes, [r["label"]], alone=alone_no_yes)
    if name == "copa":
        word = {"cause": "because", "effect": "so"}[r["question"]]
        premise = r["premise"][:-1] if r["premise"].endswith(".") else r["premise"]
        first = r["choice1"][0].lower() + r["choice1"][1:]
        options = [f" {first}", f" {r['choice2']}"]  # the second begins with `I`
        return Case(f"{premise} {word}", options, [r["label"]], "lm", (word, options))
    if name == "record":
        options = [f" {r['query'].replace('@placeholder', one)}" for one in r["entities"]]
        right = [r["entities"].index(answer) for answer in r["answers"]]
        stem = r["passage"].replace("@highlight\n", "- ") + "\n-"
        return Case(stem, options, right, "lm", ("-", options))
    if name == "squad":
        stem = f"Title: {r['title']}\nContext: {r['context']}\nQuestion: {r['question'].strip()}\n"
        return Case(f"{stem}Answer:", [f" {r['answers']['text'][0]}\n"], [0], "lm")
    assert name == "drop"
    stem = f"Passage: {r['passage']}\nQuestion: {r['question']}\nAnswer:"
    return Case(stem, [f" {r['answers_spans']['spans'][0]}\n"], [0], "lm")
