"""What recipes learn: whole runs of `launch.py train` over several run seeds.

    python -m benchmarks.learning --squad squad.jsonl [--runs sentiment,...] [--seeds 0,1,2]
                                  [--jobs N] [--results FOLDER] [section.key=value ...]

Each run is a process of its own, `--jobs` at a time: held-out metrics do not depend on who else is
on the device, so nothing is said of speed. A value is the mean over the held-out rows before the
first step and after the last; `gain` the mean over seeds of their difference, `least` the smallest.
SQuAD's rows are yours to bring (`python -m examples.squad`), Countdown's are made.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import environment

environment.prepare(threads=2)

from benchmarks import measure  # noqa: E402
from orchestrator.evaluate import PLAIN  # noqa: E402

ROOT = Path(__file__).parent.parent
COLUMNS = ("run", "metric", "seed", "before", "after", "95 % interval", "gain")
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Choice:
    """A recipe, with what is changed of it."""

    recipe: str
    overrides: tuple[str, ...] = ()


ON_ONE_GPU = ("model.device=cuda", "fleet.kind=local", "fleet.num_replicas=1", "run.eval_every=0")
RUNS = {
    "sentiment": Choice("demo_lora.yaml", (*ON_ONE_GPU, "space.slots=8")),
    "squad by loss": Choice("squad.yaml"),
    "squad by F1": Choice("squad.yaml", ("task.objective=f1",)),
    "countdown": Choice("countdown.yaml"),
}


def trained(name: str, seed: int, data: Path, overrides: Sequence[str]) -> Row:
    """One run's row. Raises RuntimeError, with what it printed, for a run that failed."""
    choice = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        changed = [*choice.overrides, f"run.seed={seed}", f"run.dir={folder}/run"]
        if choice.recipe != "demo_lora.yaml":
            rows = data / f"{Path(choice.recipe).stem}.jsonl"
            changed.append(f"task.train.path={rows}")
        done = subprocess.run(
            [
                sys.executable,
                "launch.py",
                "train",
                f"configs/{choice.recipe}",
                *changed,
                *overrides,
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{name}, seed {seed}: {done.stdout}{done.stderr}")
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
    before, after = summary["baseline_accuracy"], summary["final_accuracy"]
    return {
        "run": name,
        "recipe": choice.recipe,
        "overrides": [*choice.overrides, *overrides],
        "seed": seed,
        "metric": summary["metric"],
        "before": before,
        "after": after,
        "after_interval": summary["final_interval"],
        "gain": after - before,
        "num_held_out": summary["num_held_out"],
        "steps": summary["steps"],
        "seconds": summary["wall_s"],
    }


def shown(row: Row) -> list[object]:
    scale, digits = (1, 3) if row["metric"] in PLAIN else (100, 1)
    low, high = row["after_interval"]
    return [
        row["run"],
        row["metric"],
        row["seed"],
        *(f"{scale * row[name]:.{digits}f}" for name in ("before", "after")),
        f"{scale * low:.{digits}f} to {scale * high:.{digits}f}",
        f"{scale * row['gain']:+.{digits}f}",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning")
    parser.add_argument("--runs", default=",".join(RUNS), help=", ".join(RUNS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--squad", type=Path, help="rows, as examples.squad writes them")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help="a folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    chosen = parser.parse_intermixed_args(arguments)
    names = chosen.runs.split(",")
    for name in names:
        if name not in RUNS:
            parser.error(f"--runs: {name}: there are {', '.join(RUNS)}")
        if name.startswith("squad") and (chosen.squad is None or not chosen.squad.is_file()):
            parser.error(f"--squad: {name} needs a file of rows; see examples/squad.py")
    print(measure.header())
    with tempfile.TemporaryDirectory() as data, ThreadPoolExecutor(chosen.jobs) as pool:
        if chosen.squad is not None:
            (Path(data) / "squad.jsonl").symlink_to(chosen.squad.absolute())
        command = [sys.executable, "-m", "examples.countdown", f"{data}/countdown.jsonl"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        seeds = [int(seed) for seed in chosen.seeds.split(",")]
        waiting = [
            pool.submit(trained, name, seed, Path(data), chosen.overrides)
            for name in names
            for seed in seeds
        ]
        rows = [each.result() for each in waiting]
    measure.print_table(COLUMNS, [shown(row) for row in rows])
    for name in names:
        gains = [row["gain"] for row in rows if row["run"] == name]
        print(f"{name}: gain {statistics.mean(gains):.3f}, least {min(gains):.3f}")
    print(f"kept in {measure.write_results('learning', rows, chosen.results)}")


if __name__ == "__main__":
    main()
