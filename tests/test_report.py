"""The page about a run: what it tells of finished and unfinished ones, and that it stands alone."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator import metrics, report
from orchestrator.config import ConfigError
from orchestrator.evaluate import interval
from orchestrator.inspection import inspect
from orchestrator.metrics import Evaluation, KvUse, Records, StepMetrics, Summary
from orchestrator.seed_sync import Header, Ledger, StepRecord

HEADER = Header(1, 1, "tiny <b>", "weights-aa", "config-bb", "data-cc", (("sglang", "0.5.17"),))
VOID = {"meta", "br", "link", "img"}


def make_run(
    folder: Path, recipe: dict[str, Any], steps: int, *, total: int = 6, **summary: Any
) -> Path:
    """A run folder as training leaves it after some steps, one in three with a dropped seed."""
    folder.mkdir()
    recipe = {**recipe, "run": {**recipe["run"], "steps": total}}
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    records = Records(folder)
    records.evaluation(Evaluation(0, 0.5, 50, 1.0))
    with Ledger.create(folder / "ledger.jsonl", HEADER) as ledger:
        for step in range(steps):
            loss = math.nan if step % 3 == 2 else 1 / (step + 1)
            kept = None if step % 3 == 2 else 0.5
            ledger.append(StepRecord(step, (step,), ((0.1, 0.2),), (kept,), 1.0, 1e-3, 1e-6, "ab"))
            records.step(StepMetrics(step, loss, 2.0, 1e-6, int(kept is None), 2, 100, 0.5))
    if summary:
        records.evaluation(Evaluation(total, summary["final_accuracy"], 50, 1.0))
        records.summary(
            Summary(total, 9.0, 4.0, 200.0, 0.5, num_held_out=50, digest="d1d2", **summary)
        )
    records.close()
    return folder


class Outline(HTMLParser):
    """Refuses tags that do not close in order; keeps text, and all that an attribute names."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append(" ".join(data.split()))  # spaces that do not break too


def read(folder: Path) -> tuple[str, Outline]:
    page = report.write(folder)
    assert page == folder / "report" / "index.html"
    text = page.read_text(encoding="utf-8")
    return text, Outline(text)


def charts_of(page: Outline) -> int:
    return page.tags.count("figure")


@pytest.fixture
def finished(tmp_path: Path, recipe: dict[str, Any]) -> Path:
    versions = {"sglang": "0.5.17", "torch": "2.11.0"}
    return make_run(tmp_path / "run", recipe, 6, final_accuracy=0.75, versions=versions)


def test_a_finished_run_is_told_whole(finished: Path) -> None:
    _, page = read(finished)
    told = " ".join(page.text)
    assert "50.0 % → 75.0 % + 25.0 points" in told
    assert "36.6 to 63.4 %, of 50 examples" in told  # Wilson's interval of 25 in 50
    for words in ("num_seeds", "weights-aa", "d1d2", "torch", "2.11.0"):
        assert words in told
    for title in ("Held-out accuracy", "Training loss", "|g|", "Learning rate", "Seconds a step"):
        assert title in page.text
    assert charts_of(page) == 8  # and probes and tokens a second, and what was dropped
    assert "Seeds dropped 2" in told


def test_the_page_needs_nothing_from_elsewhere(finished: Path) -> None:
    text, page = read(finished)
    assert not {"script", "link", "img", "iframe", "image"} & set(page.tags)
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", text)
    assert all(value and value.startswith("#") for name, value in page.attributes if name == "href")
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)), "charts share ids"
    assert "#0101" not in text and "#0102" not in text, "a colour that is not the page's"


def test_the_same_run_gives_the_same_page(finished: Path) -> None:
    assert read(finished)[0] == read(finished)[0]


