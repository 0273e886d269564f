"""The map between Hugging Face's tensors and SGLang's parameters, written once.

Owns three facts: under which prefixes a checkpoint may name its tensors, which tensors SGLang
fuses into one parameter, and which part of a tensor a tensor-parallel rank holds. Loading, the
noise's canonical names and export all ask here. Reads a model's modules by their attributes, so
it needs no SGLang; knows nothing of what the tensors are for.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

# The engine's fused module -> the checkpoint's modules that it is made of, in their order there,
# each with the shard id by which SGLang's weight loaders know it.
FUSED: dict[str, dict[str, str | int]] = {
    "qkv_proj": {"q_proj": "q", "k_proj": "k", "v_proj": "v"},
    "gate_up_proj": {"gate_proj": 0, "up_proj": 1},
}
# What a checkpoint's names may lack, against those of the whole causal language model.
OMITTED_PREFIXES = ("", "model.", "model.decoder.")
TIED_HEAD = "lm_head.weight"
# SGLang's adapters put a layer of their own around a linear layer, which then has this name; what
# it holds is listed under either.
WRAPPED = ".base_layer."


@dataclass(frozen=True, slots=True)
class Place:
    """The engine's parameter that holds a canonical tensor, and which member of it, if fused."""

    parameter: str
    member: str | None = None

    @property
    def shard_id(self) -> str | int | None:
        """What SGLang's weight loaders call the member; None where nothing is fused."""
        if self.member is None:
            return None
        return FUSED[_module(self.parameter)][self.member]


class TensorNames:
    """Canonical names (those of Hugging Face's causal language model) and their places."""

    def __init__(
        self, parameter_names: Iterable[str], checkpoint_names: Iterable[str] = ()
    ) -> None:
        """`parameter_names` are the engine's, as `named_parameters` gives them.

        What a checkpoint has fused itself, as Phi-3's do, is its own canonical tensor.
        """
        already_fused = {prefix + name for name in checkpoint_names for prefix in OMITTED_PREFIXES}
        self.places: dict[str, Place] = {}
        for parameter in parameter_names:
            module, plain = _module(parameter), parameter.replace(WRAPPED, ".")
            if module not in FUSED or plain in already_fused:
                self.places[plain] = Place(parameter)
                continue
            for member in FUSED[module]:
                self.places[plain.replace(f".{module}.", f".{member}.")] = Place(parameter, member)

    def canonical(self, checkpoint_name: str) -> str | None:
        """The canonical name of a checkpoint's tensor; None where the engine has no place for it.

        Old OPT checkpoints begin with "decoder." or with nothing, base models without a head lack
        "model.".
        """
        for prefix in OMITTED_PREFIXES:
            if prefix + checkpoint_name in self.places:
                return prefix + checkpoint_name
        return None

    def is_tied_head(self, checkpoint_name: str) -> bool:
        """Whether a checkpoint repeats tied embeddings under the head's name, as some do."""
        return checkpoint_name == TIED_HEAD and TIED_HEAD not in self.places


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a canonical tensor that this process's engine holds, and where.

    Rows count along the first dimension, columns along the second; a vector has one column.
    """

    place: Place
    full_shape: tuple[int, ...]
    """Shape of the whole tensor, as a checkpoint has it."""
    parameter_row: int
    """Where the part begins in the engine's parameter."""
    num_rows: int
    num_columns: int
    first_row: int
    first_column: int
    """Where the part begins in the whole tensor."""
    counted: bool = True
    """False for a copy of what another rank answers for."""

    @property
    def cells(self) -> tuple[slice, slice]:
        """Rows and columns of the whole tensor, as [rows, full_columns], that the part is."""
        return (
            slice(self.first_row, self.first_row + self.num_rows),
            slice(self.first_column, self.first_column + self.num_columns),
        )

    @property
    def is_whole(self) -> bool:
        """Whether this process holds all of the tensor."""
        return self.num_rows * self.num_columns == math.prod(self.full_shape)

    @property
    def full_columns(self) -> int:
        """Columns of the whole tensor."""
        return _columns(self.full_shape)


def shards(model: nn.Module, rank: int, checkpoint_names: Iterable[str] = ()) -> dict[str, Shard]:
    """Every canonical tensor of an unquantised model, by name, as a tensor-parallel rank holds it.

    Follows how SGLang's linear layers and vocabulary embeddings split their parameters.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules())
    found = {}
    for name, place in TensorNames(shapes, checkpoint_names).places.items():
        holder = modules[place.parameter.rpartition(".")[0]]
        module = getattr(holder, "base_layer", holder)
        found[name] = _shard(place, module, shapes[place.parameter], rank)
    return found


def linear_shard(place: Place, module: Any, rank: int) -> Shard:
    """The part of a linear layer's weight that a rank holds, however the weight is stored.

    Asks the layer for its sizes: quantisation packs or turns the parameter itself.
    """
    outputs = getattr(module, "output_size_per_partition", module.output_size)
    inputs = getattr(module, "input_size_per_partition", module.input_size)
    return _shard(place, module, (outputs, inputs), rank)


def _shard(place: Place, module: Any, shape: tuple[int, ...], rank: int) -> Shard:
    size = getattr(module, "tp_size", 1)
    rows, columns, rest = shape[0], _columns(shape), shape[1:]
    if place.member is not None:
        return _fused_shard(place, module, rest, rank)
    if hasattr(module, "shard_indices"):  # an embedding: its vocabulary is padded, then split
        first = module.shard_indices.org_vocab_start_index
        rows = module.shard_indices.org_vocab_end_index - first
        return Shard(place, (module.org_vocab_size, *rest), 0, rows, columns, first, 0)
    if size > 1 and hasattr(module, "gather_output"):  # column parallel: outputs, so rows
        return Shard(place, (rows * size, *rest), 0, rows, columns, rank * rows, 0)
    if size > 1 and hasattr(module, "input_is_parallel") and rest:  # row parallel: inputs
        return Shard(place, (rows, columns * size), 0, rows, columns, 0, rank * columns)
    return Shard(place, shape, 0, rows, columns, 0, 0, counted=rank == 0)


def _fused_shard(place: Place, module: Any, rest: tuple[int, ...], rank: int) -> Shard:
    """A member's rows follow those of the members before it; each is split by rows."""
    members = list(FUSED[_module(place.parameter)])
    position = members.index(str(place.member))
    copies = 1
    if hasattr(module, "num_kv_head_replicas"):
        sizes = [module.q_proj_shard_size, module.kv_proj_shard_size, module.v_proj_shard_size]
        # Where ranks outnumber key-value heads, several ranks hold the same head.
        copies = 1 if position == 0 else module.num_kv_head_replicas
    else:
        sizes = module.output_partition_sizes
    rows = sizes[position]
    return Shard(
        place,
        full_shape=(rows * module.tp_size // copies, *rest),
        parameter_row=sum(sizes[:position]),
        num_rows=rows,
        num_columns=rest[0] if rest else 1,
        first_row=rank // copies * rows,
        first_column=0,
        counted=rank % copies == 0,
    )


def _columns(shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:])


def _module(parameter: str) -> str:
    """The last module of a parameter's path: qkv_proj of model.layers.0.qkv_proj.weight."""
    parameter = parameter.replace(WRAPPED, ".")
    return parameter.rpartition(".")[0].rpartition(".")[2]
