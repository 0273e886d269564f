"""Two processes that hold a model together, against one that holds it alone."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bare import make_adapter
from conftest import DEVICE
from tensor_parallel_worker import (
    ADAPTER,
    FAMILIES,
    OPT_LINEAR_MODULES,
    SLOT_FAMILIES,
    observe,
    observe_adapter,
    observe_prefix,
    observe_slots,
)
from transformers import AutoModelForCausalLM

from orchestrator.runner import ALONE

SIZE = 2
TESTS = Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        DEVICE == "cuda" and torch.cuda.device_count() < SIZE, reason="needs two GPUs"
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, Path]) -> Path:
    """Where two ranks have left what they saw."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "models").symlink_to(model_folders["opt"].parent)
    make_adapter(model_folders["opt"], folder / ADAPTER, OPT_LINEAR_MODULES, seed=0)
    ranks = [
        subprocess.Popen(
            [sys.executable, TESTS / "tensor_parallel_worker.py", str(rank), str(SIZE), folder],
            env={
                **os.environ,
                "PYTHONPATH": f"{TESTS.parent}:{os.environ.get('PYTHONPATH', '')}",
                **({"CUDA_VISIBLE_DEVICES": str(rank)} if DEVICE == "cuda" else {}),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(SIZE)
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n\n".join(
        text[-3000:] for text in outputs
    )
    return folder


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, Path]
) -> dict[str, Any]:
    exported = tmp_path_factory.mktemp("alone")
    models = model_folders["opt"].parent
    return {family: observe(family, models, exported, ALONE) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_compute_what_one_does(family: str, folder: Path, alone: dict[str, Any]) -> None:
    seen, expected = torch.load(folder / f"{family}.pt"), alone[family]
    torch.testing.assert_close(seen["logits"], expected["logits"], atol=1e-4, rtol=0)
    assert seen["scores"] == pytest.approx(expected["scores"], abs=1e-4)
    assert seen["generated"] == expected["generated"]
    for master in ("float32", "bfloat16"):
        assert seen[f"{master} loss"] == pytest.approx(expected[f"{master} loss"], abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_leaves_the_same_bits_on_two_ranks_as_on_one(
    family: str, folder: Path, alone: dict[str, Any]
) -> None:
    seen, expected = torch.load(folder / f"{family}.pt"), alone[family]
    assert seen["num_parameters"] == expected["num_parameters"]
    assert seen["anchored digest"] == expected["anchored digest"]
    for master in ("float32", "bfloat16"):
        digests = expected[f"{master} digests"]
        assert seen[f"{master} digests"] == digests
        assert len(set(digests)) >= 3  # before, perturbed, after
        weights = seen[f"{master} weights"]
        assert weights.keys() == expected[f"{master} weights"].keys()
        for name, value in weights.items():
            assert torch.equal(value, expected[f"{master} weights"][name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_snapshot_is_the_same_file_whoever_wrote_it(
    family: str, folder: Path, alone: dict[str, Any]
) -> None:
    """So one of two ranks serves one, and the other way round."""
    seen, expected = torch.load(folder / f"{family}.pt"), alone[family]
    for master in ("float32", "bfloat16"):
        state = expected[f"{master} digests"][3]
        assert seen[f"{master} restored"] == expected[f"{master} restored"] == [1, state]
        assert seen[f"{master} snapshot"] == expected[f"{master} snapshot"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_two_ranks_export_loads_in_transformers(family: str, folder: Path) -> None:
    weights = torch.load(folder / f"{family}.pt")["float32 weights"]
    loaded, report = AutoModelForCausalLM.from_pretrained(
        folder / "exported" / f"{family}-float32", output_loading_info=True
    )
    assert not any(report.values())
    parameters = dict(loaded.named_parameters())
    assert parameters.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(parameters[name].data, value), name


@pytest.mark.parametrize("family", SLOT_FAMILIES)
def test_slots_hold_the_same_on_two_ranks_as_on_one(family: str, folder: Path) -> None:
    seen = torch.load(folder / f"{family}.pt")["slots"]
    expected = observe_slots(family, folder / "models", ALONE)
    expected |= observe_prefix(family, folder / "models", ALONE)
    for kind in ("lora", "low_rank", "prefix"):
        assert seen[f"{kind} digest"] == expected[f"{kind} digest"]
        assert seen[f"{kind} parameters"] == expected[f"{kind} parameters"]
        assert seen[f"{kind} scores"] == pytest.approx(expected[f"{kind} scores"], abs=1e-4)
        state, expected_state = seen[f"{kind} state"], expected[f"{kind} state"]
        assert state.keys() == expected_state.keys()
        for name, value in state.items():
            assert torch.equal(value, expected_state[name]), name


def test_adapters_on_all_modules_work_on_two_ranks(folder: Path) -> None:
    seen = torch.load(folder / f"{ADAPTER}.pt")["logits"]
    expected = observe_adapter(folder / "models", folder / ADAPTER, ALONE)
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=0)


def test_a_rank_whose_copy_has_changed_says_so(folder: Path) -> None:
    first, second = torch.load(folder / f"{ADAPTER}.pt")["complaints"]
    assert first == ""
    assert "layer_norm" in second and "differs from rank 0's" in second


@pytest.mark.skipif(DEVICE == "cuda", reason="NCCL works there")
def test_without_its_patch_gloo_s_groups_try_nccl(folder: Path) -> None:
    symptoms = torch.load(folder / f"{ADAPTER}.pt")["symptoms"]
    assert all(symptoms), symptoms
