"""Snapshots: what follows them is, bit for bit, what a replay from the base model leads to; and
whatever is not whole, or not of these steps, is passed over."""

import dataclasses
import logging
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml
from conftest import DEVICE
from safetensors.torch import load_file
from test_fleets import (
    Trouble,
    driver,
    finish,
    in_actor,
    launch,
    recover,
    step_lines,
    wait_for_steps,
)

from orchestrator import actors, snapshot_folder
from orchestrator.config import Config
from orchestrator.dispatch import Limits
from orchestrator.local import LocalFleet
from orchestrator.records import MARK_SIZE, Probe, StepUpdate, UpdateLog
from orchestrator.replica import Replica
from orchestrator.seed_sync import Ledger
from orchestrator.snapshots import Snapshots

pytestmark = pytest.mark.slow
NUM_STEPS = 11
LORA = {"kind": "lora", "rank": 2, "targets": ["q_proj", "v_proj"], "slots": 2}
LOW_RANK = {"kind": "low_rank", "rank": 2, "slots": 2}
START = {"decay_towards": "start"}
SPACES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "dense": ({}, {}, "float32"),
    "dense in bfloat16": ({"master": "bfloat16"}, {"noise": "rademacher"}, "bfloat16"),
    "dense, anchored": ({}, START, "bfloat16"),
    "dense, in the host's memory": ({"master": "host"}, {}, "bfloat16"),
    "low_rank, refreshed": ({**LOW_RANK, "refresh": 3}, {}, "float32"),
    "low_rank and others": ({**LOW_RANK, "others": "dense"}, {}, "bfloat16"),
    "low_rank, live": ({**LOW_RANK, "master": "bfloat16"}, {}, "bfloat16"),
    "low_rank, anchored": (LOW_RANK, START, "float32"),
    "lora": (LORA, {}, "float32"),
    "lora, B alone": ({**LORA, "train": "B"}, {}, "bfloat16"),
    "lora, anchored": (LORA, START, "float32"),
    "prefix": ({"kind": "prefix", "tokens": 3, "slots": 2}, {}, "float32"),
}


def configured(
    recipe: dict[str, Any],
    folder: Path,
    space: dict[str, Any],
    estimator: dict[str, Any] | None = None,
    dtype: str = "float32",
) -> Config:
    values = {
        **recipe,
        "model": {**recipe["model"], "dtype": dtype, "score_graphs": False},
        "space": space,
        "estimator": {**recipe["estimator"], **(estimator or {})},
        "run": {**recipe["run"], "dir": str(folder), "snapshot_every": 4},
    }
    return Config.model_validate(values)


def drawn(seed: int, first: int = 0, last: int = NUM_STEPS) -> list[StepUpdate]:
    """Updates of one or two seeds, some of them without decay, that move weights visibly."""
    draw = random.Random(seed)
    updates = []
    for step in range(last):
        seeds = tuple(draw.getrandbits(64) for _ in range(draw.randint(1, 2)))
        values = torch.tensor([draw.gauss(0, 0.05) for _ in seeds]).tolist()
        decay = float(torch.tensor(draw.choice([1.0, 0.99])))
        updates.append(StepUpdate(step, seeds, tuple(values), decay))
    return updates[first:]


def marks(updates: list[StepUpdate]) -> bytes:
    log = UpdateLog()
    for update in updates:
        log.append(update)
    return log.marks


def snapshot(replica: Replica, updates: list[StepUpdate]) -> str:
    """Write down what updates lead to; what went wrong."""
    digest = replica.digest(updates)
    return replica.snapshot(updates, marks(updates)[-MARK_SIZE:], digest)


def answers(replica: Replica, updates: list[StepUpdate]) -> list[object]:
    """All that can be seen of the state that updates lead to."""
    probes = [Probe(len(updates), 7, sign, 0.01, (1, 2, 3)) for sign in (1, -1)]
    losses = [each.value for each in replica.evaluate(updates, probes)]
    scores = [each.scores for each in replica.score(updates, "test", range(5)).examples]
    return [replica.digest(updates), losses, scores]