def test_what_a_run_calls_itself_is_text_not_markup(tmp_path: Path, recipe: dict[str, Any]) -> None:
    template = "</td><script>alert(1)</script>{sentence} It was {option}"
    task = {**recipe["task"], "template": template}
    folder = make_run(tmp_path / "<i>run", {**recipe, "task": task}, 1)
    _, page = read(folder)
    assert not {"script", "i", "b"} & set(page.tags)
    assert template in page.text and "<i>run" in page.text and "tiny <b>" in page.text


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_an_unfinished_run_is_told_as_far_as_it_goes(
    steps: int, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    folder = make_run(tmp_path / "run", recipe, steps)
    for name in ("ledger.jsonl", "metrics.jsonl"):  # as a crash leaves them
        with (folder / name).open("ab") as file:
            file.write(b'{"kind": "step", "step": 4, "lo')
    _, page = read(folder)
    told = " ".join(page.text)
    assert f"unfinished: {steps} of 6 steps" in told
    assert "Zero-shot accuracy; 95 % interval 36.6 to 63.4 %" in told
    assert charts_of(page) == (8 if steps else 1)


@pytest.mark.parametrize("steps", [6, 4])
def test_a_run_is_told_by_its_own_metric_and_its_dev_rows_are_drawn(
    steps: int, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    """The intervals are those that it noted: Wilson's would be another. Of two looks at dev rows
    after the same step the later holds."""
    summary: dict[str, Any] = {"final_accuracy": 0.75, "versions": {}} if steps == 6 else {}
    folder = make_run(tmp_path / "run", recipe, steps, **summary)
    (folder / "metrics.jsonl").write_text("")
    records = Records(folder)
    records.evaluation(Evaluation(0, 0.5, 50, 1.0, "f1", (0.41, 0.59)))
    for step, value in ((0, 0.4), (2, 0.95), (2, 0.625), (4, 0.6)):
        ends = (value - 0.01, value + 0.01)
        records.evaluation(Evaluation(step, value, 30, 1.0, "f1", ends, "dev"))
    if steps == 6:
        records.evaluation(Evaluation(6, 0.75, 50, 1.0, "f1", (0.7, 0.8)))
        best = {"best_step": 2, "best_dev": 0.625}
        found = {"baseline_interval": (0.41, 0.59), "final_interval": (0.7, 0.8)}
        numbers: dict[str, Any] = {
            "num_held_out": 50,
            "digest": "d1",
            "metric": "f1",
            **found,
            **best,
        }
        records.summary(Summary(6, 9.0, 4.0, 200.0, 0.5, **numbers, **summary))
    records.close()
    _, page = read(folder)
    told = " ".join(page.text)
    for words in ("accuracy", "Wilson", "36.6", "95.0 %"):
        assert words not in told[: told.index("Recipe")]
    assert page.text.count("Held-out F1") == page.text.count("F1 on dev rows") == 1
    assert "bars: 95 % intervals (normal); a look takes 30 examples" in told
    assert "best after 2 steps: 62.5 %" in told
    if steps == 6:
        assert "Held-out F1, zero-shot and after 6 steps. Zero-shot: 95 % interval 41.0 to" in told
        for words in ("Final F1 75.0 % (70.0 to 80.0)", "Best step by dev rows 2 (62.5 %)"):
            assert words in told
    else:
        assert "Zero-shot F1; 95 % interval 41.0 to 59.0 %, of 50 examples" in told


def test_a_mean_whose_interval_an_earlier_run_did_not_note_has_none(
    tmp_path: Path, recipe: dict[str, Any]
) -> None:
    folder = make_run(tmp_path / "run", recipe, 0)
    line = '{"kind": "evaluation", "step": 0, "accuracy": 0.5, "num_examples": 50, "seconds": 1'
    (folder / "metrics.jsonl").write_text(line + ', "metric": "f1"}\n')
    told = " ".join(read(folder)[1].text)
    assert "Zero-shot F1; 50 examples." in told and "interval" not in told


def test_a_run_that_has_only_its_recipe(tmp_path: Path, recipe: dict[str, Any]) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe))
    _, page = read(tmp_path)
    assert "No step has been taken yet." in page.text and "not begun" in page.text


def test_numbers_that_only_some_runs_record_are_drawn_where_they_are(
    finished: Path,
) -> None:
    path = finished / "metrics.jsonl"
    lines = path.read_text().splitlines()
    kv = KvUse(asked=100, computed=20, across=10)
    for number, line in enumerate(lines):
        if '"loss"' in line:
            more = {"signal_to_noise": 3.5, "kv": kv.numbers()}
            lines[number] = json.dumps({**json.loads(line), **more})
    path.write_text("\n".join(lines))
    _, page = read(finished)
    assert charts_of(page) == 10
    for words in ("Signal to noise of g", "KV reuse"):
        assert words in page.text
    told = " ".join(page.text)
    assert "70.0 % shared inside a forward, 10.0 % found in the cache" in told


