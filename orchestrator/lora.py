"""The lora space: an adapter is trained; the base weights are shared by all probes and untouched.

Owns the adapter's float32 master. The first of the engine's slots holds the trained adapter, each
of the others a perturbed copy of it, so that the rows of one batch evaluate many probes at once.
Hu et al., LoRA, 2021; first values and names are PEFT's. Knows nothing of losses.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator import noise, space
from orchestrator.adapters import AdapterSlots, Factor
from orchestrator.config import ConfigError
from orchestrator.export import AdapterSettings, write_adapter
from orchestrator.noise import NoiseKind
from orchestrator.parameters import region
from orchestrator.records import Probe, StepUpdate
from orchestrator.space import Groups, Placed, TrainedTensor

Initial = Mapping[str, torch.Tensor]


class LoraSpace:
    """Master, trained slot and perturbed slots. See space.Space for what its methods promise."""

    def __init__(
        self,
        slots: AdapterSlots,
        settings: AdapterSettings,
        *,
        noise_kind: NoiseKind,
        seed: int,
        initial: Initial | None = None,
    ) -> None:
        """Start from the `initial` factors, by canonical name, or from PEFT's, drawn by `seed`.

        Raises ConfigError where `initial` belongs to a model of other modules or shapes.
        """
        self.adapter, *self._probe_slots = slots.names
        self._settings = settings
        self._noise = noise_kind
        device = slots.factors[0].views[0].device
        values = first_values(slots.factors, seed) if initial is None else initial
        _check_fit(slots.factors, values)
        self.tensors = []
        self._probe_views: list[list[torch.Tensor]] = [[] for _ in self._probe_slots]
        for factor in slots.factors:
            shard = factor.shard
            master = values[factor.name][shard.cells].to(device, torch.float32, copy=True)
            trained, *perturbed = factor.views
            self.tensors.append(
                TrainedTensor(region(factor.name, shard), shard, master.contiguous(), trained)
            )
            for views, view in zip(self._probe_views, perturbed, strict=True):
                views.append(view)
        space.restore(self.tensors)

    @property
    def num_parameters(self) -> int:
        return space.num_parameters(self.tensors)

    def placed(self, probes: Sequence[Probe]) -> Groups:
        for start in range(0, len(probes), len(self._probe_slots)):
            group = probes[start : start + len(self._probe_slots)]
            for probe, views in zip(group, self._probe_views, strict=False):
                coefficient = probe.sign * probe.eps
                space.perturb(self.tensors, views, self._noise, probe.seed, coefficient)
            yield [
                Placed(probe, slot) for probe, slot in zip(group, self._probe_slots, strict=False)
            ]

    def apply(self, update: StepUpdate) -> None:
        space.add_noise(self.tensors, self._noise, update)

    def digest(self) -> str:
        return space.digest(self.tensors, lambda tensor: tensor.master)

    def factors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The trained factors: canonical name, whole float32 tensor on the CPU."""
        return space.assembled(
            (tensor.region.name, tensor.shard, tensor.master) for tensor in self.tensors
        )

    def export(self, base: Path, folder: Path) -> None:
        write_adapter(base, folder, self._settings, self.factors())


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
