"""SGLang's Triton attention for batches of which no row needs the pool, nor keeps its keys there.

Owns the choice, layer by layer, between our kernel and SGLang's: ours reads queries, keys and
values where the model's projections put them, so nothing is copied and nothing written to the KV
pool; so are those that rows share with others of the batch. A layer whose attention is of another
kind than plain causal goes SGLang's way, and so does what a graph's batch does not have; where rows
share, it cannot. Knows nothing of graphs.
"""

from typing import Any

import torch
from sglang.srt.layers.attention.triton_backend import ForwardMetadata, TritonAttnBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from orchestrator.attention_triton import MAX_HEAD_DIM, Context, attend


class KeysElsewhere(Exception):
    """A layer reads keys that are to be in the pool, where here nobody writes them."""


class UncachedAttention(TritonAttnBackend):  # type: ignore[misc]  # SGLang has no types
    """Stands in for a runner's backend during forwards of one planned batch."""

    def __init__(
        self,
        original: TritonAttnBackend,
        metadata: ForwardMetadata,
        context: Context | None = None,
    ) -> None:
        """All that `original` has, pools and buffers too, but for the plan of the batch.

        `context` is what rows begin with that others compute; None where they share nothing.
        """
        self.__dict__.update(original.__dict__)
        self.forward_metadata = metadata
        self._context = context

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **named: Any,
    ) -> torch.Tensor:
        """Outputs, shaped like q; heads of q, k and v lie side by side, if not in a dimension.

        Raises KeysElsewhere for a layer without keys of its own, and where rows share keys for one
        that our kernel does not serve.
        """
        planned = self.forward_metadata
        if k is None or v is None:
            raise KeysElsewhere(layer.layer_id)
        if (
            not q.dtype == k.dtype == v.dtype
            or any(value is not None for value in named.values())
            or not self._is_plain(layer)
        ):
            if self._context is not None:
                raise KeysElsewhere(layer.layer_id)
            output: torch.Tensor = super().forward_extend(
                q, k, v, layer, forward_batch, save_kv_cache, **named
            )
            return output
        return attend(
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            k.view(-1, layer.tp_k_head_num, layer.qk_head_dim),
            v.view(-1, layer.tp_v_head_num, layer.v_head_dim),
            planned.qo_indptr,
            planned.max_extend_len,
            layer.scaling,
            context=self._context,
        ).view(q.shape)

    def _is_plain(self, layer: RadixAttention) -> bool:
        """Whether a layer's attention is causal, over all that stands before, and nothing else."""
        return (
            layer.attn_type is AttentionType.DECODER
            and not layer.is_cross_attention
            and layer.sliding_window_size in (None, -1)
            and not layer.logit_cap
            and layer.xai_temperature_len <= 0
            and layer.qk_head_dim == layer.v_head_dim <= MAX_HEAD_DIM
            and self.forward_metadata.custom_mask is None
            and self.dcp_size == 1
            and not self.enable_deterministic
        )
