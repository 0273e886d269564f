"""Held-out rows scored by `launch.py eval`'s path, against the reference's loop over candidates.

    python -m benchmarks.evaluation [--recipe FILE] [--rows N] [--turns N] [--results FOLDER]
                                    [section.key=value ...]

The recipe's model, rows and template; both sides have the same weights, precision and number of
threads. Ours is one replica, which is given rows as a fleet gives them. The reference
(reference.py) scores one row and one candidate at a time with transformers; its texts are encoded
before its clock starts, as ours are when a replica starts. After a few rows to warm up, both score
all of them, turn by turn. The largest difference of their scores is in the result.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator import dist_patch, environment

NUM_THREADS = 2
environment.prepare(NUM_THREADS)

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from benchmarks import measure, reference  # noqa: E402
from benchmarks.measure import DEVICE, DTYPE  # noqa: E402
from orchestrator import checkpoint, tasks  # noqa: E402
from orchestrator.config import Config  # noqa: E402
from orchestrator.evaluate import scores_of  # noqa: E402
from orchestrator.recipe_file import load  # noqa: E402

dist_patch.apply(DEVICE)

from orchestrator.local import LocalFleet  # noqa: E402

RECIPE = Path(__file__).parent.parent / "configs" / "demo.yaml"
ROWS, TURNS, WARMUP_ROWS = 1000, 1, 64
COLUMNS = (
    ("model", "model"),
    ("rows", "rows"),
    ("candidates", "candidates"),
    ("ours s", "ours_s"),
    ("rows a second", "ours_rows_per_second"),
    ("reference s", "reference_s"),
    ("times faster", "reference_over_ours"),
)
Row = dict[str, Any]
Scores = list[tuple[float, ...]]
"""Per row, each candidate's."""


class Reference:
    """The loop, over rows that are encoded already."""

    def __init__(self, config: Config, num_rows: int) -> None:
        folder = checkpoint.locate(config.model.path)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self._rows = []
        for example in tasks.load(config.task).test[:num_rows]:
            start = len(tokenizer(example.prompt)["input_ids"])
            texts = [tokenizer(text)["input_ids"] for text in example.texts]
            if max(map(len, texts)) > config.task.max_length:
                raise ValueError(f"task.max_length: {example.origin} would be cut; raise it")
            self._rows.append([(tokens, (start, len(tokens))) for tokens in texts])
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, DTYPE))
        self._model = model.to(DEVICE).eval()

    def score(self, num_rows: int) -> Scores:
        return [
            tuple(reference.candidate_score(self._model, *each, DEVICE) for each in row)
            for row in self._rows[:num_rows]
        ]


def compare(config: Config, num_rows: int, turns: int) -> Row:
    """Both paths on the same rows, turn by turn."""
    theirs = Reference(config, num_rows)  # which refuses rows, before there is a fleet
    fleet = LocalFleet(config, DEVICE)
    fleet.start()
    found: dict[str, Scores] = {}

    def ours(number: int = num_rows) -> None:
        chunks = fleet.score("test", range(number))
        found["ours"] = [score.scores for score in scores_of(chunks)]

    def loop(number: int = num_rows) -> None:
        found["reference"] = theirs.score(number)

    ours(min(num_rows, WARMUP_ROWS))
    loop(min(num_rows, WARMUP_ROWS))
    calls: dict[str, Callable[[], object]] = {"ours": ours, "reference": loop}
    times = measure.paired(calls, turns, warmups=0)
    fleet.close()
    taken = measure.medians(times)
    pairs = list(zip(found["ours"], found["reference"], strict=True))
    differences = [abs(a - b) for row in pairs for a, b in zip(*row, strict=True)]
    return {
        "model": Path(config.model.path).name,
        "rows": len(pairs),
        "candidates": len(differences),
        "threads": torch.get_num_threads(),
        "turns": turns,
        "ours_s": taken["ours"],
        "ours_rows_per_second": len(pairs) / taken["ours"],
        "reference_s": taken["reference"],
        "reference_over_ours": measure.ratio(times, "reference", "ours"),
        "largest_difference": max(differences),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help="a folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    chosen = parser.parse_args(arguments)
    fixed = [
        f"model.dtype={DTYPE}",
        f"model.device={DEVICE}",
        "fleet.num_replicas=1",
        f"fleet.threads_per_replica={NUM_THREADS}",
    ]
    config = load(chosen.recipe, [*fixed, *chosen.overrides])
    print(measure.header())
    row = compare(config, chosen.rows, chosen.turns)
    measure.print_table([title for title, _ in COLUMNS], [[row[key] for _, key in COLUMNS]])
    print(f"largest difference of a score: {row['largest_difference']:.2g}")
    print(f"kept in {measure.write_results('evaluation', [row], chosen.results)}")


if __name__ == "__main__":
    main()
