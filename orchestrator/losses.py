"""Losses of probes, from the engine's scores or from what was thought of its answers.

Owns what an example's part of a loss is. Knows nothing of how scores and answers come about.
"""

import math
from collections.abc import Sequence

from orchestrator import rewards
from orchestrator.encoder import Encoding
from orchestrator.objectives import mean_loss, option_accuracy, option_cross_entropy
from orchestrator.records import ProbeLoss
from orchestrator.rewards import Judged
from orchestrator.sampling import Continuation
from orchestrator.score_plan import Scores, SpanScore


def by_option(encodings: Sequence[Encoding], scores: Scores) -> list[list[list[SpanScore]]]:
    """Scores per adapter, example and option."""
    spans = iter(scores.spans)
    num_spans = sum(len(encoding.spans) for encoding in encodings)
    return [
        [[next(spans) for _ in encoding.spans] for encoding in encodings]
        for _ in range(len(scores.spans) // num_spans)
    ]


def answer_loss(
    found: Sequence[Continuation], judged: Sequence[Judged], number: int, num_tokens: int
) -> ProbeLoss:
    """A probe's loss: minus the mean over examples of that over the `number` answers to each."""
    worth = [
        math.nan if each.ended == "undefined" else value.value
        for each, value in zip(found, judged, strict=True)
    ]
    parts = tuple(
        -math.fsum(worth[first : first + number]) / number for first in range(0, len(worth), number)
    )
    num_found = sum(each.num_reused for each in found)
    lost = rewards.count(judged)
    num_asked = num_tokens + num_found
    return ProbeLoss(mean_loss(parts), num_tokens, num_asked, num_found, parts, lost)


def probe_loss(
    kind: str,
    encodings: Sequence[Encoding],
    scores: Sequence[Sequence[SpanScore]],
    answer: Scores,
    num_adapters: int,
) -> ProbeLoss:
    """A probe's loss, from its options' scores, and its share of what all adapters took; `kind` is
    task.loss, or accuracy."""
    parts = tuple(
        _part(kind, encoding, options) for encoding, options in zip(encodings, scores, strict=True)
    )
    weights = tuple(_num_right_tokens(encoding) for encoding in encodings) if kind == "lm" else ()
    return ProbeLoss(
        mean_loss(parts, weights),
        answer.num_tokens // num_adapters,
        answer.num_asked // num_adapters,
        answer.num_reused // num_adapters,
        parts,
        weights=weights,
    )


def _part(kind: str, encoding: Encoding, options: Sequence[SpanScore]) -> float:
    """An example's part of its batch's loss."""
    if kind == "lm":
        return -options[encoding.label].sum
    means = [option.mean for option in options]
    if kind == "accuracy":
        return -option_accuracy(means, (encoding.label, *encoding.also_right))
    return option_cross_entropy(means, encoding.label)


def _num_right_tokens(encoding: Encoding) -> int:
    start, end = encoding.spans[encoding.label]
    return end - start
