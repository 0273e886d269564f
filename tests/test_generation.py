"""Continuations against transformers and PEFT, whatever else is in the call and in the pool."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, recorded
from slots import adapted_engine, prefixed_engine, random_prompts
from transformers import AutoModelForCausalLM

from orchestrator.config import ConfigError
from orchestrator.engine import Engine
from orchestrator.sampling import Sampling

Engines = Callable[[str], Engine]
FAMILIES = ["opt", "llama", "qwen3"]
WORDS = list(VOCABULARY)


def text_of(tokens: Sequence[int]) -> str:
    return " ".join(WORDS[token] for token in tokens)


def expected_tokens(
    model: Any, prompt: Sequence[int], length: int, eos: int | None = None
) -> list[int]:
    """What transformers takes one after the other, without the last token that ends it."""
    tokens = torch.tensor([prompt])
    mask = torch.ones_like(tokens)  # or it would leave out what looks like padding
    choices: dict[str, Any] = {"do_sample": False, "eos_token_id": eos, "pad_token_id": 1}
    found = model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=length, **choices)
    continuation: list[int] = found[0, len(prompt) :].tolist()
    return continuation[:-1] if continuation[-1] == eos else continuation


@pytest.fixture(scope="module")
def prefixed(model_folders: dict[str, Path]) -> Iterator[Engine]:
    engine = prefixed_engine(model_folders["llama"], kv_tokens=128)
    yield engine
    engine.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(
    family: str, engines: Engines, model_folders: dict[str, Path]
) -> None:
    """In a pool that holds some six of the rows at a time, of prompts that are asked up to thrice.

    Some end before a token that transformers is told to end with.
    """
    engine = engines(family)
    model = AutoModelForCausalLM.from_pretrained(model_folders[family], dtype=torch.float32)
    prompts = random_prompts(seed=0, count=24)
    prompts += prompts[5:9] + prompts[7:8]
    free, kept = engine.free_slots(), engine._pools.cache.total_size()
    whole = engine.generate(prompts, Sampling(24))
    assert {(len(found.tokens), found.ended) for found in whole} == {(24, "length")}
    for prompt, found in zip(prompts, whole, strict=True):
        assert found.tokens == expected_tokens(model, prompt, 24)
        assert found.text is None
    # The token that most rows have somewhere, but not all.
    counts = Counter(token for found in whole for token in set(found.tokens))
    eos = next(token for token, count in counts.most_common() if count < len(prompts))
    ended = engine.generate(prompts, Sampling(24, stop_tokens=frozenset([eos])))
    assert {found.ended for found in ended} == {"stop", "length"}
    for prompt, found in zip(prompts, ended, strict=True):
        assert found.tokens == expected_tokens(model, prompt, 24, eos)
    assert engine.free_slots() == free
    assert engine._pools.cache.total_size() <= kept  # less if room had to be made


@pytest.mark.parametrize("kv_tokens", [56, 1024])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_under_adapters_equal_peft(
    family: str, kv_tokens: int, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Each prompt under both adapters and none, in one call."""
    engine, models = adapted_engine(model_folders[family], tmp_path, kv_tokens=kv_tokens)
    assert engine.slots is not None
    free = engine.free_slots()
    prompts = random_prompts(seed=1, count=6)
    prompts.append(prompts[2])
    found = engine.generate(prompts, Sampling(16), adapters=[None, *engine.slots.names])
    expected = [expected_tokens(model, prompt, 16) for model in models for prompt in prompts]
    assert [each.tokens for each in found] == expected
    assert len({tuple(tokens) for tokens in expected}) > len(prompts)  # adapters matter
    assert engine.free_slots() == free
    engine.close()


def test_every_greedy_token_under_a_prefix_scores_highest(prefixed: Engine) -> None:
    assert prefixed.prefixes is not None
    names = [*prefixed.prefixes.names, None]
    free = prefixed.free_slots()
    prompts = random_prompts(seed=2, count=4)
    prompts.append(prompts[0])
    found = prefixed.generate(prompts, Sampling(6), adapters=names)
    assert len({tuple(each.tokens) for each in found}) > len(prompts)  # prefixes matter
    rows = [(name, prompt) for name in names for prompt in prompts]
    for (name, prompt), each in zip(rows, found, strict=True):
        for place, token in enumerate(each.tokens):
            before = [*prompt, *each.tokens[:place]]
            options = [[*before, option] for option in range(len(VOCABULARY))]
            spans = [(len(before), len(before) + 1)] * len(options)
            sums = [span.sum for span in prefixed.score(options, spans, adapters=[name]).spans]
            assert sums[token] == pytest.approx(max(sums), abs=1e-5)
    assert prefixed.free_slots() == free


