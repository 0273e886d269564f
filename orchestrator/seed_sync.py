"""The ledger: the durable record of a run, from which every replica's weights can be rebuilt.

Owns the file ledger.jsonl: header, append, read, verify, fork. Knows nothing of tensors, of where
replicas run, or of how losses become coefficients.

The file is JSON lines: a header, then one line a step, steps consecutive from 0. Members are the
fields of `Header` and `StepRecord` in their order, then "dropped" (indices of seeds) if any were,
then "crc":

    {"step":0,"seeds":[7],...,"examples_hash":"ab12","crc":"0a1b2c3d"}

The crc is the CRC-32 (`zlib.crc32`, 8 lower-case hex digits) of the object's text without that
member: the line's bytes before `,"crc":` and then `}`. The text is canonical, so that the same
values always give the same bytes: `json.dumps` with separators (",", ":"), ASCII only, members in
the order above, floats as their repr. A line that is not canonical is refused.

A header's "forked_from" is left out where the run is no fork. Opening a ledger checks every line's
crc and place; values, types and spelling are checked when a step is read. Steps stay in the file,
so memory does not grow with them.
"""

import fcntl
import hashlib
import json
import os
import re
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar, get_args, get_origin, overload

from orchestrator.config import ConfigError
from orchestrator.records import StepUpdate

LEDGER_FORMAT = 1
MARK_EVERY = 256  # steps between those whose place in the file is remembered
CLOSED = re.compile(rb',"crc":"[0-9a-f]{8}"}\n\Z')  # how a line ends
LONGEST_LINE = 1 << 20  # bytes; more is no line of ours, and is not read into memory
R = TypeVar("R", "Header", "StepRecord")


class LedgerError(ConfigError):
    """A ledger that cannot be used, told in one line that names the file and what is wrong."""


class LedgerWriteError(RuntimeError):
    """A step that could not be written down, and so was not taken; the run can be resumed."""


@dataclass(frozen=True, slots=True)
class Header:
    """What the steps belong to. Only `model` and `versions` may differ when a run is resumed.

    `forked_from` tells, oldest first, whose steps a fork begins with: per ancestor its number of
    steps taken over, and the config's, the data's and the ledger's hash there. The last is the
    SHA-256 of the ancestor's file up to the fork: `head -n STEPS+1 ledger.jsonl | sha256sum`.
    """

    format: int
    noise_version: int
    model: str
    weights_hash: str
    config_hash: str
    data_hash: str
    versions: tuple[tuple[str, str], ...]  # pairs of a name and its version, see ReplicaInfo
    forked_from: tuple[tuple[int, str, str, str], ...] = ()

    @property
    def config_since(self) -> int:
        """The step from which on `config_hash` holds; earlier ones were taken under another."""
        ancestors = [(0, ""), *((step, config) for step, config, *_ in self.forked_from)]
        kept = ancestors[-1][0]
        # From the latest back: of the steps that an ancestor took itself, those are still here
        # that no later fork went back behind.
        for (began, _), (ended, config) in reversed(list(pairwise(ancestors))):
            kept = min(kept, ended)
            if config != self.config_hash and began < kept:
                return kept
        return 0


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
        kept = zip(self.seeds, self.coefficients, strict=True)
        pairs = [(seed, value) for seed, value in kept if value is not None]
        seeds, coefficients = tuple(seed for seed, _ in pairs), tuple(value for _, value in pairs)
        return StepUpdate(self.step, seeds, coefficients, self.decay)


@dataclass(slots=True)
class Survey:
    """What a look at all lines of a ledger's file found; as far as it got, where one is damaged."""

    header: Header | None = None
    num_steps: int = 0
    size: int = 0
    """Bytes of the header and of whole steps."""
    torn: int = 0
    """Bytes behind them: a line that was cut short."""
    marks: "array[int]" = field(default_factory=lambda: array("Q"))
    """Where in the file every MARK_EVERY-th step begins."""

    def add(self, line_size: int) -> None:
        """One more step, of so many bytes."""
        if self.num_steps % MARK_EVERY == 0:
            self.marks.append(self.size)
        self.num_steps += 1
        self.size += line_size


