"""The prefix space: keys and values of virtual tokens are trained, in front of every sequence.

Owns their first values and their export; their state is as in every slotted space. Li & Liang,
Prefix-Tuning, 2021, without its reparametrisation, as in MeZO, Malladi et al. 2023. Knows nothing
of losses.

First values are a pure function of the run's seed, small and evenly spread. Those that a model
computes for real tokens (MeZO's) are said to train better, but differ in their last bits between
devices, and a ledger must replay to the same state on any: give such as an adapter, by `initial`.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from orchestrator import noise
from orchestrator.config import ConfigError
from orchestrator.export import write_prefix
from orchestrator.noise import NoiseKind
from orchestrator.prefix_slots import PrefixSlots, PrefixTensor
from orchestrator.slotted import SlottedSpace, SlottedTensor

INITIAL_BOUND = np.float32(0.1)


class PrefixSpace(SlottedSpace):
    """A prefix in the engine's prefix slots."""

    def __init__(
        self,
        slots: PrefixSlots,
        *,
        noise_kind: NoiseKind,
        seed: int,
        initial: torch.Tensor | None = None,
        anchored: bool = False,
    ) -> None:
        """Start from `initial`, laid out as PEFT does, or from values drawn by `seed`.

        Raises ConfigError where `initial` is for a model of other layers or heads.
        """
        self._num_heads = slots.num_heads
        if initial is None:
            values = first_values(slots.tensors, seed)
        else:
            values = _columns(slots.tensors, initial)
        tensors = [
            SlottedTensor(tensor.name, tensor.shard, value, tensor.views)
            for tensor, value in zip(slots.tensors, values, strict=True)
        ]
        super().__init__(slots.names, tensors, noise_kind, anchored)

    def export(self, base: Path, folder: Path) -> None:
        write_prefix(base, folder, self._num_heads, self.values())


def first_values(tensors: Sequence[PrefixTensor], seed: int) -> list[torch.Tensor]:
    """Evenly spread within INITIAL_BOUND; float32, whole; a function of (seed, name).

    Keys and values this small take some attention from the sequence and add little of their own.
    """
    values = []
    for tensor in tensors:
        shape = tensor.shard.full_shape
        drawn = noise.uniform(seed, tensor.name, math.prod(shape))
        values.append(torch.from_numpy((2 * drawn - 1) * INITIAL_BOUND).view(shape))
    return values


def _columns(tensors: Sequence[PrefixTensor], table: torch.Tensor) -> list[torch.Tensor]:
    """PEFT's table [tokens, columns] as whole tensors: it lays them side by side."""
    widths = [tensor.shard.full_columns for tensor in tensors]
    wanted = (tensors[0].shard.full_shape[0], sum(widths))
    if tuple(table.shape) != wanted:
        raise ConfigError(
            f"space.init: shape {list(table.shape)} in the adapter, {list(wanted)} in the model: "
            "it is for another base model"
        )
    ends = itertools.accumulate(widths)
    return [table[:, end - width : end] for width, end in zip(widths, ends, strict=True)]
