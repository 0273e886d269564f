"""From losses to coefficients: probes, steps and schedules.

Pure functions on scalars: the same losses give the same coefficients, in float64 up to the last
rounding to float32. Knows neither who computed a loss nor what a parameter is.

`gradients` has a number g_i a seed from the losses. A step is then, over the n seeds that are kept,
    theta = (1 - lr * weight_decay) * theta + sum_i c_i z_i,  c_i = -lr / n * g_i / scale
or with `decay_towards` start the decay is of theta's distance from its first value. The scale is 1,
or with `second_moment` beta, after Dbouk et al. 2026 (MEAZO, arXiv 2605.03869),
    v = beta * v + (1 - beta) * mean_i g_i^2,  scale = sqrt(v / (1 - beta^t)) + 1e-8.
The paper squares the mean of the g_i; their signs are those of the z_i, so arbitrary, and the mean
of the squares does not shrink with n. For one seed the two are the same.

With `momentum` m a step adds the earlier steps' pairs (seed, c) once more, those of k steps ago
times m^k: the velocity u = m * u + sum_i c_i z_i (Polyak 1964) without a tensor for it.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator import noise
from orchestrator.config import Estimator, Schedule
from orchestrator.gradients import SeedLosses, gradients
from orchestrator.records import Probe, ProbeLoss

BASE_SEED = 0  # stands in a base probe's place for a seed; its sign is 0, so nothing is drawn
SMALLEST_SCALE = 1e-8
SMALLEST_SHARE = 1e-2  # of an earlier step in an update; what is below is left out
MAX_PAIRS = 256  # of an update, since each costs a pass of noise over all that is trained

Pair = tuple[int, float]
"""A seed and its coefficient."""


@dataclass(frozen=True, slots=True)
class Past:
    """What a step takes over from those before it: `follow`, folded over the ledger's steps."""

    squares: float = 0.0
    """Decaying sum of mean g^2."""
    weight: float = 0.0
    """The same sum of ones, 1 - beta^t: the quotient of the two has no bias towards zero."""
    steps: tuple[tuple[Pair, ...], ...] = ()
    """The steps' own pairs, the latest step first."""


NO_PAST = Past()


@dataclass(frozen=True, slots=True)
class Estimate:
    """A step's coefficients (float32 values), one a seed; None for a seed that was dropped."""

    losses: tuple[SeedLosses, ...]
    """Per seed, in the probes' order; None where a loss was not finite."""
    gradients: tuple[float | None, ...]
    """Projected gradients g_i."""
    coefficients: tuple[float | None, ...]
    decay: float
    carried: tuple[Pair, ...]
    """What momentum adds of earlier steps."""


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
    perturbed = [Probe(step, seed, 1, eps, examples) for seed in step_seeds]
    if estimator.kind == "es":
        return perturbed
    return [Probe(step, BASE_SEED, 0, eps, examples), *perturbed]


def estimate(
    estimator: Estimator, lr: float, losses: Sequence[ProbeLoss], past: Past = NO_PAST
) -> Estimate:
    """Coefficients of the step, from the losses of `probes` in their order."""
    seed_losses = _by_seed(estimator, losses)
    projected = gradients(estimator, seed_losses, [loss.parts for loss in losses])
    num_kept = sum(gradient is not None for gradient in projected)
    scale = _scale(_with_squares(estimator, past, projected))
    coefficients = [
        None if gradient is None else float32(-lr / num_kept * gradient / scale)
        for gradient in projected
    ]
    # A step that keeps no seed must leave the state as it is.
    return Estimate(
        losses=seed_losses,
        gradients=tuple(projected),
        coefficients=tuple(coefficients),
        decay=float32(1 - lr * estimator.weight_decay) if num_kept else 1.0,
        carried=_carried(estimator, past) if num_kept else (),
    )


def follow(
    estimator: Estimator,
    past: Past,
    step_seeds: Sequence[int],
    losses: Sequence[SeedLosses],
    coefficients: Sequence[float | None],
) -> Past:
    """The past of the step after this one, from what the ledger stores of this one.

    Seeds that the step carried on from earlier ones have no losses there.
    """
    pairs = tuple(
        (seed, coefficient)
        for seed, measured, coefficient in zip(step_seeds, losses, coefficients, strict=True)
        if measured and coefficient is not None
    )
    if not pairs:
        return past
    if estimator.second_moment is not None:
        measured_losses = [measured for measured in losses if measured]
        past = _with_squares(estimator, past, gradients(estimator, measured_losses))
    return replace(past, steps=(pairs, *past.steps)[: num_summed_steps(estimator) - 1])


