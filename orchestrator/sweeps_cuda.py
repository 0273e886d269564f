"""Sweeps over slices of parameters on a CUDA device: perturb, update and digest.

Owns the launches: one for all slices of the same formats, whatever their number, driven by a table
of addresses on the device. The kernels, in sweeps.cu, are compiled when they are first needed, a
tenth of a second each; they are CUDA C++ since Triton made two to three times as many instructions
of them. It does not know where slices come from or what seeds and coefficients mean.
"""

import ctypes
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from cuda.bindings import driver
from cuda.core import Device, Program, ProgramOptions

from orchestrator.noise import (
    FACTOR_UNITS,
    GAUSSIAN_BLOCK,
    PHILOX_KEY_STEPS,
    PHILOX_ROUNDS,
    RADEMACHER_BLOCK,
    NoiseKind,
    low_rank_coefficient,
    magnitudes,
    split_words,
    tensor_word,
)
from orchestrator.records import StepUpdate
from orchestrator.sweeps import (
    Draw,
    Factors,
    Slice,
    check_counts,
    check_factors,
    check_layout,
    masters,
)

Macros = tuple[tuple[str, str], ...]
"""Names and values of what sweeps.cu is compiled for."""
SOURCE = Path(__file__).with_name("sweeps.cu")
LANES = 32
EIGHT = 8  # elements that a lane holds at a time; their 16-bit values fill a vector
VECTOR_BYTES = 16
DRAW = np.dtype([("seed", "u8"), ("coefficient", "f4"), ("closing", "i4")])
STEP = np.dtype([("number", "u8"), ("decay", "f4"), ("end", "i4")])
FORMATS = {
    None: "NOTHING",
    torch.float32: "FLOAT32",
    torch.bfloat16: "BFLOAT16",
    torch.float16: "FLOAT16",
    torch.int8: "FACTOR",
}


class Keys(ctypes.Structure):
    """A seed's keys in all rounds: `Keys` in sweeps.cu."""

    _fields_ = [("word", ctypes.c_uint32 * (2 * PHILOX_ROUNDS))]

    def __init__(self, seed: int) -> None:
        keys = [
            (key + number * key_step) % 2**32
            for number in range(PHILOX_ROUNDS)
            for key, key_step in zip(split_words(seed), PHILOX_KEY_STEPS, strict=True)
        ]
        super().__init__((ctypes.c_uint32 * len(keys))(*keys))


class Once(ctypes.Structure):
    """A step with one draw, and the perturbation that follows: `Once` in sweeps.cu."""

    _fields_ = [
        ("draw", Keys),
        ("step", Keys),
        ("then", Keys),
        ("coefficient", ctypes.c_float),
        ("decay", ctypes.c_float),
        ("then_coefficient", ctypes.c_float),
        ("has_then", ctypes.c_int32),
    ]

    def __init__(self, update: StepUpdate, draw: Draw, then: Draw | None) -> None:
        seed, coefficient = (0, 0.0) if then is None else then
        super().__init__(
            Keys(draw.seed),
            Keys(update.step),
            Keys(seed),
            draw.coefficient,
            update.decay,
            coefficient,
            then is not None,
        )


class Field(IntEnum):
    """What the device's table says of a slice, one int64 each: `Slice` in sweeps.cu."""

    MASTER = 0
    LIVE = 1
    ROWS = 2
    COLUMNS = 3
    LIVE_STRIDE = 4
    START = 5
    ROW_STRIDE = 6
    NAME_WORD = 7
    DRAW = 8
    FIRST_PROGRAM = 9
    TILES_A_ROW = 10
    NUM_TILES = 11
    LEFT = 12
    RIGHT = 13
    NUMBER = 14


NUM_FIELDS = 16


