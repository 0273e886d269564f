"""The engine's prefix slots: KV entries of virtual tokens, which rows of a batch begin with.

Owns which entries of SGLang's KV pool belong to a slot. They are allocated once and never given
back, so that nothing evicts them or counts them as room for sequences, and are written in place.
Knows nothing of what the keys and values are.
"""

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from orchestrator.config import ConfigError
from orchestrator.tensor_map import Place, Shard


@dataclass(frozen=True, slots=True)
class PrefixPlan:
    """What an engine is to make room for."""

    num_slots: int
    num_tokens: int
    """Virtual tokens of a slot."""


@dataclass(frozen=True, slots=True)
class PrefixTensor:
    """A layer's keys or values: which part this process holds, and that part in each slot."""

    name: str
    """Canonical: model.layers.N.prefix_key or .prefix_value, [tokens, heads * head size]."""
    shard: Shard
    views: tuple[torch.Tensor, ...]
    """Per slot, [tokens, columns] of the pool's buffer, contiguous."""


class PrefixSlots:
    """The slots of one engine, all in place."""

    def __init__(self, model_runner: Any, plan: PrefixPlan, rank: int, size: int) -> None:
        """`rank` and `size` are those of the process's tensor-parallel world.

        Raises ConfigError for a KV pool that is no table of keys and values, or is too small.
        """
        self.names = tuple(f"prefix {index}" for index in range(plan.num_slots))
        self.num_tokens = plan.num_tokens
        self.num_heads = int(model_runner.model_config.get_total_num_kv_heads())
        """Heads of keys and values, over all ranks."""
        pool = model_runner.token_to_kv_pool
        _require_plain(pool)
        num_entries = plan.num_slots * plan.num_tokens
        entries = model_runner.token_to_kv_pool_allocator.alloc(num_entries)
        if entries is None:
            raise ConfigError(
                f"space.slots: {num_entries} virtual tokens do not fit into the KV pool of "
                f"{pool.size}; raise model.kv_tokens, or lower space.slots"
            )
        first = int(entries[0])
        assert int(entries[-1]) == first + num_entries - 1, "a fresh pool gives neighbours"
        self._starts = range(first, first + num_entries, plan.num_tokens)
        self._entries: dict[str, torch.Tensor] = {
            name: entries[start - first : start - first + plan.num_tokens]
            for name, start in zip(self.names, self._starts, strict=True)
        }
        # Where ranks outnumber the heads, several ranks hold the same head.
        copies = pool.head_num * size // self.num_heads
        self.tensors = [
            self._tensor(f"model.layers.{layer}.prefix_{part}", buffers[layer], rank, copies)
            for layer in range(pool.layer_num)
            for part, buffers in (("key", pool.k_buffer), ("value", pool.v_buffer))
        ]

    def entries(self, name: str) -> torch.Tensor:
        """Where in the KV pool a slot's virtual tokens lie: int64 [tokens]."""
        return self._entries[name]

    def _tensor(self, name: str, buffer: torch.Tensor, rank: int, copies: int) -> PrefixTensor:
        """`buffer` is the pool's, [entries, heads, head size]: ranks share the heads evenly."""
        columns = buffer[0].numel()
        width = self.num_heads * buffer.shape[2]
        shard = Shard(
            Place(name),
            full_shape=(self.num_tokens, width),
            parameter_row=0,
            num_rows=self.num_tokens,
            num_columns=columns,
            first_row=0,
            first_column=rank // copies * columns,
            counted=rank % copies == 0,
        )
        views = (buffer[start : start + self.num_tokens] for start in self._starts)
        return PrefixTensor(name, shard, tuple(view.view(-1, columns) for view in views))


def has_plain_entries(pool: Any) -> bool:
    """Whether a KV pool is a table of keys and values, with one entry a token in every layer.

    Not so are pools of latent, quantised, windowed or recurrent state.
    """
    return (
        type(pool) is MHATokenToKVPool
        and pool.store_dtype == pool.dtype
        and pool.kv_cache_layout == "nhd"
    )


def _require_plain(pool: Any) -> None:
    if not has_plain_entries(pool) or pool.head_dim != pool.v_head_dim:
        raise ConfigError(
            f"space.kind: prefix: the model's KV pool, {type(pool).__name__}, does not hold plain "
            "keys and values of one size for each layer; choose another kind"
        )
