"""What a batch's prompts begin with alike is computed once, and the scores are those without."""

import random
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import pytest
import torch
from conftest import DEVICE, VOCABULARY, Make

from orchestrator.engine import Engine
from orchestrator.pools import Pools
from orchestrator.records import Probe
from orchestrator.score_plan import PlanBatch, ScorePlan, Scores
from orchestrator.space import Space

Sequences = list[list[int]]
Spans = list[tuple[int, int]]
KINDS = ["dense", "lora", "low_rank", "prefix"]
KV_TOKENS = 200  # so few that batches are split, and entries are evicted
# Of a log-probability, between float32 kernels that add in other orders.
TOLERANCE = 1e-4 if DEVICE == "cuda" else 2e-5


def grown(draw: random.Random, longest: int = 40) -> tuple[Sequences, Spans]:
    """A ragged tree of sequences, shuffled: each grows out of a piece of an earlier one."""
    sequences: Sequences = []
    for _ in range(draw.randint(1, 40)):
        stem = draw.choice(sequences)[: draw.randrange(longest)] if sequences else []
        if draw.random() < 0.1:
            stem = []
        room = max(2, longest - len(stem))
        new = [draw.randrange(3, len(VOCABULARY)) for _ in range(draw.randint(2, min(12, room)))]
        sequences.append(stem + new)
    draw.shuffle(sequences)
    spans = []
    for tokens in sequences:
        start = draw.randrange(max(1, len(tokens) - 6), len(tokens))
        spans.append((start, draw.randint(start + 1, len(tokens))))
    return sequences, spans


def questions(draw: random.Random, num_passages: int, num_options: int) -> tuple[Sequences, Spans]:
    """Passages of 200 to 400 tokens, five questions each, of up to 40, and options of up to 5."""
    sequences, spans = [], []

    def words(low: int, high: int) -> list[int]:
        return [draw.randrange(30_000) for _ in range(draw.randint(low, high))]

    for _ in range(num_passages):
        passage = words(200, 400)
        for _ in range(5):
            prompt = passage + words(8, 40)
            for _ in range(num_options):
                sequences.append(prompt + words(1, 5))
                spans.append((len(prompt), len(sequences[-1])))
    return sequences, spans


# -------------------------------------------------------------------- the plan alone


def computed(batch: PlanBatch) -> list[float]:
    """What a forward of a batch gives, if a token's log-probability were a hash of all before."""
    flat: list[tuple[int, int]] = [
        (number, position)
        for number, row in enumerate(batch.rows)
        for position in range(row.prompt.shared, len(row.prompt.tokens))
    ]
    taken = batch.places()
    tokens = [batch.rows[row].prompt.tokens[position] for row, position in flat]
    found = []
    for position, token in zip(batch.positions, batch.tokens, strict=True):
        row, depth = flat[position]
        own = range(position - (depth - len(taken[row])), position + 1)
        seen = tuple(tokens[place] for place in (*taken[row], *own))
        found.append(hash((batch.rows[row].adapter, seen, token)) % 1000 / 7)
    return found


def test_a_plan_scores_what_was_asked_and_computes_every_beginning_once() -> None:
    draw = random.Random(0)
    for _ in range(300):
        sequences, spans = grown(draw)
        adapters = [None, "a", "b"][: draw.randint(1, 3)]
        plan = ScorePlan(sequences, spans, adapters, sharing=draw.random() < 0.9)
        cuts = sorted(draw.choices(range(1, len(plan.prompts) + 1), k=draw.randint(0, 3)))
        ends = [0, *dict.fromkeys([*cuts, len(plan.prompts)])]
        plan.split([range(a, b) for a, b in zip(ends, ends[1:], strict=False)])
        scores = plan.scores([value for batch in plan.batches for value in computed(batch)], 0)
        expected = [
            sum(
                hash((adapter, tuple(tokens[:place]), tokens[place])) % 1000 / 7
                for place in range(start, end)
            )
            for adapter in adapters
            for tokens, (start, end) in zip(sequences, spans, strict=True)
        ]
        assert [span.sum for span in scores.spans] == pytest.approx(expected)
        assert scores.num_tokens == sum(sum(batch.lengths) for batch in plan.batches)
        inputs = [tuple(s[: end - 1]) for s, (_, end) in zip(sequences, spans, strict=True)]
        assert scores.num_asked == len(adapters) * sum(map(len, inputs))
        if len(plan.batches) == 1 and plan.batches[0].is_shared:
            beginnings = {tokens[:size] for tokens in inputs for size in range(1, len(tokens) + 1)}
            assert scores.num_tokens == len(adapters) * len(beginnings)


