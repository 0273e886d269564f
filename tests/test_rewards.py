"""Reward functions that fail in every way, in real worker processes."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import rewards
from orchestrator.config import ConfigError, Reward
from orchestrator.records import FAILURES
from orchestrator.rewards import Judged, RewardPool

ROOT = Path(__file__).parent.parent
MODULE = """
    import json, math, os, re, subprocess, sys, time
    from fractions import Fraction

    def score(row, text):
        print("chatter")
        if text == "sleep":
            time.sleep(3600)
        if text == "spin":  # holds the interpreter's lock
            re.fullmatch("(a+)+b", "a" * 64)
        if text == "leave":
            sys.exit(0)
        if text == "die":
            os.kill(os.getpid(), 9)
        if text == "raise":
            raise KeyError("no such thing\\nas this")
        if text == "children":
            child = subprocess.Popen(["sleep", "3600"], stdout=subprocess.DEVNULL)
            with open(row["file"], "w") as file:
                file.write(str(child.pid))
            time.sleep(3600)
        odd = {"nan": math.nan, "inf": -math.inf, "huge": 10**400, "text": "1.0", "none": None,
               "vast": -1e200, "true": True, "half": Fraction(1, 2), "list": [1.0]}
        return odd[text] if text in odd else len(text) + row["bonus"]

    def process(row, text):
        return os.getpid()

    def fork(row, text):
        if row.get("forks") and os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        return os.getpid()

    def fork_and_die(row, text):
        if os.fork() == 0:
            time.sleep(60)
        os._exit(1)

    def variables(row, text):
        return sum(name in os.environ for name in row["names"])

    not_a_function = 3
"""
KINDS = {
    "sleep": "timeout",
    "spin": "timeout",
    "leave": "crash",
    "die": "crash",
    "raise": "raised",
    "nan": "not_finite",
    "inf": "not_finite",
    "huge": "not_finite",
    "vast": "not_finite",
    "text": "not_a_number",
    "none": "not_a_number",
    "list": "not_a_number",
}
LOST = -0.25

Make = Callable[..., RewardPool]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A pool for a function of the module above, by its name."""
    (tmp_path / "mine.py").write_text(textwrap.dedent(MODULE))
    made: list[RewardPool] = []

    def pool(name: str = "score", **others: Any) -> RewardPool:
        values = {"function": f"mine:{name}", "path": str(tmp_path), "failed": LOST} | others
        made.append(RewardPool(Reward.model_validate(values)))
        return made[-1]

    yield pool
    for each in made:
        each.close()


def has_ended(process: int) -> bool:
    """Whether it is gone, or dead and waiting for its parent to look; within 20 s."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            status = Path(f"/proc/{process}/stat").read_text()
        except FileNotFoundError:
            return True
        if status.rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("text", KINDS)
def test_a_call_that_fails_costs_its_sample_alone(
    text: str, make: Make, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    samples = [({"bonus": 10}, each) for each in ("", "a", text, "bb", text, "ccc")]
    with caplog.at_level(logging.WARNING):
        judged = make(timeout=0.5).judge(samples)
    lost = Judged(LOST, KINDS[text])
    assert judged == [Judged(10.0), Judged(11.0), lost, Judged(12.0), lost, Judged(13.0)]
    assert rewards.count(judged) == tuple(2 * (kind == KINDS[text]) for kind in FAILURES)
    (record,) = caplog.records  # the second failure is only counted
    told = record.getMessage()
    assert f"mine:score failed ({KINDS[text]}): " in told and "\n" not in told
    if text == "raise":
        assert "KeyError: 'no such thing" in told and "mine.py:" in told
    assert capfd.readouterr() == ("", "chatter\n" * len(samples))  # killed or not


def test_numbers_of_all_kinds_are_taken(make: Make) -> None:
    judged = make().judge([({}, text) for text in ("true", "half")])
    assert judged == [Judged(1.0), Judged(0.5)]


def test_many_samples_come_back_in_their_order_from_all_workers(make: Make) -> None:
    pool = make(workers=3)
    texts = ["x" * (7 * number % 50) for number in range(200)]
    samples = [({"bonus": number}, text) for number, text in enumerate(texts)]
    expected = [Judged(float(len(text) + number)) for number, text in enumerate(texts)]
    assert pool.judge(samples) == expected
    assert pool.judge(samples[::-1]) == expected[::-1]
    assert pool.judge([]) == []
    # A sample larger than what a socket holds at a time.
    assert pool.judge([({"bonus": 1}, "x" * 5_000_000)]) == [Judged(5_000_001.0)]
    pool, deadline = make("process", workers=3), time.monotonic() + 60
    ids: set[float] = set()
    while len(ids) < 3:  # those that were ready first may take all
        assert time.monotonic() < deadline
        ids |= {each.value for each in pool.judge([({}, "")] * 20)}
    assert len(ids) == 3 and os.getpid() not in ids


def test_the_limit_is_of_real_time_and_workers_hang_side_by_side(make: Make) -> None:
    pool = make(timeout=1.0, workers=2)
    pool.judge([({"bonus": 0}, "a")] * 2)
    started = time.monotonic()
    assert pool.judge([({}, "sleep")] * 4) == [Judged(LOST, "timeout")] * 4
    assert time.monotonic() - started < 30  # an hour each, if nobody counted


def test_what_a_worker_started_ends_with_it(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "child"
    pool = make(timeout=2.0, workers=1)
    assert pool.judge([({"file": str(file)}, "children")]) == [Judged(LOST, "timeout")]
    assert has_ended(int(file.read_text()))


def test_a_worker_that_dies_idle_is_replaced_whatever_it_has_forked(make: Make) -> None:
    """A forked child holds the worker's channel open, which then tells of no end."""
    pool = make("fork", timeout=5.0, workers=1)
    (first,) = pool.judge([({"forks": True}, "")])
    pool._workers[0].process.send_signal(signal.SIGKILL)
    pool._workers[0].process.wait()
    (second,) = pool.judge([({}, "")])
    assert (second.failure, second.value != first.value) == (None, True)


