"""The sweeps, numba's and CUDA's, against the specification in noise.py, bit for bit."""

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Protocol

import numba
import numpy as np
import pytest
import torch
import triton
from host_kernels import HostSweeps
from numpy.typing import NDArray

from orchestrator import noise, sweeps_cuda, sweeps_numba
from orchestrator.noise import NoiseKind, TensorRegion
from orchestrator.records import StepUpdate
from orchestrator.sweeps import Draw, Factors, Slice, Table

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
NAME = "model.layers.0.mlp.down_proj.weight"
SEED = 0xFEDCBA9876543210
KINDS: tuple[NoiseKind, ...] = ("gaussian", "rademacher")
FACTOR_KINDS: tuple[NoiseKind, ...] = ("coarse_gaussian", "rademacher")
MASTERS = (torch.float32, torch.bfloat16)
LIVES = (torch.float32, torch.bfloat16, torch.float16)


class Sweeps(Protocol):
    """A module of sweeps."""

    def Table(self, slices: Sequence[Slice]) -> Table: ...  # noqa: N802  a class


@dataclass(frozen=True)
class Shape:
    """Shape and place of a slice, and of its live view in a wider buffer."""

    rows: int
    columns: int
    start: int
    row_stride: int
    left_margin: int = 0
    right_margin: int = 0

    @property
    def region(self) -> TensorRegion:
        return TensorRegion(NAME, self.start, self.row_stride)


SLICES = (
    Shape(1, 1, 0, 0),
    Shape(4, 256, 1024, 2048),
    Shape(3, 131, 1021, 517, left_margin=5, right_margin=3),
    Shape(2, 1500, 2**35 - 700, 8192, right_margin=1),  # a gaussian block passes 2**32 in a row
    Shape(1, 300, 2**39 - 100, 0, left_margin=1),  # and here a rademacher block does
)
LONG_SLICE = Shape(3, 9001, 2**40 + 77, 10_007, left_margin=2)
TALL_SLICE = Shape(21, 1500, 2**33 + 8, 1504, right_margin=4)
EMPTY_SLICES = (
    Shape(1, 0, 3, 0, left_margin=1),
    Shape(3, 0, 8, 8, right_margin=2),
    Shape(0, 5, 8, 8),
    Shape(0, 0, 0, 0),
)


def _values(shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape.rows, shape.columns, generator=generator).to(dtype)


