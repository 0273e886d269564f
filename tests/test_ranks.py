"""Fleets whose replicas are several processes, one a tensor-parallel rank.

Real Ray, real SGLang engines, tiny models. What a rank computes is in test_tensor_parallel.py.
"""

import os
import signal
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml
from conftest import DEVICE
from safetensors.torch import load_file
from test_fleets import Trouble, driver, finish, launch, needs_devices, step_lines
from test_training import train

from orchestrator import actors
from orchestrator.config import Config
from orchestrator.local import LocalFleet
from orchestrator.seed_sync import Header, Ledger

LORA = {"kind": "lora", "rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"], "slots": 4}
RANKS = {"kind": "ray", "num_replicas": 1, "tp_size": 2}
JUDGE = """
    from pathlib import Path

    def score(row, text):
        with open(Path(__file__).with_name("calls"), "a") as file:
            file.write(text + "\\n")
        return len(set(text.split()))
"""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[str]:
    """A Ray cluster for the runs of this file."""
    needs_devices(2)
    context = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture
def values(recipe: dict[str, Any], model_folders: dict[str, Path]) -> dict[str, Any]:
    model = {**recipe["model"], "path": str(model_folders["opt"])}
    return {**recipe, "model": model, "fleet": RANKS}


def alone(values: dict[str, Any]) -> Config:
    """The same run with a replica of one rank, in this process."""
    return Config.model_validate({**values, "fleet": {"kind": "local"}})


Run = Callable[..., actors.ActorFleet]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A run of a recipe by replicas of two ranks, to its end, into a ledger of this name."""
    fleets = []

    def train(values: dict[str, Any], name: str, **events: Callable[..., None]) -> Any:
        config = Config.model_validate(values)
        fleet = actors.ActorFleet(config, tmp_path / "log", lambda _: None)
        fleets.append(fleet)
        info = fleet.start()
        header = Header(1, 1, config.model.path, info.weights_hash, config.identity(), "", ())
        trouble = Trouble({int(step[1:]): partial(event, fleet) for step, event in events.items()})
        (tmp_path / name).mkdir()
        with Ledger.create(tmp_path / name / "ledger.jsonl", header) as ledger:
            driver(fleet, ledger, trouble).train()
        return fleet

    yield train
    for fleet in fleets:
        for seat in fleet._seats:
            fleet._dismiss(seat)


def losses(path: Path) -> list[float | None]:
    _, records = Ledger.read(path)
    return [value for record in records for pair in record.losses for value in pair]


@pytest.mark.parametrize("space", [{"kind": "dense"}, {**LORA, "train": "B"}])
def test_ranks_compute_what_one_does_and_their_ledger_replays_on_one(
    space: dict[str, Any], values: dict[str, Any], run: Run, tmp_path: Path
) -> None:
    values = {**values, "space": space}
    fleet = run(values, "ranks")
    (digest,) = fleet.digests().values()
    fleet.export(tmp_path / "exported")

    train(alone(values), tmp_path / "alone.jsonl")
    found, expected = (losses(tmp_path / name) for name in ("ranks/ledger.jsonl", "alone.jsonl"))
    assert found == pytest.approx(expected, abs=1e-4)
    other = LocalFleet(alone(values), DEVICE)
    other.start()
    for record in Ledger.read(tmp_path / "ranks" / "ledger.jsonl")[1]:
        other.apply(record.update())
    assert other.digests() == {"replica 0": digest}
    other.export(tmp_path / "again")
    other.close()
    (file,) = (path.name for path in (tmp_path / "again").glob("*model.safetensors"))
    tensors, again = (load_file(tmp_path / name / file) for name in ("exported", "again"))
    assert tensors.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in tensors.items())


def test_the_death_of_one_rank_loses_the_replica_and_nothing_else(
    values: dict[str, Any], run: Run, tmp_path: Path
) -> None:
    first: list[Any] = []

    def kill_rank_1(fleet: actors.ActorFleet) -> None:
        first.extend(fleet._seats[0].actors)
        process = ray.get(first[1].__ray_call__.remote(lambda _: os.getpid()))
        os.kill(process, signal.SIGKILL)

    undisturbed = run(values, "undisturbed")
    for seat in undisturbed._seats:
        undisturbed._dismiss(seat)
    disturbed = run(values, "disturbed", s2=kill_rank_1)
    assert step_lines(tmp_path / "disturbed") == step_lines(tmp_path / "undisturbed")
    (seat,) = disturbed._seats
    assert len(seat.actors) == 2 and not set(seat.actors) & set(first)
    with pytest.raises(ray.exceptions.RayActorError):  # rank 0's process is not left behind
        ray.get(first[0].__ray_ready__.remote(), timeout=60)


def test_a_snapshot_of_two_ranks_serves_two_and_one(
    values: dict[str, Any], run: Run, tmp_path: Path
) -> None:
    values = {**values, "run": {**values["run"], "dir": str(tmp_path), "snapshot_every": 4}}
    fleet, said = run(values, "ranks"), list[str]()
    (digest,) = fleet.digests().values()
    for seat in fleet._seats:
        fleet._dismiss(seat)
    again = actors.ActorFleet(Config.model_validate(values), tmp_path / "log", said.append)
    other = LocalFleet(alone(values), DEVICE, said.append)
    for each in (again, other):
        for record in Ledger.read(tmp_path / "ranks" / "ledger.jsonl")[1]:
            each.apply(record.update())
        each.start()
        assert each.digests() == {"replica 0": digest}
    assert "replica 0 starts from the snapshot of step 4" in said
    assert "starting from the snapshot of step 4" in said
    for seat in again._seats:
        again._dismiss(seat)
    other.close()


def test_rewards_are_judged_once(values: dict[str, Any], run: Run, tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(textwrap.dedent(JUDGE))
    reward = {"function": "judge:score", "path": str(tmp_path), "samples": 2, "temperature": 0.5}
    task = {key: value for key, value in values["task"].items() if key != "preset"}
    task |= {"template": "{sentence} It was{option}", "objective": "reward", "metric": "reward"}
    task |= {"reward": reward, "max_new_tokens": 4}
    values = {**values, "task": task, "space": LORA, "run": {**values["run"], "steps": 2}}
    run(values, "ranks")
    found = (tmp_path / "calls").read_text().splitlines()
    (tmp_path / "calls").unlink()
    train(alone(values), tmp_path / "alone.jsonl")
    assert len(found) >= 2 * 4 * 4 * 2  # steps, probes, examples, samples
    assert sorted(found) == sorted((tmp_path / "calls").read_text().splitlines())
    ranks = losses(tmp_path / "ranks" / "ledger.jsonl")
    assert ranks == losses(tmp_path / "alone.jsonl") and len(set(ranks)) > 1


def test_two_runs_of_ranks_at_once_do_not_meet(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with a Ray of its own, started at the same moment."""
    needs_devices(4)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    runs = [launch("train", str(path), f"run.dir={tmp_path / name}") for name in ("a", "b")]
    for each in runs:
        finish(each)
    lines = step_lines(tmp_path / "a")
    assert len(lines) == values["run"]["steps"] and step_lines(tmp_path / "b") == lines
