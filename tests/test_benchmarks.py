"""The benchmarks' programs run, and what they compare computes the same things."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import DEVICE

from benchmarks import (
    activation,
    bars,
    evaluation,
    measure,
    memory,
    reference,
    steps,
    two_gpus,
    workloads,
)
from benchmarks.shapes import SHAPES
from orchestrator.checkpoint import Checkpoint
from orchestrator.engine import Engine
from orchestrator.parameters import canonical_tensors

TINY = SHAPES["opt-tiny"]
EPS, LR, WEIGHT_DECAY = 1e-3, 1e-2, 0.1


def tiny(dtype: torch.dtype = torch.float32, lora: bool = False) -> torch.nn.Module:
    return reference.build(TINY.config, dtype=dtype, device=DEVICE, lora=lora)


def batches(name: str) -> list[workloads.Batch]:
    return list(workloads.batches(name, TINY.config.vocab_size, TINY.config.bos_token_id))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_undoes_a_perturbation_up_to_drift(dtype: torch.dtype, lora: bool) -> None:
    mezo = reference.Mezo(tiny(dtype, lora), eps=EPS, lr=LR)
    assert {parameter.dtype for parameter in mezo.parameters} == {dtype}
    before = [parameter.detach().clone() for parameter in mezo.parameters]
    mezo.perturb(7, 1)
    moves = [now.detach() - was for now, was in zip(mezo.parameters, before, strict=True)]
    assert torch.cat([move.flatten() for move in moves]).float().std() == pytest.approx(
        EPS, rel=0.05
    )
    mezo.perturb(7, -2)
    mezo.perturb(7, 1)
    for now, was in zip(mezo.parameters, before, strict=True):
        # three roundings, each of half a unit in the last place of a value near the weight's
        bound = 2 * torch.finfo(dtype).eps * (was.abs() + 5 * EPS)
        assert torch.all((now - was).abs() <= bound)


@pytest.mark.parametrize("num_probes", [1, 2])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("workload", ["4x16", "sst2"])
def test_the_references_step_is_the_papers(workload: str, lora: bool, num_probes: int) -> None:
    model = tiny(lora=lora)
    batch = steps.reference_batch(batches(workload)[0], TINY)
    other = copy.deepcopy(model)
    mezo = reference.Mezo(model, eps=EPS, lr=LR, weight_decay=WEIGHT_DECAY, num_probes=num_probes)
    before = [parameter.detach().clone() for parameter in mezo.parameters]
    estimates = mezo.step(batch)
    assert len({seed for seed, _ in estimates}) == num_probes

    trained = [parameter for parameter in other.parameters() if parameter.requires_grad]
    expected = [value.clone() for value in before]
    for seed, gradient in estimates:
        torch.manual_seed(seed)
        noise = [torch.normal(0.0, 1.0, value.shape, device=DEVICE) for value in before]
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                for parameter, value, z in zip(trained, before, noise, strict=True):
                    parameter.copy_(value + sign * EPS * z)
                losses.append(batch.loss(other).item())
        assert gradient == pytest.approx((losses[0] - losses[1]) / (2 * EPS), abs=5e-3)
        for value, z in zip(expected, noise, strict=True):
            decay = WEIGHT_DECAY if value.ndim > 1 else 0.0
            value -= LR / num_probes * (gradient * z + decay * value)
    for now, value in zip(mezo.parameters, expected, strict=True):
        torch.testing.assert_close(now.detach(), value, rtol=1e-5, atol=1e-6)


def test_ours_and_the_references_losses_agree(tmp_path: Path) -> None:
    """On the same weights, whatever is padded there and shared between options here."""
    model: Any = tiny()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough to tell the options apart
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    engine = Engine(str(tmp_path), dtype="float32", device=DEVICE, kv_tokens=512, threads=2)
    for workload in ("4x16", "sst2"):
        for batch in batches(workload):
            with torch.inference_mode():
                expected = steps.reference_batch(batch, TINY).loss(model).item()
            scores = engine.score(batch.sequences, batch.spans)
            assert scores.num_tokens == batch.num_tokens
            ours = steps.loss(batch, [span.mean for span in scores.spans])
            assert ours == pytest.approx(expected, rel=1e-4)
    engine.close()


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_live_tensors_are_the_canonical_ones(
    family: str, engines: Callable[[str], Engine], model_folders: dict[str, Path]
) -> None:
    model = engines(family).model
    expected = canonical_tensors(model, Checkpoint(model_folders[family]))
    for live, canonical in zip(steps.live_tensors(model), expected, strict=True):
        assert (live.region, live.shard) == (canonical.region, canonical.shard)
        assert live.live.data_ptr() == canonical.live.data_ptr()
        assert live.live.shape == canonical.live.shape == live.initial.shape


def test_reviews_are_as_many_and_as_long_as_said() -> None:
    first, second = batches("sst2")
    words = [len(text.split()) for text in (*workloads.BAD, *workloads.GOOD)]
    assert len(words) == 2 * workloads.BATCH_SIZE
    assert 3 <= min(words) <= 5
    assert 40 <= max(words) <= 45
    tokens = sum(len(tokens) - 4 for batch in (first, second) for tokens in batch.prompts)
    assert tokens / sum(words) == pytest.approx(1.3, abs=0.1)
    assert first.num_tokens == pytest.approx(second.num_tokens, rel=0.1)
    for batch in (first, second):
        assert sum(batch.labels) == pytest.approx(workloads.BATCH_SIZE / 2, abs=2)
        assert len(set(batch.sequences)) == 2 * len(set(batch.prompts)) == 32


def test_the_order_of_what_is_paired_alternates() -> None:
    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    times = measure.paired(calls, turns=3, warmups=1)
    assert "".join(seen) == "ba" + "ab" + "ba" + "ab"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_probes", "spaces"), [(1, ["dense:float32", "lora"]), (2, ["dense:bfloat16", "low_rank"])]
)
def test_steps_keeps_what_it_measures(
    num_probes: int, spaces: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {
        "shapes": "opt-tiny",
        "tokens": "4x16,sst2",
        "spaces": ",".join(spaces),
        "turns": "1",
        "probes": str(num_probes),
        "name": "tiny",
        "results": str(tmp_path),
    }
    steps.main([part for key, value in arguments.items() for part in (f"--{key}", value)])
    assert "times faster" in capsys.readouterr().out
    (path,) = tmp_path.glob("tiny-*.json")
    content = json.loads(path.read_text())
    assert content.keys() == {
        "date",
        "commit",
        "hardware",
        "versions",
        "dtype",
        "copy_bytes_per_second",
        "bfloat16_operations_per_second",
        "rows",
    }
    rows = content["rows"]
    assert [row["space"] for row in rows] == [space for space in spaces for _ in range(2)]
    for row in rows:
        assert (row["turns"], row["num_probes"]) == (1, num_probes)
        assert {key for _, key in steps.COLUMNS} <= row.keys()
        assert all(value > 0 for value in row.values() if not isinstance(value, str))


@pytest.mark.slow
def test_bars_run_and_say_what_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--sections", "sweeps,updates,run", "--large", "opt-tiny", "--results", str(tmp_path)]
    bars.main(chosen)
    shown = capsys.readouterr().out
    assert "update by 16 seeds, rademacher, opt-tiny; 16 of the reference's" in shown
    (path,) = tmp_path.glob("bars-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert all(row["ours"] > 0 and row["ratio"] > 0 for row in rows)
    assert len({row["what"] for row in rows}) == len(rows)


def test_a_bar_holds_from_its_side() -> None:
    assert [bars.Row("", 1, 1, ratio, 2.0).holds for ratio in (1.9, 2.0)] == ["NO", "yes"]
    at_most = [bars.Row("", 1, 1, ratio, 2.0, at_most=True).holds for ratio in (2.0, 2.1)]
    assert at_most == ["yes", "NO"]
    assert bars.Row("", 1, 1, 1.0).holds == ""


@pytest.mark.slow
def test_evaluation_gives_the_references_scores(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    arguments = {"recipe": str(path), "rows": "9", "turns": "1", "results": str(tmp_path)}
    flags = [part for key, value in arguments.items() for part in (f"--{key}", value)]
    evaluation.main([*flags, "task.max_length=64"])
    assert "times faster" in capsys.readouterr().out
    (found,) = tmp_path.glob("evaluation-*.json")
    (row,) = json.loads(found.read_text())["rows"]
    assert {key for _, key in evaluation.COLUMNS} <= row.keys()
    assert (row["rows"], row["candidates"], row["turns"]) == (9, 18, 1)
    assert row["ours_s"] > 0 < row["reference_s"]
    if measure.DTYPE == "float32":
        assert row["largest_difference"] < 1e-4
    with pytest.raises(ValueError, match=r"task\.max_length: .*would be cut"):
        evaluation.main([*flags, "task.max_length=6"])


@pytest.mark.slow
def test_memory_is_what_a_space_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spaces = ["dense:float32", "dense:bfloat16", "low_rank", "lora"]
    arguments = {
        "shapes": "opt-tiny",
        "tokens": "4x16",
        "spaces": ",".join(spaces),
        "steps": "1",
        "results": str(tmp_path),
    }
    memory.main([part for key, value in arguments.items() for part in (f"--{key}", value)])
    assert "held" in capsys.readouterr().out
    (path,) = tmp_path.glob("memory-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["space"] for row in rows] == spaces
    held = [row["held_bytes_a_parameter"] for row in rows]
    assert held[0] - held[1] == pytest.approx(2, abs=0.5)  # of the master; the first has more
    assert held[0] > getattr(torch, measure.DTYPE).itemsize + 4
    if measure.ON_GPU:
        assert all(row["peak_bytes_a_parameter"] > 0 for row in rows)


def test_activated_steps_compute_what_their_tokens_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NUM_SLOTS": 2, "NUM_CONTEXTS": 3, "CONTEXT": 40, "SUFFIX": 6}.items():
        monkeypatch.setattr(activation, name, value)
    row = activation.compare("opt-tiny", turns=2)
    assert row["tokens_allow"] == (40 + 6) / 6
    assert row["small_pool_tokens"] == 3 * (40 + 2 * 6)
    assert row["evicted_a_step"] > 40  # each batch pushes most of the other's contexts out


@pytest.mark.slow
@pytest.mark.skipif(
    measure.ON_GPU and torch.cuda.device_count() < 2, reason="compares replicas on two GPUs"
)
def test_two_gpus_compares_fleets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"shapes": "opt-tiny", "tokens": "4x8", "seeds": "3", "turns": "1"}
    arguments |= {"folder": str(tmp_path), "results": str(tmp_path)}
    two_gpus.main([part for key, value in arguments.items() for part in (f"--{key}", value)])
    assert "kept in" in capsys.readouterr().out
    (path,) = tmp_path.glob("two-gpus-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert len({row["what"] for row in rows}) == len(rows) == 7
    assert rows[0]["ours"] > 0
    # What is beside a replica's own time may come out below 0 where a copy outlasts the step.
    assert all(math.isfinite(row["ours"]) for row in rows[:5])
    if measure.DTYPE == "float32":
        assert all(row["ours"] < 100 for row in rows[5:])  # millionths
