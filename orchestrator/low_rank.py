"""The low-rank space: all matrices are trained, perturbed by noise that is a product of factors.

For a matrix of shape [outputs, inputs] z = u v / sqrt(rank), with u [outputs, rank] and
v [rank, inputs] drawn as tensors of their own. A perturbation is thus an adapter over the shared
weights, so that one forward evaluates many; their sum, the update, has full rank.
EGGROLL, Sarkar et al. 2025; LOZO, Chen et al. 2024, which keeps v for some steps.

Owns the matrices' master. Perturbing and updating draw factors by one function. Knows nothing of
losses.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from orchestrator import noise, space
from orchestrator.adapters import AdapterSlots
from orchestrator.export import write_model
from orchestrator.noise import NoiseKind, TensorRegion
from orchestrator.parameters import CanonicalTensor
from orchestrator.records import Probe, StepUpdate
from orchestrator.space import Groups, Placed, TrainedTensor

RIGHT_FACTORS = 2**32 - 1  # in place of a perturbation's number, where they are kept for steps


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A trained matrix, and where its noise's factors are drawn and, per slot, written."""

    tensor: TrainedTensor
    left: TensorRegion
    right: TensorRegion
    left_slots: tuple[torch.Tensor, ...]
    """[outputs, rank], what the engine calls an adapter's B."""
    right_slots: tuple[torch.Tensor, ...]
    """[rank, inputs], an adapter's A."""


class LowRankSpace:
    """Master, live weights and noise slots. See space.Space for what its methods promise.

    Other parameters than matrices are frozen, or with `train_others` perturbed densely; then a
    forward evaluates one probe.
    """

    adapter = None

    def __init__(
        self,
        tensors: Sequence[CanonicalTensor],
        slots: AdapterSlots,
        *,
        noise_kind: NoiseKind,
        master_dtype: torch.dtype,
        rank: int,
        run_seed: int,
        refresh: int = 1,
        train_others: bool = False,
    ) -> None:
        device = tensors[0].live.device
        self._noise = noise_kind
        self._sweeps = space.sweeps_for(device)
        self._slots = slots.names
        self._rank, self._run_seed, self._refresh = rank, run_seed, refresh
        self._all = list(tensors)
        factors = {factor.name: factor for factor in slots.factors}
        self._matrices: list[_Matrix] = []
        self._others: list[TrainedTensor] = []
        for tensor in tensors:
            name, shard = tensor.region.name, tensor.shard
            path = name.removesuffix(".weight")
            if f"{path}.lora_A.weight" in factors:
                right, left = factors[f"{path}.lora_A.weight"], factors[f"{path}.lora_B.weight"]
                shape = (shard.num_rows, shard.num_columns)
                trained = TrainedTensor(
                    tensor.region,
                    shard,
                    tensor.initial.to(device, master_dtype, copy=True).contiguous().view(shape),
                    tensor.live.view(shape),
                )
                self._matrices.append(
                    _Matrix(
                        trained,
                        TensorRegion(f"{name}.u", shard.first_row * rank, rank),
                        TensorRegion(f"{name}.v", shard.first_column, shard.full_columns),
                        left.views,
                        right.views,
                    )
                )
            elif train_others:
                master = tensor.initial.to(device, master_dtype, copy=True).contiguous()
                self._others.append(TrainedTensor(tensor.region, shard, master, tensor.live))
        self._zeros = torch.zeros(
            rank * max(max(matrix.tensor.master.shape) for matrix in self._matrices), device=device
        )
        space.restore(self.tensors)

    @property
    def tensors(self) -> list[TrainedTensor]:
        """All trained tensors."""
        return [*(matrix.tensor for matrix in self._matrices), *self._others]

    @property
    def num_parameters(self) -> int:
        return space.num_parameters(self.tensors)

    # ---------------------------------------------------------------- probes

    def placed(self, probes: Sequence[Probe]) -> Groups:
        size = 1 if self._others else len(self._slots)
        with self._probing():
            for start in range(0, len(probes), size):
                group = probes[start : start + size]
                for slot, probe in enumerate(group):
                    self._perturb(slot, probe)
                yield [Placed(probe, name) for probe, name in zip(group, self._slots, strict=False)]

    @contextmanager
    def _probing(self) -> Iterator[None]:
        try:
            yield
        finally:
            space.restore(self._others)

    def _perturb(self, slot: int, probe: Probe) -> None:
        """Write sign * eps * z(seed) into a slot, and into the live weights that have none."""
        coefficient = probe.sign * probe.eps
        for matrix in self._matrices:
            left, right = matrix.left_slots[slot], matrix.right_slots[slot]
            self._draw(matrix, probe.step, probe.seed, left, right, coefficient)
        others = [tensor.live for tensor in self._others]
        space.perturb(self._others, others, self._noise, probe.seed, coefficient)

    def _draw(
        self,
        matrix: _Matrix,
        step: int,
        seed: int,
        left: torch.Tensor,
        right: torch.Tensor,
        coefficient: float = 1.0,
    ) -> None:
        """Write coefficient * u into `left` and v into `right`: the one function that makes z."""
        right_seed = seed
        if self._refresh > 1:
            first_step = step - step % self._refresh
            right_seed = noise.derive_seed(self._run_seed, first_step, RIGHT_FACTORS)
        for target, region, key, scale in (
            (left, matrix.left, seed, coefficient),
            (right, matrix.right, right_seed, 1.0),
        ):
            zeros = self._zeros[: target.numel()].view(target.shape)
            self._sweeps.perturb(
                zeros, target, region, kind=self._noise, seed=key, coefficient=scale
            )

    # ---------------------------------------------------------------- state

    def apply(self, update: StepUpdate) -> None:
        num_seeds = len(update.seeds)
        for matrix in self._matrices:
            tensor = matrix.tensor
            rows, columns = tensor.master.shape
            left = self._zeros.new_empty(num_seeds, rows, self._rank)
            right = self._zeros.new_empty(num_seeds, self._rank, columns)
            for index, seed in enumerate(update.seeds):
                self._draw(matrix, update.step, seed, left[index], right[index])
            self._sweeps.low_rank_update(
                tensor.master,
                tensor.live,
                tensor.region,
                left=left,
                right=right,
                coefficients=update.coefficients,
                decay=update.decay,
                step=update.step,
            )
        space.add_noise(self._others, self._noise, update)

    def digest(self) -> str:
        return space.digest(self.tensors, lambda tensor: tensor.master)

    def live_digest(self) -> str:
        """Checksum of the trained weights that the engine runs with."""
        return space.digest(self.tensors, lambda tensor: tensor.live)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights as the engine runs with them: canonical name, whole tensor on the CPU."""
        return space.assembled(
            (tensor.region.name, tensor.shard, tensor.live) for tensor in self._all
        )

    def export(self, base: Path, folder: Path) -> None:
        write_model(base, folder, self.weights())