def test_a_worker_that_dies_at_work_is_not_waited_for_whatever_it_has_forked(make: Make) -> None:
    pool, started = make("fork_and_die", timeout=300.0, workers=1), time.monotonic()
    assert pool.judge([({}, "")]) == [Judged(LOST, "crash")]
    assert time.monotonic() - started < 60


def test_workers_end_with_the_process_that_started_them(make: Make, tmp_path: Path) -> None:
    """However it ends; and one that is in the middle of a call too."""
    program = f"""
        import os, signal, threading
        from orchestrator.config import Reward
        from orchestrator.rewards import RewardPool
        pool = RewardPool(Reward(function="mine:score", path={str(tmp_path)!r}, workers=1))
        pool.start()
        print(pool._workers[0].process.pid, flush=True)
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        pool.judge([({{}}, "spin")])
    """
    make()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert has_ended(int(done.stdout))


def test_a_worker_sees_no_variable_that_was_not_asked_for(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUB_TOKEN", "secret")
    monkeypatch.setenv("JUDGE_KEY", "secret")
    row = {"names": ["HUB_TOKEN", "JUDGE_KEY"]}
    assert make("variables").judge([(row, "")]) == [Judged(0.0)]
    asked = make("variables", environment=["JUDGE_KEY", "NOT_SET"])
    assert asked.judge([(row, "")]) == [Judged(1.0)]
    assert make("variables").judge([({"names": ["PATH"]}, "")]) == [Judged(1.0)]


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("nowhere:score", "ModuleNotFoundError: No module named 'nowhere'"),
        ("mine:none", "AttributeError: module 'mine' has no attribute 'none'"),
        ("mine:not_a_function", "TypeError: not_a_function is no function"),
        ("broken:score", "ZeroDivisionError: division by zero, .*broken.py:1"),
        ("leaving:score", "SystemExit: 3"),
        ("replica:score", "ModuleNotFoundError: No module named 'replica'"),  # ours are not theirs
    ],
)
def test_a_function_that_cannot_be_called_is_refused_in_one_line(
    function: str, why: str, make: Make, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "leaving.py").write_text("import sys; sys.exit(3)\n")
    reward = Reward(function=function, path=str(tmp_path))
    message = f"task.reward.function: {function}: {why}.*; it is looked for"
    for call in (lambda: rewards.check(reward), lambda: RewardPool(reward).judge([({}, "")])):
        with pytest.raises(ConfigError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not {"mine", "broken", "leaving"} & set(sys.modules)


def test_a_module_that_can_be_imported_no_more_costs_samples_and_not_the_run(
    make: Make, tmp_path: Path
) -> None:
    pool = make(workers=1)
    assert pool.judge([({"bonus": 0}, "a")]) == [Judged(1.0)]
    (tmp_path / "mine.py").write_text("1 / 0\n")
    assert pool.judge([({}, "die"), ({}, "b"), ({}, "c")]) == [Judged(LOST, "crash")] * 3
