"""The adapters' kernels against plain sums in float64, in Triton's interpreter; how rows are cut.

Triton reads TRITON_INTERPRET when it is first imported, and other tests import it too, so checks
that launch kernels run in processes of their own, which call this module. On a GPU, tests/gpu calls
them without the interpreter.
"""

from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from triton_process import run_alone

SCALINGS = [2.0, 0.5, -1.0, 1.0]
POISONED = 3  # a slot that no row names


class Batch(NamedTuple):
    lengths: tuple[int, ...]
    slots: tuple[int, ...]


SEGMENTS = Batch((70, 60, 5, 131, 1), (0, 0, -1, 2, 1))
INTERLEAVED = Batch((1,) * 9 + (20,) + (1,) * 3, (0, 1, 0, -1, 2, 2, 2, -1, 1, 0, 1, 0, -1))
PLAIN = Batch((3, 80), (-1, -1))


class Shape(NamedTuple):
    """Of a module: its inputs, how many of them a split takes, and what each slice puts out."""

    inputs: int
    split: int
    outputs: tuple[int, ...]


SHAPES = (
    Shape(256, 4096, (128,)),
    Shape(400, 128, (130,)),
    Shape(96, 4096, (128, 64, 64)),
    Shape(133, 64, (130, 7, 48)),
    Shape(64, 4096, (144, 144)),
)
RANKS = (1, 4, 8, 16, 64)
# Relative and absolute. What shrink gives is rounded to bfloat16 too; the interpreter cuts it off.
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (4e-2, 1.5e-1)}


class Case:
    """A module's tensors, with NaN wherever nothing may be read, and what must come out."""

    def __init__(self, batch: Batch, shape: Shape, rank: int, dtype: torch.dtype) -> None:
        self.dtype, self.rank = dtype, rank
        inputs, _, widths = shape
        self.bounds = [0, *accumulate(widths)]
        torch.manual_seed(0)
        rows, num_slots = sum(batch.lengths), len(SCALINGS)
        x = torch.randn(rows, inputs)
        a = torch.randn(num_slots, len(widths) * rank, inputs) / inputs**0.5
        b = torch.randn(num_slots, sum(widths), rank) / rank**0.5
        a[POISONED], b[POISONED] = float("nan"), float("nan")
        slot_of_row = torch.tensor(batch.slots).repeat_interleave(torch.tensor(batch.lengths))
        self.plain = slot_of_row < 0
        x[self.plain] = float("nan")
        self.x, self.a, self.b = x.to(dtype), a.to(dtype), b.to(dtype)
        self.output = torch.randn(rows, sum(widths)).to(dtype)
        self.expected = self._expected(slot_of_row)

    def _expected(self, slot_of_row: torch.Tensor) -> torch.Tensor:
        """float64 [rows, outputs]."""
        expected = self.output.double()
        for row, slot in enumerate(slot_of_row.tolist()):
            if slot < 0:
                continue
            reduced = self.a[slot].double() @ self.x[row].double()
            for position, (first, end) in enumerate(
                zip(self.bounds, self.bounds[1:], strict=False)
            ):
                ranks = slice(position * self.rank, (position + 1) * self.rank)
                share = self.b[slot, first:end].double() @ reduced[ranks].to(self.dtype).double()
                expected[row, first:end] += SCALINGS[slot] * share
        return expected

    def assert_close(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        relative, absolute = TOLERANCES[self.dtype]
        torch.testing.assert_close(found.cpu().double(), expected, rtol=relative, atol=absolute)


def check_products(device: str, batch: Batch, rank: int, dtype: torch.dtype) -> None:
    """Shrink, expand and the activation, over all shapes of modules."""
    from orchestrator import adapter_kernels_triton as kernels  # noqa: PLC0415  as above

    def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    for shape in SHAPES:
        case = Case(batch, shape, rank, dtype)
        tiles = kernels.cut_rows(batch.lengths, batch.slots, SCALINGS)
        tiles = tiles._replace(table=tiles.table.to(device))
        x, a, b = case.x.to(device), case.a.to(device), case.b.to(device)
        output = poisoned(len(x) + 2, b.shape[1], dtype=dtype, device=x.device)
        output[1:-1] = case.output
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", poisoned)
            parts = kernels.shrink(x, a, tiles, inputs_per_split=shape.split)
            slices = tuple(
                kernels.Slice(i, case.bounds[i], case.bounds[i + 1])
                for i in range(len(case.bounds) - 1)
            )
            if len(slices) == 2:
                gate, up = case.expected.chunk(2, -1)
                found = kernels.expand_and_activate(parts, b, output[1:-1], tiles)
                case.assert_close(found, torch.nn.functional.silu(gate) * up)
            trained = slices[::2] if len(slices) == 3 else slices
            kernels.expand(parts, b, output[1:-1], tiles, trained)
        assert (len(parts) > 1) == (shape.split < shape.inputs)
        assert output[[0, -1]].isnan().all()
        found = output[1:-1].cpu()
        assert torch.equal(found[case.plain], case.output[case.plain])
        for part in slices:
            columns = slice(part.first, part.end)
            if part in trained:
                case.assert_close(found[:, columns], case.expected[:, columns])
            else:
                assert torch.equal(found[:, columns], case.output[:, columns])


def check_interpreted() -> None:
    _mend_interpreted_bfloat16()
    for rank in RANKS:
        check_products("cpu", SEGMENTS, rank, torch.float32)
    for rank in (8, 64):
        check_products("cpu", SEGMENTS, rank, torch.bfloat16)
    for batch in (INTERLEAVED, PLAIN):
        check_products("cpu", batch, 8, torch.float32)


def _mend_interpreted_bfloat16() -> None:
    """The interpreter keeps bfloat16 as integers of the same bits, and multiplies these."""
    from triton.runtime import interpreter  # noqa: PLC0415  only this process may import it

    builder: Any = interpreter.InterpreterBuilder
    original = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return original(self, *(_widened(operand) for operand in (a, b)), *others)

    def _widened(operand: Any) -> Any:
        if operand.dtype.scalar.name != "bf16":
            return operand
        bits = torch.from_numpy(operand.data.astype("int32")) << 16
        return interpreter.TensorHandle(bits.view(torch.float32).numpy(), interpreter.tl.float32)

    builder.create_dot = create_dot


def check_compiles() -> None:
    """For sm_90, without a device: tensor cores, and memory in vectors of 16 bytes."""
    import triton  # noqa: PLC0415  only this process may import it
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    from orchestrator import adapter_kernels_triton as kernels  # noqa: PLC0415

    pointers = dict.fromkeys(("x", "factors", "output", "gate_up", "activated"), "*bf16")
    pointers |= {"parts": "*fp32", "row_tiles": "*i32", "column_tiles": "*i32"}

    def ptx(kernel: Any, launch: Any, **constants: object) -> str:
        signature = {parameter.name: parameter.annotation_type for parameter in kernel.params}
        signature |= {name: pointers[name] for name in kernel.arg_names if name in pointers}
        signature |= dict.fromkeys(constants, "constexpr")
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(kernel.arg_names)
            if name in pointers
        }
        options = {"num_warps": launch.warps, "num_stages": launch.stages}
        target = GPUTarget("cuda", 90, 32)
        source = ASTSource(kernel, signature, constants, aligned)
        return str(triton.compile(source, target, options).asm["ptx"])

    widths = {"WIDTH": 24, "BLOCK_ROWS": kernels.TILE_ROWS}
    text = ptx(
        kernels._shrink,
        kernels.SHRINK,
        INPUTS=4096,
        SPLIT=4096,
        NUM_SPLITS=1,
        WIDTH_TILES=1,
        BLOCK_WIDTH=32,
        BLOCK_INPUTS=kernels.SHRINK.block // 2,
        **widths,
    )
    assert "mma" in text and "cp.async.cg.shared.global" in text
    ranks = {"RANK": 8, "PADDED_RANK": 16, "NUM_SPLITS": 1}
    for kernel, launch, sizes in (
        (kernels._expand, kernels.EXPAND, {"OUTPUTS": 6144, "ALIGNED": True}),
        (kernels._expand_and_activate, kernels.ACTIVATE, {"INNER": 14336}),
    ):
        text = ptx(kernel, launch, BLOCK_COLUMNS=launch.block, **sizes, **ranks, **widths)
        assert "mma" in text and "ld.global.v4" in text and "st.global.v4" in text
        assert "st.global.b16" not in text