class Tiling(NamedTuple):
    """How slices are cut. A tile is a warp's, a program's tiles follow each other."""

    block: int
    """Elements that one block of random words serves; tiles begin where blocks begin."""
    warps: int
    rounds: int
    """Tiles of a warp: it finds out only once which slice is its program's."""
    chunks: int
    """Eights of elements that a lane holds."""
    resident: int = 1
    """Programs that a multiprocessor has room for, at least: bounds their registers."""
    rows: int = 1
    """With one row a tile, slices whose rows are adjacent count as one row."""
    across: int = 0
    """With more, tiles that lie side by side before the next row of them; 0: a whole row."""

    @property
    def columns(self) -> int:
        return LANES * EIGHT * self.chunks


# The fastest of some that were tried on an H200.
PERTURB: dict[NoiseKind, Tiling] = {
    "gaussian": Tiling(GAUSSIAN_BLOCK, warps=8, rounds=4, chunks=2),
    "coarse_gaussian": Tiling(GAUSSIAN_BLOCK, warps=8, rounds=4, chunks=2),
    "rademacher": Tiling(RADEMACHER_BLOCK, warps=8, rounds=4, chunks=2),
}
UPDATE: dict[NoiseKind, Tiling] = {
    "gaussian": Tiling(GAUSSIAN_BLOCK, warps=8, rounds=8, chunks=4),
    "rademacher": Tiling(RADEMACHER_BLOCK, warps=4, rounds=8, chunks=4),
}
# By the master's format too: rounding takes instructions, and 32 bits take bandwidth.
UPDATE_ONCE: dict[tuple[NoiseKind, torch.dtype], Tiling] = {
    ("gaussian", torch.float32): Tiling(GAUSSIAN_BLOCK, warps=8, rounds=2, chunks=2),
    ("gaussian", torch.bfloat16): Tiling(GAUSSIAN_BLOCK, 4, rounds=16, chunks=4, resident=5),
    ("rademacher", torch.float32): Tiling(RADEMACHER_BLOCK, warps=8, rounds=2, chunks=2),
    ("rademacher", torch.bfloat16): Tiling(RADEMACHER_BLOCK, 8, rounds=8, chunks=2, resident=5),
}
DIGEST = Tiling(GAUSSIAN_BLOCK, warps=8, rounds=4, chunks=4)
# Tiles of low-rank noise span rows: what is read of a right factor serves all of them.
LOW_RANK: dict[torch.dtype, Tiling] = {
    torch.float32: Tiling(GAUSSIAN_BLOCK, 4, rounds=8, chunks=1, resident=4, rows=4, across=4),
    torch.bfloat16: Tiling(GAUSSIAN_BLOCK, 4, rounds=8, chunks=1, resident=5, rows=4, across=4),
}


class Variant(NamedTuple):
    """What kernels are compiled for; slices that agree in it share a launch."""

    stored: torch.dtype | None
    served: torch.dtype | None
    aligned: bool


class Kernels(Protocol):
    """Compiled kernels of one variant."""

    def run(self, name: str, num_programs: int, arguments: Sequence[Any]) -> None:
        """Launch a kernel; arguments are addresses (int), or of ctypes, as the kernel has them."""


class Compiler(Protocol):
    """Makes kernels of sweeps.cu with its macros defined."""

    def __call__(self, macros: Macros) -> Kernels: ...


@dataclass(frozen=True, slots=True)
class Launch:
    """Slices that one kernel sweeps over."""

    kernels: Kernels
    indices: tuple[int, ...]
    """The slices' places in the table."""
    fields: torch.Tensor
    """What each slice is: int64 [slices, 16], see Field."""
    owners: torch.Tensor
    """Each program's slice: int32 [programs]."""

    def run(self, name: str, *arguments: Any) -> None:
        addresses = [self.fields.data_ptr(), self.owners.data_ptr()]
        with torch.cuda.device_of(self.fields):  # type: ignore[no-untyped-call]
            self.kernels.run(name, len(self.owners), [*addresses, *arguments])


