"""The loss's own noise, and how far a step's differences of losses stand out of it.

The noise is measured once, by repeating one unperturbed probe, also with the batch's rows in
another order. Pure but for `measure`, which asks a fleet; nothing of it goes to the ledger.

What that leaves out: rounding that is the same in every repeat, yet another under other weights (a
device that computes a batch the same way each time shows no noise; float32's resolution is then
what counts); and that a step's rows are a sample of all, which one step cannot tell, since its
probes score the same ones. `tune` measures both.
"""

import math
from collections.abc import Sequence

from orchestrator.config import Config, Estimator
from orchestrator.estimator import BASE_SEED
from orchestrator.gradients import SeedLosses, gradients
from orchestrator.records import Fleet, Probe

REPEATS = 2  # in each order
FLOAT32_ROUNDING = 2.0**-24  # of a number that is rounded to float32, as a share of it


def measure(config: Config, fleet: Fleet, step: int, examples: tuple[int, ...]) -> float | None:
    """Standard deviation of a loss over repeats, at the fleet's state, which is that before `step`.

    None where no two of them are finite; repeats of an order that agree are one.
    """
    middle = len(examples) // 2
    losses: list[float] = []
    for order in (examples, examples[middle:] + examples[:middle]):
        probe = Probe(step, BASE_SEED, 0, config.estimator.eps, order)
        # Where a device always computes the same, repeats of an order tell no more than one.
        losses += dict.fromkeys(loss.value for loss in fleet.evaluate([probe] * REPEATS))
    return deviation(losses)


def deviation(losses: Sequence[float]) -> float | None:
    """Standard deviation of repeats, divisor n - 1, and no less than float32's rounding."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if len(finite) < 2:
        return None
    mean = math.fsum(finite) / len(finite)
    squares = math.fsum((loss - mean) ** 2 for loss in finite)
    return max(math.sqrt(squares / (len(finite) - 1)), FLOAT32_ROUNDING * abs(mean))


def slopes(estimator: Estimator, losses: Sequence[SeedLosses]) -> list[float]:
    """The kept seeds' slopes along z, whatever the recipe makes of them: unclipped, unshaped."""
    kind = "one_sided" if estimator.kind == "fzoo" else estimator.kind
    plain = {"kind": kind, "shaping": "none", "baseline": "batch", "clip": None}
    measured = gradients(estimator.model_copy(update=plain), losses)
    return [value for value in measured if value is not None]


def slope_noise(estimator: Estimator, num_slopes: int, noise: float) -> float:
    """Standard deviation of such a slope for losses of a standard deviation of `noise`."""
    if estimator.kind == "two_sided":
        return noise / (math.sqrt(2) * estimator.eps)
    if estimator.kind == "es":  # a loss less the mean of the others
        return noise / estimator.eps * math.sqrt(num_slopes / (num_slopes - 1))
    return math.sqrt(2) * noise / estimator.eps


def signal_to_noise(
    estimator: Estimator, losses: Sequence[SeedLosses], noise: float | None
) -> float | None:
    """Root of the power of a step's slopes over that of the noise in them, less the noise's own 1.

    About 0 for slopes that are nothing but noise, 1 where noise makes half of their squares. With
    few seeds a single step's value scatters widely. None where no seed was kept, or no noise known.
    """
    measured = slopes(estimator, losses)
    least = 2 if estimator.kind == "es" else 1  # one loss is its own mean
    if not noise or len(measured) < least:
        return None
    in_noises = [slope / slope_noise(estimator, len(measured), noise) for slope in measured]
    power = math.fsum(value * value for value in in_noises) / len(in_noises)
    return math.sqrt(max(0.0, power - 1))
