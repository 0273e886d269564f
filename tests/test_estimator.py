"""Losses to coefficients, against the formulas written out."""

import math
import struct

import numpy as np
import pytest

from orchestrator import estimator
from orchestrator.config import Estimator
from orchestrator.objectives import option_cross_entropy
from orchestrator.records import ProbeLoss


def settings(**values: object) -> Estimator:
    return Estimator.model_validate({"eps": 0.01, "lr": 0.1, **values})


def losses(*values: float) -> list[ProbeLoss]:
    return [ProbeLoss(value, num_tokens=10) for value in values]


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


def test_probes_match_what_estimate_reads() -> None:
    two = estimator.probes(settings(num_seeds=2), 4, [11, 12], (7, 8))
    assert [(probe.seed, probe.sign) for probe in two] == [(11, 1), (11, -1), (12, 1), (12, -1)]
    assert all((probe.step, probe.eps, probe.examples) == (4, 0.01, (7, 8)) for probe in two)
    one = estimator.probes(settings(kind="one_sided"), 4, [11, 12], (7, 8))
    assert [probe.sign for probe in one] == [0, 1, 1]


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


def test_option_cross_entropy() -> None:
    scores = [-1.0, -3.0, -2.0]
    shares = np.exp(scores) / np.exp(scores).sum()
    assert option_cross_entropy(scores, 2) == pytest.approx(-math.log(shares[2]))
    assert option_cross_entropy([-1e4, -2e4], 1) == pytest.approx(1e4)
    assert not math.isfinite(option_cross_entropy([math.nan, 1.0], 1))
    assert not math.isfinite(option_cross_entropy([-math.inf, -math.inf], 1))
