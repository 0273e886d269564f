"""Continuations on a GPU: with SGLang's decoding graphs and our kernels, the same as without."""

from pathlib import Path
from typing import Any

import pytest
import torch
from slots import adapted_engine, prefixed_engine, random_prompts

from orchestrator.engine import DECODE_GRAPHS, Engine
from orchestrator.noise import token_uniforms
from orchestrator.sampling import Sampling, choose

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def count_replays(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each batch that a decoding graph takes from now on."""
    runner = engine._runner.model_runner.decode_cuda_graph_runner
    execute, found = runner.execute, []

    def counted(batch: Any, *others: Any, **named: Any) -> Any:
        found.append(batch.batch_size)
        return execute(batch, *others, **named)

    monkeypatch.setattr(runner, "execute", counted)
    return found


@pytest.mark.parametrize("family", ["opt", "llama", "qwen3"])
def test_graphs_serve_adapters(
    family: str,
    model_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows under two adapters and none leave and enter, so that batches of many sizes decode."""
    engine, models = adapted_engine(
        model_folders[family], tmp_path, kv_tokens=1024, cuda_graphs=True
    )
    eager, _ = adapted_engine(model_folders[family], tmp_path, kv_tokens=4096)
    assert engine.slots is not None
    graphs = engine._runner.model_runner.decode_cuda_graph_runner
    assert set(graphs.capture_bs) <= set(DECODE_GRAPHS) | {engine._pools.max_sequences}
    replays = count_replays(engine, monkeypatch)
    free = engine.free_slots()
    prompts = random_prompts(seed=0, count=20)
    prompts += prompts[:5] * 2
    names = [None, *engine.slots.names]
    choices: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    found = engine.generate(prompts, Sampling(24), adapters=names)
    assert found == eager.generate(prompts, Sampling(24), adapters=names)
    rows = [(model, prompt) for model in models for prompt in prompts]
    for (model, prompt), each in list(zip(rows, found, strict=True))[::7]:
        tokens = torch.tensor([prompt])
        mask = torch.ones_like(tokens)
        expected = model.generate(
            input_ids=tokens, attention_mask=mask, max_new_tokens=24, **choices
        )
        assert each.tokens == expected[0, len(prompt) :].tolist()
    sampling = Sampling(40, 1.0, top_p=0.9, stop_tokens=frozenset([5, 6]))
    seeds = list(range(len(prompts)))
    drawn = engine.generate(prompts, sampling, adapters=names, seeds=seeds)
    assert drawn == eager.generate(prompts, sampling, adapters=names, seeds=seeds)
    assert drawn[:1] == engine.generate(prompts[:1], sampling, seeds=seeds[:1])
    assert len(set(replays)) > 5  # padded ones among them
    spans = [(len(prompt) - 1, len(prompt)) for prompt in prompts if len(prompt) > 1]
    sequences = [prompt for prompt in prompts if len(prompt) > 1]
    scores, others = (
        [span.sum for span in each.score(sequences, spans, adapters=names).spans]
        for each in (engine, eager)
    )
    assert scores == pytest.approx(others, abs=1e-4)
    assert engine.generate(prompts, Sampling(24), adapters=names) == found  # after other graphs
    assert engine.free_slots() == free
    engine.close()
    eager.close()


def test_graphs_serve_prefixes(
    model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folders["llama"]
    engine = prefixed_engine(folder, kv_tokens=512, cuda_graphs=True)
    eager = prefixed_engine(folder, kv_tokens=4096)
    assert engine.prefixes is not None
    replays = count_replays(engine, monkeypatch)
    prompts = random_prompts(seed=1, count=12) * 2
    names = [*engine.prefixes.names, None]
    free = engine.free_slots()
    found = engine.generate(prompts, Sampling(20), adapters=names)
    assert found == eager.generate(prompts, Sampling(20), adapters=names)
    assert len({tuple(each.tokens) for each in found}) > 12
    assert replays and engine.free_slots() == free
    engine.close()
    eager.close()


def test_more_rows_than_the_largest_graph_wait(
    model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(
        str(model_folders["opt"]),
        dtype="bfloat16",
        device="cuda",
        kv_tokens=16_384,
        cuda_graphs=True,
    )
    replays = count_replays(engine, monkeypatch)
    free = engine.free_slots()
    sampling = Sampling(32, 1.0, stop_tokens=frozenset([4]))
    prompts = random_prompts(seed=2, count=40)
    found = engine.generate(prompts * 10, sampling, seeds=range(400))
    assert len(found) == 400
    assert max(replays) <= engine._pools.max_sequences <= max(DECODE_GRAPHS)
    assert {each.ended for each in found} == {"stop", "length"}
    assert engine.free_slots() == free
    engine.close()


@pytest.mark.parametrize("sampling", [Sampling(1, 0.7), Sampling(1, 1.3, 0.9, 500)])
def test_draws_are_those_of_a_cpu(sampling: Sampling) -> None:
    """Of a large vocabulary, where sums of probabilities are long."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(96, 128_256, generator=generator)
    uniforms = torch.from_numpy(token_uniforms(range(96), [7] * 96))
    expected = choose(logits, range(96), sampling, uniforms)
    assert choose(logits.cuda(), range(96), sampling, uniforms) == expected
