"""Activated adapters: PEFT's scores, and a cache that is never wrong."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY
from peft import LoraConfig, get_peft_model
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from slots import MODULES, adapted_engine
from transformers import AutoModelForCausalLM

from orchestrator.engine import Engine
from orchestrator.pools import Pools
from orchestrator.sampling import Sampling

CUE = [4, 3]
"""Tokens from which the adapters act; they are never drawn."""
SLOTS: list[str | None] = [None, "slot 0", "slot 1"]
POOL = 160


@pytest.fixture(scope="module", params=["llama", "opt"])
def activated(
    request: pytest.FixtureRequest,
    model_folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Engine, list[Any]]]:
    """An engine with two adapters in its slots; PEFT's models of the base and of both."""
    folder = model_folders[request.param]
    root = tmp_path_factory.mktemp(request.param)
    engine, plain = adapted_engine(folder, root, kv_tokens=POOL)
    yield engine, [plain[0], *(activated_model(folder, model) for model in plain[1:])]
    engine.close()


def activated_model(folder: Path, adapted: Any) -> Any:
    """The adapter of a PEFT model, as one that acts from the cue on."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=MODULES,
        alora_invocation_tokens=CUE,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, settings)
    model.load_state_dict(adapted.state_dict())
    return model.eval()


Row = tuple[list[int], tuple[int, int], int]


def words(draw: random.Random, low: int, high: int) -> list[int]:
    return [draw.randrange(5, len(VOCABULARY)) for _ in range(draw.randint(low, high))]


def some_rows(draw: random.Random, contexts: Sequence[list[int]], count: int) -> list[Row]:
    """Contexts, each with the cue, words and an option behind it."""
    rows: list[Row] = []
    for _ in range(count):
        context = draw.choice(contexts)
        stem = [*context, *CUE, *words(draw, 0, 4)]
        for _ in range(2):
            option = words(draw, 1, 3)
            rows.append(([*stem, *option], (len(stem), len(stem) + len(option)), len(context)))
    return rows


def scored(engine: Engine, rows: Sequence[Row], base: str | None) -> list[float]:
    sequences, spans, contexts = zip(*rows, strict=True)
    found = engine.score(sequences, spans, adapters=SLOTS, contexts=contexts, base=base)
    return [span.sum for span in found.spans]


@torch.no_grad()
def reference(models: Sequence[Any], rows: Sequence[Row]) -> list[float]:
    found = []
    for model in models:
        for tokens, (start, end), _ in rows:
            logprobs = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
            found.append(sum(float(logprobs[p - 1, tokens[p]]) for p in range(start, end)))
    return found


def test_scores_equal_pefts_activated_lora(activated: tuple[Engine, list[Any]]) -> None:
    engine, models = activated
    draw = random.Random(0)
    contexts = [words(draw, 1, 20) for _ in range(3)]
    contexts.append([*contexts[0], *CUE, *contexts[1]])  # the cue's last occurrence counts
    rows = some_rows(draw, contexts, 8)
    expected = reference(models, rows)
    assert scored(engine, rows, None) == pytest.approx(expected, abs=2e-4)
    first = scored(engine, rows, "weights")
    assert first == scored(engine, rows, "weights") == scored(engine, rows, None)
    size = len(rows)
    for number in (1, 2):  # the adapters matter
        assert expected[number * size : (number + 1) * size] != pytest.approx(expected[:size])


def exercise(engine: Engine, seed: int) -> None:
    """Random calls that fill and use the cache, with evictions between them: every activated score
    must be, bit for bit, that of a call that finds and leaves nothing."""
    draw = random.Random(seed)
    cache = engine._pools.cache
    # contexts that begin alike, and are more than the pool holds
    trunk = words(draw, 5, 5)
    contexts = [[*trunk[: draw.randint(0, 5)], *words(draw, 10, 25)] for _ in range(8)]
    contexts += [context[: draw.randint(1, 9)] for context in contexts[:3]]
    for _ in range(25):
        rows = some_rows(draw, contexts, draw.randint(1, 3))
        if draw.random() < 0.4:  # whole sequences under an adapter, whose entries stay
            sequences, spans, _ = zip(*rows, strict=True)
            engine.score(sequences, spans, f"step {draw.randint(0, 2)}", ["slot 1"])
        if draw.random() < 0.3:
            cache.evict(EvictParams(num_tokens=draw.randint(1, POOL)))
        assert scored(engine, rows, "weights") == scored(engine, rows, None)
    assert engine.free_slots() == (engine.kv_tokens, engine._pools.max_sequences)


def test_reuse_changes_no_bit_whatever_is_evicted(activated: tuple[Engine, list[Any]]) -> None:
    engine, _ = activated
    before = engine._pools.cache.num_evicted
    exercise(engine, seed=1)
    assert engine._pools.cache.num_evicted > before + 3 * POOL


@pytest.mark.parametrize("activated", ["llama"], indirect=True)
def test_without_namespaces_reuse_would_be_wrong(
    activated: tuple[Engine, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `exercise` asserts depends on the namespaces: it fails where they are dropped."""
    engine, _ = activated
    make, find = Pools._new, Pools.find

    def made(self: Pools, *arguments: Any, **named: Any) -> Any:
        request = make(self, *arguments, **named)
        request.extra_key = None
        return request

    monkeypatch.setattr(Pools, "_new", made)
    nameless: Any = None
    monkeypatch.setattr(Pools, "find", lambda self, tokens, _: find(self, tokens, nameless))
    with pytest.raises(AssertionError):
        exercise(engine, seed=1)
    monkeypatch.undo()
    engine._pools.cache.evict(EvictParams(num_tokens=POOL))


