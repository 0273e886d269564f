"""From losses to coefficients: simultaneous perturbation estimates and schedules.

Pure functions on scalars: the same losses give the same coefficients, in float64 up to the last
rounding to float32. Knows neither who computed a loss nor what a parameter is.

Two-sided (n-SPSA; Spall 1992; Malladi et al. 2023, Algorithm 1):
    g_i = (L(theta + eps z_i) - L(theta - eps z_i)) / (2 eps)
One-sided:
    g_i = (L(theta + eps z_i) - L(theta)) / eps
Either way theta becomes (1 - lr * weight_decay) * theta - lr / n * sum_i g_i z_i.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator import noise
from orchestrator.config import Estimator
from orchestrator.records import Probe, ProbeLoss

BASE_SEED = 0  # stands in a base probe's place for a seed; its sign is 0, so nothing is drawn
LARGEST_GRADIENT = 1e30  # leaves room for any sensible learning rate in float32


@dataclass(frozen=True, slots=True)
class Estimate:
    """A step's coefficients (float32 values), one a seed; None for a seed that was dropped."""

    losses: tuple[tuple[float | None, ...], ...]
    """Per seed, in the probes' order; None where a loss was not finite."""
    gradients: tuple[float | None, ...]
    """Projected gradients g_i."""
    coefficients: tuple[float | None, ...]
    decay: float


def seeds(run_seed: int, step: int, num_seeds: int) -> tuple[int, ...]:
    """The step's perturbation seeds, each 64 bits."""
    return tuple(noise.derive_seed(run_seed, step, index) for index in range(num_seeds))


def probes(
    estimator: Estimator, step: int, step_seeds: Sequence[int], examples: tuple[int, ...]
) -> list[Probe]:
    """The evaluations that `estimate` wants, in its order."""
    eps = estimator.eps
    if estimator.kind == "two_sided":
        return [Probe(step, seed, sign, eps, examples) for seed in step_seeds for sign in (1, -1)]
    base = Probe(step, BASE_SEED, 0, eps, examples)
    return [base, *(Probe(step, seed, 1, eps, examples) for seed in step_seeds)]


def estimate(estimator: Estimator, lr: float, losses: Sequence[ProbeLoss]) -> Estimate:
    """Coefficients of the step, from the losses of `probes` in their order."""
    values = [loss.value for loss in losses]
    if estimator.kind == "two_sided":
        pairs = list(zip(values[::2], values[1::2], strict=True))
        spread = 2 * estimator.eps
    else:
        pairs = [(value, values[0]) for value in values[1:]]
        spread = estimator.eps
    gradients = [_difference(pair, spread) for pair in pairs]
    num_kept = sum(gradient is not None for gradient in gradients)
    coefficients = [
        None if gradient is None else float32(-lr / num_kept * gradient) for gradient in gradients
    ]
    return Estimate(
        losses=tuple(tuple(_finite(value) for value in pair) for pair in pairs),
        gradients=tuple(gradients),
        coefficients=tuple(coefficients),
        # A step that keeps no seed must leave the state as it is.
        decay=float32(1 - lr * estimator.weight_decay) if num_kept else 1.0,
    )


def learning_rate(estimator: Estimator, step: int, steps: int) -> float:
    """The rate of a step (0-based) of a run of `steps`: warm-up, then the schedule."""
    if step < estimator.warmup_steps:
        return estimator.lr * (step + 1) / estimator.warmup_steps
    progress = (step - estimator.warmup_steps) / max(1, steps - estimator.warmup_steps)
    if estimator.schedule == "linear":
        return estimator.lr * (1 - progress)
    if estimator.schedule == "cosine":
        return estimator.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return estimator.lr


def float32(value: float) -> float:
    """The float32 number nearest to `value`, which every machine then reads the same."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _difference(pair: tuple[float, float], spread: float) -> float | None:
    """The finite-difference quotient, or None for one that is as good as infinite."""
    quotient = (pair[0] - pair[1]) / spread
    return quotient if abs(quotient) <= LARGEST_GRADIENT else None
