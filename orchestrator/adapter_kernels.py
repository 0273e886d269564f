"""SGLang's LoRA layers on our kernels: the backend "segments", for a CUDA device.

Owns what the layers call, and the description of each batch that they share: its rows, cut into
tiles of neighbours under one slot, sent to the device in one copy. Right for any order of rows,
fast where the rows of a slot stand together. For linear modules inside the layers, and adapters
that all have the engine's rank. Importing it makes the backend known to SGLang by its name. Knows
nothing of what the factors are. `dist_patch.apply()` must have run before this module is imported.
"""

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt import server_args as sglang_arguments
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.lora.backend.base_backend import BaseLoRABackend
from sglang.srt.lora.backend.lora_registry import register_lora_backend
from sglang.srt.lora.layers import MergedColumnParallelLinearWithLoRA
from torch import nn

from orchestrator.adapter_kernels_triton import (
    NO_SLOT,
    RowTiles,
    Slice,
    cut_rows,
    expand,
    expand_and_activate,
    shrink,
)
from orchestrator.tensor_map import FUSED

BACKEND = "segments"
QKV = "qkv_proj"


@dataclass(slots=True)
class Batch:
    """What the layers of a forward share."""

    tiles: RowTiles
    has_active_lora: bool = False
    """SGLang's manager notes here whether any row has an adapter."""


def padded_tiles(tiles: RowTiles, count: int) -> torch.Tensor:
    """A table of `count` tiles, on the CPU: the same ones, followed by empty ones."""
    table = torch.zeros(count, tiles.table.shape[1], dtype=torch.int32)
    table[:, 2] = NO_SLOT
    table[: tiles.num_tiles] = tiles.table
    return table


