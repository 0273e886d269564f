"""Masters in the host's memory: the bits of masters on the device, in whatever order copies end."""

import random
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICE
from host_runs import config, run, same
from torch import nn

from orchestrator import host_master, run_folder, spaces
from orchestrator.checkpoint import Checkpoint
from orchestrator.config import Config, ConfigError
from orchestrator.engine import Engine
from orchestrator.host_master import HostTable, Lanes, staged
from orchestrator.noise import TensorRegion
from orchestrator.parameters import canonical_tensors
from orchestrator.records import StepUpdate
from orchestrator.space import Trained, TrainedTensor
from orchestrator.sweeps import Factors, Slice
from orchestrator.tensor_map import Place, Shard

CHUNK = 1024
NUM_LAYERS = 12  # of which the names' order is another than the layers'


class Mark:
    reached = False


class SimulatedLane:
    """Work that is done later, at a time that the device chooses. See host_master.Lane."""

    def __init__(self, device: "SimulatedDevice") -> None:
        self.items: deque[Callable[[], object] | Mark | tuple[Mark]] = deque()
        self._device = device

    def run(self, work: Callable[[], object]) -> None:
        self.items.append(work)

    def mark(self) -> Mark:
        self.items.append(mark := Mark())
        return mark

    def wait(self, mark: Mark) -> None:
        self.items.append((mark,))

    def finish(self) -> None:
        self._device.finish()

    @property
    def can_go_on(self) -> bool:
        if not self.items:
            return False
        first = self.items[0]
        return first[0].reached if isinstance(first, tuple) else True

    def go_on(self) -> None:
        item = self.items.popleft()
        if isinstance(item, Mark):
            item.reached = True
        elif not isinstance(item, tuple):
            item()


class SimulatedDevice:
    """Lanes that go on in any order that their waits allow; one of them is the slowest."""

    def __init__(self, seed: int, slowest: int) -> None:
        self._random = random.Random(seed)
        self._lanes = [SimulatedLane(self) for _ in range(4)]
        self._slowest = self._lanes[slowest]
        self.lanes = Lanes(*self._lanes)
        self.sweep = self._lanes[1]

    def finish(self) -> None:
        while any(lane.items for lane in self._lanes):
            able = [lane for lane in self._lanes if lane.can_go_on]
            assert able, "lanes wait for each other"
            fast = [lane for lane in able if lane is not self._slowest]
            self._random.choice(fast or able).go_on()


class Weight(nn.Module):
    """Weights that a forward reads: it gives the compute lane the work of copying them."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        values = torch.randn(shape).to(torch.bfloat16)
        self.weight = nn.Parameter(values, requires_grad=False)

    def forward(self, read: Callable[[Callable[[], object]], None], found: list[bytes]) -> None:
        read(lambda: found.append(self.weight.view(torch.int16).numpy().tobytes()))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.shard, self.norm = Weight(700), Weight(5, 200), Weight(3)
        self.experts = nn.ModuleList([Weight(40), Weight(50)])

    def forward(self, *where: object) -> None:
        for module in (self.inner, self.shard, *self.experts, self.norm):
            module(*where)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = Weight(3000)
        self.layers = nn.ModuleList(Layer() for _ in range(NUM_LAYERS))
        self.norm = Weight(64)

    def forward(self, *where: object) -> None:
        for module in (self.embedding, *self.layers, self.norm):
            module(*where)

    def tensors(self) -> list[TrainedTensor]:
        """All weights; those of two axes as a rank's columns of a wider matrix."""
        found = []
        for name, value in sorted(self.named_parameters()):
            rows, columns = value.shape if value.ndim == 2 else (1, value.numel())
            width = columns + 312 if rows > 1 else columns
            shard = Shard(Place(name), (rows, width), 0, rows, columns, 0, 0)
            live = value.data.view(rows, columns)
            region = TensorRegion(name, 100 if rows > 1 else 0, width)
            found.append(TrainedTensor(region, shard, live.float(), live))
        return found