@pytest.mark.parametrize("kind", ["base", "adapters", "prefixes"])
def test_draws_do_not_depend_on_company_or_pool(
    kind: str,
    engines: Engines,
    prefixed: Engine,
    model_folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    sampling = Sampling(12, temperature=0.8, top_p=0.95, stop_tokens=frozenset([6]))
    names: Sequence[str | None] = [None]
    engine = engines("llama")
    if kind == "adapters":
        engine, _ = adapted_engine(model_folders["llama"], tmp_path, kv_tokens=100)
        assert engine.slots is not None
        names = engine.slots.names
    elif kind == "prefixes":
        engine = prefixed
        assert engine.prefixes is not None
        names = engine.prefixes.names
    prompts = [prompt for prompt in random_prompts(seed=3, count=5) for _ in range(4)]
    seeds = [2**64 - 1 - number for number in range(len(prompts))]
    together = engine.generate(prompts, sampling, adapters=names, seeds=seeds)
    alone = [
        engine.generate([prompt], sampling, adapters=[name], seeds=[seed])[0]
        for name in names
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    assert together == alone
    order = random.Random(0).sample(range(len(prompts)), len(prompts))
    shuffled = engine.generate(
        [prompts[index] for index in order],
        sampling,
        adapters=names,
        seeds=[seeds[index] for index in order],
    )
    assert shuffled[: len(order)] == [together[index] for index in order]
    assert len({tuple(each.tokens) for each in together}) > len(together) // 2
    if kind == "adapters":
        engine.close()


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_draws_follow_the_softmax(
    num_tokens: int, engines: Engines, model_folders: dict[str, Path]
) -> None:
    """The first token, and the second behind each first one, against transformers' softmax."""
    count, temperature = 3000, 2.0
    prompt = [3, 4, 5]
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama"], dtype=torch.float32)
    found = engines("llama").generate(
        [prompt] * count, Sampling(num_tokens, temperature), seeds=range(count)
    )
    groups: dict[tuple[int, ...], list[int]] = {}
    for each in found:
        groups.setdefault(tuple(each.tokens[:-1]), []).append(each.tokens[-1])
    num_compared = 0
    for before, tokens in groups.items():
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *before]])).logits[0, -1]
        expected = (logits / temperature).softmax(-1).double() * len(tokens)
        counts = torch.bincount(torch.tensor(tokens), minlength=len(VOCABULARY)).double()
        is_rare = expected < 5
        if is_rare.all():
            continue
        parts = torch.cat([expected[~is_rare], expected[is_rare].sum()[None]])
        seen = torch.cat([counts[~is_rare], counts[is_rare].sum()[None]])
        parts, seen = parts[parts > 1], seen[parts > 1]
        statistic = float(((seen - parts).square() / parts).sum())
        freedom = max(1, len(parts) - 1)
        assert statistic < freedom + 5 * (2 * freedom) ** 0.5, (before, parts, seen)
        num_compared += len(tokens)
    assert num_compared > 0.9 * count


def test_a_prompt_that_is_asked_often_is_computed_once(engines: Engines) -> None:
    engine = engines("llama")
    prompt = random_prompts(seed=4, count=1)[0] * 5
    with recorded(engine) as logits:
        engine.generate([prompt] * 6, Sampling(4, 1.0), seeds=range(6))
    # The prompt, from which come all first tokens, then one more of all six at a time.
    assert [len(rows) for rows in logits] == [len(prompt), 6, 6, 6]


def test_rows_that_end_make_room_for_others(engines: Engines) -> None:
    """In a pool for two rows at a time; so a call takes fewer forwards than pairs would."""
    engine = engines("opt")
    prompts = random_prompts(seed=5, count=30)
    sampling = Sampling(100, stop_tokens=frozenset(range(3, 9)))
    lengths = [len(found.tokens) for found in engine.generate(prompts, sampling)]
    forward, num_forwards = engine._runner.forward, 0

    def counted(batch: Any) -> Any:
        nonlocal num_forwards
        num_forwards += 1
        return forward(batch)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine._runner, "forward", counted)
        again = engine.generate(prompts, sampling)
    assert [len(found.tokens) for found in again] == lengths
    pairs = zip(lengths[::2], lengths[1::2], strict=True)
    assert num_forwards < sum(max(pair) + 1 for pair in pairs) + len(prompts)
    assert len(set(lengths)) > 2


