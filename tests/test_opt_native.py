"""Our OPT against transformers, over the whole family, and against checkpoints of all kinds."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bare import adapter_runner, last_logits, make_adapter
from conftest import DEVICE, OPT_VARIANTS, VOCABULARY, make_model, recorded, renamed
from safetensors.torch import load_file, save_file
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.lora.utils import auto_detect_lora_target_modules
from sglang.srt.runtime_context import get_parallel
from transformers import AutoModelForCausalLM, OPTConfig
from transformers import OPTForCausalLM as TransformersOPT

from orchestrator.checkpoint import Checkpoint
from orchestrator.config import ConfigError
from orchestrator.engine import Engine
from orchestrator.opt_native import OPTForCausalLM
from orchestrator.sampling import Sampling
from orchestrator.tensor_map import shards

Engines = Callable[[str], Engine]
Tensors = dict[str, torch.Tensor]
OPT_LINEAR_MODULES = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
FAMILY = ["opt", *OPT_VARIANTS]
# hidden size, layers, heads; https://huggingface.co/facebook and the OPT paper, table 1
SHAPES = {
    "125m": (768, 12, 12),
    "1.3b": (2048, 24, 32),
    "2.7b": (2560, 32, 32),
    "6.7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
    "30b": (7168, 48, 56),
    "66b": (9216, 64, 72),
}


def load(folder: Path, **choices: Any) -> Engine:
    return Engine(str(folder), dtype="float32", device=DEVICE, kv_tokens=256, threads=2, **choices)


def native(engine: Engine) -> OPTForCausalLM:
    assert isinstance(engine.model, OPTForCausalLM)
    return engine.model


def random_sequences(seed: int, count: int, shortest: int = 2) -> list[list[int]]:
    draw = random.Random(seed)
    return [
        [draw.randrange(len(VOCABULARY)) for _ in range(draw.randint(shortest, 60))]
        for _ in range(count)
    ]


@pytest.mark.parametrize("variant", FAMILY)
@torch.no_grad()
def test_logits_equal_transformers(
    variant: str, engines: Engines, model_folders: dict[str, Path]
) -> None:
    engine = engines(variant)
    assert native(engine)
    reference = AutoModelForCausalLM.from_pretrained(model_folders[variant], dtype=torch.float32)
    sequences = random_sequences(seed=0, count=30)
    spans = [(1, len(tokens)) for tokens in sequences]
    expected = [reference(torch.tensor([tokens])).logits[0, :-1] for tokens in sequences]
    plan = engine.plan(sequences, spans, sharing=False)
    with recorded(engine) as logits:
        engine.launch(plan)
    torch.testing.assert_close(torch.cat(logits), torch.cat(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", FAMILY)
@torch.no_grad()
def test_logits_behind_a_cached_prefix_equal_transformers(
    variant: str, engines: Engines, model_folders: dict[str, Path]
) -> None:
    engine = engines(variant)
    reference = AutoModelForCausalLM.from_pretrained(model_folders[variant], dtype=torch.float32)
    prefix = random_sequences(seed=1, count=1, shortest=30)[0]
    engine.score([prefix], [(len(prefix) - 1, len(prefix))], namespace=f"prefix {variant}")
    sequence = [*prefix[:-1], *random_sequences(seed=2, count=1)[0]]
    with recorded(engine) as logits:
        span = (len(prefix), len(sequence))
        scores = engine.score([sequence], [span], namespace=f"prefix {variant}")
    assert scores.num_reused == len(prefix) - 1
    expected = reference(torch.tensor([sequence])).logits[0, scores.num_reused : -1]
    torch.testing.assert_close(torch.cat(logits), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", FAMILY)
def test_greedy_generation_equals_transformers(
    variant: str, engines: Engines, model_folders: dict[str, Path]
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(model_folders[variant], dtype=torch.float32)
    prompts = random_sequences(seed=3, count=8)
    generated = engines(variant).generate(prompts, Sampling(64))
    choices = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None}
    for prompt, continuation in zip(prompts, generated, strict=True):
        mask = torch.ones(1, len(prompt))  # or it would leave out what looks like padding
        tokens = torch.tensor([prompt])
        expected = reference.generate(tokens, attention_mask=mask, **choices)[0, len(prompt) :]
        assert continuation.tokens == expected.tolist()
    assert (
        len({token for found in generated for token in found.tokens}) > 2
    )  # not one token repeated


def test_every_layer_attends_through_the_radix_cache(engines: Engines) -> None:
    attention: list[Any] = [layer.self_attn for layer in native(engines("opt")).model.layers]
    assert [module.attn.layer_id for module in attention] == [0, 1]
    assert all(isinstance(module.attn, RadixAttention) for module in attention)


@pytest.mark.parametrize("size", [*SHAPES, "350m", "galactica-6.7b"])
def test_names_and_shapes_are_those_of_transformers(size: str, engines: Engines) -> None:
    """At full size, on torch's meta device: no memory, all shapes."""
    engines("opt")  # the process groups that SGLang's layers ask for
    if size == "350m":
        config = OPTConfig(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            ffn_dim=4096,
            **{**OPT_VARIANTS["opt-350m"], "word_embed_proj_dim": 512},
        )
    else:
        hidden, layers, heads = SHAPES[size.removeprefix("galactica-")]
        config = OPTConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            ffn_dim=4 * hidden,
            **OPT_VARIANTS["galactica"] if size.startswith("galactica") else {},
        )
    with torch.device("meta"):
        ours, reference = OPTForCausalLM(config), TransformersOPT(config)
    expected = {name: tuple(value.shape) for name, value in reference.named_parameters()}
    assert {name: shard.full_shape for name, shard in shards(ours, rank=0).items()} == expected


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("prefix", ["model.", "model.decoder."])
def test_checkpoints_may_lack_a_prefix(
    prefix: str, suffix: str, engines: Engines, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    source = model_folders["opt-350m"]
    folder = renamed(source, tmp_path / "renamed", lambda name: name.removeprefix(prefix), suffix)
    assert not any(name.startswith(prefix) for name in Checkpoint(folder).names)
    engine = load(folder)
    sequences, spans = [[3, 4, 5, 6, 7]], [(1, 5)]
    assert engine.score(sequences, spans) == engines("opt-350m").score(sequences, spans)
    engine.close()


def altered(folder: Path, target: Path, change: Callable[[Tensors], Any]) -> Path:
    renamed(folder, target, lambda name: name)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


LAYER = "model.decoder.layers.1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.fc1.bias"), rf"the checkpoint lacks {LAYER}\.fc1\.bias"),
        (
            lambda t: t.pop(f"{LAYER}.self_attn.k_proj.weight"),
            rf"the checkpoint lacks {LAYER}\.self_attn\.k_proj\.weight",
        ),
        (
            lambda t: t.update({f"{LAYER}.fc3.weight": torch.ones(2)}),
            rf"no place in the model for {LAYER}\.fc3\.weight",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(17, 64)}),
            None,  # a copy of tied embeddings; transformers ignores it too
        ),
        (
            lambda t: t.update({f"{LAYER}.fc2.weight": torch.ones(64, 95)}),
            rf"{LAYER}\.fc2\.weight: shape \[64, 95\] in the checkpoint, \[64, 96\] in the model",
        ),
        (
            lambda t: t.update({"model.decoder.embed_tokens.weight": torch.ones(18, 64)}),
            r"embed_tokens\.weight: shape \[18, 64\] in the checkpoint, \[17, 64\] in the model",
        ),
        (
            lambda t: t.update({"decoder.embed_tokens.weight": torch.ones(17, 64)}),
            r"embed_tokens\.weight: the checkpoint holds it twice",
        ),
    ],
)
def test_a_checkpoint_is_consumed_whole_or_refused(
    change: Callable[[Tensors], Any],
    message: str | None,
    model_folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = altered(model_folders["opt"], tmp_path / "altered", change)
    if message is None:
        load(folder).close()
        return
    with pytest.raises(ConfigError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_weights_may_be_updated_in_part_once_all_are_there(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    engine = load(make_model(tmp_path / "other", "opt", seed=1))
    name = f"{LAYER}.self_attn.v_proj.weight"
    value = load_file(model_folders["opt"] / "model.safetensors")[name]
    native(engine).load_weights([(name, value)])
    fused = dict(engine.model.named_parameters())[name.replace("v_proj", "qkv_proj")]
    assert torch.equal(fused[128:].cpu(), value)
    engine.close()


@pytest.mark.parametrize(
    ("key", "value", "tp_size"), [("num_attention_heads", 4, 3), ("ffn_dim", 97, 2)]
)
def test_sizes_that_do_not_divide_are_refused_with_both_numbers(
    key: str, value: int, tp_size: int, engines: Engines
) -> None:
    engines("opt")
    config = OPTConfig(**{"num_attention_heads": 4, "hidden_size": 48, key: value})
    with (
        get_parallel().override(tp_size=tp_size),
        pytest.raises(ConfigError, match=f"tp_size: {tp_size} .*{key}, {value}"),
    ):
        OPTForCausalLM(config)


def test_its_accessors_find_what_they_name(engines: Engines) -> None:
    tied, untied = native(engines("opt")), native(engines("opt-untied"))
    assert tied.get_embed_and_head()[0] is tied.get_embed_and_head()[1]
    assert untied.get_embed_and_head()[0] is not untied.get_embed_and_head()[1]
    assert tied.get_input_embeddings() is tied.model.decoder.embed_tokens
    assert tied.get_hidden_dim("fc2", 0) == (96, 64)


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], OPT_LINEAR_MODULES])
@pytest.mark.parametrize("variant", ["opt", "galactica"])
@torch.no_grad()
def test_adapters_give_peft_s_logits(
    variant: str, modules: list[str], model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Rows of one batch, each under an adapter of its own or under none."""
    folder = model_folders[variant]
    names = ["first", "second"]
    adapted = {
        name: make_adapter(folder, tmp_path / name, modules, seed)
        for seed, name in enumerate(names)
    }
    runner = adapter_runner(folder, [tmp_path / name for name in names], modules)
    sequences = random_sequences(seed=4, count=4)
    rows: list[str | None] = ["first", None, "second", "first"]
    logits = last_logits(runner, sequences, rows)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for tokens, row, row_logits in zip(sequences, rows, logits, strict=True):
        model = base if row is None else adapted[row]
        expected = model(torch.tensor([tokens])).logits[0, -1]
        torch.testing.assert_close(row_logits, expected, atol=1e-4, rtol=0)
        plain = base(torch.tensor([tokens])).logits[0, -1]
        assert row is None or (row_logits - plain).abs().max() > 0.01
    runner.close()


def test_sglang_s_all_takes_the_embeddings_too(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = model_folders["opt"]
    make_adapter(folder, tmp_path / "first", OPT_LINEAR_MODULES, seed=0)
    runner = adapter_runner(folder, [], ["all"])
    assert {
        "embed_tokens",
        "lm_head",
        "fc1",
        "fc2",
    } <= runner.model_runner.lora_manager.target_modules
    assert last_logits(runner, [[3, 4, 5]], [None]).isfinite().all()
    runner.close()


def test_all_linear_means_all_of_opt_s_linear_modules(engines: Engines) -> None:
    found = auto_detect_lora_target_modules(engines("opt").model)
    assert found == {"qkv_proj", "out_proj", "fc1", "fc2", "embed_tokens"}