class StepRecords(Sequence[StepRecord]):
    """A ledger's steps. Each is read from the file, and checked, when it is asked for.

    LedgerError names the line where one is not what it was, or holds values that cannot be.
    """

    def __init__(self, path: Path, survey: Survey) -> None:
        self._path = path
        self._survey = survey

    def __len__(self) -> int:
        return self._survey.num_steps

    @overload
    def __getitem__(self, index: int) -> StepRecord: ...

    @overload
    def __getitem__(self, index: slice) -> list[StepRecord]: ...

    def __getitem__(self, index: int | slice) -> StepRecord | list[StepRecord]:
        chosen = range(len(self))[index]
        if isinstance(chosen, int):
            return next(self._read(chosen, chosen + 1))
        if chosen.step != 1:
            return [self[step] for step in chosen]
        return list(self._read(chosen.start, chosen.stop))

    def __iter__(self) -> Iterator[StepRecord]:
        return self._read(0, len(self))

    def lines(self, start: int, stop: int) -> Iterator[bytes]:
        """Steps' lines as they stand in the file, unchecked."""
        if start >= stop:
            return
        first = start // MARK_EVERY
        with _telling(self._path, "cannot be read"), self._path.open("rb") as file:
            file.seek(self._survey.marks[first])
            for step in range(first * MARK_EVERY, stop):
                line = file.readline(LONGEST_LINE)
                if step >= start:
                    yield line

    def _read(self, start: int, stop: int) -> Iterator[StepRecord]:
        for step, line in enumerate(self.lines(start, stop), start):
            yield _checked_step(self._path, step, line)


class Ledger:
    """A ledger that this process, and no other, appends to. Made by `create` or `open`.

    `records` are all steps so far. `repairs` and `notes` are sentences to show to the user: what
    was cut off the file, and harmless differences from when the run was started.
    """

    def __init__(self, path: Path, file: FileIO, header: Header, survey: Survey) -> None:
        self.header = header
        self.records = StepRecords(path, survey)
        self.repairs: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = ()
        self._path = path
        self._file = file
        self._survey = survey

    @classmethod
    def create(cls, path: Path, header: Header) -> Self:
        """Start a ledger; its header is on disk when this returns.

        LedgerError if the file exists or cannot be written.
        """
        _create(path, lambda file: _append_durably(file, _encode(header)))
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
            header, survey = _verify(path)
            ledger = cls(path, file, header, survey)
            ledger.notes = _compare(path, header, expected)
            if survey.torn:
                file.truncate(survey.size)
                what = f"was cut short when the run stopped; step {survey.num_steps} is taken again"
                ledger.repairs = (f"{path}: removed the last line, which {what}",)
            os.fsync(file)  # a killed process may have left its last line in memory only
            close_on_error.pop_all()
        return ledger

    @staticmethod
    def read(path: Path, expected: Header | None = None) -> tuple[Header, StepRecords]:
        """Header and steps, ignoring a torn last line; never changes the file.

        LedgerError for a file that cannot be read, damage further up (names the line), or a header
        that does not fit `expected`, where that is given.
        """
        with _telling(path, "cannot be read"):
            header, survey = _verify(path)
        if expected is not None:
            _compare(path, header, expected)
        return header, StepRecords(path, survey)

    @staticmethod
    def fork(source: Path, target: Path, step: int, *, config_hash: str, data_hash: str) -> Header:
        """Start a ledger with another's steps before `step`, to go on under another config.

        The steps' lines are the same bytes. LedgerError if the source is damaged or the target
        exists; ValueError if the source has fewer steps.
        """
        parent, records = Ledger.read(source)
        if not 0 <= step <= len(records):
            raise ValueError(f"step {step} is not among the {len(records)} steps of {source}")
        digest = hashlib.sha256(_encode(parent) + b"\n")
        for line in records.lines(0, step):
            digest.update(line)
        ancestor = (step, parent.config_hash, parent.data_hash, digest.hexdigest())
        header = replace(
            parent,
            config_hash=config_hash,
            data_hash=data_hash,
            forked_from=(*parent.forked_from, ancestor),
        )

        def write(file: FileIO) -> None:
            with os.fdopen(os.dup(file.fileno()), "wb") as buffered:
                buffered.write(_encode(header) + b"\n")
                for number, line in enumerate(records.lines(0, step)):
                    _checked_step(source, number, line)
                    buffered.write(line)
            os.fsync(file)

        _create(target, write)
        return header

    @property
    def next_step(self) -> int:
        """The step that must be appended next; also the number of steps recorded."""
        return self._survey.num_steps

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
        self._survey.add(len(line) + 1)

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


