"""The loop against algorithms written out in numpy, by a fleet whose model is a few numbers."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from orchestrator import noise
from orchestrator.batches import Batches
from orchestrator.config import Config
from orchestrator.driver import Driver
from orchestrator.metrics import Evaluation, StepMetrics
from orchestrator.records import (
    ChunkScores,
    ExampleScore,
    FleetState,
    Probe,
    ProbeLoss,
    ReplicaInfo,
    Split,
    StepUpdate,
)
from orchestrator.seed_sync import Header, Ledger

HEADER = Header(1, 1, "toy", "", "", "", ())
SIZE, STEPS, SEEDS = 16, 12, 3


def z(seed: int) -> NDArray[np.float64]:
    return noise.draw("gaussian", seed, "weights", 0, SIZE).astype(np.float64)


def bowl(weights: NDArray[np.float64], examples: Sequence[int]) -> float:
    """Lies a little elsewhere for each batch."""
    return float(np.sum((weights - 1 - 0.01 * sum(examples)) ** 2 * np.arange(1, SIZE + 1)))


def loss(weights: NDArray[np.float64], examples: Sequence[int]) -> float:
    """Not a number at one point in eleven."""
    value = bowl(weights, examples)
    return math.nan if int(value * 1e6) % 11 == 0 else value


class ToyFleet:
    """One vector, which takes updates as the ledger tells them."""

    def __init__(self) -> None:
        self.weights = np.zeros(SIZE)
        self.kept: list[str] = []

    def start(self) -> ReplicaInfo:
        return ReplicaInfo("toy", "", "", SIZE, "cpu", ())

    def apply(self, update: StepUpdate) -> None:
        self.weights = self.weights * update.decay
        for seed, coefficient in zip(update.seeds, update.coefficients, strict=True):
            self.weights = self.weights + coefficient * z(seed)

    def evaluate(self, probes: Sequence[Probe]) -> list[ProbeLoss]:
        return [
            ProbeLoss(loss(self.weights + p.sign * p.eps * z(p.seed), p.examples), 1, num_asked=4)
            for p in probes
        ]

    def score(
        self, split: Split, examples: Sequence[int], *, calibrated: bool = False
    ) -> list[ChunkScores]:
        raise NotImplementedError

    def digests(self) -> dict[str, str]:
        return {"toy": self.weights.tobytes().hex()}

    def linear_probe(self) -> list[ExampleScore]:
        raise NotImplementedError

    def export(self, folder: Path) -> None:
        raise NotImplementedError

    def snapshot(self, digest: str) -> None:
        assert digest == self.digests()["toy"]
        self.kept.append(digest)

    def state(self) -> FleetState:
        return FleetState()

    def close(self) -> None:
        pass


def config(**estimator: Any) -> Config:
    settings = {"num_seeds": SEEDS, "batch_size": 2, "eps": 1e-3, "lr": 1e-3, **estimator}
    task = {"preset": "sst2", "train": {"path": "rows.jsonl"}, "holdout": 5}
    return Config.model_validate(
        {"model": {"path": "toy"}, "estimator": settings, "task": task, "run": {"steps": STEPS}}
    )


def train(
    chosen: Config, path: Path, header: Header = HEADER
) -> tuple[Ledger, NDArray[np.float64]]:
    """A run's ledger, new or continued, and the weights that it leads to."""
    fleet = ToyFleet()
    with Ledger.open(path, header) if path.exists() else Ledger.create(path, header) as ledger:
        Driver(chosen, fleet, ledger, [], batches=Batches(chosen, 20), num_test=5).train()
    return ledger, fleet.weights


