"""The map between Hugging Face's tensors and the engine's parameters.

Owns what SGLang fuses and how: every canonical tensor is a view into one engine parameter, and
every element of every parameter belongs to one canonical tensor. Verified bit for bit against
the checkpoint, so that a wrong map never trains. Knows nothing of noise or of steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from orchestrator.checkpoint import Checkpoint
from orchestrator.config import ConfigError
from orchestrator.noise import TensorRegion, tensor_word

# Canonical module -> the engine's fused module, and the members that stand before it there.
FUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "q_proj": ("qkv_proj", ()),
    "k_proj": ("qkv_proj", ("q_proj",)),
    "v_proj": ("qkv_proj", ("q_proj", "k_proj")),
    "gate_proj": ("gate_up_proj", ()),
    "up_proj": ("gate_up_proj", ("gate_proj",)),
}


@dataclass(frozen=True, slots=True)
class CanonicalTensor:
    """A Hugging Face tensor, where it lives in the engine, and its value in the checkpoint."""

    region: TensorRegion
    live: torch.Tensor
    """View into the engine's parameter, [rows, columns]."""
    initial: torch.Tensor
    """The checkpoint's value, same shape, in the checkpoint's dtype, on the CPU."""


def canonical_tensors(model: nn.Module, checkpoint: Checkpoint) -> list[CanonicalTensor]:
    """All trained tensors of a model, in the order of their names.

    Raises ConfigError where the model and the checkpoint do not cover each other exactly, or
    where a live value is not the checkpoint's.
    """
    parameters = {name: value.data for name, value in model.named_parameters()}
    covered = dict.fromkeys(parameters, 0)
    tensors = []
    for name in sorted(checkpoint.names):
        if _is_tied_head(name, parameters):
            continue
        parameter_name, first_row = _locate(name, parameters, checkpoint)
        live = _rows(parameters[parameter_name], first_row, checkpoint.shape(name), name)
        initial = checkpoint.read(name).reshape(live.shape)
        if not torch.equal(initial.to(live.dtype), live.cpu()):
            raise ConfigError(
                f"model.path: {name}: the engine's {parameter_name} does not hold its values"
            )
        covered[parameter_name] += live.numel()
        # One row: the whole tensor is contiguous in the parameter.
        tensors.append(CanonicalTensor(TensorRegion(name, 0, live.numel()), live, initial))
    _check_coverage(parameters, covered)
    _check_words([tensor.region.name for tensor in tensors])
    return tensors


def _is_tied_head(name: str, parameters: Mapping[str, torch.Tensor]) -> bool:
    """Whether a checkpoint repeats tied embeddings under the head's name, as some do."""
    return name == "lm_head.weight" and name not in parameters


def _locate(
    name: str, parameters: Mapping[str, torch.Tensor], checkpoint: Checkpoint
) -> tuple[str, int]:
    """The engine's parameter that holds a canonical tensor, and the first row there."""
    for candidate in (name, f"model.{name}"):
        if candidate in parameters:
            return candidate, 0
        for module, (fused, before) in FUSED.items():
            fused_name = candidate.replace(f".{module}.", f".{fused}.")
            if fused_name != candidate and fused_name in parameters:
                siblings = (name.replace(f".{module}.", f".{member}.") for member in before)
                return fused_name, sum(checkpoint.shape(sibling)[0] for sibling in siblings)
    raise ConfigError(f"model.path: {name}: the engine's model has no parameter that could hold it")


def _rows(
    parameter: torch.Tensor, first_row: int, shape: tuple[int, ...], name: str
) -> torch.Tensor:
    rows = parameter[first_row : first_row + shape[0]]
    if tuple(rows.shape) != shape:
        raise ConfigError(
            f"model.path: {name}: shape {list(shape)} in the checkpoint, {list(rows.shape)} live"
        )
    return rows.view(1, -1)


def _check_coverage(parameters: Mapping[str, torch.Tensor], covered: Mapping[str, int]) -> None:
    for name, parameter in parameters.items():
        # SGLang pads vocabularies to a multiple of 64 rows; padding is never trained.
        padding = 63 * parameter.shape[-1] if "embed" in name or "lm_head" in name else 0
        if not parameter.numel() - padding <= covered[name] <= parameter.numel():
            raise ConfigError(
                f"model.path: {name}: {parameter.numel()} elements live, {covered[name]} in the "
                "checkpoint"
            )


def _check_words(names: list[str]) -> None:
    """Two names with one CRC-32 would share their noise."""
    words: dict[int, str] = {}
    for name in names:
        other = words.setdefault(tensor_word(name), name)
        if other != name:
            raise ConfigError(
                f"model.path: {name} and {other} have the same CRC-32, so they would share noise"
            )
