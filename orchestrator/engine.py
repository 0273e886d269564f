"""The engine: the only owner of a runner and its pools.

Loads a model, scores spans of token sequences, continues prompts, and gives every slot back. Knows
token ids and log-probabilities; knows nothing of text, options, losses, perturbations or Ray.
`dist_patch.apply()` must have run before this module is imported.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.server_args import ServerArgs
from torch import nn

from orchestrator.adapter_kernels import SegmentBackend
from orchestrator.adapters import AdapterPlan, AdapterSlots
from orchestrator.checkpoint import Checkpoint
from orchestrator.config import ConfigError
from orchestrator.contexts import Contexts
from orchestrator.generation import Generation
from orchestrator.pools import Pools
from orchestrator.prefix_slots import PrefixPlan, PrefixSlots, has_plain_entries
from orchestrator.runner import ALONE, Runner, World
from orchestrator.sampling import Continuation, Decode, Sampling
from orchestrator.score_graphs import TOKEN_STEP, ScoreGraphs, Shape
from orchestrator.score_plan import PlanBatch, Prompt, Row, ScorePlan, Scores
from orchestrator.scoring_head import ScoringHead

MAX_BATCH_SEQUENCES = 256
# Rows that a decoding graph is for. A step reads all weights, so padding costs next to nothing, and
# every graph costs start time.
DECODE_GRAPHS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, MAX_BATCH_SEQUENCES)
UNUSED = 0  # a token to score, where none is
# Their layers write the keys and values of a whole batch before they read any, so that a row may
# begin with another's.
SHARING_BACKENDS = (TritonAttnBackend, TorchNativeAttnBackend)
FALLBACK_CLASSES = "Transformers"  # how SGLang's names for transformers' own models begin


@dataclass(frozen=True, slots=True)
class Launched:
    """A plan's forwards, which the device may still be at; `Engine.read` waits for them."""

    logprobs: list[torch.Tensor]
    """Per batch, float32, in the order of rows and targets."""
    num_reused: int


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
        share_contexts: bool = True,
        load_format: str = "auto",
        quantization: str | None = None,
        adapters: AdapterPlan | None = None,
        prefixes: PrefixPlan | None = None,
        world: World = ALONE,
    ) -> None:
        """Load the model.

        `model_path` is a folder in Hugging Face's layout; `device` "cpu" or "cuda"; `kv_tokens`
        the size of the KV pool; `load_format` "auto", or "dummy" for random weights. On a GPU
        `cuda_graphs` captures SGLang's graphs at once, for `generate`, and `score_graphs` ours,
        each when its shape is first scored. With `share_contexts`, what sequences of a batch begin
        with alike is computed once, where the model's KV pool allows. `quantization` is as SGLang
        names it; `adapters` and `prefixes` are the slots to make room for.
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
            # Its replay runs no layer's hooks, by which a forward waits for weights on their way;
            # and whether there is one depends on the memory that is free at the start.
            disable_prefill_cuda_graph=True,
            cuda_graph_bs_decode=list(DECODE_GRAPHS),
            disable_overlap_schedule=True,
            max_total_tokens=kv_tokens + margin,
            quantization=quantization,
            max_running_requests=MAX_BATCH_SEQUENCES + (margin > 0),  # a graph's padding is one
            mem_fraction_static=0.9,  # the most that the KV pool may grow to with the weights
            page_size=1,
            enable_fp32_lm_head=True,
            random_seed=0,
            # Else an engine on a GPU would set, for child processes on CPUs too, one they lack.
            mm_feature_transport="cpu",
            **(adapters.server_arguments(on_cpu) if adapters else {}),
        )
        model_config = ModelConfig.from_server_args(arguments)
        if not allow_fallback:
            _require_native(model_config)
        if load_format == "auto" and Path(model_path).is_dir():
            Checkpoint(Path(model_path))  # refuses damaged files by name, which SGLang does not
        self._runner = Runner(arguments, model_config, world, threads)
        runner = self._runner.model_runner
        room = int(runner.max_total_num_tokens) - margin
        if room < kv_tokens:  # batches, and so losses, would depend on the memory that was free
            self._runner.close()
            raise ConfigError(
                f"model.kv_tokens: {kv_tokens} do not fit beside the model, there is room for "
                f"{max(0, room)}; lower it"
            )
        self.slots: AdapterSlots | None = None
        if adapters is not None:
            self.slots = AdapterSlots(runner, adapters, world.rank)
        self.prefixes: PrefixSlots | None = None
        if prefixes is not None:  # of the KV pool, before batches are told what it holds
            self.prefixes = PrefixSlots(runner, prefixes, world.rank, world.size)
        self._head = ScoringHead(self.model.logits_processor)
        self.model.logits_processor = self._head
        self._pools = Pools(runner, self.prefixes, margin)
        self._contexts = Contexts(self._pools, self._runner.forward)
        self._graphs = self._make_graphs() if score_graphs and not on_cpu else None
        self._can_share = (
            share_contexts
            and type(runner.attn_backend) in SHARING_BACKENDS
            and has_plain_entries(runner.token_to_kv_pool)
        )

    def _make_graphs(self) -> ScoreGraphs | None:
        """Prepared forwards for scoring, where the model's is one that graphs can hold."""
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
        return int(min(context, self.kv_tokens))

    @property
    def kv_tokens(self) -> int:
        """Size of the KV pool, in tokens, without the entries of prefix slots."""
        return self._pools.kv_tokens

    @property
    def num_evicted(self) -> int:
        """Tokens whose kept KV entries have had to make room, so far."""
        return self._pools.cache.num_evicted

    def free_slots(self) -> tuple[int, int]:
        """KV slots (tokens) and request slots that are free or held by evictable entries."""
        return self._pools.free()

    @property
    def eos_tokens(self) -> frozenset[int]:
        """The tokens that the model's own configuration ends a text with."""
        return frozenset(self._runner.model_runner.model_config.hf_eos_token_id or ())

    @torch.no_grad()
    def score(
        self,
        sequences: Sequence[Sequence[int]],
        spans: Sequence[tuple[int, int]],
        namespace: str | None = None,
        adapters: Sequence[str | None] = (None,),
        contexts: Sequence[int] | None = None,
        base: str | None = None,
    ) -> Scores:
        """Log-probability of tokens start..end of each sequence, given what stands before them.

        All sequences are scored under each of the `adapters` (names of slots, or None); the spans
        of the answer are those of the first adapter, then those of the second, and so on. A batch
        holds the same sequences under all adapters, so that none is computed in other shapes than
        another.

        The last token of a span is only a target, never an input: sequences that differ in no
        other token go through the model once. With a `namespace`, KV entries are looked up and
        kept under that name; it must stand for one state of the weights. Without one, and under
        prefix slots, nothing is looked up and nothing stays.

        `contexts` are how many tokens of each sequence are computed without any adapter, as in
        activated LoRA (Greenewald et al. 2025). Their KV entries serve all adapters, and are
        looked up and kept if `base` names the state of the weights beside the adapters; what
        follows them is never kept.

        Raises ValueError for a span that does not fit its sequence, or begins right behind its
        context; ConfigError for a sequence that, times the adapters, is longer than the KV pool.
        """
        plan = self.plan(sequences, spans, adapters, contexts)
        return self.read(plan, [self.launch(plan, namespace, base)])[0]

    def plan(
        self,
        sequences: Sequence[Sequence[int]],
        spans: Sequence[tuple[int, int]],
        adapters: Sequence[str | None] = (None,),
        contexts: Sequence[int] | None = None,
        *,
        sharing: bool = True,
    ) -> ScorePlan:
        """Lay out a call of `score`, to be launched any number of times. Raises what that does.

        Without `sharing`, or where the engine cannot share, every prompt is computed whole, but
        for its context.
        """
        plan = ScorePlan(sequences, spans, adapters, contexts, sharing=sharing and self._can_share)
        plan.split(list(self._split(plan.prompts, len(adapters))))
        return plan

    @torch.no_grad()
    def launch(
        self, plan: ScorePlan, namespace: str | None = None, base: str | None = None
    ) -> Launched:
        """Start a plan's forwards under the weights of now, without waiting for the device."""
        self._runner.activate()
        logprobs, num_reused = [], 0
        for batch in plan.batches:
            values = None
            if namespace is None and not plan.has_contexts:
                values = self._replayed(batch)
            if values is None:
                values, reused = self._forward(batch.rows, namespace, base)
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
    def last_hidden(
        self,
        sequences: Sequence[Sequence[int]],
        adapter: str | None = None,
        contexts: Sequence[int] | None = None,
        base: str | None = None,
    ) -> torch.Tensor:
        """The final hidden state, behind the final norm, at each sequence's last token.

        float32 [sequences, hidden size], on the CPU. `contexts` and their `base` are as in `score`;
        beside them nothing is looked up or kept. Raises ValueError for a sequence of no tokens, or
        of none behind its context; ConfigError for one that does not fit the KV pool.
        """
        if not sequences or not all(sequences):
            raise ValueError("a sequence has no tokens, or there is none")
        contexts = contexts or [0] * len(sequences)
        _require_behind(sequences, contexts)
        self._runner.activate()
        prompts = [
            Prompt(tuple(tokens), context, targets={(len(tokens) - 1, UNUSED): None})
            for tokens, context in zip(sequences, contexts, strict=True)
        ]
        shown = []
        for batch in self._split(prompts, num_copies=1):
            rows = [Row(adapter, prompts[index]) for index in batch]
            shown.append(self._forward(rows, None, base, hidden=True)[0].cpu())
        return torch.cat(shown)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        adapters: Sequence[str | None] = (None,),
        seeds: Sequence[int] | None = None,
        decode: Decode | None = None,
        namespace: str | None = None,
        contexts: Sequence[int] | None = None,
        base: str | None = None,
    ) -> list[Continuation]:
        """Continue each prompt, under each of the `adapters`, by greedy or drawn tokens.

        The answer has the first adapter's continuations, then those of the second, and so on. A
        prompt may be asked several times, for several samples: it is computed once an adapter.
        `decode` gives text, and is needed for stop strings. With a `namespace`, KV entries are
        looked up and kept under that name, as by `score`; without one nothing stays. `contexts` of
        prompts, and their `base`, are as in `score`.

        With a temperature, `seeds` has an integer in [0, 2**64) a prompt, the same under all
        adapters: both signs of a pair draw by the same numbers, and samples of one prompt need
        seeds of their own. The number that draws a row's token t is a pure function of its seed
        and t, so what is drawn does not depend on what else is in the call, nor on the pool's
        size. Logits may, in their last bits, since kernels add in other orders for batches of
        other shapes, and a branch's first token is computed by other kernels than a step: where
        two tokens are as good as equally likely, or a number falls between two to that precision,
        another may be taken, and all after it differ.

        Raises ValueError for an empty prompt and for what is missing, ConfigError for a prompt
        that, with its new tokens, does not fit the KV pool or the model's context.
        """
        if not all(prompts):
            raise ValueError("a prompt has no tokens")
        if sampling.stop_strings and decode is None:
            raise ValueError("stop strings need a decode")
        if seeds is None:
            if sampling.temperature > 0:
                raise ValueError("a temperature needs seeds")
            seeds = [0] * len(prompts)
        self._require_fit(max(map(len, prompts), default=0) + sampling.max_new_tokens)
        contexts = contexts or [0] * len(prompts)
        _require_behind(prompts, contexts)
        self._runner.activate()
        generation = Generation(
            self._pools, self._runner.forward, sampling, decode, namespace, self._contexts, base
        )
        return generation.run(prompts, adapters, seeds, contexts)

    def _split(self, prompts: Sequence[Prompt], num_copies: int) -> Iterator[range]:
        """Batches of which so many copies fit the pools, with each context once.

        Decided by the plan alone, never by what is in the cache.
        """
        if num_copies > self._pools.max_sequences:
            raise ConfigError(
                f"space.slots: {num_copies} sequences at a time are more than the engine's "
                f"{self._pools.max_sequences}; lower space.slots"
            )
        first = num_tokens = 0
        contexts: set[tuple[int, ...]] = set()
        for index, prompt in enumerate(prompts):
            length = len(prompt.tokens)
            self._require_fit(length, num_copies, prompt.context)
            needed = (length - prompt.begun) * num_copies
            if prompt.before not in contexts:
                needed += prompt.context
            is_full = (index - first + 1) * num_copies > self._pools.max_sequences
            if index > first and (is_full or num_tokens + needed > self.kv_tokens):
                yield range(first, index)
                first, num_tokens, contexts = index, 0, set()
                needed = prompt.context + (length - prompt.context) * num_copies
            num_tokens += needed
            contexts.add(prompt.before)
        if first < len(prompts):
            yield range(first, len(prompts))

    def _require_fit(self, length: int, num_copies: int = 1, context: int = 0) -> None:
        """Refuse a sequence that could never be computed, so many times behind its context."""
        needed = context + (length - context) * num_copies
        if length > self.max_sequence_length or needed > self.kv_tokens:
            times = f", {num_copies} times over," if num_copies > 1 else ""
            raise ConfigError(
                f"a sequence of {length} tokens{times} exceeds the {self.max_sequence_length} "
                "that model.kv_tokens and the model's context allow; raise model.kv_tokens or "
                "lower task.max_length"
            )

    def _forward(
        self,
        rows: Sequence[Row],
        namespace: str | None,
        base: str | None,
        *,
        hidden: bool = False,
    ) -> tuple[torch.Tensor, int]:
        """The rows' targets' log-probabilities, or the hidden states that these are computed from,
        and the tokens that the cache has spared."""
        contexts = [row.prompt.before for row in rows if row.prompt.context]
        with self._contexts.held(contexts, base) as (entries, num_found):
            values, num_reused = self._behind(rows, entries, namespace, hidden=hidden)
        return values, num_reused + num_found

    def _behind(
        self,
        rows: Sequence[Row],
        entries: Mapping[tuple[int, ...], torch.Tensor],
        namespace: str | None,
        *,
        hidden: bool,
    ) -> tuple[torch.Tensor, int]:
        """The same, where the contexts' entries are there already."""
        requests: list[Req] = []
        adapters = [row.adapter for row in rows]
        scored = False
        try:
            for row in rows:
                requests.append(self._requested(row, entries, namespace))
            shared = [row.prompt.shared for row in rows]
            taken = self._pools.follow(requests, adapters, shared)
            schedule = self._pools.schedule(requests)
            self._pools.share(requests, taken)
            begun = [
                self._pools.num_begun(adapter, request)
                for adapter, request in zip(adapters, requests, strict=True)
            ]
            forward_batch = self._pools.forward_batch(schedule)
            positions, tokens = self._targets(rows, begun)
            head = self._head
            with head.showing(positions) if hidden else head.scoring(positions, tokens):
                output = self._runner.forward(forward_batch)
            scored = True
        finally:
            # Entries of a forward that failed must not be found later.
            keep = namespace is not None and scored
            for row, request in zip(rows, requests, strict=False):
                is_own = not row.prompt.context and self._pools.prefix(row.adapter) is None
                self._pools.release(request, keep and is_own)
        values = output.hidden_states if hidden else output.input_token_logprobs
        return values, sum(begun) - sum(row.prompt.begun for row in rows)

    def _requested(
        self,
        row: Row,
        entries: Mapping[tuple[int, ...], torch.Tensor],
        namespace: str | None,
    ) -> Req:
        prompt = row.prompt
        if prompt.context:
            return self._pools.branch(prompt.tokens, entries[prompt.before], row.adapter)
        # A prefix may be reused up to the first scored position, which needs its logits.
        return self._pools.request(prompt.tokens, namespace, prompt.first_scored, row.adapter)

    def _replayed(self, batch: PlanBatch) -> torch.Tensor | None:
        """The batch's log-probabilities, without the KV pool; None where they need it."""
        if self._graphs is None or any(
            self._pools.prefix(row.adapter) is not None for row in batch.rows
        ):
            return None
        return self._graphs.run(batch)

    @contextmanager
    def _dummy_batch(self, shape: Shape) -> Iterator[ForwardBatch]:
        """A batch of sequences of these lengths, whose KV slots are its own while it is lent."""
        adapter = self.slots.names[0] if self.slots else None
        requests: list[Req] = []
        try:
            for length in shape.lengths:
                requests.append(self._pools.request([0] * length, None, length - 1, adapter))
            yield self._pools.forward_batch(self._pools.schedule(requests))
        finally:
            for request in requests:
                self._pools.release(request, keep=False)

    def _targets(
        self, rows: Sequence[Row], begun: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Flat positions of the batch that are scored, and the token to score at each (int64).

        `begun` is how many of a row's first tokens are computed elsewhere.
        """
        positions, tokens = [], []
        start = 0
        for row, num_begun in zip(rows, begun, strict=True):
            for position, token in row.prompt.targets:
                positions.append(start + position - num_begun)
                tokens.append(token)
            start += len(row.prompt.tokens) - num_begun
        return torch.tensor(positions, device=self.device), torch.tensor(tokens, device=self.device)

    def close(self) -> None:
        """Give the model's and the pools' memory back. The engine is of no use afterwards."""
        if self._is_closed:
            return
        self._is_closed = True
        self.slots = self.prefixes = None  # they hold views of the runner's pools
        self._graphs = None  # they hold memory of the model's forward
        del self._head, self._pools, self._contexts
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


def _require_behind(prompts: Sequence[Sequence[int]], contexts: Sequence[int]) -> None:
    """Refuse contexts that leave nothing of their prompts to an adapter."""
    for prompt, context in zip(prompts, contexts, strict=True):
        if not 0 <= context < len(prompt):
            raise ValueError(f"a prompt of {len(prompt)} tokens, a context of {context}")
