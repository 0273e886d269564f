"""The dense space: every weight is trained, and perturbed by noise of its own.

Owns the master copy. The live weights are always written from it, never undone by arithmetic, so
that a probe leaves no trace (MeZO's in-place +eps, -2 eps, +eps drifts). Knows nothing of losses.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn

from orchestrator import space
from orchestrator.export import write_model
from orchestrator.host_master import HostTable, staged
from orchestrator.noise import NoiseKind
from orchestrator.parameters import CanonicalTensor
from orchestrator.records import Probe, StepUpdate
from orchestrator.space import Groups, Placed, Trained, TrainedTensor
from orchestrator.sweeps import Slice


class DenseSpace:
    """Master and live weights of all tensors. See space.Space for what its methods promise."""

    adapter = None

    def __init__(
        self,
        tensors: Sequence[CanonicalTensor],
        *,
        noise: NoiseKind,
        master_dtype: torch.dtype,
        host_of: nn.Module | None = None,
        anchored: bool = False,
    ) -> None:
        """`anchored`: decay is towards the first values, see space.Trained. With `host_of`, the
        model on a CUDA device whose parameters the live tensors are, the master lies in the host's
        memory, in float32."""
        device = tensors[0].live.device
        self._host: HostTable | None = None
        self._layers: list[nn.Module] = []
        if host_of is not None:
            assert master_dtype == torch.float32
            device = torch.device("meta")  # the table takes the values
            slices = [Slice(tensor.region, tensor.initial, tensor.live) for tensor in tensors]
            names = [tensor.shard.place.parameter for tensor in tensors]
            self._layers, stages = staged(host_of, names)
            self._host = HostTable(slices, stages)
        self.trained = Trained(
            [
                TrainedTensor(
                    tensor.region,
                    tensor.shard,
                    tensor.initial.to(device, master_dtype, copy=True).contiguous(),
                    tensor.live,
                )
                for tensor in tensors
            ],
            noise,
            self._host,
            anchored=anchored,
        )

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
        with self._overlapping():
            for probe in probes:
                self.trained.perturb(probe.seed, probe.sign * probe.eps)
                yield [Placed(probe, self.adapter)]

    def _overlapping(self) -> AbstractContextManager[None]:
        """Within, a forward's first layers compute while later ones are perturbed."""
        return nullcontext() if self._host is None else self._host.overlapping(self._layers)

    def apply(self, update: StepUpdate) -> None:
        self.trained.apply(update)

    def settle(self) -> None:
        self.trained.settle()

    def digest(self) -> str:
        return self.trained.digest()

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights as the engine runs with them: canonical name, whole tensor on the CPU."""
        self.settle()
        return space.assembled(
            (tensor.region.name, tensor.shard, tensor.live) for tensor in self.trained.tensors
        )

    def export(self, base: Path, folder: Path) -> None:
        write_model(base, folder, self.weights())
