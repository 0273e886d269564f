"""A replica's answers, whichever of a step's probes it is asked for at once."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import DEVICE
from test_training import ACTIVATED, LORA, LOW_RANK, PREFIX, with_objective

from orchestrator.config import Config
from orchestrator.records import Probe, ProbeLoss, probe_groups
from orchestrator.replica import Replica


@pytest.mark.slow
@pytest.mark.parametrize(
    ("space", "objective"),
    [
        ({}, "loss"),
        (LORA, "loss"),
        (ACTIVATED, "loss"),
        (PREFIX, "loss"),
        (LOW_RANK, "loss"),
        ({**LOW_RANK, "others": "dense"}, "loss"),
        ({}, "f1"),
        (LORA, "f1"),
        (ACTIVATED, "f1"),
    ],
)
def test_probes_that_are_given_together_have_the_losses_that_they_have_group_by_group(
    space: dict[str, Any], objective: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    """So a fleet may join groups as time allows, and the ledger is the same. The last is short."""
    config = Config.model_validate(with_objective(recipe, space, objective, tmp_path))
    size = config.space.probes_per_group
    probes = [Probe(0, 7 + n // 2, 1 - n % 2 * 2, 0.3, (1, 2, 3)) for n in range(3 * size - 1)]
    with closing(Replica(config, DEVICE)) as replica:

        def losses(asked: list[Probe]) -> list[tuple[float, tuple[float, ...]]]:
            found: list[ProbeLoss] = replica.evaluate([], asked)
            return [(loss.value, loss.parts) for loss in found]

        parted = [loss for group in probe_groups(probes, size) for loss in losses(list(group))]
        assert losses(probes) == parted
        assert len(set(parted)) > 1
