"""What the adapters' kernels take on a GPU, beside SGLang's own and a plain copy.

    python -m benchmarks.adapter_kernels [llama-3-8b | opt-13b]

Random tensors of a model's modules in bfloat16, 16 slots of rank 8 under 1,024 neighbouring rows
each, as 256 requests. For every kernel: the median of its launches, the bytes that it cannot do
without over that time, and their share of a device copy's rate. First SGLang's kernels and ours as
the engine launches them, with what they add up to over a model's layers; then ours launched
otherwise, by which the constants in `adapter_kernels_triton` were chosen.
"""

import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

from orchestrator import dist_patch, environment

environment.prepare(threads=2)

import torch  # noqa: E402

dist_patch.apply("cuda")

from sglang.kernels.ops.gemm.gate_up_lora_b import gate_up_lora_b_fwd  # noqa: E402
from sglang.kernels.ops.gemm.qkv_lora_b import qkv_lora_b_fwd  # noqa: E402
from sglang.kernels.ops.gemm.sgemm_lora_a import sgemm_lora_a_fwd  # noqa: E402
from sglang.kernels.ops.gemm.sgemm_lora_b import sgemm_lora_b_fwd  # noqa: E402
from sglang.srt.layers.activation import silu_and_mul  # noqa: E402
from sglang.srt.lora.utils import LoRABatchInfo  # noqa: E402

from orchestrator.adapter_kernels_triton import (  # noqa: E402
    TILE_ROWS,
    Launch,
    RowTiles,
    Slice,
    cut_rows,
    expand,
    expand_and_activate,
    shrink,
)

NUM_SLOTS, REQUESTS_PER_SLOT, TOKENS, RANK, SCALING = 16, 16, 64, 8, 2.0
NUM_REQUESTS = NUM_SLOTS * REQUESTS_PER_SLOT
NUM_ROWS = NUM_REQUESTS * TOKENS
NUM_LAUNCHES = 15
QUEUE_CYCLES = 20_000_000  # about ten milliseconds, in which all launches are queued
COPY_BYTES = 2**30


class Module(NamedTuple):
    """A linear module: inputs, and the outputs of each slice that has adapters of its own."""

    name: str
    inputs: int
    slices: tuple[int, ...]


class Model(NamedTuple):
    num_layers: int
    modules: tuple[Module, ...]


MODELS = {
    "llama-3-8b": Model(
        32,
        (
            Module("qkv_proj", 4096, (4096, 1024, 1024)),
            Module("o_proj", 4096, (4096,)),
            Module("gate_up_proj", 4096, (14336, 14336)),
            Module("down_proj", 14336, (4096,)),
        ),
    ),
    "opt-13b": Model(
        40,
        (
            Module("qkv_proj", 5120, (5120, 5120, 5120)),
            Module("out_proj", 5120, (5120,)),
            Module("fc1", 5120, (20480,)),
            Module("fc2", 20480, (5120,)),
        ),
    ),
}
# Rows of a tile, and a launch.
SHRINKS = [
    (64, Launch(256, 4, 3)),
    (64, Launch(256, 4, 6)),
    (64, Launch(512, 4, 3)),
    (64, Launch(256, 8, 4)),
    (32, Launch(256, 4, 4)),
    (32, Launch(512, 4, 4)),
    (128, Launch(256, 8, 4)),
    (128, Launch(256, 4, 4)),
    (16, Launch(512, 4, 4)),
]
EXPANDS = [
    (64, Launch(128, 4, 1)),
    (64, Launch(64, 4, 1)),
    (64, Launch(256, 8, 1)),
    (32, Launch(128, 4, 1)),
    (32, Launch(256, 4, 1)),
    (32, Launch(256, 8, 1)),
    (128, Launch(128, 8, 1)),
    (128, Launch(64, 8, 1)),
    (16, Launch(256, 4, 1)),
]
ACTIVATIONS = [
    (64, Launch(64, 4, 1)),
    (64, Launch(64, 8, 1)),
    (32, Launch(128, 4, 1)),
    (32, Launch(128, 8, 1)),
    (32, Launch(256, 8, 1)),
    (128, Launch(64, 8, 1)),
]
SPLITS = [2048, 8192, 1 << 20]