class Table:
    """See sweeps.Table."""

    def __init__(self, slices: Sequence[Slice], compiler: Compiler | None = None) -> None:
        """`compiler` stands in for the device's own, for tests."""
        for part in slices:
            check_layout(part)
        self._slices = list(slices)
        self._device = slices[0].live.device if slices else torch.device("cuda")
        self._compile = compiler or _compiled
        self._launches: dict[tuple[Any, ...], list[Launch]] = {}

    def perturb(self, kind: NoiseKind, draws: Sequence[Draw]) -> None:
        numbers = self._numbers(draws, [])
        looked_up = _magnitudes(kind, self._device).data_ptr()
        for launched in self._cut(PERTURB[kind], GAUSSIAN=int(kind != "rademacher")):
            launched.run("perturb", numbers.data_ptr(), looked_up)

    def update(
        self, kind: NoiseKind, updates: Sequence[StepUpdate], then: Draw | None = None
    ) -> None:
        stored = {master.dtype for master in masters(self._slices)}
        check_counts(updates)
        # A step that kept no seed is to leave -0.0 as it is, which adding nothing would not.
        updates = [update for update in updates if update.seeds or update.decay != 1]
        draws = [draw for update in updates for draw in _draws(update)]
        looked_up = _magnitudes(kind, self._device).data_ptr()
        if len(draws) == len(stored) == 1:
            once, tiling = Once(updates[0], draws[0], then), UPDATE_ONCE[kind, stored.pop()]
            macros = {"GAUSSIAN": int(kind != "rademacher")}
            for launched in self._cut(tiling, DECAYS=int(once.decay != 1), **macros):
                launched.run("update_once", once, looked_up)
            return
        thens = [] if then is None else [then]
        numbers = self._numbers([*draws, *thens], updates, _closings(updates))
        steps = numbers.data_ptr() + DRAW.itemsize * (len(draws) + len(thens))
        counts = ctypes.c_int32(len(draws)), ctypes.c_int32(len(thens))
        for launched in self._cut(UPDATE[kind], GAUSSIAN=int(kind != "rademacher")):
            launched.run("update", numbers.data_ptr(), steps, *counts, looked_up)

    def low_rank_update(self, factors: Sequence[Factors], updates: Sequence[StepUpdate]) -> None:
        check_counts(updates)
        pairs = [
            pair
            for update in updates
            for pair in zip(update.seeds, update.coefficients, strict=True)
        ]
        stored = masters(self._slices)
        for master, held in zip(stored, factors, strict=True):
            check_factors(master, held, len(pairs))
        ranks = {held.left.shape[2] for held in factors}
        if len(ranks) > 1:
            raise ValueError(f"factors of several ranks: {sorted(ranks)}")
        for rank in ranks if updates else ():
            units = FACTOR_UNITS**2  # of products, as the kernel has them
            draws = [
                Draw(seed, float(low_rank_coefficient(value, rank)) / units)
                for seed, value in pairs
            ]
            numbers = self._numbers(draws, updates)
            steps = numbers.data_ptr() + DRAW.itemsize * len(draws)
            counts = ctypes.c_int32(len(draws)), ctypes.c_int32(len(updates))
            once = Once(updates[0], draws[0] if draws else Draw(0, 0.0), None)
            macros = {
                "RANK": rank,
                "ONE_STEP": int(len(updates) == 1),
                "ONE_DRAW": int(len(updates) == len(draws) == 1),
                "DECAYS": int(any(update.decay != 1 for update in updates)),
            }
            for launched in self._cut(LOW_RANK[stored[0].dtype], **macros):
                self._point_at(launched, factors)
                launched.run("low_rank_update", numbers.data_ptr(), steps, *counts, once)

    def digests(self, *, live: bool = False) -> list[int]:
        if not live:
            masters(self._slices)
        sums = torch.zeros(len(self._slices), dtype=torch.int64, device=self._device)
        for launched in self._cut(DIGEST, DIGEST_LIVE=int(live)):
            launched.run("digest", sums.data_ptr())
        return [total % 2**64 for total in sums.tolist()]

    def _point_at(self, launched: Launch, factors: Sequence[Factors]) -> None:
        """Tell the device where the factors are."""
        chosen = [factors[index] for index in launched.indices]
        addresses = [[pair.left.data_ptr(), pair.right.data_ptr()] for pair in chosen]
        launched.fields[:, Field.LEFT : Field.RIGHT + 1] = _sent(
            np.array(addresses, np.int64), self._device
        )

    def _cut(self, tiling: Tiling, **macros: int) -> list[Launch]:
        key = tiling, *macros.items()
        if key not in self._launches:
            groups = defaultdict(list)
            for index, part in enumerate(self._slices):
                if part.live.numel():
                    groups[_variant(part, tiling)].append(index)
            self._launches[key] = [
                self._launch(tiling, variant, indices, macros)
                for variant, indices in groups.items()
            ]
        return self._launches[key]

    def _launch(
        self, tiling: Tiling, variant: Variant, indices: list[int], macros: dict[str, int]
    ) -> Launch:
        rows: list[list[int]] = []
        counts: list[int] = []
        for index in indices:
            fields, count = _described(self._slices[index], tiling, variant.aligned)
            fields[Field.NUMBER], fields[Field.FIRST_PROGRAM] = index, sum(counts)
            rows.append(fields)
            counts.append(count)
        owners = np.repeat(np.arange(len(indices), dtype=np.int32), counts)
        with torch.cuda.device_of(self._slices[0].live):  # type: ignore[no-untyped-call]
            kernels = self._compile(_macros(tiling, variant, macros))
        described = _sent(np.array(rows, np.int64), self._device)
        return Launch(kernels, tuple(indices), described, _sent(owners, self._device))

    def _numbers(
        self, draws: Sequence[Draw], updates: Sequence[StepUpdate], closings: Sequence[int] = ()
    ) -> torch.Tensor:
        """The draws, of which the first close steps, then the updates' steps, as the kernels read
        them: uint8, in one transfer."""
        drawn, steps = np.zeros(len(draws), DRAW), np.zeros(len(updates), STEP)
        drawn["seed"] = [draw.seed for draw in draws]
        drawn["coefficient"] = [draw.coefficient for draw in draws]
        drawn["closing"][: len(closings)] = closings
        steps["number"] = [update.step for update in updates]
        steps["decay"] = [update.decay for update in updates]
        steps["end"] = np.cumsum([len(update.seeds) for update in updates])
        return _sent(np.frombuffer(drawn.tobytes() + steps.tobytes(), np.uint8), self._device)


