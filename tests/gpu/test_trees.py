"""Shared beginnings on a GPU: by graphs, by SGLang's kernels over the pool, and not at all."""

import random
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from test_tree import Sequences, Spans, grown, whole

from orchestrator.checkpoint import Checkpoint
from orchestrator.config import Config
from orchestrator.engine import Engine
from orchestrator.records import Probe
from orchestrator.score_plan import Scores
from orchestrator.spaces import SpacePlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05}
Make = Callable[..., Engine]


@pytest.fixture
def make(model_folders: dict[str, Path]) -> Iterator[Make]:
    engines = []

    def made(family: str, dtype: str, **choices: Any) -> Engine:
        folder = str(model_folders[family])
        engines.append(Engine(folder, dtype=dtype, device="cuda", kv_tokens=4096, **choices))
        return engines[-1]

    yield made
    for engine in engines:
        engine.close()


def trees(count: int) -> list[tuple[Sequences, Spans]]:
    draw = random.Random(0)
    return [grown(draw) for _ in range(count)]


def require_close(found: Scores, expected: Scores, dtype: str) -> None:
    means = [span.mean for span in expected.spans]
    assert [span.mean for span in found.spans] == pytest.approx(means, abs=TOLERANCES[dtype])


@pytest.mark.parametrize("family", ["opt", "opt-350m", "llama", "qwen3"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_graphs_and_the_pool_share_what_whole_sequences_repeat(
    family: str, dtype: str, make: Make
) -> None:
    eager, replayed = (make(family, dtype, score_graphs=graphs) for graphs in (False, True))
    assert replayed._graphs is not None
    num_shared = 0
    for sequences, spans in trees(12):
        expected = whole(eager, sequences, spans, [None])
        for engine in (eager, replayed):
            found = engine.score(sequences, spans)
            require_close(found, expected, dtype)
            num_shared += found.num_tokens < expected.num_tokens
        kept = replayed.score(sequences, spans, namespace="state")
        require_close(kept, expected, dtype)
    assert num_shared >= 16
    shapes = list(replayed._graphs._graphs)
    assert any(shape.longest_shared for shape in shapes)


def test_a_replay_reads_the_tree_of_its_own_batch(make: Make) -> None:
    """Two batches of one shape, by turns, whose rows share other beginnings."""
    engine = make("llama", "float32")
    context = [3, 4, 5, 6] * 6
    first = [context + [token, 7, 8] for token in (9, 10, 11, 12)]
    second = [[9, *context[1:], 7, 7, token] for token in (9, 10, 11, 12)]
    third = [context[:10] + [token] * 17 for token in (9, 10, 11, 12)]
    spans = [(24, 27)] * 4
    expected = {
        number: whole(engine, sequences, spans, [None])
        for number, sequences in enumerate((first, second, third))
    }
    for _ in range(2):
        for number, sequences in enumerate((first, second, third)):
            require_close(engine.score(sequences, spans), expected[number], "float32")


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
@pytest.mark.parametrize("graphs", [False, True])
def test_rows_under_adapters_share_with_rows_under_the_same(
    targets: Any, graphs: bool, recipe: dict[str, Any], model_folders: dict[str, Path], make: Make
) -> None:
    folder = model_folders["llama"]
    space = {"kind": "lora", "rank": 8, "slots": 4, "targets": targets}
    values = {**recipe, "model": {"path": str(folder), "dtype": "float32"}, "space": space}
    plan = SpacePlan(Config.model_validate(values), Checkpoint(folder))
    engine = make("llama", "float32", adapters=plan.adapters, score_graphs=graphs)
    probes = [Probe(0, seed, sign, 0.5, (0,)) for seed in (7, 8) for sign in (1, -1)]
    with closing(plan.build(engine).placed(probes)) as groups:
        names = [placed.adapter for placed in next(groups)]
        for sequences, spans in trees(6):
            expected = whole(engine, sequences, spans, [*names, None])
            found = engine.score(sequences, spans, adapters=[*names, None])
            require_close(found, expected, "float32")
    if graphs:
        assert engine._graphs is not None
        assert any(shape.longest_shared for shape in engine._graphs._graphs)


def test_a_layer_that_our_kernel_does_not_serve_shares_by_the_pool(make: Make) -> None:
    engine = make("llama", "float32")
    layers = [part for part in engine.model.modules() if isinstance(part, RadixAttention)]
    layers[0].logit_cap = 0.05
    assert engine._graphs is not None
    for sequences, spans in trees(4):
        require_close(
            engine.score(sequences, spans), whole(engine, sequences, spans, [None]), "float32"
        )
    assert engine._graphs._refused == {True}
    assert engine._graphs._graphs
