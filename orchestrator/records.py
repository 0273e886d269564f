"""Frozen carriers that cross processes, and the Fleet protocol the driver talks to.

Everything here is scalars, seeds, ids and digests: no tensor ever travels. This module knows
neither how a probe is computed (replica) nor what its loss is used for (estimator).
"""

import hashlib
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Split = Literal["train", "dev", "test"]
EXAMPLES_PER_CHUNK = 64
MARK_SIZE = 16  # bytes


@dataclass(frozen=True, slots=True)
class Probe:
    """One evaluation to be made: the loss at master + sign * eps * z(seed), on these examples.

    `sign` is +1, -1, or 0 for the unperturbed model. `examples` are row ids of the train split.
    """

    step: int
    seed: int
    sign: int
    eps: float
    examples: tuple[int, ...]


FAILURES = ("timeout", "crash", "raised", "not_a_number", "not_finite")
"""How a call of a reward function may fail."""


@dataclass(frozen=True, slots=True)
class ProbeLoss:
    """A probe's scalar, the mean loss over its examples, and the tokens that it took."""

    value: float
    num_tokens: int
    """Those that went through the model."""
    num_asked: int
    """Those that would have, had every sequence been computed whole."""
    num_across: int = 0
    """Those of them whose keys and values an earlier forward had left, under the same weights. The
    rest that was not computed was shared inside a forward."""
    parts: tuple[float, ...] = ()
    """The loss of each example, times its weight."""
    lost: tuple[int, ...] = ()
    """With a reward, how many of its samples failed, by FAILURES."""
    weights: tuple[int, ...] = ()
    """What the examples weigh, where not all the same; see `objectives.mean_loss`."""


@dataclass(frozen=True, slots=True)
class StepUpdate:
    """All that a replica needs to take one step: master = master * decay + sum_i c_i * z(seed_i);
    the recipe may have it decay towards its first value (`space.Trained`).

    Coefficients and decay are float32 values, so that they mean the same on every machine.
    """

    step: int
    seeds: tuple[int, ...]
    coefficients: tuple[float, ...]
    decay: float


class UpdateLog:
    """The updates of all steps so far, from 0, in some 16 bytes a seed and 40 a step.

    `log[start:stop]` gives updates equal to those that were appended.
    """

    def __init__(self) -> None:
        self._seeds, self._coefficients = array("Q"), array("d")
        self._decays, self._ends = array("d"), array("Q", [0])
        self._marks = bytearray()

    def __len__(self) -> int:
        return len(self._decays)

    def append(self, update: StepUpdate) -> None:
        """The update of the next step, or once more that of an earlier one."""
        if self[update.step : update.step + 1] == [update]:
            return
        assert update.step == len(self), f"{update.step} after {len(self)} steps"
        self._marks += _mark(bytes(self._marks[-MARK_SIZE:]), update)
        self._seeds.extend(update.seeds)
        self._coefficients.extend(update.coefficients)
        self._decays.append(update.decay)
        self._ends.append(len(self._seeds))

    @property
    def marks(self) -> bytes:
        """MARK_SIZE bytes a step: a hash of all updates up to it. They tell whether a snapshot is
        of these steps, without the updates themselves."""
        return bytes(self._marks)

    def __getitem__(self, steps: slice) -> list[StepUpdate]:
        return [self._update(step) for step in range(len(self))[steps]]

    def _update(self, step: int) -> StepUpdate:
        pairs = slice(self._ends[step], self._ends[step + 1])
        seeds, coefficients = tuple(self._seeds[pairs]), tuple(self._coefficients[pairs])
        return StepUpdate(step, seeds, coefficients, self._decays[step])


def _mark(before: bytes, update: StepUpdate) -> bytes:
    number = len(update.seeds)
    values = (update.step, number, *update.seeds, *update.coefficients, update.decay)
    packed = struct.pack(f"<QQ{number}Q{number}dd", *values)
    return hashlib.blake2b(before + packed, digest_size=MARK_SIZE).digest()


@dataclass(frozen=True, slots=True)
class ExampleScore:
    """One held-out example: what the model chose or wrote, and what the task's metric gives for it.

    Where answers are generated there is nothing to choose from: label and prediction are None.
    """

    id: int
    value: float
    """Of the metric, from 0 to 1; a reward may be any number."""
    label: int | None = None
    """The option that would be trained on."""
    also_right: tuple[int, ...] = ()
    """Other right options."""
    scores: tuple[float, ...] = ()
    """Per option, the mean log-probability of its tokens (natural logarithm); or, calibrated, their
    sum less that without the row."""
    prediction: int | None = None
    """The option that scores highest."""
    answer: str | None = None
    """What was generated, as it was compared with the right answers."""
    failure: str | None = None
    """How the reward function failed at it, one of FAILURES; `value` is then task.reward.failed."""