class Tensors:
    """A module's input, output and factors; shrink's parts are ours."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.width = len(module.slices) * RANK
        outputs = sum(module.slices)
        self.x = self._random(NUM_ROWS, module.inputs)
        self.a = self._random(NUM_SLOTS, self.width, module.inputs) / math.sqrt(module.inputs)
        self.b = self._random(NUM_SLOTS, outputs, RANK)
        self.output = self._random(NUM_ROWS, outputs)
        bounds = [0, *accumulate(module.slices)]
        self.bounds = torch.tensor(bounds, dtype=torch.int32, device="cuda")
        self.slices = tuple(Slice(i, bounds[i], bounds[i + 1]) for i in range(len(module.slices)))
        self.parts = shrink(self.x, self.a, tiles(TILE_ROWS))

    @staticmethod
    def _random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda")

    @property
    def shrink_bytes(self) -> int:
        return 2 * (self.x.numel() + self.a.numel()) + 4 * NUM_ROWS * self.width

    def expand_bytes(self, slices: tuple[Slice, ...]) -> int:
        columns = sum(part.end - part.first for part in slices)
        return 2 * columns * (2 * NUM_ROWS + NUM_SLOTS * RANK) + 4 * NUM_ROWS * len(slices) * RANK

    @property
    def activation_bytes(self) -> int:
        adapters = 2 * self.b.numel() + 4 * NUM_ROWS * self.width
        return 3 * int(self.output.numel()) + adapters  # reads all, writes half of it


def tiles(tile_rows: int) -> RowTiles:
    slots = [request // REQUESTS_PER_SLOT for request in range(NUM_REQUESTS)]
    cut = cut_rows([TOKENS] * NUM_REQUESTS, slots, [SCALING] * NUM_SLOTS, tile_rows)
    return cut._replace(table=cut.table.cuda())


def sglang_batch() -> Any:
    """The same batch as SGLang describes it: a segment a request."""
    lengths = torch.full((NUM_REQUESTS,), TOKENS, dtype=torch.int32, device="cuda")
    ends = torch.zeros(NUM_REQUESTS + 1, dtype=torch.int32, device="cuda")
    ends[1:] = lengths.cumsum(0)
    slots = torch.arange(NUM_SLOTS, dtype=torch.int32, device="cuda")
    return LoRABatchInfo(
        use_cuda_graph=False,
        bs=NUM_REQUESTS,
        num_segments=NUM_REQUESTS,
        seg_indptr=ends,
        weight_indices=slots.repeat_interleave(REQUESTS_PER_SLOT),
        lora_ranks=torch.full((NUM_SLOTS,), RANK, dtype=torch.int64, device="cuda"),
        scalings=torch.full((NUM_SLOTS,), SCALING, device="cuda"),
        max_len=TOKENS,
        seg_lens=lengths,
        permutation=None,
    )


def milliseconds(call: Callable[[], object]) -> float:
    """Median of the launches, queued up so that the host's time does not count."""
    for _ in range(3):
        call()
    make: Any = torch.cuda.Event
    events = [make(enable_timing=True) for _ in range(NUM_LAUNCHES + 1)]
    torch.cuda.synchronize()
    torch.cuda._sleep(QUEUE_CYCLES)  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    pairs = zip(events, events[1:], strict=False)
    return float(statistics.median(first.elapsed_time(second) for first, second in pairs))


class Report:
    """Prints a line a measurement; knows the rate of a copy."""

    def __init__(self) -> None:
        source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        self._copy_rate = 2 * COPY_BYTES / milliseconds(lambda: target.copy_(source))
        print(f"copy: {self._copy_rate / 1e6:.0f} GB/s", flush=True)

    def __call__(self, what: str, num_bytes: int, call: Callable[[], object]) -> float:
        try:
            taken = milliseconds(call)
        except Exception as error:  # a launch that does not fit the device is no candidate
            print(f"{what:58s} {type(error).__name__}: {str(error)[:60]}", flush=True)
            return float("nan")
        rate = num_bytes / taken
        share = rate / self._copy_rate
        print(f"{what:58s} {taken:7.4f} ms {rate / 1e6:6.0f} GB/s {share:5.2f}", flush=True)
        return taken


def sglang_expand(tensors: Tensors, reduced: torch.Tensor, batch: Any) -> torch.Tensor:
    slices = tensors.module.slices
    if len(slices) == 1:
        done = sgemm_lora_b_fwd(reduced, tensors.b, batch, tensors.output)
    elif len(slices) == 2:
        done = gate_up_lora_b_fwd(reduced, tensors.b, batch, slices[0], tensors.output)
    else:
        done = qkv_lora_b_fwd(
            reduced, tensors.b, batch, tensors.bounds, max(slices), tensors.output
        )
    result: torch.Tensor = done
    return result


def largest_difference(tensors: Tensors, batch: Any) -> float:
    """Between our shrink and expand and SGLang's, over the largest value."""
    original = tensors.output.clone()
    reduced = sgemm_lora_a_fwd(tensors.x, tensors.a, batch, stack_num=len(tensors.slices))
    theirs = sglang_expand(tensors, reduced, batch).clone()
    tensors.output.copy_(original)
    expand(tensors.parts, tensors.b, tensors.output, tiles(TILE_ROWS), tensors.slices)
    difference = (tensors.output.float() - theirs.float()).abs().max()
    tensors.output.copy_(original)
    return float(difference / theirs.float().abs().max())


