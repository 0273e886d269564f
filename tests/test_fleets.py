"""The same ledger whoever ran the run: one process, one to three actors, after deaths and resumes.

Real Ray, real SGLang engines, a tiny model. The runs go through `launch.py`, in processes of their
own.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml
from conftest import DEVICE
from test_training import ACTIVATED, MARKED, batches_of, train

from orchestrator import actors
from orchestrator.batches import Batches
from orchestrator.config import Config, ConfigError
from orchestrator.dispatch import Limits
from orchestrator.driver import Driver
from orchestrator.local import LocalFleet
from orchestrator.metrics import Evaluation, StepMetrics
from orchestrator.noise_floor import REPEATS
from orchestrator.records import FleetError, Probe, StepUpdate
from orchestrator.seats import Seat
from orchestrator.seed_sync import Ledger

ROOT = Path(__file__).parent.parent
STEPS = 30  # enough for a process to be caught between two of them
pytestmark = pytest.mark.slow


def launch(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def step_lines(folder: Path) -> list[bytes]:
    return (folder / "ledger.jsonl").read_bytes().splitlines(keepends=True)[1:]


def wait_for_steps(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    ledger = folder / "ledger.jsonl"
    while not (ledger.exists() and ledger.read_bytes().count(b"\n") > count):
        assert time.monotonic() < deadline, f"{ledger} did not reach {count} steps"
        time.sleep(0.002)


def needs_devices(num_replicas: int) -> None:
    if DEVICE == "cuda" and torch.cuda.device_count() < num_replicas:
        pytest.skip(f"{num_replicas} replicas want a GPU each")


@pytest.fixture(scope="module")
def long_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    return {**recipe, "run": {**recipe["run"], "steps": STEPS}}


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory, long_recipe: dict[str, Any]) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(yaml.safe_dump(long_recipe))
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, recipe_path: Path) -> Path:
    """A run of the local fleet with one replica, from start to end."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(launch("train", str(recipe_path), f"run.dir={folder}"))
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """One Ray cluster for the runs of this file; its address is in the environment."""
    context = ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    address = context.address_info["gcs_address"]
    os.environ["RAY_ADDRESS"] = address
    yield address
    del os.environ["RAY_ADDRESS"]
    ray.shutdown()


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_the_ledger_does_not_depend_on_the_fleet(
    num_replicas: int, recipe_path: Path, undisturbed: Path, tmp_path: Path, cluster: str
) -> None:
    needs_devices(num_replicas)
    overrides = ["fleet.kind=ray", f"fleet.num_replicas={num_replicas}", f"run.dir={tmp_path}"]
    finish(launch("train", str(recipe_path), *overrides))
    assert step_lines(tmp_path) == step_lines(undisturbed)


@pytest.mark.parametrize(
    ("activation", "affinity"), [("none", "none"), ("suffix", "none"), ("suffix", "context")]
)
def test_actors_with_adapter_slots_give_the_local_ledger(
    activation: str,
    affinity: str,
    long_recipe: dict[str, Any],
    recipe_path: Path,
    tmp_path: Path,
    cluster: str,
) -> None:
    needs_devices(2)
    space = {"kind": "lora", "rank": 2, "slots": 2, "targets": ["q_proj", "v_proj"]}
    space["activation"] = activation
    task = {**long_recipe["task"], "template": MARKED}
    fleet = {**long_recipe["fleet"], "affinity": affinity}
    values = {**long_recipe, "space": space, "task": task, "fleet": fleet}
    local = train(Config.model_validate(values), tmp_path / "ledger")
    overrides = [f"space={json.dumps(space)}", f"task.template={MARKED}"]
    overrides += ["fleet.kind=ray", "fleet.num_replicas=2", f"fleet.affinity={affinity}"]
    folder = tmp_path / "remote"
    finish(launch("train", str(recipe_path), *overrides, f"run.dir={folder}"))
    assert step_lines(folder) == local