@pytest.mark.parametrize("name", SPACES)
def test_a_snapshot_and_what_follows_is_the_whole_replay(
    name: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    space, estimator, dtype = SPACES[name]
    if space.get("master") == "host" and DEVICE == "cpu":
        pytest.skip("needs a GPU")
    config, updates = configured(recipe, tmp_path, space, estimator, dtype), drawn(1)
    writer = Replica(config, DEVICE)
    for end in (3, 7):
        assert snapshot(writer, updates[:end]) == ""
    expected = answers(writer, updates)
    writer.close()
    reader = Replica(config, DEVICE, marks=marks(updates))
    assert reader.num_applied == 7
    assert answers(reader, updates) == expected
    reader.close()


def test_a_master_in_the_hosts_memory_takes_up_one_on_the_gpu(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """And the other way round."""
    if DEVICE == "cpu":
        pytest.skip("needs a GPU")
    updates = drawn(1)
    for first, second in (("float32", "host"), ("host", "float32")):
        folder = tmp_path / first
        folder.mkdir()
        writer = Replica(configured(recipe, folder, {"master": first}, {}, "bfloat16"), DEVICE)
        snapshot(writer, updates[:5])
        expected = answers(writer, updates)
        writer.close()
        config = configured(recipe, folder, {"master": second}, {}, "bfloat16")
        reader = Replica(config, DEVICE, marks=marks(updates))
        assert reader.num_applied == 5
        assert answers(reader, updates) == expected
        reader.close()


class Shelf:
    """A replica, and two snapshots, either of which it may be asked to restore."""

    def __init__(self, config: Config, updates: list[StepUpdate]) -> None:
        self.config, self.updates = config, updates
        self.replica = Replica(config, DEVICE)
        self.base = self.replica.space.digest()
        self.digests = {}
        for end in (4, 7):
            assert snapshot(self.replica, updates[:end]) == ""
            self.digests[end] = self.replica.space.digest()
        self.folder = Path(str(config.run.dir)) / snapshot_folder.FOLDER
        self.expected = answers(self.replica, updates)
        self.whole = {step: path.read_bytes() for step, path in self.paths.items()}
        self.replica.close()
        self.replica = Replica(config, DEVICE)

    @property
    def paths(self) -> dict[int, Path]:
        return snapshot_folder.listed(self.folder)

    def mend(self) -> None:
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        for step, content in self.whole.items():
            snapshot_folder.path_of(self.folder, step).write_bytes(content)

    def restored(self, updates: list[StepUpdate] | None = None, weights: str = "") -> int:
        """From where the replica starts; its state is then that step's, or as it was."""
        known, space = updates or self.updates, self.replica.space
        before = space.digest()
        hash = self.replica.info.weights_hash + weights
        step = Snapshots(self.folder, hash, self.config.meaning()).restore(space, marks(known))
        assert space.digest() == self.digests.get(step, before)
        return step


@pytest.fixture(scope="module")
def shelves(
    recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], Shelf]]:
    made: list[Shelf] = []

    def get() -> Shelf:
        if not made:
            config = configured(recipe, tmp_path_factory.mktemp("run"), LORA)
            made.append(Shelf(config, drawn(2)))
        made[0].mend()
        return made[0]

    yield get
    for shelf in made:
        shelf.replica.close()


Shelves = Callable[[], Shelf]


def test_two_snapshots_are_kept_and_the_newer_is_used(shelves: Shelves) -> None:
    shelf = shelves()
    assert list(shelf.paths) == [7, 4]
    assert shelf.restored() == 7
    assert load_file(shelf.paths[7]).keys() == {
        tensor.region.name for part in shelf.replica.space.parts for tensor in part.tensors
    }


def test_damaged_snapshots_are_passed_over(
    shelves: Shelves, caplog: pytest.LogCaptureFixture
) -> None:
    """Cut short, or with any byte changed; then the older one is used, or none."""
    shelf, draw = shelves(), random.Random(0)
    newest, content = shelf.paths[7], shelf.whole[7]
    head = 8 + int.from_bytes(content[:8], "little")
    for size in (0, 1, 7, 8, 9, head - 1, head, head + 1, len(content) - 1):
        newest.write_bytes(content[:size])
        assert shelf.restored() == 4, size
    newest.write_bytes(content + b"\0")
    assert shelf.restored() == 4
    assert f"{newest} is passed over: " in caplog.text
    positions = [*range(head), *draw.sample(range(head, len(content)), 200), len(content) - 1]
    harmless = []
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 1 << draw.randrange(8)
        newest.write_bytes(damaged)
        if shelf.restored() == 7:  # the right state, as `restored` has seen
            harmless.append(position)
    assert len(harmless) < 8 and all(content[place : place + 1] == b" " for place in harmless)
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        damaged = bytearray(content)
        damaged[-3] ^= 4
        newest.write_bytes(damaged)
        shelf.paths[4].write_bytes(shelf.whole[4][:-1])
        assert shelf.restored() == 0
    assert f"{newest} is passed over: its values are not those that were written" in caplog.text
    assert f"{shelf.paths[4]} is passed over: " in caplog.text