@pytest.mark.parametrize("done", [0, 1, 5, 11])
@pytest.mark.parametrize(
    "estimator",
    [
        {"weight_decay": 0.1},
        {"momentum": 0.5},  # whose sum is cut off after 7 steps
        {"second_moment": 0.9},
        {"kind": "one_sided", "second_moment": 0.9, "momentum": 0.7, "schedule": "cosine"},
        {"kind": "one_sided", "clip": 20.0, "second_moment": 0.5},
        {"kind": "fzoo", "momentum": 0.3, "clip": 1.5},
        {"kind": "es", "second_moment": 0.9, "momentum": 0.9},
        {"kind": "es", "shaping": "rank", "momentum": 0.9},
        {"kind": "es", "shaping": "z_score"},
        {
            "kind": "es",
            "second_moment": 0.9,
            "momentum": 0.9,
            "eps_schedule": "cosine",
            "eps_final": 1e-2,
            "seeds_schedule": "linear",
            "num_seeds_final": 9,
        },
    ],
)
def test_a_resumed_run_writes_the_same_ledger(
    estimator: dict[str, Any], done: int, tmp_path: Path
) -> None:
    chosen = config(**estimator)
    whole, weights = train(chosen, tmp_path / "whole.jsonl")
    assert any(record.dropped for record in whole.records)
    cut = tmp_path / "cut.jsonl"
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[: 1 + done]))
    _, again = train(chosen, cut)
    assert cut.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    np.testing.assert_array_equal(again, weights)
    replayed = ToyFleet()  # the ledger alone tells the state: no settings, no history
    for record in Ledger.read(cut)[1]:
        replayed.apply(record.update())
    np.testing.assert_array_equal(replayed.weights, weights)


def test_snapshots_are_asked_for_and_leave_the_ledger_as_it_is(tmp_path: Path) -> None:
    chosen = config()
    train(chosen, tmp_path / "without.jsonl")
    often = chosen.model_copy(update={"run": chosen.run.model_copy(update={"snapshot_every": 5})})
    fleet, states = ToyFleet(), []
    with Ledger.create(tmp_path / "with.jsonl", HEADER) as ledger:
        batches = Batches(often, 20)
        Driver(often, fleet, ledger, [], batches=batches, num_test=5).train()
        replayed = ToyFleet()
        for record in ledger.records:
            replayed.apply(record.update())
            states.append(replayed.digests()["toy"])
    assert fleet.kept == [states[4], states[9]]
    assert (tmp_path / "with.jsonl").read_bytes() == (tmp_path / "without.jsonl").read_bytes()


def test_the_ledger_holds_scheduled_eps_and_seeds_and_g_is_over_them(tmp_path: Path) -> None:
    scheduled = {"eps_schedule": "linear", "eps_final": 1e-2, "num_seeds_final": 1}
    chosen = config(num_seeds=12, seeds_schedule="linear", **scheduled)
    records = train(chosen, tmp_path / "ledger.jsonl")[0].records
    assert [record.eps for record in records] == pytest.approx(np.linspace(1e-3, 1e-2, STEPS))
    assert [len(record.seeds) for record in records] == list(range(12, 0, -1))
    for record in records:
        num_kept = len(record.seeds) - len(record.dropped)
        for pair, coefficient in zip(record.losses, record.coefficients, strict=True):
            if coefficient is not None and pair[0] is not None and pair[1] is not None:
                gradient = (pair[0] - pair[1]) / (2 * record.eps)
                assert coefficient == pytest.approx(-1e-3 / num_kept * gradient)


@pytest.mark.parametrize("at", [1, 6, 11])
def test_a_fork_under_the_same_settings_goes_on_as_its_parent_did(at: int, tmp_path: Path) -> None:
    chosen = config(kind="one_sided", second_moment=0.9, momentum=0.7)
    whole, child = tmp_path / "whole.jsonl", tmp_path / "child.jsonl"
    _, weights = train(chosen, whole)
    Ledger.fork(whole, child, at, config_hash=HEADER.config_hash, data_hash=HEADER.data_hash)
    _, again = train(chosen, child)
    assert child.read_bytes().splitlines()[1:] == whole.read_bytes().splitlines()[1:]
    np.testing.assert_array_equal(again, weights)


