"""The ledger: the durable record of a run, from which every replica's weights can be rebuilt.

Owns the file ledger.jsonl: header, append, read, verify. Knows nothing of tensors, of where
replicas run, or of how losses become coefficients.

The file is JSON lines: a header, then one line a step, steps consecutive from 0. Members are the
fields of `Header` and `StepRecord` in their order, then "dropped" (indices of seeds) if any were,
then "crc":

    {"step":0,"seeds":[7],...,"examples_hash":"ab12","crc":"0a1b2c3d"}

The crc is the CRC-32 (`zlib.crc32`, 8 lower-case hex digits) of the object's text without that
member: the line's bytes before `,"crc":` and then `}`. The text is canonical, so that the same
values always give the same bytes: `json.dumps` with separators (",", ":"), ASCII only, members in
the order above, floats as their repr. A line that is not canonical is refused.
"""

import fcntl
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from io import FileIO
from pathlib import Path
from typing import Any, Self, TypeVar, get_args, get_origin

from orchestrator.config import ConfigError
from orchestrator.records import StepUpdate

LEDGER_FORMAT = 1
R = TypeVar("R", "Header", "StepRecord")


class LedgerError(ConfigError):
    """A ledger that cannot be used, told in one line that names the file and what is wrong."""


class LedgerWriteError(RuntimeError):
    """A step that could not be written down, and so was not taken; the run can be resumed."""


@dataclass(frozen=True, slots=True)
class Header:
    """What the steps belong to. Only `model` and `versions` may differ when a run is resumed."""

    format: int
    noise_version: int
    model: str
    weights_hash: str
    config_hash: str
    data_hash: str
    versions: tuple[tuple[str, str], ...]  # pairs of a package's name and its version


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step: what was measured, and what was made of it. ValueError for impossible values.

    `seeds` are unsigned 64-bit numbers: the step's own, then those that momentum carries on from
    earlier steps. `losses` are per seed, in the probes' order (two-sided: plus, minus; one-sided
    and fzoo: perturbed, base; es: perturbed), None for one that was not finite, and none at all for
    a seed that was carried on. `coefficients` are per seed, None for a seed that was dropped.
    """

    step: int
    seeds: tuple[int, ...]
    losses: tuple[tuple[float | None, ...], ...]
    coefficients: tuple[float | None, ...]
    decay: float
    eps: float
    lr: float
    examples_hash: str

    def __post_init__(self) -> None:
        if not len(self.seeds) == len(self.losses) == len(self.coefficients):
            raise ValueError("seeds, losses and coefficients differ in length")
        if not all(0 <= seed < 2**64 for seed in self.seeds):
            raise ValueError(f"seeds: {self.seeds} are not all unsigned 64-bit numbers")

    @property
    def dropped(self) -> tuple[int, ...]:
        """Indices (not seeds) of the seeds that the update leaves out."""
        return tuple(i for i, value in enumerate(self.coefficients) if value is None)

    def update(self) -> StepUpdate:
        """What a replica needs to take this step, without the dropped seeds."""
        seeds = tuple(seed for i, seed in enumerate(self.seeds) if i not in self.dropped)
        coefficients = tuple(value for value in self.coefficients if value is not None)
        return StepUpdate(self.step, seeds, coefficients, self.decay)


class Ledger:
    """A ledger that this process, and no other, appends to. Made by `create` or `open`.

    `records` are all steps so far. `repairs` and `notes` are sentences to show to the user: what
    was cut off the file, and harmless differences from when the run was started.
    """

    def __init__(self, path: Path, file: FileIO, header: Header, records: list[StepRecord]) -> None:
        self.header = header
        self.records = records
        self.repairs: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = ()
        self._path = path
        self._file = file

    @classmethod
    def create(cls, path: Path, header: Header) -> Self:
        """Start a ledger; its header is on disk when this returns.

        LedgerError if the file exists or cannot be written.
        """
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        with _telling(path, "cannot be created"):
            with unfinished.open("wb", buffering=0) as file:
                _append_durably(file, _encode(header))
            try:
                os.link(unfinished, path)  # whole or not at all, and never over another
            finally:
                unfinished.unlink()
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)  # or the file's name might not outlast a power cut
            os.close(folder)
        return cls.open(path, header)

    @classmethod
    def open(cls, path: Path, expected: Header) -> Self:
        """Verify a ledger and go on with it; a torn last line is cut off, told in `repairs`.

        LedgerError, with the file untouched, for damage further up (names the line), a header
        that does not fit `expected`, or a file that another process is writing.
        """
        with _telling(path, "cannot be opened"), ExitStack() as close_on_error:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
            file = close_on_error.enter_context(FileIO(descriptor, "r+"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            data = file.readall()
            header, records, size = _verify(path, data)
            ledger = cls(path, file, header, records)
            ledger.notes = _compare(path, header, expected)
            if size < len(data):
                file.truncate(size)
                what = f"was cut short when the run stopped; step {len(records)} is taken again"
                ledger.repairs = (f"{path}: removed the last line, which {what}",)
            os.fsync(file)  # a killed process may have left its last line in memory only
            close_on_error.pop_all()
        return ledger

    @staticmethod
    def read(path: Path, expected: Header | None = None) -> tuple[Header, list[StepRecord]]:
        """Header and steps, ignoring a torn last line; never changes the file.

        LedgerError for a file that cannot be read, damage further up (names the line), or a header
        that does not fit `expected`, where that is given.
        """
        with _telling(path, "cannot be read"):
            header, records, _ = _verify(path, path.read_bytes())
        if expected is not None:
            _compare(path, header, expected)
        return header, records

    @property
    def next_step(self) -> int:
        """The step that must be appended next; also the number of steps recorded."""
        return len(self.records)

    def append(self, record: StepRecord) -> None:
        """Record a step; it is on disk when this returns.

        LedgerWriteError if it cannot be written: the line is taken back and the ledger closed.
        AssertionError for a step that is not next or a closed ledger; ValueError or TypeError for
        values that could not be read back, such as NaN.
        """
        assert not self._file.closed, "the ledger is closed"
        assert record.step == self.next_step, f"step {record.step}, but {self.next_step} is next"
        line = _encode(record)
        _decode(line, StepRecord)
        try:
            _append_durably(self._file, line)
        except OSError as error:
            what = f"step {record.step} cannot be written: {error.strerror}"
            raise LedgerWriteError(f"{self._path}: {what}") from error
        self.records.append(record)

    def close(self) -> None:
        """Let others write. All appended steps are on disk already."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _telling(path: Path, failure: str) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise LedgerError(f"{path}: exists; resume that run or choose another folder") from None
    except BlockingIOError:
        raise LedgerError(f"{path}: is being written by another process") from None
    except OSError as error:
        raise LedgerError(f"{path}: {failure}: {error.strerror}") from error