def _poisoned_buffer(shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    width = shape.left_margin + shape.columns + shape.right_margin
    return torch.full((shape.rows, width), float("nan"), dtype=dtype)


def _view(buffer: torch.Tensor, shape: Shape) -> torch.Tensor:
    return buffer[:, shape.left_margin : shape.left_margin + shape.columns]


def _bits(values: torch.Tensor) -> NDArray[np.uint16] | NDArray[np.uint32]:
    unsigned = torch.uint32 if values.dtype is torch.float32 else torch.uint16
    bits: NDArray[np.uint32] = values.contiguous().view(unsigned).numpy()
    return bits


def _assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    different = np.argwhere(_bits(actual) != _bits(expected))
    assert len(different) == 0, f"{what}: {len(different)} differ, first at {different[0]}"


def _noise(kind: NoiseKind, seed: int, shape: Shape) -> NDArray[np.float32]:
    z = np.empty((shape.rows, shape.columns), np.float32)
    for row in range(shape.rows):
        first = shape.start + row * shape.row_stride
        z[row] = noise.draw(kind, seed, NAME, first, shape.columns)
    return z


def _stochastically_rounded(
    values: NDArray[np.float32], step: int, shape: Shape
) -> NDArray[np.float32]:
    bits = np.empty((shape.rows, shape.columns), np.uint16)
    for row in range(shape.rows):
        first = shape.start + row * shape.row_stride
        bits[row] = noise.rounding_bits(step, NAME, first, shape.columns)
    rounded = (values.view(np.uint32) + bits) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def _perturbed(
    master: torch.Tensor, shape: Shape, kind: NoiseKind, coefficient: float
) -> torch.Tensor:
    z = _noise(kind, SEED, shape)
    return torch.from_numpy(master.float().numpy() + np.float32(coefficient) * z)


def _updated(
    master: torch.Tensor, shape: Shape, kind: NoiseKind, count: int, decay: float, step: int
) -> torch.Tensor:
    seeds, coefficients = _seeds(count)
    noises = [_noise(kind, seed, shape) for seed in seeds]
    return _added(master, shape, noises, coefficients, decay, step)


def _added(
    master: torch.Tensor,
    shape: Shape,
    noises: list[NDArray[np.float32]],
    coefficients: list[float],
    decay: float,
    step: int,
) -> torch.Tensor:
    total = np.full((shape.rows, shape.columns), -0.0, np.float32)
    for coefficient, z in zip(coefficients, noises, strict=True):
        total = total + np.float32(coefficient) * z
    values = master.float().numpy() * np.float32(decay) + total
    if master.dtype is torch.bfloat16:
        values = _stochastically_rounded(values, step, shape)
    return torch.from_numpy(values).to(master.dtype)


def _seeds(count: int) -> tuple[list[int], list[float]]:
    seeds = [(SEED + 0x9E3779B97F4A7C15 * i) % 2**64 for i in range(count)]
    return seeds, [0.01 * (-1) ** i * (1 + i) for i in range(count)]


def _step(
    seeds: list[int], coefficients: list[float], *, step: int, decay: float = 0.999
) -> StepUpdate:
    return StepUpdate(step, tuple(seeds), tuple(coefficients), decay)


def _factors(shape: Shape, count: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (count, shape.rows, rank), (count, rank, shape.columns)
    left, right = (
        torch.randint(-112, 113, size, generator=generator, dtype=torch.int8) for size in shapes
    )
    return left, right


def check_perturb(
    sweeps: Sweeps, shape: Shape, kind: NoiseKind, stored: torch.dtype, served: torch.dtype
) -> None:
    master = _values(shape, stored)
    buffer = _poisoned_buffer(shape, served)
    expected = buffer.clone()
    _view(expected, shape).copy_(_perturbed(master, shape, kind, 0.1))
    before = master.clone()
    live = _view(buffer, shape)
    sweeps.Table([Slice(shape.region, master, live)]).perturb(kind, [Draw(SEED, 0.1)])
    _assert_same_bits(buffer, expected, f"live of {shape} {kind} {stored} {served}")
    _assert_same_bits(master, before, "master")


def check_update(
    sweeps: Sweeps,
    shape: Shape,
    kind: NoiseKind,
    stored: torch.dtype,
    served: torch.dtype,
    count: int,
    decay: float = 0.999,
) -> None:
    master = _values(shape, stored)
    expected_master = _updated(master, shape, kind, count, decay=decay, step=2**33 + 5)
    buffer = _poisoned_buffer(shape, served)
    expected = buffer.clone()
    _view(expected, shape).copy_(expected_master)
    table = sweeps.Table([Slice(shape.region, master, _view(buffer, shape))])
    table.update(kind, [_step(*_seeds(count), step=2**33 + 5, decay=decay)])
    what = f"{shape} {kind} {stored} {served} n={count}"
    _assert_same_bits(master, expected_master, f"master of {what}")
    _assert_same_bits(buffer, expected, f"live of {what}")


def check_factors(sweeps: Sweeps, shape: Shape, kind: NoiseKind) -> None:
    """Factors are drawn as whole numbers of 8 bits, and around them nothing is written."""
    width = shape.left_margin + shape.columns + shape.right_margin
    buffer = torch.full((shape.rows, width), -128, dtype=torch.int8)
    expected = buffer.clone()
    _view(expected, shape).copy_(torch.from_numpy(32 * _noise(kind, SEED, shape)))
    table = sweeps.Table([Slice(shape.region, None, _view(buffer, shape))])
    table.perturb(kind, [Draw(SEED, 1.0)])
    assert torch.equal(buffer, expected), f"{shape} {kind}"


def check_low_rank_update(
    sweeps: Sweeps,
    shape: Shape,
    stored: torch.dtype,
    served: torch.dtype,
    count: int,
    rank: int,
    decay: float = 0.999,
) -> None:
    master = _values(shape, stored)
    left, right = _factors(shape, count, rank)
    noises = [noise.low_rank(left[i].numpy(), right[i].numpy()) for i in range(count)]
    weights = [float(noise.low_rank_coefficient(value, rank)) for value in _seeds(count)[1]]
    expected_master = _added(master, shape, noises, weights, decay=decay, step=2**33 + 5)
    buffer = _poisoned_buffer(shape, served)
    expected = buffer.clone()
    _view(expected, shape).copy_(expected_master)
    table = sweeps.Table([Slice(shape.region, master, _view(buffer, shape))])
    update = _step(*_seeds(count), step=2**33 + 5, decay=decay)
    table.low_rank_update([Factors(left, right)], [update])
    what = f"{shape} {stored} {served} n={count} rank={rank}"
    _assert_same_bits(master, expected_master, f"master of {what}")
    _assert_same_bits(buffer, expected, f"live of {what}")


def check_fused_updates(sweeps: Sweeps, shape: Shape, kind: NoiseKind) -> None:
    """Several steps and the perturbation that follows are the same in one sweep as in many."""
    updates = [
        _step(*_seeds(count), step=9 + number, decay=1 - 0.01 * number)
        for number, count in enumerate((2, 0, 3))
    ]
    for stored, served in product(MASTERS, LIVES):
        found = []
        for fused in (False, True):
            master = _values(shape, stored)
            live = _view(_poisoned_buffer(shape, served), shape)
            table = sweeps.Table([Slice(shape.region, master, live)])
            if fused:
                table.update(kind, updates, then=Draw(SEED, 0.1))
            else:
                for update in updates:
                    table.update(kind, [update])
                table.perturb(kind, [Draw(SEED, 0.1)])
            table.update(kind, [], then=Draw(SEED, 0.1))
            found.append((master, live.clone()))
            table.update(kind, [])
            _assert_same_bits(live, master.to(served), "live once settled")
        for one, other in zip(*found, strict=True):
            _assert_same_bits(other, one, f"{shape} {kind} {stored} {served}")


def check_fused_low_rank_updates(sweeps: Sweeps, shape: Shape, decays: bool) -> None:
    """Several steps, some without seeds, are the same in one sweep as in many."""
    updates = [
        _step(*_seeds(count), step=9 + number, decay=1 - 0.01 * number * decays)
        for number, count in enumerate((0, 2, 1, 0, 3))
    ]
    left, right = _factors(shape, 6, 5)
    for stored, served in product(MASTERS, LIVES):
        found = []
        for fused in (False, True):
            master = _values(shape, stored)
            live = _view(_poisoned_buffer(shape, served), shape)
            table = sweeps.Table([Slice(shape.region, master, live)])
            if fused:
                table.low_rank_update([Factors(left, right)], updates)
            else:
                first = 0
                for update in updates:
                    own = slice(first, first := first + len(update.seeds))
                    table.low_rank_update([Factors(left[own], right[own])], [update])
            found.append((master, live.clone()))
        for one, other in zip(*found, strict=True):
            _assert_same_bits(other, one, f"{shape} {stored} {served}")


def check_many_slices(sweeps: Sweeps, kind: NoiseKind) -> None:
    """One sweep over slices of all sorts, each with a draw of its own, or no master."""
    slices: list[Slice] = []
    alone: list[Slice] = []
    for number, (shape, served) in enumerate(product((*SLICES, EMPTY_SLICES[1]), LIVES)):
        stored = (*MASTERS, None)[number % 3]
        master = None if stored is None else _values(shape, stored)
        for group in (slices, alone):
            live = _view(_poisoned_buffer(shape, served), shape)
            group.append(Slice(shape.region, master, live, draw=number % 2))
    draws = [Draw(SEED, 0.1), Draw(SEED + 1, -0.2)]
    table = sweeps.Table(slices)
    table.perturb(kind, draws)
    for together, part in zip(slices, alone, strict=True):
        if part.master is None:
            part = replace(part, master=torch.zeros(part.live.shape))
        sweeps.Table([part]).perturb(kind, draws)
        _assert_same_bits(together.live, part.live, f"{part.region}")
    expected = [noise.digest(_bits(part.live), part.region) for part in slices]
    assert table.digests(live=True) == expected


def check_master_that_is_live(sweeps: Sweeps) -> None:
    for dtype, shape in product(MASTERS, SLICES[:3]):
        apart, shared = _values(shape, dtype), _values(shape, dtype)
        factors = Factors(*_factors(shape, 2, 4))
        for master, live in ((apart, torch.empty_like(apart)), (shared, shared)):
            table = sweeps.Table([Slice(shape.region, master, live)])
            table.update("gaussian", [_step(*_seeds(2), step=3)])
            table.low_rank_update([factors], [_step(*_seeds(2), step=4)])
        _assert_same_bits(shared, apart, f"{shape} {dtype}")


def check_digest(sweeps: Sweeps, shape: Shape, dtype: torch.dtype) -> None:
    buffer = _poisoned_buffer(shape, dtype)
    view = _view(buffer, shape)
    view.copy_(_values(shape, torch.float32))
    expected = noise.digest(_bits(view), shape.region)
    assert sweeps.Table([Slice(shape.region, None, view)]).digests(live=True) == [expected]
    if dtype is not torch.float16:  # which no master is
        master = view.contiguous()
        assert sweeps.Table([Slice(shape.region, master, view)]).digests() == [expected]


def check_shards(sweeps: Sweeps, kind: NoiseKind) -> None:
    whole = Shape(8, 100, 2**33 + 3, 100)
    rows = [Shape(2, 100, whole.start + 200 * part, 100) for part in range(4)]
    columns = [Shape(8, 25, whole.start + 25 * part, 100) for part in range(4)]
    master = _values(whole, torch.float32)
    live = torch.empty_like(master)
    table = sweeps.Table([Slice(whole.region, master, live)])
    table.perturb(kind, [Draw(SEED, 1.0)])
    for shards, dimension in ((rows, 0), (columns, 1)):
        parts = [part.contiguous() for part in master.chunk(4, dimension)]
        lives = [torch.empty_like(part) for part in parts]
        of_shards = sweeps.Table(
            [
                Slice(shard.region, part, shard_live)
                for part, shard_live, shard in zip(parts, lives, shards, strict=True)
            ]
        )
        of_shards.perturb(kind, [Draw(SEED, 1.0)])
        _assert_same_bits(torch.cat(lives, dimension), live, f"four parts of dimension {dimension}")
        assert sum(of_shards.digests(live=True)) % 2**64 == table.digests(live=True)[0]


def check_low_rank_shards(sweeps: Sweeps) -> None:
    start, columns = 2**33 + 3, 100
    master = _values(Shape(8, columns, start, columns), torch.bfloat16)
    left, right = _factors(Shape(8, columns, start, columns), 2, 4)

    def updated(rows: slice, within_row: slice) -> torch.Tensor:
        shard = master[rows, within_row].clone(memory_format=torch.contiguous_format)
        first = start + rows.start * columns + within_row.start
        region = TensorRegion(NAME, first, columns)
        factors = Factors(left[:, rows].contiguous(), right[:, :, within_row].contiguous())
        table = sweeps.Table([Slice(region, shard, torch.empty_like(shard))])
        table.low_rank_update([factors], [_step([0, 1], [0.1, -0.2], step=3)])
        return shard

    all_rows, all_columns = slice(0, 8), slice(0, columns)
    whole = updated(all_rows, all_columns)
    by_rows = [updated(slice(row, row + 2), all_columns) for row in range(0, 8, 2)]
    by_columns = [updated(all_rows, slice(column, column + 25)) for column in range(0, 100, 25)]
    _assert_same_bits(torch.cat(by_rows, 0), whole, "four shards of rows")
    _assert_same_bits(torch.cat(by_columns, 1), whole, "four shards of columns")


def check_empty_slices(sweeps: Sweeps) -> None:
    for shape, stored, served in product(EMPTY_SLICES, MASTERS, LIVES):
        for kind in KINDS:
            check_perturb(sweeps, shape, kind, stored, served)
            check_update(sweeps, shape, kind, stored, served, 1)
        check_low_rank_update(sweeps, shape, stored, served, 1, 4)
        check_digest(sweeps, shape, served)


def check_nothing_is_fused(sweeps: Sweeps) -> None:
    """A fused multiply-add would round once where two roundings are specified."""
    shape = Shape(1, 4096, 0, 0)
    master = _values(shape, torch.float32)
    expected = _perturbed(master, shape, "gaussian", 0.1)
    exact_product = np.float64(np.float32(0.1)) * _noise("gaussian", SEED, shape)
    fused = (master.numpy() + exact_product).astype(np.float32)
    assert (fused != expected.numpy()).any()
    live = torch.empty_like(master)
    sweeps.Table([Slice(shape.region, master, live)]).perturb("gaussian", [Draw(SEED, 0.1)])
    _assert_same_bits(live, expected, "live")


def check_a_step_without_seeds_changes_nothing(sweeps: Sweeps) -> None:
    """Not even the sign of a zero, alone or between others."""
    idle, small = _step([], [], step=1, decay=1.0), _step([SEED], [0.0], step=2, decay=1.0)
    for stored, others in product(MASTERS, ([], [small])):
        found = []
        for updates in ([*others], [idle, *others, idle]):
            master = torch.full((8, 8), -0.0, dtype=stored)
            live = torch.ones(8, 8, dtype=torch.bfloat16)
            table = sweeps.Table([Slice(TensorRegion(NAME, 0, 8), master, live)])
            table.update("gaussian", updates)
            _assert_same_bits(live, master.to(torch.bfloat16), "live")
            found.append(master)
        _assert_same_bits(found[1], found[0], f"master {stored}")
        assert others or found[0].signbit().all()


def check_infinities_and_nan_survive(sweeps: Sweeps) -> None:
    for stored in MASTERS:
        master = torch.tensor([[float("inf"), -float("inf"), float("nan")]] * 50, dtype=stored)
        live = torch.zeros_like(master, dtype=torch.bfloat16)
        wanted = master.float().clone()
        region = TensorRegion(NAME, 0, 3)
        table = sweeps.Table([Slice(region, master, live)])
        table.perturb("gaussian", [Draw(SEED, 0.1)])
        torch.testing.assert_close(live.float(), wanted, equal_nan=True, rtol=0, atol=0)
        table.update("gaussian", [_step([], [], step=1, decay=1.0)])
        torch.testing.assert_close(master.float(), wanted, equal_nan=True, rtol=0, atol=0)
        torch.testing.assert_close(live.float(), wanted, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", (*SLICES, LONG_SLICE))
def test_numba_perturb_is_the_specification(shape: Shape, kind: NoiseKind) -> None:
    for stored, served in product(MASTERS, LIVES):
        check_perturb(sweeps_numba, shape, kind, stored, served)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", (*SLICES, LONG_SLICE))
def test_numba_update_is_the_specification(shape: Shape, kind: NoiseKind) -> None:
    for stored, served, count in product(MASTERS, LIVES, (0, 1, 3)):
        check_update(sweeps_numba, shape, kind, stored, served, count)


@pytest.mark.parametrize("kind", KINDS)
def test_numba_update_takes_64_seeds(kind: NoiseKind) -> None:
    for stored in MASTERS:
        check_update(sweeps_numba, SLICES[2], kind, stored, torch.bfloat16, 64)


@pytest.mark.parametrize("rank", [1, 4, 8, 11])
@pytest.mark.parametrize("shape", (*SLICES, LONG_SLICE, TALL_SLICE))
def test_numba_low_rank_update_is_the_specification(shape: Shape, rank: int) -> None:
    for stored, served, count in product(MASTERS, LIVES, (0, 1, 5)):
        check_low_rank_update(sweeps_numba, shape, stored, served, count, rank)


@pytest.mark.parametrize("kind", KINDS)
def test_numba_fuses_updates_exactly(kind: NoiseKind) -> None:
    for shape in (SLICES[2], TALL_SLICE):
        check_fused_updates(sweeps_numba, shape, kind)
        check_fused_low_rank_updates(sweeps_numba, shape, kind == "gaussian")
    check_many_slices(sweeps_numba, kind)
    check_master_that_is_live(sweeps_numba)


def test_numba_digest_is_the_specification() -> None:
    for shape, dtype in product((*SLICES, LONG_SLICE), LIVES):
        check_digest(sweeps_numba, shape, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_numba_shards_are_slices_of_the_whole(kind: NoiseKind) -> None:
    check_shards(sweeps_numba, kind)


def test_numba_low_rank_shards_are_slices_of_the_whole() -> None:
    check_low_rank_shards(sweeps_numba)


def test_numba_takes_empty_slices() -> None:
    check_empty_slices(sweeps_numba)


def test_numba_fuses_nothing() -> None:
    check_nothing_is_fused(sweeps_numba)


def test_numba_leaves_all_as_it_is_in_a_step_without_seeds() -> None:
    check_a_step_without_seeds_changes_nothing(sweeps_numba)


def test_numba_keeps_infinities_and_nan() -> None:
    check_infinities_and_nan_survive(sweeps_numba)


@pytest.mark.parametrize("kind", FACTOR_KINDS)
def test_numba_draws_factors_of_8_bits(kind: NoiseKind) -> None:
    for shape in (*SLICES, LONG_SLICE):
        check_factors(sweeps_numba, shape, kind)
        check_perturb(sweeps_numba, shape, kind, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_change_results(kind: NoiseKind) -> None:
    threads = numba.get_num_threads()
    try:
        for count in {1, numba.config.NUMBA_NUM_THREADS}:
            numba.set_num_threads(count)
            check_perturb(sweeps_numba, LONG_SLICE, kind, torch.float32, torch.bfloat16)
            check_update(sweeps_numba, LONG_SLICE, kind, torch.bfloat16, torch.float32, 2)
            check_low_rank_update(sweeps_numba, TALL_SLICE, torch.bfloat16, torch.float32, 2, 5)
            check_digest(sweeps_numba, LONG_SLICE, torch.bfloat16)
    finally:
        numba.set_num_threads(threads)


@pytest.mark.parametrize("growth", [2.0**-12, 2.0**-9, 1.5 * 2.0**-8, -(2.0**-12)])
def test_small_updates_survive_on_average(growth: float) -> None:
    """Around 1, bfloat16 values lie 2**-7 (above) or 2**-8 (below) apart."""
    shape = Shape(1, 100_000, 3, 0)
    master = torch.ones(1, shape.columns, dtype=torch.bfloat16)
    live = torch.empty_like(master)
    table = sweeps_numba.Table([Slice(shape.region, master, live)])
    table.update("gaussian", [_step([], [], step=7, decay=1 + growth)])
    mean = float(master.double().mean()) - 1
    assert abs(mean - growth) < 5 * 2.0**-8 / shape.columns**0.5
    assert growth > 2.0**-9 or float(torch.tensor(1 + growth).bfloat16()) == 1.0


def test_layouts_that_would_be_misread_are_refused() -> None:
    master, live = torch.zeros(4, 6), torch.zeros(4, 6)
    region = TensorRegion(NAME, 0, 6)
    bad_pairs = [(master.T, live.T), (master, live[:, :5]), (master, torch.zeros(6, 4).T)]
    for bad_master, bad_live in bad_pairs:
        with pytest.raises(ValueError):
            sweeps_numba.Table([Slice(region, bad_master, bad_live)])
    with pytest.raises(ValueError, match="2 seeds but 1 coefficients"):
        table = sweeps_numba.Table([Slice(region, master, live)])
        table.update("gaussian", [_step([1, 2], [1.0], step=1)])
    with pytest.raises(ValueError, match=f"{NAME} has no master"):
        sweeps_numba.Table([Slice(region, None, live)]).update("gaussian", [])


EIGHT_BITS = torch.zeros(2, 2, 6).char()


@pytest.mark.parametrize(
    ("left", "right", "complaint"),
    [
        (torch.zeros(1, 4, 2), torch.zeros(1, 2, 6), "do not fit a master (4, 6) and 2 seeds"),
        (torch.zeros(2, 4, 2), torch.zeros(2, 3, 6), "do not fit"),
        (torch.zeros(2, 5, 2), torch.zeros(2, 2, 6), "do not fit"),
        (torch.zeros(2, 4, 2), torch.zeros(2, 2, 5), "do not fit"),
        (torch.zeros(2, 4, 0), torch.zeros(2, 0, 6), "do not fit"),
        (torch.zeros(4, 2), torch.zeros(2, 6), "do not fit"),
        (torch.tensor(1.0), torch.tensor(1.0), "do not fit"),
        (torch.zeros(2, 4, 2).double(), EIGHT_BITS, "contiguous int8 on cpu"),
        (torch.zeros(2, 4, 2).char(), EIGHT_BITS.half(), "contiguous int8 on cpu"),
        (torch.zeros(2, 2, 4).char().mT, EIGHT_BITS, "contiguous int8 on cpu"),
        (torch.zeros(2, 4, 2).char(), EIGHT_BITS.repeat(1, 1, 2)[:, :, ::2], "contiguous int8"),
        (torch.zeros(2, 4, 2).char().to("meta"), EIGHT_BITS, "contiguous int8 on cpu"),
        (torch.zeros(2, 4, 257), torch.zeros(2, 257, 6), "do not fit"),
    ],
)
def test_factors_that_do_not_fit_are_refused(
    left: torch.Tensor, right: torch.Tensor, complaint: str
) -> None:
    master = torch.zeros(4, 6)
    shapes = f"factors of shapes {tuple(left.shape)} and {tuple(right.shape)}"
    with pytest.raises(ValueError, match=f"^{re.escape(shapes)}.*{re.escape(complaint)}"):
        table = sweeps_numba.Table([Slice(TensorRegion(NAME, 0, 6), master, master.clone())])
        table.low_rank_update([Factors(left, right)], [_step([1, 2], [1.0, 1.0], step=1)])


def test_cuda_kernels_are_the_specification(tmp_path: Path) -> None:
    """Every check, on the kernels' source as the host's compiler makes functions of it."""
    cuda = HostSweeps(tmp_path)
    ragged = SLICES[2]
    for shape, kind in product(SLICES, FACTOR_KINDS):
        check_factors(cuda, shape, kind)
        check_perturb(cuda, shape, kind, torch.float32, torch.bfloat16)
    for kind, stored, served in product(KINDS, MASTERS, LIVES):
        check_perturb(cuda, ragged, kind, stored, served)
        check_update(cuda, ragged, kind, stored, served, 1)
        check_low_rank_update(cuda, ragged, stored, served, 1, 4)
    for shape, kind, stored in product((*SLICES, LONG_SLICE), KINDS, MASTERS):
        check_perturb(cuda, shape, kind, stored, torch.bfloat16)
        check_update(cuda, shape, kind, stored, torch.float32, 3)
    for shape, stored, rank in product((*SLICES, TALL_SLICE), MASTERS, (4, 5, 8)):
        for count in (0, 3):
            check_low_rank_update(cuda, shape, stored, torch.bfloat16, count, rank)
    for shape, served in product((*SLICES, LONG_SLICE), LIVES):
        check_digest(cuda, shape, served)
    for kind in KINDS:
        check_update(cuda, ragged, kind, torch.float32, torch.bfloat16, 0)
        for shape in (ragged, SLICES[1]):
            check_update(cuda, shape, kind, torch.bfloat16, torch.bfloat16, 64)
            check_fused_updates(cuda, shape, kind)
            check_fused_low_rank_updates(cuda, shape, kind == "gaussian")
        check_shards(cuda, kind)
        check_many_slices(cuda, kind)
    for stored in MASTERS:  # without a decay there is no product by 1
        check_update(cuda, ragged, "gaussian", stored, torch.bfloat16, 1, decay=1.0)
        for count in (1, 3):
            check_low_rank_update(cuda, TALL_SLICE, stored, torch.bfloat16, count, 8, decay=1.0)
    check_master_that_is_live(cuda)
    check_low_rank_shards(cuda)
    check_empty_slices(cuda)
    check_nothing_is_fused(cuda)
    check_infinities_and_nan_survive(cuda)
    check_a_step_without_seeds_changes_nothing(cuda)


def test_cuda_kernels_compile_and_fuse_nothing(tmp_path: Path) -> None:
    """For a GPU, without one: every variant that a run can meet."""
    tilings = {
        *sweeps_cuda.PERTURB.values(),
        *sweeps_cuda.UPDATE.values(),
        *sweeps_cuda.UPDATE_ONCE.values(),
        *sweeps_cuda.LOW_RANK.values(),
    }
    for tiling, stored, aligned in product(tilings, MASTERS, (False, True)):
        variant = sweeps_cuda.Variant(stored, torch.bfloat16, aligned)
        gaussian = int(tiling.block == noise.GAUSSIAN_BLOCK)
        macros = sweeps_cuda._macros(
            tiling, variant, {"GAUSSIAN": gaussian, "RANK": 8, "ONE_STEP": 0}
        )
        cubin = tmp_path / "sweeps.cubin"
        cubin.write_bytes(sweeps_cuda.compile_for("sm_90", macros).code)
        command = [str(CUOBJDUMP), "-sass", str(cubin)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "FADD" in listing
        assert "FFMA" not in listing
