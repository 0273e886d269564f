"""From a step's losses to its projected gradients: one function a kind of estimator.

Pure functions of what the ledger stores of a step, so that a run that is resumed finds the same
numbers there. Sums are exactly rounded (`math.fsum`): Python's own differs between versions.

Every kind gives a number g_i a seed; a step is theta - lr / n * sum_i g_i z_i over the n seeds that
are kept. With L_i = L(theta + eps z_i):

two_sided   g_i = (L_i - L(theta - eps z_i)) / (2 eps)
            n-SPSA; Spall 1992; Malladi et al. 2023, Algorithm 1
one_sided   g_i = (L_i - L(theta)) / eps
fzoo        g_i = (L_i - L(theta)) / sigma, sigma^2 = 1/n sum_i (L_i - mean L)^2
            Dang et al. 2025, arXiv 2506.09034; as in the authors' program (DKmiyan/FZOO,
            `zo_step` in trainer.py), so without 1 / eps, and sigma of the perturbed losses alone
es          Salimans et al. 2017, arXiv 1703.03864; by `shaping`:
  none      g_i = (L_i - mean of the other L_j) / eps
            the leave-one-out baseline of Kool et al. 2019, which leaves the estimate unbiased
  z_score   g_i = (L_i - mean L) / sigma
            Qiu et al. 2025, arXiv 2509.24372
  rank      g_i = the rank of L_i among the losses, from -0.5 to 0.5; equal losses share their mean
            the centred ranks of Salimans et al.
            With `baseline: prompt` both are taken of each prompt's losses, and g_i is their mean
            over the prompts; the z-score of a group that answers one prompt is that of Shao et al.
            2024, arXiv 2402.03300. The ledger holds g_i's coefficients, but not a prompt's losses.
"""

import math
from collections.abc import Sequence

from orchestrator.config import Estimator

SeedLosses = tuple[float | None, ...]
"""A seed's losses in its probes' order, None for one that is not finite."""
LARGEST = 1e30  # of a gradient, or a loss among others: leaves room for lr, and for squares
FEWEST_COMPARED = 2  # losses that can be compared with each other


def gradients(
    estimator: Estimator,
    losses: Sequence[SeedLosses],
    parts: Sequence[Sequence[float]] = (),
) -> list[float | None]:
    """g_i a seed, within `estimator.clip`; None for a seed that is dropped.

    `parts` has each seed's losses by prompt, for `baseline: prompt`.
    """
    if estimator.kind == "two_sided":
        values = [_quotient(pair[0], pair[1], 2 * estimator.eps) for pair in losses]
    elif estimator.kind == "one_sided":
        values = [_quotient(pair[0], pair[1], estimator.eps) for pair in losses]
    else:
        perturbed = [seed_losses[0] for seed_losses in losses]
        kept = [value for value in perturbed if value is not None and abs(value) <= LARGEST]
        if len(kept) < FEWEST_COMPARED:
            return [None] * len(losses)
        if estimator.kind == "fzoo":
            sigma = _deviation(kept)
            values = [_quotient(pair[0], pair[1], sigma) for pair in losses]
        elif estimator.baseline == "prompt":
            values = _shaped_by_prompt(estimator, perturbed, parts)
        else:
            shaped = dict(zip(kept, _shaped(estimator, kept), strict=True))
            values = [None if value is None else shaped.get(value) for value in perturbed]
    return [_clipped(value, estimator.clip) for value in values]


def _quotient(loss: float | None, other: float | None, divisor: float) -> float | None:
    """(loss - other) / divisor, None where it is as good as infinite; losses without spread: 0."""
    if loss is None or other is None:
        return None
    quotient = (loss - other) / divisor if divisor else 0.0
    return quotient if abs(quotient) <= LARGEST else None


def _clipped(value: float | None, bound: float | None) -> float | None:
    return value if value is None or bound is None else max(-bound, min(bound, value))


# -------------------------------------------------------------------- losses among each other


def _shaped(estimator: Estimator, losses: Sequence[float]) -> Sequence[float | None]:
    if estimator.shaping == "rank":
        return _centred_ranks(losses)
    centred = _centred(losses)
    if estimator.shaping == "z_score":
        sigma = _deviation(losses)
        return [_quotient(value, 0.0, sigma) for value in centred]
    # What a loss exceeds the others' mean by: n / (n - 1) times what it exceeds the mean by.
    correction = len(losses) / (len(losses) - 1)
    return [_quotient(value * correction, 0.0, estimator.eps) for value in centred]


def _shaped_by_prompt(
    estimator: Estimator, losses: Sequence[float | None], parts: Sequence[Sequence[float]]
) -> list[float | None]:
    """Per seed, the mean over prompts of what its loss is among the kept seeds' there."""
    is_kept = [value is not None and abs(value) <= LARGEST for value in losses]
    kept = [part for part, keep in zip(parts, is_kept, strict=True) if keep]
    of_prompts = [_shaped(estimator, of_prompt) for of_prompt in zip(*kept, strict=True)]
    means = iter(
        math.fsum(value or 0.0 for value in of_seed) / len(of_seed)
        for of_seed in zip(*of_prompts, strict=True)
    )
    return [next(means) if keep else None for keep in is_kept]


def _centred(losses: Sequence[float]) -> list[float]:
    """Losses less their mean: exactly 0 if all are equal, which needs offsets from one of them."""
    offsets = [loss - losses[0] for loss in losses]
    mean = math.fsum(offsets) / len(offsets)
    return [offset - mean for offset in offsets]


def _deviation(losses: Sequence[float]) -> float:
    """The standard deviation, with divisor n."""
    return math.sqrt(math.fsum(value * value for value in _centred(losses)) / len(losses))


def _centred_ranks(losses: Sequence[float]) -> list[float]:
    ranks = []
    for loss in losses:
        num_below = sum(other < loss for other in losses)
        num_equal = sum(other == loss for other in losses)
        ranks.append((num_below + (num_equal - 1) / 2) / (len(losses) - 1) - 0.5)
    return ranks
