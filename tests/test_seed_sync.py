"""The ledger file: its bytes, what survives a crash or a full disk, and what is refused."""

import hashlib
import json
import math
import os
import random
import stat
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.records import StepUpdate
from orchestrator.seed_sync import (
    MARK_EVERY,
    Header,
    Ledger,
    LedgerError,
    LedgerWriteError,
    StepRecord,
    Survey,
    survey,
)

HEADER = Header(
    format=1,
    noise_version=1,
    model="tiny",
    weights_hash="aa",
    config_hash="bb",
    data_hash="cc",
    versions=(("python", "3.11.9"), ("sglang", "0.5.3")),
)
HEADER_LINE = (
    b'{"format":1,"noise_version":1,"model":"tiny","weights_hash":"aa","config_hash":"bb",'
    b'"data_hash":"cc",'
    b'"versions":[["python","3.11.9"],["sglang","0.5.3"]],"crc":"af6063b3"}\n'
)
STEP = StepRecord(
    step=0,
    seeds=(7, 2**64 - 1),
    losses=((0.5, 0.25), (None, 1e-300)),
    coefficients=(-0.125, None),
    decay=0.9999899864196777,
    eps=1e-3,
    lr=1e-6,
    examples_hash="ab12",
)
STEP_LINE = (
    b'{"step":0,"seeds":[7,18446744073709551615],"losses":[[0.5,0.25],[null,1e-300]],'
    b'"coefficients":[-0.125,null],"decay":0.9999899864196777,"eps":0.001,"lr":1e-06,'
    b'"examples_hash":"ab12","dropped":[1],"crc":"825cd491"}\n'
)


def steps(number: int) -> list[StepRecord]:
    return [replace(STEP, step=step, seeds=(step, 2**63 + step)) for step in range(number)]


def write(path: Path, records: list[StepRecord]) -> bytes:
    with Ledger.create(path, HEADER) as ledger:
        for record in records:
            ledger.append(record)
    return path.read_bytes()


def sealed(members: dict[str, Any]) -> bytes:
    """A line with the right crc, whatever it holds; written independently of the module."""
    text = json.dumps(members, separators=(",", ":"))
    return f'{text[:-1]},"crc":"{zlib.crc32(text.encode()):08x}"}}\n'.encode()


def read(path: Path) -> tuple[Header, list[StepRecord]]:
    """All that a ledger holds, every step of it checked."""
    header, records = Ledger.read(path)
    return header, list(records)


def opened(path: Path) -> list[StepRecord]:
    with Ledger.open(path, HEADER) as ledger:
        return list(ledger.records)


def assert_refused(path: Path, *words: str) -> None:
    before = path.read_bytes()
    for attempt in (opened, read):
        with pytest.raises(LedgerError) as caught:
            attempt(path)
        assert all(word in str(caught.value) for word in (str(path), *words)), str(caught.value)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


# What is written


def test_bytes_are_those_that_earlier_versions_wrote(path: Path) -> None:
    assert write(path, [STEP]) == HEADER_LINE + STEP_LINE
    for line in (HEADER_LINE, STEP_LINE):
        members = json.loads(line)
        del members["crc"]
        assert sealed(members) == line


def test_nothing_is_said_of_dropped_seeds_where_there_are_none(path: Path) -> None:
    assert b"dropped" not in write(path, [replace(STEP, coefficients=(1.0, 2.0))])


def test_round_trip(path: Path) -> None:
    write(path, steps(3))
    assert read(path) == (HEADER, steps(3))
    with Ledger.open(path, HEADER) as ledger:
        assert (ledger.header, list(ledger.records), ledger.next_step) == (HEADER, steps(3), 3)
        assert (ledger.repairs, ledger.notes) == ((), ())


def test_text_outside_ascii_survives(path: Path) -> None:
    header = replace(HEADER, model='m\u00fcller/"\\\n\u2028')
    Ledger.create(path, header).close()
    assert path.read_bytes().isascii()
    assert Ledger.read(path)[0] == header


