"""What a replica answers in a few steps, for masters that lie in different places."""

from pathlib import Path
from typing import Any

import torch

from orchestrator.config import Config
from orchestrator.records import Probe, StepUpdate
from orchestrator.replica import Replica

NUM_STEPS = 4


def run(config: Config, device: str) -> list[Any]:
    """All that a replica answers in a few steps; each step's update follows from its losses."""
    replica = Replica(config, device)
    found: list[Any] = []
    updates: list[StepUpdate] = []
    examples = tuple(range(8))
    for step in range(NUM_STEPS):
        seeds = (2 * step, 2 * step + 1)
        probes = [Probe(step, seed, sign, 0.05, examples) for seed in seeds for sign in (1, -1)]
        losses = [each.value for each in replica.evaluate(updates, probes)]
        coefficients = (losses[1] - losses[0], losses[3] - losses[2])
        updates.append(StepUpdate(step, seeds, coefficients, 0.99))
        found.append(losses)
    assert len({loss for losses in found for loss in losses}) > NUM_STEPS, found
    live: Any = replica.space
    found.append(live.trained.digest(live=True))  # as the last probe left it
    found.append([score.scores for score in replica.score(updates, "test", examples).examples])
    found += [replica.digest(updates), live.trained.digest(live=True)]
    found.append({name: value.cpu() for name, value in live.weights()})
    model = replica.engine.model
    assert not any(module._forward_pre_hooks for module in model.modules())
    del live, model
    replica.close()
    return found


def config(recipe: dict[str, Any], folder: Path, dtype: str, master: str) -> Config:
    """The recipe on another model, without graphs."""
    values = {
        **recipe,
        "model": {"path": str(folder), "dtype": dtype, "kv_tokens": 2048, "score_graphs": False},
        "space": {"kind": "dense", "master": master},
    }
    return Config.model_validate(values)


def same(one: list[Any], other: list[Any]) -> bool:
    """Whether all answers are equal, bit for bit."""
    weights, others = one[-1], other[-1]
    return one[:-1] == other[:-1] and all(
        torch.equal(weights[name], others[name]) for name in weights
    )
