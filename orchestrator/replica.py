"""A replica: one copy of the model on one engine, and how far along the ledger it stands.

A plain class: knows neither Ray nor what a loss is used for. Every call brings the updates that
the replica may be missing, so that a call's answer depends on nothing but its arguments.
"""

import importlib.metadata
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numba
import torch
from transformers import AutoTokenizer

from orchestrator import checkpoint, tasks
from orchestrator.batches import Batches
from orchestrator.config import Config, ConfigError
from orchestrator.encoder import Encoder, Encoding
from orchestrator.engine import Engine, Launched
from orchestrator.objectives import option_cross_entropy, token_cross_entropy
from orchestrator.records import ExampleScore, Probe, ProbeLoss, ReplicaInfo, Split, StepUpdate
from orchestrator.score_plan import ScorePlan, Scores, SpanScore
from orchestrator.spaces import SpacePlan

RECORDED_PACKAGES = ("sglang", "torch", "transformers", "ray", "numpy")

Adapters = tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's training examples, and how the engine is to score them."""

    examples: tuple[int, ...]
    encodings: list[Encoding]
    plans: dict[Adapters, ScorePlan]
    """By the adapters that they are scored under."""


class Replica:
    """Engine, space and task of one replica."""

    def __init__(self, config: Config, device: str) -> None:
        """Load everything. `device` is "cpu" or "cuda". Raises ConfigError for what is missing."""
        self._task = config.task
        self._folder = folder = checkpoint.locate(config.model.path)
        weights = checkpoint.Checkpoint(folder)
        plan = SpacePlan(config, weights)
        threads = config.fleet.threads_per_replica
        self.engine = Engine(
            str(folder),
            dtype=config.model.dtype,
            device=device,
            kv_tokens=config.model.kv_tokens,
            threads=threads,
            trust_remote_code=config.model.trust_remote_code,
            allow_fallback=config.model.allow_fallback,
            score_graphs=config.score_graphs,
            quantization=config.model.quantization,
            adapters=plan.adapters,
            prefixes=plan.prefixes,
        )
        self.space = plan.build(self.engine)
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        data = tasks.load(config.task)
        self._encoder = _encoder(config, folder, data)
        if self._encoder.longest > self.engine.max_sequence_length:
            raise ConfigError(
                f"task.max_length: a sequence has {self._encoder.longest} tokens; model.kv_tokens "
                f"and the model's context allow {self.engine.max_sequence_length}"
            )
        if self._encoder.longest * plan.rows_per_sequence > self.engine.kv_tokens:
            raise ConfigError(
                f"space.slots: {config.space.slots} times a sequence of {self._encoder.longest} "
                f"tokens does not fit into the KV pool's {self.engine.kv_tokens}; raise "
                "model.kv_tokens, or lower space.slots"
            )
        self._batches = Batches(config, len(data.train))
        self._latest: list[Batch] = []
        self._next_step = 0
        self.info = ReplicaInfo(
            model_class=type(self.engine.model).__name__,
            weights_hash=checkpoint.weights_hash(folder) + plan.initial_hash,
            data_hash=data.fingerprint(),
            num_parameters=self.space.num_parameters,
            device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
            versions=tuple((name, importlib.metadata.version(name)) for name in RECORDED_PACKAGES),
        )

    def evaluate(self, updates: Sequence[StepUpdate], probes: Sequence[Probe]) -> list[ProbeLoss]:
        """The probes' losses, at the state that the updates lead to."""
        self._catch_up(updates)
        if not probes:
            return []
        batch = self._batch(self._examples(probes))
        launches: dict[Adapters, list[Launched]] = {}
        order = []
        with closing(self.space.placed(probes)) as groups:
            for group in groups:
                adapters = tuple(placed.adapter for placed in group)
                plan = self._planned(batch, adapters)
                launches.setdefault(adapters, []).append(self.engine.launch(plan))
                order.append(adapters)
        # The device has all forwards by now; waiting for one before the next would leave it idle.
        # What it takes for them is time to plan the next step's batch.
        following = self._batch(self._batches.of(self._next_step + 1))
        for adapters in launches:
            self._planned(following, adapters)
        losses = {
            adapters: iter(self._losses(batch.encodings, batch.plans[adapters], launched))
            for adapters, launched in launches.items()
        }
        return [loss for adapters in order for loss in next(losses[adapters])]

    def score(
        self, updates: Sequence[StepUpdate], split: Split, examples: Sequence[int]
    ) -> list[ExampleScore]:
        """Option scores of examples under the trained state, unperturbed.

        Raises ConfigError for a task whose answers are generated: there is nothing to choose from.
        """
        if self._task.is_generated:
            raise ConfigError(
                f"task.metric: {self._task.metric}: answers cannot be generated yet; a task is "
                "evaluated by task.metric accuracy, with task.options"
            )
        self._catch_up(updates)
        self.space.settle()
        encodings = self._encoder.encode(split, examples)
        plan = self._plan(encodings, (self.space.adapter,))
        (scores,) = _by_option(encodings, self.engine.read(plan, [self.engine.launch(plan)])[0])
        return [
            ExampleScore(
                id=id,
                label=encoding.label,
                scores=means,
                prediction=max(range(len(means)), key=means.__getitem__),
                also_right=encoding.also_right,
            )
            for id, encoding, options in zip(examples, encodings, scores, strict=True)
            for means in [tuple(option.mean for option in options)]
        ]

    def digest(self, updates: Sequence[StepUpdate]) -> str:
        """Checksum of the trained state that the updates lead to."""
        self._catch_up(updates)
        return self.space.digest()

    def export(self, updates: Sequence[StepUpdate], folder: Path) -> None:
        """Write what the updates lead to where others can load it."""
        self._catch_up(updates)
        self.space.export(self._folder, folder)

    def close(self) -> None:
        """Give the engine's and the space's memory back."""
        del self.space  # it holds views of the model's parameters
        self.engine.close()

    def _catch_up(self, updates: Sequence[StepUpdate]) -> None:
        """Apply what is new; updates that were applied before are skipped."""
        for update in updates:
            if update.step < self._next_step:
                continue
            assert update.step == self._next_step, f"{update.step} after {self._next_step}"
            self.space.apply(update)
            self._next_step += 1

    def _examples(self, probes: Sequence[Probe]) -> tuple[int, ...]:
        """The examples that all probes of a step score."""
        for probe in probes:
            assert probe.step == self._next_step, f"{probe} at step {self._next_step}"
            assert probe.examples == probes[0].examples, "a step's probes score the same examples"
        return probes[0].examples

    def _batch(self, examples: tuple[int, ...]) -> Batch:
        """The batch of these training examples; of the last few, the same one again."""
        found = [batch for batch in self._latest if batch.examples == examples]
        batch = found[0] if found else Batch(examples, self._encoder.encode("train", examples), {})
        self._latest = [batch, *(other for other in self._latest if other is not batch)][:2]
        return batch

    def _planned(self, batch: Batch, adapters: Adapters) -> ScorePlan:
        """How the engine is to score a batch under adapters."""
        if adapters not in batch.plans:
            batch.plans[adapters] = self._plan(batch.encodings, adapters)
        return batch.plans[adapters]

    def _plan(self, encodings: Sequence[Encoding], adapters: Adapters) -> ScorePlan:
        return self.engine.plan(
            [sequence for encoding in encodings for sequence in encoding.sequences],
            [span for encoding in encodings for span in encoding.spans],
            adapters,
        )

    def _losses(
        self, encodings: Sequence[Encoding], plan: ScorePlan, launches: Sequence[Launched]
    ) -> list[list[ProbeLoss]]:
        """Per launch of a plan, the losses under each of its adapters."""
        return [
            [
                ProbeLoss(
                    batch_loss(self._task.loss, encodings, scores),
                    answer.num_tokens // len(plan.adapters),
                )
                for scores in _by_option(encodings, answer)
            ]
            for answer in self.engine.read(plan, launches)
        ]


