"""OPT on SGLang's native path: radix attention, tensor parallelism, adapters, CUDA graphs.

Covers the family: 125m to 66b; 350m, with layer norms behind its blocks and narrow embeddings;
Galactica, without biases and affine norms; tied and untied heads. Every tensor of a checkpoint is
consumed and every parameter filled, or loading fails and names what is wrong.

Importing this module registers nothing. SGLang finds `EntryClass` through its external model
packages: SGLANG_EXTERNAL_MODEL_PACKAGE=orchestrator.sglang_models (see docs/opt.md).

Architecture: Zhang et al., OPT: Open Pre-trained Transformer Language Models, 2022; Taylor et
al., Galactica, 2022.
"""

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import add_prefix
from torch import nn
from transformers import OPTConfig
from transformers.activations import ACT2FN

from orchestrator.config import ConfigError
from orchestrator.norm_triton import add_layer_norm
from orchestrator.tensor_map import FUSED, TensorNames, shards

NUM_NAMES_SHOWN = 4


class OPTNorm(nn.LayerNorm):
    """Layer norm of what a block has added to; on a GPU, the addition is made on the way."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__(
            config.hidden_size, elementwise_affine=config.layer_norm_elementwise_affine
        )

    def added(
        self, hidden_states: torch.Tensor, update: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states + update, or the former alone, and the norm of that."""
        if update is None:
            return hidden_states, self(hidden_states)
        if hidden_states.is_cuda and not torch.compiler.is_compiling():
            return add_layer_norm(hidden_states, update, self.weight, self.bias, self.eps)
        summed = hidden_states + update
        return summed, self(summed)


