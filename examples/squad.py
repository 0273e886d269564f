"""Rows of SQuAD out of the file that its authors publish: one JSON line a question.

    python -m examples.squad dev-v1.1.json squad.jsonl

Rows have the fields of the hub's copy: title, context, question and answers.text. SQuADShifts comes
in the same form. Rajpurkar et al. 2016.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def rows(articles: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row a question, in the file's order; questions without an answer are left out."""
    for article in articles:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                answers = [answer["text"] for answer in asked["answers"]]
                if answers:
                    yield {
                        "title": article["title"],
                        "context": paragraph["context"],
                        "question": asked["question"],
                        "answers": {"text": answers},
                    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write SQuAD's questions as JSON lines.")
    parser.add_argument("published", type=Path, metavar="SQUAD.json")
    parser.add_argument("out", type=Path, metavar="OUT.jsonl")
    arguments = parser.parse_args()
    found = list(rows(json.loads(arguments.published.read_text(encoding="utf-8"))["data"]))
    lines = "".join(json.dumps(row) + "\n" for row in found)
    arguments.out.write_text(lines, encoding="utf-8")
    print(f"{len(found)} rows in {arguments.out}")


if __name__ == "__main__":
    main()
