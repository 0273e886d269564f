"""The low-rank space: all matrices are trained, perturbed by noise that is a product of factors.

For a matrix of shape [outputs, inputs] z = u v / sqrt(rank), with u [outputs, rank] and
v [rank, inputs] drawn as tensors of their own, in whole numbers of 1 / 32. A perturbation is thus
an adapter over the shared weights, so that one forward evaluates many; their sum, the update, has
full rank.
EGGROLL, Sarkar et al. 2025; LOZO, Chen et al. 2024, which keeps v for some steps.

Owns the matrices' master. Perturbing and updating draw factors by one function. Knows nothing of
losses.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from orchestrator import noise, space
from orchestrator.adapters import AdapterSlots, Factor
from orchestrator.export import write_model
from orchestrator.noise import NoiseKind, TensorRegion, factor_kind
from orchestrator.parameters import CanonicalTensor, check_words
from orchestrator.records import Probe, StepUpdate
from orchestrator.space import MAX_WAITING_SEEDS, Groups, Placed, Trained, TrainedTensor, table
from orchestrator.sweeps import Draw, Factors, Slice, Table

# While updates wait for each other, their factors may take one byte for so many of the masters'.
MASTERS_OVER_FACTORS = 64
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

    A master of the live weights' dtype is the live weights themselves: probes do not touch them.
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
        anchored: bool = False,
    ) -> None:
        self._noise = noise_kind
        self._slots = slots.names
        self._rank, self._run_seed, self._refresh = rank, run_seed, refresh
        self._all = list(tensors)
        factors = {factor.name: factor for factor in slots.factors}
        self._matrices: list[_Matrix] = []
        others = []
        for tensor in tensors:
            path = tensor.region.name.removesuffix(".weight")
            if f"{path}.lora_A.weight" in factors:
                right, left = factors[f"{path}.lora_A.weight"], factors[f"{path}.lora_B.weight"]
                self._matrices.append(self._matrix(tensor, master_dtype, left, right))
            elif train_others:
                others.append(_trained(tensor, master_dtype))
        drawn = [region for each in self._matrices for region in (each.left, each.right)]
        check_words([*(t.region.name for t in tensors), *(each.name for each in drawn)])
        matrices = [matrix.tensor for matrix in self._matrices]
        self._others = Trained(others, noise_kind, anchored=anchored)
        self._trained = Trained(matrices, noise_kind, anchored=anchored)
        self._draws: dict[int, Table] = {}
        self._factors: tuple[list[Factors], Table] | None = None
        self._waiting: list[StepUpdate] = []
        self._most_waiting = self._fused_seeds()

    def _fused_seeds(self) -> int:
        """How many seeds' updates are at most held back to be taken in one pass."""
        masters = [matrix.tensor.master for matrix in self._matrices]
        size = sum(master.numel() * master.itemsize for master in masters)
        each = self._rank * sum(sum(master.shape) for master in masters)
        return min(MAX_WAITING_SEEDS, size // MASTERS_OVER_FACTORS // max(1, each))

    def _matrix(
        self, tensor: CanonicalTensor, master_dtype: torch.dtype, left: Factor, right: Factor
    ) -> _Matrix:
        name, shard, rank = tensor.region.name, tensor.shard, self._rank
        return _Matrix(
            _trained(tensor, master_dtype, (shard.num_rows, shard.num_columns)),
            TensorRegion(f"{name}.u", shard.first_row * rank, rank),
            TensorRegion(f"{name}.v", shard.first_column, shard.full_columns),
            left.views,
            right.views,
        )

    @property
    def tensors(self) -> list[TrainedTensor]:
        """All trained tensors."""
        return [*self._trained.tensors, *self._others.tensors]

    @property
    def num_parameters(self) -> int:
        return self._trained.num_parameters + self._others.num_parameters

    @property
    def parts(self) -> list[Trained]:
        self._take()
        return [self._trained, self._others]

    # ---------------------------------------------------------------- probes

    def placed(self, probes: Sequence[Probe]) -> Groups:
        self._take()
        size = 1 if self._others.tensors else len(self._slots)
        for start in range(0, len(probes), size):
            group = probes[start : start + size]
            if len(group) not in self._draws:
                self._draws[len(group)] = self._slots_table(len(group))
            draws = [self._factor_draws(p.step, p.seed, p.sign * p.eps) for p in group]
            self._draws[len(group)].perturb(
                factor_kind(self._noise), [draw for pair in draws for draw in pair]
            )
            if self._others.tensors:
                self._others.perturb(group[0].seed, group[0].sign * group[0].eps)
            yield [Placed(probe, name) for probe, name in zip(group, self._slots, strict=False)]

    def _slots_table(self, num_probes: int) -> Table:
        """Writes sign * eps * z(seed) into slots."""
        return table(
            [
                part
                for slot in range(num_probes)
                for matrix in self._matrices
                for part in _factor_slices(
                    matrix, matrix.left_slots[slot], matrix.right_slots[slot], slot
                )
            ]
        )

    def _factor_draws(self, step: int, seed: int, coefficient: float = 1.0) -> tuple[Draw, Draw]:
        """How coefficient * u, and v, are drawn: the one function that makes z."""
        right_seed = seed
        if self._refresh > 1:
            first_step = step - step % self._refresh
            right_seed = noise.derive_seed(self._run_seed, first_step, RIGHT_FACTORS)
        return Draw(seed, coefficient), Draw(right_seed, 1.0)

    # ---------------------------------------------------------------- state

    def apply(self, update: StepUpdate) -> None:
        self._others.apply(update)
        number = len(update.seeds) + sum(len(waiting.seeds) for waiting in self._waiting)
        if self._trained.is_anchored or number > self._most_waiting:
            self._take()
        self._waiting.append(update)

    def _take(self) -> None:
        """Take the updates that wait, in one pass over the masters."""
        if not self._waiting:
            return
        draws = [
            self._factor_draws(update.step, seed)
            for update in self._waiting
            for seed in update.seeds
        ]
        number = len(draws)
        factors, draws_table = self._factors_of(number)
        # There may be room for more: what is not asked for is drawn like the last, and not used.
        draws += [draws[-1]] * (len(factors[0].left) - number) if draws else []
        draws_table.perturb(factor_kind(self._noise), [draw for pair in draws for draw in pair])
        used = [Factors(left[:number], right[:number]) for left, right in factors]
        self._trained.apply_low_rank(used, self._waiting)
        self._waiting.clear()

    def _factors_of(self, num_seeds: int) -> tuple[list[Factors], Table]:
        """Where updates' factors go, and the table that draws them; kept for the next ones, with
        room for up to twice as many."""
        held = 0 if self._factors is None else len(self._factors[0][0].left)
        if self._factors is None or not num_seeds <= held <= 2 * num_seeds:
            self._factors = None  # before the new ones take memory
            device, rank = self._matrices[0].tensor.master.device, self._rank
            factors: list[Factors] = []
            slices: list[Slice] = []
            for matrix in self._matrices:
                rows, columns = matrix.tensor.master.shape
                left = torch.empty(num_seeds, rows, rank, dtype=torch.int8, device=device)
                right = torch.empty(num_seeds, rank, columns, dtype=torch.int8, device=device)
                factors.append(Factors(left, right))
                for seed in range(num_seeds):
                    slices += _factor_slices(matrix, left[seed], right[seed], seed)
            self._factors = factors, table(slices)
        return self._factors

    def settle(self) -> None:
        self._take()
        self._others.settle()

    def digest(self) -> str:
        return self._digest(live=False)

    def live_digest(self) -> str:
        """Checksum of the trained weights that the engine runs with."""
        return self._digest(live=True)

    def _digest(self, *, live: bool) -> str:
        self._take()
        return space.digest([line for part in self.parts for line in part.checksums(live=live)])

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights as the engine runs with them: canonical name, whole tensor on the CPU."""
        self.settle()
        return space.assembled(
            (tensor.region.name, tensor.shard, tensor.live) for tensor in self._all
        )

    def export(self, base: Path, folder: Path) -> None:
        write_model(base, folder, self.weights())


def _trained(
    tensor: CanonicalTensor, master_dtype: torch.dtype, shape: tuple[int, int] | None = None
) -> TrainedTensor:
    """The tensor as [rows, columns], of another shape than the canonical one's if asked."""
    live = tensor.live.view(shape or tensor.live.shape)
    master = live
    if master_dtype is not live.dtype or shape is None:
        master = tensor.initial.to(live.device, master_dtype, copy=True).contiguous()
    return TrainedTensor(tensor.region, tensor.shard, master.view(live.shape), live)


def _factor_slices(
    matrix: _Matrix, left: torch.Tensor, right: torch.Tensor, number: int
) -> tuple[Slice, Slice]:
    """What draws u and v of a perturbation: the draws of number 0 come first, then those of 1."""
    return (
        Slice(matrix.left, None, left, 2 * number),
        Slice(matrix.right, None, right, 2 * number + 1),
    )