def test_what_spares_little_is_not_shared() -> None:
    """Such as the token that all texts begin with: rows are as they would be without sharing."""
    sequences = [[1, *range(number, number + 20)] for number in (100, 200, 300)]
    spans = [(20, 21)] * 3
    plan = ScorePlan(sequences, spans, [None])
    assert [prompt.shared for prompt in plan.prompts] == [0, 0, 0]
    assert [prompt.tokens for prompt in plan.prompts] == [tuple(s[:-1]) for s in sequences]
    more = ScorePlan([*sequences, [*sequences[2], 5]], [*spans, (21, 22)], [None])
    assert [prompt.shared for prompt in more.prompts] == [0, 1, 1]


def test_prompts_that_share_nothing_stay_in_their_order() -> None:
    sequences = [[9, 1, 2], [3, 1, 2], [7, 8], [5, 5, 5, 5]]
    plan = ScorePlan(sequences, [(1, len(tokens)) for tokens in sequences], [None])
    assert [prompt.tokens for prompt in plan.prompts] == [tuple(s[:-1]) for s in sequences]


def test_examples_in_another_order_are_rows_in_another_order() -> None:
    """By which the loss's noise is measured."""
    sequences, spans = questions(random.Random(1), num_passages=2, num_options=3)
    half = len(sequences) // 2
    found = [
        [prompt.tokens[-20:] for prompt in ScorePlan(some, ends, [None]).prompts]
        for some, ends in (
            (sequences, spans),
            (sequences[half:] + sequences[:half], spans[half:] + spans[:half]),
        )
    ]
    assert found[0] != found[1] and sorted(found[0]) == sorted(found[1])


@pytest.mark.parametrize("num_options", [2, 4, 10])
def test_four_fifths_of_real_shapes_are_shared(num_options: int) -> None:
    sequences, spans = questions(
        random.Random(num_options), num_passages=8, num_options=num_options
    )
    plan = ScorePlan(sequences, spans, [None])
    plan.split([range(len(plan.prompts))])
    asked = sum(end - 1 for _, end in spans)
    assert plan.num_tokens < 0.2 * asked


# -------------------------------------------------------------------- engines


@pytest.fixture
def make(make: Make) -> Make:
    """An engine with a tiny pool and a space over it."""

    def made(kind: str, family: str) -> tuple[Engine, Space]:
        space = {"kind": kind, **({} if kind == "dense" else {"slots": 2})}
        space |= {"tokens": 3} if kind == "prefix" else {}
        return make(family, kv_tokens=KV_TOKENS, **space)

    return made


def whole(
    engine: Engine, sequences: Sequences, spans: Spans, adapters: Sequence[str | None]
) -> Scores:
    """Scores without any cache: no prompt takes anything from another."""
    plan = engine.plan(sequences, spans, adapters, sharing=False)
    return engine.read(plan, [engine.launch(plan)])[0]


def require_equal(found: Scores, expected: Scores) -> None:
    sums = [span.sum for span in expected.spans]
    assert [span.sum for span in found.spans] == pytest.approx(sums, abs=TOLERANCE)


