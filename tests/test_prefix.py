"""The prefix space against PEFT's prefix tuning, on transformers."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Make
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from transformers import AutoModelForCausalLM

from orchestrator import noise
from orchestrator.config import ConfigError
from orchestrator.engine import Engine
from orchestrator.prefix import INITIAL_BOUND, PrefixSpace
from orchestrator.prefix_slots import PrefixPlan, PrefixSlots
from orchestrator.records import Probe, StepUpdate

MakePrefix = Callable[..., tuple[Engine, PrefixSpace]]
FAMILIES = ["opt", "llama", "qwen3"]
EPS = 0.5
SEQUENCES = [[3, 4, 5, 6, 7], [8, 9, 10], [3, 4, 5, 6, 8], [11, 12, 13, 14, 15, 16]]
SPANS = [(4, 5), (1, 3), (4, 5), (2, 6)]
NUM_COMPUTED = 4 + 2 + 5  # distinct inputs: the first and the third sequence share theirs
UPDATE = StepUpdate(0, seeds=(5, 6), coefficients=(0.4, 0.2), decay=1.0)


@pytest.fixture
def make(make: Make) -> MakePrefix:
    """An engine and a prefix space over it."""

    def made(family: str, **choices: Any) -> tuple[Engine, PrefixSpace]:
        engine, space = make(family, kind="prefix", **choices)
        assert isinstance(space, PrefixSpace)
        return engine, space

    return made


def probes(count: int, step: int = 0) -> list[Probe]:
    return [
        Probe(step, seed, sign, EPS, (0,)) for seed in range(70, 70 + count) for sign in (1, -1)
    ]


def sums(engine: Engine, adapters: list[str | None]) -> list[list[float]]:
    """Per adapter, the sequences' summed log-probabilities, of one call."""
    scores = engine.score(SEQUENCES, SPANS, adapters=adapters).spans
    size = len(SEQUENCES)
    return [
        [span.sum for span in scores[start : start + size]] for start in range(0, len(scores), size)
    ]


@torch.no_grad()
def reference_sums(model: torch.nn.Module) -> list[float]:
    found = []
    for tokens, (start, end) in zip(SEQUENCES, SPANS, strict=True):
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        found.append(sum(float(logprobs[p - 1, tokens[p]]) for p in range(start, end)))
    return found


def peft_model(folder: Path, space: PrefixSpace, seed: int = 0, scale: float = 0.0) -> PeftModel:
    """PEFT's own prefix tuning of a model, with the space's master moved by scale * z(seed)."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    num_tokens = space.tensors[0].shard.num_rows
    model = get_peft_model(
        base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_tokens)
    )
    values = []
    for name, value in space.values():
        drawn = noise.draw("gaussian", seed, name, 0, value.numel())
        values.append(value + scale * torch.from_numpy(drawn).view(value.shape))
    encoders: Any = model.prompt_encoder
    encoders["default"].load_prompt_embeddings(torch.cat(values, dim=1))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_all_probes_in_one_forward_equal_peft(
    family: str, make: MakePrefix, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base in the same batch does not change with the slots, and virtual tokens are no work."""
    engine, space = make(family, tokens=3, slots=4)
    space.apply(UPDATE)
    space.settle()
    forwards: list[Any] = []
    forward = engine._runner.forward

    def noted(batch: Any) -> Any:
        forwards.append(batch)
        return forward(batch)

    monkeypatch.setattr(engine._runner, "forward", noted)
    with closing(space.placed(probes(2))) as groups:
        (group,) = groups
        adapters = [None, *(placed.adapter for placed in group), space.adapter]
        scores = engine.score(SEQUENCES, SPANS, adapters=adapters)
    assert len(forwards) == 1 and len(group) == 4
    assert (scores.num_tokens, scores.num_reused) == (6 * NUM_COMPUTED, 0)
    found = np.array([span.sum for span in scores.spans]).reshape(6, len(SEQUENCES))
    base = AutoModelForCausalLM.from_pretrained(model_folders[family], dtype=torch.float32)
    assert found[0] == pytest.approx(reference_sums(base), abs=1e-4)
    for placed, row in zip(group, found[1:5], strict=True):
        probe = placed.probe
        model = peft_model(model_folders[family], space, probe.seed, probe.sign * probe.eps)
        assert row == pytest.approx(reference_sums(model), abs=1e-4)
    trained = peft_model(model_folders[family], space)
    assert found[5] == pytest.approx(reference_sums(trained), abs=1e-4)
    assert len({tuple(row) for row in found}) == 6
    assert np.abs(found[1:] - found[0]).max() > 0.05
    space.apply(UPDATE)
    space.settle()
    space.settle()
    changed = sums(engine, adapters)
    assert changed[0] == found[0].tolist() and changed[5] != found[5].tolist()


