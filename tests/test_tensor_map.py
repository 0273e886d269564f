"""The map against SGLang's own weight loaders: where they put a tensor is where the map says."""

from collections.abc import Callable

import pytest
import torch
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.runtime_context import get_parallel
from torch import nn

from orchestrator.config import ConfigError
from orchestrator.engine import Engine
from orchestrator.parameters import check_words
from orchestrator.tensor_map import Place, Shard, TensorNames, shards

HIDDEN, HEAD, HEADS, INNER, VOCABULARY = 32, 8, 8, 64, 100


class Layers(nn.Module):
    """One of each kind of layer that SGLang splits over ranks."""

    def __init__(self, num_kv_heads: int) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(VOCABULARY, HIDDEN)
        self.attention = nn.Module()
        self.attention.qkv_proj = QKVParallelLinear(HIDDEN, HEAD, HEADS, num_kv_heads, bias=True)
        self.mlp = nn.Module()
        self.mlp.gate_up_proj = MergedColumnParallelLinear(HIDDEN, [INNER, INNER], bias=True)
        self.mlp.down_proj = RowParallelLinear(INNER, HIDDEN, bias=True)
        self.fc1 = ColumnParallelLinear(HIDDEN, INNER, bias=True)
        self.norm = nn.LayerNorm(HIDDEN)


def held_by(rank: int, size: int, num_kv_heads: int, whole: dict[str, torch.Tensor]) -> Layers:
    """A rank's layers, filled by SGLang's loaders from whole tensors, which are made if missing."""
    with get_parallel().override(tp_rank=rank, tp_size=size):
        layers = Layers(num_kv_heads)
        parameters = dict(layers.named_parameters())
        for name, shard in shards(layers, rank).items():
            value = whole.setdefault(name, torch.randn(shard.full_shape))
            parameter = parameters[shard.place.parameter]
            loader = getattr(parameter, "weight_loader", lambda held, value: held.data.copy_(value))
            shard_id = shard.place.shard_id
            loader(parameter, value, *([] if shard_id is None else [shard_id]))
    return layers


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("num_kv_heads", [8, 2, 1])
def test_every_element_is_where_the_loaders_put_it_and_counted_once(
    size: int, num_kv_heads: int, engines: Callable[[str], Engine]
) -> None:
    engines("llama")  # the process groups that SGLang's layers ask for
    torch.manual_seed(0)
    whole: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}
    for rank in range(size):
        layers = held_by(rank, size, num_kv_heads, whole)
        parameters = dict(layers.named_parameters())
        for name, shard in shards(layers, rank).items():
            cells = whole[name].reshape(-1, shard.full_columns)
            rows = slice(shard.first_row, shard.first_row + shard.num_rows)
            columns = slice(shard.first_column, shard.first_column + shard.num_columns)
            held = parameters[shard.place.parameter][shard.parameter_row :][: shard.num_rows]
            assert torch.equal(held.reshape(shard.num_rows, -1), cells[rows, columns]), name
            count = counts.setdefault(name, torch.zeros_like(cells))
            count[rows, columns] += shard.counted
    assert {name: value.shape[0] for name, value in whole.items()} == {
        "embed_tokens.weight": VOCABULARY,
        "attention.q_proj.weight": HEADS * HEAD,
        "attention.q_proj.bias": HEADS * HEAD,
        "attention.k_proj.weight": num_kv_heads * HEAD,
        "attention.k_proj.bias": num_kv_heads * HEAD,
        "attention.v_proj.weight": num_kv_heads * HEAD,
        "attention.v_proj.bias": num_kv_heads * HEAD,
        "mlp.gate_proj.weight": INNER,
        "mlp.gate_proj.bias": INNER,
        "mlp.up_proj.weight": INNER,
        "mlp.up_proj.bias": INNER,
        "mlp.down_proj.weight": HIDDEN,
        "mlp.down_proj.bias": HIDDEN,
        "fc1.weight": INNER,
        "fc1.bias": INNER,
        "norm.weight": HIDDEN,
        "norm.bias": HIDDEN,
    }
    assert all((count == 1).all() for count in counts.values())


def test_names_are_found_under_any_prefix() -> None:
    fused = "model.decoder.layers.0.self_attn.qkv_proj.weight"
    names = TensorNames([fused, "model.norm.weight"])
    query = "model.decoder.layers.0.self_attn.q_proj.weight"
    for prefix in ("", "model.", "model.decoder."):
        assert names.canonical(query.removeprefix(prefix)) == query
    assert names.places[query] == Place(
        "model.decoder.layers.0.self_attn.qkv_proj.weight", "q_proj"
    )
    assert names.canonical("norm.weight") == "model.norm.weight"
    assert names.canonical(fused) is None
    held = TensorNames([fused], [fused.removeprefix("model.")])  # by the checkpoint itself
    assert held.canonical(fused) == fused
    assert held.places[fused].shard_id is None
    assert names.is_tied_head("lm_head.weight")
    assert not TensorNames(["lm_head.weight"]).is_tied_head("lm_head.weight")


def test_a_shard_knows_the_width_of_its_tensor() -> None:
    shard = Shard(Place("p"), (4, 6), 0, 4, 3, 0, 3)
    assert shard.full_columns == 6
    assert Shard(Place("p"), (4,), 0, 4, 1, 0, 0).full_columns == 1


def test_names_that_would_share_noise_are_refused() -> None:
    check_words(["model.norm.weight", "plumless"])
    with pytest.raises(ConfigError, match="buckeroo and plumless have the same CRC-32"):
        check_words(["plumless", "buckeroo"])