def _create(path: Path, write: Callable[[FileIO], None]) -> None:
    """Make a file of what `write` writes: whole or not at all, and never over another."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    with _telling(path, "cannot be created"):
        try:
            with unfinished.open("wb", buffering=0) as file:
                write(file)
            os.link(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # or the file's name might not outlast a power cut
        os.close(folder)


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
    for name, meaning in {
        "format": "is written in another format",
        "noise_version": "was recorded with another version of the noise",
        "weights_hash": "belongs to another model",
        "config_hash": "belongs to another configuration",
        "data_hash": "belongs to other data",
    }.items():
        was, now = getattr(header, name), getattr(expected, name)
        is_same = same_data(was, now) if name == "data_hash" else was == now
        if not is_same:
            advice = "resume with what the run was started with, or choose another folder"
            raise LedgerError(f"{path}: {meaning}: {name} is {was}, here {now}; {advice}")
    before = {"model": header.model, **dict(header.versions)}
    after = {"model": expected.model, **dict(expected.versions)}
    return tuple(
        f"{name} was {before.get(name, 'absent')} before, now it is {after.get(name, 'absent')}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    )


def same_data(was: str, now: str) -> bool:
    """Whether a ledger's data hash is of the rows that there are now.

    Ledgers of earlier versions do not tell the splits' sizes, which now stand behind the hash.
    """
    return was in (now, now.partition("-")[0])


def _verify(path: Path) -> tuple[Header, Survey]:
    """The header, and what else a look at the whole file found; LedgerError if it is damaged."""
    found = Survey()
    survey(path, found)
    assert found.header is not None
    return found.header, found


def survey(path: Path, found: Survey) -> None:
    """Look at all lines of a ledger's file, and note in `found` what is whole.

    What another process appends meanwhile is left out.

    LedgerError names the line that is damaged, if one is; `found` then tells of those above it.
    OSError if the file cannot be read.
    """
    with path.open("rb", buffering=1 << 20) as file:
        for number, line, is_last in _numbered(file, os.fstat(file.fileno()).st_size):
            whole = line.endswith(b"\n") and _unsealed(line[:-1]) is not None
            # Two lines in one are not torn: a line break is damaged.
            if not whole and is_last and b'{"step":' not in line[1:]:
                if line.startswith(b'{"step":') and CLOSED.search(line) and b"\0" not in line:
                    raise LedgerError(
                        f"{path}: line {number}: is damaged, and no crash's doing, for it has both "
                        "its ends; restore the file from a copy, or delete this last line, whose "
                        "step is then taken again"
                    )
                found.torn = len(line)
                break
            if number == 1:
                found.header = _told(path, 1, partial(_decode, line[:-1], Header))
                found.size = len(line)
                continue
            if not (whole and line.startswith(b'{"step":%d,' % found.num_steps)):
                _checked_step(path, found.num_steps, line)  # tells what is wrong
            found.add(len(line))
    if found.header is None:
        raise LedgerError(f"{path}: has no whole header, so no steps; delete it and start again")


def _numbered(file: BinaryIO, size: int) -> Iterator[tuple[int, bytes, bool]]:
    """Lines of the first `size` bytes with their numbers from 1, and whether they are the last."""
    number, line = 1, file.readline(min(size, LONGEST_LINE))
    while line:
        size -= len(line)
        following = file.readline(min(size, LONGEST_LINE))
        yield number, line, not following
        number, line = number + 1, following


def _checked_step(path: Path, step: int, line: bytes) -> StepRecord:
    """The record of a step that a line, with its line break, must hold."""

    def decode() -> StepRecord:
        if not line.endswith(b"\n"):
            raise ValueError("is damaged, it is not closed")
        record = _decode(line[:-1], StepRecord)
        if record.step != step:
            raise ValueError(f"has step {record.step}, but step {step} must follow")
        return record

    return _told(path, step + 2, decode)


def _told(path: Path, number: int, decode: Callable[[], R]) -> R:
    """What `decode` gives; what is wrong is told with the line's number."""
    try:
        return decode()
    except (ValueError, RecursionError) as error:
        what = f"line {number}: {error}; restore the file from a copy"
        raise LedgerError(f"{path}: {what}") from None


def _encode(record: Header | StepRecord) -> bytes:
    """The record's line, without its line break."""
    members = {field.name: getattr(record, field.name) for field in fields(record)}
    if isinstance(record, StepRecord) and record.dropped:
        members["dropped"] = record.dropped
    if isinstance(record, Header) and not record.forked_from:
        del members["forked_from"]
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
    given = {f.name: members.get(f.name) for f in fields(kind)}
    if kind is Header:
        given["forked_from"] = members.get("forked_from", [])
    record = kind(**{f.name: _typed(f.name, given[f.name], f.type) for f in fields(kind)})
    if _encode(record) != line:
        raise ValueError("is not canonical: members are unknown, out of order or spelt differently")
    return record


def _typed(name: str, value: Any, kind: Any) -> Any:
    """The JSON value if it is of a field's type; lists become tuples."""
    is_tuple, kinds = _parts(kind)
    if is_tuple:
        if type(value) is list and kinds[-1] is ...:
            nested, items = _parts(kinds[0])
            if not nested and set(map(type, value)) <= set(items):  # long lists of numbers
                return tuple(value)
            return tuple(_typed(name, item, kinds[0]) for item in value)
        if type(value) is list and len(value) == len(kinds):
            return tuple(_typed(name, *pair) for pair in zip(value, kinds, strict=True))
    elif type(value) in kinds:
        return value
    wanted = getattr(kind, "__name__", kind)
    raise ValueError(f"{name} is missing or not of type {wanted}: {value!r}")


@cache
def _parts(kind: Any) -> tuple[bool, tuple[Any, ...]]:
    """Whether a type is a tuple's, and the types it is made of."""
    return get_origin(kind) is tuple, get_args(kind) or (kind,)