class Totals(NamedTuple):
    """Milliseconds of a layer, SGLang's and ours; ours also with the activation fused."""

    sglang: float
    ours: float
    fused: float


def compare(report: Report, tensors: Tensors, trained: tuple[Slice, ...] | None = None) -> Totals:
    """A module's shrink and expand; only some slices are `trained`, perhaps."""
    name, num_slices = tensors.module.name, len(tensors.slices)
    slices = trained or tensors.slices
    name += "" if trained is None else f", {len(slices)} of {num_slices}"
    batch, rows = sglang_batch(), tiles(TILE_ROWS)
    x, a, b, output = tensors.x, tensors.a, tensors.b, tensors.output
    reduced = sgemm_lora_a_fwd(x, a, batch, stack_num=num_slices)
    shrunk, expanded = tensors.shrink_bytes, tensors.expand_bytes(slices)
    print(f"{name}: largest difference to SGLang's {largest_difference(tensors, batch):.1e}")
    theirs = report(
        f"{name} shrink, SGLang",
        shrunk,
        lambda: sgemm_lora_a_fwd(x, a, batch, stack_num=num_slices),
    ) + report(f"{name} expand, SGLang", expanded, lambda: sglang_expand(tensors, reduced, batch))
    first = report(f"{name} shrink", shrunk, lambda: shrink(x, a, rows))
    second = report(
        f"{name} expand", expanded, lambda: expand(tensors.parts, b, output, rows, slices)
    )
    fused = second
    if name == "gate_up_proj":
        plain = report(
            f"{name} silu * up, SGLang", 3 * output.numel(), lambda: silu_and_mul(output)
        )
        fused = -plain + report(
            f"{name} expand and silu * up",
            tensors.activation_bytes,
            lambda: expand_and_activate(tensors.parts, b, output, rows),
        )
    output.normal_()  # each launch has added to it
    return Totals(theirs, first + second, first + fused)


def print_total(what: str, num_layers: int, parts: list[Totals]) -> None:
    sglang, ours, fused = (num_layers * sum(values) for values in zip(*parts, strict=True))
    print(
        f"{num_layers} layers, {what}: SGLang {sglang:.1f} ms, ours {ours:.1f} ms, with the "
        f"activation fused {fused:.1f} ms more than without adapters",
        flush=True,
    )


def launched_otherwise(report: Report, tensors: Tensors) -> None:
    """Our kernels on one module, launched in other ways than the engine does."""
    name, x, a, b = tensors.module.name, tensors.x, tensors.a, tensors.b
    parts, output, slices = tensors.parts, tensors.output, tensors.slices
    if name == "gate_up_proj":  # its expand is not launched where the activation is fused
        for rows, launch in ACTIVATIONS:
            call = partial(expand_and_activate, parts, b, output, tiles(rows), launch)
            what = f"{name} expand and silu * up, {rows} x {launch}"
            report(what, tensors.activation_bytes, call)
        return
    for rows, launch in SHRINKS:
        call = partial(shrink, x, a, tiles(rows), launch)
        report(f"{name} shrink, {rows} x {launch}", tensors.shrink_bytes, call)
    for inputs in SPLITS:
        call = partial(shrink, x, a, tiles(TILE_ROWS), inputs_per_split=inputs)
        report(f"{name} shrink, {inputs} inputs a split", tensors.shrink_bytes, call)
    for rows, launch in EXPANDS:
        added = partial(expand, parts, b, output, tiles(rows), slices, launch)
        report(f"{name} expand, {rows} x {launch}", tensors.expand_bytes(slices), added)
    output.normal_()


def main(name: str) -> None:
    model = MODELS[name]
    print(f"{torch.cuda.get_device_name()}, {name}, {NUM_ROWS} rows, {NUM_SLOTS} slots of {RANK}")
    report = Report()
    totals = []
    for module in model.modules:
        tensors = Tensors(module)
        totals.append(compare(report, tensors))
        if module.name == "qkv_proj":
            q_and_v = compare(report, tensors, trained=tensors.slices[::2])
            print_total("q_proj and v_proj", model.num_layers, [q_and_v])
        del tensors
    print_total("all linear modules", model.num_layers, totals)
    if name == "llama-3-8b":
        for module in model.modules:
            if module.name != "o_proj":  # as wide as down_proj, and no deeper than qkv_proj
                launched_otherwise(report, Tensors(module))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "llama-3-8b")