class OPTAttention(nn.Module):
    """Multi-head attention whose keys and values live in SGLang's pool, behind its radix tree."""

    def __init__(
        self, config: OPTConfig, layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        head_dim = config.hidden_size // config.num_attention_heads
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            head_dim,
            config.num_attention_heads,
            bias=config.enable_bias,
            quant_config=quant_config,
            prefix=add_prefix("qkv_proj", prefix),
        )
        self.attn = RadixAttention(
            self.qkv_proj.num_heads,
            head_dim,
            scaling=head_dim**-0.5,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            layer_id=layer_id,
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
        )
        self.out_proj = RowParallelLinear(
            config.hidden_size,
            config.hidden_size,
            bias=config.enable_bias,
            quant_config=quant_config,
            prefix=add_prefix("out_proj", prefix),
        )

    def forward(self, hidden_states: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.chunk(3, dim=-1)
        output, _ = self.out_proj(self.attn(query, key, value, forward_batch))
        return output


class OPTDecoderLayer(nn.Module):
    """Attention, then a two-layer perceptron; norms before each, or behind each in OPT-350m."""

    def __init__(
        self, config: OPTConfig, layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.norm_first = config.do_layer_norm_before
        self.self_attn = OPTAttention(
            config, layer_id, quant_config, add_prefix("self_attn", prefix)
        )
        self.self_attn_layer_norm = OPTNorm(config)
        self.fc1 = ColumnParallelLinear(
            config.hidden_size,
            config.ffn_dim,
            bias=config.enable_bias,
            quant_config=quant_config,
            prefix=add_prefix("fc1", prefix),
        )
        self.activation_fn = ACT2FN[config.activation_function]
        if isinstance(self.activation_fn, nn.ReLU):
            self.activation_fn.inplace = True  # nobody else has what fc1 has put out
        self.fc2 = RowParallelLinear(
            config.ffn_dim,
            config.hidden_size,
            bias=config.enable_bias,
            quant_config=quant_config,
            prefix=add_prefix("fc2", prefix),
        )
        self.final_layer_norm = OPTNorm(config)

    def forward(
        self, hidden_states: torch.Tensor, update: torch.Tensor | None, forward_batch: ForwardBatch
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states, in two parts: `update` is still to be added, by whichever norm is next.

        There is none behind a layer that ends in a norm.
        """
        if self.norm_first:
            hidden_states, normed = self.self_attn_layer_norm.added(hidden_states, update)
            attended = self.self_attn(normed, forward_batch)
            hidden_states, normed = self.final_layer_norm.added(hidden_states, attended)
            return hidden_states, self._feed_forward(normed)
        if update is not None:
            hidden_states = hidden_states + update
        attended = self.self_attn(hidden_states, forward_batch)
        _, hidden_states = self.self_attn_layer_norm.added(hidden_states, attended)
        output = self._feed_forward(hidden_states)
        _, hidden_states = self.final_layer_norm.added(hidden_states, output)
        return hidden_states, None

    def _feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output, _ = self.fc2(self._widened(hidden_states))
        return output

    def _widened(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What fc1 puts out, activated; on a GPU by the product itself, before it is written."""
        if (
            hidden_states.is_cuda
            and type(self.fc1) is ColumnParallelLinear  # an adapter would add to its output
            and type(self.fc1.quant_method) is UnquantizedLinearMethod
            and self.fc1.bias is not None
            and isinstance(self.activation_fn, nn.ReLU)
            and not torch.compiler.is_compiling()
        ):
            return torch._addmm_activation(self.fc1.bias, hidden_states, self.fc1.weight.t())
        inner, _ = self.fc1(hidden_states)
        activated: torch.Tensor = self.activation_fn(inner)
        return activated


class OPTDecoder(nn.Module):
    """Embeddings, layers and what follows them."""

    POSITION_OFFSET = 2  # the first two rows of OPT's position embeddings are never used

    def __init__(
        self, config: OPTConfig, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.word_embed_proj_dim,
            prefix=add_prefix("embed_tokens", prefix),
        )
        self.embed_positions = nn.Embedding(
            config.max_position_embeddings + self.POSITION_OFFSET, config.hidden_size
        )
        self.project_in: nn.Module | None = None
        self.project_out: nn.Module | None = None
        if config.word_embed_proj_dim != config.hidden_size:
            self.project_in = ReplicatedLinear(
                config.word_embed_proj_dim, config.hidden_size, bias=False
            )
            self.project_out = ReplicatedLinear(
                config.hidden_size, config.word_embed_proj_dim, bias=False
            )
        self.layers = nn.ModuleList(
            OPTDecoderLayer(
                config, layer_id, quant_config, add_prefix(f"layers.{layer_id}", prefix)
            )
            for layer_id in range(config.num_hidden_layers)
        )
        # Models fine-tuned with transformers before 4.20.1 lack the last norm, and say so.
        self.final_layer_norm: OPTNorm | None = None
        if config.do_layer_norm_before and not config._remove_final_layer_norm:
            self.final_layer_norm = OPTNorm(config)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden_states = self.embed_tokens(input_ids) if input_embeds is None else input_embeds
        if self.project_in is not None:
            hidden_states, _ = self.project_in(hidden_states)
        update: torch.Tensor | None = self.embed_positions(positions + self.POSITION_OFFSET)
        for layer in self.layers:
            hidden_states, update = layer(hidden_states, update, forward_batch)
        if self.final_layer_norm is not None:
            _, hidden_states = self.final_layer_norm.added(hidden_states, update)
        elif update is not None:
            hidden_states = hidden_states + update
        if self.project_out is not None:
            hidden_states, _ = self.project_out(hidden_states)
        return hidden_states


class OPTModel(nn.Module):
    """The decoder under the name that checkpoints give it; what SGLang captures for prefill."""

    def __init__(
        self, config: OPTConfig, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.decoder = OPTDecoder(config, quant_config, add_prefix("decoder", prefix))

    @property
    def layers(self) -> nn.ModuleList:
        """Where SGLang looks for a model's attention layers before it captures a prefill graph."""
        return self.decoder.layers

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden_states: torch.Tensor = self.decoder(
            input_ids, positions, forward_batch, input_embeds
        )
        return hidden_states


class OPTForCausalLM(nn.Module):
    """OPT with its language-model head.

    Raises ConfigError, with both numbers, where the model cannot be split over the
    tensor-parallel ranks. Pipeline parallelism is not served.
    """

    # Quantisation methods ask which of a checkpoint's modules one module here is made of.
    packed_modules_mapping = {"qkv_proj": list(FUSED["qkv_proj"])}
    # LoRA's "all-linear" asks which modules adapters may act on beside those that it knows.
    supported_lora_modules = ["qkv_proj", "out_proj", "fc1", "fc2"]

    def __init__(
        self, config: OPTConfig, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        _check_parallelism(config)
        self.config = config
        self.quant_config = quant_config
        self.model = OPTModel(config, quant_config, add_prefix("model", prefix))
        self.lm_head: nn.Module = self.model.decoder.embed_tokens
        if not config.tie_word_embeddings:
            self.lm_head = ParallelLMHead(
                config.vocab_size, config.word_embed_proj_dim, prefix=add_prefix("lm_head", prefix)
            )
        self.logits_processor = LogitsProcessor(config)
        self._names = TensorNames(name for name, _ in self.named_parameters())
        self._unfilled = set(self._names.places)
        self._shards = {} if quant_config else shards(self, get_parallel().tp_rank)

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
    ) -> LogitsProcessorOutput:
        """Logits of a batch: `input_ids` and `positions` are flat, int64 [tokens]."""
        hidden_states = self.model(input_ids, positions, forward_batch, input_embeds)
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Fill the parameters from a checkpoint's tensors, by whichever prefix it names them.

        The first call must bring all of them; later ones, as when a server's weights are updated,
        may bring some. Raises ConfigError for tensors that are left over, missing, given twice,
        or of another shape.
        """
        parameters = dict(self.named_parameters())
        filled: set[str] = set()
        left_over = []
        for checkpoint_name, tensor in weights:
            name = self._names.canonical(checkpoint_name)
            if name is None:
                if not self._names.is_tied_head(checkpoint_name):
                    left_over.append(checkpoint_name)
                continue
            if name in filled:
                raise ConfigError(f"model.path: {checkpoint_name}: the checkpoint holds it twice")
            self._check_shape(name, checkpoint_name, tensor)
            place = self._names.places[name]
            parameter = parameters[place.parameter]
            loader = getattr(parameter, "weight_loader", default_weight_loader)
            loader(parameter, tensor, *([] if place.shard_id is None else [place.shard_id]))
            filled.add(name)
        self._unfilled -= filled
        for names, problem in (
            (left_over, "no place in the model for"),
            (sorted(self._unfilled), "the checkpoint lacks"),
        ):
            if names:
                raise ConfigError(f"model.path: {problem} {_listed(names)}")

    def _check_shape(self, name: str, checkpoint_name: str, tensor: torch.Tensor) -> None:
        """SGLang's loaders pad or cut some tensors that do not fit, without a word."""
        if self.quant_config is None and tensor.shape != self._shards[name].full_shape:
            raise ConfigError(
                f"model.path: {checkpoint_name}: shape {list(tensor.shape)} in the checkpoint, "
                f"{list(self._shards[name].full_shape)} in the model"
            )

    def get_input_embeddings(self) -> nn.Module:
        return self.model.decoder.embed_tokens

    def get_embed_and_head(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of the token embeddings and of the head; one tensor if they are tied."""
        head: Any = self.lm_head
        return self.model.decoder.embed_tokens.weight, head.weight

    def get_hidden_dim(self, module_name: str, layer_idx: int) -> tuple[int, int]:
        """Inputs and outputs of a module that an adapter may act on, over all ranks."""
        hidden, inner = self.config.hidden_size, self.config.ffn_dim
        words, width = self.config.vocab_size, self.config.word_embed_proj_dim
        return {
            "qkv_proj": (hidden, 3 * hidden),
            "out_proj": (hidden, hidden),
            "fc1": (hidden, inner),
            "fc2": (inner, hidden),
            "embed_tokens": (words, width),
            "lm_head": (width, words),
        }[module_name]


def _check_parallelism(config: OPTConfig) -> None:
    parallel = get_parallel()
    if parallel.pp_size > 1:
        raise ConfigError(f"pp_size: {parallel.pp_size}: OPT is served by one pipeline stage only")
    for key in ("num_attention_heads", "ffn_dim"):
        if getattr(config, key) % parallel.tp_size:
            raise ConfigError(
                f"tp_size: {parallel.tp_size} does not divide the model's {key}, "
                f"{getattr(config, key)}"
            )


def _listed(names: list[str]) -> str:
    more = len(names) - NUM_NAMES_SHOWN
    return ", ".join(names[:NUM_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


EntryClass = OPTForCausalLM
