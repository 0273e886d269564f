"""Every figure that this project holds itself to, measured now, in one table.

    python -m benchmarks.bars [--sections sweeps,steps,...] [--large SHAPE] [--results FOLDER]

Each row says what was measured, against what, their ratio, and the bar that it is held to. Shapes
are the largest that the device holds, `--large` names another. On a CPU the models are small and
only one bar applies; the rest shows that the programs run.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator import environment

environment.prepare(threads=2)

import torch  # noqa: E402

from benchmarks import adapters, measure, reference, steps, sweeps  # noqa: E402
from benchmarks.measure import DEVICE, DTYPE, ON_GPU  # noqa: E402
from benchmarks.shapes import SHAPES  # noqa: E402
from orchestrator.space import table  # noqa: E402

NUM_SEEDS = 16
BYTES_PER_PARAMETER = 9  # live weights, a float32 master, and the reference's beside them
RUN_STEPS, MEASURED_STEPS = 20_000, 500
HOUR = 3600.0
COLUMNS = ("what", "ours", "against", "ratio", "bar", "holds")


@dataclass(frozen=True, slots=True)
class Row:
    """A figure; times in milliseconds but where `what` says otherwise."""

    what: str
    ours: float
    against: float
    ratio: float
    """Of the two, the larger the better, but for `at_most`."""
    bar: float | None = None
    at_most: bool = False

    @property
    def holds(self) -> str:
        if self.bar is None:
            return ""
        is_held = self.ratio <= self.bar if self.at_most else self.ratio >= self.bar
        return "yes" if is_held else "NO"

    @property
    def cells(self) -> list[object]:
        sign = "" if self.bar is None else ("<= " if self.at_most else ">= ")
        bar = "" if self.bar is None else f"{sign}{self.bar:g}"
        return [self.what, self.ours, self.against, self.ratio, bar, self.holds]


@dataclass(frozen=True, slots=True)
class Scale:
    """What is measured on this device."""

    large: str
    turns: int

    @staticmethod
    def fitting(large: str | None) -> "Scale":
        if not ON_GPU:
            return Scale(large or "opt-tiny", turns=3)
        total = torch.cuda.get_device_properties(0).total_memory
        fits = total > 13e9 * BYTES_PER_PARAMETER
        return Scale(large or ("opt-13b" if fits else "opt-1.3b"), turns=8)


# -------------------------------------------------------------------- sections


def sweep_rows(scale: Scale) -> Iterator[Row]:
    """Sweeps beside a copy of the bytes that they cannot avoid to move."""
    for row in sweeps.run(scale.large, scale.turns):
        if "digest" in row["sweep"]:
            continue
        copy_ms = row["ms"] * row["copy_over_sweep"]
        is_held = "float32 ->" in row["sweep"] and "16 seeds" not in row["sweep"]
        bar = 1 / 1.12 if is_held and "low-rank" not in row["sweep"] else None
        yield Row(row["sweep"], row["ms"], copy_ms, row["copy_over_sweep"], bar)


def update_rows(scale: Scale) -> Iterator[Row]:
    """Many seeds in one sweep, beside as many of the reference's updates."""
    live = getattr(torch, DTYPE)
    whole = table(sweeps.slices(scale.large, torch.float32, live, shared=False))
    model = reference.build(SHAPES[scale.large].config, dtype=live, device=DEVICE)
    mezo = reference.Mezo(model, eps=steps.EPS, lr=steps.LR)
    calls: dict[str, Callable[[], object]] = {
        f"{kind} {count}": partial(whole.update, kind, [sweeps.step(count)])
        for kind in sweeps.KINDS
        for count in (1, NUM_SEEDS)
    }
    calls["reference"] = lambda: [mezo.update(seed, 1e-3) for seed in range(NUM_SEEDS)]
    times = measure.paired(calls, scale.turns)
    taken = {name: 1e3 * value for name, value in measure.medians(times).items()}
    for kind in sweeps.KINDS:
        ours = f"{kind} {NUM_SEEDS}"
        yield Row(
            f"update by {NUM_SEEDS} seeds, {kind}, {scale.large}; {NUM_SEEDS} of the reference's",
            taken[ours],
            taken["reference"],
            measure.ratio(times, "reference", ours),
            20 if kind == "rademacher" else None,
        )
        yield Row(
            f"update by {NUM_SEEDS} seeds, {kind}, {scale.large}; by one seed",
            taken[ours],
            taken[f"{kind} 1"],
            measure.ratio(times, ours, f"{kind} 1"),
            2 if kind == "rademacher" else None,
            at_most=True,
        )


def step_rows(scale: Scale) -> Iterator[Row]:
    """Whole steps beside the reference's; adapters' also beside its steps on all parameters."""
    small, all_parameters = ("4x16" if not ON_GPU else "16x64"), {}
    for space, bars in (
        ("dense:float32", {small: 2.9, "sst2": 5}),
        ("dense:bfloat16", {small: 3.3, "sst2": 6}),
        ("lora", {"sst2": 3.5}),
        ("lora:fp8", {"sst2": 5}),
    ):
        if space == "lora:fp8" and not ON_GPU:
            continue
        for found in _steps(scale, scale.large, tuple(bars), space):
            tokens = found["tokens"]
            yield _step_row(found, bars[tokens])
            if space.startswith("dense"):
                all_parameters[tokens] = found["reference_ms"]
            else:
                against = all_parameters[tokens]
                what = f"step, {scale.large}, {space}, {tokens}; the reference on all parameters"
                bar = 9 if space == "lora" else 12
                yield Row(what, found["ours_ms"], against, against / found["ours_ms"], bar)


