"""Losses to coefficients, against the formulas written out."""

import math
import struct
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from orchestrator import estimator
from orchestrator.config import Estimator
from orchestrator.objectives import option_cross_entropy
from orchestrator.records import ProbeLoss


def settings(**values: object) -> Estimator:
    return Estimator.model_validate({"eps": 0.01, "lr": 0.1, **values})


def losses(*values: float) -> list[ProbeLoss]:
    return [ProbeLoss(value, num_tokens=10, num_asked=10) for value in values]


def test_two_sided_coefficients() -> None:
    result = estimator.estimate(settings(), 0.1, losses(1.5, 1.0, 2.0, 2.25))
    assert result.gradients == pytest.approx((25.0, -12.5))
    assert result.coefficients == pytest.approx((-0.1 / 2 * 25, 0.1 / 2 * 12.5))
    assert result.losses == ((1.5, 1.0), (2.0, 2.25))


def test_one_sided_coefficients() -> None:
    result = estimator.estimate(settings(kind="one_sided"), 0.1, losses(1.0, 1.5, 0.75))
    assert result.gradients == pytest.approx((50.0, -25.0))
    assert result.losses == ((1.5, 1.0), (0.75, 1.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_drops_its_seed_alone(bad: float) -> None:
    result = estimator.estimate(settings(), 0.1, losses(1.5, 1.0, bad, 1.0))
    assert result.coefficients[1] is None
    assert result.losses[1] == (None, 1.0)
    assert result.coefficients[0] == pytest.approx(-0.1 * 25)  # the mean is over what is left


def test_a_step_without_a_finite_loss_changes_nothing() -> None:
    result = estimator.estimate(
        settings(kind="one_sided", weight_decay=0.5), 0.1, losses(math.nan, 1.0)
    )
    assert (result.coefficients, result.decay) == ((None,), 1.0)


def test_a_quotient_beyond_float32_drops_its_seed() -> None:
    result = estimator.estimate(settings(eps=1e-30), 0.1, losses(1e30, -1e30))
    assert result.coefficients == (None,)


def test_coefficients_and_decay_are_float32_values() -> None:
    result = estimator.estimate(settings(weight_decay=0.3), 1 / 3, losses(1.1, 1.0))
    for value in (*result.coefficients, result.decay):
        assert value == np.float32(value)
    assert struct.unpack("<f", struct.pack("<f", result.decay))[0] == result.decay != 1


FIVE = (1.25, 0.5, 2.0, 0.75, 1.5)


def test_fzoo_divides_by_the_deviation_of_the_perturbed_losses() -> None:
    chosen = settings(kind="fzoo", num_seeds=5)
    result = estimator.estimate(chosen, 0.1, losses(1.0, *FIVE))
    expected = (np.array(FIVE) - 1.0) / np.std(FIVE)
    assert result.gradients == pytest.approx(expected)
    assert result.coefficients == pytest.approx(-0.1 / 5 * expected)
    assert result.losses == tuple((value, 1.0) for value in FIVE)


def test_fzoo_without_its_base_or_without_spread_does_not_move() -> None:
    chosen = settings(kind="fzoo", num_seeds=3)
    without_base = estimator.estimate(chosen, 0.1, losses(math.nan, 1.0, 2.0, 3.0))
    assert without_base.coefficients == (None, None, None)
    equal = estimator.estimate(chosen, 0.1, losses(1.0, 0.1, 0.1, 0.1))  # whose mean is not 0.1
    assert equal.coefficients == (0.0, 0.0, 0.0)


def shaped(shaping: str, values: tuple[float, ...]) -> NDArray[np.float64]:
    """The formulas, written out."""
    array = np.array(values)
    if shaping == "none":
        others = [np.delete(array, index).mean() for index in range(len(array))]
        result = (array - np.array(others)) / 0.01
    elif shaping == "z_score":
        result = (array - array.mean()) / array.std()
    else:
        ranks = [np.flatnonzero(np.sort(array) == value).mean() for value in array]
        result = np.array(ranks) / (len(array) - 1) - 0.5
    return np.asarray(result, np.float64)


@pytest.mark.parametrize("values", [FIVE, (1.0, 3.0, 1.0, 0.5, 3.0, 3.0), (2.0, 1.0)])
@pytest.mark.parametrize("shaping", ["none", "z_score", "rank"])
def test_es_compares_the_losses_with_each_other(shaping: str, values: tuple[float, ...]) -> None:
    chosen = settings(kind="es", shaping=shaping, num_seeds=len(values))
    result = estimator.estimate(chosen, 0.1, losses(*values))
    expected = shaped(shaping, values)
    assert result.gradients == pytest.approx(expected)
    assert result.coefficients == pytest.approx(-0.1 / len(values) * expected)
    assert result.losses == tuple((value,) for value in values)


@pytest.mark.parametrize("shaping", ["none", "z_score", "rank"])
def test_es_leaves_out_what_cannot_be_compared(shaping: str) -> None:
    chosen = settings(kind="es", shaping=shaping, num_seeds=4)
    result = estimator.estimate(chosen, 0.1, losses(1.0, math.nan, 3.0, 1e300))
    expected = shaped(shaping, (1.0, 3.0))
    assert result.gradients[1] is result.gradients[3] is None
    assert result.gradients[::2] == pytest.approx(expected)
    alone = estimator.estimate(chosen, 0.1, losses(1.0, math.nan, math.inf, 1e300))
    assert (alone.coefficients, alone.decay) == ((None,) * 4, 1.0)
    equal = estimator.estimate(chosen, 0.1, losses(0.1, 0.1, 0.1, math.nan))
    assert equal.coefficients == (0.0, 0.0, 0.0, None)


@pytest.mark.parametrize("shaping", ["z_score", "rank"])
def test_es_compares_probes_prompt_by_prompt(shaping: str) -> None:
    table = np.array([[1.0, 50, 3], [2, -50, 3], [1.5, 100, 3], [math.nan] * 3, [0.5, 0, 3]])
    kept = [0, 1, 2, 4]
    probes = [ProbeLoss(float(row.mean()), 10, 10, parts=tuple(map(float, row))) for row in table]
    chosen = settings(kind="es", shaping=shaping, baseline="prompt", num_seeds=5)
    result = estimator.estimate(chosen, 0.1, probes)
    columns = table[kept].T
    if shaping == "z_score":
        shaped = [(column - column.mean()) / (column.std() or 1) for column in columns]
    else:
        shaped = [rankdata(column) for column in columns]
    expected = np.mean(shaped, axis=0)
    assert result.gradients[3] is None and result.coefficients[3] is None
    assert [result.gradients[i] for i in kept] == pytest.approx(expected)
    assert [result.coefficients[i] for i in kept] == pytest.approx(-0.1 / 4 * expected)
    # The middle prompt's spread does not decide, as it does where the batch is compared.
    whole = estimator.estimate(chosen.model_copy(update={"baseline": "batch"}), 0.1, probes)
    assert np.argmin([whole.gradients[i] or 0.0 for i in kept]) == np.argmin(table[kept, 1])
    scaled = [replace(p, parts=(p.parts[0], p.parts[1] * 9, p.parts[2])) for p in probes]
    again = estimator.estimate(chosen, 0.1, scaled)
    assert [again.gradients[i] for i in kept] == pytest.approx(expected)


def rankdata(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from -0.5 to 0.5; equal values have their mean rank."""
    below = (values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) - 1) / 2
    return np.array(below / (len(values) - 1) - 0.5)


def test_clip_bounds_each_gradient() -> None:
    result = estimator.estimate(settings(clip=20), 0.1, losses(1.5, 1.0, 2.0, 2.25, 1.0, 2.0))
    assert result.gradients == pytest.approx((20, -12.5, -20))
    assert result.coefficients == pytest.approx((-0.1 / 3 * 20, 0.1 / 3 * 12.5, 0.1 / 3 * 20))
    ranked = settings(kind="es", shaping="rank", clip=0.3, num_seeds=2)
    assert estimator.estimate(ranked, 0.1, losses(1, 2)).gradients == (-0.3, 0.3)
    undefined = estimator.estimate(settings(clip=20), 0.1, losses(math.nan, 1.0))
    assert undefined.gradients == (None,)


def steps(
    chosen: Estimator, taken: Sequence[tuple[float, ...]]
) -> list[tuple[estimator.Estimate, tuple[int, ...]]]:
    """Steps in a row at rate 0.1, each with what a ledger would hold of it; and their seeds."""
    past, done = estimator.NO_PAST, []
    for step, values in enumerate(taken):
        result = estimator.estimate(chosen, 0.1, losses(*values), past)
        drawn = estimator.seeds(0, step, len(result.coefficients))
        past = estimator.follow(
            chosen,
            past,
            (*drawn, *(seed for seed, _ in result.carried)),
            (*result.losses, *(() for _ in result.carried)),
            (*result.coefficients, *(value for _, value in result.carried)),
        )
        done.append((result, drawn))
    return done


def test_second_moment_divides_by_the_root_of_the_mean_square() -> None:
    beta, square = 0.9, 0.0
    draw = np.random.default_rng(0)
    taken = [tuple(draw.normal(1, 0.2, size=4)) for _ in range(20)]
    for step, (result, _) in enumerate(steps(settings(second_moment=beta), taken), start=1):
        plus, minus = np.array(taken[step - 1]).reshape(2, 2).T
        g = (plus - minus) / 0.02
        square = beta * square + (1 - beta) * np.mean(g**2)
        scale = math.sqrt(square / (1 - beta**step)) + 1e-8
        assert result.gradients == pytest.approx(g)
        assert result.coefficients == pytest.approx(-0.1 / 2 * g / scale, rel=1e-6)


def test_clipped_gradients_enter_the_second_moment_and_momentum_what_came_of_both() -> None:
    """The order of the three, as the formulas have it: over several steps, in numpy."""
    chosen = settings(kind="one_sided", clip=30.0, second_moment=0.8, momentum=0.5)
    draw = np.random.default_rng(1)
    taken = [(1.0, *draw.normal(1, 0.4, size=3)) for _ in range(5)]
    done = steps(chosen, taken)
    square, earlier = 0.0, list[NDArray[np.float64]]()
    for step, (result, _) in enumerate(done, start=1):
        base, *perturbed = taken[step - 1]
        g = np.clip((np.array(perturbed) - base) / 0.01, -30, 30)
        square = 0.8 * square + 0.2 * np.mean(g**2)
        own = -0.1 / 3 * g / (math.sqrt(square / (1 - 0.8**step)) + 1e-8)
        assert result.coefficients == pytest.approx(own, rel=1e-6)
        carried = [0.5**age * value for age, pairs in enumerate(earlier, 1) for value in pairs]
        assert [value for _, value in result.carried] == pytest.approx(carried, rel=1e-6)
        earlier = [own, *earlier]
    assert max(abs(np.array(taken) - 1).ravel()) > 30 * 0.01, "nothing was clipped"


def test_a_step_without_a_finite_loss_leaves_the_past_as_it_was() -> None:
    chosen = settings(second_moment=0.9, momentum=0.5, weight_decay=0.1)
    first, lost, last = steps(chosen, [(1.5, 1.0), (math.nan, 1.0), (1.25, 1.0)])
    assert lost[0] == estimator.Estimate(((None, 1.0),), (None,), (None,), 1.0, ())
    assert last[0] == steps(chosen, [(1.5, 1.0), (1.25, 1.0)])[1][0]
    assert [seed for seed, _ in last[0].carried] == list(first[1])


def test_momentum_carries_earlier_pairs_on() -> None:
    chosen = settings(momentum=0.5)
    taken = [(1.0 + 0.01 * step, 1.0, 1.0, 1.0 + 0.02 * step) for step in range(1, 11)]
    done = steps(chosen, taken)
    own = [dict(zip(drawn, result.coefficients, strict=True)) for result, drawn in done]
    for step, (result, _) in enumerate(done):
        ages = range(1, min(step, 6) + 1)  # 0.5**7 is the first power below 1e-2
        expected = [
            (seed, float(np.float32(0.5**age * value)))
            for age in ages
            for seed, value in own[step - age].items()
            if value is not None
        ]
        assert list(result.carried) == expected
    assert done[0][0].carried == ()


@pytest.mark.parametrize(
    ("momentum", "num_seeds", "summed"),
    [(0.0, 1, 1), (0.5, 1, 7), (0.9, 1, 44), (0.9, 8, 32), (0.99, 1, 256), (0.9, 64, 4)],
)
def test_an_update_holds_what_still_counts_and_at_most_256_pairs(
    momentum: float, num_seeds: int, summed: int
) -> None:
    chosen = settings(momentum=momentum, num_seeds=num_seeds)
    assert estimator.num_summed_steps(chosen) == summed
    assert summed * num_seeds <= 256


def test_probes_match_what_estimate_reads() -> None:
    two = estimator.probes(settings(num_seeds=2), 4, [11, 12], (7, 8))
    assert [(probe.seed, probe.sign) for probe in two] == [(11, 1), (11, -1), (12, 1), (12, -1)]
    assert all((probe.step, probe.eps, probe.examples) == (4, 0.01, (7, 8)) for probe in two)
    for kind, signs in {"one_sided": [0, 1, 1], "fzoo": [0, 1, 1], "es": [1, 1]}.items():
        chosen = settings(kind=kind, num_seeds=2)
        assert [probe.sign for probe in estimator.probes(chosen, 4, [11, 12], (7, 8))] == signs


def test_seeds_differ_over_runs_steps_and_places() -> None:
    drawn = [
        seed for run in (0, 1) for step in range(50) for seed in estimator.seeds(run, step, 20)
    ]
    assert len(set(drawn)) == len(drawn)
    assert estimator.seeds(0, 3, 4)[:2] == estimator.seeds(0, 3, 2)


def test_schedules() -> None:
    def rates(**values: object) -> list[float]:
        chosen = settings(lr=1.0, **values)
        return [estimator.learning_rate(chosen, step, 10) for step in range(10)]

    assert rates() == [1.0] * 10
    assert rates(schedule="linear") == pytest.approx(np.linspace(1, 0.1, 10))
    assert rates(schedule="cosine")[5] == pytest.approx(0.5)
    warm = rates(schedule="linear", warmup_steps=2)
    assert warm[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert warm[-1] == pytest.approx(1 / 8)


def test_schedules_of_eps_and_seeds() -> None:
    def values(kind: str, steps: int = 11) -> list[tuple[float, int]]:
        chosen = settings(
            num_seeds=4, eps_schedule=kind, eps_final=0.001, seeds_schedule=kind, num_seeds_final=16
        )
        at_steps = [estimator.at_step(chosen, step, steps) for step in range(steps)]
        return [(now.eps, now.num_seeds) for now in at_steps]

    for kind, shares in {
        "linear": np.linspace(1, 0, 11),
        "cosine": (1 + np.cos(np.pi * np.linspace(0, 1, 11))) / 2,
    }.items():
        assert [eps for eps, _ in values(kind)] == pytest.approx(0.001 + shares * 0.009)
        expected = [math.floor(16 - share * 12 + 0.5) for share in shares]
        assert [number for _, number in values(kind)] == expected
        assert values(kind)[0] == (0.01, 4) and values(kind)[-1] == (0.001, 16)
        assert values(kind, steps=1) == [(0.01, 4)]
    assert estimator.at_step(settings(), 5, 11) == settings()
    falling = settings(momentum=0.99, num_seeds=4, seeds_schedule="linear", num_seeds_final=64)
    assert estimator.num_summed_steps(falling) == 4


def test_option_cross_entropy() -> None:
    scores = [-1.0, -3.0, -2.0]
    shares = np.exp(scores) / np.exp(scores).sum()
    assert option_cross_entropy(scores, 2) == pytest.approx(-math.log(shares[2]))
    assert option_cross_entropy([-1e4, -2e4], 1) == pytest.approx(1e4)
    assert not math.isfinite(option_cross_entropy([math.nan, 1.0], 1))
    assert not math.isfinite(option_cross_entropy([-math.inf, -math.inf], 1))


def test_settings_that_do_nothing_are_told() -> None:
    assert estimator.notes(settings(lr=1e-3, weight_decay=0.1, warmup_steps=5), 5) == []
    lost, slow = estimator.notes(settings(lr=1e-6, weight_decay=0.01, warmup_steps=6), 5)
    assert estimator.float32(1 - 1e-8) == 1 and "weight_decay does nothing" in lost
    assert "estimator.lr is not reached" in slow