def test_what_is_reused_is_the_contexts(activated: tuple[Engine, list[Any]]) -> None:
    engine, _ = activated
    engine._pools.cache.evict(EvictParams(num_tokens=POOL))
    context = list(range(5, 15))
    sequences = [[*context, *CUE, 6, option] for option in (7, 8)]
    call: dict[str, Any] = {"adapters": SLOTS, "contexts": [10, 10]}
    first = engine.score(sequences, [(13, 14)] * 2, base="weights", **call)
    again = engine.score(sequences, [(13, 14)] * 2, base="weights", **call)
    other = engine.score(sequences, [(13, 14)] * 2, base="other weights", **call)
    alone = engine.score(sequences, [(13, 14)] * 2, **call)
    assert (first.num_tokens, first.num_reused, first.num_asked) == (10 + 3 * 3, 0, 3 * 2 * 13)
    assert (again.num_tokens, again.num_reused, again.num_asked) == (3 * 3, 10, 3 * 2 * 13)
    assert (other.num_tokens, alone.num_tokens) == (first.num_tokens, first.num_tokens)
    assert engine._pools.cache.total_size() == 2 * 10  # suffixes leave nothing


def test_generation_equals_pefts(activated: tuple[Engine, list[Any]]) -> None:
    engine, models = activated
    draw = random.Random(5)
    contexts = [words(draw, 3, 12) for _ in range(3)]
    prompts, sizes = [], []
    for _ in range(6):
        context = draw.choice(contexts)
        prompts.append([*context, *CUE, *words(draw, 0, 3)])
        sizes.append(len(context))
    expected = []
    for model in models:
        for prompt in prompts:
            found = model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=5,
                do_sample=False,
                eos_token_id=None,
            )
            expected.append(tuple(found[0, len(prompt) :].tolist()))
    for base in (None, "weights", "weights"):
        answers = engine.generate(prompts, Sampling(5), adapters=SLOTS, contexts=sizes, base=base)
        assert [tuple(each.tokens) for each in answers] == expected
        assert engine.free_slots() == (engine.kv_tokens, engine._pools.max_sequences)
    assert all(each.num_reused == size for each, size in zip(answers, sizes * 3, strict=True))


def test_a_span_right_behind_its_context_is_refused(activated: tuple[Engine, list[Any]]) -> None:
    with pytest.raises(ValueError, match="context of 3"):
        activated[0].score([[5, 6, 7, 8]], [(3, 4)], contexts=[3])
