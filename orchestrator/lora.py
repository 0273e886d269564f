"""The lora space: an adapter is trained; the base weights are shared by all probes and untouched.

Owns the adapter's first values and its export; its state is as in every slotted space. Hu et al.,
LoRA, 2021; first values and names are PEFT's. Knows nothing of losses.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator import noise
from orchestrator.adapters import AdapterSlots, Factor
from orchestrator.config import ConfigError
from orchestrator.export import AdapterSettings, write_adapter
from orchestrator.noise import NoiseKind
from orchestrator.slotted import SlottedSpace, SlottedTensor

Initial = Mapping[str, torch.Tensor]


class LoraSpace(SlottedSpace):
    """An adapter in the engine's adapter slots."""

    def __init__(
        self,
        slots: AdapterSlots,
        settings: AdapterSettings,
        *,
        noise_kind: NoiseKind,
        seed: int,
        initial: Initial | None = None,
        train: Literal["A+B", "B"] = "A+B",
        anchored: bool = False,
    ) -> None:
        """Start from the `initial` factors, by canonical name, or from PEFT's, drawn by `seed`.

        Raises ConfigError where `initial` belongs to a model of other modules or shapes.
        """
        self._settings = settings
        values = first_values(slots.factors, seed) if initial is None else initial
        _check_fit(slots.factors, values)
        tensors = []
        self._frozen: dict[str, torch.Tensor] = {}
        for factor in slots.factors:
            value = values[factor.name]
            if train == "B" and factor.name.endswith("lora_A.weight"):
                self._frozen[factor.name] = value
                for view in factor.views:
                    view.copy_(value[factor.shard.cells])
            else:
                tensors.append(SlottedTensor(factor.name, factor.shard, value, factor.views))
        super().__init__(slots.names, tensors, noise_kind, anchored)

    def export(self, base: Path, folder: Path) -> None:
        trained = dict(self.values())
        frozen = self._frozen if trained else {}  # ranks other than the first write nothing
        write_adapter(base, folder, self._settings, {**frozen, **trained}.items())


def first_values(factors: Sequence[Factor], seed: int) -> dict[str, torch.Tensor]:
    """PEFT's first values: A evenly spread within 1 / sqrt(inputs), B zero; float32, whole.

    What torch's kaiming_uniform_(a=sqrt(5)) gives in distribution, as a function of (seed, name).
    """
    values = {}
    for factor in factors:
        shape = factor.shard.full_shape
        if factor.name.endswith("lora_B.weight"):
            values[factor.name] = torch.zeros(shape)
            continue
        bound = np.float32(1 / math.sqrt(shape[1]))
        drawn: NDArray[np.float32] = noise.uniform(seed, factor.name, math.prod(shape))
        values[factor.name] = torch.from_numpy((2 * drawn - 1) * bound).view(shape)
    return values


def _check_fit(factors: Sequence[Factor], values: Initial) -> None:
    wanted = {factor.name: factor.shard.full_shape for factor in factors}
    for name in wanted.keys() | values.keys():
        if name not in values:
            raise ConfigError(f"space.init: the adapter lacks {name}: it is for another base model")
        if name not in wanted:
            raise ConfigError(f"space.init: no place in the model for the adapter's {name}")
        if tuple(values[name].shape) != wanted[name]:
            raise ConfigError(
                f"space.init: {name}: shape {list(values[name].shape)} in the adapter, "
                f"{list(wanted[name])} in the model"
            )