@pytest.mark.parametrize("kinds", [("two_sided", "es"), ("es", "two_sided"), ("es", "one_sided")])
def test_a_fork_under_other_settings_resumes_to_the_same_ledger(
    kinds: tuple[str, str], tmp_path: Path
) -> None:
    """Its parent's losses, which another estimator measured, move its second moment nowhere."""
    parent, whole, cut = (tmp_path / f"{name}.jsonl" for name in ("parent", "whole", "cut"))
    train(config(kind=kinds[0], momentum=0.5, second_moment=0.5), parent)
    chosen = config(kind=kinds[1], second_moment=0.9, momentum=0.9, lr=1e-2)
    header = replace(HEADER, config_hash="other")
    Ledger.fork(parent, whole, 4, config_hash="other", data_hash=HEADER.data_hash)
    ledger, weights = train(chosen, whole, header)
    assert ledger.records[4].seeds[SEEDS:] == (), "momentum begins anew"
    assert len(ledger.records[6].seeds) > SEEDS
    for done in (4, 5, 8):
        cut.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[: 1 + done]))
        _, again = train(chosen, cut, header)
        assert cut.read_bytes() == whole.read_bytes()
        np.testing.assert_array_equal(again, weights)


@pytest.mark.parametrize("kind", ["two_sided", "one_sided", "es"])
def test_a_steps_loss_is_the_mean_over_its_probes(kind: str, tmp_path: Path) -> None:
    answers: list[float] = []
    seen: list[int] = []

    class Noted(ToyFleet):
        def evaluate(self, probes: Sequence[Probe]) -> list[ProbeLoss]:
            losses = super().evaluate(probes)
            answers[:] = [loss.value for loss in losses if math.isfinite(loss.value)]
            return losses

    class Watcher:
        def step(self, metrics: StepMetrics) -> None:
            seen.append(metrics.step)
            assert metrics.loss == pytest.approx(sum(answers) / len(answers))

        def evaluation(self, evaluation: Evaluation) -> None:
            pass

    chosen = config(kind=kind)
    batches = Batches(chosen, 20)
    with Ledger.create(tmp_path / "ledger.jsonl", HEADER) as ledger:
        Driver(chosen, Noted(), ledger, [Watcher()], batches=batches, num_test=5).train()
    assert seen == list(range(chosen.run.steps))


def test_momentum_is_the_heavy_ball_with_a_velocity(tmp_path: Path) -> None:
    """As long as no earlier step is left out: 0.7**12 is above 1e-2."""
    ledger, weights = train(config(momentum=0.7, weight_decay=0.1), tmp_path / "ledger.jsonl")
    expected, velocity = np.zeros(SIZE), np.zeros(SIZE)
    for record in ledger.records:
        kept = [
            (seed, (pair[0] - pair[1]) / 2e-3)
            for seed, pair in zip(record.seeds[:SEEDS], record.losses, strict=False)
            if pair[0] is not None and pair[1] is not None
        ]
        velocity = 0.7 * velocity
        for seed, gradient in kept:
            velocity = velocity - 1e-3 / len(kept) * gradient * z(seed)
        expected = (1 - 1e-3 * 0.1) * expected + velocity
    assert all(any(pair) for record in ledger.records for pair in record.losses[:SEEDS])
    assert len(ledger.records[-1].seeds) > SEEDS * (STEPS - 2)
    np.testing.assert_allclose(weights, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "estimator",
    [
        {"lr": 1e-3},
        {"kind": "one_sided", "second_moment": 0.9, "lr": 0.1},
        {"kind": "one_sided", "lr": 1e-3, "momentum": 0.5},
        {"kind": "fzoo", "lr": 0.1},
        {"kind": "es", "lr": 1e-3},
        {"kind": "es", "shaping": "z_score", "lr": 0.1},
        {"kind": "es", "shaping": "rank", "lr": 0.3},
        {"clip": 100.0, "lr": 1e-3},
    ],
)
def test_every_estimator_goes_downhill(estimator: dict[str, Any], tmp_path: Path) -> None:
    _, weights = train(config(**estimator, num_seeds=16), tmp_path / "ledger.jsonl")
    start, end = (bowl(point, (10, 10)) for point in (np.zeros(SIZE), weights))
    assert end < 0.8 * start