def test_floats_survive_exactly(path: Path) -> None:
    edges = (5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, 0.1, 1 / 3, -1e22, 1e16, 0.0)
    spread = (math.ldexp(1 + i / 7919, 37 * i % 2000 - 1000) for i in range(500))
    values = (*edges, *spread)
    record = replace(
        STEP, seeds=(0,) * len(values), losses=tuple((v, -v) for v in values), coefficients=values
    )
    write(path, [record])
    (again,) = Ledger.read(path)[1]
    assert list(map(repr, again.coefficients)) == list(map(repr, values))
    assert again == record


def test_append_takes_only_the_next_step(path: Path) -> None:
    with Ledger.create(path, HEADER) as ledger:
        ledger.append(steps(2)[0])
        before = path.read_bytes()
        for step in (0, 2):
            with pytest.raises(AssertionError, match=f"step {step}"):
                ledger.append(replace(STEP, step=step))
    with pytest.raises(AssertionError, match="closed"):
        ledger.append(steps(2)[1])
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "change", [{"lr": 1}, {"lr": math.nan}, {"losses": ((math.inf,), (0.0,))}, {"step": False}]
)
def test_append_writes_nothing_that_could_not_be_read_back(
    path: Path, change: dict[str, Any]
) -> None:
    with Ledger.create(path, HEADER) as ledger, pytest.raises(ValueError):
        ledger.append(replace(STEP, **change))
    assert path.read_bytes() == HEADER_LINE


@pytest.mark.parametrize("change", [{"seeds": (1,)}, {"seeds": (1, -1)}, {"seeds": (1, 2**64)}])
def test_records_that_make_no_sense_cannot_be_made(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="seeds"):
        replace(STEP, **change)


# Updates


def test_update_leaves_dropped_seeds_out() -> None:
    record = replace(
        STEP,
        seeds=(1, 2, 3),
        losses=((0.0, 1.0), (None, 1.0), (2.0, 3.0)),
        coefficients=(0.5, None, -0.5),
    )
    assert record.dropped == (1,)
    assert record.update() == StepUpdate(0, (1, 3), (0.5, -0.5), STEP.decay)


def test_update_of_a_step_without_any_seed_left_still_decays() -> None:
    record = replace(STEP, coefficients=(None, None))
    assert record.update() == StepUpdate(0, (), (), STEP.decay)


def test_torn_last_line_is_cut_off_said_and_written_again(path: Path) -> None:
    whole = write(path, steps(3))
    last_line = whole.index(b'{"step":2')
    for size in range(last_line + 1, len(whole)):
        path.write_bytes(whole[:size])
        assert read(path) == (HEADER, steps(2))
        assert path.read_bytes() == whole[:size], "read() changed the file"
        with Ledger.open(path, HEADER) as ledger:
            assert path.read_bytes() == whole[:last_line]
            assert list(ledger.records) == steps(2)
            (repair,) = ledger.repairs
            assert str(path) in repair and "step 2" in repair
            ledger.append(steps(3)[2])
        assert path.read_bytes() == whole


@pytest.mark.parametrize("end", [b"\0" * 50, b"\0\n", b"\n", b'{"step":2}\n', b'{"step":2,"crc"'])
def test_last_line_of_rubbish_is_cut_off(path: Path, end: bytes) -> None:
    whole = write(path, steps(2))
    path.write_bytes(whole + end)
    with Ledger.open(path, HEADER) as ledger:
        assert ledger.next_step == 2 and len(ledger.repairs) == 1
    assert path.read_bytes() == whole


def test_last_line_with_a_damaged_byte_is_refused_or_cut_off(path: Path) -> None:
    """A crash leaves a beginning, or zeros: what has both its ends was changed."""
    whole = write(path, steps(2))
    last_line = whole.index(b'{"step":1')
    refused = 0
    for position in range(last_line, len(whole) - 1):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            assert read(path) == (HEADER, steps(1))
        except LedgerError as error:
            refused += 1
            assert "line 3: is damaged" in str(error) and "delete this last line" in str(error)
        path.write_bytes(whole[:position] + b"\0" + whole[position + 1 :])
        assert read(path) == (HEADER, steps(1))
    assert refused > 0.8 * (len(whole) - last_line)


