"""Countdown: make a target from a few numbers, as a worked example of a reward of one's own.

Owns the rows (`python -m examples.countdown --help`) and the checker, `reward`, that a recipe names
as `task.reward.function: examples.countdown:reward`. Copy it for a task of your own: it knows
nothing of the package, and runs in worker processes.
"""

import argparse
import ast
import json
import random
import warnings
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

LONGEST = 100  # characters of an expression: its numbers stay small, and it cannot take long
LARGEST_TARGET = 99
MOST_MISSES = 10_000  # draws in a row that give no new row
WELL_FORMED, GIVEN, CLOSE = 0.1, 0.3, 0.4  # what an answer that misses the target may collect


def reward(row: dict[str, Any], text: str) -> float:
    """What an answer is worth, from 0 to 1.

    1     it makes the target, of given numbers alone, each used at most as often as it is given
    else the sum of
    0.1   it is an expression of whole numbers, + - * / and brackets; what follows a `=` is ignored
    0.3   times the share of its numbers that are given; with fewer than two numbers, half of it
    0.4   of given numbers alone, and at least two: times 1 / (1 + distance / 5) to the target
    """
    numbers, target = Counter(map(int, row["numbers"].split(","))), int(row["target"])
    tree = parsed(text.partition("=")[0])
    if tree is None:
        return 0.0
    leaves = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    used = Counter(value for value in leaves if isinstance(value, int))
    share = (used & numbers).total() / used.total()
    value = computed(tree)
    is_given = share == 1
    if is_given and value == target:
        return 1.0
    if used.total() < 2:
        return WELL_FORMED + GIVEN * share / 2
    worth = WELL_FORMED + GIVEN * share
    if is_given and value is not None:
        worth += CLOSE / float(1 + abs(value - target) / 5)
    return worth


OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div)


def parsed(text: str) -> ast.expr | None:
    """The expression that a text is; None for one that holds anything else. Nothing is run."""
    text = text.strip()
    if len(text) > LONGEST:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Python would make of it
            tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return tree if _is_arithmetic(tree) else None


def _is_arithmetic(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        sides = _is_arithmetic(node.left) and _is_arithmetic(node.right)
        return isinstance(node.op, OPERATORS) and sides
    return isinstance(node, ast.Constant) and type(node.value) is int  # True is an int too


def computed(node: ast.expr) -> Fraction | None:
    """The exact value of an expression that `parsed` gave; None where it divides by zero."""
    if isinstance(node, ast.Constant):
        assert isinstance(node.value, int)
        return Fraction(node.value)
    assert isinstance(node, ast.BinOp)
    left, right = computed(node.left), computed(node.right)
    if left is None or right is None:
        return None
    if isinstance(node.op, ast.Add):
        return left + right
    if isinstance(node.op, ast.Sub):
        return left - right
    if isinstance(node.op, ast.Mult):
        return left * right
    return left / right if right else None


# -------------------------------------------------------------------- rows


def rows(seed: int, size: int, largest: int) -> Iterator[dict[str, Any]]:
    """Rows, no two the same, until new ones are hard to find: `size` numbers of 1 to `largest`, a
    target that they make, and one solution, which uses them all."""
    draw, seen, misses = random.Random(seed), set(), 0
    while misses < MOST_MISSES:
        misses += 1
        numbers = [draw.randint(1, largest) for _ in range(size)]
        solution = _drawn(draw, numbers)
        tree = parsed(solution)
        assert tree is not None
        target = computed(tree)
        if target is None or target.denominator != 1 or not 1 <= target <= LARGEST_TARGET:
            continue
        if target in numbers or (*sorted(numbers), target) in seen:
            continue
        seen.add((*sorted(numbers), target))
        misses = 0
        listed = ", ".join(map(str, numbers))
        yield {"numbers": listed, "target": int(target), "solution": solution}


def _drawn(draw: random.Random, numbers: list[int]) -> str:
    """An expression of all the numbers, in another order."""
    parts = [str(number) for number in draw.sample(numbers, len(numbers))]
    while len(parts) > 1:
        left, right = parts.pop(), parts.pop()
        joined = f"{left} {draw.choice('+-*/')} {right}"
        parts.append(f"({joined})" if parts else joined)
    return parts[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write rows of the game Countdown.")
    parser.add_argument("out", type=Path, metavar="OUT.jsonl")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument(
        "--numbers", type=int, default=3, choices=range(2, 7), help="numbers a row; default: 3"
    )
    parser.add_argument("--largest", type=int, default=12, help="largest of them; default: 12")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    endless = rows(arguments.seed, arguments.numbers, arguments.largest)
    found = list(islice(endless, arguments.rows))
    if len(found) < arguments.rows:
        parser.error(f"there are only some {len(found)} such rows; ask for larger numbers")
    with arguments.out.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in found)


if __name__ == "__main__":
    main()
