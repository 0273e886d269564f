"""Tiny models with random weights, made on the spot, and engines shared by the whole session.

SGLang takes some twelve seconds to import, so it is imported once, here, after the patches.
"""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestrator import dist_patch, environment

environment.prepare(threads=2)

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
dist_patch.apply(DEVICE)

from sglang.srt.layers.logits_processor import LogitsMetadata  # noqa: E402

from orchestrator.checkpoint import Checkpoint  # noqa: E402
from orchestrator.config import Config  # noqa: E402
from orchestrator.engine import Engine  # noqa: E402
from orchestrator.scoring_head import ScoringHead  # noqa: E402
from orchestrator.space import Space  # noqa: E402
from orchestrator.spaces import SpacePlan  # noqa: E402

Make = Callable[..., tuple[Engine, Space]]

GOOD, BAD = ["good", "great", "lovely"], ["bad", "dull", "poor", "terrible"]
WORDS = [*GOOD, *BAD, "a", "film", "It", "so", "the", "was", "what"]
VOCABULARY = {word: index for index, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
GATED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 128}
OPT_VARIANTS: dict[str, dict[str, Any]] = {
    # norms behind the blocks, embeddings narrower than the model
    "opt-350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "galactica": {
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "activation_function": "gelu",
    },
    "opt-old": {"_remove_final_layer_norm": True},  # fine-tuned with an early transformers
    "opt-untied": {"tie_word_embeddings": False},
}


def make_opt(**choices: Any) -> PreTrainedModel:
    return OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=96, **choices))


MAKERS: dict[str, Callable[[], PreTrainedModel]] = {
    "opt": make_opt,
    **{name: partial(make_opt, **choices) for name, choices in OPT_VARIANTS.items()},
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GATED, tie_word_embeddings=False)),
    # its checkpoints hold qkv_proj and gate_up_proj themselves
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**GATED, tie_word_embeddings=False)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GATED, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GATED, head_dim=16, tie_word_embeddings=True)),
}


def make_model(folder: Path, family: str, seed: int = 0) -> Path:
    """A Hugging Face folder with random weights large enough to tell options apart."""
    torch.manual_seed(seed)
    model = MAKERS[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def renamed(
    folder: Path, target: Path, rename: Callable[[str], str], suffix: str = "safetensors"
) -> Path:
    """A copy of a model's folder, without its tokenizer, whose tensors have other names."""
    tensors = {
        rename(name): value for name, value in load_file(folder / "model.safetensors").items()
    }
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    if suffix == "bin":
        torch.save(tensors, target / "pytorch_model.bin")
    else:
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that none of them is left for one worker at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: make_model(root / family, family) for family in MAKERS}


@pytest.fixture(scope="session")
def engines(model_folders: dict[str, Path]) -> Callable[[str], Engine]:
    """A float32 engine per family, with a KV pool small enough that batches get split."""
    made: dict[str, Engine] = {}

    def get(family: str) -> Engine:
        if family not in made:
            made[family] = Engine(
                str(model_folders[family]),
                dtype="float32",
                device=DEVICE,
                kv_tokens=256,
                threads=2,
            )
        return made[family]

    return get


class Recorder(torch.nn.Module):
    """Keeps the logits of all positions that an engine computes, beside what it does with them."""

    def __init__(self, head: ScoringHead) -> None:
        super().__init__()
        self.head = head
        self.logits: list[torch.Tensor] = []

    def forward(
        self,
        input_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        lm_head: Any,
        batch: Any,
        *others: Any,
        **named: Any,
    ) -> Any:
        metadata = LogitsMetadata.from_forward_batch(batch)
        logits = self.head.original._get_logits(hidden_states, lm_head, metadata)
        self.logits.append(logits[:, : len(VOCABULARY)].float().cpu())
        return self.head(input_ids, hidden_states, lm_head, batch, *others, **named)


@contextmanager
def recorded(engine: Engine) -> Iterator[list[torch.Tensor]]:
    """Within, each forward appends the logits of its computed positions, [tokens, vocabulary]."""
    recorder = Recorder(engine._head)
    graphs, engine._graphs = engine._graphs, None  # a replay would record nothing
    engine.model.logits_processor = recorder
    try:
        yield recorder.logits
    finally:
        engine.model.logits_processor = engine._head
        engine._graphs = graphs


def write_rows(path: Path, num_rows: int, seed: int = 0) -> Path:
    """Labelled word salad: a sentence, and whether more good than bad words are in it."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(num_rows):
            words = draw.choices(WORDS, k=draw.randint(3, 14))
            good = sum(word in GOOD for word in words)
            bad = sum(word in BAD for word in words)
            file.write(json.dumps({"sentence": " ".join(words), "label": int(good > bad)}) + "\n")
    return path


def write_questions(path: Path, num_rows: int) -> Path:
    """Word salad in SQuAD's form: the right answers are words of the context."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(num_rows):
            words = draw.choices(WORDS, k=8)
            row = {"title": words[0], "context": " ".join(words), "question": "what"}
            answers = {"text": [" ".join(words[:2]), " ".join(words[3:])]}
            file.write(json.dumps({**row, "answers": answers}) + "\n")
    return path


@pytest.fixture(scope="session")
def recipe(
    tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, Path]
) -> dict[str, Any]:
    """A small recipe, as the dictionary that a YAML file would hold."""
    folder = tmp_path_factory.mktemp("data")
    return {
        "model": {
            "path": str(model_folders["llama"]),
            "dtype": "float32",
            "device": DEVICE,
            "kv_tokens": 512,
        },
        "estimator": {
            "num_seeds": 2,
            "batch_size": 4,
            "eps": 1e-3,
            "lr": 1e-3,
            "schedule": "cosine",
            "warmup_steps": 2,
            "weight_decay": 0.1,
        },
        "task": {
            "preset": "sst2",
            "train": {"path": str(write_rows(folder / "train.jsonl", 40))},
            "test": {"path": str(write_rows(folder / "test.jsonl", 50, seed=1))},
        },
        "fleet": {"kind": "local", "num_replicas": 1, "threads_per_replica": 1},
        "run": {"steps": 6, "seed": 3, "check_every": 2},
    }


@pytest.fixture
def make(recipe: dict[str, Any], model_folders: dict[str, Path]) -> Iterator[Make]:
    """An engine and a space over it, as a replica makes them; closed at the end."""
    engines = []

    def made(
        family: str, *, dtype: str = "float32", kv_tokens: int = 512, **space: Any
    ) -> tuple[Engine, Space]:
        folder = model_folders[family]
        model = {**recipe["model"], "path": str(folder), "dtype": dtype}
        config = Config.model_validate({**recipe, "model": model, "space": space})
        plan = SpacePlan(config, Checkpoint(folder))
        engine = Engine(
            str(folder),
            dtype=dtype,
            device=DEVICE,
            kv_tokens=kv_tokens,
            threads=2,
            adapters=plan.adapters,
            prefixes=plan.prefixes,
        )
        engines.append(engine)
        return engine, plan.build(engine)

    yield made
    for engine in engines:
        engine.close()
