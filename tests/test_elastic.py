"""A fleet that follows its cluster: nodes join and leave in the middle of a run.

Real Ray, several nodes on one machine; real SGLang engines, a tiny model.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import DEVICE
from ray.cluster_utils import Cluster
from test_fleets import Trouble, driver, step_lines
from test_training import train

from orchestrator import actors
from orchestrator.config import Config
from orchestrator.seed_sync import Ledger

STEPS = 24
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE == "cuda", reason="nodes of one machine would share its GPUs"),
]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """With one node, which has one CPU."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def test_the_fleet_gains_and_loses_replicas_with_nodes(
    recipe: dict[str, Any], tmp_path: Path, cluster: Cluster
) -> None:
    """It pauses below its minimum, goes on when there is room again, and leaves the same ledger."""
    values = {**recipe, "run": {**recipe["run"], "steps": STEPS}}
    local = train(Config.model_validate(values), tmp_path / "local.jsonl")
    section = {"kind": "ray", "num_replicas": "auto", "min_replicas": 2, "max_replicas": 3}
    said: list[str] = []
    nodes = [cluster.add_node(num_cpus=1)]

    def say(sentence: str) -> None:
        said.append(sentence)
        if "the run pauses" in sentence:
            nodes.append(cluster.add_node(num_cpus=1))

    config = Config.model_validate({**values, "fleet": section})
    fleet = actors.ActorFleet(config, tmp_path / "log", say)
    fleet.start()
    sizes = []

    def until(number: int) -> Callable[[], None]:
        """Wait until so many replicas are up and no other is expected."""

        def event() -> None:
            deadline = time.monotonic() + 120
            while len(fleet._seats) != number or len(fleet._seats.of("ready")) != number:
                assert time.monotonic() < deadline, (said, list(fleet._seats))
                fleet._attend()
            sizes.append(number)

        return event

    trouble = Trouble(
        {
            2: lambda: nodes.append(cluster.add_node(num_cpus=2)),  # one more than may be used
            4: until(3),
            7: lambda: cluster.remove_node(nodes.pop()),
            9: until(2),  # step 8 has met the dead one
            15: lambda: cluster.remove_node(nodes.pop()),
        }
    )
    header, _ = Ledger.read(tmp_path / "local.jsonl")
    with Ledger.create(tmp_path / "ledger.jsonl", header) as ledger:
        driver(fleet, ledger, trouble).train()
    assert not trouble.events
    assert sizes == [3, 2]
    assert step_lines(tmp_path) == local
    digests = fleet.digests()
    assert len(digests) == 2 and len(set(digests.values())) == 1
    for sentence in (
        "the cluster has room for 2 replicas",
        "the cluster has room for 4 replicas; starting replica 2",
        "the run pauses with 1 replica: fleet.min_replicas is 2",
        "the run goes on with 2 replicas",
    ):
        assert sentence in said
    assert any("room for 2 replicas; letting go of replica" in sentence for sentence in said)


def test_a_fleet_begins_with_its_minimum_and_is_joined_by_the_others(
    recipe: dict[str, Any], tmp_path: Path, cluster: Cluster
) -> None:
    """What the second finds no place for is not waited for."""
    section = {"kind": "ray", "num_replicas": 2}
    config = Config.model_validate({**recipe, "fleet": section})
    local = train(Config.model_validate(recipe), tmp_path / "local.jsonl")
    fleet = actors.ActorFleet(config, tmp_path / "log", lambda _: None)
    fleet.start()
    assert [seat.state for seat in fleet._seats] == ["ready", "placing"]
    header, _ = Ledger.read(tmp_path / "local.jsonl")
    trouble = Trouble({2: lambda: cluster.add_node(num_cpus=1)})
    with Ledger.create(tmp_path / "ledger.jsonl", header) as ledger:
        driver(fleet, ledger, trouble).train()
    assert step_lines(tmp_path) == local
    deadline = time.monotonic() + 120
    while fleet._seats.of("placing", "loading", "catching up"):
        assert time.monotonic() < deadline
        fleet._attend()
    digests = fleet.digests()
    assert list(digests) == ["replica 0", "replica 1"] and len(set(digests.values())) == 1