def on_host(
    model: Model, lanes: Lanes, chunk_elements: int = CHUNK
) -> tuple[Trained, HostTable, list[nn.Module]]:
    tensors = model.tensors()
    layers, stages = staged(model, [tensor.region.name for tensor in tensors])
    table = HostTable(
        [Slice(tensor.region, tensor.master, tensor.live) for tensor in tensors],
        stages,
        lanes=lanes,
        chunk_elements=chunk_elements,
    )
    return Trained(tensors, "gaussian", table), table, layers


def at_once(work: Callable[[], object]) -> None:
    work()


def steps() -> list[StepUpdate]:
    return [StepUpdate(step, (step, step + 9), (0.5, -0.25), 0.9) for step in range(4)]


def expected() -> tuple[list[bytes], list[list[int]]]:
    """What forwards read, and digests, with masters beside the live weights."""
    model, found = Model(), list[bytes]()
    trained = Trained(model.tensors(), "gaussian")
    for update in steps():
        for sign in (1, -1):
            trained.perturb(update.step, sign * 0.1)
            model(at_once, found)
        model(at_once, found)
        trained.apply(update)
    trained.settle()
    model(at_once, found)
    return found, digests(trained)


def digests(trained: Trained) -> list[list[int]]:
    return [trained._table.digests(), trained._table.digests(live=True)]


@pytest.mark.parametrize("slowest", range(4))
@pytest.mark.parametrize("chunk_elements", [384, CHUNK, 2**20])
def test_forwards_read_the_bits_of_masters_that_never_left(
    slowest: int, chunk_elements: int
) -> None:
    wanted = expected()
    for seed in range(3):
        device, model, found = SimulatedDevice(seed, slowest), Model(), list[bytes]()
        trained, table, layers = on_host(model, device.lanes, chunk_elements)
        for update in steps():
            with table.overlapping(layers):
                for sign in (1, -1):
                    trained.perturb(update.step, sign * 0.1)
                    model(device.lanes.compute.run, found)
            model(device.lanes.compute.run, found)  # outside, all wait for everything
            trained.apply(update)
        trained.settle()
        assert not any(module._forward_pre_hooks for module in model.modules())
        model(device.lanes.compute.run, found)
        found_digests = digests(trained)  # which waits for all lanes
        assert (found, found_digests) == wanted


def test_a_layer_computes_before_the_last_one_is_swept() -> None:
    device, model, found = SimulatedDevice(0, slowest=1), Model(), list[bytes]()
    trained, table, layers = on_host(model, device.lanes)
    device.finish()
    left: list[int] = []  # to sweep, at each read

    def read(work: Callable[[], object]) -> None:
        device.lanes.compute.run(lambda: left.append(len(device.sweep.items)))
        device.lanes.compute.run(work)

    with table.overlapping(layers):
        trained.perturb(1, 0.1)
        model(read, found)
    device.finish()
    assert left[0] > left[len(left) // 2] > left[-1]


@pytest.mark.parametrize("chunk_elements", [384, CHUNK, 2**20])
def test_masters_are_read_and_written_behind_all_copies(chunk_elements: int) -> None:
    model = Model()
    beside = Trained(model.tensors(), "gaussian")
    for update in steps():
        beside.apply(update)
    beside.settle()
    wanted = [part.master.clone() for part in beside.tensors]
    expected_digests = digests(beside)
    for slowest in range(4):
        lanes = SimulatedDevice(slowest, slowest).lanes
        trained, table, _ = on_host(Model(), lanes, chunk_elements)
        for update in steps():
            trained.apply(update)
            trained.settle()
        assert all(torch.equal(table.read(i), value) for i, value in enumerate(wanted))
        other, _, _ = on_host(Model(), lanes, chunk_elements)
        other.perturb(3, 0.1)  # its copies are still on their way
        whole = {part.region.name: torch.zeros(part.shard.full_shape) for part in trained.tensors}
        for part, value in zip(trained.tensors, wanted, strict=True):
            shard = part.shard
            whole[part.region.name].view(-1, shard.full_columns)[shard.cells] = value
        other.put(whole.__getitem__)
        assert digests(other) == expected_digests


def test_what_a_table_on_the_host_cannot_do_is_refused() -> None:
    lanes = SimulatedDevice(0, 0).lanes
    with pytest.raises(ValueError, match="a chunk of 100 elements is smaller than a row"):
        on_host(Model(), lanes, 100)
    trained, _, _ = on_host(Model(), lanes)
    factors: Sequence[Factors] = []
    with pytest.raises(ValueError, match="no steps along low-rank noise"):
        trained.apply_low_rank(factors, [StepUpdate(0, (1,), (0.5,), 1.0)])


@pytest.mark.parametrize("family", ["opt", "opt-350m", "llama", "qwen3", "phi3"])
def test_an_engines_forward_calls_every_layer_in_its_order(
    family: str, engines: Callable[[str], Engine], model_folders: dict[str, Path]
) -> None:
    """Or a layer would compute without waiting for its weights."""
    engine = engines(family)
    tensors = canonical_tensors(engine.model, Checkpoint(model_folders[family]))
    names = [tensor.shard.place.parameter for tensor in tensors]
    layers, stages = staged(engine.model, names)
    assert [stage > 0 for stage in stages] == [".layers." in name for name in names]
    called: list[nn.Module] = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, _: called.append(module)) for layer in layers
    ]
    engine.score([[3, 4, 5, 6]], [(1, 4)])
    for hook in hooks:
        hook.remove()
    assert called == layers and len(layers) == 2


