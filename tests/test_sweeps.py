"""The sweeps, numba's and Triton's, against the specification in noise.py, bit for bit.

Checks take a sweeps module. Triton reads TRITON_INTERPRET when it is first imported, and other
tests import it too, so Triton's checks run in processes of their own, which call this module.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import ModuleType

import numba
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from orchestrator import noise, sweeps_numba
from orchestrator.noise import NoiseKind, TensorRegion

NAME = "model.layers.0.mlp.down_proj.weight"
SEED = 0xFEDCBA9876543210
KINDS: tuple[NoiseKind, ...] = ("gaussian", "rademacher")
MASTERS = (torch.float32, torch.bfloat16)
LIVES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Slice:
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
    Slice(1, 1, 0, 0),
    Slice(4, 256, 1024, 2048),
    Slice(3, 131, 1021, 517, left_margin=5, right_margin=3),
    Slice(2, 1500, 2**35 - 700, 8192, right_margin=1),  # a gaussian block passes 2**32 in a row
    Slice(1, 300, 2**39 - 100, 0, left_margin=1),  # and here a rademacher block does
)
LONG_SLICE = Slice(3, 9001, 2**40 + 77, 10_007, left_margin=2)
TALL_SLICE = Slice(21, 1500, 2**33 + 8, 1504, right_margin=4)
EMPTY_SLICES = (
    Slice(1, 0, 3, 0, left_margin=1),
    Slice(3, 0, 8, 8, right_margin=2),
    Slice(0, 5, 8, 8),
    Slice(0, 0, 0, 0),
)


def _values(shape: Slice, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape.rows, shape.columns, generator=generator).to(dtype)


def _poisoned_buffer(shape: Slice, dtype: torch.dtype) -> torch.Tensor:
    width = shape.left_margin + shape.columns + shape.right_margin
    return torch.full((shape.rows, width), float("nan"), dtype=dtype)


def _view(buffer: torch.Tensor, shape: Slice) -> torch.Tensor:
    return buffer[:, shape.left_margin : shape.left_margin + shape.columns]


def _bits(values: torch.Tensor) -> NDArray[np.uint16] | NDArray[np.uint32]:
    unsigned = torch.uint32 if values.dtype is torch.float32 else torch.uint16
    bits: NDArray[np.uint32] = values.contiguous().view(unsigned).numpy()
    return bits


def _assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    different = np.argwhere(_bits(actual) != _bits(expected))
    assert len(different) == 0, f"{what}: {len(different)} differ, first at {different[0]}"


def _noise(kind: NoiseKind, seed: int, shape: Slice) -> NDArray[np.float32]:
    z = np.empty((shape.rows, shape.columns), np.float32)
    for row in range(shape.rows):
        first = shape.start + row * shape.row_stride
        z[row] = noise.draw(kind, seed, NAME, first, shape.columns)
    return z


def _stochastically_rounded(
    values: NDArray[np.float32], step: int, shape: Slice
) -> NDArray[np.float32]:
    bits = np.empty((shape.rows, shape.columns), np.uint16)
    for row in range(shape.rows):
        first = shape.start + row * shape.row_stride
        bits[row] = noise.rounding_bits(step, NAME, first, shape.columns)
    rounded = (values.view(np.uint32) + bits) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def _perturbed(
    master: torch.Tensor, shape: Slice, kind: NoiseKind, coefficient: float
) -> torch.Tensor:
    z = _noise(kind, SEED, shape)
    return torch.from_numpy(master.float().numpy() + np.float32(coefficient) * z)


def _updated(
    master: torch.Tensor, shape: Slice, kind: NoiseKind, count: int, decay: float, step: int
) -> torch.Tensor:
    seeds, coefficients = _seeds(count)
    noises = [_noise(kind, seed, shape) for seed in seeds]
    return _added(master, shape, noises, coefficients, decay, step)


def _added(
    master: torch.Tensor,
    shape: Slice,
    noises: list[NDArray[np.float32]],
    coefficients: list[float],
    decay: float,
    step: int,
) -> torch.Tensor:
    total = np.zeros((shape.rows, shape.columns), np.float32)
    for coefficient, z in zip(coefficients, noises, strict=True):
        total = total + np.float32(coefficient) * z
    values = master.float().numpy() * np.float32(decay) + total
    if master.dtype is torch.bfloat16:
        values = _stochastically_rounded(values, step, shape)
    return torch.from_numpy(values).to(master.dtype)


def _seeds(count: int) -> tuple[list[int], list[float]]:
    seeds = [(SEED + 0x9E3779B97F4A7C15 * i) % 2**64 for i in range(count)]
    return seeds, [0.01 * (-1) ** i * (1 + i) for i in range(count)]


def _factors(shape: Slice, count: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(count, shape.rows, rank, generator=generator)
    return left, torch.randn(count, rank, shape.columns, generator=generator)


def check_perturb(
    sweeps: ModuleType, shape: Slice, kind: NoiseKind, stored: torch.dtype, served: torch.dtype
) -> None:
    master = _values(shape, stored)
    buffer = _poisoned_buffer(shape, served)
    expected = buffer.clone()
    _view(expected, shape).copy_(_perturbed(master, shape, kind, 0.1))
    before = master.clone()
    live = _view(buffer, shape)
    sweeps.perturb(master, live, shape.region, kind=kind, seed=SEED, coefficient=0.1)
    _assert_same_bits(buffer, expected, f"live of {shape} {kind} {stored} {served}")
    _assert_same_bits(master, before, "master")


def check_update(
    sweeps: ModuleType,
    shape: Slice,
    kind: NoiseKind,
    stored: torch.dtype,
    served: torch.dtype,
    count: int,
) -> None:
    master = _values(shape, stored)
    expected_master = _updated(master, shape, kind, count, decay=0.999, step=2**33 + 5)
    buffer = _poisoned_buffer(shape, served)
    expected = buffer.clone()
    _view(expected, shape).copy_(expected_master)
    seeds, coefficients = _seeds(count)
    sweeps.update(
        master,
        _view(buffer, shape),
        shape.region,
        kind=kind,
        seeds=seeds,
        coefficients=coefficients,
        decay=0.999,
        step=2**33 + 5,
    )
    what = f"{shape} {kind} {stored} {served} n={count}"
    _assert_same_bits(master, expected_master, f"master of {what}")
    _assert_same_bits(buffer, expected, f"live of {what}")


def check_low_rank_update(
    sweeps: ModuleType,
    shape: Slice,
    stored: torch.dtype,
    served: torch.dtype,
    count: int,
    rank: int,
) -> None:
    master = _values(shape, stored)
    left, right = _factors(shape, count, rank)
    noises = [noise.low_rank(left[i].numpy(), right[i].numpy()) for i in range(count)]
    coefficients = _seeds(count)[1]
    expected_master = _added(master, shape, noises, coefficients, decay=0.999, step=2**33 + 5)
    buffer = _poisoned_buffer(shape, served)
    expected = buffer.clone()
    _view(expected, shape).copy_(expected_master)
    sweeps.low_rank_update(
        master,
        _view(buffer, shape),
        shape.region,
        left=left,
        right=right,
        coefficients=coefficients,
        decay=0.999,
        step=2**33 + 5,
    )
    what = f"{shape} {stored} {served} n={count} rank={rank}"
    _assert_same_bits(master, expected_master, f"master of {what}")
    _assert_same_bits(buffer, expected, f"live of {what}")


def check_digest(sweeps: ModuleType, shape: Slice, dtype: torch.dtype) -> None:
    buffer = _poisoned_buffer(shape, dtype)
    view = _view(buffer, shape)
    view.copy_(_values(shape, torch.float32))
    assert sweeps.digest(view, shape.region) == noise.digest(_bits(view), shape.region)


def check_shards(sweeps: ModuleType, kind: NoiseKind) -> None:
    whole = Slice(8, 100, 2**33 + 3, 100)
    rows = [Slice(2, 100, whole.start + 200 * part, 100) for part in range(4)]
    columns = [Slice(8, 25, whole.start + 25 * part, 100) for part in range(4)]
    master = _values(whole, torch.float32)
    live = torch.empty_like(master)
    sweeps.perturb(master, live, whole.region, kind=kind, seed=SEED, coefficient=1.0)
    for shards, dimension in ((rows, 0), (columns, 1)):
        parts = [part.contiguous() for part in master.chunk(4, dimension)]
        lives = [torch.empty_like(part) for part in parts]
        for part, shard_live, shard in zip(parts, lives, shards, strict=True):
            sweeps.perturb(part, shard_live, shard.region, kind=kind, seed=SEED, coefficient=1.0)
        _assert_same_bits(torch.cat(lives, dimension), live, f"four parts of dimension {dimension}")
        digests = [
            sweeps.digest(part, shard.region) for part, shard in zip(lives, shards, strict=True)
        ]
        assert sum(digests) % 2**64 == sweeps.digest(live, whole.region)


def check_low_rank_shards(sweeps: ModuleType) -> None:
    start, columns = 2**33 + 3, 100
    master = _values(Slice(8, columns, start, columns), torch.bfloat16)
    left, right = _factors(Slice(8, columns, start, columns), 2, 4)

    def updated(rows: slice, within_row: slice) -> torch.Tensor:
        shard = master[rows, within_row].clone(memory_format=torch.contiguous_format)
        first = start + rows.start * columns + within_row.start
        sweeps.low_rank_update(
            shard,
            torch.empty_like(shard),
            TensorRegion(NAME, first, columns),
            left=left[:, rows].contiguous(),
            right=right[:, :, within_row].contiguous(),
            coefficients=[0.1, -0.2],
            decay=0.99,
            step=3,
        )
        return shard

    all_rows, all_columns = slice(0, 8), slice(0, columns)
    whole = updated(all_rows, all_columns)
    by_rows = [updated(slice(row, row + 2), all_columns) for row in range(0, 8, 2)]
    by_columns = [updated(all_rows, slice(column, column + 25)) for column in range(0, 100, 25)]
    _assert_same_bits(torch.cat(by_rows, 0), whole, "four shards of rows")
    _assert_same_bits(torch.cat(by_columns, 1), whole, "four shards of columns")


def check_empty_slices(sweeps: ModuleType) -> None:
    for shape, stored, served in product(EMPTY_SLICES, MASTERS, LIVES):
        for kind in KINDS:
            check_perturb(sweeps, shape, kind, stored, served)
            check_update(sweeps, shape, kind, stored, served, 1)
        check_low_rank_update(sweeps, shape, stored, served, 1, 4)
        check_digest(sweeps, shape, served)


def check_nothing_is_fused(sweeps: ModuleType) -> None:
    """A fused multiply-add would round once where two roundings are specified."""
    shape = Slice(1, 4096, 0, 0)
    master = _values(shape, torch.float32)
    expected = _perturbed(master, shape, "gaussian", 0.1)
    exact_product = np.float64(np.float32(0.1)) * _noise("gaussian", SEED, shape)
    fused = (master.numpy() + exact_product).astype(np.float32)
    assert (fused != expected.numpy()).any()
    live = torch.empty_like(master)
    sweeps.perturb(master, live, shape.region, kind="gaussian", seed=SEED, coefficient=0.1)
    _assert_same_bits(live, expected, "live")


def check_infinities_and_nan_survive(sweeps: ModuleType) -> None:
    for stored in MASTERS:
        master = torch.tensor([[float("inf"), -float("inf"), float("nan")]] * 50, dtype=stored)
        live = torch.zeros_like(master, dtype=torch.bfloat16)
        wanted = master.float().clone()
        region = TensorRegion(NAME, 0, 3)
        sweeps.perturb(master, live, region, kind="gaussian", seed=SEED, coefficient=0.1)
        torch.testing.assert_close(live.float(), wanted, equal_nan=True, rtol=0, atol=0)
        sweeps.update(
            master, live, region, kind="gaussian", seeds=[], coefficients=[], decay=1.0, step=1
        )
        torch.testing.assert_close(master.float(), wanted, equal_nan=True, rtol=0, atol=0)
        torch.testing.assert_close(live.float(), wanted, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", (*SLICES, LONG_SLICE))
def test_numba_perturb_is_the_specification(shape: Slice, kind: NoiseKind) -> None:
    for stored, served in product(MASTERS, LIVES):
        check_perturb(sweeps_numba, shape, kind, stored, served)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", (*SLICES, LONG_SLICE))
def test_numba_update_is_the_specification(shape: Slice, kind: NoiseKind) -> None:
    for stored, served, count in product(MASTERS, LIVES, (0, 1, 3)):
        check_update(sweeps_numba, shape, kind, stored, served, count)


@pytest.mark.parametrize("kind", KINDS)
def test_numba_update_takes_64_seeds(kind: NoiseKind) -> None:
    for stored in MASTERS:
        check_update(sweeps_numba, SLICES[2], kind, stored, torch.bfloat16, 64)


@pytest.mark.parametrize("rank", [1, 4, 8, 11])
@pytest.mark.parametrize("shape", (*SLICES, LONG_SLICE, TALL_SLICE))
def test_numba_low_rank_update_is_the_specification(shape: Slice, rank: int) -> None:
    for stored, served, count in product(MASTERS, LIVES, (0, 1, 5)):
        check_low_rank_update(sweeps_numba, shape, stored, served, count, rank)


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


def test_numba_keeps_infinities_and_nan() -> None:
    check_infinities_and_nan_survive(sweeps_numba)


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
    shape = Slice(1, 100_000, 3, 0)
    master = torch.ones(1, shape.columns, dtype=torch.bfloat16)
    live = torch.empty_like(master)
    sweeps_numba.update(
        master,
        live,
        shape.region,
        kind="gaussian",
        seeds=[],
        coefficients=[],
        decay=1 + growth,
        step=7,
    )
    mean = float(master.double().mean()) - 1
    assert abs(mean - growth) < 5 * 2.0**-8 / shape.columns**0.5
    assert growth > 2.0**-9 or float(torch.tensor(1 + growth).bfloat16()) == 1.0


def test_layouts_that_would_be_misread_are_refused() -> None:
    master, live = torch.zeros(4, 6), torch.zeros(4, 6)
    region = TensorRegion(NAME, 0, 6)
    bad_pairs = [(master.T, live.T), (master, live[:, :5]), (master, torch.zeros(6, 4).T)]
    for bad_master, bad_live in bad_pairs:
        with pytest.raises(ValueError):
            sweeps_numba.perturb(
                bad_master, bad_live, region, kind="gaussian", seed=1, coefficient=1.0
            )
    with pytest.raises(ValueError, match="2 seeds but 1 coefficients"):
        sweeps_numba.update(
            master,
            live,
            region,
            kind="gaussian",
            seeds=[1, 2],
            coefficients=[1.0],
            decay=1.0,
            step=1,
        )


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
        (torch.zeros(2, 4, 2).double(), torch.zeros(2, 2, 6), "contiguous float32 on cpu"),
        (torch.zeros(2, 4, 2), torch.zeros(2, 2, 6).half(), "contiguous float32 on cpu"),
        (torch.zeros(2, 2, 4).mT, torch.zeros(2, 2, 6), "contiguous float32 on cpu"),
        (torch.zeros(2, 4, 2), torch.zeros(2, 2, 12)[:, :, ::2], "contiguous float32 on cpu"),
        (torch.zeros(2, 4, 2, device="meta"), torch.zeros(2, 2, 6), "contiguous float32 on cpu"),
    ],
)
def test_factors_that_do_not_fit_are_refused(
    left: torch.Tensor, right: torch.Tensor, complaint: str
) -> None:
    master = torch.zeros(4, 6)
    shapes = f"factors of shapes {tuple(left.shape)} and {tuple(right.shape)}"
    with pytest.raises(ValueError, match=f"^{re.escape(shapes)}.*{re.escape(complaint)}"):
        sweeps_numba.low_rank_update(
            master,
            master.clone(),
            TensorRegion(NAME, 0, 6),
            left=left,
            right=right,
            coefficients=[1.0, 1.0],
            decay=1.0,
            step=1,
        )


def check_triton_interpreted() -> None:
    """Every check, in Triton's interpreter: to be called in a process that interprets."""
    from orchestrator import sweeps_triton  # noqa: PLC0415  only this process may import it

    ragged = SLICES[2]
    for kind, stored, served in product(KINDS, MASTERS, LIVES):
        check_perturb(sweeps_triton, ragged, kind, stored, served)
        check_update(sweeps_triton, ragged, kind, stored, served, 1)
        check_low_rank_update(sweeps_triton, ragged, stored, served, 1, 4)
    for shape, kind, stored in product(SLICES, KINDS, MASTERS):
        check_perturb(sweeps_triton, shape, kind, stored, torch.bfloat16)
        check_update(sweeps_triton, shape, kind, stored, torch.float32, 3)
    for shape, stored, rank in product((*SLICES, TALL_SLICE), MASTERS, (1, 5)):
        for count in (0, 3):
            check_low_rank_update(sweeps_triton, shape, stored, torch.bfloat16, count, rank)
    for shape, served in product(SLICES, LIVES):
        check_digest(sweeps_triton, shape, served)
    for kind in KINDS:
        check_update(sweeps_triton, ragged, kind, torch.float32, torch.bfloat16, 0)
        check_update(sweeps_triton, ragged, kind, torch.bfloat16, torch.bfloat16, 64)
        check_shards(sweeps_triton, kind)
    check_low_rank_shards(sweeps_triton)
    check_empty_slices(sweeps_triton)
    check_nothing_is_fused(sweeps_triton)
    check_infinities_and_nan_survive(sweeps_triton)


