"""The dense space: every weight is trained, and perturbed by noise of its own.

Owns the master copy. The live weights are always written from it, never undone by arithmetic, so
that a probe leaves no trace (MeZO's in-place +eps, -2 eps, +eps drifts). Knows nothing of losses.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from orchestrator import space
from orchestrator.export import write_model
from orchestrator.noise import NoiseKind
from orchestrator.parameters import CanonicalTensor
from orchestrator.records import Probe, StepUpdate
from orchestrator.space import Groups, Placed, TrainedTensor


class DenseSpace:
    """Master and live weights of all tensors. See space.Space for what its methods promise."""

    adapter = None

    def __init__(
        self, tensors: Sequence[CanonicalTensor], *, noise: NoiseKind, master_dtype: torch.dtype
    ) -> None:
        device = tensors[0].live.device
        self._noise = noise
        self.tensors = [
            TrainedTensor(
                tensor.region,
                tensor.shard,
                tensor.initial.to(device, master_dtype, copy=True).contiguous(),
                tensor.live,
            )
            for tensor in tensors
        ]
        self.restore()

    @property
    def num_parameters(self) -> int:
        return space.num_parameters(self.tensors)

    def placed(self, probes: Sequence[Probe]) -> Groups:
        with self.probing():
            for probe in probes:
                self.perturb(probe.seed, probe.sign * probe.eps)
                yield [Placed(probe, self.adapter)]

    @contextmanager
    def probing(self) -> Iterator["DenseSpace"]:
        """Within, `perturb` may be called any number of times; on leaving, all is as it was."""
        try:
            yield self
        finally:
            self.restore()

    def perturb(self, seed: int, coefficient: float) -> None:
        """live = master + coefficient * z(seed), whatever live held before."""
        if coefficient == 0:
            self.restore()
            return
        live = [tensor.live for tensor in self.tensors]
        space.perturb(self.tensors, live, self._noise, seed, coefficient)

    def restore(self) -> None:
        """live = master, rounded to nearest."""
        space.restore(self.tensors)

    def apply(self, update: StepUpdate) -> None:
        space.add_noise(self.tensors, self._noise, update)

    def digest(self) -> str:
        return space.digest(self.tensors, lambda tensor: tensor.master)

    def live_digest(self) -> str:
        """Checksum of the weights that the engine runs with."""
        return space.digest(self.tensors, lambda tensor: tensor.live)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights as the engine runs with them: canonical name, whole tensor on the CPU."""
        self.restore()
        return space.assembled(
            (tensor.region.name, tensor.shard, tensor.live) for tensor in self.tensors
        )

    def export(self, base: Path, folder: Path) -> None:
        write_model(base, folder, self.weights())
