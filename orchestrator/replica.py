"""A replica: one copy of the model on one engine, and how far along the ledger it stands.

A plain class: knows neither Ray nor what a loss is used for. Every call brings the updates that
the replica may be missing, so that a call's answer depends on nothing but its arguments.
"""

import importlib.metadata
import math
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from orchestrator import answers, cache_check, checkpoint, noise, snapshot_folder, tasks
from orchestrator.batches import Batches
from orchestrator.config import Config, ConfigError
from orchestrator.encoder import Encoder, Encoding, Prompt
from orchestrator.engine import Engine, Launched
from orchestrator.losses import answer_loss, by_option, probe_loss
from orchestrator.objectives import calibrated as without_prior
from orchestrator.objectives import option_accuracy
from orchestrator.pieces import Pieces
from orchestrator.records import (
    ChunkScores,
    ExampleScore,
    Probe,
    ProbeLoss,
    ReplicaInfo,
    Split,
    StepUpdate,
)
from orchestrator.rewards import Judged, RewardPool
from orchestrator.runner import ALONE, World
from orchestrator.sampling import Continuation, Sampling, remembering
from orchestrator.score_plan import ScorePlan, SpanScore
from orchestrator.snapshots import Snapshots
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

    def __init__(
        self, config: Config, device: str, world: World = ALONE, marks: bytes = b""
    ) -> None:
        """Load everything. `device` is "cpu" or "cuda". Raises ConfigError for what is missing.

        With a `world` of several ranks this is one rank's part of the replica: all ranks get the
        same calls, and rank 0's answers count. `marks` are of updates that are there already, see
        records.UpdateLog: the replica then starts from the newest snapshot that it finds of them,
        see `num_applied`.
        """
        self._task, self._run_seed = config.task, config.run.seed
        self._folder = folder = checkpoint.locate(config.model.path)
        weights = checkpoint.Checkpoint(folder)
        self._data = data = tasks.load(config.task)
        self._tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=config.model.trust_remote_code
        )
        self._text = remembering(self._decode)
        self._is_activated = config.space.activation == "suffix"
        self._encoder = Encoder(
            data,
            self._tokenize,
            bos=self._tokenizer.bos_token_id,
            eos=self._tokenizer.eos_token_id,
            max_length=config.task.max_length,
            is_activated=self._is_activated,
        )
        plan = SpacePlan(config, weights, self._encoder.invocation)
        threads = config.fleet.threads_per_replica
        self.engine = Engine(
            str(folder),
            dtype=config.model.dtype,
            device=device,
            kv_tokens=config.model.kv_tokens,
            threads=threads,
            trust_remote_code=config.model.trust_remote_code,
            allow_fallback=config.model.allow_fallback,
            cuda_graphs=config.task.is_generated,
            score_graphs=config.score_graphs,
            share_contexts=config.model.share_contexts,
            quantization=config.model.quantization,
            adapters=plan.adapters,
            prefixes=plan.prefixes,
            world=world,
        )
        self.space = plan.build(self.engine)
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        self._require_fit(config, plan.rows_per_sequence)
        # Judged once: what a function of the user's says, and how long it takes, may differ.
        reward = config.task.reward if world.rank == 0 else None
        self._rewards = RewardPool(reward) if reward else None
        self.pieces = Pieces(config, data.contexts)
        self._batches = Batches(config, len(data.train), data.groups, self.pieces)
        self._verify_every = config.run.verify_cache
        self._num_probes = 0
        self._latest: list[Batch] = []
        self._trains_weights = config.space.kind in ("dense", "low_rank")
        self._weights_hash = checkpoint.weights_hash(folder)
        self.info = ReplicaInfo(
            model_class=type(self.engine.model).__name__,
            weights_hash=self._weights_hash + plan.initial_hash,
            data_hash=data.fingerprint(),
            num_parameters=self.space.num_parameters,
            device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
            versions=(
                *((name, importlib.metadata.version(name)) for name in RECORDED_PACKAGES),
                ("tokens", self._encoder.fingerprint),
                (checkpoint.CONFIG, checkpoint.config_hash(folder)),
            ),
        )
        self._snapshots: Snapshots | None = None
        self._next_step = 0
        if config.run.snapshot_every and config.run.dir is not None:
            folder = Path(config.run.dir) / snapshot_folder.FOLDER
            self._snapshots = Snapshots(folder, self.info.weights_hash, config.meaning())
            self._next_step = self._snapshots.restore(self.space, marks)

    @property
    def num_applied(self) -> int:
        """Updates, from the first on, that have led to the state of now."""
        return self._next_step

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(texts)["input_ids"]
        return ids

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _require_fit(self, config: Config, rows_per_sequence: int) -> None:
        """Refuse a task whose longest sequence the KV pool does not hold."""
        longest = self._encoder.longest
        if config.task.is_generated:
            longest = max(longest, self._encoder.longest_continued(config.task.max_new_tokens))
        if longest > self.engine.max_sequence_length:
            raise ConfigError(
                f"task.max_length: a sequence has {longest} tokens; model.kv_tokens "
                f"and the model's context allow {self.engine.max_sequence_length}"
            )
        if self._encoder.room(rows_per_sequence) > self.engine.kv_tokens:
            raise ConfigError(
                f"space.slots: {config.space.slots} times a sequence of {self._encoder.longest} "
                f"tokens does not fit into the KV pool's {self.engine.kv_tokens}; raise "
                "model.kv_tokens, or lower space.slots"
            )

    def evaluate(self, updates: Sequence[StepUpdate], probes: Sequence[Probe]) -> list[ProbeLoss]:
        """The probes' losses, at the state that the updates lead to."""
        self._catch_up(updates)
        if not probes:
            return []
        examples = self._examples(probes)
        if self._task.objective not in ("loss", "accuracy"):
            return self._answer_losses(examples, probes)
        batch = self._batch(examples)
        launches: dict[Adapters, list[Launched]] = {}
        order = []
        with closing(self.space.placed(probes)) as groups:
            for group in groups:
                adapters = tuple(placed.adapter for placed in group)
                plan = self._planned(batch, adapters)
                launched = self.engine.launch(plan, base=self._base)
                launches.setdefault(adapters, []).append(launched)
                order.append(adapters)
                if self._is_verified(len(group)):
                    (scores,) = self.engine.read(plan, [launched])
                    sequences, spans, contexts = _sequences(batch.encodings)
                    cache_check.verify(self.engine, sequences, spans, adapters, scores, contexts)
        # The device has all forwards by now; waiting for one before the next would leave it idle.
        # What it takes for them is time to plan what is likely to be asked at the next step.
        following = self.pieces.counterpart(examples, self._batches.of(self._next_step + 1))
        for adapters in launches if following else ():
            self._planned(self._batch(following), adapters)
        losses = {
            adapters: iter(self._losses(batch.encodings, batch.plans[adapters], launched))
            for adapters, launched in launches.items()
        }
        return [loss for adapters in order for loss in next(losses[adapters])]

    def _answer_losses(self, examples: Sequence[int], probes: Sequence[Probe]) -> list[ProbeLoss]:
        """Minus the mean worth of what is generated under each probe.

        Not finite where the logits of an answer were not.
        """
        reward = self._task.reward if self._task.objective == "reward" else None
        number = reward.samples if reward else 1
        ids = [id for id in examples for _ in range(number)]
        prompts = [prompt for prompt in self._prompts("train", examples) for _ in range(number)]
        temperature = reward.temperature if reward else 0.0
        seeds = noise.sample_seeds(self._run_seed, self._next_step, examples, number)
        losses = []
        with closing(self.space.placed(probes)) as groups:
            for group in groups:
                adapters = [placed.adapter for placed in group]
                found = self._continued(prompts, adapters, temperature=temperature, seeds=seeds)
                judged = self._judged(self._task.objective, "train", ids * len(group), found)
                for first in range(0, len(found), len(ids)):
                    own = slice(first, first + len(ids))
                    num_tokens = _num_tokens(prompts, found[own])
                    losses.append(answer_loss(found[own], judged[own], number, num_tokens))
        return losses

    def score(
        self,
        updates: Sequence[StepUpdate],
        split: Split,
        examples: Sequence[int],
        calibrated: bool = False,
    ) -> ChunkScores:
        """What the model chooses or writes under the trained state, unperturbed, and its worth.

        `calibrated` is of options alone, and of splits that are held out.
        """
        self._catch_up(updates)
        self.space.settle()
        if self._task.is_generated:
            return self._written(split, examples)
        return self._chosen(split, examples, calibrated)

    def _chosen(self, split: Split, examples: Sequence[int], calibrated: bool) -> ChunkScores:
        """The best-scored options."""
        encodings = self._encoder.encode(split, examples)
        options, num_tokens, num_reused = self._scored(encodings, self._namespace)
        values = [tuple(option.mean for option in of_example) for of_example in options]
        if calibrated:
            others, more_tokens, _ = self._scored(self._encoder.unconditional(split, examples))
            num_tokens += more_tokens
            values = [
                tuple(without_prior([given.sum for given in row], [alone.sum for alone in other]))
                for row, other in zip(options, others, strict=True)
            ]
        scores = [
            _choice(id, encoding, row)
            for id, encoding, row in zip(examples, encodings, values, strict=True)
        ]
        return ChunkScores(tuple(scores), num_tokens, num_reused)

    def linear_probe(self, updates: Sequence[StepUpdate]) -> list[ExampleScore]:
        """What a logistic regression on the trained state's final hidden states chooses.

        Fitted here, to the training rows' states at their prompts' last tokens, so that no state
        crosses processes. For tasks that `linear_probe.check` lets pass.
        """
        from orchestrator import linear_probe  # scikit-learn takes seconds to import

        self._catch_up(updates)
        self.space.settle()
        train = self._encoder.encode("train", range(len(self._data.train)))
        test = self._encoder.encode("test", range(len(self._data.test)))
        scores = linear_probe.fitted_scores(
            self._hidden(train), [each.label for each in train], self._hidden(test)
        ).tolist()
        return [
            _choice(id, encoding, tuple(row))
            for id, (encoding, row) in enumerate(zip(test, scores, strict=True))
        ]

    def _hidden(self, encodings: Sequence[Encoding]) -> NDArray[np.float32]:
        """Final hidden states at the prompts' last tokens: [examples, hidden size]."""
        prompts = [encoding.sequences[0][: encoding.spans[0][0]] for encoding in encodings]
        contexts = [encoding.context for encoding in encodings]
        shown = self.engine.last_hidden(prompts, self.space.adapter, contexts, self._base)
        states: NDArray[np.float32] = shown.numpy()
        return states

    def _scored(
        self, encodings: Sequence[Encoding], namespace: str | None = None
    ) -> tuple[list[list[SpanScore]], int, int]:
        """Scores of all options under the trained state; tokens that were computed, and reused."""
        plan = self._plan(encodings, (self.space.adapter,))
        launched = self.engine.launch(plan, namespace, self._base)
        (answer,) = self.engine.read(plan, [launched])
        (scores,) = by_option(encodings, answer)
        return scores, answer.num_tokens, answer.num_asked - answer.num_tokens

    @property
    def _namespace(self) -> str | None:
        """Stands for the trained state of now, where chunks of examples have much in common.

        None where the task has no demonstrations: what is left to share is in the same batch; and
        where they are part of the base's contexts.
        """
        is_used = self._task.demonstrations and not self._is_activated
        return f"{self._base}, trained for {self._next_step}" if is_used else None

    @property
    def _base(self) -> str:
        """Stands for the weights of now beside any adapter.

        Updates of an adapter or a prefix leave them as they are.
        """
        num_steps = self._next_step if self._trains_weights else 0
        return f"{self._weights_hash} after {num_steps} steps"

    def _warmed(self, prompts: Sequence[Sequence[int]]) -> int:
        """Put in the cache what all prompts begin with; the tokens that it took.

        Prompts that are continued do not share with each other in their batch.
        """
        shared = os.path.commonprefix([list(tokens) for tokens in prompts])
        if self._namespace is None or not shared:
            return 0
        size = len(shared)
        own = (self.space.adapter,)
        answer = self.engine.score([[*shared, 0]], [(size, size + 1)], self._namespace, own)
        return answer.num_tokens

    def _written(self, split: Split, examples: Sequence[int]) -> ChunkScores:
        """Answers that are generated, the most likely token at a time."""
        prompts = self._prompts(split, examples)
        num_warm = self._warmed([prompt.tokens for prompt in prompts])
        found = self._continued(prompts, (self.space.adapter,), self._namespace)
        judged = self._judged(self._task.metric, split, examples, found)
        scores = [
            ExampleScore(id, worth.value, answer=self._answer(each), failure=worth.failure)
            for id, each, worth in zip(examples, found, judged, strict=True)
        ]
        num_reused = sum(each.num_reused for each in found)
        num_tokens = _num_tokens(prompts, found)
        return ChunkScores(tuple(scores), num_tokens + num_warm, num_reused)

    def _prompts(self, split: Split, examples: Sequence[int]) -> list[Prompt]:
        return self._encoder.prompts(split, examples, self._task.max_new_tokens)

    def _continued(
        self,
        prompts: Sequence[Prompt],
        adapters: Sequence[str | None],
        namespace: str | None = None,
        *,
        temperature: float = 0.0,
        seeds: Sequence[int] | None = None,
    ) -> list[Continuation]:
        """Continuations under the first adapter, then those under the second, and so on; drawn by
        a seed a prompt where there is a temperature."""
        ends = {self._tokenizer.eos_token_id} - {None} | self.engine.eos_tokens
        sampling = Sampling(
            self._task.max_new_tokens,
            temperature,
            stop_tokens=frozenset(ends),
            stop_strings=tuple(self._task.stop),
        )
        return self.engine.generate(
            [prompt.tokens for prompt in prompts],
            sampling,
            adapters=adapters,
            seeds=seeds,
            decode=self._text,
            namespace=namespace,
            contexts=[prompt.context for prompt in prompts],
            base=self._base,
        )

    def _answer(self, continuation: Continuation) -> str:
        assert continuation.text is not None  # a decode was handed in
        return answers.cut(continuation.text, self._task.stop)

    def _judged(
        self, metric: str, split: Split, ids: Sequence[int], found: Sequence[Continuation]
    ) -> list[Judged]:
        """What a metric gives for generated answers to these examples."""
        texts = [self._answer(each) for each in found]
        examples = [self._data.split(split)[id] for id in ids]
        if metric != "reward":
            worth = answers.METRICS[metric]
            pairs = zip(texts, examples, strict=True)
            return [Judged(worth(text, example.answers)) for text, example in pairs]
        if self._rewards is None:  # rank 0 judges
            return [Judged(math.nan) for _ in texts]
        rows = [example.row or {} for example in examples]
        return self._rewards.judge(list(zip(rows, texts, strict=True)))

    def digest(self, updates: Sequence[StepUpdate]) -> str:
        """Checksum of the trained state that the updates lead to."""
        self._catch_up(updates)
        return self.space.digest()

    def snapshot(self, updates: Sequence[StepUpdate], mark: bytes, digest: str) -> str:
        """Write down what the updates lead to. `mark` is theirs; `digest` is the replicas' own.

        Returns what is wrong where it cannot be written, else nothing.
        """
        self._catch_up(updates)
        if self._snapshots is None:
            return ""
        try:
            self._snapshots.write(self.space, self._next_step, mark, digest)
        except OSError as error:
            return f"{self._snapshots.folder}: no snapshot can be written: {error.strerror}"
        return ""

    def export(self, updates: Sequence[StepUpdate], folder: Path) -> None:
        """Write what the updates lead to where others can load it."""
        self._catch_up(updates)
        self.space.export(self._folder, folder)

    def close(self) -> None:
        """Give the engine's and the space's memory back, and end the reward's processes."""
        if self._rewards is not None:
            self._rewards.close()
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
        """The batch of these training examples; of this step's and the next, the same one again."""
        found = [batch for batch in self._latest if batch.examples == examples]
        batch = found[0] if found else Batch(examples, self._encoder.encode("train", examples), {})
        self._latest = [batch, *(other for other in self._latest if other is not batch)]
        del self._latest[2 * self.pieces.number :]
        return batch

    def _planned(self, batch: Batch, adapters: Adapters) -> ScorePlan:
        """How the engine is to score a batch under adapters."""
        if adapters not in batch.plans:
            batch.plans[adapters] = self._plan(batch.encodings, adapters)
        return batch.plans[adapters]

    def _plan(self, encodings: Sequence[Encoding], adapters: Adapters) -> ScorePlan:
        sequences, spans, contexts = _sequences(encodings)
        return self.engine.plan(sequences, spans, adapters, contexts)

    def _is_verified(self, num_probes: int) -> bool:
        """Whether one of the next so many probes is to be computed again without reuse."""
        every, before = self._verify_every, self._num_probes
        self._num_probes += num_probes
        return every > 0 and self._num_probes // every > before // every

    def _losses(
        self, encodings: Sequence[Encoding], plan: ScorePlan, launches: Sequence[Launched]
    ) -> list[list[ProbeLoss]]:
        """Per launch of a plan, the losses under each of its adapters."""
        task = self._task
        kind = task.loss if task.objective == "loss" else task.objective
        return [
            [
                probe_loss(kind, encodings, scores, answer, len(plan.adapters))
                for scores in by_option(encodings, answer)
            ]
            for answer in self.engine.read(plan, launches)
        ]


