"""Two replicas against one, a replica on two ranks against one, and what the fleet itself takes.

    python -m benchmarks.two_gpus [--sections replicas,overhead,ranks] [--shapes opt-1.3b,opt-13b]
                                  [--tokens 64x64] [--seeds N] [--turns N] [--folder FOLDER]

Through the real thing: driver, ledger, Ray actors, on random weights that are written to a folder.
Steps of the dense space, two-sided. On two GPUs; without any, on a CPU's cores.

*replicas*: probes a second of two replicas and of one, turn by turn, over steps of `--seeds` pairs.
Before each turn all replicas settle, so that none has another's updates to make up for.
*overhead*: a step's time less what the busiest replica's calls took inside of its process; for
steps of one pair a replica, and of many; and what Ray takes for a call that does nothing, after as
long a pause. *ranks*: losses of a replica on two GPUs beside those of one on one GPU; and, for
scale, how far the latter's are from those in float32. The last two are of the first shape.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator import environment

NUM_THREADS = 2
environment.prepare(NUM_THREADS)

import ray  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from benchmarks import measure  # noqa: E402
from benchmarks.bars import Row  # noqa: E402
from benchmarks.measure import DEVICE, DTYPE, ON_GPU  # noqa: E402
from benchmarks.shapes import SHAPES, Shape  # noqa: E402
from orchestrator import estimator, noise  # noqa: E402
from orchestrator.actors import ActorFleet  # noqa: E402
from orchestrator.batches import Batches  # noqa: E402
from orchestrator.config import Config  # noqa: E402
from orchestrator.driver import Driver  # noqa: E402
from orchestrator.seed_sync import Header, Ledger  # noqa: E402

SECTIONS = ("replicas", "overhead", "ranks")
SHAPES_BY_DEFAULT = "opt-1.3b,opt-13b" if ON_GPU else "opt-tiny"
TOKENS_BY_DEFAULT = "64x64" if ON_GPU else "4x8"
SEEDS_BY_DEFAULT = 8 if ON_GPU else 2
TURNS_BY_DEFAULT = 8 if ON_GPU else 3
NUM_WARMUPS = 2
NUM_ROWS = 256
LARGE = 5e9  # parameters beyond which a float32 master has no room beside the live weights
SHARD_BYTES = 2**31
MANY_STEPS = 10_000
LARGEST_OVERHEAD_MS = 2.0
LEAST_SPEED_UP = 1.95
MOST_APART = 2.0  # two roundings of one value, each as far from it as the other
FLOAT32_STEP = 0.06  # millionths: between two float32 values near 1; no scale is finer
COLUMNS = ("what", "ours", "against", "ratio", "bar", "holds")


# ---------------------------------------------------------------- what is run


def write_model(shape: Shape, folder: Path) -> int:
    """A folder as a hub has it, with random weights of a fixed seed; their number."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(shape.config)
    folder.mkdir()
    shape.config.save_pretrained(folder)
    draw = torch.Generator(DEVICE).manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    num_shards = num_parameters = 0
    for name, parameter in model.named_parameters():
        value = torch.zeros(parameter.shape, dtype=getattr(torch, DTYPE), device=DEVICE)
        if parameter.ndim > 1:
            value.normal_(std=0.02, generator=draw)
        elif name.endswith("norm.weight"):
            value.fill_(1)
        shard[name] = value.cpu()
        num_parameters += parameter.numel()
        if sum(each.nbytes for each in shard.values()) > SHARD_BYTES:
            save_file(shard, folder / f"model-{num_shards:05}.safetensors", {"format": "pt"})
            shard, num_shards = {}, num_shards + 1
    save_file(shard, folder / f"model-{num_shards:05}.safetensors", {"format": "pt"})
    measure.free_memory()
    return num_parameters


