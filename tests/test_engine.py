"""The engine against transformers on the same weights, and its bookkeeping of slots."""

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import DEVICE, VOCABULARY, renamed
from sglang.srt.mem_cache import allocation
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from transformers import AutoModelForCausalLM

from orchestrator.config import ConfigError
from orchestrator.engine import Engine
from orchestrator.pools import Pools
from orchestrator.runner import Runner
from orchestrator.score_attention import KeysElsewhere, UncachedAttention
from orchestrator.score_graphs import TOKEN_STEP

Engines = Callable[[str], Engine]


def ragged(seed: int, count: int) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Random sequences, each with a span that may stand anywhere but at the very start."""
    draw = random.Random(seed)
    sequences = [
        [draw.randrange(len(VOCABULARY)) for _ in range(draw.randint(2, 60))] for _ in range(count)
    ]
    spans = []
    for tokens in sequences:
        start = draw.randrange(1, len(tokens))
        spans.append((start, draw.randint(start + 1, len(tokens))))
    return sequences, spans


@torch.no_grad()
def reference_sums(
    folder: Path, sequences: list[list[int]], spans: list[tuple[int, int]]
) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sums = []
    for tokens, (start, end) in zip(sequences, spans, strict=True):
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        sums.append(sum(float(logprobs[p - 1, tokens[p]]) for p in range(start, end)))
    return sums


@pytest.mark.parametrize("family", ["opt", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("namespace", [None, "a state"])
def test_scores_equal_transformers(
    family: str, namespace: str | None, engines: Engines, model_folders: dict[str, Path]
) -> None:
    sequences, spans = ragged(seed=0, count=50)
    expected = reference_sums(model_folders[family], sequences, spans)
    scores = engines(family).score(sequences, spans, namespace).spans
    for score, total, (start, end) in zip(scores, expected, spans, strict=True):
        assert score.sum == pytest.approx(total, abs=1e-4 * (end - start))
        assert score.mean == pytest.approx(total / (end - start), abs=1e-4)


@pytest.mark.parametrize("family", ["opt", "opt-350m", "llama", "qwen2", "qwen3"])
def test_final_hidden_states_equal_transformers(
    family: str, engines: Engines, model_folders: dict[str, Path]
) -> None:
    """Behind the final norm and OPT's last projection, over several batches; nothing is kept."""
    engine, (sequences, _) = engines(family), ragged(seed=7, count=20)
    free = engine.free_slots()
    found = engine.last_hidden(sequences)
    model = AutoModelForCausalLM.from_pretrained(model_folders[family], dtype=torch.float32)
    assert (found.dtype, engine.free_slots()) == (torch.float32, free)
    with torch.no_grad():
        expected = [model.model(torch.tensor([s])).last_hidden_state[0, -1] for s in sequences]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="no tokens"):
        engine.last_hidden([[3], []])


def test_sequences_that_differ_in_their_last_token_are_computed_once(engines: Engines) -> None:
    prompt = [3, 4, 5, 6]
    scores = engines("llama").score([[*prompt, 7], [*prompt, 8]], [(4, 5), (4, 5)])
    assert scores.num_tokens == len(prompt)
    alone = engines("llama").score([[*prompt, 8]], [(4, 5)])
    assert scores.spans[1].sum == pytest.approx(alone.spans[0].sum, abs=1e-6)


def test_all_options_together_have_probability_one(engines: Engines) -> None:
    sequences = [[0, 5, 9, token] for token in range(len(VOCABULARY))]
    scores = engines("opt").score(sequences, [(3, 4)] * len(sequences))
    total = torch.tensor([score.sum for score in scores.spans]).exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-5)


def test_an_entry_is_reused_in_its_own_namespace_only(engines: Engines) -> None:
    engine = engines("llama")
    context, first, second = list(range(3, 17)) * 2, [3, 4, 5], [6, 7]
    start = len(context)
    engine.score([context + first], [(start, start + 3)], "weights of step 1")
    fresh = engine.score([context + second], [(start, start + 2)])
    same = engine.score([context + second], [(start, start + 2)], "weights of step 1")
    other = engine.score([context + second], [(start, start + 2)], "weights of step 2")
    assert (fresh.num_reused, other.num_reused) == (0, 0)
    assert same.num_reused == start - 1  # the position before the span is needed for its logits
    assert same.spans[0].sum == pytest.approx(fresh.spans[0].sum, abs=1e-5)


def test_without_a_namespace_nothing_is_reused_or_kept(engines: Engines) -> None:
    engine = engines("qwen3")
    sequences, spans = ragged(seed=2, count=5)
    free, kept = engine.free_slots(), engine._pools.cache.total_size()
    first, second = engine.score(sequences, spans), engine.score(sequences, spans)
    assert first == second
    assert first.num_reused == 0
    assert engine.free_slots() == free
    assert engine._pools.cache.total_size() <= kept  # less if room had to be made


def test_batches_larger_than_the_pool_are_split(engines: Engines) -> None:
    engine = engines("llama")
    sequences, spans = ragged(seed=3, count=40)
    assert sum(map(len, sequences)) > 4 * 256
    together = engine.score(sequences, spans)
    for tokens, span, score in list(zip(sequences, spans, together.spans, strict=True))[:5]:
        alone = engine.score([tokens], [span]).spans[0]
        assert score.sum == pytest.approx(alone.sum, abs=1e-4)


