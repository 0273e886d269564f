"""A step's signal against the loss's own noise, both drawn with known sizes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_driver import HEADER, ToyFleet, config

from orchestrator import noise_floor
from orchestrator.batches import Batches
from orchestrator.config import Estimator
from orchestrator.driver import Driver
from orchestrator.estimator import BASE_SEED
from orchestrator.metrics import Evaluation, StepMetrics
from orchestrator.records import Probe, ProbeLoss
from orchestrator.seed_sync import Ledger

NOISE, EPS, SEEDS = 1e-3, 1e-2, 4
KINDS: list[dict[str, Any]] = [
    {"kind": "two_sided"},
    {"kind": "one_sided", "clip": 0.1},
    {"kind": "fzoo"},
    {"kind": "es"},
    {"kind": "es", "shaping": "rank"},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slope", [0.0, 0.1, 1.0])
def test_signal_to_noise_is_that_of_the_slopes(kind: dict[str, Any], slope: float) -> None:
    """Its square is so on the mean: powers in the slopes, of z's share and of the noise."""
    settings = Estimator.model_validate({"eps": EPS, "num_seeds": SEEDS, **kind})
    draw = np.random.default_rng(0)
    powers = []
    for _ in range(4000):
        along = slope * draw.normal(size=SEEDS) * EPS
        plus, minus, base = (draw.normal(0, NOISE, SEEDS) for _ in range(3))
        losses: list[tuple[float, ...]]
        if settings.kind == "two_sided":
            losses = list(zip(1 + along + plus, 1 - along + minus, strict=True))
        elif settings.kind == "es":
            losses = [(value,) for value in 1 + along + plus]
        else:
            losses = [(value, 1 + base[0]) for value in 1 + along + plus]
        measured = noise_floor.slopes(settings, losses)
        noise = noise_floor.slope_noise(settings, SEEDS, NOISE)
        powers.append(np.mean(np.square(measured)) / noise**2 - 1)
        expected = math.sqrt(max(0.0, powers[-1]))
        assert noise_floor.signal_to_noise(settings, losses, NOISE) == pytest.approx(expected)
    # n-SPSA divides the noise of two losses by 2 eps; one sign of a seed by eps alone.
    of_noise = NOISE / EPS / math.sqrt(2) if settings.kind == "two_sided" else NOISE / EPS
    if settings.kind in ("one_sided", "fzoo"):
        of_noise *= math.sqrt(2)  # of the base too; compared with the others', both signals grow
    assert np.mean(powers) == pytest.approx((slope / of_noise) ** 2, rel=0.1, abs=0.1)


def test_what_is_not_known_is_none() -> None:
    settings = Estimator(eps=EPS)
    assert noise_floor.signal_to_noise(settings, [(1.0, 2.0)], None) is None
    assert noise_floor.signal_to_noise(settings, [(1.0, None)], NOISE) is None
    assert noise_floor.deviation([1.0, math.nan]) is None
    assert noise_floor.deviation([1.0, 3.0, math.inf]) == pytest.approx(math.sqrt(2))
    assert noise_floor.deviation([3.0, 3.0]) == pytest.approx(3 / 2**24)


def test_a_run_tells_each_steps_signal_and_its_ledger_nothing_of_it(tmp_path: Path) -> None:
    seen: list[StepMetrics] = []

    class Watcher:
        def step(self, metrics: StepMetrics) -> None:
            seen.append(metrics)

        def evaluation(self, evaluation: Evaluation) -> None:
            raise AssertionError("nothing is evaluated")

    chosen, fleet = config(), ToyFleet()
    with Ledger.create(tmp_path / "ledger.jsonl", HEADER) as ledger:
        batches = Batches(chosen, 20)
        noise = noise_floor.measure(chosen, fleet, 0, batches.of(0))
        Driver(chosen, fleet, ledger, [Watcher()], batches=batches, num_test=5).train()
    for metrics, record in zip(seen, ledger.records, strict=True):
        signal = noise_floor.signal_to_noise(chosen.estimator, record.losses, noise)
        assert metrics.signal_to_noise == signal
        assert signal is not None and signal > 1
        assert BASE_SEED not in record.seeds


def test_the_noise_is_measured_twice_in_both_orders() -> None:
    calls: list[Sequence[Probe]] = []

    class Noisy(ToyFleet):
        def evaluate(self, probes: Sequence[Probe]) -> list[ProbeLoss]:
            calls.append(probes)
            return [ProbeLoss(1 + NOISE * (-1) ** index, 1, 1) for index, _ in enumerate(probes)]

    noise = noise_floor.measure(config(), Noisy(), 5, (1, 2, 3))
    assert noise == pytest.approx(NOISE * math.sqrt(4 / 3))
    assert [len(probes) for probes in calls] == [2, 2]
    assert [probes[0].examples for probes in calls] == [(1, 2, 3), (2, 3, 1)]
    assert all((probe.step, probe.sign) == (5, 0) for probes in calls for probe in probes)


def test_on_a_device_that_repeats_itself_the_orders_alone_tell_the_noise() -> None:
    class Exact(ToyFleet):
        def evaluate(self, probes: Sequence[Probe]) -> list[ProbeLoss]:
            return [ProbeLoss(1 + NOISE * (probe.examples[0] == 1), 1, 1) for probe in probes]

    noise = noise_floor.measure(config(), Exact(), 5, (1, 2, 3))
    assert noise == pytest.approx(NOISE / math.sqrt(2))