def compile_for(architecture: str, macros: Macros) -> Any:
    """The kernels' machine code, such as for "sm_90": cuda.core's ObjectCode."""
    options = ProgramOptions(
        arch=architecture,
        std="c++17",
        fma=False,
        define_macro=list(macros),
        include_path=str(SOURCE.parent),
    )
    return Program(SOURCE.read_text(encoding="utf-8"), "c++", options).compile("cubin")


class DeviceKernels:
    """Kernels that NVRTC has compiled for the device in use."""

    def __init__(self, macros: Macros) -> None:
        device = Device(torch.cuda.current_device())
        device.set_current()
        compiled = compile_for(f"sm_{device.arch}", macros)
        self._kernel = cache(lambda name: int(compiled.get_kernel(name).handle))
        self._threads = LANES * int(dict(macros)["WARPS"])

    def run(self, name: str, num_programs: int, arguments: Sequence[Any]) -> None:
        # cuda.core's own `launch` takes no structures.
        values = as_passed(arguments)
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        stream = torch.cuda.current_stream().cuda_stream
        (result,) = driver.cuLaunchKernel(
            self._kernel(name),
            *(num_programs, 1, 1),
            *(self._threads, 1, 1),
            0,
            stream,
            ctypes.addressof(addresses),
            0,
        )
        if result != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"launching {name}: {result.name}")


def as_passed(arguments: Sequence[Any]) -> list[Any]:
    """Arguments as C takes them: addresses become pointers."""
    return [ctypes.c_void_p(value) if isinstance(value, int) else value for value in arguments]


@cache
def _compiled_on(device: int, macros: Macros) -> Kernels:
    with torch.cuda.device(device):
        return DeviceKernels(macros)


def _compiled(macros: Macros) -> Kernels:
    return _compiled_on(torch.cuda.current_device(), macros)


