"""Activated adapters on a GPU: bit-equal reuse, and the noise of computing otherwise."""

import random
from contextlib import closing
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.adapters import AdapterPlan
from orchestrator.engine import Engine
from orchestrator.export import AdapterSettings
from orchestrator.lora import LoraSpace
from orchestrator.records import Probe, StepUpdate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODULES = ("q_proj", "v_proj", "down_proj")
POOL = 2048


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def slots(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An engine of Llama's form with 5 slots, an adapter that is no longer zero, its copies."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).to(getattr(torch, request.param)).save_pretrained(folder)
    engine = Engine(
        str(folder),
        dtype=request.param,
        device="cuda",
        kv_tokens=POOL,
        adapters=AdapterPlan(5, 8, 2.0, MODULES),
    )
    assert engine.slots is not None
    settings = AdapterSettings(8, 16.0, MODULES)
    space = LoraSpace(engine.slots, settings, noise_kind="gaussian", seed=0)
    space.apply(StepUpdate(0, seeds=(1,), coefficients=(0.05,), decay=1.0))
    probes = [Probe(1, seed, sign, 0.05, (0,)) for seed in (7, 8) for sign in (1, -1)]
    with closing(space.placed(probes)) as groups:
        adapters = [placed.adapter for placed in next(groups)]
    yield engine, [*adapters, space.adapter, None]
    engine.close()


def drawn(seed: int, contexts: list[list[int]], count: int) -> tuple[Any, Any, Any]:
    """Sequences of some of the contexts, with questions and options behind them."""
    draw = random.Random(seed)
    sequences, spans, sizes = [], [], []
    for _ in range(count):
        context = draw.choice(contexts)
        stem = [*context, *(draw.randrange(5, 512) for _ in range(draw.randint(2, 30)))]
        for _ in range(3):
            option = [draw.randrange(5, 512) for _ in range(draw.randint(1, 4))]
            sequences.append([*stem, *option])
            spans.append((len(stem), len(stem) + len(option)))
            sizes.append(len(context))
    return sequences, spans, sizes


def some_contexts(seed: int, count: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(5, 512) for _ in range(draw.randint(60, 300))] for _ in range(count)]


def test_reuse_changes_no_bit_whatever_is_evicted(slots: Any) -> None:
    engine, adapters = slots
    draw = random.Random(1)
    contexts = some_contexts(0, 14)
    before = engine.num_evicted
    for seed in range(12):
        sequences, spans, sizes = drawn(seed, contexts, 3)
        call: dict[str, Any] = {"adapters": adapters, "contexts": sizes}
        if draw.random() < 0.5:
            engine._pools.cache.evict(EvictParams(num_tokens=draw.randint(1, POOL)))
        kept = engine.score(sequences, spans, base="weights", **call)
        fresh = engine.score(sequences, spans, **call)
        assert kept.spans == fresh.spans
    assert engine.num_evicted > before + POOL
    assert engine.free_slots() == (engine.kv_tokens, engine._pools.max_sequences)


def test_contexts_are_the_bases_and_the_rest_the_adapters(slots: Any) -> None:
    """Under no adapter, whole sequences; under one, other scores than where it acts on all."""
    engine, adapters = slots
    sequences, spans, sizes = drawn(3, some_contexts(2, 2), 2)
    found = engine.score(sequences, spans, adapters=adapters, contexts=sizes, base="weights")
    whole = engine.score(sequences, spans, adapters=adapters)
    size = len(sequences)
    tolerance = 2e-3 if next(engine.model.parameters()).dtype == torch.float32 else 0.15
    means = [[span.mean for span in scores.spans] for scores in (found, whole)]
    assert means[0][-size:] == pytest.approx(means[1][-size:], abs=tolerance)
    assert means[0][:size] != pytest.approx(means[1][:size], abs=tolerance)


def test_a_forward_in_other_company_gives_a_context_the_same_entries(
    slots: Any,
) -> None:
    """Contexts are computed alone, so what a batch holds beside one changes no bit of it."""
    engine, _ = slots
    tokens = tuple(some_contexts(4, 1)[0])
    pool = engine._runner.model_runner.token_to_kv_pool

    def entries() -> torch.Tensor:
        engine._pools.cache.evict(EvictParams(num_tokens=POOL))
        sequences, spans, sizes = drawn(random.randrange(10**6), some_contexts(5, 3), 3)
        engine.score(
            [[*tokens, 5, 6], *sequences],
            [(len(tokens) + 1, len(tokens) + 2), *spans],
            contexts=[len(tokens), *sizes],
            base="weights",
        )
        found = engine._contexts.find(tokens, "weights")
        assert found is not None
        values = torch.cat(
            [
                pool.get_key_buffer(0)[found.entries].flatten(),
                pool.get_value_buffer(1)[found.entries].flatten(),
            ]
        )
        engine._pools.let_go(found)
        return values

    first = entries()
    assert all(torch.equal(first, entries()) for _ in range(3))
