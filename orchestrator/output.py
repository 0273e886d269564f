"""Keeps libraries' chatter off the terminal: it goes to the run's log, at the level of files.

Owns the way to the user: what is meant for the user is written to `terminal()`.
"""

import os
import sys
from pathlib import Path
from typing import TextIO

_terminal: TextIO | None = None


def terminal() -> TextIO:
    """Where the user reads: standard output as it was when the process started."""
    return _terminal or sys.stdout


def is_diverted() -> bool:
    return _terminal is not None


def divert(log: Path) -> None:
    """Send standard output and error of this process, C libraries' too, to the end of `log`."""
    global _terminal
    sys.stdout.flush()
    sys.stderr.flush()
    if _terminal is None:
        _terminal = os.fdopen(os.dup(1), "w", encoding="utf-8")
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
