"""Checks of Triton's kernels in processes of their own.

Triton reads TRITON_INTERPRET when it is first imported, and other tests import it too.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def run_alone(check: Callable[[], None], **environment: str) -> None:
    """Call a function of a test module, by its name, in a process with these variables."""
    here = Path(__file__).parent
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    search_path = os.pathsep.join([str(here), str(here.parent)])
    finished = subprocess.run(
        [sys.executable, "-c", f"import {check.__module__} as t; t.{check.__name__}()"],
        env=inherited | {"PYTHONPATH": search_path} | environment,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
