"""The dense space on real engines: what SGLang fuses, what a probe leaves behind."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE
from safetensors.torch import load_file, save_file

from orchestrator import noise
from orchestrator.checkpoint import Checkpoint
from orchestrator.dense import DenseSpace
from orchestrator.engine import Engine
from orchestrator.noise import TensorRegion
from orchestrator.parameters import canonical_tensors
from orchestrator.records import Probe, StepUpdate
from orchestrator.space import Trained, TrainedTensor
from orchestrator.tensor_map import Place, Shard

Engines = Callable[[str], Engine]
FAMILIES = ["opt", "llama", "qwen2", "qwen3", "phi3"]


def space(engine: Engine, folder: Path, **choices: Any) -> DenseSpace:
    tensors = canonical_tensors(engine.model, Checkpoint(folder))
    choices = {"noise": "gaussian", "master_dtype": torch.float32, **choices}
    return DenseSpace(tensors, **choices)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_the_checkpoint_is_found_whatever_is_fused(
    family: str, engines: Engines, model_folders: dict[str, Path]
) -> None:
    engine, checkpoint = engines(family), Checkpoint(model_folders[family])
    tensors = canonical_tensors(engine.model, checkpoint)
    assert [tensor.region.name for tensor in tensors] == sorted(checkpoint.names)
    fused = {name.split(".")[-2] for name, _ in engine.model.named_parameters()}
    assert "qkv_proj" in fused  # or this test would show nothing


@pytest.mark.parametrize("family", FAMILIES)
def test_a_perturbed_tensor_is_its_slice_of_the_specification(
    family: str, engines: Engines, model_folders: dict[str, Path]
) -> None:
    engine, checkpoint = engines(family), Checkpoint(model_folders[family])
    tensors = canonical_tensors(engine.model, checkpoint)
    dense = space(engine, model_folders[family])
    coefficient = np.float32(0.25)
    dense.trained.perturb(99, float(coefficient))
    for tensor in tensors:
        name = tensor.region.name
        master = checkpoint.read(name).numpy().ravel()
        z = noise.draw("gaussian", 99, name, 0, master.size)
        assert np.array_equal(tensor.live.cpu().numpy().ravel(), master + coefficient * z), name
    dense.settle()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
def test_two_hundred_probes_leave_no_trace(
    dtype: str, master: torch.dtype, model_folders: dict[str, Path]
) -> None:
    folder = model_folders["llama"]
    engine = Engine(str(folder), dtype=dtype, device=DEVICE, kv_tokens=256, threads=2)
    dense = space(engine, folder, noise="rademacher", master_dtype=master)
    before = dense.trained.digest(live=True), dense.digest()
    raw = [parameter.clone() for parameter in engine.model.parameters()]
    for seed in range(100):
        dense.trained.perturb(seed, 1e-3)
        assert dense.trained.digest(live=True) != before[0]
        dense.trained.perturb(seed, -1e-3)
        dense.settle()
        assert dense.trained.digest(live=True) == before[0]
    assert (dense.trained.digest(live=True), dense.digest()) == before
    for was, now in zip(raw, engine.model.parameters(), strict=True):
        assert torch.equal(was, now)
    engine.close()


def test_a_failing_probe_leaves_no_trace(engines: Engines, model_folders: dict[str, Path]) -> None:
    dense = space(engines("opt"), model_folders["opt"])
    before = dense.trained.digest(live=True)
    with (
        pytest.raises(ZeroDivisionError),
        closing(dense.placed([Probe(0, 1, 1, 0.1, ())])) as groups,
    ):
        next(groups)
        raise ZeroDivisionError
    dense.settle()
    assert dense.trained.digest(live=True) == before


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
def test_updates_that_waited_are_those_taken_one_by_one(
    master: torch.dtype, engines: Engines, model_folders: dict[str, Path]
) -> None:
    """A replay's steps become one sweep, a step and the next probe another: with the same bits."""
    updates = [StepUpdate(step, (step, step + 9), (0.5, -0.25), 0.9) for step in range(200)]
    found = []
    for waits in (False, True):
        dense = space(engines("opt"), model_folders["opt"], master_dtype=master)
        for update in updates:
            dense.apply(update)
            if not waits:
                dense.settle()
        next(dense.placed([Probe(200, 1, -1, 0.1, ())]))
        perturbed = dense.trained.digest(live=True)
        found.append((perturbed, dense.digest(), dense.trained.digest(live=True)))
        put_back(dense, Checkpoint(model_folders["opt"]))
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_first_values_of_sixteen_bits_are_kept_in_as_many(dtype: torch.dtype) -> None:
    """With the bits that a copy in float32 gives; a step that decays nothing only adds."""
    draw = torch.Generator().manual_seed(0)
    first = torch.randn(1, 999, generator=draw).to(dtype).float()
    first[0, :2] = torch.tensor([-0.0, 2.0 ** (-24 if dtype is torch.float16 else -100)])
    part = TrainedTensor(
        TensorRegion("some.weight", 0, 999),
        Shard(Place("some.weight"), (1, 999), 0, 1, 999, 0, 0),
        first.clone(),
        torch.empty_like(first),
    )
    trained = Trained([part], "gaussian", anchored=True)
    assert trained._anchors[0].dtype == dtype
    moved = first.numpy()
    for step, decay in enumerate((0.75, 1.0, 0.5)):
        trained.apply(StepUpdate(step, (step,), (0.125,), decay))
        if decay != 1:
            moved = (moved - first.numpy()) * np.float32(decay) + first.numpy()
        moved = moved + np.float32(0.125) * noise.draw("gaussian", step, "some.weight", 0, 999)
    trained.settle()
    assert np.array_equal(part.master.numpy(), moved)


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
def test_an_update_follows_the_specification(
    master: torch.dtype, engines: Engines, model_folders: dict[str, Path]
) -> None:
    checkpoint = Checkpoint(model_folders["qwen2"])
    dense = space(engines("qwen2"), model_folders["qwen2"], master_dtype=master)
    update = StepUpdate(step=5, seeds=(7, 8), coefficients=(0.5, -0.125), decay=0.75)
    dense.apply(update)
    dense.settle()
    for tensor in dense.tensors:
        region, values, live = tensor.region, tensor.master, tensor.live
        initial = checkpoint.read(region.name).to(master).float().numpy().ravel()
        total = np.zeros(initial.size, np.float32)
        for seed, coefficient in zip(update.seeds, update.coefficients, strict=True):
            z = noise.draw("gaussian", seed, region.name, 0, initial.size)
            total = total + np.float32(coefficient) * z
        expected = initial * np.float32(update.decay) + total
        if master == torch.bfloat16:
            random = noise.rounding_bits(5, region.name, 0, initial.size).astype(np.uint32)
            expected = ((expected.view(np.uint32) + random) & 0xFFFF0000).view(np.float32)
        assert np.array_equal(values.float().cpu().numpy().ravel(), expected)
        assert torch.equal(live, values.to(live.dtype))
    put_back(dense, checkpoint)


@torch.no_grad()
def put_back(dense: DenseSpace, checkpoint: Checkpoint) -> None:
    """The engine is shared by all tests, which find the checkpoint's values in it."""
    for tensor in dense.tensors:
        tensor.live.copy_(checkpoint.read(tensor.region.name).reshape(tensor.live.shape))


def altered(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"the checkpoint lacks model\.norm\.weight"),
        (lambda t: t.update(extra=torch.ones(2)), r"extra: the engine's model has no parameter"),
        (
            lambda t: t["model.layers.1.self_attn.k_proj.weight"].add_(1),
            r"k_proj\.weight: the engine's .*qkv_proj\.weight does not hold its values",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(65)}),
            r"model\.norm\.weight: shape \[65\] in the checkpoint, \[64\] in the model",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_engine_is_refused(
    change: Callable[[dict[str, torch.Tensor]], Any],
    message: str,
    engines: Engines,
    model_folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = altered(model_folders["llama"], tmp_path / "altered", change)
    with pytest.raises(ValueError, match=message):
        canonical_tensors(engines("llama").model, Checkpoint(folder))


def test_bin_checkpoints_read_the_same(model_folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(model_folders["opt"] / "model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint.names) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert torch.equal(checkpoint.read(name), tensor)
