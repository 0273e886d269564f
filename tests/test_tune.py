"""Proposals for losses whose noise, slope, curvature and bend are known."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_driver import SIZE, ToyFleet, config, z

from orchestrator import estimator, tune
from orchestrator.batches import Batches
from orchestrator.config import Config, ConfigError
from orchestrator.records import Probe, ProbeLoss

CURVATURES = np.arange(1, SIZE + 1) / SIZE
SLOPE = np.full(SIZE, 0.5)
BATCH = 0.3  # deviation of a batch's slope, an element
LOSS = 10.0
drawn = functools.lru_cache(maxsize=None)(z)


@functools.cache
def batch_slope(rows: tuple[int, ...]) -> NDArray[np.float64]:
    return np.random.default_rng(rows).normal(0, BATCH, SIZE)


class Valley(ToyFleet):
    """A quadratic loss with a slope of each batch's own, with noise and a cubic part."""

    def __init__(self, noise: float = 0.0, cubic: float = 0.0, curvature: float = 1.0) -> None:
        super().__init__()
        self.noise, self.cubic, self.curvature = noise, cubic, curvature
        self.draw = np.random.default_rng(1)
        self.num_probes = 0

    def evaluate(self, probes: Sequence[Probe]) -> list[ProbeLoss]:
        self.num_probes += len(probes)
        return [ProbeLoss(self.loss(probe), 1, 1) for probe in probes]

    def loss(self, probe: Probe) -> float:
        point = self.weights + probe.sign * probe.eps * drawn(probe.seed)
        batch = batch_slope(tuple(sorted(probe.examples)))
        along = float(point.sum() / math.sqrt(SIZE))
        return (
            LOSS
            + float(point @ (SLOPE + batch))
            + float(self.curvature * CURVATURES @ point**2) / 2
            + self.cubic * along**3
            + self.noise * self.draw.normal()
        )


def measured(fleet: ToyFleet, chosen: Config | None = None) -> tune.Proposal:
    said: list[str] = []
    chosen = chosen or config()
    proposal = tune.measure(chosen, fleet, Batches(chosen, 400), said.append)
    assert len(said) == 2
    assert tune.lines(chosen.estimator, proposal)[-1] == " ".join(proposal.overrides)
    return proposal