def _choice(id: int, encoding: Encoding, scores: tuple[float, ...]) -> ExampleScore:
    """The best-scored option of an example, and whether it is right."""
    return ExampleScore(
        id=id,
        # what is not finite chooses nothing
        value=float(option_accuracy(scores, (encoding.label, *encoding.also_right)) == 1),
        label=encoding.label,
        also_right=encoding.also_right,
        scores=scores,
        prediction=max(range(len(scores)), key=scores.__getitem__),
    )


def _num_tokens(prompts: Sequence[Prompt], found: Sequence[Continuation]) -> int:
    """Of prompts and of all that follows them, under every adapter, but for what was reused."""
    num_copies = len(found) // len(prompts)
    num_asked = num_copies * sum(len(prompt.tokens) for prompt in prompts)
    return num_asked + sum(len(each.tokens) - each.num_reused for each in found)


def _sequences(
    encodings: Sequence[Encoding],
) -> tuple[list[tuple[int, ...]], list[tuple[int, int]], list[int]]:
    """What the engine scores for them: sequences, and a span and a context in each."""
    return (
        [sequence for encoding in encodings for sequence in encoding.sequences],
        [span for encoding in encodings for span in encoding.spans],
        [encoding.context for encoding in encodings for _ in encoding.sequences],
    )