def test_a_replica_whose_snapshots_are_damaged_replays_from_the_base(shelves: Shelves) -> None:
    shelf = shelves()
    for path in shelf.paths.values():
        damaged = bytearray(path.read_bytes())
        damaged[-1] ^= 1
        path.write_bytes(damaged)
    replica = Replica(shelf.config, DEVICE, marks=marks(shelf.updates))
    assert replica.num_applied == 0
    assert replica.space.digest() == shelf.base
    assert answers(replica, shelf.updates) == shelf.expected
    replica.close()


def test_foreign_snapshots_are_passed_over(
    shelves: Shelves, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = shelves()
    own = shelf.updates
    assert shelf.restored(drawn(3)) == 0
    assert shelf.paths.keys() == {4, 7}, "others' are left alone"
    assert "it is of another run: of other updates" in caplog.text
    branch = [*own[:5], *drawn(3)[5:]]
    assert shelf.restored(branch) == 4
    changed = dataclasses.replace(own[5], coefficients=tuple(-c for c in own[5].coefficients))
    assert shelf.restored([*own[:5], changed, *own[6:]]) == 4
    assert shelf.restored([dataclasses.replace(own[0], decay=0.5), *own[1:]]) == 0
    assert shelf.restored(own[:7]) == 7
    caplog.clear()
    assert shelf.restored(own[:6]) == 4
    assert f"{shelf.paths[7]} is passed over: the ledger has 6 steps" in caplog.text
    assert shelf.restored(own[:3]) == 0
    caplog.clear()
    assert shelf.restored(weights="other") == 0
    assert "it is of another run: of another model, or another recipe" in caplog.text
    older, newer = shelf.paths[4], shelf.paths[7]
    newer.write_bytes(older.read_bytes())
    assert shelf.restored() == 4
    assert "its name is another step's" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"space": {"alpha": 3}},
        {"space": {"rank": 1}},
        {"estimator": {"noise": "rademacher"}},
        {"run": {"seed": 4}},  # by which the adapter's first values are drawn
    ],
)
def test_a_snapshot_of_another_recipe_is_passed_over(
    change: dict[str, Any], shelves: Shelves
) -> None:
    shelf = shelves()
    values = shelf.config.model_dump()
    other = Config.model_validate(
        {key: {**part, **change.get(key, {})} for key, part in values.items()}
    )
    hash = shelf.replica.info.weights_hash
    snapshots = Snapshots(shelf.folder, hash, other.meaning())
    assert snapshots.restore(shelf.replica.space, marks(shelf.updates)) == 0