@pytest.fixture
def many_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as make the moments sharp, which they are not meant to be for a user."""
    monkeypatch.setattr(tune, "SLOPE_SEEDS", 1000)
    monkeypatch.setattr(tune, "SLOPE_BATCHES", 30)


def test_eps_lies_between_the_noise_and_the_bend() -> None:
    """Noise in slopes falls with eps, what the cubic part adds grows with its square."""
    noise, cubic = 1e-3, 3.0
    proposal = measured(Valley(noise, cubic))
    eps, curve = proposal.eps, proposal.curve
    assert eps.is_linear and curve.noise == pytest.approx(noise, rel=0.7)  # four repeats
    assert 0.3 * noise < (eps.noise or 0) < 3 * noise
    place = list(curve.eps).index(eps.eps)
    assert curve.eps[place + 1] == eps.high
    slopes = curve.slopes()
    for value in (eps.low, eps.eps, eps.high):
        place = list(curve.eps).index(value)
        exact = np.array([2 * value * slope for slope in _true_slopes()])
        rest = slopes[place] * 2 * value - exact
        assert np.sqrt(np.mean(rest**2)) < 0.25 * np.sqrt(np.mean(exact**2))
    assert 1e-3 <= eps.low < eps.eps < eps.high <= 0.32
    for words in ("the loss bends", "times its noise", "one place of the grid is kept"):
        assert words in eps.reason


def _true_slopes() -> list[float]:
    chosen = config()
    examples = Batches(chosen, 400).of(0)
    batch = batch_slope(tuple(sorted(examples)))
    seeds = estimator.seeds(chosen.run.seed, 0, tune.CURVE_SEEDS)
    return [float(z(seed) @ (SLOPE + batch)) for seed in seeds]


def test_more_noise_moves_eps_up_and_an_earlier_bend_down() -> None:
    def eps(noise: float, cubic: float) -> float:
        return measured(Valley(noise, cubic)).eps.eps

    assert eps(1e-6, 3.0) == eps(1e-4, 3.0)  # below its end the range is linear either way
    assert eps(1e-6, 300.0) < eps(1e-6, 3.0) < eps(1e-6, 0.0)
    assert measured(Valley(1e-3)).eps.low > measured(Valley(1e-5)).eps.low


def test_one_sign_keeps_clear_of_curvature() -> None:
    """Two signs take it out of the difference; es takes out what the seeds share of it."""
    stiff = {"noise": 1e-6, "curvature": 100.0}
    both = measured(Valley(**stiff))
    one = measured(Valley(**stiff), config(kind="one_sided"))
    assert both.eps.eps == 0.32 and "the grid ends there" in both.eps.reason
    assert one.eps.eps < both.eps.eps
    assert "curvature makes over 50% of what one_sided measures" in one.eps.reason
    place = list(one.curve.eps).index(one.eps.high)
    curved = one.curve.curved("one_sided")
    assert curved[place] <= tune.MOST_CURVED < curved[place + 1]
    exact = np.array([abs(slope) for slope in _true_slopes()])
    parts = np.array([one.eps.high / 2 * 100 * z(s) ** 2 @ CURVATURES for s in _seeds()])
    expected = np.sqrt(np.mean(parts**2)) / np.sqrt(np.mean(exact**2))
    assert curved[place] == pytest.approx(expected, rel=1e-2)


def _seeds() -> tuple[int, ...]:
    return estimator.seeds(config().run.seed, 0, tune.CURVE_SEEDS)


def test_a_step_at_the_proposed_rate_gains_what_was_said(many_probes: None) -> None:
    """Signal, noise and curvature against their formulas; lr against steps that are taken."""
    chosen = config(num_seeds=4)
    proposal = measured(Valley(1e-6), chosen)
    signal = proposal.signal
    power = float(SLOPE @ SLOPE)
    assert signal.signal == pytest.approx(power, rel=0.15)
    assert signal.batch_noise == pytest.approx(SIZE * BATCH**2, rel=0.15)
    assert signal.trace == pytest.approx(CURVATURES.sum(), rel=0.05)
    whole = power + SIZE * BATCH**2
    along = (CURVATURES @ SLOPE**2 + CURVATURES.sum() * BATCH**2) / whole
    assert signal.along == pytest.approx(along, rel=0.5)

    draw = np.random.default_rng(2)
    rate = proposal.lr.lr / tune.CAUTION
    gains: dict[float, list[float]] = {share: [] for share in (0.25, 0.5, 1, 2, 3)}
    for _ in range(20000):
        slope = SLOPE + draw.normal(0, BATCH, SIZE)
        noise = draw.normal(size=(4, SIZE))
        update = np.mean((noise @ slope)[:, None] * noise, axis=0)
        for share, values in gains.items():
            move = -share * rate * update
            values.append(-float(move @ SLOPE + CURVATURES @ move**2 / 2))
    means = {share: float(np.mean(values)) for share, values in gains.items()}
    assert means[1] == max(means.values())
    assert means[0.5] == pytest.approx(0.75 * means[1], rel=0.1)
    assert means[2] == pytest.approx(0, abs=0.4 * means[1])
    assert means[3] < 0


def test_signal_to_noise_over_seeds_is_that_of_steps(many_probes: None) -> None:
    signal = measured(Valley(1e-6)).signal
    draw = np.random.default_rng(3)
    for count in (1, 4, 16):
        noise = draw.normal(size=(5000, count, SIZE))
        batch = draw.normal(0, BATCH, size=(5000, 1, SIZE))
        true = noise @ SLOPE
        gains = (true * (true + (noise * batch).sum(axis=2))).mean(axis=1)
        assert signal.steps_signal(count) == pytest.approx(gains.mean() / gains.std(), rel=0.1)


def test_few_probes_find_the_rate_within_a_factor_of_three(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a user has them, over several seeds of the run."""
    chosen = config(num_seeds=4)
    rates = []
    for seed in range(8):
        run = chosen.run.model_copy(update={"seed": seed})
        rates.append(measured(Valley(1e-5), chosen.model_copy(update={"run": run})).lr.lr)
    monkeypatch.setattr(tune, "SLOPE_SEEDS", 1000)
    monkeypatch.setattr(tune, "SLOPE_BATCHES", 30)
    exact = measured(Valley(1e-6), chosen).lr.lr
    assert all(exact / 3 < rate < exact * 3 for rate in rates), (rates, exact)


