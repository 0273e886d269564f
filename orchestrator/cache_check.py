"""Scores that reuse keys and values, against the same scores without.

Owns when the two differ by more than rounding: its size is measured on the spot, by computing some
of the sequences again in batches of another shape. Knows nothing of what reused what.
"""

import math
from collections.abc import Sequence

import torch

from orchestrator.engine import Engine
from orchestrator.score_plan import Scores

NUM_ALONE = 8  # sequences that rounding is measured on
NOISES = 8.0  # standard deviations of rounding that a difference may come to
ROUNDINGS = 4.0  # the least that is allowed, in roundings of a number of the scores' size


class ReuseError(RuntimeError):
    """Scores depend on what was reused: one of the caches is wrong. The ledger is whole."""


def verify(
    engine: Engine,
    sequences: Sequence[Sequence[int]],
    spans: Sequence[tuple[int, int]],
    adapters: Sequence[str | None],
    found: Scores,
    contexts: Sequence[int] | None = None,
) -> None:
    """Raise ReuseError unless `found` is what the engine computes without reuse, but for rounding.

    What stands in `contexts` is computed without adapters, anew for each batch.

    The weights and adapters are those that `found` was computed under.
    """
    contexts = contexts or [0] * len(sequences)
    whole = _means(_without_reuse(engine, sequences, spans, adapters, contexts))
    size = len(sequences)
    chosen = sorted({number * size // NUM_ALONE for number in range(min(NUM_ALONE, size))})
    noises = []
    for index in chosen:
        row = [sequences[index]], [spans[index]], adapters, [contexts[index]]
        alone = _without_reuse(engine, *row)
        noises += [mean - whole[index + n * size] for n, mean in enumerate(_means(alone))]
    if not all(map(math.isfinite, whole)):
        return  # so is the probe's loss, which is dropped
    differences = [abs(a - b) for a, b in zip(_means(found), whole, strict=True)]
    worst = max(differences) if all(map(math.isfinite, differences)) else math.inf
    allowed = max(NOISES * _root_mean_square(noises), ROUNDINGS * _rounding(engine, whole))
    if worst > allowed:
        raise ReuseError(
            f"a score with reused keys and values differs by {worst:.3g} from the same score "
            f"computed whole, where rounding explains {allowed:.3g}; train with "
            "model.share_contexts=false, and report this"
        )


def _without_reuse(
    engine: Engine,
    sequences: Sequence[Sequence[int]],
    spans: Sequence[tuple[int, int]],
    adapters: Sequence[str | None],
    contexts: Sequence[int],
) -> Scores:
    plan = engine.plan(sequences, spans, adapters, contexts, sharing=False)
    return engine.read(plan, [engine.launch(plan)])[0]


def _means(scores: Scores) -> list[float]:
    return [span.mean for span in scores.spans]


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values))


def _rounding(engine: Engine, scores: Sequence[float]) -> float:
    dtype = next(engine.model.parameters()).dtype
    return torch.finfo(dtype).eps * max(1.0, _root_mean_square(scores))