def test_no_whole_header_is_refused(path: Path) -> None:
    for size in range(len(HEADER_LINE)):
        path.write_bytes(HEADER_LINE[:size])
        assert_refused(path, "no whole header", "start again")


# Damage


def test_every_flipped_bit_above_the_last_line_is_refused(path: Path) -> None:
    whole = write(path, steps(3))
    last_line = whole.index(b'{"step":2')
    for position in range(last_line):
        number = whole[:position].count(b"\n") + 1
        for bit in range(8):
            flipped = bytes([whole[position] ^ 1 << bit])
            path.write_bytes(whole[:position] + flipped + whole[position + 1 :])
            with pytest.raises(LedgerError, match=f"line {number}: is damaged"):
                Ledger.read(path)
        assert_refused(path, f"line {number}: is damaged")


def test_a_missing_byte_above_the_last_line_is_refused(path: Path) -> None:
    whole = write(path, steps(3))
    for position in range(whole.index(b'{"step":2')):
        path.write_bytes(whole[:position] + whole[position + 1 :])
        number = whole[:position].count(b"\n") + 1
        with pytest.raises(LedgerError, match=f"line {number}: is damaged"):
            Ledger.read(path)


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ([0, 1, 3], ["line 3", "has step 2", "step 1 must follow"]),
        ([0, 2, 3], ["line 2", "has step 1", "step 0 must follow"]),
        ([0, 1, 1, 2, 3], ["line 3", "has step 0", "step 1 must follow"]),
        ([0, 1, 2, 3, 3], ["line 5", "has step 2", "step 3 must follow"]),
        ([0, 2, 1, 3], ["line 2", "has step 1"]),
        ([0, 1, 3, 2], ["line 3", "has step 2"]),
        ([1, 2, 3], ["line 1", "format is missing"]),
        ([0, 0, 1, 2], ["line 2", "step is missing"]),
    ],
)
def test_lines_deleted_repeated_or_swapped_are_refused(
    path: Path, order: list[int], words: list[str]
) -> None:
    lines = write(path, steps(3)).splitlines(keepends=True)
    path.write_bytes(b"".join(lines[i] for i in order))
    assert_refused(path, *words)


def test_a_blank_line_is_refused(path: Path) -> None:
    lines = write(path, steps(2)).splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"\n", lines[2]]))
    assert_refused(path, "line 3: is damaged")


def members_of(line: bytes) -> dict[str, Any]:
    members: dict[str, Any] = json.loads(line)
    del members["crc"]
    return members


@pytest.mark.parametrize("above", [b"", HEADER_LINE])
def test_wrong_types_and_missing_members_are_refused_by_name(path: Path, above: bytes) -> None:
    members = members_of(STEP_LINE if above else HEADER_LINE)
    members.pop("dropped", None)
    number = "line 2" if above else "line 1"
    for name, right in members.items():
        wrongs: tuple[object, ...] = (None, True, "1", 2, 2.0, {})
        for wrong in wrongs:
            if type(wrong) is not type(right):
                path.write_bytes(above + sealed({**members, name: wrong}))
                assert_refused(path, number, name)
        path.write_bytes(above + sealed({key: members[key] for key in members if key != name}))
        assert_refused(path, number, f"{name} is missing")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"seeds": [7, -1]}, "seeds"),
        ({"seeds": [7, 2**64]}, "seeds"),
        ({"seeds": [7]}, "seeds"),
        ({"seeds": [7, 8.0]}, "seeds"),
        ({"losses": [[0.5, "x"], [None]]}, "losses"),
        ({"losses": [0.5, 0.25]}, "losses"),
        ({"lr": math.nan}, "line 2"),
        ({"lr": math.inf}, "line 2"),
        ({"dropped": [0]}, "not canonical"),
        ({"surprise": 1}, "not canonical"),
    ],
)
def test_wrong_values_are_refused(path: Path, change: dict[str, Any], word: str) -> None:
    path.write_bytes(HEADER_LINE + sealed({**members_of(STEP_LINE), **change}))
    assert_refused(path, "line 2", word)


