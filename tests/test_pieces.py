"""Batches cut by context, and their pieces' losses joined, as if they had never been cut."""

import math
import random
from collections import Counter
from typing import Any

import pytest

from orchestrator.batches import Batches
from orchestrator.config import Config
from orchestrator.objectives import mean_loss
from orchestrator.pieces import Assignment, Pieces, joined
from orchestrator.records import Probe, ProbeLoss

NUM_EXAMPLES = 60
CONTEXTS = [f"passage {number // 3}" for number in range(NUM_EXAMPLES)]


def config(batch_size: int = 12, **fleet: Any) -> Config:
    values = {
        "model": {"path": "toy"},
        "space": {"kind": "lora", "activation": "suffix"},
        "estimator": {"batch_size": batch_size},
        "task": {
            "template": "{passage} {*}was {option}",
            "options": ["a", "b"],
            "train": {"path": "rows.jsonl"},
            "holdout": 5,
        },
        "fleet": fleet,
        "run": {"steps": 9, "seed": 5},
    }
    return Config.model_validate(values)


def cut(number: int) -> Config:
    return config(affinity="context", pieces=number)


def answer(assignment: Assignment, kind: str) -> list[ProbeLoss]:
    """Losses that depend on seed and example alone."""
    losses = []
    for probe in assignment.probes:
        draws = [random.Random(f"{probe.seed} {example}") for example in probe.examples]
        parts = tuple(draw.gauss(3, 2) for draw in draws)
        weights = tuple(draw.randrange(1, 9) for draw in draws) if kind == "lm" else ()
        lost = (len(parts), 0, 1, 0, 0) if kind == "reward" else ()
        size = len(parts)
        value = mean_loss(parts, weights)
        losses.append(ProbeLoss(value, 5 * size, 9 * size, 2 * size, parts, lost, weights))
    return losses


@pytest.mark.parametrize("kind", ["option_ce", "lm", "reward"])
@pytest.mark.parametrize("number", [2, 5, 16])
def test_joined_losses_are_those_of_the_whole_batch(kind: str, number: int) -> None:
    """Bit for bit, with examples twice in a batch and more probes than fit a group."""
    examples = (*range(40), *range(7))
    probes = [Probe(0, seed, sign, 1e-3, examples) for seed in range(3) for sign in (1, -1)]
    pieces = Pieces(cut(number), CONTEXTS)
    work = pieces.assignments(probes, 4)
    found = joined(work, [loss for assignment in work for loss in answer(assignment, kind)])
    (whole,) = [answer(Assignment(tuple(probes), 0, 0, (), 1.0), kind)]
    for loss, expected in zip(found, whole, strict=True):
        counts = loss.num_tokens, loss.num_asked, loss.num_across
        assert counts == (5 * len(examples), 9 * len(examples), 2 * len(examples))
        assert (loss.value, loss.parts, loss.weights) == (
            expected.value,
            expected.parts,
            expected.weights,
        )
        if kind == "reward":
            assert loss.lost == (len(examples), 0, len(pieces.cut(examples)), 0, 0)
    assert pieces.homes(work) == sorted(assignment.piece for assignment in work)


def test_a_part_that_is_not_finite_makes_the_loss_so() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        assert not math.isfinite(mean_loss([1.0, bad, math.inf]))


def test_without_affinity_nothing_is_cut() -> None:
    pieces = Pieces(config())
    probes = [Probe(0, seed, 1, 1e-3, (4, 2, 4)) for seed in range(5)]
    work = pieces.assignments(probes, 2)
    assert [assignment.probes for assignment in work] == [
        tuple(probes[:2]),
        tuple(probes[2:4]),
        tuple(probes[4:]),
    ]
    assert pieces.homes(work) is None
    assert pieces.counterpart((4, 2, 4), (7, 8)) == (7, 8)
    with pytest.raises(AssertionError, match="a cut wants contexts"):
        Pieces(cut(4))


def test_a_context_is_in_one_piece_and_pieces_have_as_many() -> None:
    pieces = Pieces(cut(8), CONTEXTS)
    of_context = dict(zip(CONTEXTS, pieces.of_example, strict=True))
    assert all(of_context[CONTEXTS[id]] == piece for id, piece in enumerate(pieces.of_example))
    assert sorted(Counter(of_context.values()).values()) == [2] * 4 + [3] * 4
    batch = (0, 3, 1, 24, 50)
    assert pieces.cut(batch) == [(0, (0, 2, 3, 4)), (1, (1,))]
    assert pieces.counterpart((27, 3), (24, 3, 4, 0)) == (3, 4)
    assert pieces.counterpart((6,), batch) == ()


@pytest.mark.parametrize("is_grouped", [True, False])
def test_batches_hold_as_much_of_each_piece(is_grouped: bool) -> None:
    """And every epoch still shows every example once, in an order of its own."""
    pieces = Pieces(cut(4), CONTEXTS)
    groups = CONTEXTS if is_grouped else ()
    batches = Batches(cut(4), NUM_EXAMPLES, groups, pieces)
    ids = [id for step in range(10) for id in batches.of(step)]
    assert sorted(ids[:60]) == sorted(ids[60:]) == list(range(NUM_EXAMPLES))
    assert ids[:60] != ids[60:]
    for step in range(10):
        assert [len(positions) for _, positions in pieces.cut(batches.of(step))] == [3] * 4
        if is_grouped:
            assert len({CONTEXTS[id] for id in batches.of(step)}) == 4
    if is_grouped:  # in any order, some replica would be left without work of its own
        plain = Batches(config(), NUM_EXAMPLES, groups)
        assert min(len(pieces.cut(plain.of(step))) for step in range(10)) < 4