class SegmentBackend(BaseLoRABackend):  # type: ignore[misc]  # SGLang has no types
    """Shrink and expand of SGLang's LoRA layers; parameters are named as the layers pass them.

    A slot's factors are A [slots, slices * rank, inputs] and B [slots, outputs, rank], in the
    model's dtype.
    """

    name = BACKEND
    supports_prefill_cuda_graph = False  # a graph would launch for its largest batch every time

    def __init__(
        self, max_loras_per_batch: int, device: torch.device, server_args: Any, **_: Any
    ) -> None:
        super().__init__(max_loras_per_batch, device)
        self._rank = int(server_args.max_lora_rank)
        targets = {name.rpartition(".")[2] for name in server_args.lora_target_modules}
        self._trained_qkv = _trained_members(QKV, targets)
        self._graph_table: torch.Tensor | None = None
        self._activated: set[int] = set()

    def prepare_lora_batch(
        self,
        forward_batch: Any,
        weight_indices: list[int],
        lora_ranks: list[int],
        scalings: list[float],
        use_cuda_graph: bool,
        use_prefill_cuda_graph: bool = False,
    ) -> None:
        """Cut the batch's rows into tiles; `weight_indices` has a slot for each request.

        Raises ValueError for an adapter of another rank than the engine's.
        """
        used = {lora_ranks[slot] for slot in weight_indices}
        if not used <= {0, self._rank}:
            raise ValueError(f"adapters of ranks {sorted(used)} in slots of rank {self._rank}")
        if forward_batch.forward_mode.is_extend():
            lengths = list(forward_batch.extend_seq_lens_cpu)
        else:
            lengths = [1] * forward_batch.batch_size
        slots = [slot if lora_ranks[slot] else NO_SLOT for slot in weight_indices]
        tiles = cut_rows(lengths, slots, scalings)
        # From pinned memory, the copy waits for nothing, and nothing waits for it.
        if use_cuda_graph:
            tiles = self._in_graph(tiles, len(slots))
        else:
            table = tiles.table.pin_memory().to(self.device, non_blocking=True)
            tiles = tiles._replace(table=table)
        self.batch_info = Batch(tiles)

    def init_cuda_graph_batch_info(
        self, max_bs_in_cuda_graph: int, num_tokens_per_req: int
    ) -> None:
        """Make the table that captured launches read; a request of a graph is a tile at most."""
        self._graph_table = torch.zeros(
            max_bs_in_cuda_graph, 4, dtype=torch.int32, device=self.device
        )

    def _in_graph(self, tiles: RowTiles, num_requests: int) -> RowTiles:
        """The same tiles where graphs look for them, followed by empty ones."""
        assert self._graph_table is not None
        table = padded_tiles(tiles, len(self._graph_table))
        self._graph_table.copy_(table.pin_memory(), non_blocking=True)
        return RowTiles(self._graph_table, num_requests, num_requests)

    def run_lora_a_sgemm(self, x: torch.Tensor, weights: torch.Tensor, **_: Any) -> torch.Tensor:
        """x A^T in parts, float32 [splits, rows, rank]: they may be summed over ranks as they are.

        `x` is [rows, inputs].
        """
        return shrink(x, weights, self._tiles)

    def run_lora_b_sgemm(
        self, x: torch.Tensor, weights: torch.Tensor, *, base_output: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """`base_output` [rows, outputs], to which what run_lora_a_sgemm gave is added times B^T."""
        whole = (Slice(0, 0, weights.shape[1]),)
        expand(x, weights, base_output, self._tiles, whole)
        return base_output

    def run_qkv_lora(
        self,
        x: torch.Tensor,
        qkv_lora_a: torch.Tensor,
        qkv_lora_b: torch.Tensor,
        *,
        output_offset_cpu: torch.Tensor,
        base_output: torch.Tensor,
        n_slices: int | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """`base_output` [rows, outputs], to which a module of several slices is added.

        `output_offset_cpu` holds the slices' bounds. Attention's q, k and v come without
        `n_slices`; of these, what no adapter trains is left out.
        """
        bounds = output_offset_cpu.tolist()
        positions = self._trained_qkv if n_slices is None else range(n_slices)
        slices = tuple(Slice(i, bounds[i], bounds[i + 1]) for i in positions)
        parts = shrink(x, qkv_lora_a, self._tiles)
        expand(parts, qkv_lora_b, base_output, self._tiles, slices)
        return base_output

    def run_gate_up_lora(
        self,
        x: torch.Tensor,
        gate_up_lora_a: torch.Tensor,
        gate_up_lora_b: torch.Tensor,
        *,
        base_output: torch.Tensor,
        **_: Any,
    ) -> torch.Tensor:
        """`base_output` [rows, outputs], to which a module of two equal slices is added.

        Or, for modules that `fuse_activations` has named, the activation [rows, outputs / 2].
        """
        parts = shrink(x, gate_up_lora_a, self._tiles)
        if gate_up_lora_b.data_ptr() in self._activated:
            return expand_and_activate(parts, gate_up_lora_b, base_output, self._tiles)
        outputs = gate_up_lora_b.shape[1]
        slices = (Slice(0, 0, outputs // 2), Slice(1, outputs // 2, outputs))
        expand(parts, gate_up_lora_b, base_output, self._tiles, slices)
        return base_output

    def fuse_activations(self, model: nn.Module) -> int:
        """Add to gate and up where silu(gate) * up is made; return for how many modules.

        Saves reading and writing their outputs, the widest of a layer, once more. Modules of other
        makes are left as they are. To be called once the model has its LoRA layers.
        """
        num_fused = 0
        for module in model.modules():
            gate_up = getattr(module, "gate_up_proj", None)
            activation = getattr(module, "act_fn", None)
            if (
                isinstance(activation, SiluAndMul)
                and isinstance(gate_up, MergedColumnParallelLinearWithLoRA)
                and gate_up.set_lora
                and gate_up.use_gate_up_lora
                and not gate_up.base_layer.gather_output
            ):
                module.act_fn = ActivationUnlessDone(activation, gate_up.B_buffer.shape[1] // 2)
                self._activated.add(gate_up.B_buffer.data_ptr())
                num_fused += 1
        return num_fused

    @property
    def _tiles(self) -> RowTiles:
        batch: Batch = self.batch_info
        return batch.tiles


class ActivationUnlessDone(nn.Module):
    """A gated activation, where gate and up are not activated already: then there is one half."""

    def __init__(self, original: nn.Module, inner: int) -> None:
        super().__init__()
        self._original = original
        self._inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, inner] of [rows, inner], or of [rows, 2 * inner]."""
        if x.shape[-1] == self._inner:
            return x
        activated: torch.Tensor = self._original(x)
        return activated


def _trained_members(module: str, targets: set[str]) -> tuple[int, ...]:
    """Which slices of a fused module adapters train; all of them where its own name is given."""
    named = tuple(index for index, member in enumerate(FUSED[module]) if member in targets)
    return tuple(range(len(FUSED[module]))) if module in targets or not named else named


register_lora_backend(BACKEND)(lambda: SegmentBackend)
# ServerArgs itself takes any name; its command line takes these.
if BACKEND not in sglang_arguments.LORA_BACKEND_CHOICES:
    sglang_arguments.LORA_BACKEND_CHOICES.append(BACKEND)