def test_other_spellings_of_the_same_values_are_refused(path: Path) -> None:
    members = members_of(STEP_LINE)
    reordered = dict(reversed(members.items()))
    path.write_bytes(HEADER_LINE + sealed(reordered))
    assert_refused(path, "line 2", "not canonical")


Mutation = Callable[[random.Random, bytes], bytes]


def flip_bits(draw: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(draw: random.Random, data: bytes) -> bytes:
    return data[: draw.randrange(len(data))]


def cut_out(draw: random.Random, data: bytes) -> bytes:
    start, end = sorted(draw.choices(range(len(data)), k=2))
    return data[:start] + data[end:]


def swap_lines(draw: random.Random, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    one, other = draw.sample(range(len(lines)), k=2)
    lines[one], lines[other] = lines[other], lines[one]
    return b"".join(lines)


def swap_stretches(draw: random.Random, data: bytes) -> bytes:
    a, b, c = sorted(draw.choices(range(len(data)), k=3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def double_a_line(draw: random.Random, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    lines.insert(draw.randrange(len(lines) + 1), draw.choice(lines))
    return b"".join(lines)


def double_a_stretch(draw: random.Random, data: bytes) -> bytes:
    start, end = sorted(draw.choices(range(len(data)), k=2))
    return data[:end] + data[start:end] + data[end:]


def overwrite(draw: random.Random, data: bytes) -> bytes:
    start = draw.randrange(len(data))
    rubbish = draw.choice([bytes(40), draw.randbytes(40), b"\n" * 3, b"0" * 9])
    return data[:start] + rubbish + data[start + len(rubbish) :]


MUTATIONS: list[Mutation] = [
    flip_bits,
    cut,
    cut_out,
    swap_lines,
    swap_stretches,
    double_a_line,
    double_a_stretch,
    overwrite,
]


def test_ten_thousand_mutations_never_load_a_wrong_state(path: Path) -> None:
    """What is loaded is what was written, up to some step."""
    whole, draw = write(path, steps(3)), random.Random(0)
    refused = 0
    for turn in range(10_000):
        mutation = MUTATIONS[turn % len(MUTATIONS)]
        data = mutation(draw, whole)
        path.write_bytes(data)
        try:
            header, records = read(path)
        except LedgerError:
            refused += 1
            continue
        assert header == HEADER
        assert records == steps(3)[: len(records)], mutation.__name__
        assert len(records) >= 2 or mutation is not flip_bits
    assert 5_000 < refused < 10_000, "most mutations are seen, and some do no harm"


def test_a_file_that_is_one_endless_line_is_refused_without_being_read(path: Path) -> None:
    write(path, steps(1))
    with path.open("ab") as file:
        file.truncate(1 << 34)  # 16 GB of zeros, which the disk does not hold
    with pytest.raises(LedgerError, match="line 3: is damaged"):
        Ledger.read(path)


def test_nested_lists_without_end_are_refused(path: Path) -> None:
    text = b'{"step":0,"seeds":' + b"[" * 100_000 + b"}"
    crc = b',"crc":"%08x"}' % zlib.crc32(text)
    path.write_bytes(HEADER_LINE + text[:-1] + crc + b"\n")
    assert_refused(path, "line 2")


# At length


def test_steps_are_read_from_the_file_by_number_and_in_stretches(path: Path) -> None:
    number = 2 * MARK_EVERY + 3
    write(path, steps(number - 1))
    with Ledger.open(path, HEADER) as ledger:
        ledger.append(steps(number)[-1])
        for records in (ledger.records, Ledger.read(path)[1]):
            assert len(records) == number
            for step in (0, 1, MARK_EVERY - 1, MARK_EVERY, 2 * MARK_EVERY, number - 1):
                assert records[step] == steps(number)[step] == records[step - number]
            assert records[MARK_EVERY - 2 : MARK_EVERY + 2] == steps(MARK_EVERY + 2)[-4:]
            assert records[:0] == records[5:3] == []
            assert [record.step for record in records[:9:4]] == [0, 4, 8]
            with pytest.raises(IndexError):
                records[number]
    assert list(ledger.records) == steps(number), "after close"


def test_a_step_that_changed_since_the_ledger_was_opened_is_refused(path: Path) -> None:
    whole = write(path, steps(3))
    _, records = Ledger.read(path)
    path.write_bytes(whole.replace(b'"step":1', b'"step":7'))
    assert records[0] == steps(1)[0]
    with pytest.raises(LedgerError, match="line 3: is damaged"):
        list(records)
    path.write_bytes(whole[:-5])
    with pytest.raises(LedgerError, match="line 4: is damaged, it is not closed"):
        list(records)


def test_memory_does_not_grow_with_the_steps(path: Path) -> None:
    lines = b"".join(sealed(members_of(STEP_LINE) | {"step": step}) for step in range(40_000))
    path.write_bytes(HEADER_LINE + lines)
    code = """
import resource
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with Ledger.open(path, HEADER) as ledger:
    ledger.append(replace(STEP, step=ledger.next_step))
    assert sum(1 for _ in ledger.records) == 40_001
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    assert 1000 * int(run_python(code, path)) < 5e6 < len(lines)


def test_a_ledger_is_read_while_another_process_writes_it(path: Path) -> None:
    """As it was at first: a line that comes in two parts is no damage."""
    whole = write(path, steps(4))
    lines = whole.splitlines(keepends=True)
    size = len(whole) - len(lines[-1])
    path.write_bytes(whole[:size])
    parts = {1: lines[-1][:50], 3: lines[-1][50:]}

    class Written(Survey):
        def add(self, line_size: int) -> None:
            super().add(line_size)
            with path.open("ab") as file:
                file.write(parts.pop(self.num_steps, b""))

    found = Written()
    survey(path, found)
    assert (found.num_steps, found.size, found.torn) == (3, size, 0)
    assert path.read_bytes() == whole


# Forks


def fork(path: Path, step: int, config: str, data: str = "cc") -> Path:
    target = path.with_name(f"{path.stem}-{config}{step}.jsonl")
    Ledger.fork(path, target, step, config_hash=config, data_hash=data)
    return target


def test_a_fork_holds_the_parents_lines_and_says_whose_they_are(path: Path) -> None:
    whole = write(path, steps(4))
    child = fork(path, 2, "other", "dd")
    lines = whole.splitlines(keepends=True)
    assert child.read_bytes().splitlines(keepends=True)[1:] == lines[1:3]
    digest = hashlib.sha256(b"".join(lines[:3])).hexdigest()
    expected = replace(HEADER, config_hash="other", data_hash="dd")
    header = replace(expected, forked_from=((2, "bb", "cc", digest),))
    assert read(child) == (header, steps(2))
    assert path.read_bytes() == whole
    with Ledger.open(child, expected) as ledger:
        assert (ledger.next_step, ledger.notes) == (2, ())
        ledger.append(steps(3)[2])
    with pytest.raises(LedgerError, match="another configuration"):
        Ledger.open(child, HEADER)
    grandchild = fork(child, 3, "third")
    assert [entry[:2] for entry in Ledger.read(grandchild)[0].forked_from] == [
        (2, "bb"),
        (3, "other"),
    ]


def test_a_header_tells_since_when_its_config_holds(path: Path) -> None:
    write(path, steps(9))
    assert Ledger.read(path)[0].config_since == 0
    assert Ledger.read(fork(path, 5, "bb"))[0].config_since == 0
    child = fork(path, 5, "other")
    assert Ledger.read(child)[0].config_since == 5
    assert Ledger.read(fork(child, 3, "other"))[0].config_since == 3
    assert Ledger.read(fork(child, 5, "third"))[0].config_since == 5


def forked(config: str, *forks: tuple[int, str]) -> Header:
    ancestors = tuple((step, ancestor, "cc", "dd") for step, ancestor in forks)
    return replace(HEADER, config_hash=config, forked_from=ancestors)


@pytest.mark.parametrize(
    ("since", "header"),
    [
        (0, forked("X", (10, "X"), (5, "Y"))),  # of Y nothing is left
        (3, forked("Y", (3, "X"), (7, "Y"), (5, "X"))),
        (5, forked("Y", (7, "X"), (5, "Y"), (9, "Y"))),
        (9, forked("X", (7, "X"), (9, "Y"))),
    ],
)
def test_forks_of_forks_tell_since_when_their_config_holds(since: int, header: Header) -> None:
    assert header.config_since == since


def test_a_config_holds_since_the_last_step_under_another_whatever_was_forked() -> None:
    draw = random.Random(1)
    for _ in range(2000):
        taken_under: list[str] = []  # per step of the ledger, the config that took it
        forks = []
        for _ in range(draw.randint(0, 6)):
            config = draw.choice("XYZ")
            taken_under += config * draw.randint(0, 5)
            forks.append((draw.randint(0, len(taken_under)), config))
            del taken_under[forks[-1][0] :]
        others = [step for step, config in enumerate(taken_under) if config != "X"]
        since = others[-1] + 1 if others else 0
        assert forked("X", *forks).config_since == since, forks


def test_no_fork_is_made_of_what_is_damaged_or_over_what_is_there(path: Path) -> None:
    whole = write(path, steps(3))
    with pytest.raises(ValueError, match="step 4 is not among the 3 steps"):
        fork(path, 4, "other")
    child = fork(path, 2, "other")
    with pytest.raises(LedgerError, match="exists"):
        fork(path, 2, "other")
    child.unlink()
    path.write_bytes(whole.replace(b"0.25", b"0.26", 1))
    with pytest.raises(LedgerError, match="line 2: is damaged"):
        fork(path, 2, "other")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "wrong", [[[2, "bb", "cc"]], [["2", "bb", "cc", "dd"]], [[2, "bb", "cc", 3]], 2, {}]
)
def test_what_a_fork_says_of_its_parent_has_a_form(path: Path, wrong: object) -> None:
    members = members_of(HEADER_LINE)
    path.write_bytes(sealed({**members, "forked_from": wrong}))
    assert_refused(path, "line 1", "forked_from")
    path.write_bytes(sealed({**members, "forked_from": []}))  # is left out
    assert_refused(path, "line 1", "not canonical")


# Another run


@pytest.mark.parametrize(
    ("field", "value", "meaning"),
    [
        ("noise_version", 2, "another version of the noise"),
        ("weights_hash", "cc", "belongs to another model"),
        ("data_hash", "dd", "belongs to other data"),
        ("config_hash", "cc", "belongs to another configuration"),
        ("format", 2, "another format"),
    ],
)
def test_a_ledger_of_another_run_is_refused(
    path: Path, field: str, value: Any, meaning: str
) -> None:
    torn = write(path, steps(2))[:-5]
    path.write_bytes(torn)
    with pytest.raises(LedgerError) as caught:
        Ledger.open(path, replace(HEADER, **{field: value}))
    told = str(caught.value)
    for word in (str(path), meaning, field, str(getattr(HEADER, field)), str(value)):
        assert word in told
    assert path.read_bytes() == torn, "repaired although it is not ours"


def test_an_earlier_ledger_need_not_tell_the_splits_sizes(path: Path) -> None:
    write(path, steps(2))
    with Ledger.open(path, replace(HEADER, data_hash="cc-40-0-50")) as ledger:
        assert ledger.next_step == 2
    path.unlink()
    Ledger.create(path, replace(HEADER, data_hash="cc-40-0-50")).close()
    with pytest.raises(LedgerError, match="belongs to other data: data_hash is cc-40-0-50"):
        Ledger.open(path, replace(HEADER, data_hash="cc-41-0-49"))


def test_a_ledger_in_a_later_format_is_refused_whatever_else_it_holds(path: Path) -> None:
    path.write_bytes(sealed({"format": 2, "news": "good"}))
    assert_refused(path, "line 1", "format 2", "only 1")


def test_other_versions_and_model_names_are_only_noted(path: Path) -> None:
    write(path, steps(1))
    now = replace(HEADER, model="copy/tiny", versions=(("sglang", "0.5.4"), ("numba", "0.61")))
    with Ledger.open(path, now) as ledger:
        assert ledger.header == HEADER
        assert ledger.notes == (
            "model was tiny before, now it is copy/tiny",
            "python was 3.11.9 before, now it is absent",
            "sglang was 0.5.3 before, now it is 0.5.4",
            "numba was absent before, now it is 0.61",
        )
    assert path.read_bytes().startswith(HEADER_LINE)


# Files


def test_create_refuses_an_existing_file(path: Path) -> None:
    before = write(path, steps(1))
    with pytest.raises(LedgerError, match="exists; resume that run or choose another folder"):
        Ledger.create(path, HEADER)
    assert path.read_bytes() == before


def test_files_that_are_not_there_are_told(path: Path) -> None:
    attempts: list[Callable[[Path], object]] = [
        lambda path: Ledger.open(path, HEADER),
        lambda path: Ledger.create(path, HEADER),
        Ledger.read,
    ]
    for attempt in attempts:
        with pytest.raises(LedgerError, match=r"nowhere.*No such file"):
            attempt(path.parent / "nowhere" / "ledger.jsonl")


def run_python(code: str, path: Path) -> str:
    prelude = (
        "from tests.test_seed_sync import *\nfrom pathlib import Path\npath = Path(sys.argv[1])\n"
    )
    root = Path(__file__).parent.parent
    return subprocess.run(
        [sys.executable, "-c", prelude + code, str(path)],
        capture_output=True,
        check=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        text=True,
    ).stdout


def test_a_second_writer_is_refused(path: Path) -> None:
    with Ledger.create(path, HEADER) as ledger:
        with pytest.raises(LedgerError, match="is being written by another process"):
            Ledger.open(path, HEADER)
        code = "try: Ledger.open(path, HEADER)\nexcept LedgerError as error: print(error)"
        assert "is being written by another process" in run_python(code, path)
        ledger.append(STEP)
        assert read(path) == (HEADER, [STEP])
    Ledger.open(path, HEADER).close()


def test_a_refused_ledger_is_not_kept_locked(path: Path) -> None:
    write(path, steps(1))
    for _ in range(2):
        with pytest.raises(LedgerError, match="another model") as caught:
            Ledger.open(path, replace(HEADER, weights_hash="cc"))
        assert caught.tb is not None
    Ledger.open(path, HEADER).close()


FULL_DISK = """
import resource
first, second = steps(2)
ledger = Ledger.create(path, HEADER)
ledger.append(first)
whole = path.read_bytes()
for room in (0, 1, len(STEP_LINE) - 5):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + room, limits[1]))
    try:
        ledger.append(second)
    except LedgerWriteError as error:
        print(error, "because of", type(error.__cause__).__name__)
    assert path.read_bytes() == whole
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    ledger = Ledger.open(path, HEADER)
    assert list(ledger.records) == [first] and ledger.repairs == ()
ledger.append(second)
"""


def test_a_full_disk_leaves_a_whole_ledger(path: Path, tmp_path: Path) -> None:
    told = run_python(FULL_DISK, path).splitlines()
    assert told == [f"{path}: step 1 cannot be written: File too large because of OSError"] * 3
    assert path.read_bytes() == write(tmp_path / "undisturbed.jsonl", steps(2))


def test_a_line_that_may_not_be_on_disk_is_taken_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise OSError(5, "Input/output error")

    with Ledger.create(path, HEADER) as ledger:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(
                LedgerWriteError, match="step 0 cannot be written: Input/output error"
            ):
                ledger.append(STEP)
        assert path.read_bytes() == HEADER_LINE
        assert ledger.next_step == 0
        with pytest.raises(AssertionError, match="closed"):
            ledger.append(STEP)


def test_lines_are_on_disk_before_append_returns(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes | str] = []
    fsync = os.fsync

    def record_and_sync(file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        name = f"/proc/self/fd/{descriptor}"  # the ledger, under whichever name it has by then
        synced.append("folder" if is_folder else Path(name).read_bytes())
        fsync(file)

    monkeypatch.setattr(os, "fsync", record_and_sync)
    with Ledger.create(path, HEADER) as ledger:
        assert synced[:2] == [HEADER_LINE, "folder"]
        synced.clear()
        ledger.append(STEP)
        assert synced == [HEADER_LINE + STEP_LINE]
    synced.clear()
    Ledger.open(path, HEADER).close()
    assert synced == [HEADER_LINE + STEP_LINE], "what a killed process left behind"