class ImmediateLane:
    """All is done by the time it is given. See host_master.Lane."""

    def run(self, work: Callable[[], object]) -> None:
        work()

    def mark(self) -> bool:
        return True

    def wait(self, mark: bool) -> None:
        pass

    def finish(self) -> None:
        pass


@pytest.mark.skipif(DEVICE == "cuda", reason="tests/gpu has the real streams")
def test_a_replica_answers_as_with_its_master_beside_the_weights(
    recipe: dict[str, Any], model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a real engine."""
    folder = model_folders["llama"]
    expected = run(config(recipe, folder, "bfloat16", "float32"), "cpu")
    monkeypatch.setattr(spaces.SpacePlan, "_check_host", lambda plan: None)
    monkeypatch.setattr(host_master, "SMALLEST_CHUNK", 4096)
    lanes = Lanes(*(ImmediateLane() for _ in range(4)))
    monkeypatch.setattr(host_master, "_streams", lambda buffers: lanes)
    assert same(run(config(recipe, folder, "bfloat16", "host"), "cpu"), expected)


def test_a_host_without_a_gpu_or_the_memory_is_refused_before_anything_loads(
    recipe: dict[str, Any], model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folders["opt"]
    values = {**recipe, "model": {"path": str(folder)}, "space": {"master": "host"}}
    host, checkpoint = Config.model_validate(values), Checkpoint(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"space\.master: host: there is no GPU .* use float32"):
        spaces.SpacePlan(host, checkpoint)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(spaces, "_free_bytes", {"cpu": 1000}.__getitem__)
    with pytest.raises(ConfigError, match=r"of the host's memory, of which 0\.0 are free"):
        spaces.SpacePlan(host, checkpoint)


def test_a_run_goes_on_with_its_master_elsewhere(
    recipe: dict[str, Any], model_folders: dict[str, Path], tmp_path: Path
) -> None:
    started = config(recipe, model_folders["opt"], "bfloat16", "host")
    values = started.model_dump() | {"model": {"path": started.model.path}}  # graphs by default
    (tmp_path / "config.yaml").write_text(Config.model_validate(values).dump())
    moved = ["space.master=float32", "model.score_graphs=false"]
    assert run_folder.reopen(tmp_path, moved).config.space.master == "float32"
    with pytest.raises(ConfigError, match=r"^space\.master=float32: the run in .* depend on this"):
        run_folder.reopen(tmp_path, moved[:1])
