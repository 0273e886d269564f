"""Trained states in files, from which a replica starts instead of replaying all of a run's steps.

Owns what a snapshot holds, and the proof that one is whole and of this run: of the same base
weights, the same meaning of updates, and the same updates. Whatever is not so is passed over, and
costs time alone. A snapshot is a file of safetensors: the masters, as whole tensors under their
canonical names, so that it serves any device and any tensor-parallel size. Tensors are written and
read one at a time. Knows nothing of when a snapshot is due.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from orchestrator import snapshot_folder, space
from orchestrator.noise import NOISE_VERSION
from orchestrator.records import MARK_SIZE
from orchestrator.runner import sum_over_ranks
from orchestrator.space import Space

logger = logging.getLogger(__name__)
FORMAT = 1
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
ALIGNMENT = 8  # bytes, of what stands before the values


class StateError(RuntimeError):
    """A replica's trained state is not the one that all have: its memory has changed."""


class Snapshots:
    """The snapshots of one run, as one replica writes and reads them. All its ranks make the same
    calls."""

    def __init__(self, folder: Path, *origin: object) -> None:
        """`origin` is what the state depends on beside the updates, in terms of JSON: the hash of
        the base weights and of the adapter that training began with, and Config.meaning."""
        self.folder = folder
        bound = json.dumps([FORMAT, NOISE_VERSION, *origin], sort_keys=True)
        self._run = hashlib.sha256(bound.encode()).hexdigest()

    def write(self, trained: Space, step: int, mark: bytes, digest: str) -> None:
        """Write down the state that so many updates, with this mark, have led to.

        OSError where it cannot be written; StateError if the state's digest is another.
        """
        if trained.digest() != digest:
            raise StateError(f"after {step} steps this replica's trained state is not {digest}")
        values = chain.from_iterable(part.values() for part in trained.parts)
        first = next(values, None)
        if first is None:
            return  # another rank has all tensors
        try:
            with snapshot_folder.written(self.folder, step) as file:
                file.write(_head(trained, self._metadata(step, mark) | {"digest": digest}))
                for _, value in chain([first], values):
                    file.write(value.contiguous().view(-1).view(torch.uint8).numpy().data)
        finally:
            for _ in values:  # the other ranks go on to the last tensor
                pass

    def restore(self, trained: Space, marks: bytes) -> int:
        """Put the newest state in place that updates with these marks have led to.

        Returns its step; 0, with nothing changed, if there is none. `marks` are those of all
        updates that may be behind it, see records.UpdateLog.
        """
        found = snapshot_folder.listed(self.folder)
        num_steps = len(marks) // MARK_SIZE
        for step in [step for step in found if step > num_steps]:
            _pass_over(found[step], f"the ledger has {num_steps} steps")
        # A rank on another machine may see others.
        *seen, num_ranks = sum_over_ranks([*(step + 1 in found for step in range(num_steps)), 1])
        for step in range(num_steps, 0, -1):
            if seen[step - 1] == num_ranks:
                mark = marks[(step - 1) * MARK_SIZE : step * MARK_SIZE]
                if self._is_restored(trained, found[step], self._metadata(step, mark)):
                    return step
        return 0

    def _metadata(self, step: int, mark: bytes) -> dict[str, str]:
        """What a file must say to be used."""
        return {
            "format": str(FORMAT),
            "step": str(step),
            "run": self._run,
            "updates": mark.hex(),
        }

    def _is_restored(self, trained: Space, path: Path, expected: dict[str, str]) -> bool:
        """Whether a file is whole and the expected one; then its values are in place.

        Values are proved before any is: what they replace could not be brought back.
        """
        file, reason = None, "another rank cannot read it"
        sums: list[list[int]] = []
        try:
            file = safe_open(path, framework="pt")
            _check(file, trained, expected)
            sums = [part.checksums_of(file.get_tensor) for part in trained.parts]
        except (OSError, SafetensorError, _Refused) as error:
            file, reason = None, str(error)
        if not _is_agreed(file is not None):
            return _pass_over(path, reason)
        assert file is not None
        lines = [part.lines(own) for part, own in zip(trained.parts, sums, strict=True)]
        digest = _metadata(file).get("digest")
        if not _is_agreed(space.digest([*chain.from_iterable(lines)]) == digest):
            return _pass_over(path, "its values are not those that were written")
        for part in trained.parts:
            part.put(file.get_tensor)
        if trained.digest() != digest:
            raise RuntimeError(f"{path} has changed while it was read; start again")
        return True


class _Refused(Exception):
    """Why a snapshot is not used."""


def _head(trained: Space, metadata: dict[str, str]) -> bytes:
    """What stands before the values in a file of safetensors."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, shape, dtype in _layout(trained):
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _layout(trained: Space) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Names, whole shapes and dtypes of all masters, in their order in the file."""
    for part in trained.parts:
        for tensor in part.tensors:
            yield tensor.region.name, tensor.shard.full_shape, tensor.master.dtype


def _check(file: Any, trained: Space, expected: dict[str, str]) -> None:
    """Refuse a file that is not the expected one, or does not fit the space."""
    metadata = _metadata(file)
    reasons = {
        "format": "it is written in another format",
        "step": "its name is another step's",
        "run": "it is of another run: of another model, or another recipe",
        "updates": "it is of another run: of other updates",
    }
    for key, reason in reasons.items():
        if metadata.get(key) != expected[key]:
            raise _Refused(reason)
    layout = {name: (shape, DTYPES[dtype]) for name, shape, dtype in _layout(trained)}
    parts = {name: file.get_slice(name) for name in list(file.keys())}
    found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    if found != layout:
        raise _Refused("its tensors are not those that are trained")


def _metadata(file: Any) -> dict[str, str]:
    return file.metadata() or {}


def _is_agreed(own: bool) -> bool:
    """Whether all ranks say so."""
    agreeing, num_ranks = sum_over_ranks([own, 1])
    return agreeing == num_ranks


def _pass_over(path: Path, reason: str) -> bool:
    logger.warning("%s is passed over: %s", path, reason)
    return False
