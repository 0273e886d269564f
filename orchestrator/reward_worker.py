"""Runs a user's reward function, in a process of its own that `rewards` starts by this file's path.

Owns the call and the check of what it returns. Imports the standard library alone, so that the
user's module meets none of ours.

Arguments: a socket's descriptor, the process that started this one, MODULE:FUNCTION. Over the
socket go JSON objects, one a line. The first says {"ready": true}, or {"refused": why} where there
is no such function. Each request [row, text] is then answered by {"value": number}, or by
{"failure": kind, "reason": why}. A line is short enough to arrive whole.
"""

import ctypes
import importlib
import json
import math
import numbers
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

LONGEST_REASON = 300
LARGEST = 1e30  # squares of sums of more would not be finite
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def main() -> None:
    descriptor, parent, target = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    end_with(parent)
    # The end of a worker may be to be killed, which would take with it what was not written yet.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.set_inheritable(descriptor, False)  # what the function starts must not hold it open
    channel = socket.socket(fileno=descriptor)
    try:
        function = _resolved(target)
    except BaseException as error:  # sys.exit in the module is no reason to be silent
        _send(channel, {"refused": _line(error)})
        return
    _send(channel, {"ready": True})
    for line in channel.makefile("r", encoding="utf-8"):
        row, text = json.loads(line)
        try:
            answer = _judged(function, row, text)
        except BaseException:
            os._exit(1)  # asked to exit, which threads of the function must not delay
        _send(channel, answer)


def end_with(parent: int) -> None:
    """Let the system kill this process when the one that started it ends, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _resolved(target: str) -> Callable[[Any, str], Any]:
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{name} is no function")
    return function  # type: ignore[no-any-return]


def _judged(function: Callable[[Any, str], Any], row: Any, text: str) -> dict[str, Any]:
    try:
        value = function(row, text)
    except Exception as error:
        return {"failure": "raised", "reason": _line(error)}
    if not isinstance(value, numbers.Real):
        reason = f"it returned {value!r:.40}, a {type(value).__name__}"
        return {"failure": "not_a_number", "reason": reason}
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= LARGEST:
        return {"failure": "not_finite", "reason": f"it returned {number}"}
    return {"value": number}


def _line(error: BaseException) -> str:
    """What went wrong, and where in the user's code."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f", {frames[-1].filename}:{frames[-1].lineno}" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST_REASON] + where


def _send(channel: socket.socket, answer: dict[str, Any]) -> None:
    channel.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
