"""From log-probabilities to a loss, in float64 on plain numbers. Knows no model and no text."""

import math
from collections.abc import Sequence


def option_cross_entropy(scores: Sequence[float], label: int) -> float:
    """Cross-entropy over options whose logits are their mean log-probabilities (MeZO, App. E.2).

    Not finite where a score is not; the caller decides what becomes of that.
    """
    highest = max(scores)
    if not math.isfinite(highest):
        return math.nan
    normaliser = highest + math.log(sum(math.exp(score - highest) for score in scores))
    return normaliser - scores[label]


def mean_loss(parts: Sequence[float], weights: Sequence[int] = ()) -> float:
    """A batch's loss from its examples' parts: their sum over that of the examples' weights, which
    are 1 unless given. The order does not matter.

    With answers' negated log-probabilities as parts and their numbers of tokens as weights it is
    cross-entropy a token over all tokens: long answers weigh more, as in MeZO.
    """
    if not all(map(math.isfinite, parts)):
        return math.nan
    return math.fsum(parts) / (sum(weights) if weights else len(parts))


def option_accuracy(scores: Sequence[float], right: Sequence[int]) -> float:
    """1 if the best-scored option is a right one, else 0; nan where a score is not finite."""
    if not all(map(math.isfinite, scores)):
        return math.nan
    return float(max(range(len(scores)), key=scores.__getitem__) in right)


def calibrated(sums: Sequence[float], unconditional: Sequence[float]) -> list[float]:
    """Options' log-probabilities less those without the row: how much the row speaks for each
    (surface form competition, Holtzman et al. 2021)."""
    return [given - alone for given, alone in zip(sums, unconditional, strict=True)]
