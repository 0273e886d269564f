"""Graphs of scoring forwards: the scores of eager ones, whatever ran before."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import score_graphs
from orchestrator.checkpoint import Checkpoint
from orchestrator.config import Config
from orchestrator.engine import MAX_BATCH_SEQUENCES, Engine
from orchestrator.records import Probe, StepUpdate
from orchestrator.score_graphs import MAX_CAPTURED
from orchestrator.spaces import SpacePlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def batches() -> list[tuple[list[list[int]], list[tuple[int, int]]]]:
    """Ragged batches, of which several share a padded shape."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(12):
        lengths = torch.randint(2, 20, (4 + number % 2,), generator=generator).tolist()
        sequences = [torch.randint(3, 13, (n,), generator=generator).tolist() for n in lengths]
        found.append((sequences, [(1, len(tokens)) for tokens in sequences]))
    return [*found, found[0]]


def eager_and_replayed(folder: Path, dtype: str, **others: Any) -> tuple[Engine, Engine]:
    """Engines of one model, without graphs and with them."""
    eager, replayed = (
        Engine(
            str(folder),
            dtype=dtype,
            device="cuda",
            kv_tokens=4096,
            score_graphs=graphs,
            **others,
        )
        for graphs in (False, True)
    )
    return eager, replayed


@pytest.mark.parametrize("largest", [0, MAX_CAPTURED])
@pytest.mark.parametrize("family", ["opt", "opt-350m", "llama", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replayed_scores_equal_eager_ones(
    family: str,
    dtype: str,
    largest: int,
    model_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of batches that are too large for a graph, too."""
    monkeypatch.setattr(score_graphs, "MAX_CAPTURED", largest)
    eager, replayed = eager_and_replayed(model_folders[family], dtype)
    assert eager._graphs is None and replayed._graphs is not None
    tolerance = 1e-4 if dtype == "float32" else 0.05
    for sequences, spans in batches():
        expected = [span.sum for span in eager.score(sequences, spans).spans]
        scores = [span.sum for span in replayed.score(sequences, spans).spans]
        assert scores == pytest.approx(expected, abs=tolerance)
        entries = replayed.score(sequences, spans, namespace="state")  # which no graph serves
        assert [span.sum for span in entries.spans] == pytest.approx(expected, abs=tolerance)
    assert 1 < len(replayed._graphs._graphs) < 12
    assert all((each._graph is None) == (not largest) for each in replayed._graphs._graphs.values())
    plan = replayed.plan(sequences, spans)
    first, again = replayed.read(plan, [replayed.launch(plan), replayed.launch(plan)])
    assert first == again
    with torch.no_grad():
        for parameter in replayed.model.parameters():
            parameter.mul_(1.01)
    launched = replayed.launch(plan)
    assert replayed.read(plan, [launched])[0] != first
    eager.close()
    replayed.close()


def test_parameters_that_moved_are_not_read_where_they_were(
    model_folders: dict[str, Path],
) -> None:
    eager, replayed = eager_and_replayed(model_folders["opt"], "float32")
    sequences, spans = batches()[0]
    before = replayed.score(sequences, spans)
    for engine in (eager, replayed):
        for parameter in engine.model.parameters():
            parameter.data = 1.01 * parameter.data
    expected = [span.sum for span in eager.score(sequences, spans).spans]
    moved = replayed.score(sequences, spans)
    assert moved != before
    assert [span.sum for span in moved.spans] == pytest.approx(expected, abs=1e-4)
    eager.close()
    replayed.close()


@pytest.mark.parametrize("largest", [0, MAX_CAPTURED])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_graphs_serve_adapters(
    family: str,
    largest: int,
    targets: Any,
    recipe: dict[str, Any],
    model_folders: dict[str, Path],
    engines: Callable[[str], Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(score_graphs, "MAX_CAPTURED", largest)
    folder = model_folders[family]
    space = {"kind": "lora", "rank": 8, "slots": 4, "targets": targets}
    values = {**recipe, "model": {"path": str(folder), "dtype": "float32"}, "space": space}
    found = []
    for graphs in (False, True):
        plan = SpacePlan(Config.model_validate(values), Checkpoint(folder))
        engine = Engine(
            str(folder),
            dtype="float32",
            device="cuda",
            kv_tokens=4096,
            adapters=plan.adapters,
            score_graphs=graphs,
        )
        space_of_engine = plan.build(engine)
        space_of_engine.apply(StepUpdate(0, seeds=(1,), coefficients=(0.05,), decay=1.0))
        probes = [Probe(1, seed, sign, 0.05, (0,)) for seed in (7, 8) for sign in (1, -1)]
        sums = []
        for sequences, spans in batches():
            with closing(space_of_engine.placed(probes)) as groups:
                names = [placed.adapter for placed in next(groups)]
                scores = engine.score(sequences, spans, adapters=[*names, None])
            sums += [span.sum for span in scores.spans]
        found.append(sums)
        engine.close()
    assert found[1] == pytest.approx(found[0], abs=1e-4)
    assert len(set(found[1])) > len(found[1]) // 2


def test_a_batch_of_as_many_rows_as_there_may_be_has_room_for_its_padding(
    model_folders: dict[str, Path],
) -> None:
    """256 sequences of 4 tokens, and one more token, so that a sequence of padding follows."""
    generator = torch.Generator().manual_seed(0)
    lengths = [5, *[4] * (MAX_BATCH_SEQUENCES - 1)]
    sequences = [torch.randint(3, 13, (n,), generator=generator).tolist() for n in lengths]
    spans = [(1, length) for length in lengths]
    eager, replayed = eager_and_replayed(model_folders["opt"], "float32", share_contexts=False)
    expected = [span.sum for span in eager.score(sequences, spans).spans]
    found = [span.sum for span in replayed.score(sequences, spans).spans]
    assert found == pytest.approx(expected, abs=1e-4)
    eager.close()
    replayed.close()
