"""A whole step of ours against the reference loop's, and against plain prefills of its tokens.

    python -m benchmarks.steps [--shapes opt-13b,...] [--tokens 16x64,sst2,...]
                               [--spaces dense:float32,lora:fp8,...] [--turns N] [--probes N]

On random weights of a shape. Our step is what a replica does, without files: write the
perturbations, score the batch under both signs, estimate, update. The reference (reference.py)
trains the same: all parameters beside dense and low_rank, an adapter beside lora. A plain prefill
is one Engine.score of the step's prompts that wants only their last token, on an engine without
adapters; a step of one probe is held against two. What is compared runs turn by turn.

`--tokens`: 16x64 is a block of sequences all of whose tokens are scored; sst2 is 16 prompts with
two options, which the reference runs as padded sequences of their own. `--spaces`: dense and
low_rank with the precision of their master; on a GPU, dense:host with a master in the host's
memory; lora, and lora:fp8 over a base in 8 bits; any with :rademacher behind it.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import dist_patch, environment

NUM_THREADS = 2
environment.prepare(NUM_THREADS)

import torch  # noqa: E402

from benchmarks import measure, reference, workloads  # noqa: E402
from benchmarks.measure import DEVICE, DTYPE, ON_GPU, Stopwatch  # noqa: E402
from benchmarks.shapes import SHAPES, Shape  # noqa: E402
from benchmarks.workloads import Batch  # noqa: E402

dist_patch.apply(DEVICE)

from orchestrator import estimator  # noqa: E402
from orchestrator.adapters import AdapterPlan  # noqa: E402
from orchestrator.config import Estimator  # noqa: E402
from orchestrator.dense import DenseSpace  # noqa: E402
from orchestrator.engine import Engine, Launched  # noqa: E402
from orchestrator.export import AdapterSettings  # noqa: E402
from orchestrator.lora import LoraSpace  # noqa: E402
from orchestrator.low_rank import LowRankSpace  # noqa: E402
from orchestrator.noise import NoiseKind  # noqa: E402
from orchestrator.objectives import option_cross_entropy  # noqa: E402
from orchestrator.parameters import CanonicalTensor, region  # noqa: E402
from orchestrator.records import ProbeLoss, StepUpdate  # noqa: E402
from orchestrator.score_plan import ScorePlan  # noqa: E402
from orchestrator.space import Space  # noqa: E402
from orchestrator.tensor_map import shards  # noqa: E402

SHAPES_BY_DEFAULT = "opt-1.3b,opt-13b" if ON_GPU else "opt-125m"
TOKENS_BY_DEFAULT = "16x64,sst2,64x256" if ON_GPU else "4x16,sst2"
SPACES_BY_DEFAULT = "dense:float32,dense:bfloat16,lora,low_rank" + (",lora:fp8" if ON_GPU else "")
TURNS_BY_DEFAULT = 12 if ON_GPU else 4
NUM_WARMUPS = 4 if ON_GPU else 2  # both batches of a workload, in both orders
NUM_SPLIT_TURNS = 4
LARGEST_POOL = 16384  # tokens; what a step has beyond that goes through in several forwards
SMALLEST_POOL = 256
RANK, ALPHA = reference.LORA_RANK, reference.LORA_ALPHA
EPS, LR = 1e-3, 1e-7
COLUMNS = (
    ("shape", "shape"),
    ("tokens", "tokens"),
    ("space", "space"),
    ("ours ms", "ours_ms"),
    ("forwards", "ours_forwards_ms"),
    ("rest", "ours_rest_ms"),
    ("reference ms", "reference_ms"),
    ("forwards", "reference_forwards_ms"),
    ("rest", "reference_rest_ms"),
    ("times faster", "reference_over_ours"),
    ("prefills ms", "prefills_ms"),
    ("ours / prefills", "ours_over_prefills"),
)
Row = dict[str, Any]
Plans = dict[tuple[str | None, ...], ScorePlan]


@dataclass(frozen=True, slots=True)
class Settings:
    """What is asked for on the command line, beside shapes and spaces."""

    tokens: tuple[str, ...]
    turns: int
    num_probes: int

    @property
    def estimator(self) -> Estimator:
        return Estimator(num_seeds=self.num_probes, eps=EPS, lr=LR)

    @property
    def num_forwards(self) -> int:
        """Losses that a step needs: both signs of every probe."""
        return 2 * self.num_probes

    def batches(self, shape: Shape) -> dict[str, tuple[Batch, ...]]:
        config = shape.config
        return {
            name: workloads.batches(name, config.vocab_size, config.bos_token_id)
            for name in self.tokens
        }


@dataclass(frozen=True, slots=True)
class SpaceChoice:
    """A space by its kind, and the precision of its master or of the base beneath it."""

    kind: str
    master: torch.dtype = torch.float32
    quantization: str | None = None
    noise: NoiseKind = "gaussian"
    on_host: bool = False
    """Whether the master lies in the host's memory."""

    @staticmethod
    def parse(text: str) -> "SpaceChoice":
        kind, *choices = text.split(":")
        noise: NoiseKind = "rademacher" if "rademacher" in choices else "gaussian"
        choice = next((each for each in choices if each != noise), "")
        if kind == "lora":
            return SpaceChoice(kind, quantization=choice or None, noise=noise)
        if kind not in ("dense", "low_rank"):
            raise ValueError(f"--spaces: {text}: there are dense, lora and low_rank")
        if choice == "host":
            return SpaceChoice(kind, on_host=True, noise=noise)
        return SpaceChoice(kind, getattr(torch, choice or "float32"), noise=noise)

    def adapters(self, shape: Shape, num_slots: int) -> AdapterPlan | None:
        """What an engine must make room for."""
        if self.kind == "dense":
            return None
        if self.kind == "lora":  # one slot more: the trained adapter itself
            return AdapterPlan(num_slots + 1, RANK, ALPHA / RANK, reference.LORA_MODULES)
        return AdapterPlan(num_slots, RANK, 1 / math.sqrt(RANK), shape.modules)

    def build(self, engine: Engine) -> Space:
        if self.kind == "dense":
            return DenseSpace(
                live_tensors(engine.model),
                noise=self.noise,
                master_dtype=self.master,
                host_of=engine.model if self.on_host else None,
            )
        assert engine.slots is not None
        if self.kind == "lora":
            settings = AdapterSettings(RANK, float(ALPHA), reference.LORA_MODULES)
            return LoraSpace(engine.slots, settings, noise_kind=self.noise, seed=0)
        return LowRankSpace(
            live_tensors(engine.model),
            engine.slots,
            noise_kind=self.noise,
            master_dtype=self.master,
            rank=RANK,
            run_seed=0,
        )


