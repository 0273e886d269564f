"""What our own code logs, as JSON: a line a record, each with the run, the replica and the step.

Owns the form of these lines and the fields that a process's records share. They go to standard
error, which `output` has sent to the run's log: between what libraries write there, line by line.
Knows nothing of who logs what.
"""

import json
import logging
import os
import socket
from datetime import UTC, datetime

LOGGER = "orchestrator"  # the package's: all of our loggers are below it
STANDARD_ERROR = 2

_fields: dict[str, str | int] = {}


def fields() -> dict[str, str | int]:
    """What every record of this process tells, such as {"run": "demo", "step": 12}."""
    return dict(_fields)


def note(**fields: str | int) -> None:
    """Have every record from now on tell this too."""
    _fields.update(fields)


def begin() -> None:
    """From now on write records of our own code, from level INFO up. May be called again."""
    logger = logging.getLogger(LOGGER)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # libraries set handlers on the root logger
    if not any(isinstance(handler, _Lines) for handler in logger.handlers):
        logger.addHandler(_Lines())


class _Lines(logging.Handler):
    """Writes each record at once: the processes of a run append to one file, whose lines are whole
    only if each is one call of the system."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # A library may have left its own line open, as progress bars do.
            os.write(STANDARD_ERROR, f"\n{line(record)}\n".encode(errors="backslashreplace"))
        except OSError:  # such as a full disk, which is not to end the run here
            self.handleError(record)


def line(record: logging.LogRecord) -> str:
    """A record as JSON, with what reads first to a human first."""
    time = datetime.fromtimestamp(record.created, UTC)
    told: dict[str, str | int] = {
        "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "message": record.getMessage(),
        **_fields,
        "module": record.name.removeprefix(f"{LOGGER}."),
        "host": socket.gethostname(),
        "process": os.getpid(),
    }
    if record.exc_info:
        told["traceback"] = logging.Formatter().formatException(record.exc_info)
    return json.dumps(told, ensure_ascii=False)