def probe_batches(made: Sequence[tuple[Engine, Space]], draw: random.Random, count: int) -> int:
    """Score random trees, under each engine in turn, with and without what may be reused.

    Answers how many tokens were asked for and not computed.
    """
    spared = 0
    for number in range(count):
        engine, space = made[number % len(made)]
        probes = [Probe(0, draw.randrange(99), sign, 0.05, (0,)) for sign in (1, -1)]
        with closing(space.placed(probes)) as groups:
            for group in groups:
                sequences, spans = grown(draw)
                adapters = [placed.adapter for placed in group]
                # A probe's weights are a state of their own, and so is their namespace; some are
                # asked again, so that there is something to find.
                state = f"{number % len(made)} {[placed.probe for placed in group]}"
                namespace = draw.choice([None, state])
                expected = whole(engine, sequences, spans, adapters)
                for _ in range(draw.randint(1, 2)):
                    found = engine.score(sequences, spans, namespace, adapters)
                    require_equal(found, expected)
                    spared += found.num_asked - found.num_tokens
    return spared


@pytest.mark.parametrize("kind", KINDS)
def test_shared_scores_equal_whole_ones(kind: str, make: Make) -> None:
    """Two engines of one process, of two families, by turns."""
    made = [make(kind, "llama"), make(kind, "opt")]
    before = [engine.free_slots() for engine, _ in made]
    assert probe_batches(made, random.Random(kind), count=60) > 10_000
    assert [engine.free_slots() for engine, _ in made] == before
    assert all(engine._pools.cache.protected_size() == 0 for engine, _ in made)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_five_hundred_batches_of_each_space(kind: str, make: Make) -> None:
    made = [make(kind, "llama"), make(kind, "qwen3")]
    probe_batches(made, random.Random(f"{kind} again"), count=500)


@pytest.mark.parametrize("kind", ["dense", "lora"])
def test_without_namespaces_in_its_keys_the_cache_is_found_out(
    kind: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutation that the tests above must not let through."""
    new = Pools._new

    def forgetful(self: Pools, tokens: Any, adapter: Any, namespace: Any, scored: bool) -> Any:
        request = new(self, tokens, adapter, namespace, scored)
        request.extra_key = None if namespace is None else "any"
        return request

    monkeypatch.setattr(Pools, "_new", forgetful)
    with pytest.raises(AssertionError):
        probe_batches([make(kind, "llama")], random.Random(1), count=60)


def test_a_forward_shares_and_finds_what_an_earlier_one_left(make: Make) -> None:
    engine, _ = make("dense", "llama")
    context, first, second = [3, 4, 5] * 10, [6, 7, 8], [6, 9, 9, 4]
    sequences = [context + first, context + second, context[:20]]
    spans = [(31, 33), (32, 34), (10, 20)]
    distinct = 30 + 2 + 2  # inputs of the two long ones, which share one token behind the context
    scores = engine.score(sequences, spans)
    assert (scores.num_tokens, scores.num_reused) == (distinct, 0)
    assert scores.num_asked == 32 + 33 + 19
    kept = engine.score(sequences[:2], spans[:2], "state")
    again = engine.score(sequences[:2], spans[:2], "state")
    assert kept.num_tokens == distinct
    assert again.num_tokens < 5
    require_equal(again, whole(engine, sequences[:2], spans[:2], [None]))


def test_a_failed_forward_leaves_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = make("lora", "llama")
    sequences, spans = grown(random.Random(3))
    before = engine.free_slots()
    forward = engine._runner.forward
    monkeypatch.setattr(engine._runner, "forward", lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.score(sequences, spans, "state")
    monkeypatch.setattr(engine._runner, "forward", forward)
    assert engine.free_slots() == before
    require_equal(engine.score(sequences, spans, "state"), whole(engine, sequences, spans, [None]))


def test_engines_that_cannot_share_compute_every_prompt_whole(make: Make) -> None:
    engine, _ = make("dense", "opt")
    sequences, spans = grown(random.Random(4))
    expected = engine.score(sequences, spans)
    engine._can_share = False
    found = engine.score(sequences, spans)
    assert found.num_tokens > expected.num_tokens
    assert found.num_tokens == whole(engine, sequences, spans, [None]).num_tokens
    require_equal(found, expected)
    with torch.no_grad():
        assert engine.plan(sequences, spans).batches[0].is_shared is False