def test_text_ends_before_a_stop_string(engines: Engines) -> None:
    engine = engines("opt")
    prompts = random_prompts(seed=6, count=8)
    whole = engine.generate(prompts, Sampling(12), decode=text_of)
    assert [found.text for found in whole] == [text_of(found.tokens) for found in whole]
    assert whole[0].text is not None
    stop = whole[0].text[10:16]  # somewhere, spaces and parts of words included
    found = engine.generate(prompts, Sampling(12, stop_strings=(stop, "absent")), decode=text_of)
    for cut, uncut in zip(found, whole, strict=True):
        assert uncut.text is not None and cut.text is not None
        assert cut.text == uncut.text.split(stop)[0]
        assert cut.ended == ("stop" if stop in uncut.text else "length")
        assert text_of(cut.tokens).startswith(cut.text)
        assert not text_of(cut.tokens[:-1]).startswith(cut.text) or not cut.tokens
    assert found[0].ended == "stop"


def test_entries_are_kept_under_a_namespace_only(engines: Engines) -> None:
    engine = engines("qwen3")
    prompts = [tokens * 3 for tokens in random_prompts(seed=7, count=3)]
    prompts.append(prompts[0])
    fresh = engine.generate(prompts, Sampling(5))
    with recorded(engine) as logits:
        kept = engine.generate(prompts, Sampling(5), namespace="weights of now")
    with recorded(engine) as again:
        found = engine.generate(prompts, Sampling(5), namespace="weights of now")
    with recorded(engine) as other:
        engine.generate(prompts, Sampling(5), namespace="other weights")
    assert fresh == kept == found
    size = len(prompts[0])  # the last prompt is the first again
    assert [each.num_reused for each in found] == [*(len(p) - 1 for p in prompts[:3]), size]
    assert [each.num_reused for each in fresh] == [0, 0, 0, size]
    assert [len(rows) for rows in logits][0] == sum(map(len, prompts[:3]))
    assert [len(rows) for rows in again][0] == 3  # the last token of each prompt
    assert [len(rows) for rows in other][0] == sum(map(len, prompts[:3]))
    assert engine._pools.cache.protected_size() == 0


def test_rows_whose_logits_are_not_finite_end_undefined(engines: Engines) -> None:
    engine = engines("llama")
    free = engine.free_slots()
    weight = engine.model.get_parameter("model.norm.weight")
    with torch.no_grad():
        before = weight.clone()
        weight.fill_(float("nan"))
    try:
        for sampling in (Sampling(5), Sampling(5, 1.0)):
            found = engine.generate([[3, 4], [3, 4], [5]], sampling, seeds=[1, 2, 3])
            assert [(each.tokens, each.ended) for each in found] == [([], "undefined")] * 3
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert engine.free_slots() == free


@pytest.mark.parametrize("failing", [0, 1, 2, 5])
@pytest.mark.parametrize("namespace", [None, "a state"])
def test_a_failure_gives_all_slots_back(
    failing: int, namespace: str | None, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward of prompts fails, of branches, of a step with others still waiting."""
    engine = engines("qwen2")
    prompts = random_prompts(seed=8, count=20)
    prompts += prompts[:3] * 2
    sampling = Sampling(20)
    expected = engine.generate(prompts, sampling)
    free = engine.free_slots()
    forward = engine._runner.forward
    calls: Iterator[Callable[..., Any]] = iter([*[forward] * failing, fail])
    monkeypatch.setattr(engine._runner, "forward", lambda batch: next(calls)(batch))
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.generate(prompts, sampling, namespace=namespace)
    monkeypatch.undo()
    assert engine.free_slots() == free
    assert engine._pools.cache.protected_size() == 0
    assert engine.generate(prompts, sampling, namespace=namespace) == expected


def fail(*_: object) -> None:
    raise RuntimeError("as if out of memory")


@pytest.mark.slow
def test_a_hundred_calls_leave_the_pools_as_they_were(engines: Engines) -> None:
    engine = engines("llama")
    free = engine.free_slots()
    draw = random.Random(9)
    for number in range(100):
        prompts = random_prompts(seed=number, count=10) * draw.randint(1, 3)
        sampling = Sampling(draw.randint(1, 20), 1.0, stop_tokens=frozenset([draw.randint(3, 12)]))
        engine.generate(
            prompts,
            sampling,
            seeds=range(len(prompts)),
            namespace=draw.choice([None, f"state {number % 7}"]),
        )
        assert engine.free_slots() == free
    assert engine._pools.cache.protected_size() == 0


def test_what_cannot_be_continued_is_refused(engines: Engines) -> None:
    engine = engines("opt")
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        engine.generate([[]], Sampling(3))
    with pytest.raises(ValueError, match="stop strings need a decode"):
        engine.generate([[3]], Sampling(3, stop_strings=("x",)))
    with pytest.raises(ValueError, match="a temperature needs seeds"):
        engine.generate([[3]], Sampling(3, temperature=1.0))
    with pytest.raises(ConfigError, match=r"303 tokens exceeds the 25\d .*lower task\.max_length"):
        engine.generate([[6], [3, 4, 5]], Sampling(300))
    assert engine.generate([], Sampling(3)) == []
    assert engine.eos_tokens == {1}