@pytest.mark.slow
def test_products_are_the_plain_sums() -> None:
    run_alone(check_interpreted, TRITON_INTERPRET="1")


def test_kernels_compile_for_cuda(tmp_path: Path) -> None:
    run_alone(check_compiles, TRITON_CACHE_DIR=str(tmp_path))


def test_neighbours_under_a_slot_are_cut_together() -> None:
    from orchestrator.adapter_kernels_triton import cut_rows  # noqa: PLC0415

    tiles = cut_rows([3, 5, 2, 0, 9, 1], [1, 1, -1, 0, 1, 0], [2.0, 0.5], tile_rows=4)
    scalings = tiles.table[:, 3].view(torch.float32).tolist()
    rows = [
        [*row[:3], scaling] for row, scaling in zip(tiles.table.tolist(), scalings, strict=True)
    ]
    assert rows[: tiles.num_adapted] == [
        [0, 4, 1, 0.5],
        [4, 4, 1, 0.5],
        [10, 4, 1, 0.5],
        [14, 4, 1, 0.5],
        [18, 1, 1, 0.5],
        [19, 1, 0, 2.0],
    ]
    assert rows[tiles.num_adapted :] == [[8, 2, -1, 0.0]]
    assert tiles.num_tiles == len(rows)


def test_only_slices_without_a_target_are_left_out() -> None:
    from orchestrator.adapter_kernels import _trained_members  # noqa: PLC0415

    for targets, trained in (
        ({"q_proj", "v_proj", "fc1"}, (0, 2)),
        ({"k_proj"}, (1,)),
        ({"qkv_proj", "q_proj"}, (0, 1, 2)),
        ({"o_proj"}, (0, 1, 2)),
        ({"all"}, (0, 1, 2)),
    ):
        assert _trained_members("qkv_proj", targets) == trained