def num_summed_steps(estimator: Estimator) -> int:
    """How many steps' pairs an update adds up, its own among them."""
    number, limit = 1, MAX_PAIRS // max(estimator.num_seeds, estimator.num_seeds_final or 0)
    while number < limit and estimator.momentum**number >= SMALLEST_SHARE:
        number += 1
    return number


def at_step(estimator: Estimator, step: int, steps: int) -> Estimator:
    """The settings of a step (0-based) of a run of `steps`: eps and seeds as scheduled then.

    The first step has the settings' own values, the last one the final values.
    """
    progress = step / max(1, steps - 1)
    values: dict[str, float] = {}
    if estimator.eps_final is not None:
        share = _share(estimator.eps_schedule, progress)
        values["eps"] = share * estimator.eps + (1 - share) * estimator.eps_final
    if estimator.num_seeds_final is not None:
        share = _share(estimator.seeds_schedule, progress)
        number = share * estimator.num_seeds + (1 - share) * estimator.num_seeds_final
        values["num_seeds"] = math.floor(number + 0.5)
    return estimator.model_copy(update=values) if values else estimator


def _share(schedule: Schedule, progress: float) -> float:
    """What a schedule leaves of its first value at a progress of 0 to 1."""
    if schedule == "linear":
        return 1 - progress
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0


def learning_rate(estimator: Estimator, step: int, steps: int) -> float:
    """The rate of a step (0-based) of a run of `steps`: warm-up, then the schedule."""
    if step < estimator.warmup_steps:
        return estimator.lr * (step + 1) / estimator.warmup_steps
    progress = (step - estimator.warmup_steps) / max(1, steps - estimator.warmup_steps)
    return estimator.lr * _share(estimator.schedule, progress)


def notes(estimator: Estimator, steps: int) -> list[str]:
    """What a user should know of settings that do not do what they seem to in a run of `steps`."""
    told = []
    if estimator.weight_decay and float32(1 - estimator.lr * estimator.weight_decay) == 1:
        told.append(
            "estimator.weight_decay does nothing at this lr: 1 - lr * weight_decay is rounded to 1 "
            "in float32"
        )
    if estimator.warmup_steps > steps:
        told.append(
            f"estimator.lr is not reached: estimator.warmup_steps, {estimator.warmup_steps}, are "
            f"more than run.steps, {steps}"
        )
    return told


def float32(value: float) -> float:
    """The float32 number nearest to `value`, which every machine then reads the same."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _by_seed(estimator: Estimator, losses: Sequence[ProbeLoss]) -> tuple[SeedLosses, ...]:
    """The losses of `probes` as the ledger stores them; a base stands beside every seed."""
    values = [loss.value if math.isfinite(loss.value) else None for loss in losses]
    if estimator.kind == "two_sided":
        return tuple(zip(values[::2], values[1::2], strict=True))
    if estimator.kind == "es":
        return tuple((value,) for value in values)
    return tuple((value, values[0]) for value in values[1:])


def _with_squares(estimator: Estimator, past: Past, projected: Sequence[float | None]) -> Past:
    """The past with the second moment taken on by a step's gradients, if there are any."""
    squares = [gradient * gradient for gradient in projected if gradient is not None]
    beta = estimator.second_moment
    if beta is None or not squares:
        return past
    mean = math.fsum(squares) / len(squares)
    return replace(
        past,
        squares=beta * past.squares + (1 - beta) * mean,
        weight=beta * past.weight + (1 - beta),
    )


def _scale(past: Past) -> float:
    return math.sqrt(past.squares / past.weight) + SMALLEST_SCALE if past.weight else 1.0


def _carried(estimator: Estimator, past: Past) -> tuple[Pair, ...]:
    return tuple(
        (seed, float32(estimator.momentum**age * coefficient))
        for age, pairs in enumerate(past.steps, start=1)
        for seed, coefficient in pairs
    )
