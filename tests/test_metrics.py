"""Records as other tools read them, and the display on a terminal and off one."""

import io
import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from orchestrator.evaluate import accuracy, write_scores
from orchestrator.metrics import (
    Evaluation,
    Records,
    StepMetrics,
    Summary,
    baseline,
    read_summary,
)
from orchestrator.progress import Display
from orchestrator.records import ExampleScore

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
    assert baseline(tmp_path) == 0.5


def test_a_run_without_a_baseline_has_none(tmp_path: Path) -> None:
    assert baseline(tmp_path) is None
    Records(tmp_path).close()
    assert baseline(tmp_path) is None


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
    with display.live(0):
        for step in STEPS:
            display.step(step)
    display.result(SUMMARY, Path("runs/x"))
    shown = terminal.getvalue()
    assert "step 1/3  loss 1.0000  |g| 5.00  0.50 steps/s  4 s left  held-out 50.0%" in shown
    assert "step 3: dropped 1 seeds whose loss was not finite" in shown
    assert "zero-shot" in shown and "50.0%" in shown
    assert "after 3 steps" in shown and "75.0%" in shown
    assert shown.rstrip().endswith("run folder: runs/x")


def test_accuracy_and_the_file_of_scores(tmp_path: Path) -> None:
    scores = [ExampleScore(0, 1, (-2.0, -1.0), 1), ExampleScore(1, 0, (-2.0, -1.0), 1)]
    assert accuracy(scores) == 0.5
    assert accuracy([*scores, ExampleScore(2, 0, (-2.0, -1.0), 1, also_right=(1,))]) == 2 / 3
    write_scores(tmp_path / "scores.jsonl", scores)
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {
        "id": 0,
        "label": 1,
        "scores": [-2.0, -1.0],
        "prediction": 1,
        "also_right": [],
    }