def write_task(shape: Shape, folder: Path, length: int) -> dict[str, Any]:
    """A tokenizer of a few words into the model's folder, and rows of them that have so many
    tokens; the recipe's section."""
    words = [f"w{number}" for number in range(shape.config.vocab_size // 2)]
    special = {"<unk>": 0, "<pad>": 1, "</s>": shape.config.bos_token_id}
    ids = special | {word: 3 + number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    draw = random.Random(0)
    rows = folder / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for _ in range(NUM_ROWS + 1):
            text = " ".join(draw.choices(words, k=length - 1))  # behind the first token
            file.write(json.dumps({"text": text, "label": draw.randrange(2)}) + "\n")
    return {
        "template": "{text} {option}",
        "options": ["w0", "w1"],
        "train": {"path": str(rows)},
        "holdout": 1,
    }


@dataclass(frozen=True, slots=True)
class Workload:
    """A model's folder, its task, and what a step is."""

    shape: str
    model: Path
    task: dict[str, Any]
    batch_size: int
    length: int
    num_seeds: int
    is_large: bool

    def config(self, dtype: str = DTYPE, **fleet: Any) -> Config:
        """The recipe, with replicas of these settings."""
        on_gpu = {"master": "bfloat16"} if self.is_large else {}
        kv_tokens = 2 * self.batch_size * self.length + 64
        return Config.model_validate(
            {
                "model": {
                    "path": str(self.model),
                    "dtype": dtype,
                    "device": DEVICE,
                    "kv_tokens": kv_tokens,
                },
                "space": {"kind": "dense", **on_gpu},
                "estimator": {
                    "num_seeds": self.num_seeds,
                    "batch_size": self.batch_size,
                    "lr": 1e-7,
                },
                "task": self.task,
                "fleet": {"kind": "ray", "threads_per_replica": 1, **fleet},
                "run": {"steps": MANY_STEPS},
            }
        )

    @property
    def name(self) -> str:
        return f"{self.shape}, {self.batch_size}x{self.length}"


class Running:
    """A fleet at work under its driver."""

    def __init__(self, config: Config, fleet: ActorFleet, ledger: Ledger) -> None:
        self.config, self.fleet, self._ledger = config, fleet, ledger
        self._batches = Batches(config, NUM_ROWS)
        self._driver = Driver(config, fleet, ledger, [], batches=self._batches, num_test=1)

    def step(self) -> float:
        """Seconds of the next step, beginning with the updates of the last."""
        started = time.perf_counter()
        self._driver.step(self._ledger.next_step)
        return time.perf_counter() - started

    def set_seeds(self, number: int) -> None:
        """How many pairs the next steps have."""
        chosen = self.config.estimator.model_copy(update={"num_seeds": number})
        self._driver._config = self.config.model_copy(update={"estimator": chosen})

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Only replica 0 is given work, once all have done what they were asked."""
        while self.fleet._pending:
            self.fleet._attend()
        others = self.fleet._dispatcher.replicas[1:]
        for replica in others:
            self.fleet._dispatcher.lost(replica)
        yield
        for replica in others:
            self.fleet._dispatcher.join(replica)

    def losses(self) -> list[float]:
        """Those of the first step's probes, which is not taken."""
        num_seeds = self.config.estimator.num_seeds
        seeds = estimator.seeds(self.config.run.seed, 0, num_seeds)
        examples = self._batches.of(0)
        probes = estimator.probes(self.config.estimator, 0, seeds, examples)
        return [loss.value for loss in self.fleet.evaluate(probes)]


@contextmanager
def running(config: Config) -> Iterator[Running]:
    """All replicas are up within."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        fleet = ActorFleet(config, log, lambda sentence: print(sentence, flush=True))
        try:
            started = time.monotonic()
            info = fleet.start()
            while len(fleet._dispatcher.replicas) < len(fleet._seats):
                fleet._attend()
            print(f"started in {time.monotonic() - started:.0f} s", flush=True)
            hashes = (info.weights_hash, config.identity(), info.data_hash)
            header = Header(1, noise.NOISE_VERSION, config.model.path, *hashes, info.versions)
            with Ledger.create(Path(folder) / "ledger.jsonl", header) as ledger:
                yield Running(config, fleet, ledger)
        except Exception:
            if log.exists():
                print(log.read_text(encoding="utf-8", errors="replace")[-4000:], flush=True)
            raise
        finally:
            fleet.close()


# ---------------------------------------------------------------- sections


def replica_rows(workload: Workload, run: Running, turns: int) -> Iterator[Row]:
    """Probes a second of two replicas, and of one."""
    times: dict[str, list[float]] = {"one": [], "two": []}
    for turn in range(-NUM_WARMUPS, turns):
        for name in times if turn % 2 == 0 else reversed(list(times)):
            run.fleet.digests()  # all settle
            with run.first_alone() if name == "one" else nullcontext():
                taken = run.step()
            if turn >= 0:
                times[name].append(taken)
    one, two = (2 * workload.num_seeds / statistics.median(times[name]) for name in times)
    what = f"probes a second, {workload.name}, {workload.num_seeds} seeds a step: 2 replicas; 1"
    yield Row(what, two, one, two / one, LEAST_SPEED_UP)


def overhead_rows(workload: Workload, run: Running, turns: int) -> Iterator[Row]:
    """Milliseconds of a step that are not a replica's, and those of an empty call."""
    actors = [seat.actor for seat in run.fleet._seats]
    ray.get([actor.__ray_call__.remote(watch) for actor in actors])
    for num_seeds, num_replicas in ((1, 1), (2, 2), (workload.num_seeds, 2)):
        run.set_seeds(num_seeds)
        beside, inside = [], []
        with run.first_alone() if num_replicas == 1 else nullcontext():
            for turn in range(-NUM_WARMUPS, 3 * turns):
                taken = run.step()
                own = max(ray.get([actor.__ray_call__.remote(watched) for actor in actors]))
                if turn >= 0:
                    beside.append(1e3 * (taken - own))
                    inside.append(own)
        pairs = f"{num_seeds} pair{'s' * (num_seeds > 1)} for {num_replicas} replica"
        what = f"driver and Ray, ms a step of {pairs}{'s' * (num_replicas > 1)}, {workload.name}"
        found = statistics.median(beside)
        bar = LARGEST_OVERHEAD_MS
        yield Row(f"{what}; allowed", found, bar, found / bar, 1.0, at_most=True)
        if num_seeds == 1:
            empty = 1e3 * statistics.median(empty_calls(actors[0], inside))
            yield Row(f"{what}; an empty call of Ray's", found, empty, found / empty)
    run.set_seeds(workload.num_seeds)


def empty_calls(actor: Any, pauses: Sequence[float]) -> Iterator[float]:
    """Seconds from asking an actor for nothing until that is answered; after each pause."""
    for pause in pauses:
        time.sleep(pause)
        started = time.perf_counter()
        ray.wait([actor.__ray_ready__.remote()])
        yield time.perf_counter() - started


def watch(actor: Any) -> None:
    """In a replica's process: have its calls timed from now on."""
    evaluate = actor._replica.evaluate
    actor.seconds = 0.0

    def timed(*arguments: Any) -> Any:
        started = time.perf_counter()
        answer = evaluate(*arguments)
        actor.seconds += time.perf_counter() - started
        return answer

    actor._replica.evaluate = timed


def watched(actor: Any) -> float:
    """In a replica's process: seconds of its calls since this was asked last."""
    taken: float = actor.seconds
    actor.seconds = 0.0
    return taken


def rank_rows(workload: Workload, alone: Sequence[float]) -> Iterator[Row]:
    """Losses of two ranks beside those of one, in millionths."""
    found = []
    for fleet in ({"tp_size": 2}, {"dtype": "float32"}):
        with running(workload.config(num_replicas=1, **fleet)) as run:
            found.append(run.losses())
    ranks, exact = found
    error = max(FLOAT32_STEP, 1e6 * distance(alone, exact))
    apart, other_error = 1e6 * distance(ranks, alone), 1e6 * distance(ranks, exact)
    what = f"largest difference of a loss, 1e-6, {workload.name}"
    against = "1's and float32's"
    yield Row(f"{what}: 2 ranks' and 1's; {against}", apart, error, apart / error, MOST_APART, True)
    yield Row(f"{what}: 2 ranks' and float32's; {against}", other_error, error, other_error / error)


def distance(first: Sequence[float], second: Sequence[float]) -> float:
    return max(abs(one - other) for one, other in zip(first, second, strict=True))


# ---------------------------------------------------------------- all of it


def rows_of(workload: Workload, sections: Sequence[str], turns: int) -> Iterator[Row]:
    with running(workload.config(num_replicas=2)) as run:
        alone = run.losses() if "ranks" in sections else None
        if "replicas" in sections:
            yield from replica_rows(workload, run, turns)
        if "overhead" in sections:
            yield from overhead_rows(workload, run, turns)
    if alone is not None:
        yield from rank_rows(workload, alone)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_gpus")
    parser.add_argument("--sections", default=",".join(SECTIONS), help=", ".join(SECTIONS))
    parser.add_argument("--shapes", default=SHAPES_BY_DEFAULT, help=", ".join(SHAPES))
    parser.add_argument("--tokens", default=TOKENS_BY_DEFAULT, help="a batch's rows, and their")
    parser.add_argument("--seeds", type=int, default=SEEDS_BY_DEFAULT, help="pairs a step")
    parser.add_argument("--turns", type=int, default=TURNS_BY_DEFAULT)
    parser.add_argument("--folder", type=Path, help="where models are written; has room for them")
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help="a folder")
    chosen = parser.parse_args(arguments)
    sections = chosen.sections.split(",")
    for section in sections:
        if section not in SECTIONS:
            parser.error(f"--sections: {section}: there are {', '.join(SECTIONS)}")
    for shape in chosen.shapes.split(","):
        if shape not in SHAPES:
            parser.error(f"--shapes: {shape}: there are {', '.join(SHAPES)}")
    if ON_GPU and torch.cuda.device_count() < 2:
        parser.error("there are fewer than two GPUs")
    batch_size, length = map(int, chosen.tokens.split("x"))
    print(measure.header(), flush=True)
    rows: list[Row] = []
    for number, name in enumerate(chosen.shapes.split(",")):
        wanted = sections if number == 0 else [each for each in sections if each == "replicas"]
        if not wanted:
            continue
        with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
            started = time.monotonic()
            model = Path(folder) / name
            num_parameters = write_model(SHAPES[name], model)
            task = write_task(SHAPES[name], model, length)
            print(f"{name}: written in {time.monotonic() - started:.0f} s", flush=True)
            is_large = num_parameters > LARGE
            workload = Workload(name, model, task, batch_size, length, chosen.seeds, is_large)
            for row in rows_of(workload, wanted, chosen.turns):
                rows.append(row if ON_GPU else replace(row, bar=None))
                print(f"{row.what}: {row.ours:.2f}, {row.against:.2f}, {row.ratio:.3f}", flush=True)
    path = measure.write_results("two-gpus", [asdict(row) for row in rows], chosen.results)
    measure.print_table(COLUMNS, [row.cells for row in rows])
    print(f"kept in {path}")


if __name__ == "__main__":
    main()
