"""The files of a run's snapshots: their names, which are there, how one appears whole, which go.

Owns a run folder's `snapshots/`. Knows nothing of what is in the files.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

FOLDER = "snapshots"
KEPT = 2  # the newest, and one more should that be damaged
NAME = re.compile(r"step-(\d{8,})\.safetensors")
UNFINISHED = ".unfinished"


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08}.safetensors"


def listed(folder: Path) -> dict[int, Path]:
    """The snapshots of a folder by their steps, the newest first; none if there is no folder."""
    names = sorted(path.name for path in folder.glob("step-*")) if folder.is_dir() else []
    found = {int(match[1]): folder / name for name in names if (match := NAME.fullmatch(name))}
    return dict(sorted(found.items(), reverse=True))


@contextmanager
def written(folder: Path, step: int) -> Iterator[BinaryIO]:
    """A file to write a snapshot to. It has its name, and is on disk, once the block has ended;
    then older ones than the last few go. OSError leaves no part of it."""
    folder.mkdir(exist_ok=True)
    for left in folder.glob(f"step-*{UNFINISHED}"):  # by a process that was killed
        left.unlink(missing_ok=True)
    path = path_of(folder, step)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)  # or the file's name might not outlast a power cut
    os.close(descriptor)
    # Those of later steps are not this run's past; they go once it has come as far.
    for other in [other for other in listed(folder) if other <= step][KEPT:]:
        path_of(folder, other).unlink(missing_ok=True)
