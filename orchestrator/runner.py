"""ModelRunners that share a process: built, made current, closed.

Owns what SGLang keeps once a process although every runner has its own: the process's rank in its
tensor-parallel world, and the arguments that layers look up while they run. Knows nothing of
sequences. `dist_patch.apply()` must have run before this module is imported.
"""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import get_tp_group
from sglang.srt.distributed.parallel_state_wrapper import ParallelState
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_executor.runner_utils.pool import set_global_graph_memory_pool
from sglang.srt.runtime_context import get_context, publish
from sglang.srt.server_args import ServerArgs

Item = TypeVar("Item")
# dist_patch gives a world of one a rendezvous in memory, a larger one that of World.rendezvous.
UNUSED_PORT = 0


@dataclass(frozen=True, slots=True)
class World:
    """A process's place among those that hold one model together, by tensor parallelism.

    `rendezvous` is a URL that all ranks know, as torch.distributed takes it; on one host a file
    in a fresh folder ("file:///...") cannot collide with another run's, as ports do. With GPUs,
    each rank's process must see one alone, by CUDA_VISIBLE_DEVICES.
    """

    rank: int = 0
    size: int = 1
    rendezvous: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size or (self.size > 1 and not self.rendezvous):
            raise ValueError(f"{self}: a rank below size, and a rendezvous if size is above 1")


ALONE = World()


class Runner:
    """A ModelRunner with its pools, attention backend and graphs, next to others of its process."""

    _current: "Runner | None" = None

    def __init__(
        self,
        arguments: ServerArgs,
        model_config: ModelConfig,
        world: World = ALONE,
        threads: int = 1,
    ) -> None:
        """Load the model; on a CPU it runs with so many threads.

        Raises RuntimeError in a process that belongs to another world.
        """
        self._arguments = arguments
        self._threads = threads
        self._overrides: list[tuple[str, dict[str, Any]]] = []
        Runner._leave()
        default_dtype = torch.get_default_dtype()
        try:
            with _announced(world, arguments.device):
                self.model_runner = ModelRunner(
                    model_config=model_config,
                    mem_fraction_static=arguments.mem_fraction_static,
                    gpu_id=0,
                    ps=_parallel_state(world),
                    nccl_port=UNUSED_PORT,
                    server_args=arguments,
                )
                # Graphs of an earlier runner, and their memory, may be gone: the pool is then dead.
                set_global_graph_memory_pool(None)
                self.model_runner.alloc_memory_pool()
                self.model_runner.init_attention_backends()
                self.model_runner.init_cuda_graphs()
        finally:
            torch.set_default_dtype(default_dtype)  # SGLang leaves its own where loading fails
        self._set_threads()
        Runner._current = self

    def activate(self) -> None:
        """Make this runner's settings the process's, with what SGLang has changed in them since.

        The last runner that was built or used has overwritten them.
        """
        if Runner._current is self:
            return
        Runner._leave()
        context = publish(self._arguments, role="scheduler")
        for source, fields in self._overrides:
            context.override(source, **fields)
        self._set_threads()
        Runner._current = self

    def _set_threads(self) -> None:
        if self._arguments.device == "cpu":  # SGLang takes all of the machine's cores
            torch.set_num_threads(self._threads)

    def forward(self, batch: Any) -> Any:
        """The model's output for a ForwardBatch."""
        return self.model_runner.forward(batch).logits_output

    def close(self) -> None:
        """Give the memory of the model, its pools and graphs back; the runner is spent."""
        if Runner._current is self:
            Runner._current = None
        device = self._arguments.device
        del self.model_runner
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()

    @classmethod
    def _leave(cls) -> None:
        """No runner is current any more; what was changed in the arguments is kept for its next."""
        if cls._current is not None:
            cls._current._overrides = get_context().overrides_log()
        cls._current = None


def sum_over_ranks(values: Sequence[int]) -> list[int]:
    """Sum integers below 2**64 over the tensor-parallel ranks, modulo 2**64."""
    group = get_tp_group()
    if group.world_size == 1:
        return list(values)
    signed = torch.tensor([value - 2**64 if value >= 2**63 else value for value in values])
    torch.distributed.all_reduce(signed, group=group.cpu_group)  # int64 wraps around
    return [value % 2**64 for value in signed.tolist()]


def gather_from_ranks(item: Item) -> list[Item] | None:
    """Every rank's item, in the order of ranks, on rank 0; None on the others."""
    group = get_tp_group()
    if group.world_size == 1:
        return [item]
    items: list[Any] | None = [None] * group.world_size if group.rank_in_group == 0 else None
    torch.distributed.gather_object(item, items, dst=group.ranks[0], group=group.cpu_group)
    return items


@contextmanager
def _announced(world: World, device: str) -> Iterator[None]:
    """Within, SGLang reads in the environment where ranks meet, and on which cores they run."""
    variables = {}
    if world.size > 1:
        if device == "cuda" and torch.cuda.device_count() > 1:
            raise RuntimeError(
                f"rank {world.rank} of {world.size} sees {torch.cuda.device_count()} GPUs; show "
                "each rank's process one, by CUDA_VISIBLE_DEVICES"
            )
        variables["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = world.rendezvous
        if device == "cpu":  # as many groups of cores as there are ranks, or it refuses to start
            cores = sorted(os.sched_getaffinity(0))
            groups = [cores[rank :: world.size] or cores[:1] for rank in range(world.size)]
            binding = "|".join(",".join(map(str, group)) for group in groups)
            variables["SGLANG_CPU_OMP_THREADS_BIND"] = binding
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _parallel_state(world: World) -> ParallelState:
    """Coordinates of a rank: tensor parallelism alone, no pipeline, data or expert parallelism."""
    return ParallelState(
        tp_rank=world.rank,
        tp_size=world.size,
        pp_rank=0,
        pp_size=1,
        dp_rank=None,
        dp_size=1,
        attn_tp_rank=world.rank,
        attn_tp_size=world.size,
        attn_cp_rank=0,
        attn_cp_size=1,
        attn_dp_rank=0,
        attn_dp_size=1,
        moe_ep_rank=0,
        moe_ep_size=1,
        moe_dp_rank=None,
        moe_dp_size=1,
        dcp_size=1,
        gpu_id=0,
    )
