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
