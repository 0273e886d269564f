"""sweeps.cu by the host's compiler: a CUDA device's sweeps, bit for bit, where there is none.

A program is then one warp of one lane, and programs run one after the other.
"""

import ctypes
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from orchestrator import sweeps_cuda
from orchestrator.sweeps import Slice

RUNNER = """
#include "%(source)s"
extern "C" void choose(int program) { current_program = program; }
"""


class HostKernels:
    """Kernels as functions of a shared library."""

    def __init__(self, macros: sweeps_cuda.Macros, folder: Path) -> None:
        chosen = dict(macros) | {"WARPS": "1"}  # tiles of all warps are then the one's rounds
        chosen["ROUNDS"] = str(int(dict(macros)["WARPS"]) * int(dict(macros)["ROUNDS"]))
        library = folder / ("_".join(chosen.values()) + ".so")
        command = ["c++", "-x", "c++", "-O1", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC"]
        command += [f"-D{name}={value}" for name, value in chosen.items()]
        subprocess.run(
            [*command, "-o", str(library), "-"],
            input=RUNNER % {"source": sweeps_cuda.SOURCE},
            text=True,
            check=True,
        )
        self._library = ctypes.CDLL(str(library))

    def run(self, name: str, num_programs: int, arguments: Sequence[Any]) -> None:
        function = getattr(self._library, name)
        values = sweeps_cuda.as_passed(arguments)
        for program in range(num_programs):
            self._library.choose(program)
            function(*values)


class HostSweeps:
    """Stands in for `sweeps_cuda`: its tables, on the host's kernels."""

    def __init__(self, folder: Path) -> None:
        """Each set of kernels is compiled once, into the folder."""
        self._compile = cache(lambda macros: HostKernels(macros, folder))

    def Table(self, slices: Sequence[Slice]) -> sweeps_cuda.Table:  # noqa: N802  a class there
        return sweeps_cuda.Table(slices, self._compile)
