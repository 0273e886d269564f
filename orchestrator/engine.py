"""The engine: the only owner of an SGLang ModelRunner and its RadixCache.

Loads a model, scores spans of token sequences, and gives every slot back. Knows token ids and
log-probabilities; knows nothing of text, options, losses, perturbations or Ray.
`dist_patch.apply()` must have run before this module is imported.
"""

import gc
import itertools
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state_wrapper import ParallelState
from sglang.srt.layers.logits_processor import LogitsMetadata, LogitsProcessorOutput
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.runtime_context import publish
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import PortArgs, ServerArgs
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from torch import nn

from orchestrator.config import ConfigError

MAX_BATCH_SEQUENCES = 256
MAX_ROWS_PER_SOFTMAX = 1024  # bounds the float32 logits that exist at one time
FALLBACK_MODULE = "sglang.srt.models.transformers"


@dataclass(frozen=True, slots=True)
class SpanScore:
    """Log-probability (natural logarithm) of a span's tokens, given all tokens before each."""

    mean: float
    sum: float


@dataclass(frozen=True, slots=True)
class Scores:
    """Answer of `Engine.score`: one entry a sequence, and the work it took."""

    spans: list[SpanScore]
    num_tokens: int
    """Tokens that went through the model."""
    num_reused: int
    """Tokens whose KV entries were found in the cache."""


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


@dataclass(slots=True)
class _Prompt:
    """Distinct input tokens, and the (position, token) pairs to score on them."""

    tokens: tuple[int, ...]
    logprobs: dict[tuple[int, int], float]


