"""The engine: the only owner of a runner and its RadixCache.

Loads a model, scores spans of token sequences, continues prompts, and gives every slot back. Knows
token ids and log-probabilities; knows nothing of text, options, losses, perturbations or Ray.
`dist_patch.apply()` must have run before this module is imported.
"""

import itertools
from array import array
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.layers.logits_processor import LogitsMetadata, LogitsProcessorOutput
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from torch import nn

from orchestrator.adapter_kernels import SegmentBackend
from orchestrator.adapters import AdapterPlan, AdapterSlots
from orchestrator.checkpoint import Checkpoint
from orchestrator.config import ConfigError
from orchestrator.prefix_slots import PrefixPlan, PrefixSlots
from orchestrator.runner import ALONE, Runner, World
from orchestrator.score_graphs import TOKEN_STEP, ScoreGraphs, Shape
from orchestrator.score_plan import PlanBatch, Row, ScorePlan, Scores

MAX_BATCH_SEQUENCES = 256
MAX_ROWS_PER_SOFTMAX = 1024  # bounds the float32 logits that exist at one time
FALLBACK_CLASSES = "Transformers"  # how SGLang's names for transformers' own models begin
VIRTUAL_TOKEN = 0  # holds the place of a prefix slot's; never computed


@dataclass(frozen=True, slots=True)
class Launched:
    """A plan's forwards, which the device may still be at; `Engine.read` waits for them."""

    logprobs: list[torch.Tensor]
    """Per batch, float32, in the order of rows and targets."""
    num_reused: int


class ScoringHead(nn.Module):
    """Stands in for a model's logits processor: logits only at the rows that are scored.

    Outside of `scoring(...)` it is the original.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.original: Any = original
        self._rows: torch.Tensor | None = None
        self._tokens: torch.Tensor | None = None

    @contextmanager
    def scoring(self, rows: torch.Tensor, tokens: torch.Tensor) -> Iterator[None]:
        """Score `tokens[i]` (int64) at row `rows[i]` (int64) of the batch's flat positions."""
        self._rows, self._tokens = rows, tokens
        try:
            yield
        finally:
            self._rows = self._tokens = None

    def forward(
        self,
        input_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        lm_head: nn.Module,
        metadata: ForwardBatch | LogitsMetadata,
        *others: Any,
        **named: Any,
    ) -> LogitsProcessorOutput:
        if self._rows is None or self._tokens is None:
            return self.original(input_ids, hidden_states, lm_head, metadata, *others, **named)
        if isinstance(metadata, ForwardBatch):
            metadata = LogitsMetadata.from_forward_batch(metadata)
        scored = []
        for start in range(0, len(self._rows), MAX_ROWS_PER_SOFTMAX):
            rows = self._rows[start : start + MAX_ROWS_PER_SOFTMAX]
            tokens = self._tokens[start : start + MAX_ROWS_PER_SOFTMAX]
            logits = self.original._get_logits(hidden_states[rows], lm_head, metadata)
            logits = logits[:, : self.original.config.vocab_size].float()
            chosen = logits.gather(1, tokens[:, None])[:, 0]
            scored.append(chosen - logits.logsumexp(dim=1))
        return LogitsProcessorOutput(next_token_logits=None, input_token_logprobs=torch.cat(scored))