def test_slots_leave_no_entries_behind(make: MakePrefix) -> None:
    engine, space = make("llama", kv_tokens=128, tokens=5, slots=2)
    free = engine.free_slots()
    assert free[0] == engine.kv_tokens == 128 - 3 * 5
    before = {name: value.clone() for name, value in engine.model.named_parameters()}
    for step in range(200):
        with closing(space.placed(probes(1, step))) as groups:
            for group in groups:
                # a namespace's entries crowd the pool, and are evicted: the slots never are
                adapters = [None, *(placed.adapter for placed in group)]
                engine.score(SEQUENCES[2:], SPANS[2:], namespace=str(step), adapters=adapters)
        space.apply(StepUpdate(step, seeds=(step,), coefficients=(1e-3,), decay=1.0))
        space.settle()
        assert engine.free_slots() == free
    for tensor in space.tensors:
        assert torch.equal(tensor.live, tensor.master)  # no sequence was written over it
    for name, value in engine.model.named_parameters():
        assert torch.equal(value, before[name]), name


def test_a_failed_forward_gives_back_what_it_took(
    make: MakePrefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, space = make("opt", tokens=2, slots=2)
    free, expected = engine.free_slots(), sums(engine, [space.adapter])

    def fail(batch: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(engine._runner, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            sums(engine, [None, space.adapter])
    assert engine.free_slots() == free
    assert sums(engine, [space.adapter]) == expected


def test_sequences_behind_a_prefix_fill_pool_and_context(
    make: MakePrefix, model_folders: dict[str, Path]
) -> None:
    """To the last token, and no further; batches that do not fit are split."""
    engine, space = make("opt", kv_tokens=1024, tokens=6, slots=2)
    assert engine.max_sequence_length == 256 - 6  # the model's context, less the virtual tokens
    longest = [index % 17 for index in range(251)]  # the last is a target, never an input
    long = engine.score([longest], [(250, 251)], adapters=[space.adapter]).spans[0]
    with torch.no_grad():
        logits = peft_model(model_folders["opt"], space)(torch.tensor([longest[:-1]])).logits
    expected = logits[0, -1].log_softmax(-1)[longest[-1]]
    assert long.sum == pytest.approx(float(expected), abs=1e-4)
    with pytest.raises(ConfigError, match="a sequence of 251 tokens exceeds the 250"):
        engine.score([[*longest, 3]], [(251, 252)], adapters=[space.adapter])
    sequences = [[first, *longest[1:]] for first in range(5)]  # more than the pool holds twice
    split = engine.score(sequences, [(250, 251)] * 5, adapters=[space.adapter, None])
    assert split.spans[0].sum == pytest.approx(long.sum, abs=1e-5)


def test_first_values_are_a_function_of_the_seed(make: MakePrefix) -> None:
    _, space = make("llama", tokens=7)
    assert space.num_parameters == 2 * 2 * 7 * 32  # layers, keys and values, tokens, heads * size
    for name, value in space.values():
        drawn = noise.uniform(3, name, value.numel()).reshape(value.shape)  # run.seed
        assert np.array_equal(value.numpy(), (2 * drawn - 1) * INITIAL_BOUND)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_prefix_scores_the_same_in_peft_and_starts_another_run(
    family: str, make: MakePrefix, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    engine, space = make(family, tokens=4, slots=2)
    space.apply(UPDATE)
    space.settle()
    space.settle()
    expected = sums(engine, [space.adapter])[0]
    space.export(model_folders[family], tmp_path / "tuned")
    base = AutoModelForCausalLM.from_pretrained(model_folders[family], dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "tuned"))
    assert reference_sums(loaded) == pytest.approx(expected, abs=1e-4)
    again_engine, again = make(family, tokens=4, slots=4, init=str(tmp_path / "tuned"))
    assert again.digest() == space.digest()
    assert sums(again_engine, [again.adapter])[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"slots": 100}, r"space\.slots: 100 slots of 5 .* model\.kv_tokens, 512; 84 do"),
        ({"tokens": 600}, r"space\.slots: 8 slots of 600 tokens do not fit .*; 0 do"),
        ({"init": "nowhere"}, r"space\.init: nowhere: no PEFT adapter"),
        ({"init": "PREFIX"}, r"space\.init: .*: has 3 tokens; space\.tokens is 5"),
        (
            {"init": "PREFIX", "tokens": 3},
            r"space\.init: shape \[3, 256\] in the adapter, \[3, 128\] in the model: it is for an",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    space: dict[str, Any],
    message: str,
    make: MakePrefix,
    model_folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    if space.get("init") == "PREFIX":  # of a base model with more heads
        other_engine, other = make("opt", tokens=3)
        other.export(model_folders["opt"], tmp_path / "prefix")
        space = {**space, "init": str(tmp_path / "prefix")}
    with pytest.raises(ConfigError, match=message) as caught:
        make("llama", **space)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_heads", [4, 2])
def test_ranks_share_the_heads_or_hold_copies(num_heads: int) -> None:
    """Four ranks of a head each, of a model that has four heads or two."""
    width, parts = num_heads * 8, []
    for rank in range(4):
        pool = MHATokenToKVPool(32, 1, torch.float32, 1, 8, 2, "cpu", False)
        model_config = SimpleNamespace(get_total_num_kv_heads=lambda: num_heads)
        runner = SimpleNamespace(
            model_config=model_config,
            token_to_kv_pool=pool,
            token_to_kv_pool_allocator=TokenToKVPoolAllocator(
                32, torch.float32, "cpu", pool, False
            ),
        )
        slots = PrefixSlots(runner, PrefixPlan(num_slots=3, num_tokens=5), rank, size=4)
        assert [tensor.shard.full_shape for tensor in slots.tensors] == [(5, width)] * 4
        slots.tensors[3].views[1].fill_(7.0)  # the second slot's values in the last layer
        written = pool.v_buffer[1].flatten(1).eq(7).all(dim=1).nonzero().flatten()
        assert torch.equal(written, slots.entries("prefix 1"))
        parts.append(slots.tensors[0].shard)
    counted = [shard.cells[1] for shard in parts if shard.counted]
    assert counted == [slice(start, start + 8) for start in range(0, width, 8)]
    copies = 4 // num_heads
    assert [shard.first_column for shard in parts] == [rank // copies * 8 for rank in range(4)]


def test_pools_without_plain_keys_and_values_are_refused(make: MakePrefix) -> None:
    engine, _ = make("opt")
    latent = SimpleNamespace(
        model_config=engine._runner.model_runner.model_config,
        token_to_kv_pool=MLATokenToKVPool.__new__(MLATokenToKVPool),
    )
    with pytest.raises(ConfigError, match="KV pool, MLATokenToKVPool, does not hold") as caught:
        PrefixSlots(latent, PrefixPlan(3, 5), rank=0, size=1)
    assert "\n" not in str(caught.value)
