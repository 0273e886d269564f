"""Scoring forwards that leave the KV pool alone, prepared once a shape; small ones are CUDA graphs.

Small models leave a GPU waiting for launches; a graph's replay is one. Batches that keep it busy
are launched as they are, and spared what a cache would cost: keys and values that are copied,
stored and read by index. Owns the prepared forwards and the tensors that they read. SGLang's own
prefill graphs leave attention outside, a launch gap a layer. Rows are padded to few shapes, by a
last sequence that nothing reads. Knows nothing of plans, or of what the scores are for.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

from orchestrator.adapter_kernels import Batch, padded_tiles
from orchestrator.adapter_kernels_triton import (
    NO_SLOT,
    TABLE_WIDTH,
    TILE_ROWS,
    RowTiles,
    cut_rows,
)
from orchestrator.adapters import AdapterSlots
from orchestrator.attention_triton import Context
from orchestrator.score_attention import KeysElsewhere, UncachedAttention
from orchestrator.score_plan import PlanBatch

MAX_CAPTURED = 4096  # tokens; larger batches keep a GPU busy without a graph
MAX_SHAPES = 64
LONGEST = 1024  # of a sequence in larger batches: for longer ones SGLang's attention is cut better
PADDING_ENTRY = 0
TOKEN_STEP, LENGTH_STEP, TARGET_STEP = 32, 64, 32
WARMUPS = 2  # forwards before a capture, in which kernels are compiled


@dataclass(frozen=True, slots=True)
class Shape:
    """What a forward is prepared for. Batches of another shape need another one."""

    num_sequences: int
    num_tokens: int
    longest: int
    num_targets: int
    longest_shared: int = 0
    """Of what a sequence begins with that others compute; 0 where none does."""

    @property
    def is_captured(self) -> bool:
        """Whether its forward is a graph."""
        return self.num_tokens <= MAX_CAPTURED

    @property
    def lengths(self) -> list[int]:
        """As many sequences of as many tokens, all of about a length."""
        length, rest = divmod(self.num_tokens, self.num_sequences)
        return [length + (number < rest) for number in range(self.num_sequences)]


def shape_of(batch: PlanBatch) -> Shape:
    """The shape that a batch is padded to."""
    lengths = batch.lengths
    padding = -sum(lengths) % TOKEN_STEP
    return Shape(
        num_sequences=len(lengths) + (padding > 0),
        num_tokens=sum(lengths) + padding,
        longest=_up(max([*lengths, padding]), LENGTH_STEP),
        num_targets=_up(len(batch.positions), TARGET_STEP),
        longest_shared=_up(max(batch.shared), LENGTH_STEP),
    )


class ScoreGraphs:
    """The prepared forwards of one engine."""

    def __init__(
        self,
        model_runner: Any,
        head: Any,
        built: Callable[[Shape], AbstractContextManager[ForwardBatch]],
        slots: AdapterSlots | None,
    ) -> None:
        """`head` is the model's ScoringHead; `built` lends a batch of a shape's lengths."""
        self._model_runner, self._head, self._built = model_runner, head, built
        self._slots = slots
        self._graphs: OrderedDict[Shape, ScoreGraph] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()
        self._parameters = list(model_runner.model.parameters())
        self._addresses: list[int] = []
        self._refused: set[bool] = set()
        """Whether batches that share keys, and those that do not, are none that are served here."""

    def run(self, batch: PlanBatch) -> torch.Tensor | None:
        """Log-probabilities, float32 [targets]; None for a batch that is not served here.

        Such are large batches of long sequences, and all batches of models with layers that read
        the pool.
        """
        shape = shape_of(batch)
        if batch.is_shared in self._refused or not (shape.is_captured or shape.longest <= LONGEST):
            return None
        addresses = [parameter.data_ptr() for parameter in self._parameters]
        if addresses != self._addresses:  # graphs read where parameters were at their capture
            self._graphs.clear()
            self._addresses = addresses
        try:
            if shape not in self._graphs:
                if len(self._graphs) == MAX_SHAPES:
                    self._graphs.popitem(last=False)
                self._graphs[shape] = self._prepared(shape)
            self._graphs.move_to_end(shape)
            return self._graphs[shape].run(batch)
        except KeysElsewhere:
            self._refused.add(batch.is_shared)
            return None

    def _prepared(self, shape: Shape) -> "ScoreGraph":
        with self._built(shape) as forward_batch:
            # Nobody reads these keys and values: where a layer writes them nevertheless, all go to
            # SGLang's slot for padding.
            forward_batch.out_cache_loc = torch.full_like(
                forward_batch.out_cache_loc, PADDING_ENTRY
            )
            return ScoreGraph(
                self._model_runner, self._head, forward_batch, shape, self._slots, self._pool
            )


class ScoreGraph:
    """One prepared forward, and the tensors that it reads."""

    def __init__(
        self,
        model_runner: Any,
        head: Any,
        batch: ForwardBatch,
        shape: Shape,
        slots: AdapterSlots | None,
        pool: Any,
    ) -> None:
        device = batch.input_ids.device
        self._batch, self._shape = batch, shape
        self._rows = torch.zeros(shape.num_targets, dtype=torch.int64, device=device)
        self._tokens = torch.zeros_like(self._rows)
        self._adapters = None if slots is None else _StaticAdapters(slots, shape)
        self._written: PlanBatch | None = None
        backend = model_runner.attn_backend
        backend.init_forward_metadata(batch)
        # The backend's own buffers are every batch's; a graph's must be its own.
        planned = backend.forward_metadata
        self._metadata = replace(
            planned,
            max_extend_len=shape.longest,
            qo_indptr=planned.qo_indptr.clone(),
            kv_indptr=planned.kv_indptr.clone(),
        )
        self._context: Context | None = None
        if shape.longest_shared:
            sizes = (shape.num_sequences, shape.longest_shared)
            places = torch.zeros(sizes, dtype=torch.int32, device=device)
            self._context = Context(torch.zeros_like(places[:, 0]), places)
        self._attention = UncachedAttention(backend, self._metadata, self._context)
        self._model, self._head = model_runner.model, head
        self._graph = self._captured(pool) if shape.is_captured else None

    def _forward(self) -> torch.Tensor:
        """What the tensors ask for, launched kernel by kernel."""
        batch = self._batch
        if self._adapters is not None:
            self._adapters.choose()
        with (
            self._head.scoring(self._rows, self._tokens),
            forward_context(ForwardContext(attn_backend=self._attention)),
        ):
            output = self._model.forward(batch.input_ids, batch.positions, batch)
        logprobs: torch.Tensor = output.input_token_logprobs
        return logprobs

    def _captured(self, pool: Any) -> torch.cuda.CUDAGraph:
        graph, stream = torch.cuda.CUDAGraph(), _capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            self._logprobs = self._forward()
        return graph

    def run(self, batch: PlanBatch) -> torch.Tensor:
        """Log-probabilities of a batch of this shape, float32 [targets]."""
        if self._written is not batch:
            self._write(batch)
            self._written = batch
        if self._graph is None:
            return self._forward()[: len(batch.positions)]
        self._graph.replay()
        return self._logprobs[: len(batch.positions)].clone()  # the next replay writes here

    def _write(self, batch: PlanBatch) -> None:
        """Put a batch where the forward reads."""
        lengths, shared = batch.lengths, batch.shared
        padding = self._shape.num_tokens - sum(lengths)
        if padding:
            lengths.append(padding)
            shared.append(0)
        ids = [token for row in batch.rows for token in row.prompt.own]
        _fill(self._batch.input_ids, _padded(ids, self._shape.num_tokens))
        pairs = zip(shared, lengths, strict=True)
        positions = [np.arange(first, first + length) for first, length in pairs]
        _fill(self._batch.positions, np.concatenate(positions))
        _fill(self._metadata.qo_indptr, np.array([0, *accumulate(lengths)]))
        _fill(self._rows, _padded(batch.positions, self._shape.num_targets))
        _fill(self._tokens, _padded(batch.tokens, self._shape.num_targets))
        if self._context is not None:
            places = np.zeros(self._context.places.shape, np.int64)
            for row, of_row in zip(places, batch.places(), strict=False):
                row[: len(of_row)] = of_row
            _fill(self._context.counts, np.array(shared))
            _fill(self._context.places, places)
        if self._adapters is not None:
            adapters = [row.adapter for row in batch.rows]
            self._adapters.write(lengths, [*adapters, *([None] if padding else [])])


class _StaticAdapters:
    """Which rows are under which adapter, where a forward's kernels look for it."""

    def __init__(self, slots: AdapterSlots, shape: Shape) -> None:
        self._slots = slots
        capacity = shape.num_sequences + -(-shape.num_tokens // TILE_ROWS)
        self._table = torch.zeros(capacity, TABLE_WIDTH.value, dtype=torch.int32, device="cuda")
        self._batch = Batch(RowTiles(self._table, capacity, capacity), has_active_lora=True)

    def choose(self) -> None:
        """Have the layers launch for these rows; a graph's launches stay for the rows that they
        were captured for."""
        self._slots.backend.batch_info = self._batch

    def write(self, lengths: Sequence[int], adapters: Sequence[str | None]) -> None:
        """Describe a batch's rows."""
        numbers = [NO_SLOT if name is None else self._slots.buffers[name] for name in adapters]
        tiles = cut_rows(lengths, numbers, self._slots.scalings)
        _fill(self._table, padded_tiles(tiles, len(self._table)).numpy())


@cache
def _capture_stream() -> Any:
    """One for all captures: cuBLAS keeps a workspace for every stream it was ever used on."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def _fill(target: torch.Tensor, values: np.ndarray[Any, Any]) -> None:
    """Write values into a tensor on the device, without waiting for it."""
    target.copy_(torch.from_numpy(values).to(target.dtype).pin_memory(), non_blocking=True)


def _padded(values: Sequence[int], size: int) -> np.ndarray[Any, Any]:
    padded = np.zeros(size, np.int64)
    padded[: len(values)] = values
    return padded


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