@pytest.mark.parametrize(
    ("kind", "sent", "status"),
    [
        ("ray", signal.SIGKILL, -signal.SIGKILL),
        ("ray", signal.SIGTERM, 130),
        ("local", signal.SIGINT, 130),
    ],
)
def test_a_stopped_driver_is_resumed_to_the_same_ledger(
    kind: str,
    sent: signal.Signals,
    status: int,
    recipe_path: Path,
    undisturbed: Path,
    tmp_path: Path,
    cluster: str,
) -> None:
    """Stopped between whichever two steps; resumed by a fleet of the other kind."""
    process = launch("train", str(recipe_path), f"fleet.kind={kind}", f"run.dir={tmp_path}")
    wait_for_steps(tmp_path, 2)
    process.send_signal(sent)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    if sent != signal.SIGKILL:
        assert f"continue with: python launch.py train --resume {tmp_path}" in output
        assert "Traceback" not in output
    done = len(step_lines(tmp_path))
    assert 1 <= done < STEPS  # a line whose fsync was interrupted is taken back
    other = "ray" if kind == "local" else "local"
    output = finish(launch("train", "--resume", str(tmp_path), f"fleet.kind={other}"))
    assert f"continuing after {done} steps" in output
    assert step_lines(tmp_path) == step_lines(undisturbed)