def live_tensors(model: torch.nn.Module) -> list[CanonicalTensor]:
    """parameters.canonical_tensors, with the engine's own values in a checkpoint's place."""
    parameters = {name: value.data for name, value in model.named_parameters()}
    tensors = []
    for name, shard in sorted(shards(model, 0).items()):
        last_row = shard.parameter_row + shard.num_rows
        live = parameters[shard.place.parameter][shard.parameter_row : last_row].view(1, -1)
        tensors.append(CanonicalTensor(region(name, shard), shard, live, initial=live))
    return tensors


def load(shape: Shape, choice: SpaceChoice, settings: Settings) -> Engine:
    """An engine with random weights that has room for a space and its steps."""
    most = max(map(workloads.longest, settings.batches(shape).values())) * settings.num_forwards
    measure.free_memory()
    with tempfile.TemporaryDirectory() as folder:
        shape.config.save_pretrained(folder)
        return Engine(
            folder,
            dtype=DTYPE,
            device=DEVICE,
            kv_tokens=max(SMALLEST_POOL, min(most, LARGEST_POOL)),
            threads=NUM_THREADS,
            score_graphs=not choice.on_host,
            load_format="dummy",
            quantization=choice.quantization,
            adapters=choice.adapters(shape, settings.num_forwards),
        )


