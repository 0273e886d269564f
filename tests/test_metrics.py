"""Records as other tools read them, and the display on a terminal and off one."""

import io
import json
import math
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from orchestrator.metrics import (
    Evaluation,
    KvUse,
    Records,
    StepMetrics,
    Summary,
    baseline,
    best,
    entries,
    evaluations,
    read_summary,
)
from orchestrator.metrics import lost as metrics_lost
from orchestrator.progress import Display
from orchestrator.runs import Looks

STEPS = [
    StepMetrics(
        step=step,
        loss=1.0 / (step + 1),
        gradient=5.0,
        lr=1e-4,
        num_dropped=int(step == 2),
        num_probes=4,
        num_tokens=100,
        seconds=2.0,
    )
    for step in range(3)
]
BEFORE, AFTER = Evaluation(0, 0.5, 10, 1.0), Evaluation(3, 0.75, 10, 1.0)
SUMMARY = Summary(3, 9.0, 2.0, 50.0, 0.5, 0.75, 10, "ab", {"sglang": "0.5.17"})


def test_tensorboard_and_json_lines_hold_the_same(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.evaluation(BEFORE)
    for step in STEPS:
        records.step(step)
    records.evaluation(AFTER)
    records.summary(SUMMARY)
    records.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(step.step, pytest.approx(step.loss)) for step in STEPS]
    assert [event.value for event in events.Scalars("held_out/accuracy")] == [0.5, 0.75]
    assert [event.value for event in events.Scalars("speed/probes_per_s")] == [2.0] * 3
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["evaluation", "step", "step", "step", "evaluation"]
    assert [line["loss"] for line in lines[1:4]] == [step.loss for step in STEPS]
    assert json.loads((tmp_path / "summary.json").read_text())["final_accuracy"] == 0.75
    assert baseline(evaluations(tmp_path)) == BEFORE


def test_a_run_without_a_baseline_has_none(tmp_path: Path) -> None:
    assert baseline(evaluations(tmp_path)) is None
    Records(tmp_path).close()
    assert baseline(evaluations(tmp_path)) is None


@pytest.mark.parametrize("torn", ["", '{"steps": 3, "wal', "[]", "{}", "\xff"])
def test_a_summary_that_cannot_be_read_is_none(torn: str, tmp_path: Path) -> None:
    assert read_summary(tmp_path) is None
    records = Records(tmp_path)
    records.summary(SUMMARY)
    records.close()
    assert read_summary(tmp_path) == SUMMARY
    (tmp_path / "summary.json").write_text(torn, encoding="latin-1")
    assert read_summary(tmp_path) is None


def test_a_summary_is_there_only_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Records(tmp_path)

    def stop(path: Path, *_: object) -> None:
        assert json.loads(path.read_text())["digest"] == SUMMARY.digest
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", stop)
        records.summary(SUMMARY)
    records.close()
    assert not (tmp_path / "summary.json").exists()


def test_lines_go_on_behind_one_that_was_cut_short(tmp_path: Path) -> None:
    for end in ("", "{}\n", '{"kind": "st'):
        (tmp_path / "metrics.jsonl").write_text(end)
        records = Records(tmp_path)
        records.evaluation(BEFORE)
        records.close()
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert lines[:-1] == end.splitlines()
        assert json.loads(lines[-1])["accuracy"] == BEFORE.accuracy


def test_plain_output_tells_step_loss_gradient_speed_time_left_and_accuracy() -> None:
    terminal = io.StringIO()
    display = Display(terminal, num_steps=3)
    display.evaluation(BEFORE)
    with display.live():
        display.begin(0)
        for step in STEPS:
            display.step(step)
    summary = replace(SUMMARY, final_interval=(0.6, 0.85), best_step=2, best_dev=0.7)
    display.result(summary, Path("runs/x"))
    shown = terminal.getvalue()
    assert "step 1/3  loss 1.0000  |g| 5.00  0.50 steps/s  4 s left  held-out 50.0%" in shown
    assert "step 3: dropped 1 seeds whose loss was not finite" in shown
    assert "zero-shot" in shown and "50.0%" in shown
    assert "after 3 steps" in shown and "75.0% (60.0% to 85.0%)" in shown
    assert "best on dev rows: 70.0% after 2 steps" in shown
    assert shown.rstrip().endswith("run folder: runs/x")


