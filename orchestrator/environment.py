"""How a process is made ready for torch, numba and SGLang, before and while these are imported.

Owns the table of environment variables, with the reason for each entry: `launch.py` sets them for
its own process, and `actors.py` hands them to Ray for the replicas'. Imports nothing heavy.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


def variables(threads: int) -> dict[str, str]:
    """What a process that hosts a replica with this many CPU threads needs."""
    return {
        # Idle OpenMP threads that spin steal the cores from numba's, and the other way round:
        # forwards were seen to become ten times slower.
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "KMP_BLOCKTIME": "0",
        "NUMBA_THREADING_LAYER": "workqueue",
        "OMP_NUM_THREADS": str(threads),
        # Several runners share a process, hence its process groups (see dist_patch).
        "SGLANG_ALLOW_REUSE_DISTRIBUTED": "true",
        # Our own OPT takes the place of SGLang's.
        "SGLANG_EXTERNAL_MODEL_PACKAGE": "orchestrator.sglang_models",
        # Triton's float32 products are TF32 otherwise, and that noise is divided by eps.
        "TRITON_F32_DEFAULT": "ieee",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def prepare(threads: int) -> None:
    """Set the variables of this process, except those that the user has set."""
    for name, value in variables(threads).items():
        os.environ.setdefault(name, value)
    if not os.environ.get("RAY_ADDRESS"):
        # Ray runs whatever it is sent, and asks nobody who he is. One that is started here for one
        # run listens on the loopback address alone; without this, on all, whatever its options say.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


@contextmanager
def importing() -> Iterator[None]:
    """Collect no garbage meanwhile: modules make little, and to look for it again and again takes
    a quarter of the time in which SGLang is imported."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.freeze()  # what modules hold stays, and need not be looked through again
            gc.enable()