class OurSteps:
    """What the driver and one replica do in a step, on batches in turn."""

    def __init__(
        self, engine: Engine, space: Space, batches: Sequence[Batch], settings: Settings
    ) -> None:
        self.forwards = Stopwatch()
        self._engine, self._space = engine, space
        self._batches, self._settings = batches, settings.estimator
        self._plans: dict[int, Plans] = {}
        self._num_steps = 0

    def step(self) -> None:
        step, settings = self._num_steps, self._settings
        batch, plans = self._planned(step)
        seeds = estimator.seeds(0, step, settings.num_seeds)
        probes = estimator.probes(settings, step, seeds, ())
        launches = []
        with closing(self._space.placed(probes)) as groups:
            for group in groups:
                adapters = tuple(placed.adapter for placed in group)
                if adapters not in plans:
                    plans[adapters] = self._engine.plan(batch.sequences, batch.spans, adapters)
                with self.forwards.running():
                    launches.append((adapters, self._engine.launch(plans[adapters])))
        following, ahead = self._planned(step + 1)  # while the device works, as a replica does
        for adapters in plans:
            ahead[adapters] = self._engine.plan(following.sequences, following.spans, adapters)
        losses = [
            loss
            for adapters, launched in launches
            for loss in self._losses(batch, plans[adapters], launched)
        ]
        estimate = estimator.estimate(settings, settings.lr, losses)
        coefficients = [value for value in estimate.coefficients if value is not None]
        assert len(coefficients) == len(seeds), f"a loss is not finite: {losses}"
        self._space.apply(StepUpdate(step, seeds, tuple(coefficients), estimate.decay))
        self._num_steps += 1

    def _planned(self, step: int) -> tuple[Batch, Plans]:
        """A step's batch, and what is planned for it already; of the last two steps asked for."""
        self._plans = {step: self._plans.pop(step, {}), **self._plans}
        self._plans = dict(list(self._plans.items())[:2])
        return self._batches[step % len(self._batches)], self._plans[step]

    def _losses(self, batch: Batch, plan: ScorePlan, launched: Launched) -> list[ProbeLoss]:
        (scores,) = self._engine.read(plan, [launched])
        means = [span.mean for span in scores.spans]
        size, count = len(batch.sequences), len(plan.adapters)
        num_tokens, num_asked = scores.num_tokens // count, scores.num_asked // count
        return [
            ProbeLoss(loss(batch, means[first : first + size]), num_tokens, num_asked)
            for first in range(0, len(means), size)
        ]


def loss(batch: Batch, means: Sequence[float]) -> float:
    """A batch's loss, from the mean log-probability of each sequence's span."""
    if not batch.labels:
        return -sum(means) / len(means)
    count = batch.num_options
    values = [
        option_cross_entropy(means[index * count : (index + 1) * count], label)
        for index, label in enumerate(batch.labels)
    ]
    return sum(values) / len(values)


class ReferenceSteps:
    """The reference loop on the same batches in turn."""

    def __init__(
        self, model: torch.nn.Module, batches: Sequence[reference.Batch], settings: Settings
    ) -> None:
        self._mezo = reference.Mezo(model, eps=EPS, lr=LR, num_probes=settings.num_probes)
        self.forwards = self._mezo.forwards
        self._batches = batches
        self._num_steps = 0

    def step(self) -> None:
        estimates = self._mezo.step(self._batches[self._num_steps % len(self._batches)])
        assert all(math.isfinite(gradient) for _, gradient in estimates), estimates
        self._num_steps += 1


def split(name: str, steps: OurSteps | ReferenceSteps) -> Row:
    """Milliseconds of a step inside and outside of forwards, with all the waiting this takes."""
    inside, outside = steps.forwards.split(steps.step, NUM_SPLIT_TURNS)
    return {f"{name}_forwards_ms": 1e3 * inside, f"{name}_rest_ms": 1e3 * outside}


def reference_batch(batch: Batch, shape: Shape) -> reference.Block | reference.Options:
    if not batch.labels:
        return reference.Block(torch.tensor(batch.sequences, device=DEVICE))
    return reference.options(
        batch.sequences,
        [end - start for start, end in batch.spans],
        batch.labels,
        padding=shape.config.pad_token_id or 0,
        device=DEVICE,
    )


def prefills(engine: Engine, batches: Sequence[Batch], count: int) -> Callable[[], None]:
    """A call that computes a batch's prompts so many times, and of each only the last token."""
    calls = 0

    def run() -> None:
        nonlocal calls
        prompts = batches[calls % len(batches)].prompts
        for _ in range(count):
            engine.score(prompts, [(len(tokens) - 1, len(tokens)) for tokens in prompts])
        calls += 1

    return run


