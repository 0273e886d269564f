"""The worked example's checker and rows."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.countdown import computed, parsed, reward

ROOT = Path(__file__).parent.parent
ROW = {"numbers": "2, 5, 9, 5", "target": 19}


@pytest.mark.parametrize(
    "text", ["2 * 5 + 9", " (9+(5*2)) ", "9 + 5 + 5", "2*5+9 = 19", "2*5+9=18", "2*9 + 5/5"]
)
def test_the_target_of_given_numbers_is_worth_one(text: str) -> None:
    assert reward(ROW, text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "= 19",
        "nineteen",
        "The answer is 2 * 5 + 9",
        "2 * 5 + 9.",
        "2 ** 9",
        "9 // 2",
        "9 % 5",
        "-2 + 9",
        "2.0 * 9",
        "1e9 * 2",
        "0b1 + x",
        "True + 9",
        "2 * 5 + '9'",
        "2, 5",
        "2 if 5 else 9",
        "__import__('os').getpid()",
        "2(5) + 9",
        "02 + 9",
        "(" * 50,
        "(" * 3000 + "2" + ")" * 3000,
        "9" * 101,
        "2 +\x00 9",
        "2 +\n9 9",
        "\u0662 + 9x",
    ],
)
def test_what_is_no_arithmetic_is_worth_nothing(text: str) -> None:
    assert reward(ROW, text) == 0.0


def test_an_answer_that_misses_collects_what_it_has() -> None:
    worth = [
        reward(ROW, text)
        for text in (
            "7 + 8",  # well formed
            "2 + 8",  # one of two numbers is given
            "2 + 5",  # all are, 12 off
            "9 + 5 + 2",  # 3 off
            "9 + 5 + 5 / 2",  # 2.5 off
            "9 + 2 * 5",
        )
    ]
    expected = [0.1, 0.25, 0.4 + 0.4 / 3.4, 0.4 + 0.4 / 1.6, 0.4 + 0.4 / 1.5, 1.0]
    assert worth == pytest.approx(expected)
    # The target alone, or one number alone, is no way to make it.
    assert reward(ROW, "19") == pytest.approx(0.1)
    assert reward(ROW, "9") == pytest.approx(0.25)
    # A number more often than it is given; division by zero.
    assert reward(ROW, "9 + 9 + 2") == pytest.approx(0.1 + 0.3 * 2 / 3)
    assert reward(ROW, "2 / (5 - 5)") == pytest.approx(0.4)


def test_no_text_of_its_length_takes_long() -> None:
    started = time.monotonic()
    for text in ("9*" * 49 + "9", "(" * 33 + "9" + ")" * 33, "9/" * 49 + "7", "+" * 100):
        assert 0 <= reward(ROW, text) < 1
    assert time.monotonic() - started < 5


def test_every_row_is_solved_by_its_solution_and_seeds_differ(tmp_path: Path) -> None:
    found = []
    for seed in ("0", "0", "1"):
        out = tmp_path / "rows.jsonl"
        command = [sys.executable, "-m", "examples.countdown", str(out), "--rows", "500"]
        subprocess.run([*command, "--seed", seed], cwd=ROOT, check=True)
        found.append([json.loads(line) for line in out.read_text().splitlines()])
    assert found[0] == found[1] != found[2]
    for row in found[0]:
        assert reward(row, row["solution"]) == 1.0
        tree = parsed(row["solution"])
        assert tree is not None and computed(tree) == row["target"]
        assert row["solution"].count(" ") == 4  # both operators
    assert len({(row["numbers"], row["target"]) for row in found[0]}) == 500
    few = subprocess.run(
        [*command, "--numbers", "2", "--largest", "2"], cwd=ROOT, capture_output=True, text=True
    )
    assert few.returncode == 2 and "there are only some" in few.stderr
