"""Spaces that live in slots of the engine: beside weights that all probes share, untouched.

Owns the float32 master of what is trained. The first slot holds it as the engine reads it, each of
the others a perturbed copy, so that the rows of one batch evaluate many probes at once. It does not
know what a slot is: an adapter's factors, or a prefix's keys and values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from orchestrator import space
from orchestrator.noise import NoiseKind
from orchestrator.parameters import check_words, region
from orchestrator.records import Probe, StepUpdate
from orchestrator.space import Groups, Placed, Trained, TrainedTensor
from orchestrator.sweeps import Draw, Slice, Table
from orchestrator.tensor_map import Shard


@dataclass(frozen=True, slots=True)
class SlottedTensor:
    """What this process holds of a trained tensor: its first value, and its place in each slot."""

    name: str
    shard: Shard
    initial: torch.Tensor
    """The whole tensor, float32, on the CPU."""
    views: Sequence[torch.Tensor]
    """Per slot, [rows, columns] of the engine's memory."""


class SlottedSpace:
    """Master, trained slot and perturbed slots. See space.Space for what its methods promise."""

    def __init__(
        self,
        slot_names: Sequence[str],
        tensors: Sequence[SlottedTensor],
        noise_kind: NoiseKind,
        anchored: bool,
    ) -> None:
        """`anchored`: decay is towards the first values, see space.Trained."""
        check_words(tensor.name for tensor in tensors)
        self.adapter, *self._probe_slots = slot_names
        self._noise = noise_kind
        self._views = [tensor.views[1:] for tensor in tensors]
        self._tables: dict[int, Table] = {}
        trained = [_trained(tensor) for tensor in tensors]
        self.trained = Trained(trained, noise_kind, anchored=anchored)

    @property
    def tensors(self) -> list[TrainedTensor]:
        return self.trained.tensors

    @property
    def num_parameters(self) -> int:
        return self.trained.num_parameters

    @property
    def parts(self) -> list[Trained]:
        return [self.trained]

    def placed(self, probes: Sequence[Probe]) -> Groups:
        self.settle()
        size = len(self._probe_slots)
        for start in range(0, len(probes), size):
            group = probes[start : start + size]
            draws = [Draw(probe.seed, probe.sign * probe.eps) for probe in group]
            self._copies(len(group)).perturb(self._noise, draws)
            yield [
                Placed(probe, slot) for probe, slot in zip(group, self._probe_slots, strict=False)
            ]

    def _copies(self, count: int) -> Table:
        """The table that writes so many perturbed copies of all tensors, into the first slots."""
        if count not in self._tables:
            self._tables[count] = space.table(
                [
                    Slice(tensor.region, tensor.master, views[slot], slot)
                    for slot in range(count)
                    for tensor, views in zip(self.trained.tensors, self._views, strict=True)
                ]
            )
        return self._tables[count]

    def apply(self, update: StepUpdate) -> None:
        self.trained.apply(update)

    def settle(self) -> None:
        self.trained.settle()

    def digest(self) -> str:
        return self.trained.digest()

    def values(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What is trained: canonical name, whole float32 tensor on the CPU."""
        return self.trained.values()


def _trained(tensor: SlottedTensor) -> TrainedTensor:
    live = tensor.views[0]
    master = tensor.initial[tensor.shard.cells].to(live.device, torch.float32, copy=True)
    place = region(tensor.name, tensor.shard)
    return TrainedTensor(place, tensor.shard, master.contiguous(), live)