def test_looks_at_dev_rows_are_told_apart_and_choose_the_best(tmp_path: Path) -> None:
    records = Records(tmp_path)
    dev = [
        Evaluation(step, value, 10, 1.0, "f1", (value - 0.1, value + 0.1), "dev")
        for step, value in [(0, 0.2), (2, 0.6), (4, 0.6), (6, 0.5)]
    ]
    looks = [Evaluation(0, 0.3, 20, 1.0, "f1", (0.2, 0.4)), *dev]
    for look in looks:
        records.evaluation(look)
    records.summary(replace(SUMMARY, metric="f1", final_interval=(0.1, 0.2)))
    records.close()
    assert list(evaluations(tmp_path)) == looks
    assert baseline(evaluations(tmp_path)) == looks[0]
    assert best(evaluations(tmp_path)) == dev[1]
    assert best(looks[:1]) is None
    summary = read_summary(tmp_path)
    assert summary is not None and summary.final_interval == (0.1, 0.2)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert len(events.Scalars("dev/f1")) == len(dev)
    assert len(events.Scalars("held_out/f1")) == 1


def test_of_looks_of_different_sizes_the_larger_choose_and_of_a_steps_the_later() -> None:
    values = [(2, 0.95, 10), (4, 0.70, 500), (6, 0.80, 500), (6, 0.65, 500)]
    looks = [Evaluation(step, value, size, 1.0, split="dev") for step, value, size in values]
    assert best(looks) == looks[1]


def test_a_look_that_a_killed_run_did_not_come_to_is_known_to_be_missing(tmp_path: Path) -> None:
    records = Records(tmp_path)
    for step in (0, 2, 4):
        records.evaluation(Evaluation(step, 0.5, 10, 1.0, split="dev"))
    records.close()
    found = [Looks(tmp_path, step).is_missing(2, "dev") for step in range(1, 8)]
    assert found == [False, False, False, False, False, True, False]
    assert Looks(tmp_path, 4).is_missing(2, "test")
    assert not Looks(tmp_path, 6).is_missing(0, "dev")


