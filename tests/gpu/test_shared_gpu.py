"""Two replicas on one GPU, as actors that take half of it each."""

import os
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from test_fleets import driver, step_lines
from test_training import train

from orchestrator import actors
from orchestrator.config import Config
from orchestrator.seed_sync import Ledger

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_two_replicas_share_a_gpu_and_leave_the_ledger_of_one(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    local = train(Config.model_validate(recipe), tmp_path / "local.jsonl")
    section = {"kind": "ray", "num_replicas": 2, "min_replicas": 2, "gpus_per_replica": 0.5}
    config = Config.model_validate({**recipe, "fleet": section})
    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False)
    fleet = actors.ActorFleet(config, tmp_path / "log", lambda _: None)
    fleet.start()
    seen = [
        seat.actor.__ray_call__.remote(lambda _: os.environ["CUDA_VISIBLE_DEVICES"])
        for seat in fleet._seats
    ]
    assert len(set(ray.get(seen))) == 1
    header, _ = Ledger.read(tmp_path / "local.jsonl")
    with Ledger.create(tmp_path / "ledger.jsonl", header) as ledger:
        driver(fleet, ledger).train()
    digests = fleet.digests()
    fleet.close()
    assert step_lines(tmp_path) == local
    assert len(digests) == 2 and len(set(digests.values())) == 1