def test_a_reward_is_told_in_its_own_units(tmp_path: Path, recipe: dict[str, Any]) -> None:
    reward = {"function": "mine:score"}
    task = {key: recipe["task"][key] for key in ("train", "test")}
    task |= {"template": "{sentence}{option}", "objective": "reward", "metric": "reward"}
    folder = make_run(tmp_path / "run", {**recipe, "task": {**task, "reward": reward}}, 4)
    (folder / "metrics.jsonl").unlink()
    records = Records(folder)
    records.evaluation(Evaluation(0, -1.5, 50, 1.0, "reward", (-2.0, -1.0)))
    for step in range(4):
        values = (step, 0.1, 2.0, 1e-6, 0, 2, 100, 0.5, None, {"raised": step})
        records.step(StepMetrics(*values))
    records.evaluation(Evaluation(6, 12.25, 50, 1.0, "reward", (10.0, 14.5)))
    summary = Summary(6, 9.0, 4.0, 200.0, -1.5, 12.25, 50, "d1d2", {}, metric="reward")
    records.summary(replace(summary, baseline_interval=(-2.0, -1.0), final_interval=(10.0, 14.5)))
    records.close()
    _, page = read(folder)
    told = " ".join(page.text)
    assert "-1.500 → 12.250 + 13.750" in told
    assert "interval -2.000 to -1.000, of 50 examples; now: 95 % interval 10.000 to 14.5" in told
    assert "Held-out reward" in page.text and "Lost samples" in page.text
    assert "Final reward 12.250 (10.000 to 14.500)" in told
    assert "mine:score" in told


def test_a_step_that_was_noted_twice_counts_once(finished: Path) -> None:
    before = read(finished)[0]
    path = finished / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    earlier = lines[3].replace('"loss": 0.5', '"loss": 0.9')
    assert earlier != lines[2]
    path.write_text("".join([*lines[:2], earlier, *lines[2:]]))
    assert read(finished)[0] == before


def test_lines_that_lack_what_their_kind_has_are_left_out(finished: Path) -> None:
    before, told = read(finished)[0], list(inspect(finished))
    with (finished / "metrics.jsonl").open("a") as file:
        for line in (
            '{"kind": "step", "step": 2}',
            '{"kind": "step", "step": 2, "loss": 1, "seconds": "long"}',
            '{"kind": "step", "step": "2", "seconds": 1}',
            '{"kind": "evaluation", "step": 2, "accuracy": null}',
            '{"kind": "evaluation", "accuracy": 0.5, "num_examples": 50, "seconds": 1}',
            '{"kind": "evaluation", "step": 0}',
            '{"kind": ["step"], "step": 2}',
            '{"step": 2}',
            "2",
        ):
            file.write(line + "\n")
    assert read(finished)[0] == before
    assert list(inspect(finished)) == told
    assert len(list(metrics.entries(finished))) == 8


def test_a_long_run_makes_a_small_page(tmp_path: Path, recipe: dict[str, Any]) -> None:
    folder = make_run(tmp_path / "run", recipe, 0, total=20_000)
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(20_000):
            numbers = f'"loss": {1 + step % 7}, "gradient": 1, "lr": 1, "num_dropped": 0'
            counts = '"num_probes": 2, "num_tokens": 9, "seconds": 1'
            file.write(f'{{"kind": "step", "step": {step}, {numbers}, {counts}}}\n')
            look = f'"step": {step}, "accuracy": 0.5, "num_examples": 9, "seconds": 1'
            file.write(f'{{"kind": "evaluation", {look}}}\n')
    text, _ = read(folder)
    assert len(text) < 500_000


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="no run folder, it holds no config.yaml") as caught:
            report.write(folder)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("right", [0, 1, 25, 49, 50])
def test_the_interval_ends_where_a_true_share_would_be_1_96_deviations_off(right: int) -> None:
    share, number = right / 50, 50
    low, high = interval(share, number)
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        if end not in (0.0, 1.0):
            deviation = math.sqrt(end * (1 - end) / number)
            assert abs(share - end) == pytest.approx(1.959964 * deviation, rel=1e-9)


def test_replicas_shares_of_the_work_are_told_where_they_are_several(
    tmp_path: Path, recipe: dict[str, Any]
) -> None:
    def told(name: str, probes: dict[str, int]) -> str:
        fleet = {"probes": probes, "copied": 3, "requeued": 1}
        folder = make_run(tmp_path / name, recipe, 6, final_accuracy=0.75, versions={}, fleet=fleet)
        return " ".join(read(folder)[1].text)

    of_two = told("two", {"replica 0": 1500, "replica <1>": 500})
    assert "replica 0 1,500 (75.0 %)" in of_two and "replica <1> 500 (25.0 %)" in of_two
    assert "computed once more 3" in of_two and "given to others 1" in of_two
    assert "replica 0" not in told("one", {"replica 0": 2000})