def test_numbers_that_are_not_finite_leave_files_that_every_reader_takes(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.step(replace(STEPS[0], loss=math.nan, gradient=math.nan))
    records.summary(replace(SUMMARY, baseline_accuracy=math.nan))
    records.close()

    def refuse(word: str) -> None:
        raise AssertionError(word)

    for name in ("metrics.jsonl", "summary.json"):
        json.loads((tmp_path / name).read_text(), parse_constant=refuse)
    (entry,) = entries(tmp_path)
    assert (entry["loss"], entry["lr"]) == (None, STEPS[0].lr)


@pytest.mark.parametrize(
    "damage",
    [{"steps": None}, {"final_accuracy": "x"}, {"metric": 5}, {"final_interval": "ab"}]
    + [{"final_interval": [1, None]}, {"num_held_out": 0}, {"versions": 3}],
)
def test_a_summary_of_other_types_is_none(damage: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({**asdict(SUMMARY), **damage}))
    assert read_summary(tmp_path) is None


def test_counts_are_read_as_counts(tmp_path: Path) -> None:
    use, records = KvUse(asked=123456, computed=23456, across=50000), Records(tmp_path)
    records.summary(replace(SUMMARY, kv=use.numbers()))
    records.close()
    summary, terminal = read_summary(tmp_path), io.StringIO()
    assert summary is not None
    Display(terminal, num_steps=3).result(summary, Path("runs/x"))
    shown = " ".join(terminal.getvalue().split())
    assert "123,456 prompt tokens asked, 23,456 computed: 81% reused (50,000 inside" in shown


def test_looks_of_other_types_are_left_out(tmp_path: Path) -> None:
    look = {"kind": "evaluation", **asdict(BEFORE)}
    damages: list[dict[str, Any]] = [{}, {"num_examples": 0}, {"interval": [1]}, {"metric": 3}]
    lines = "".join(json.dumps({**look, **damage}) + "\n" for damage in damages)
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert list(evaluations(tmp_path)) == [BEFORE]


def test_counting_lost_samples_takes_little_memory(tmp_path: Path) -> None:
    entry = {"kind": "step", **asdict(STEPS[0])}
    text = "".join(json.dumps({**entry, "step": step}) + "\n" for step in range(20_000))
    foreign = json.dumps({**entry, "lost": {"raised": "x"}})
    (tmp_path / "metrics.jsonl").write_text(f"{text}{foreign}\n")
    tracemalloc.start()
    assert metrics_lost(tmp_path) is None
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


def test_samples_that_a_reward_failed_at_are_told_and_counted(tmp_path: Path) -> None:
    terminal, records = io.StringIO(), Records(tmp_path)
    display = Display(terminal, num_steps=3)
    display.evaluation(Evaluation(0, -1.25, 10, 1.0, "reward", (-2.0, -0.5), lost=3))
    counts: list[dict[str, int]] = [{}, {"timeout": 1, "raised": 2}, {"raised": 4}]
    for step, lost in zip(STEPS, counts, strict=True):
        display.step(replace(step, lost=lost))
        records.step(replace(step, lost={"crash": 99}))  # of a process that was then killed
        records.step(replace(step, lost=lost))
    records.close()
    assert metrics_lost(tmp_path) == {"raised": 6, "timeout": 1}
    summary = replace(SUMMARY, metric="reward", final_accuracy=3.5, lost=metrics_lost(tmp_path))
    display.result(replace(summary, baseline_accuracy=-1.25), Path("runs/x"))
    shown = terminal.getvalue()
    told = "reward -1.250 (-2.000 to -0.500) on 10 held-out examples (1 s); the reward failed at 3"
    assert told in shown
    assert shown.count("the reward failed at some samples (1 timeout, 2 raised); log.txt") == 1
    assert "held-out -1.250  lost 7" in shown
    assert "samples at which the reward failed: 6 raised, 1 timeout" in shown
    assert "%" not in shown.replace("95 %", "")
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in events.Scalars("train/lost_samples")][1::2] == [0, 3, 4]


def test_a_run_without_a_reward_has_lost_nothing(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.step(STEPS[0])
    records.close()
    assert metrics_lost(tmp_path) is None
    assert "train/lost_samples" not in EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]


def test_steps_that_stay_below_the_floor_are_flagged_and_told_once(tmp_path: Path) -> None:
    terminal, records = io.StringIO(), Records(tmp_path)
    display = Display(terminal, num_steps=100)
    for step in range(60):
        signal = None if step < 10 else 0.5 if step < 20 or step % 5 else 2.0
        metrics = replace(STEPS[0], step=step, signal_to_noise=signal)
        display.step(metrics)
        records.step(metrics)
        # Four in five of those from step 20 on, all of the ten before: the 15th is step 26.
        assert ("estimator.eps" in terminal.getvalue()) == (step >= 26)
    assert terminal.getvalue().count("estimator.eps") == 1
    assert "step 27: in 15 of the last 20 steps" in terminal.getvalue()
    records.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [lines[step]["signal_to_noise"] for step in (0, 10, 20)] == [None, 0.5, 2.0]
    assert [lines[step]["below_floor"] for step in (0, 10, 20)] == [False, True, False]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert len(events.Scalars("train/signal_to_noise")) == 50