class Engine:
    """A model on one device, ready to score and to generate.

    Several engines may live in one process and be used in any order. With a `world` of several
    ranks, every rank holds its part of the model and makes the same calls.
    """

    def __init__(
        self,
        model_path: str,
        *,
        dtype: str,
        device: str,
        kv_tokens: int,
        threads: int = 1,
        trust_remote_code: bool = False,
        allow_fallback: bool = False,
        cuda_graphs: bool = False,
        score_graphs: bool = True,
        load_format: str = "auto",
        quantization: str | None = None,
        adapters: AdapterPlan | None = None,
        prefixes: PrefixPlan | None = None,
        world: World = ALONE,
    ) -> None:
        """Load the model.

        `model_path` is a folder in Hugging Face's layout; `device` "cpu" or "cuda"; `kv_tokens`
        the size of the KV pool; `load_format` "auto", or "dummy" for random weights. On a GPU
        `cuda_graphs` captures SGLang's graphs at once, for decoding, and `score_graphs` ours, each
        when its shape is first scored. `quantization` is as SGLang names it; `adapters` and
        `prefixes` are the slots to make room for.
        Raises ConfigError for a checkpoint that does not fit the model, and, unless
        `allow_fallback`, where SGLang has no implementation of the architecture.
        """
        on_cpu = device == "cpu"
        margin = 0 if on_cpu else TOKEN_STEP  # a graph's batch is padded to a multiple of that
        self.device = device
        self.world = world
        self._is_closed = False
        arguments = ServerArgs(
            model_path=model_path,
            dtype=dtype,
            device=device,
            load_format=load_format,
            tp_size=world.size,
            trust_remote_code=trust_remote_code,
            attention_backend="torch_native" if on_cpu else "triton",
            sampling_backend="pytorch",
            disable_cuda_graph=on_cpu or not cuda_graphs,
            disable_overlap_schedule=True,
            max_total_tokens=kv_tokens + margin,
            quantization=quantization,
            max_running_requests=MAX_BATCH_SEQUENCES,
            mem_fraction_static=0.5,
            page_size=1,
            enable_fp32_lm_head=True,
            random_seed=0,
            **(adapters.server_arguments(on_cpu) if adapters else {}),
        )
        model_config = ModelConfig.from_server_args(arguments)
        if not allow_fallback:
            _require_native(model_config)
        if load_format == "auto" and Path(model_path).is_dir():
            Checkpoint(Path(model_path))  # refuses damaged files by name, which SGLang does not
        self._runner = Runner(arguments, model_config, world, threads)
        runner = self._runner.model_runner
        self.slots: AdapterSlots | None = None
        if adapters is not None:
            self.slots = AdapterSlots(runner, adapters, world.rank)
        self.prefixes: PrefixSlots | None = None
        if prefixes is not None:  # of the KV pool, before batches are told what it holds
            self.prefixes = PrefixSlots(runner, prefixes, world.rank, world.size)
        self._head = ScoringHead(self.model.logits_processor)
        self.model.logits_processor = self._head
        self._allocator = runner.token_to_kv_pool_allocator
        self._requests = runner.req_to_token_pool
        self._cache = RadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=self._requests,
                token_to_kv_pool_allocator=self._allocator,
                page_size=1,
            )
        )
        self._graphs = self._make_graphs() if score_graphs and not on_cpu else None
        self._kv_tokens = self._allocator.available_size() - margin
        self._max_sequences = len(self._requests.free_slots)  # SGLang lowers it to suit the pool
        self._request_ids = itertools.count()

    def _make_graphs(self) -> ScoreGraphs | None:
        """Graphs for scoring, where the model's forward is one that they can hold."""
        runner = self._runner.model_runner
        has_graphs = (
            self.world.size == 1
            and type(runner.attn_backend) is TritonAttnBackend
            and not runner.sliding_window_size
            and not type(self.model).__name__.startswith(FALLBACK_CLASSES)
            and (self.slots is None or isinstance(self.slots.backend, SegmentBackend))
        )
        if not has_graphs:
            return None
        return ScoreGraphs(runner, self._head, self._dummy_batch, self.slots)

    @property
    def model(self) -> nn.Module:
        """The live model; its parameters may be written in place between calls."""
        model: nn.Module = self._runner.model_runner.model
        return model

    @property
    def max_sequence_length(self) -> int:
        """Longest sequence, in tokens, that a call may score, behind a prefix if there are any."""
        num_virtual = self.prefixes.num_tokens if self.prefixes else 0
        context = self._runner.model_runner.model_config.context_len - num_virtual
        return int(min(context, self._kv_tokens))

    @property
    def kv_tokens(self) -> int:
        """Size of the KV pool, in tokens, without the entries of prefix slots."""
        return int(self._kv_tokens)

    def free_slots(self) -> tuple[int, int]:
        """KV slots (tokens) and request slots that are free or held by evictable entries."""
        kv = self._allocator.available_size() + self._cache.evictable_size()
        return int(kv), len(self._requests.free_slots)

    @torch.no_grad()
    def score(
        self,
        sequences: Sequence[Sequence[int]],
        spans: Sequence[tuple[int, int]],
        namespace: str | None = None,
        adapters: Sequence[str | None] = (None,),
    ) -> Scores:
        """Log-probability of tokens start..end of each sequence, given what stands before them.

        All sequences are scored under each of the `adapters` (names of slots, or None); the spans
        of the answer are those of the first adapter, then those of the second, and so on. A batch
        holds the same sequences under all adapters, so that none is computed in other shapes than
        another.

        The last token of a span is only a target, never an input: sequences that differ in no
        other token go through the model once. With a `namespace`, KV entries are looked up and
        kept under that name; it must stand for one state of the weights. Without one, and under
        prefix slots, nothing is reused and nothing stays. Raises ValueError for a span that does
        not fit its sequence, ConfigError for a sequence that, times the adapters, is longer than
        the KV pool.
        """
        plan = self.plan(sequences, spans, adapters)
        return self.read(plan, [self.launch(plan, namespace)])[0]

    def plan(
        self,
        sequences: Sequence[Sequence[int]],
        spans: Sequence[tuple[int, int]],
        adapters: Sequence[str | None] = (None,),
    ) -> ScorePlan:
        """Lay out a call of `score`, to be launched any number of times. Raises what that does."""
        plan = ScorePlan(sequences, spans, adapters)
        plan.split(self._split([len(prompt.tokens) for prompt in plan.prompts], len(adapters)))
        return plan

    @torch.no_grad()
    def launch(self, plan: ScorePlan, namespace: str | None = None) -> Launched:
        """Start a plan's forwards under the weights of now, without waiting for the device."""
        self._runner.activate()
        logprobs, num_reused = [], 0
        for batch in plan.batches:
            values = self._replayed(batch) if namespace is None else None
            if values is None:
                values, reused = self._forward(batch.rows, namespace)
                num_reused += reused
            logprobs.append(values)
        return Launched(logprobs, num_reused)

    def read(self, plan: ScorePlan, launches: Sequence[Launched]) -> list[Scores]:
        """The scores of a plan's launches, by one transfer from the device."""
        every = [values for launched in launches for values in launched.logprobs]
        flat = torch.cat(every).tolist() if every else []
        size = plan.num_targets
        return [
            plan.scores(flat[number * size : (number + 1) * size], launched.num_reused)
            for number, launched in enumerate(launches)
        ]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_tokens: Collection[int] = (),
    ) -> list[list[int]]:
        """Continue each prompt by its most likely tokens, one after the other.

        A continuation ends before the first of `stop_tokens` in it. Nothing is reused from the KV
        pool, and nothing stays. Raises ValueError for an empty prompt, ConfigError for what does
        not fit the KV pool.
        """
        if not all(prompts):
            raise ValueError("a prompt has no tokens")
        continuations: list[list[int]] = []
        for batch in self._split([len(prompt) + max_new_tokens for prompt in prompts]):
            chosen = [prompts[index] for index in batch]
            continuations += self._decode(chosen, max_new_tokens, frozenset(stop_tokens))
        return continuations

    def _split(self, lengths: Sequence[int], num_copies: int = 1) -> Iterator[range]:
        """Batches of which so many copies fit the pools; decided by lengths alone."""
        if num_copies > self._max_sequences:
            raise ConfigError(
                f"space.slots: {num_copies} sequences at a time are more than the engine's "
                f"{self._max_sequences}; lower space.slots"
            )
        first = num_tokens = 0
        for index, length in enumerate(lengths):
            if length > self.max_sequence_length or length * num_copies > self._kv_tokens:
                times = f", {num_copies} times over," if num_copies > 1 else ""
                raise ConfigError(
                    f"a sequence of {length} tokens{times} exceeds the {self.max_sequence_length} "
                    "that model.kv_tokens and the model's context allow; raise model.kv_tokens or "
                    "lower task.max_length"
                )
            is_full = (index - first + 1) * num_copies > self._max_sequences
            if index > first and (is_full or (num_tokens + length) * num_copies > self._kv_tokens):
                yield range(first, index)
                first, num_tokens = index, 0
            num_tokens += length
        if first < len(lengths):
            yield range(first, len(lengths))

    def _decode(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_tokens: frozenset[int]
    ) -> list[list[int]]:
        self._runner.activate()
        requests: list[Req] = []
        finished: set[int] = set()
        try:
            for prompt in prompts:
                requests.append(self._request(prompt, None, len(prompt) - 1))
            schedule = self._schedule(requests)
            for remaining in reversed(range(max_new_tokens)):
                output = self._runner.forward(self._forward_batch(schedule))
                chosen = output.next_token_logits.argmax(dim=-1)
                for index, token in enumerate(chosen.tolist()):
                    requests[index].output_ids.append(token)
                    if token in stop_tokens:
                        finished.add(index)
                if remaining == 0 or len(finished) == len(requests):
                    break
                schedule.input_ids = chosen
                schedule.prepare_for_decode()
        finally:
            for request in requests:
                self._release(request, keep=False)
        return [_until(request.output_ids, stop_tokens) for request in requests]

    def _forward(self, rows: Sequence[Row], namespace: str | None) -> tuple[torch.Tensor, int]:
        """The rows' targets' log-probabilities, and the tokens that were reused."""
        requests: list[Req] = []
        scored = False
        try:
            for row in rows:
                # A prefix may be reused up to the first scored position, which needs its logits.
                prompt = row.prompt
                requests.append(
                    self._request(prompt.tokens, namespace, prompt.first_scored, row.adapter)
                )
            reused = [
                self._num_reused(row.adapter, request)
                for row, request in zip(rows, requests, strict=True)
            ]
            forward_batch = self._forward_batch(self._schedule(requests))
            with self._head.scoring(*self._targets(rows, reused)):
                output = self._runner.forward(forward_batch)
            scored = True
        finally:
            # Entries of a forward that failed must not be found later.
            keep = namespace is not None and scored
            for row, request in zip(rows, requests, strict=False):
                self._release(request, keep and self._prefix(row.adapter) is None)
        return output.input_token_logprobs, sum(reused)

    def _replayed(self, batch: PlanBatch) -> torch.Tensor | None:
        """The batch's log-probabilities, by a graph; None where there is none for it."""
        if self._graphs is None or any(self._prefix(row.adapter) is not None for row in batch.rows):
            return None
        return self._graphs.run(batch)

    @contextmanager
    def _dummy_batch(self, shape: Shape) -> Iterator[ForwardBatch]:
        """A batch of sequences of these lengths, whose KV slots are its own while it is lent."""
        adapter = self.slots.names[0] if self.slots else None
        requests: list[Req] = []
        try:
            for length in shape.lengths:
                requests.append(self._request([0] * length, None, length - 1, adapter))
            yield self._forward_batch(self._schedule(requests))
        finally:
            for request in requests:
                self._release(request, keep=False)

    def _schedule(self, requests: list[Req]) -> ScheduleBatch:
        """Allocate slots for the requests, and lay them out as one prefill batch."""
        schedule = ScheduleBatch.init_new(
            reqs=requests,
            req_to_token_pool=self._requests,
            token_to_kv_pool_allocator=self._allocator,
            tree_cache=self._cache,
            model_config=self._runner.model_runner.model_config,
            enable_overlap=False,
            spec_algorithm=SpeculativeAlgorithm.NONE,
        )
        schedule.return_logprob = False  # the scoring head takes them itself
        schedule.prepare_for_extend()
        if schedule.input_ids is None:
            schedule.input_ids = schedule.prefill_input_ids_cpu.to(self.device)
        return schedule

    def _forward_batch(self, schedule: ScheduleBatch) -> ForwardBatch:
        return ForwardBatch.init_new(
            schedule, self._runner.model_runner, return_hidden_states_before_norm=False
        )

    def _targets(
        self, rows: Sequence[Row], reused: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Flat positions of the batch that are scored, and the token to score at each (int64)."""
        positions, tokens = [], []
        start = 0
        for row, num_reused in zip(rows, reused, strict=True):
            for position, token in row.prompt.targets:
                positions.append(start + position - num_reused)
                tokens.append(token)
            start += len(row.prompt.tokens) - num_reused
        return torch.tensor(positions, device=self.device), torch.tensor(tokens, device=self.device)

    def _request(
        self,
        tokens: Sequence[int],
        namespace: str | None,
        first_needed: int,
        adapter: str | None = None,
    ) -> Req:
        """A request whose hidden states are computed from position `first_needed` on, at least."""
        prefix = self._prefix(adapter)
        virtual = [] if prefix is None else [VIRTUAL_TOKEN] * len(prefix)
        request = Req(
            rid=str(next(self._request_ids)),
            origin_input_text="",
            origin_input_ids=array("q", [*virtual, *tokens]),
            sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
            return_logprob=True,
            extra_key=namespace,
            lora_id=adapter if prefix is None else None,
        )
        request.logprob_start_len = len(virtual) + first_needed
        is_cached = namespace is not None and prefix is None
        request.init_next_round_input(self._cache if is_cached else None)
        if prefix is not None:
            request.prefix_indices = prefix
            request.cache_protected_len = len(prefix)  # not to be freed with the request's own
        if request.last_node is not None:
            self._cache.inc_lock_ref(request.last_node)  # or making room could evict it
        request.set_extend_range(len(request.prefix_indices), len(request.origin_input_ids))
        return request

    def _prefix(self, adapter: str | None) -> torch.Tensor | None:
        """The KV entries that a row begins with; None where it names no prefix slot."""
        if self.prefixes is None or adapter not in self.prefixes.names:
            return None
        return self.prefixes.entries(adapter)

    def _num_reused(self, adapter: str | None, request: Req) -> int:
        """Tokens of a row that were found in the cache; virtual ones are no tokens of it."""
        return 0 if self._prefix(adapter) is not None else len(request.prefix_indices)

    def _release(self, request: Req, keep: bool) -> None:
        """Give a request's slots back, however far it came; keep its KV entries if asked."""
        if request.kv_committed_len:  # its KV slots were allocated
            self._cache.cache_finished_req(
                request, is_insert=keep, kv_len_to_handle=request.kv_committed_len
            )
        elif request.last_node is not None:
            self._cache.dec_lock_ref(request.last_node)
        if request.req_pool_idx is not None:
            self._requests.free(request)

    def close(self) -> None:
        """Give the model's and the pools' memory back. The engine is of no use afterwards."""
        if self._is_closed:
            return
        self._is_closed = True
        self.slots = self.prefixes = None  # they hold views of the runner's pools
        self._graphs = None  # they hold memory of the model's forward
        del self._head, self._cache, self._allocator, self._requests
        self._runner.close()


def _require_native(model_config: ModelConfig) -> None:
    """Refuse, before any weight is read, a model that SGLang would hand to transformers."""
    architectures = model_config.hf_config.architectures or ["(none given)"]
    if not any(name in ModelRegistry.get_supported_archs() for name in architectures):
        raise ConfigError(
            f"model.path: {model_config.model_path}: SGLang has no implementation of "
            f"{', '.join(architectures)}; choose a model that it serves natively, or set "
            "model.allow_fallback=true to run transformers' own, more slowly"
        )


def _until(tokens: Sequence[int], stop_tokens: frozenset[int]) -> list[int]:
    """The tokens before the first stop token."""
    return list(itertools.takewhile(lambda token: token not in stop_tokens, tokens))
