"""Hugging Face's tensors as views into the engine's live parameters.

Owns the proof that the two belong together: every tensor of the checkpoint has its place, every
parameter is covered, and the live values are the checkpoint's, bit for bit, so that a wrong map
never trains. Knows nothing of noise or of steps.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from orchestrator.checkpoint import Checkpoint
from orchestrator.config import ConfigError
from orchestrator.noise import TensorRegion, tensor_word
from orchestrator.tensor_map import Shard, TensorNames, shards


@dataclass(frozen=True, slots=True)
class CanonicalTensor:
    """What this process holds of a Hugging Face tensor: where it lives, and its first value."""

    region: TensorRegion
    shard: Shard
    live: torch.Tensor
    """View into the engine's parameter, [rows, columns]; [1, n] where it is contiguous."""
    initial: torch.Tensor
    """The checkpoint's value, same shape, in the checkpoint's dtype, on the CPU."""


def region(name: str, shard: Shard) -> TensorRegion:
    """Where a shard lies in its canonical tensor."""
    start = shard.first_row * shard.full_columns + shard.first_column
    return TensorRegion(name, start, shard.full_columns)


def canonical_tensors(
    model: nn.Module, checkpoint: Checkpoint, rank: int = 0
) -> list[CanonicalTensor]:
    """All trained tensors of a tensor-parallel rank's model, in the order of their names.

    Raises ConfigError where the model and the checkpoint do not cover each other exactly, or
    where a live value is not the checkpoint's.
    """
    parameters = {name: value.data for name, value in model.named_parameters()}
    places = shards(model, rank, checkpoint.names)
    sources = _sources(TensorNames(parameters, checkpoint.names), checkpoint.names)
    for name in places:
        if name not in sources:
            raise ConfigError(f"model.path: the checkpoint lacks {name}")
    check_words(places)
    return [
        _view(name, places[name], parameters[places[name].place.parameter], checkpoint, source)
        for name, source in sorted(sources.items())
    ]


def _sources(names: TensorNames, checkpoint_names: Iterable[str]) -> dict[str, str]:
    """Canonical name -> the checkpoint's."""
    sources: dict[str, str] = {}
    for checkpoint_name in checkpoint_names:
        name = names.canonical(checkpoint_name)
        if name is not None:
            sources[name] = checkpoint_name
        elif not names.is_tied_head(checkpoint_name):
            raise ConfigError(
                f"model.path: {checkpoint_name}: the engine's model has no parameter for it"
            )
    return sources


def _view(
    name: str, shard: Shard, parameter: torch.Tensor, checkpoint: Checkpoint, source: str
) -> CanonicalTensor:
    shape = checkpoint.shape(source)
    if shape != shard.full_shape:
        raise ConfigError(
            f"model.path: {source}: shape {list(shape)} in the checkpoint, "
            f"{list(shard.full_shape)} in the model"
        )
    last_row = shard.parameter_row + shard.num_rows
    live = parameter[shard.parameter_row : last_row].view(shard.num_rows, shard.num_columns)
    whole = checkpoint.read(source).reshape(-1, shard.full_columns)
    initial = whole[shard.cells]
    if not torch.equal(initial.to(live.dtype), live.cpu()):
        raise ConfigError(
            f"model.path: {source}: the engine's {shard.place.parameter} does not hold its values"
        )
    if shard.num_columns == shard.full_columns:  # whole rows: one stretch of the tensor
        live, initial = live.view(1, live.numel()), initial.reshape(1, live.numel())
    return CanonicalTensor(region(name, shard), shard, live, initial)


def check_words(names: Iterable[str]) -> None:
    """Refuse two names with one CRC-32: they would share their noise."""
    words: dict[int, str] = {}
    for name in names:
        other = words.setdefault(tensor_word(name), name)
        if other != name:
            raise ConfigError(
                f"model.path: {name} and {other} have the same CRC-32, so they would share noise"
            )