def check_triton_compiles() -> None:
    """Compile each kernel for sm_90, without a device, and look for fused multiply-adds."""
    import triton  # noqa: PLC0415  only this process may import it
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    from orchestrator import sweeps_triton  # noqa: PLC0415

    def ptx(kernel: triton.JITFunction, pointers: dict[str, str], **constants: object) -> str:
        signature = {parameter.name: parameter.annotation_type for parameter in kernel.params}
        signature |= {name: pointers[name] for name in kernel.arg_names if name in pointers}
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, signature, constants)
        options = {"enable_fp_fusion": False}
        compiled = triton.compile(source, GPUTarget("cuda", 90, 32), options)
        return str(compiled.asm["ptx"])

    def assert_nothing_is_fused(text: str) -> None:
        assert "add.rn.f32" in text
        assert not re.search(r"\bfma\.|\b(add|mul)\.f32", text)

    tables = {"magnitudes": "*fp32", "seeds": "*u64", "coefficients": "*fp32"}
    for (gaussian, tile), (aligned, master) in product(
        ((True, sweeps_triton.GAUSSIAN_TILE), (False, sweeps_triton.RADEMACHER_TILE)),
        ((False, "*fp32"), (True, "*u16")),
    ):
        pointers = tables | {"master": master, "live": "*u16"}
        for kernel in (sweeps_triton._perturb, sweeps_triton._update):
            assert_nothing_is_fused(
                ptx(kernel, pointers, GAUSSIAN=gaussian, ALIGNED=aligned, TILE=tile)
            )
    factors = {"left": "*fp32", "right": "*fp32", "coefficients": "*fp32"}
    for aligned, master in ((True, "*fp32"), (True, "*u16"), (False, "*u16")):
        assert_nothing_is_fused(
            ptx(
                sweeps_triton._low_rank_update,
                factors | {"master": master, "live": "*u16"},
                RANK=4,
                ALIGNED=aligned,
                ROWS=sweeps_triton.LOW_RANK_ROWS,
                COLUMNS=sweeps_triton.LOW_RANK_COLUMNS,
            )
        )
    digest_pointers = {"values": "*u16", "partial_sums": "*i64"}
    ptx(sweeps_triton._digest, digest_pointers, TILE=sweeps_triton.DIGEST_TILE)


def _run_alone(check: Callable[[], None], **environment: str) -> None:
    here = Path(__file__).parent
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    search_path = os.pathsep.join([str(here), str(here.parent)])
    finished = subprocess.run(
        [sys.executable, "-c", f"import test_sweeps; test_sweeps.{check.__name__}()"],
        env=inherited | {"PYTHONPATH": search_path} | environment,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr


def test_triton_is_the_specification() -> None:
    _run_alone(check_triton_interpreted, TRITON_INTERPRET="1")


def test_triton_compiles_for_cuda_and_fuses_nothing(tmp_path: Path) -> None:
    _run_alone(check_triton_compiles, TRITON_CACHE_DIR=str(tmp_path))