class Engine:
    """A model on one device, ready to score.

    Several engines may live in one process and be used in any order.
    """

    _active: "Engine | None" = None

    def __init__(
        self,
        model_path: str,
        *,
        dtype: str,
        device: str,
        kv_tokens: int,
        threads: int = 1,
        trust_remote_code: bool = False,
    ) -> None:
        """Load the model.

        `model_path` is a folder in Hugging Face's layout; `device` "cpu" or "cuda"; `kv_tokens`
        the size of the KV pool. Raises ConfigError where SGLang has no implementation of its own
        for the model's architecture.
        """
        on_cpu = device == "cpu"
        self.device = device
        self._server_args = ServerArgs(
            model_path=model_path,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            attention_backend="torch_native" if on_cpu else "triton",
            sampling_backend="pytorch",
            disable_cuda_graph=True,
            disable_overlap_schedule=True,
            max_total_tokens=kv_tokens,
            max_running_requests=MAX_BATCH_SEQUENCES,
            mem_fraction_static=0.5,
            page_size=1,
            enable_fp32_lm_head=True,
            random_seed=0,
        )
        self._runner = self._build_runner()
        if on_cpu:  # SGLang sets the number to that of the machine's cores
            torch.set_num_threads(threads)
        if type(self.model).__module__ == FALLBACK_MODULE:
            architectures = self._runner.model_config.hf_config.architectures
            raise ConfigError(
                f"model.path: SGLang has no native implementation of {architectures}; "
                "choose a model of an architecture that it serves natively"
            )
        self._head = ScoringHead(self.model.logits_processor)
        self.model.logits_processor = self._head
        self._allocator = self._runner.token_to_kv_pool_allocator
        self._requests = self._runner.req_to_token_pool
        self._cache = RadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=self._requests,
                token_to_kv_pool_allocator=self._allocator,
                page_size=1,
            )
        )
        self._kv_tokens = self._allocator.available_size()
        self._request_ids = itertools.count()

    def _build_runner(self) -> Any:
        arguments = self._server_args
        runner = ModelRunner(
            model_config=ModelConfig.from_server_args(arguments),
            mem_fraction_static=arguments.mem_fraction_static,
            gpu_id=0,
            ps=_single_process(),
            nccl_port=PortArgs.init_new(arguments).nccl_port,
            server_args=arguments,
        )
        runner.alloc_memory_pool()
        runner.init_attention_backends()
        runner.init_cuda_graphs()
        Engine._active = self
        return runner

    @property
    def model(self) -> nn.Module:
        """The live model; its parameters may be written in place between calls."""
        model: nn.Module = self._runner.model
        return model

    @property
    def max_sequence_length(self) -> int:
        """Longest sequence, in tokens, that a call may score."""
        return int(min(self._runner.model_config.context_len, self._kv_tokens))

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
    ) -> Scores:
        """Log-probability of tokens start..end of each sequence, given what stands before them.

        The last token of a span is only a target, never an input: sequences that differ in no
        other token go through the model once. With a `namespace`, KV entries are looked up and
        kept under that name; it must stand for one state of the weights. Without one nothing is
        reused and nothing stays. Raises ValueError for a span that does not fit its sequence,
        ConfigError for a sequence that is longer than the KV pool.
        """
        prompts: dict[tuple[int, ...], _Prompt] = {}
        pairs = []  # per sequence: its prompt, and what of it makes up the span
        for tokens, (start, end) in zip(sequences, spans, strict=True):
            if not 1 <= start < end <= len(tokens):
                raise ValueError(f"span {start}..{end} in a sequence of {len(tokens)} tokens")
            inputs = tuple(tokens[: end - 1])
            prompt = prompts.setdefault(inputs, _Prompt(inputs, {}))
            wanted = [(position, tokens[position + 1]) for position in range(start - 1, end - 1)]
            prompt.logprobs.update(dict.fromkeys(wanted, 0.0))
            pairs.append((prompt, wanted))
        num_tokens = num_reused = 0
        for batch in self._split(list(prompts.values())):
            computed, reused = self._forward(batch, namespace)
            num_tokens += computed
            num_reused += reused
        sums = [sum(prompt.logprobs[pair] for pair in wanted) for prompt, wanted in pairs]
        spans_scores = [
            SpanScore(mean=total / (end - start), sum=total)
            for total, (start, end) in zip(sums, spans, strict=True)
        ]
        return Scores(spans_scores, num_tokens, num_reused)

    def _split(self, prompts: list[_Prompt]) -> Iterator[list[_Prompt]]:
        """Batches that fit the KV pool; decided by lengths alone, so the same for both signs."""
        batch: list[_Prompt] = []
        num_tokens = 0
        for prompt in prompts:
            length = len(prompt.tokens)
            if length > self.max_sequence_length:
                raise ConfigError(
                    f"a sequence of {length} tokens exceeds the {self.max_sequence_length} that "
                    "model.kv_tokens and the model's context allow; raise model.kv_tokens or "
                    "lower task.max_length"
                )
            if num_tokens + length > self._kv_tokens or len(batch) == MAX_BATCH_SEQUENCES:
                yield batch
                batch, num_tokens = [], 0
            batch.append(prompt)
            num_tokens += length
        if batch:
            yield batch

    def _forward(self, batch: list[_Prompt], namespace: str | None) -> tuple[int, int]:
        """Fill in the prompts' log-probabilities; return tokens computed and tokens reused."""
        self._activate()
        requests: list[Req] = []
        scored = False
        try:
            for prompt in batch:
                requests.append(self._request(prompt, namespace))
            num_reused = sum(len(request.prefix_indices) for request in requests)
            forward_batch = self._prepare(requests)
            rows, tokens = self._targets(batch, requests)
            with self._head.scoring(rows, tokens):
                output = self._runner.forward(forward_batch).logits_output
            values = iter(output.input_token_logprobs.tolist())
            scored = True
        finally:
            # Entries of a forward that failed must not be found later.
            keep = namespace is not None and scored
            for request in requests:
                self._release(request, keep)
        for prompt in batch:
            prompt.logprobs = {pair: next(values) for pair in prompt.logprobs}
        return sum(len(prompt.tokens) for prompt in batch) - num_reused, num_reused

    def _prepare(self, requests: list[Req]) -> ForwardBatch:
        """Allocate slots for the requests, and lay them out as one prefill batch."""
        schedule = ScheduleBatch.init_new(
            reqs=requests,
            req_to_token_pool=self._requests,
            token_to_kv_pool_allocator=self._allocator,
            tree_cache=self._cache,
            model_config=self._runner.model_config,
            enable_overlap=False,
            spec_algorithm=SpeculativeAlgorithm.NONE,
        )
        schedule.return_logprob = False  # the scoring head takes them itself
        schedule.prepare_for_extend()
        if schedule.input_ids is None:
            schedule.input_ids = schedule.prefill_input_ids_cpu.to(self.device)
        return ForwardBatch.init_new(schedule, self._runner, return_hidden_states_before_norm=False)

    def _targets(
        self, batch: list[_Prompt], requests: list[Req]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the flat batch that are scored, and the token to score at each (int64)."""
        rows, tokens = [], []
        first_row = 0
        for prompt, request in zip(batch, requests, strict=True):
            num_reused = len(request.prefix_indices)
            for position, token in prompt.logprobs:
                rows.append(first_row + position - num_reused)
                tokens.append(token)
            first_row += len(prompt.tokens) - num_reused
        return torch.tensor(rows, device=self.device), torch.tensor(tokens, device=self.device)

    def _request(self, prompt: _Prompt, namespace: str | None) -> Req:
        request = Req(
            rid=str(next(self._request_ids)),
            origin_input_text="",
            origin_input_ids=array("q", prompt.tokens),
            sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
            return_logprob=True,
            extra_key=namespace,
        )
        # A prefix may be reused up to the first scored position: that one needs its logits.
        request.logprob_start_len = min(position for position, _ in prompt.logprobs)
        request.init_next_round_input(None if namespace is None else self._cache)
        if request.last_node is not None:
            self._cache.inc_lock_ref(request.last_node)  # or making room could evict it
        request.set_extend_range(len(request.prefix_indices), len(prompt.tokens))
        return request

    def _release(self, request: Req, keep: bool) -> None:
        """Give a request's slots back, however far it came; keep its KV entries if asked."""
        num_tokens = len(request.origin_input_ids)
        if request.kv_committed_len:  # its KV slots were allocated
            self._cache.cache_finished_req(request, is_insert=keep, kv_len_to_handle=num_tokens)
        elif request.last_node is not None:
            self._cache.dec_lock_ref(request.last_node)
        if request.req_pool_idx is not None:
            self._requests.free(request)

    def _activate(self) -> None:
        """Make this engine's arguments the process's, if another engine ran last."""
        if Engine._active is not self:
            publish(self._server_args, role="scheduler")
            Engine._active = self

    def close(self) -> None:
        """Give the model's and the pools' memory back. The engine is of no use afterwards."""
        if Engine._active is self:
            Engine._active = None
        del self._runner, self._head, self._cache, self._allocator, self._requests
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def _single_process() -> ParallelState:
    """Coordinates of a runner that is alone: no tensor, pipeline or expert parallelism."""
    return ParallelState(
        tp_rank=0,
        tp_size=1,
        pp_rank=0,
        pp_size=1,
        dp_rank=None,
        dp_size=1,
        attn_tp_rank=0,
        attn_tp_size=1,
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