class Comparison:
    """One space on one shape: rows of a table, a workload each.

    Baselines come one after the other, for a GPU need not hold all of them at once.
    """

    def __init__(self, name: str, space: str, settings: Settings) -> None:
        self._shape, self._choice, self._settings = SHAPES[name], SpaceChoice.parse(space), settings
        self._batches = settings.batches(self._shape)
        self.rows: dict[str, Row] = {
            tokens: {"shape": name, "tokens": tokens, "space": space} for tokens in self._batches
        }

    def run(self) -> list[Row]:
        choice, settings = self._choice, self._settings
        engine = load(self._shape, choice, settings)
        # Before the space takes its memory: SGLang asks for half of what is free.
        is_plain = choice.kind == "dense"
        plain = engine if is_plain else load(self._shape, SpaceChoice("dense"), settings)
        space = self._choice.build(engine)
        ours = {
            tokens: OurSteps(engine, space, batches, self._settings)
            for tokens, batches in self._batches.items()
        }
        self._against_prefills(ours, plain)
        if plain is not engine:
            plain.close()
            del plain
        self._against_reference(ours)
        del ours, space
        engine.close()
        return list(self.rows.values())

    @contextmanager
    def our_steps(self) -> Iterator[dict[str, OurSteps]]:
        """Our steps alone, by tokens."""
        engine = load(self._shape, self._choice, self._settings)
        space = self._choice.build(engine)
        yield {
            tokens: OurSteps(engine, space, batches, self._settings)
            for tokens, batches in self._batches.items()
        }
        del space
        engine.close()

    def _against_prefills(self, ours: dict[str, OurSteps], plain: Engine) -> None:
        settings = self._settings
        for tokens, batches in self._batches.items():
            steps, row = ours[tokens], self.rows[tokens]
            calls = {
                "ours": steps.step,
                "prefills": prefills(plain, batches, settings.num_forwards),
            }
            times = measure.paired(calls, settings.turns, NUM_WARMUPS)
            row["turns"], row["num_probes"] = settings.turns, settings.num_probes
            row["num_tokens"] = batches[0].num_tokens
            row["prefills_ms"] = 1e3 * measure.medians(times)["prefills"]
            row["ours_over_prefills"] = measure.ratio(times, "ours", "prefills")
            row |= split("ours", steps)

    def _against_reference(self, ours: dict[str, OurSteps]) -> None:
        settings = self._settings
        measure.free_memory()
        dtype, lora = getattr(torch, DTYPE), self._choice.kind == "lora"
        model = reference.build(self._shape.config, dtype=dtype, device=DEVICE, lora=lora)
        for tokens, batches in self._batches.items():
            row = self.rows[tokens]
            theirs = [reference_batch(batch, self._shape) for batch in batches]
            steps = ReferenceSteps(model, theirs, settings)
            calls = {"ours": ours[tokens].step, "reference": steps.step}
            times = measure.paired(calls, settings.turns, NUM_WARMUPS)
            row["num_reference_tokens"] = theirs[0].tokens.numel()
            row["ours_ms"] = 1e3 * measure.medians(times)["ours"]
            row["reference_ms"] = 1e3 * measure.medians(times)["reference"]
            row["reference_over_ours"] = measure.ratio(times, "reference", "ours")
            row |= split("reference", steps)


def summary(row: Row) -> str:
    return (
        f"{row['shape']}, {row['space']}, {row['tokens']}: {row['ours_ms']:.1f} ms, "
        f"the reference {row['reference_ms']:.1f}, prefills {row['prefills_ms']:.1f}"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps")
    parser.add_argument("--shapes", default=SHAPES_BY_DEFAULT, help=", ".join(SHAPES))
    parser.add_argument("--tokens", default=TOKENS_BY_DEFAULT, help="SEQUENCESxLENGTH, or sst2")
    parser.add_argument("--spaces", default=SPACES_BY_DEFAULT, help="KIND or KIND:PRECISION")
    parser.add_argument("--turns", type=int, default=TURNS_BY_DEFAULT)
    parser.add_argument("--probes", type=int, default=1, help="two-sided probes a step")
    parser.add_argument("--name", default="steps", help="of the file that keeps the results")
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help="its folder")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parse(arguments)
    settings = Settings(tuple(chosen.tokens.split(",")), chosen.turns, chosen.probes)
    print(measure.header())
    print(measure.rates(), flush=True)
    rows: list[Row] = []
    for shape in chosen.shapes.split(","):
        for space in chosen.spaces.split(","):
            rows += Comparison(shape, space, settings).run()
            measure.free_memory()
            path = measure.write_results(chosen.name, rows, chosen.results)
            for row in rows[-len(settings.tokens) :]:
                print(summary(row), flush=True)
    titles = [title for title, _ in COLUMNS]
    measure.print_table(titles, [[row[key] for _, key in COLUMNS] for row in rows])
    print(f"kept in {path}")


if __name__ == "__main__":
    main()