def test_what_cannot_be_written_is_told_and_leaves_nothing(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Once; the run goes on, and snapshots do when there is room again."""
    said: list[str] = []
    config = configured(recipe, tmp_path, LORA)
    fleet = LocalFleet(config, DEVICE, said.append)
    fleet.start()
    updates = drawn(4)
    folder = tmp_path / snapshot_folder.FOLDER

    def kept() -> list[str]:
        """Once a step is taken."""
        fleet.apply(updates.pop(0))
        (digest,) = fleet.digests().values()
        fleet.snapshot(digest)
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    folder.write_text("in its place")
    assert kept() == []
    assert len(said) == 1 and "no snapshot can be written: File exists; the run goes" in said[0]
    folder.unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 100, 3000):  # as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            assert kept() == []
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (folder / "step-00000001.safetensors.99.unfinished").write_text("of a killed process")
    assert kept() == ["step-00000005.safetensors"]
    assert kept() == ["step-00000005.safetensors", "step-00000006.safetensors"]
    assert kept() == ["step-00000006.safetensors", "step-00000007.safetensors"]
    assert len(said) == 1
    fleet.close()


def test_a_state_of_another_digest_is_not_written(recipe: dict[str, Any], tmp_path: Path) -> None:
    """A replica whose memory has changed would hand its state on."""
    replica, updates = Replica(configured(recipe, tmp_path, LORA), DEVICE), drawn(5)
    digest = replica.digest(updates[:3])
    part = replica.space.parts[0]
    part.tensors[0].master[0, 0] += 1
    with pytest.raises(RuntimeError, match="after 3 steps this replica's trained state is not"):
        replica.snapshot(updates[:3], b"", digest)
    assert not (tmp_path / snapshot_folder.FOLDER).exists()
    replica.close()


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def long_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    run = {**recipe["run"], "steps": 30, "check_every": 7, "eval_every": 0}
    return {**recipe, "space": {"kind": "low_rank", "rank": 2}, "run": run}


@pytest.fixture(scope="module")
def undisturbed(long_recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without snapshots, and its recipe beside it."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(long_recipe))
    finish(launch("train", str(folder / "tiny.yaml"), f"run.dir={folder / 'undisturbed'}"))
    return folder / "undisturbed"


def test_a_killed_run_is_resumed_from_its_snapshot_to_the_same_ledger(
    undisturbed: Path, tmp_path: Path
) -> None:
    """Then states of the run are exported as a replay from the base model gives them."""
    folder = tmp_path / "run"
    options = [f"run.dir={folder}", "run.snapshot_every=5"]
    process = launch("train", str(undisturbed.with_name("tiny.yaml")), *options)
    wait_for_steps(folder, 12)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    found = snapshot_folder.listed(folder / snapshot_folder.FOLDER)
    done = len(step_lines(folder))
    assert done < 30 and found and max(found) >= 10 and all(step <= done for step in found)
    output = finish(launch("train", "--resume", str(folder)))
    assert f"starting from the snapshot of step {max(found)}" in " ".join(output.split())
    assert step_lines(folder) == step_lines(undisturbed)
    shown = finish(launch("inspect", str(folder)))
    assert "snapshots       step 30 (" in shown and "step 25 (" in shown
    weights = []
    for name, options in (("short", []), ("whole", ["run.snapshot_every=0"])):
        target = tmp_path / name
        output = finish(launch("export", str(folder), str(target), "--at", "27", *options))
        assert ("snapshot of step 25" in " ".join(output.split())) == (name == "short")
        weights.append(load_file(target / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.fixture
def cluster() -> Iterator[None]:
    context = ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]
    yield
    del os.environ["RAY_ADDRESS"]
    ray.shutdown()


def test_a_respawned_replica_is_sent_only_what_follows_the_snapshot(
    long_recipe: dict[str, Any], undisturbed: Path, tmp_path: Path, cluster: None
) -> None:
    """While one replica writes, the other goes on; both of a fleet that is killed come back."""
    if DEVICE == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("two replicas want a GPU each")
    values = {
        **long_recipe,
        "fleet": {"kind": "ray", "num_replicas": 2},
        "run": {**long_recipe["run"], "dir": str(tmp_path), "snapshot_every": 5},
    }
    said: list[str] = []
    two = actors.ActorFleet(Config.model_validate(values), tmp_path / "log", said.append, Limits())
    two.start()
    sent: dict[Any, list[int]] = {}  # to each actor, be it dead by then or not
    call = two._call

    def noted(seat: Any, *arguments: Any, upto: int | None = None) -> None:
        missing = two._updates[seat.num_applied : upto]
        sent.setdefault(seat.actor, []).extend(update.step for update in missing)
        call(seat, *arguments, upto=upto)

    two._call = noted  # type: ignore[method-assign, assignment]

    def kill() -> None:
        while two._seats.of("writing"):
            two._attend()
        for seat in two._seats:
            ray.kill(seat.actor)

    header, _ = Ledger.read(undisturbed / "ledger.jsonl")
    with Ledger.create(tmp_path / "ledger.jsonl", header) as ledger:
        driver(two, ledger, Trouble({17: kill, 21: lambda: recover(two)})).train()
    assert step_lines(tmp_path) == step_lines(undisturbed)
    for number, seat in enumerate(two._seats):
        assert f"replica {number} starts from the snapshot of step 15" in said
        steps = sent[seat.actor]
        assert steps == list(range(15, 15 + len(steps))) and len(steps) > 10
    assert not any("cannot" in sentence for sentence in said)
    digests = set(two.digests().values())
    assert len(digests) == 1
    # Those whose memory has changed cannot write one, and are rebuilt.
    rogue = StepUpdate(30, (5,), (1e-3,), 1.0)
    for number in (0, 1):
        in_actor(two, number, lambda actor: actor._replica.space.apply(rogue))
    two.snapshot(*digests)
    recover(two)
    assert any("this replica's trained state is not" in sentence for sentence in said)
    assert set(two.digests().values()) == digests
    for seat in two._seats:
        ray.kill(seat.actor)
