"""Trained weights as folders that transformers, PEFT and SGLang load.

Owns the folders' layout: weights under Hugging Face's names, and beside them what else the base
model's folder holds (configuration, tokenizer); or PEFT's form of an adapter or a prefix, which
are read here too. Knows nothing of how the weights came to be.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, PeftConfig, PrefixTuningConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from orchestrator.assets import check_adapter
from orchestrator.config import ConfigError

# What a model's folder holds beside its weights.
COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")
WEIGHT_INDEX = ".index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
PREFIX_TABLE = "prompt_embeddings"  # PEFT's name of a prefix, [tokens, columns]


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What PEFT must know of a LoRA adapter beside its factors."""

    rank: int
    alpha: float
    modules: tuple[str, ...]
    invocation: tuple[int, ...] = ()
    """Tokens from whose last occurrence on the adapter acts (activated LoRA); none: on all."""


def write_model(base: Path, folder: Path, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write a model like that in `base`, with these weights: canonical names, whole tensors.

    All weights are of one dtype, which becomes the model's. The folder appears when it is whole.
    Without weights, as on all but the first of several ranks, nothing is written.
    """
    tensors = dict(weights)
    if not tensors:
        return
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        unfinished = Path(temporary) / folder.name
        unfinished.mkdir()
        for pattern in COMPANIONS:
            for file in base.glob(pattern):
                if not file.name.endswith(WEIGHT_INDEX):
                    shutil.copyfile(file, unfinished / file.name)
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)  # the older name of the same key
        config["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        text = json.dumps(config, indent=2) + "\n"
        (unfinished / "config.json").write_text(text, encoding="utf-8")
        save_torch_state_dict(tensors, unfinished)
        unfinished.rename(folder)


def write_adapter(
    base: Path, folder: Path, settings: AdapterSettings, factors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Write a LoRA adapter of the model in `base`: canonical names, whole factors."""
    tensors = {PEFT_PREFIX + name: value.contiguous() for name, value in factors}
    if not tensors:
        return
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        unfinished = Path(temporary) / folder.name
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # any number will do
            target_modules=list(settings.modules),
            base_model_name_or_path=str(base),
            task_type="CAUSAL_LM",
            inference_mode=True,
            alora_invocation_tokens=list(settings.invocation) or None,
        ).save_pretrained(str(unfinished))
        save_file(tensors, unfinished / ADAPTER_WEIGHTS, {"format": "pt"})
        unfinished.rename(folder)


def read_adapter(folder: Path) -> tuple[AdapterSettings, dict[str, torch.Tensor]]:
    """A PEFT adapter's settings, and its factors by canonical name.

    Raises ConfigError for what is no plain LoRA adapter.
    """
    config, stored = _read(folder)
    if not isinstance(config, LoraConfig) or not _is_plain(config):
        raise ConfigError(
            f"space.init: {folder}: not a plain LoRA adapter (no DoRA, no rank-stabilised scale, "
            "no biases, one rank and alpha for all modules)"
        )
    factors = {name.removeprefix(PEFT_PREFIX): value for name, value in stored.items()}
    # PEFT may keep "all-linear" as such; the factors say what it came to.
    modules = sorted({name.split(".")[-3] for name in factors})
    invocation = tuple(config.alora_invocation_tokens or ())
    return AdapterSettings(config.r, config.lora_alpha, tuple(modules), invocation), factors


def _is_plain(config: LoraConfig) -> bool:
    patterns = config.rank_pattern or config.alpha_pattern
    return not (config.use_dora or config.use_rslora or patterns) and config.bias == "none"


def write_prefix(
    base: Path, folder: Path, num_heads: int, tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Write a prefix of the model in `base`: per layer keys, then values, [tokens, columns] each.

    `num_heads` are those of keys and values.
    """
    parts = [value for _, value in tensors]
    if not parts:
        return
    num_tokens, width = parts[0].shape
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        unfinished = Path(temporary) / folder.name
        PrefixTuningConfig(
            num_virtual_tokens=num_tokens,
            num_layers=len(parts) // 2,
            token_dim=width,
            num_attention_heads=num_heads,
            num_transformer_submodules=1,
            base_model_name_or_path=str(base),
            task_type="CAUSAL_LM",
            inference_mode=True,
        ).save_pretrained(str(unfinished))
        table = torch.cat(parts, dim=1)
        save_file({PREFIX_TABLE: table}, unfinished / ADAPTER_WEIGHTS, {"format": "pt"})
        unfinished.rename(folder)


def read_prefix(folder: Path) -> torch.Tensor:
    """A PEFT prefix, [tokens, columns]: per layer keys, then values, side by side.

    Raises ConfigError for what is none.
    """
    config, stored = _read(folder)
    if not isinstance(config, PrefixTuningConfig) or PREFIX_TABLE not in stored:
        raise ConfigError(f"space.init: {folder}: not an adapter of PEFT's prefix tuning")
    return stored[PREFIX_TABLE]


def _read(folder: Path) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    check_adapter(str(folder))
    try:
        config = PeftConfig.from_pretrained(str(folder))
        return config, load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"space.init: {folder}: not a readable adapter: {reason}") from None
