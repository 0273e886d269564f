"""The dense space: every weight is trained, and perturbed by noise of its own.

Owns the master copy. The live weights are always written from it, never undone by arithmetic, so
that a probe leaves no trace (MeZO's in-place +eps, -2 eps, +eps drifts). Knows nothing of losses.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from orchestrator import sweeps_numba, sweeps_triton
from orchestrator.noise import NoiseKind, TensorRegion
from orchestrator.parameters import CanonicalTensor
from orchestrator.records import StepUpdate
from orchestrator.sweeps import Sweeps


class DenseSpace:
    """Master and live weights of one replica."""

    def __init__(
        self, tensors: Sequence[CanonicalTensor], *, noise: NoiseKind, master_dtype: torch.dtype
    ) -> None:
        device = tensors[0].live.device
        self._noise = noise
        self._sweeps: Sweeps = sweeps_triton if device.type == "cuda" else sweeps_numba
        self._tensors = [
            (tensor.region, tensor.initial.to(device, master_dtype, copy=True), tensor.live)
            for tensor in tensors
        ]
        self.restore()

    @property
    def num_parameters(self) -> int:
        return sum(master.numel() for _, master, _ in self._tensors)

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
        for region, master, live in self._tensors:
            self._sweeps.perturb(
                master, live, region, kind=self._noise, seed=seed, coefficient=coefficient
            )

    def restore(self) -> None:
        """live = master, rounded to nearest."""
        for _, master, live in self._tensors:
            live.copy_(master)

    def apply(self, update: StepUpdate) -> None:
        """master = master * decay + sum of coefficient * z(seed), in order; live follows."""
        for region, master, live in self._tensors:
            self._sweeps.update(
                master,
                live,
                region,
                kind=self._noise,
                seeds=update.seeds,
                coefficients=update.coefficients,
                decay=update.decay,
                step=update.step,
            )

    def digest(self) -> str:
        """Checksum (128 bits, hex) of the trained state; the same on every device."""
        return self._digest([(region, master) for region, master, _ in self._tensors])

    def live_digest(self) -> str:
        """Checksum of the weights that the engine runs with."""
        return self._digest([(region, live) for region, _, live in self._tensors])

    def _digest(self, values: Sequence[tuple[TensorRegion, torch.Tensor]]) -> str:
        total = hashlib.blake2b(digest_size=16)
        for region, tensor in values:
            total.update(f"{region.name} {self._sweeps.digest(tensor, region):016x}\n".encode())
        return total.hexdigest()