def test_a_run_cut_between_two_steps_is_resumed_to_the_same_ledger(
    long_recipe: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    """Many cuts, in one process: replay from the base model, then the remaining steps."""
    config = Config.model_validate(long_recipe)
    whole = (undisturbed / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    header, _ = Ledger.read(undisturbed / "ledger.jsonl")
    for cut in (0, 1, 2, 7, 16, STEPS - 1, STEPS):
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(b"".join(whole[: cut + 1]))
        fleet = LocalFleet(config, DEVICE)
        fleet.start()
        with Ledger.open(path, header) as ledger:
            Driver(config, fleet, ledger, [], batches=Batches(config, 40), num_test=50).train()
        fleet.close()
        assert path.read_bytes() == b"".join(whole)


def test_two_runs_on_one_machine_do_not_meet(
    recipe_path: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each starts a Ray of its own; and a folder takes one run at a time."""
    needs_devices(2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    runs = [
        launch("train", str(recipe_path), "fleet.kind=ray", f"run.dir={tmp_path / name}")
        for name in ("a", "b")
    ]
    wait_for_steps(tmp_path / "a", 0)
    third = launch("train", "--resume", str(tmp_path / "a"))
    output, _ = third.communicate(timeout=60)
    assert (third.returncode, "another process is training" in output) == (2, True), output
    for name, run in zip(("a", "b"), runs, strict=True):
        finish(run)
        assert step_lines(tmp_path / name) == step_lines(undisturbed)


Fleets = Callable[..., actors.ActorFleet]


@pytest.fixture
def fleets(recipe: dict[str, Any], tmp_path: Path, cluster: str) -> Iterator[Fleets]:
    made = []

    def make(num_replicas: int, limits: Limits = Limits(), **task: Any) -> actors.ActorFleet:  # noqa: B008
        needs_devices(num_replicas)
        values = {
            **recipe,
            "task": {**recipe["task"], **task},
            "fleet": {"kind": "ray", "num_replicas": num_replicas},
            "run": {**recipe["run"], "steps": STEPS},
        }
        config = Config.model_validate(values)
        said: list[str] = []
        made.append(actors.ActorFleet(config, tmp_path / "log", said.append, limits))
        made[-1].start()
        recover(made[-1])
        return made[-1]

    yield make
    for each in made:
        for seat in each._seats:
            if seat.actor is not None:
                ray.kill(seat.actor)


def in_actor(fleet: actors.ActorFleet, number: int, call: Callable[[Any], Any]) -> Any:
    return ray.get(fleet._seats[number].actor.__ray_call__.remote(call))


def recover(fleet: actors.ActorFleet) -> None:
    """Wait until all replicas are up, and have answered all that they were asked."""
    deadline = time.monotonic() + 120
    while fleet._pending or any(seat.state != "ready" for seat in fleet._seats):
        assert time.monotonic() < deadline
        fleet._attend()


def probes(step: int) -> list[Probe]:
    return [Probe(step, seed, sign, 1e-3, (1, 2)) for seed in range(4) for sign in (1, -1)]


def test_the_work_of_a_dead_actor_is_done_by_the_others(fleets: Fleets) -> None:
    """Until there are none, and no patience to wait for one."""
    two = fleets(2, Limits(patience_s=0.0))
    expected = two.evaluate(probes(0))
    agreed = set(two.digests().values())
    ray.kill(two._seats[0].actor)
    assert two.evaluate(probes(0)) == expected
    assert agreed == {two.digests()["replica 1"]}
    two.apply(StepUpdate(0, (5,), (0.5,), 1.0))
    assert two.evaluate(probes(1)) != expected
    for seat in two._seats:
        ray.kill(seat.actor)
    with pytest.raises(FleetError, match=r"replica \d died, and no replica is left"):
        two.evaluate(probes(1))


class Trouble:
    """Things that are done to a fleet once so many steps are taken."""

    def __init__(self, events: dict[int, Callable[[], None]]) -> None:
        self.events = events

    def step(self, step: StepMetrics) -> None:
        self.events.pop(step.step, lambda: None)()

    def evaluation(self, evaluation: Evaluation) -> None:
        pass


def driver(fleet: actors.ActorFleet, ledger: Ledger, *observers: Trouble) -> Driver:
    batches = Batches(fleet._config, 40)
    return Driver(fleet._config, fleet, ledger, observers, batches=batches, num_test=50)


def test_a_run_goes_on_when_actors_are_killed_and_hang(
    fleets: Fleets, tmp_path: Path, undisturbed: Path
) -> None:
    """Both come back, catch up by replay, and the ledger is the undisturbed run's."""
    two = fleets(2, Limits(deadline_floor_s=3.0))
    actors_at_first = [seat.actor for seat in two._seats]

    def send(sent: signal.Signals, number: int) -> None:
        os.kill(in_actor(two, number, lambda _: os.getpid()), sent)

    trouble = Trouble(
        {
            4: lambda: send(signal.SIGKILL, 0),
            7: lambda: recover(two),
            10: lambda: send(signal.SIGSTOP, 1),
            16: lambda: recover(two),
        }
    )
    header, _ = Ledger.read(undisturbed / "ledger.jsonl")
    with Ledger.create(tmp_path / "ledger.jsonl", header) as ledger:
        driver(two, ledger, trouble).train()
    assert not trouble.events
    assert step_lines(tmp_path) == step_lines(undisturbed)
    assert all(seat.actor not in actors_at_first for seat in two._seats)
    digests = two.digests()
    assert list(digests) == ["replica 0", "replica 1"]
    assert len(set(digests.values())) == 1


def test_a_long_ledger_is_replayed_in_several_calls(
    fleets: Fleets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that however long it is, each call can be done in time."""
    monkeypatch.setattr(actors, "REPLAYED_AT_ONCE", 5)
    two = fleets(2)
    for step in range(23):
        two.apply(StepUpdate(step, (step,), (0.1,), 1.0))
    agreed, asked = two.digests(), []
    ask = two._ask

    def noted(seat: Seat, calls: Sequence[Any]) -> None:
        if seat.state != "ready":
            asked.append((seat.state, seat.num_applied))
        ask(seat, calls)

    monkeypatch.setattr(two, "_ask", noted)
    ray.kill(two._seats[0].actor)
    two.evaluate(probes(23))
    recover(two)
    replayed = [("replaying", number) for number in (5, 10, 15, 20)]
    assert asked == [("placing", 0), ("loading", 0), *replayed, ("catching up", 23)]
    assert two.digests() == agreed


def test_replicas_of_which_too_few_can_load_end_the_run(
    recipe: dict[str, Any], tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One does, and the other dies whenever it tries to."""
    needs_devices(2)

    class First(actors.ReplicaActor):
        def load(self, *arguments: Any) -> Any:
            try:
                (tmp_path / "loaded").touch(exist_ok=False)
            except FileExistsError:
                os._exit(1)
            return super().load(*arguments)

    monkeypatch.setattr(actors, "ReplicaActor", First)
    monkeypatch.setattr(actors, "MOST_PLACEMENTS", 3)
    section = {"kind": "ray", "num_replicas": 2, "min_replicas": 2}
    fleet = actors.ActorFleet(
        Config.model_validate({**recipe, "fleet": section}), tmp_path / "log", print
    )
    with pytest.raises(FleetError, match=r"replica \d died, and 1 replica is left, and fleet.min_"):
        fleet.start()
    for seat in fleet._seats.of("ready"):
        ray.kill(seat.actor)


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_pieces_of_batches_give_the_local_ledger_whoever_computes_them(
    num_replicas: int, long_recipe: dict[str, Any], tmp_path: Path, cluster: str
) -> None:
    """One actor; and three, of which one is killed and comes back."""
    needs_devices(num_replicas)
    fleet = {**long_recipe["fleet"], "affinity": "context"}
    task = {**long_recipe["task"], "template": MARKED}
    values = {**long_recipe, "space": ACTIVATED, "task": task, "fleet": fleet}
    expected = train(Config.model_validate(values), tmp_path / "local.jsonl")
    (tmp_path / "ledger.jsonl").write_bytes(
        (tmp_path / "local.jsonl").read_bytes().splitlines(keepends=True)[0]
    )
    values["fleet"] = {**fleet, "kind": "ray", "num_replicas": num_replicas}
    config = Config.model_validate(values)
    batches, num_test = batches_of(config)
    made = actors.ActorFleet(config, tmp_path / "log", print, pieces=batches.pieces)
    made.start()
    recover(made)
    kills: dict[int, Callable[[], None]] = {
        3: lambda: ray.kill(made._seats[num_replicas - 1].actor),
        20: lambda: recover(made),
    }
    trouble = Trouble(kills if num_replicas > 1 else {})
    header, _ = Ledger.read(tmp_path / "ledger.jsonl")
    with Ledger.open(tmp_path / "ledger.jsonl", header) as ledger:
        Driver(config, made, ledger, [trouble], batches=batches, num_test=num_test).train()
    assert not trouble.events
    assert step_lines(tmp_path) == expected
    num_probes = 2 * REPEATS  # for the noise floor
    num_probes += sum(len(signs) for line in expected for signs in json.loads(line)["losses"])
    counted = sum(replica.num_probes for replica in made.state().replicas)
    assert abs(counted - num_probes) <= num_replicas  # parts of probes are rounded
    assert len(made._dispatcher.replicas) == num_replicas
    for seat in made._seats:
        for actor in seat.actors:
            ray.kill(actor)


def test_a_replica_that_differs_is_rebuilt(
    fleets: Fleets, tmp_path: Path, undisturbed: Path
) -> None:
    three = fleets(3)
    ledger_path = tmp_path / "ledger.jsonl"
    ledger_path.write_bytes((undisturbed / "ledger.jsonl").read_bytes())
    header, _ = Ledger.read(ledger_path)
    with Ledger.open(ledger_path, header) as ledger:
        resumed = driver(three, ledger)
        agreed = resumed.check_digests()
        before = [seat.actor for seat in three._seats]
        rogue = StepUpdate(ledger.next_step, (5,), (1e-6,), 1.0)
        in_actor(three, 1, lambda actor: actor._replica.space.apply(rogue))
        assert resumed.check_digests() == agreed
        assert [seat.actor is old for seat, old in zip(three._seats, before, strict=True)] == [
            True,
            False,
            True,
        ]
        assert set(three.digests()) == {"replica 0", "replica 1", "replica 2"}


def test_replicas_that_still_differ_end_the_run(
    long_recipe: dict[str, Any], tmp_path: Path, undisturbed: Path
) -> None:
    """In one process nothing is rebuilt. Those that differ from most are named, or all."""
    values = {**long_recipe, "fleet": {**long_recipe["fleet"], "num_replicas": 3}}
    config = Config.model_validate(values)
    fleet = LocalFleet(config, DEVICE)
    fleet.start()
    header, _ = Ledger.read(undisturbed / "ledger.jsonl")
    with Ledger.create(tmp_path / "ledger.jsonl", header) as ledger:
        batches = Batches(config, 40)
        lone = Driver(config, fleet, ledger, [], batches=batches, num_test=50)
        agreed = lone.check_digests()
        fleet._replicas[1].digest([StepUpdate(0, (5,), (1e-3,), 1.0)])
        with pytest.raises(FleetError, match=r"trained state of replica 1 differs") as caught:
            lone.check_digests()
        assert agreed in str(caught.value)
        fleet._replicas[2].digest([StepUpdate(0, (6,), (1e-3,), 1.0)])
        with pytest.raises(FleetError, match="states of replica 0, replica 1, replica 2 differ"):
            lone.check_digests()
    fleet.close()


def test_a_mistake_that_only_a_replica_sees_is_told_as_one(fleets: Fleets) -> None:
    with pytest.raises(ConfigError, match="task.template: the tokenizer merges") as caught:
        fleets(1, template="{sentence}{option}")
    assert "\n" not in str(caught.value)


def test_a_failure_in_a_replica_is_told_as_it_was_there(fleets: Fleets) -> None:
    with pytest.raises(FleetError, match="replica 0: IndexError: list index out of range"):
        fleets(1).score("test", [10**6])