def test_the_same_call_gives_the_same_bits(engines: Engines) -> None:
    sequences, spans = ragged(seed=4, count=30)
    first = engines("opt").score(sequences, spans)
    engines("llama").score(sequences, spans)  # another engine of the process in between
    assert engines("opt").score(sequences, spans) == first


@pytest.mark.slow
def test_ten_thousand_scorings_leave_the_pool_as_it_was(engines: Engines) -> None:
    engine = engines("llama")
    before = engine.free_slots()
    draw = random.Random(5)
    for round in range(200):
        sequences, spans = ragged(seed=round, count=50)
        engine.score(sequences, spans, draw.choice([None, f"state {round % 7}"]))
        assert engine.free_slots() == before
    assert engine._pools.cache.protected_size() == 0


def test_more_sequences_than_request_slots_are_split(engines: Engines) -> None:
    engine = engines("opt")
    sequences = [[token, other] for token in range(17) for other in range(17)]
    distinct = [[first, second, 5] for first, second in sequences]
    scores = engine.score(distinct, [(2, 3)] * len(distinct)).spans
    alone = engine.score(distinct[200:201], [(2, 3)]).spans
    assert scores[200].sum == pytest.approx(alone[0].sum, abs=1e-5)


def test_more_adapters_than_request_slots_are_refused(engines: Engines) -> None:
    with pytest.raises(ConfigError, match=r"space\.slots: 500 sequences .*; lower space\.slots"):
        engines("opt").score([[3, 4, 5]], [(1, 2)], adapters=[None] * 500)


def test_a_damaged_file_is_refused_by_name(model_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = renamed(model_folders["opt"], tmp_path / "damaged", lambda name: name)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ConfigError, match=f"{file}: not a readable weight file"):
        Engine(str(folder), dtype="float32", device=DEVICE, kv_tokens=64)


def test_a_sequence_longer_than_the_pool_is_refused_with_both_numbers(engines: Engines) -> None:
    with pytest.raises(ConfigError, match=r"300 tokens exceeds the 25\d .* model.kv_tokens"):
        engines("llama").score([[3] * 301], [(300, 301)])


@pytest.mark.parametrize("span", [(0, 2), (2, 2), (2, 4)])
def test_a_span_outside_its_sequence_is_refused(span: tuple[int, int], engines: Engines) -> None:
    with pytest.raises(ValueError, match="span"):
        engines("llama").score([[3, 4, 5]], [span])


def fail(*_: object, **__: object) -> None:
    raise RuntimeError("as if out of memory")


@pytest.mark.parametrize("place", ["request", "slots", "layout", "forward"])
@pytest.mark.parametrize("namespace", [None, "a state"])
def test_a_failure_gives_all_slots_back_and_keeps_no_entries(
    place: str, namespace: str | None, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines("qwen2")
    sequences, spans = [[3, 4, 5, 6], [7, 8, 9]], [(3, 4), (1, 3)]
    engine.score(sequences[:1], spans[:1], namespace)
    before, kept = engine.free_slots(), engine._pools.cache.total_size()
    if place == "request":
        made = iter([engine._pools.request, fail])
        monkeypatch.setattr(engine._pools, "request", lambda *arguments: next(made)(*arguments))
    elif place == "slots":
        monkeypatch.setattr(allocation, "alloc_token_slots", fail)
    elif place == "layout":
        monkeypatch.setattr(ForwardBatch, "init_new", fail)
    else:
        monkeypatch.setattr(engine._runner, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.score(sequences, spans, namespace)
    assert (engine.free_slots(), engine._pools.cache.total_size()) == (before, kept)
    assert engine._pools.cache.protected_size() == 0


def test_graphs_refuse_layers_without_keys_of_their_own() -> None:
    """Such a layer would read keys that nobody has written to the pool."""
    attention = object.__new__(UncachedAttention)
    attention.forward_metadata = None
    layer: Any = SimpleNamespace(layer_id=3)
    with pytest.raises(KeysElsewhere):
        attention.forward_extend(torch.zeros(1, 8), None, None, layer, layer)


def test_where_graphs_pad_batches_there_is_room_for_a_sequence_more(engines: Engines) -> None:
    runner = engines("llama")._runner.model_runner
    exact, padded = Pools(runner, None, 0), Pools(runner, None, 32)
    assert padded.max_sequences == exact.max_sequences - 1
    assert padded.free()[1] == exact.free()[1] - 1


def test_a_pool_that_finds_no_room_is_refused(
    model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang makes a smaller one, by what is free; batches would then be cut by that."""
    monkeypatch.setattr(Runner, "__init__", _with_less_room(Runner.__init__))
    with pytest.raises(ConfigError, match="model.kv_tokens: 64 do not fit .* room for 50; lower"):
        Engine(str(model_folders["opt"]), dtype="float32", device=DEVICE, kv_tokens=64)


def _with_less_room(original: Callable[..., None]) -> Callable[..., None]:
    def made(runner: Runner, *arguments: Any) -> None:
        original(runner, *arguments)
        margin = 0 if DEVICE == "cpu" else TOKEN_STEP
        runner.model_runner.max_total_num_tokens = 50 + margin

    return made