UNITS: list[tuple[dict[str, Any], float]] = [
    ({"momentum": 0.9}, 0.1),
    # their g has deviation 1, or that of ranks, where slopes have that of the losses over eps
    ({"kind": "es", "shaping": "z_score"}, 1.0),
    ({"kind": "es", "shaping": "rank"}, 1 / 0.2821),
    ({"kind": "fzoo"}, 1.0),
    ({"second_moment": 0.9}, 1.0),
]


@pytest.mark.parametrize(("settings", "factor"), UNITS)
def test_lr_is_in_the_estimators_own_units(
    settings: dict[str, Any], factor: float, many_probes: None
) -> None:
    fleet = Valley(1e-7)
    plain = measured(fleet)
    other = measured(fleet, config(**settings))
    size = 1.0 if settings.get("momentum") else math.sqrt(SLOPE @ SLOPE + SIZE * BATCH**2)
    assert other.lr.lr / plain.lr.lr == pytest.approx(factor * size, rel=0.15)


def test_without_curvature_the_gain_is_bounded() -> None:
    chosen = config()
    proposal = measured(Valley(1e-9, curvature=0.0), chosen)
    signal = proposal.signal
    if proposal.lr.reason.startswith("a step is then expected"):
        assert proposal.lr.lr * signal.signal == pytest.approx(0.05 * LOSS, rel=0.06)
    flat = dataclasses.replace(signal, trace=0.0, trace_error=0.0, along=0.0)
    choice = tune.choose_lr(chosen.estimator, flat)
    assert choice.lr * signal.signal == pytest.approx(0.05 * LOSS, rel=0.06)
    assert "no curvature is seen" in choice.reason


def test_gains_are_measured_by_what_the_objective_can_gain() -> None:
    """A loss of 0 proposes no rate; for a metric that is 0 so far there is one."""
    chosen = config()
    signal = measured(Valley(1e-9, curvature=0.0), chosen).signal
    with pytest.raises(ConfigError, match=r"estimator\.lr: with \d+ rows a batch the losses"):
        tune.choose_lr(chosen.estimator, dataclasses.replace(signal, scale=0.0))
    for objective, scale in (("loss", 0.25), ("f1", 1.0), ("reward", math.inf)):
        task = chosen.task.model_copy(update={"objective": objective})
        assert tune.scale(chosen.model_copy(update={"task": task}), -0.25) == scale


def test_what_cannot_be_measured_is_told() -> None:
    class Constant(ToyFleet):
        value = 1.0

        def evaluate(self, probes: Sequence[Probe]) -> list[ProbeLoss]:
            return [ProbeLoss(self.value, 1, 1) for _ in probes]

    with pytest.raises(ConfigError, match=r"estimator\.eps: no eps from 1e-05 to 1 changes"):
        measured(Constant())
    Constant.value = math.nan
    with pytest.raises(ConfigError, match="no eps"):
        measured(Constant())
    drowned = measured(Valley(noise=100.0))
    assert not drowned.eps.is_linear and "at no eps do slopes agree" in drowned.eps.reason


def test_losses_that_overflow_at_large_eps_only_end_the_range() -> None:
    class Cliff(Valley):
        def loss(self, probe: Probe) -> float:
            return math.inf if probe.sign and probe.eps > 0.05 else super().loss(probe)

    eps = measured(Cliff(1e-6)).eps
    assert (eps.eps, eps.high) == (0.01, 0.032)
