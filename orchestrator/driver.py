"""The loop. Reads like the algorithm's box in the paper (MeZO, Malladi et al. 2023, Algorithm 1),
with the perturbations spread over a fleet and the update written down before it is applied.

Knows no ray, no sglang, no tensors: only seeds, scalars and ids.
"""

import hashlib
import math
import time
from collections import Counter
from collections.abc import Sequence

from orchestrator import estimator, noise_floor, run_log
from orchestrator.batches import Batches
from orchestrator.config import Config
from orchestrator.evaluate import measured, scores_of
from orchestrator.metrics import Evaluation, KvUse, Observer, StepMetrics
from orchestrator.records import FAILURES, Fleet, FleetError, ProbeLoss, Split
from orchestrator.seed_sync import Ledger, StepRecord


class Driver:
    """Takes a run from where its ledger ends to its last step."""

    def __init__(
        self,
        config: Config,
        fleet: Fleet,
        ledger: Ledger,
        observers: Sequence[Observer],
        *,
        batches: Batches,
        num_test: int,
        num_dev: int = 0,
    ) -> None:
        """`fleet` is started; it has none of the ledger's updates, or some of the first."""
        self._config = config
        self._fleet = fleet
        self._ledger = ledger
        self._observers = observers
        self._batches = batches
        self._num_held_out: dict[Split, int] = {"test": num_test, "dev": num_dev}
        self._past = estimator.NO_PAST
        self._loss_noise: float | None = None
        for record in ledger.records:
            fleet.apply(record.update())
            if record.step >= ledger.header.config_since:  # earlier steps had other settings
                self._past = self._followed(record)

    def train(self) -> None:
        """All steps that are missing, with looks at dev rows, or else test rows, on the way."""
        run, first = self._config.run, self._ledger.next_step
        if first < run.steps:
            examples = self._batches.of(first)
            self._loss_noise = noise_floor.measure(self._config, self._fleet, first, examples)
        for step in range(first, run.steps):
            self.step(step)
            done = step + 1
            is_kept = run.snapshot_every and done % run.snapshot_every == 0
            if is_kept or (run.check_every and done % run.check_every == 0):
                digest = self.check_digests()
                if is_kept:  # a state on which all replicas agree
                    self._fleet.snapshot(digest)
            if run.eval_every and done % run.eval_every == 0 and done < run.steps:
                self.look(done)

    def step(self, step: int) -> None:
        """Plan, evaluate, estimate, write down, apply."""
        started = time.monotonic()
        run_log.note(step=step)
        run = self._config.run
        settings = estimator.at_step(self._config.estimator, step, run.steps)
        examples = self._batches.of(step)
        seeds = estimator.seeds(run.seed, step, settings.num_seeds)
        probes = estimator.probes(settings, step, seeds, examples)

        losses = self._fleet.evaluate(probes)

        lr = estimator.learning_rate(settings, step, run.steps)
        estimate = estimator.estimate(settings, lr, losses, self._past)
        record = StepRecord(
            step=step,
            seeds=(*seeds, *(seed for seed, _ in estimate.carried)),
            losses=(*estimate.losses, *(() for _ in estimate.carried)),
            coefficients=(*estimate.coefficients, *(value for _, value in estimate.carried)),
            decay=estimate.decay,
            eps=settings.eps,
            lr=lr,
            examples_hash=_hash(examples),
        )
        self._ledger.append(record)
        self._fleet.apply(record.update())
        self._past = self._followed(record)

        signal = noise_floor.signal_to_noise(settings, estimate.losses, self._loss_noise)
        metrics = _metrics(record, estimate, losses, signal, time.monotonic() - started)
        for observer in self._observers:
            observer.step(metrics)

    def _followed(self, record: StepRecord) -> estimator.Past:
        """What the step after one that is written down builds on."""
        settings = self._config.estimator
        if record.eps != settings.eps:  # as scheduled
            settings = settings.model_copy(update={"eps": record.eps})
        return estimator.follow(
            settings, self._past, record.seeds, record.losses, record.coefficients
        )

    def evaluate(
        self, done: int, split: Split = "test", num_examples: int | None = None
    ) -> Evaluation:
        """Score a held-out split after `done` steps: all of its examples, or the first few."""
        started = time.monotonic()
        run_log.note(step=done)
        chosen = range(self._num_held_out[split])[:num_examples]
        found = measured(self._config.task.metric, scores_of(self._fleet.score(split, chosen)))
        evaluation = Evaluation(
            step=done,
            accuracy=found.value,
            num_examples=found.num_examples,
            seconds=time.monotonic() - started,
            metric=found.metric,
            interval=found.interval,
            split=split,
            lost=found.lost,
        )
        for observer in self._observers:
            observer.evaluation(evaluation)
        return evaluation

    def look(self, done: int) -> None:
        """Score, on the way, the dev rows that choose the best checkpoint, or else test rows."""
        split: Split = "dev" if self._num_held_out["dev"] else "test"
        self.evaluate(done, split, self._config.run.eval_examples)

    def check_digests(self) -> str:
        """The trained state's digest, which all replicas must share.

        Raises FleetError naming those that differ from most, or all where there is no majority.
        """
        digests = self._fleet.digests()
        common, count = Counter(digests.values()).most_common(1)[0]
        if count == len(digests):
            return common
        if count > len(digests) / 2:
            astray = [name for name, digest in digests.items() if digest != common]
            what = f"the trained state of {', '.join(astray)} differs from the others'"
        else:  # no majority to tell who is right
            what = f"the trained states of {', '.join(digests)} differ"
        raise FleetError(f"after {self._ledger.next_step} steps {what}: {digests}")


def _hash(examples: Sequence[int]) -> str:
    text = ",".join(map(str, examples))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _metrics(
    record: StepRecord,
    estimate: estimator.Estimate,
    losses: Sequence[ProbeLoss],
    signal_to_noise: float | None,
    seconds: float,
) -> StepMetrics:
    finite = [loss.value for loss in losses if math.isfinite(loss.value)]
    gradients = [abs(value) for value in estimate.gradients if value is not None]
    return StepMetrics(
        step=record.step,
        loss=_mean(finite),
        gradient=_mean(gradients),
        lr=record.lr,
        num_dropped=len(record.dropped),
        num_probes=len(losses),
        num_tokens=sum(loss.num_tokens for loss in losses),
        seconds=seconds,
        signal_to_noise=signal_to_noise,
        lost=_lost(losses),
        kv=KvUse(
            asked=sum(loss.num_asked for loss in losses),
            computed=sum(loss.num_tokens for loss in losses),
            across=sum(loss.num_across for loss in losses),
        ),
    )


def _lost(losses: Sequence[ProbeLoss]) -> dict[str, int] | None:
    """The samples of all probes at which the reward failed, by kind; None without a reward."""
    if not any(loss.lost for loss in losses):
        return None
    columns = zip(*(loss.lost for loss in losses), strict=True)
    counts = dict(zip(FAILURES, map(sum, columns), strict=True))
    return {kind: count for kind, count in counts.items() if count}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
