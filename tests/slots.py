"""Engines whose slots are in use, and prompts for them."""

import random
from pathlib import Path
from typing import Any

import torch
from bare import make_adapter
from conftest import DEVICE, VOCABULARY
from transformers import AutoModelForCausalLM

from orchestrator.adapters import AdapterPlan
from orchestrator.engine import Engine
from orchestrator.noise import uniform
from orchestrator.prefix_slots import PrefixPlan

MODULES = ["q_proj", "v_proj"]


def random_prompts(seed: int, count: int, longest: int = 20) -> list[list[int]]:
    draw = random.Random(seed)
    return [
        [draw.randrange(3, len(VOCABULARY)) for _ in range(draw.randint(1, longest))]
        for _ in range(count)
    ]


def adapted_engine(folder: Path, root: Path, **choices: Any) -> tuple[Engine, list[Any]]:
    """A float32 engine with two adapters in its slots; PEFT's models of the base and of both."""
    engine = Engine(
        str(folder),
        dtype="float32",
        device=DEVICE,
        threads=2,
        adapters=AdapterPlan(num_slots=2, rank=4, scaling=2.0, modules=tuple(MODULES)),
        **choices,
    )
    assert engine.slots is not None
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)]
    for number in range(2):
        model = make_adapter(folder, root / f"adapter {number}", MODULES, seed=number)
        state = model.state_dict()
        for factor in engine.slots.factors:
            name = "base_model.model." + factor.name.replace(".weight", ".default.weight")
            factor.views[number].copy_(state[name])
        models.append(model)
    return engine, models


def prefixed_engine(folder: Path, **choices: Any) -> Engine:
    """A float32 engine with two prefix slots of random keys and values."""
    engine = Engine(
        str(folder),
        dtype="float32",
        device=DEVICE,
        threads=2,
        prefixes=PrefixPlan(num_slots=2, num_tokens=5),
        **choices,
    )
    assert engine.prefixes is not None
    for tensor in engine.prefixes.tensors:
        for number, view in enumerate(tensor.views):
            values = torch.from_numpy(uniform(number, tensor.name, view.numel()))
            view.copy_((4 * values - 2).view(view.shape))
    return engine