def _append_durably(file: FileIO, line: bytes) -> None:
    size = os.fstat(file.fileno()).st_size
    rest = line + b"\n"
    try:
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file)
    except BaseException:
        with file:  # closed, since only reading it again can tell what the disk holds
            file.truncate(size)
        raise


def _compare(path: Path, header: Header, expected: Header) -> tuple[str, ...]:
    """Refuse a ledger of another run; sentences about differences that do no harm."""
    for field, meaning in {
        "format": "is written in another format",
        "noise_version": "was recorded with another version of the noise",
        "weights_hash": "belongs to another model",
        "config_hash": "belongs to another configuration",
        "data_hash": "belongs to other data",
    }.items():
        was, now = getattr(header, field), getattr(expected, field)
        if was != now:
            advice = "resume with what the run was started with, or choose another folder"
            raise LedgerError(f"{path}: {meaning}: {field} is {was}, here {now}; {advice}")
    before = {"model": header.model, **dict(header.versions)}
    after = {"model": expected.model, **dict(expected.versions)}
    return tuple(
        f"{name} was {before.get(name, 'absent')} before, now it is {after.get(name, 'absent')}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    )


def _verify(path: Path, data: bytes) -> tuple[Header, list[StepRecord], int]:
    """The header, the steps, and how many bytes they take: fewer than all if the end is torn."""
    *lines, tail = data.split(b"\n")
    if not tail and lines and _unsealed(lines[-1]) is None:
        tail = lines.pop()
    if b'{"step":' in tail[1:]:  # two lines in one: not torn, a line break is damaged
        lines.append(tail)
    if not lines:
        raise LedgerError(f"{path}: has no whole header, so no steps; delete it and start again")
    records: list[StepRecord] = []
    number = 1
    try:
        header = _decode(lines[0], Header)
        for line in lines[1:]:
            number += 1
            record = _decode(line, StepRecord)
            if record.step != len(records):
                raise ValueError(f"has step {record.step}, but step {len(records)} must follow")
            records.append(record)
    except ValueError as error:
        what = f"line {number}: {error}; restore the file from a copy"
        raise LedgerError(f"{path}: {what}") from None
    return header, records, sum(len(line) + 1 for line in lines)


def _encode(record: Header | StepRecord) -> bytes:
    """The record's line, without its line break."""
    members = {field.name: getattr(record, field.name) for field in fields(record)}
    if isinstance(record, StepRecord) and record.dropped:
        members["dropped"] = record.dropped
    return _sealed(json.dumps(members, separators=(",", ":"), allow_nan=False).encode())


def _sealed(text: bytes) -> bytes:
    return text[:-1] + b',"crc":"%08x"}' % zlib.crc32(text)


def _unsealed(line: bytes) -> bytes | None:
    """The line's text without its crc, or None if the crc does not fit."""
    text = line[: -len(',"crc":"00000000"}')] + b"}"
    return text if _sealed(text) == line else None


def _decode(line: bytes, kind: type[R]) -> R:
    """The record that a line holds; ValueError says what is wrong with it."""
    text = _unsealed(line)
    if text is None:
        raise ValueError("is damaged, its crc does not fit")
    members = json.loads(text)
    if members.get("format", LEDGER_FORMAT) != LEDGER_FORMAT:
        raise ValueError(f"format {members['format']} cannot be read, only {LEDGER_FORMAT}")
    record = kind(**{f.name: _typed(f.name, members.get(f.name), f.type) for f in fields(kind)})
    if _encode(record) != line:
        raise ValueError("is not canonical: members are unknown, out of order or spelt differently")
    return record


def _typed(name: str, value: Any, kind: Any) -> Any:
    """The JSON value if it is of a field's type; lists become tuples."""
    kinds = get_args(kind) or (kind,)
    if get_origin(kind) is tuple:
        if type(value) is list and (kinds[-1] is ... or len(value) == len(kinds)):
            return tuple(_typed(name, item, kinds[0]) for item in value)
    elif type(value) in kinds:
        return value
    wanted = getattr(kind, "__name__", kind)
    raise ValueError(f"{name} is missing or not of type {wanted}: {value!r}")
