"""Models by their shapes alone: a benchmark fills them with random weights."""

from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, OPTConfig


@dataclass(frozen=True, slots=True)
class Shape:
    """A transformers configuration, and the linear modules inside the model's layers."""

    config: Any
    modules: tuple[str, ...]


LLAMA_MODULES = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


def opt(hidden_size: int, num_layers: int, num_heads: int, vocabulary: int = 50272) -> Shape:
    config = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        ffn_dim=4 * hidden_size,
        architectures=["OPTForCausalLM"],
    )
    return Shape(config, ("fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"))


SHAPES = {
    "opt-tiny": opt(64, 2, 4, vocabulary=512),
    "opt-125m": opt(768, 12, 12),
    "opt-1.3b": opt(2048, 24, 32),
    "opt-13b": opt(5120, 40, 40),
    "opt-30b": opt(7168, 48, 56),
    "smollm2-135m": Shape(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
            architectures=["LlamaForCausalLM"],
        ),
        LLAMA_MODULES,
    ),
    "llama-3-8b": Shape(
        LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            architectures=["LlamaForCausalLM"],
        ),
        LLAMA_MODULES,
    ),
}