@dataclass(frozen=True, slots=True)
class ChunkScores:
    """Held-out examples that a replica scored together, and the work it took."""

    examples: tuple[ExampleScore, ...]
    num_tokens: int
    """Tokens that went through the model."""
    num_reused: int
    """Tokens that did not, for their KV entries were shared or found in the cache."""


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """What a replica says of itself once it is up; the same for every replica of a fleet."""

    model_class: str
    weights_hash: str
    data_hash: str
    num_parameters: int
    device: str
    versions: tuple[tuple[str, str], ...]
    """Of packages; and what else may differ between machines where weights and rows are the same:
    hashes of the prompts' tokens and of the model's config.json."""


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """A replica's place in the fleet, whichever processes have held it."""

    name: str
    state: Literal[
        "empty",
        "placing",
        "loading",
        "replaying",
        "catching up",
        "ready",
        "computing",
        "writing",
    ]
    """Empty between an actor that was lost and the next; ready without work, computing with."""
    num_probes: int = 0
    """Those whose losses it was the first to give."""
    num_applied: int = 0
    """Steps whose updates it is known to have taken."""
    seconds: float | None = None
    """A probe, in its latest answer to probes."""

    @property
    def is_up(self) -> bool:
        return self.state in ("ready", "computing", "writing")


@dataclass(frozen=True, slots=True)
class FleetState:
    """What can be seen of a fleet from outside, at one moment."""

    replicas: tuple[ReplicaState, ...] = ()
    num_steps: int = 0
    """Steps whose updates were handed to the fleet: where the ledger ends."""
    num_copied: int = 0
    """Probes that were computed once more because they were slow."""
    num_requeued: int = 0
    """Probes that were given to another replica because theirs was lost."""

    @property
    def num_up(self) -> int:
        return sum(replica.is_up for replica in self.replicas)

    @property
    def lag(self) -> int:
        """Steps of the ledger that the last of the replicas that are up has not taken yet. One is
        as it should be, since updates travel with the next step's work; more, if a replica had no
        work since, or has just come back and has yet to catch up."""
        taken = [replica.num_applied for replica in self.replicas if replica.is_up]
        return self.num_steps - min(taken) if taken else 0

    def shares(self) -> list[float]:
        """The replicas' parts of all probes; zeros before the first."""
        total = sum(replica.num_probes for replica in self.replicas) or 1
        return [replica.num_probes / total for replica in self.replicas]

    def numbers(self) -> dict[str, Any]:
        """As it is written down."""
        return {
            "probes": {replica.name: replica.num_probes for replica in self.replicas},
            "copied": self.num_copied,
            "requeued": self.num_requeued,
        }


class Fleet(Protocol):
    """All replicas, behind calls that block until the answer is there.

    `apply` only queues: the updates travel with the next call to each replica, so that a step
    costs one round trip. Answers come back in the order asked, whoever computed them.
    """

    def start(self) -> ReplicaInfo: ...

    def apply(self, update: StepUpdate) -> None:
        """One that the fleet has already is skipped. Replicas that start behind such updates may
        do so from a snapshot of them."""

    def evaluate(self, probes: Sequence[Probe]) -> list[ProbeLoss]: ...

    def score(
        self, split: Split, examples: Sequence[int], *, calibrated: bool = False
    ) -> list[ChunkScores]: ...

    def linear_probe(self) -> list[ExampleScore]:
        """Held-out rows by a logistic regression on hidden states, all in one replica."""

    def digests(self) -> dict[str, str]: ...

    def export(self, folder: Path) -> None: ...

    def snapshot(self, digest: str) -> None:
        """Have one replica write down the state of now, on whose digest all agree, for others to
        start from. Where it cannot, the user is told, once."""

    def state(self) -> FleetState:
        """At once, from any thread, before `start` and during other calls too."""

    def close(self) -> None: ...


def probe_groups(probes: Sequence[Probe], size: int) -> list[tuple[Probe, ...]]:
    """The probes, in order, so many at a time.

    With an even size both signs of a two-sided pair run on the same replica.
    """
    return [tuple(probes[start : start + size]) for start in range(0, len(probes), size)]


def example_chunks(examples: Sequence[int]) -> list[tuple[int, ...]]:
    """Held-out examples cut into what one replica gets at a time, whatever the fleet's size."""
    starts = range(0, len(examples), EXAMPLES_PER_CHUNK)
    return [tuple(examples[start : start + EXAMPLES_PER_CHUNK]) for start in starts]


class FleetError(RuntimeError):
    """The run cannot go on: no replica is left, or replicas disagree. The ledger is whole."""
