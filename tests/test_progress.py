"""What is shown of a fleet's replicas: on a terminal, and in a file."""

import io
import re

import pytest

from orchestrator.metrics import StepMetrics
from orchestrator.progress import Display
from orchestrator.records import FleetState, ReplicaState

FEW = FleetState(
    (
        ReplicaState("replica 0", "computing", 600, 299, 0.0312),
        ReplicaState("replica 1", "ready", 400, 290, 1.5),
        ReplicaState("replica 2", "loading"),
        ReplicaState("replica 3", "empty"),
    ),
    num_steps=300,
)
MANY = FleetState(
    (
        *(ReplicaState(f"replica {number}", "computing", 10, 299) for number in range(7)),
        *(ReplicaState(f"replica {number}", "ready", 10, 299) for number in (7, 8)),
        ReplicaState("replica 9", "loading"),
        ReplicaState("replica 10", "empty"),
    ),
    num_steps=300,
)


def step(number: int) -> StepMetrics:
    return StepMetrics(number, 0.5, 1.0, 1e-3, 0, 4, 100, 0.1)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(state: FleetState, height: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The live view's last lines, without their colours."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    display = Display(terminal, 1000)
    display.watch(lambda: state)
    with display.live():
        display.begin(300)
        display.step(step(300))
        display.say("some line")
        display.say("something")
    above, _, frame = terminal.getvalue().rpartition("something\n")
    assert "\x1b[2K" in above  # the view is written over
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", frame).strip().splitlines()[-height:]


def test_a_terminal_shows_a_line_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    head, *replicas, last = shown(FEW, 6, monkeypatch)
    assert head.split("  ")[0] == "replica"
    assert [line.split() for line in replicas] == [
        ["0", "computing", "600", "60%", "299", "0.0312"],
        ["1", "ready", "400", "40%", "290", "1.5"],
        ["2", "loading", "0", "0%", "0", "-"],
        ["3", "lost", "0", "0%", "0", "-"],
    ]
    assert last.startswith("step 301/1000") and "loss 0.5000" in last


def test_a_terminal_sums_up_a_large_fleet(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(MANY, 2, monkeypatch)
    assert lines[0].strip() == "11 replicas: 9 ready, 1 loading, 1 lost"
    assert lines[1].startswith("step 301/1000")


def test_a_file_gets_short_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the fleet when a replica has gone or come, and else once a minute; no control codes."""
    now = [1000.0]
    monkeypatch.setattr("orchestrator.progress.time.monotonic", lambda: now[0])
    file = io.StringIO()
    display = Display(file, 100_000)
    display.watch(lambda: FEW if now[0] < 1025 else MANY)
    with display.live():
        display.begin(0)
        for number in range(1000):
            now[0] += 0.1
            display.step(step(number))
    lines = file.getvalue().splitlines()
    assert "\x1b" not in file.getvalue()
    fleets = [line for line in lines if "replicas" in line]
    assert len(lines) - len(fleets) == 10  # one in ten seconds
    of_few = "4 replicas: 0 computing 60%, 1 ready 40%, 2 loading 0%, 3 lost 0%; 10 steps behind"
    assert fleets == [of_few, "11 replicas: 9 ready, 1 loading, 1 lost"] + [fleets[1]] * 1


def test_a_fleet_of_one_is_not_told_of() -> None:
    file = io.StringIO()
    display = Display(file, 10)
    display.watch(lambda: FleetState((ReplicaState("replica 0", "ready", 4, 1),), 1))
    display.step(step(0))
    assert file.getvalue().count("\n") == 1
