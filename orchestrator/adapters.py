"""The engine's adapter slots: buffers that rows of a batch name, written in place.

Owns where a LoRA module's factors lie in SGLang's memory pool. Slots are filled once, with zeros,
and never loaded or unloaded again, so that nothing is evicted and no memory grows. Knows nothing
of what the factors are: an adapter's, or low-rank noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.lora.lora_registry import LoRARef

from orchestrator import adapter_kernels
from orchestrator.tensor_map import FUSED, Place, Shard, TensorNames, linear_shard


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """What an engine is to make room for."""

    num_slots: int
    rank: int
    scaling: float
    """A slot's output is scaling * B (A x)."""
    modules: tuple[str, ...]
    """Names of linear modules inside the layers, as in the checkpoint: q_proj, v_proj, ..."""

    def server_arguments(self, on_cpu: bool) -> dict[str, Any]:
        """What SGLang must be told so that its pool holds the slots, and rows without any."""
        return {
            "enable_lora": True,
            "lora_backend": "torch_native" if on_cpu else adapter_kernels.BACKEND,
            "max_lora_rank": self.rank,
            "max_loras_per_batch": self.num_slots + 1,
            "lora_target_modules": list(self.modules),
        }


@dataclass(frozen=True, slots=True)
class Factor:
    """A factor of one module: which part of it this process holds, and that part in each slot."""

    name: str
    """Canonical: MODULE.lora_A.weight [rank, inputs], or MODULE.lora_B.weight [outputs, rank]."""
    shard: Shard
    views: tuple[torch.Tensor, ...]
    """Per slot, [rows, columns] of the pool's buffer."""


class AdapterSlots:
    """The slots of one engine, all in place."""

    def __init__(self, model_runner: Any, plan: AdapterPlan, rank: int) -> None:
        """`rank` is the process's among the tensor-parallel ranks."""
        self.names = tuple(f"slot {index}" for index in range(plan.num_slots))
        self._plan = plan
        manager = model_runner.lora_manager
        for name in self.names:
            reference = LoRARef(lora_id=name, lora_name=name, lora_path=name, pinned=False)
            settings = {
                "peft_type": "LORA",
                "target_modules": list(plan.modules),
                "r": plan.rank,
                "lora_alpha": plan.scaling * plan.rank,
            }
            result = manager.load_lora_adapter_from_tensors(reference, {}, settings)
            if not result.success:
                raise RuntimeError(f"SGLang refuses an adapter slot: {result.error_message}")
        manager.fetch_new_loras({None, *self.names})
        self.backend = manager.lora_backend
        """What SGLang's layers call for the slots."""
        if isinstance(self.backend, adapter_kernels.SegmentBackend):
            self.backend.fuse_activations(model_runner.model)
        self.buffers = {name: manager.memory_pool.get_buffer_id(name) for name in self.names}
        """Where in SGLang's pool each slot is."""
        self.scalings = [plan.scaling] * (plan.num_slots + 1)
        """By the number of a buffer."""
        self.factors = self._factors(manager, rank)

    def _factors(self, manager: Any, rank: int) -> list[Factor]:
        """Both factors of every module, in the order of layers."""
        factors = []
        for layer, wrapped in enumerate(manager.lora_modules):
            for module_name, module in wrapped.items():
                names = TensorNames([f"{module_name}.weight"])
                for canonical, place in names.places.items():
                    path = canonical.removesuffix(".weight")
                    if path.rpartition(".")[2] in self._plan.modules:
                        base = linear_shard(place, module.base_layer, rank)
                        factors += self._pair(manager.memory_pool, layer, path, place, base, rank)
        return factors

    def _pair(
        self, pool: Any, layer: int, path: str, place: Place, base: Shard, rank: int
    ) -> list[Factor]:
        """A and B of one module: A's columns are split as the base weight's, B's rows likewise."""
        width = self._plan.rank
        engine_module = place.parameter.split(".")[-2]
        members = list(FUSED.get(engine_module, {path.rpartition(".")[2]: 0}))
        position = members.index(place.member) if place.member else 0
        first = position * width
        buffers = pool.A_buffer[engine_module][layer], pool.B_buffer[engine_module][layer]
        indices = [pool.get_buffer_id(name) for name in self.names]
        rows = slice(base.parameter_row, base.parameter_row + base.num_rows)
        inputs_split = base.num_columns < base.full_columns
        outputs_split = base.num_rows < base.full_shape[0]
        return [
            Factor(
                f"{path}.lora_A.weight",
                Shard(
                    place,
                    full_shape=(width, base.full_columns),
                    parameter_row=first,
                    num_rows=width,
                    num_columns=base.num_columns,
                    first_row=0,
                    first_column=base.first_column,
                    counted=inputs_split or rank == 0,
                ),
                tuple(buffers[0][index, first : first + width] for index in indices),
            ),
            Factor(
                f"{path}.lora_B.weight",
                Shard(
                    place,
                    full_shape=(base.full_shape[0], width),
                    parameter_row=base.parameter_row,
                    num_rows=base.num_rows,
                    num_columns=width,
                    first_row=base.first_row,
                    first_column=0,
                    counted=base.counted if outputs_split else rank == 0,
                ),
                tuple(buffers[1][index, rows] for index in indices),
            ),
        ]


def bytes_per_slot(shapes: Sequence[tuple[int, int]], rank: int, itemsize: int) -> int:
    """Memory of one slot over linear layers of these [outputs, inputs]."""
    return sum(rank * (outputs + inputs) for outputs, inputs in shapes) * itemsize