def _by_option(encodings: Sequence[Encoding], scores: Scores) -> list[list[list[SpanScore]]]:
    """Scores per adapter, example and option."""
    spans = iter(scores.spans)
    num_spans = sum(len(encoding.spans) for encoding in encodings)
    return [
        [[next(spans) for _ in encoding.spans] for encoding in encodings]
        for _ in range(len(scores.spans) // num_spans)
    ]


def batch_loss(
    kind: str, encodings: Sequence[Encoding], scores: Sequence[Sequence[SpanScore]]
) -> float:
    """A batch's loss of the recipe's kind (task.loss), from its options' scores."""
    if kind == "lm":
        sums = [options[e.label].sum for e, options in zip(encodings, scores, strict=True)]
        lengths = [end - start for e in encodings for start, end in [e.spans[e.label]]]
        return token_cross_entropy(sums, lengths)
    values = [
        option_cross_entropy([option.mean for option in options], encoding.label)
        for options, encoding in zip(scores, encodings, strict=True)
    ]
    return sum(values) / len(values)


def _encoder(config: Config, folder: Path, data: tasks.TaskData) -> Encoder:
    tokenizer = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=config.model.trust_remote_code
    )

    def tokenize(texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(texts)["input_ids"]
        return ids

    return Encoder(
        data,
        tokenize,
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        max_length=config.task.max_length,
    )