def _macros(tiling: Tiling, variant: Variant, others: dict[str, int]) -> Macros:
    values = {
        "STORED": FORMATS[variant.stored],
        "SERVED": FORMATS[variant.served],
        "ALIGNED": int(variant.aligned),
        "WARPS": tiling.warps,
        "ROUNDS": tiling.rounds,
        "CHUNKS": tiling.chunks,
        "RESIDENT": tiling.resident,
        "ROWS_A_TILE": tiling.rows,
        "GAUSSIAN": 1,
        "RANK": 1,
        "TILES_ACROSS": tiling.across,
        "ONE_STEP": 0,
        "ONE_DRAW": 0,
        "DECAYS": 1,
        "DIGEST_LIVE": 0,
    }
    return tuple((name, str(value)) for name, value in (values | others).items())


def _draws(update: StepUpdate) -> list[Draw]:
    """A step's draws; for a step without any, one that adds nothing."""
    draws = [Draw(*pair) for pair in zip(update.seeds, update.coefficients, strict=True)]
    return draws or [Draw(0, 0.0)]


def _closings(updates: Sequence[StepUpdate]) -> list[int]:
    """Per draw, the number of the step that it is the last of, or -1."""
    return [
        number if draw == len(_draws(update)) - 1 else -1
        for number, update in enumerate(updates)
        for draw in range(len(_draws(update)))
    ]


def _variant(part: Slice, tiling: Tiling) -> Variant:
    is_live_master = part.master is not None and part.live.data_ptr() == part.master.data_ptr()
    return Variant(
        stored=None if part.master is None else part.master.dtype,
        served=None if is_live_master else part.live.dtype,
        aligned=_is_aligned(part, tiling),
    )


def _shape(part: Slice, tiling: Tiling) -> tuple[int, int]:
    rows, columns = part.live.shape
    is_one_row = part.live.is_contiguous() and part.region.row_stride == columns
    return (1, rows * columns) if is_one_row and tiling.rows == 1 else (rows, columns)


def _is_aligned(part: Slice, tiling: Tiling) -> bool:
    """Whether all rows begin with a block of words and are made of whole vectors."""
    rows, columns = _shape(part, tiling)
    tensors = [part.live] if part.master is None else [part.live, part.master]
    begins = [part.region.start, *([part.region.row_stride] if rows > 1 else [])]
    widths = [columns, *([part.live.stride(0)] if rows > 1 else [])]
    return (
        all(begin % tiling.block == 0 for begin in begins)
        and all(width % EIGHT == 0 for width in widths)
        and all(tensor.data_ptr() % VECTOR_BYTES == 0 for tensor in tensors)
    )


def _described(part: Slice, tiling: Tiling, aligned: bool) -> tuple[list[int], int]:
    """A slice's fields, and the number of its programs."""
    rows, columns = _shape(part, tiling)
    reach = columns if aligned else columns + tiling.block - 1  # a tile may begin before its row
    across, down = -(-reach // tiling.columns), -(-rows // tiling.rows)
    if tiling.across:  # whole bands of tiles, side by side
        across = -(-across // tiling.across) * tiling.across
    fields = [0] * NUM_FIELDS
    fields[Field.MASTER] = 0 if part.master is None else part.master.data_ptr()
    fields[Field.LIVE] = part.live.data_ptr()
    fields[Field.ROWS] = rows
    fields[Field.COLUMNS] = columns
    fields[Field.LIVE_STRIDE] = part.live.stride(0)
    fields[Field.START] = part.region.start
    fields[Field.ROW_STRIDE] = part.region.row_stride
    fields[Field.NAME_WORD] = tensor_word(part.region.name)
    fields[Field.DRAW] = part.draw
    fields[Field.TILES_A_ROW], fields[Field.NUM_TILES] = across, across * down
    return fields, -(-across * down // (tiling.warps * tiling.rounds))


def _sent(values: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """Numbers on the device, without waiting for it."""
    tensor = torch.from_numpy(values.copy())
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@cache
def _magnitudes(kind: NoiseKind, device: torch.device) -> torch.Tensor:
    """The bits of the magnitudes, int32 [1024]."""
    return torch.from_numpy(magnitudes(kind).view(np.int32).copy()).to(device)
