"""The lora and low_rank spaces against PEFT and explicit weights, on transformers."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from orchestrator import noise
from orchestrator.checkpoint import Checkpoint
from orchestrator.config import Config, ConfigError
from orchestrator.engine import Engine
from orchestrator.lora import LoraSpace
from orchestrator.low_rank import LowRankSpace
from orchestrator.records import Probe, StepUpdate
from orchestrator.space import Space
from orchestrator.spaces import SpacePlan

FAMILIES = ["opt", "llama", "qwen3"]
EPS = 0.05
SEQUENCES = [[3, 4, 5, 6, 7], [8, 9, 10], [3, 4, 5, 6, 8], [11, 12, 13, 14, 15, 16]]
SPANS = [(4, 5), (1, 3), (4, 5), (2, 6)]


@pytest.fixture
def make(
    recipe: dict[str, Any], model_folders: dict[str, Path]
) -> Iterator[Callable[..., tuple[Engine, Space]]]:
    """An engine and a space over it, as a replica makes them; closed at the end."""
    engines = []

    def made(family: str, dtype: str = "float32", **space: Any) -> tuple[Engine, Space]:
        folder = model_folders[family]
        model = {**recipe["model"], "path": str(folder), "dtype": dtype}
        config = Config.model_validate({**recipe, "model": model, "space": space})
        plan = SpacePlan(config, Checkpoint(folder))
        engine = Engine(
            str(folder),
            dtype=dtype,
            device=DEVICE,
            kv_tokens=512,
            threads=2,
            adapters=plan.adapters,
        )
        engines.append(engine)
        return engine, plan.build(engine)

    yield made
    for engine in engines:
        engine.close()


def probes(count: int, step: int = 0) -> list[Probe]:
    return [
        Probe(step, seed, sign, EPS, (0,)) for seed in range(70, 70 + count) for sign in (1, -1)
    ]


def sums(engine: Engine, adapters: list[str | None]) -> list[list[float]]:
    """Per adapter, the sequences' summed log-probabilities, of one call."""
    scores = engine.score(SEQUENCES, SPANS, adapters=adapters).spans
    size = len(SEQUENCES)
    return [
        [span.sum for span in scores[start : start + size]] for start in range(0, len(scores), size)
    ]


@torch.no_grad()
def reference_sums(model: torch.nn.Module) -> list[float]:
    found = []
    for tokens, (start, end) in zip(SEQUENCES, SPANS, strict=True):
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        found.append(sum(float(logprobs[p - 1, tokens[p]]) for p in range(start, end)))
    return found


def z(seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    count = int(np.prod(shape))
    return torch.from_numpy(noise.draw("gaussian", seed, name, 0, count)).view(shape)


def peft_model(folder: Path, space: LoraSpace, seed: int, scale: float) -> PeftModel:
    """PEFT's model with the space's master, moved by scale * z(seed)."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = space._settings
    config = LoraConfig(
        r=settings.rank, lora_alpha=int(settings.alpha), target_modules=list(settings.modules)
    )
    model = get_peft_model(base, config)
    parameters = {
        name.removeprefix("base_model.model.").replace(".default", ""): value
        for name, value in model.named_parameters()
        if "lora_" in name
    }
    assert parameters.keys() == {tensor.region.name for tensor in space.tensors}
    for tensor in space.tensors:
        name = tensor.region.name
        target = parameters[name]
        moved = tensor.master.cpu().view(target.shape) + scale * z(seed, name, target.shape)
        target.data.copy_(moved)
    return model


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_probes_in_one_forward_equal_peft(
    family: str,
    targets: Any,
    make: Callable[..., tuple[Engine, Space]],
    model_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, space = make(family, kind="lora", rank=4, alpha=8, targets=targets, slots=6)
    assert isinstance(space, LoraSpace)
    space.apply(StepUpdate(0, seeds=(5,), coefficients=(0.1,), decay=1.0))  # B is no longer zero
    forwards = []
    forward = engine._runner.forward
    monkeypatch.setattr(engine._runner, "forward", lambda b: forwards.append(b) or forward(b))
    with closing(space.placed(probes(3))) as groups:
        for group in groups:
            assert len(group) == 6
            losses = sums(engine, [placed.adapter for placed in group])
            assert len(forwards) == 1
            for placed, found in zip(group, losses, strict=True):
                probe = placed.probe
                model = peft_model(model_folders[family], space, probe.seed, probe.sign * probe.eps)
                assert found == pytest.approx(reference_sums(model), abs=1e-4)
    assert len({tuple(found) for found in losses}) == 6
    trained = peft_model(model_folders[family], space, 0, 0.0)
    assert sums(engine, [space.adapter]) == [pytest.approx(reference_sums(trained), abs=1e-4)]
    base = AutoModelForCausalLM.from_pretrained(model_folders[family], dtype=torch.float32)
    assert sums(engine, [None]) == [pytest.approx(reference_sums(base), abs=1e-4)]


def low_rank_z(seed: int, name: str, shape: tuple[int, int], rank: int) -> torch.Tensor:
    left = z(seed, f"{name}.u", (shape[0], rank))
    right = z(seed, f"{name}.v", (rank, shape[1]))
    return left @ right / rank**0.5


def matrices(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Weights of the linear modules inside the layers."""
    return {
        name: value
        for name, value in model.named_parameters()
        if ".layers." in name and value.dim() == 2
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_low_rank_probes_equal_explicit_weights(
    family: str, make: Callable[..., tuple[Engine, Space]], model_folders: dict[str, Path]
) -> None:
    engine, space = make(family, kind="low_rank", rank=2, slots=4)
    assert isinstance(space, LowRankSpace)
    before = space.live_digest()
    base = AutoModelForCausalLM.from_pretrained(model_folders[family], dtype=torch.float32)
    assert set(matrices(base)) == {tensor.region.name for tensor in space.tensors}
    with closing(space.placed(probes(3))) as groups:
        sizes = []
        for group in groups:
            sizes.append(len(group))
            losses = sums(engine, [placed.adapter for placed in group])
            for placed, found in zip(group, losses, strict=True):
                probe = placed.probe
                model = AutoModelForCausalLM.from_pretrained(
                    model_folders[family], dtype=torch.float32
                )
                for name, value in matrices(model).items():
                    shape = (value.shape[0], value.shape[1])
                    value.data += probe.sign * EPS * low_rank_z(probe.seed, name, shape, 2)
                assert found == pytest.approx(reference_sums(model), abs=1e-4)
    assert sizes == [4, 2]
    assert space.live_digest() == before
    assert sums(engine, [space.adapter]) == [pytest.approx(reference_sums(base), abs=1e-4)]