def long_step_rows(scale: Scale) -> Iterator[Row]:
    """Steps that are bound by their forwards."""
    tokens = "64x256" if ON_GPU else "8x32"
    (found,) = _steps(scale, scale.large, (tokens,), "dense:float32")
    yield _step_row(found, 1.2)
    share = 1 / found["ours_over_prefills"]
    what = f"step, {scale.large}, dense:float32, {tokens}; two plain prefills"
    yield Row(what, found["ours_ms"], found["prefills_ms"], share, 0.92)


def small_step_rows(scale: Scale) -> Iterator[Row]:
    """Steps of models whose forwards leave a GPU waiting for launches; a CPU's own bar."""
    if not ON_GPU:
        space = "dense:float32:rademacher"
        (found,) = _steps(scale, "smollm2-135m", ("sst2",), space)
        yield _step_row(found, 2)
        return
    for shape, bar in (("opt-1.3b", 5.0), ("opt-125m", 8.0)):
        (found,) = _steps(scale, shape, ("16x64",), "dense:float32")
        yield _step_row(found, bar)


def run_rows(scale: Scale) -> Iterator[Row]:
    """A whole run of an adapter, projected from its first steps."""
    count = MEASURED_STEPS if ON_GPU else 5
    comparison = steps.Comparison(scale.large, "lora", steps.Settings(("sst2",), 1, 1))
    with comparison.our_steps() as ours:
        for _ in range(steps.NUM_WARMUPS):
            ours["sst2"].step()
        started = measure.now()
        for _ in range(count):
            ours["sst2"].step()
        taken = measure.now() - started
    hours = taken / count * RUN_STEPS / HOUR
    what = f"hours of {RUN_STEPS} steps of lora, {scale.large}, sst2, from {count}; best peer's"
    yield Row(what, hours, 0.51, hours, 0.30, at_most=True)


def adapter_rows(scale: Scale) -> Iterator[Row]:
    """Many adapters in one forward beside plain prefill; milliseconds a thousand tokens."""
    for shape in dict.fromkeys(["llama-3-8b", scale.large] if ON_GPU else [scale.large]):
        for modules, bar in ((("q_proj", "v_proj"), 0.97), (SHAPES[shape].modules, 0.91)):
            found = adapters.compare(shape, modules, scale.turns)
            measure.free_memory()
            name = f"{adapters.NUM_SLOTS} adapters in a forward, {shape}, {found['targets']}"
            slots, plain = 1e6 / found["tokens_a_second"], 1e6 / found["plain_tokens_a_second"]
            yield Row(f"{name}; plain prefill", slots, plain, found["share"], bar)
            is_held = len(modules) == len(("q_proj", "v_proj"))
            yield Row(
                f"writing {adapters.NUM_SLOTS} adapters, {shape}, {found['targets']}",
                found["write_ms"],
                math.nan,
                found["write_ms"],
                1 if is_held else None,
                at_most=True,
            )


SECTIONS: dict[str, Callable[[Scale], Iterator[Row]]] = {
    "sweeps": sweep_rows,
    "updates": update_rows,
    "steps": step_rows,
    "long-steps": long_step_rows,
    "small-steps": small_step_rows,
    "run": run_rows,
    "adapters": adapter_rows,
}


def _steps(scale: Scale, shape: str, tokens: tuple[str, ...], space: str) -> list[dict[str, Any]]:
    found = steps.Comparison(shape, space, steps.Settings(tokens, scale.turns, 1)).run()
    measure.free_memory()
    return found


def _step_row(found: dict[str, Any], bar: float) -> Row:
    return Row(
        f"step, {found['shape']}, {found['space']}, {found['tokens']}; the reference",
        found["ours_ms"],
        found["reference_ms"],
        found["reference_over_ours"],
        bar,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bars")
    parser.add_argument("--sections", default=",".join(SECTIONS), help=", ".join(SECTIONS))
    parser.add_argument("--large", help="shape: " + ", ".join(SHAPES))
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help="a folder")
    chosen = parser.parse_args(arguments)
    for section in chosen.sections.split(","):
        if section not in SECTIONS:
            parser.error(f"--sections: {section}: there are {', '.join(SECTIONS)}")
    if chosen.large not in (None, *SHAPES):
        parser.error(f"--large: {chosen.large}: there are {', '.join(SHAPES)}")
    scale = Scale.fitting(chosen.large)
    print(measure.header())
    print(measure.rates(), flush=True)
    rows: list[Row] = []
    for section in chosen.sections.split(","):
        for row in SECTIONS[section](scale):
            if not ON_GPU and section != "small-steps":  # whose bar is a CPU's
                row = replace(row, bar=None)
            rows.append(row)
            print(f"{row.what}: {row.ours:.2f}, {row.against:.2f}, {row.ratio:.2f}", flush=True)
        measure.free_memory()
        path = measure.write_results("bars", [asdict(row) for row in rows], chosen.results)
    measure.print_table(COLUMNS, [row.cells for row in rows])
    print(f"kept in {path}")


if __name__ == "__main__":
    main()
