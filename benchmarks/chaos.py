"""Runs that are harmed at drawn moments, on a cluster of several Ray nodes, against the same run
undisturbed: the ledgers must be equal byte for byte, and nothing may be left behind.

  .venv/bin/python -m benchmarks.chaos [--seeds 0-9] [--steps 60]

The model is tiny, the cluster is on this machine, all processes are real. A seed draws which harm
is done at which step: replicas are killed or stopped (a hang), a node is removed, another joins,
the driver is killed and resumed. Steps, not seconds, say when; where a step's work is at that
moment, nothing says.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import yaml
from ray._common.utils import get_default_ray_temp_dir
from ray._private.utils import write_ray_address
from ray.cluster_utils import Cluster

from orchestrator import environment

environment.prepare(threads=1)

import torch  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks import measure, workloads  # noqa: E402

HARM = ("kill", "kill", "stop", "remove", "add", "driver", "driver")
"""What is done to each run, in an order that is drawn; a node is removed before one is added."""
NUM_NODES = 2  # beside the head, with room for one replica each
PATIENCE_S = 240.0  # for the run to get anywhere
END_S = 30.0  # for processes to be gone that nobody needs any more
MARK = "CHAOS_MARK"  # variable by which a run's processes are found, whoever their parent is
REPLICA = "ray::ReplicaActor"  # what Ray has a replica's process be called, whatever it is at
EVERYTHING = 1 << 60  # a step that no run comes to
FILES = {"config.yaml", "ledger.jsonl", "log.txt", "metrics.jsonl", "summary.json", "training.lock"}
ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------- what is done, and when


@dataclass(frozen=True, slots=True)
class Event:
    """A harm that is done once the ledger has so many steps."""

    step: int
    kind: str
    after_s: float
    """Seconds into the step's evaluation."""
    is_calm: bool
    """Whether there is a replica on each node by then; else the last harm may not be over."""
    victim: int
    """Which of the replicas or nodes there are, counted round."""


def plan(seed: int, num_steps: int, harm: Sequence[str] = HARM) -> list[Event]:
    """The events of a run, in their order."""
    draw = random.Random(seed)
    kinds = list(harm)
    draw.shuffle(kinds)
    nodes = [place for place, kind in enumerate(kinds) if kind in ("remove", "add")]
    for place, kind in zip(nodes, ("remove", "add"), strict=False):
        kinds[place] = kind
    # The first step of all, and the last, are as good as any.
    steps = sorted(draw.choices(range(1, num_steps), k=len(kinds)))
    return [
        Event(
            step,
            kind,
            after_s=draw.uniform(0.0, 0.3),
            # One that hangs before its second call has half an hour.
            is_calm=kind == "stop" or draw.random() < 0.5,
            victim=draw.randrange(1000),
        )
        for step, kind in zip(steps, kinds, strict=True)
    ]


# ---------------------------------------------------------------- what it is done to


class Processes:
    """All processes that descend from this one since the mark was set, orphans too."""

    def __init__(self) -> None:
        self._mark = uuid4().hex
        os.environ[MARK] = self._mark

    def __iter__(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                is_ours = process.environ().get(MARK) == self._mark
                is_dead = process.status() == psutil.STATUS_ZOMBIE
                if is_ours and not is_dead and process.pid != os.getpid():
                    yield process

    def named(self, title: str) -> list[psutil.Process]:
        """Those whose command begins so; of equal ones the oldest first."""
        found = []
        for process in self:
            with suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(title):
                    found.append((process.create_time(), process.pid, process))
        return [process for _, _, process in sorted(found, key=lambda each: each[:2])]

    def left(self, title: str = "") -> list[str]:
        """What is still there once there was time to end: commands, and ports that they hold."""
        deadline = time.monotonic() + END_S
        while (found := self.named(title)) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [_told(process) for process in found]

    def shared_files(self) -> set[str]:
        """Files in /dev/shm that they have in their memory; others' programs have some too."""
        found = set()
        for process in self:
            with suppress(psutil.Error):
                found |= {each.path for each in process.memory_maps()}
        return {path for path in found if path.startswith("/dev/shm/")}

    def kill(self) -> None:
        for process in self:
            with suppress(psutil.Error):
                process.kill()


def _told(process: psutil.Process) -> str:
    try:
        ports = [each.laddr.port for each in process.net_connections() if each.status == "LISTEN"]
        return f"{process.pid} {' '.join(process.cmdline())[:80]} {process.status()} {ports}"
    except psutil.Error:
        return f"{process.pid}"


@dataclass
class Victim:
    """A run, its driver, and the nodes that it goes on."""

    folder: Path
    """Its run folder; beside it lie what it says, and the gate that holds its steps."""
    recipe: Path
    cluster: Cluster
    processes: Processes
    driver: subprocess.Popen[bytes] | None = None
    shared: set[str] = field(default_factory=set)
    """Files in /dev/shm that its processes were seen with."""

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger.jsonl"

    @property
    def gate(self) -> Path:
        return self.folder.with_name("gate")

    @property
    def said(self) -> Path:
        return self.folder.with_name("said.txt")

    def start(self) -> None:
        """The driver, of a new run or of one that goes on."""
        arguments = [str(self.recipe), f"run.dir={self.folder}"]
        if self.ledger.exists():
            arguments = ["--resume", str(self.folder)]
        with self.said.open("ab") as said:
            self.driver = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "benchmarks.chaos_driver",
                    str(self.gate),
                    "train",
                    *arguments,
                ]
                + ["fleet.kind=ray", "fleet.num_replicas=auto"],
                stdout=said,
                stderr=said,
                cwd=ROOT,
                env={**os.environ, "RAY_ADDRESS": self.cluster.address},
            )

    def hold(self, step: int) -> None:
        """Let the run come to this step, and no further."""
        self.gate.mkdir(exist_ok=True)
        (self.gate / "until.new").write_text(str(step))
        (self.gate / "until.new").replace(self.gate / "until")

    def num_steps(self) -> int:
        return self.ledger.read_bytes().count(b"\n") - 1 if self.ledger.exists() else 0

    def come_to(self, step: int) -> None:
        """Let the run come to a step, whose work it then goes on doing."""
        self.hold(step)
        self.wait_for(lambda: self.num_steps() >= step, f"step {step}")

    def num_up(self) -> int:
        """Replicas that take part in the step that is held, as of now."""
        told = self.gate / "up"
        told.unlink(missing_ok=True)
        self.wait_for(told.exists, "replicas")
        return int(told.read_text())

    def wait_for(
        self, is_so: Callable[[], bool], what: str, patience_s: float = PATIENCE_S
    ) -> None:
        """AssertionError, with what the driver said, if it ends before, or takes too long."""
        assert self.driver is not None
        deadline = time.monotonic() + patience_s
        while not is_so():
            is_late = time.monotonic() > deadline
            if is_late:
                self.driver.send_signal(signal.SIGUSR1)  # it writes its stacks down
                time.sleep(1.0)
            if is_late or self.driver.poll() is not None:
                status = self.driver.poll()
                raise AssertionError(f"waited for {what}; status {status}\n{self.story()}")
            time.sleep(0.02)

    def story(self) -> str:
        """The ends of what the driver said, of its log, and of its stacks if it was asked."""
        files = (self.said, self.folder / "log.txt", self.gate / "stacks")
        return "\n".join(file.read_text()[-3000:] for file in files if file.exists())

    def harm(self, event: Event) -> None:
        assert self.driver is not None
        self.shared |= self.processes.shared_files()
        if event.kind == "add":
            self.cluster.add_node(num_cpus=1)
        elif event.kind == "remove":
            nodes = sorted(self.cluster.worker_nodes, key=lambda node: node.unique_id)
            self.cluster.remove_node(nodes[event.victim % len(nodes)], allow_graceful=False)
        elif event.kind == "driver":
            self.driver.kill()
            self.driver.wait()
            self.start()
        else:
            self.wait_for(lambda: bool(self.processes.named(REPLICA)), "a replica's process")
            replicas = self.processes.named(REPLICA)
            sent = signal.SIGKILL if event.kind == "kill" else signal.SIGSTOP
            replicas[event.victim % len(replicas)].send_signal(sent)


# ---------------------------------------------------------------- a run


@dataclass
class Outcome:
    """What became of a run."""

    seed: int
    seconds: float = 0.0
    survived: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    """Replicas that the fleet found dead or hanging."""
    is_equal: bool = False
    left: list[str] = field(default_factory=list)
    """Processes, their ports, and files that should not be there."""
    failure: str = ""

    def row(self) -> dict[str, object]:
        counts = {kind: self.survived[kind] for kind in dict.fromkeys(HARM)}
        return {
            "seed": self.seed,
            **counts,
            "replicas lost": self.lost,
            "same ledger": "yes" if self.is_equal else "NO",
            "left behind": len(self.left),
            "seconds": round(self.seconds),
        }


def survive(
    seed: int,
    recipe: Path,
    undisturbed: bytes,
    num_nodes: int = NUM_NODES,
    harm: Sequence[str] = HARM,
) -> Outcome:
    """One run under the harm that `seed` draws; `undisturbed` is the ledger that it must have."""
    outcome, started = Outcome(seed), time.monotonic()
    steps = yaml.safe_load(recipe.read_text())["run"]["steps"]
    processes = Processes()
    # Ray's sockets lie below it, and their paths may have but 107 characters.
    place = Path(tempfile.mkdtemp(prefix="chaos"))
    try:
        with ray_nodes(num_nodes, place / "ray") as cluster:
            victim = Victim(place / "run", recipe, cluster, processes)
            _see_through(victim, plan(seed, steps, harm), outcome)
            outcome.left += processes.left(REPLICA)
        outcome.is_equal = victim.ledger.read_bytes() == undisturbed
        outcome.lost = victim.said.read_text().count("; starting it anew")
        outcome.left += processes.left()
        outcome.left += [
            str(path)
            for path in victim.folder.iterdir()
            if path.name not in FILES and not path.name.startswith("events.out.tfevents")
        ]
        outcome.left += sorted(path for path in victim.shared if os.path.exists(path))
    except Exception as error:
        outcome.failure = f"{type(error).__name__}: {error}"
    finally:
        processes.kill()
        shutil.rmtree(place, ignore_errors=True)
    outcome.seconds = time.monotonic() - started
    return outcome


def _see_through(victim: Victim, events: Sequence[Event], outcome: Outcome) -> None:
    """Let the run go on from event to event, and to its end."""
    victim.hold(0)
    victim.start()
    for event in events:
        victim.come_to(event.step)
        if event.is_calm:
            victim.wait_for(
                lambda: victim.num_up() == len(victim.cluster.worker_nodes), "all replicas"
            )
        if event.kind == "driver":  # caught while it takes steps
            victim.hold(event.step + 1)
        time.sleep(event.after_s)
        victim.harm(event)
        outcome.survived[event.kind] += 1
    victim.hold(EVERYTHING)
    driver = victim.driver
    assert driver is not None
    try:
        status = driver.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        victim.wait_for(lambda: False, "the end", patience_s=0.0)
    assert status == 0, f"status {status}\n{victim.story()}"


@contextmanager
def ray_nodes(num_nodes: int, folder: Path, **head: Any) -> Iterator[Cluster]:
    """A head without room for replicas, and nodes with room for one each."""
    # Ray notes the newest cluster's address there, wherever the cluster itself keeps its files.
    Path(get_default_ray_temp_dir()).mkdir(parents=True, exist_ok=True)
    arguments = {"num_cpus": 0, "include_dashboard": False, "temp_dir": str(folder), **head}
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    # As `ray start --temp-dir` does: a job finds its cluster by it, among all on the machine.
    write_ray_address(cluster.address, str(folder))
    try:
        for _ in range(num_nodes):
            cluster.add_node(wait=False, num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


# ---------------------------------------------------------------- what is run


def write_recipe(folder: Path, num_steps: int) -> Path:
    """A tiny model with random weights, reviews, and a recipe that trains all of its weights."""
    model = _make_model(folder / "model")
    rows = folder / "rows.jsonl"
    with rows.open("w") as file:
        for label, texts in enumerate((workloads.BAD, workloads.GOOD)):
            for text in texts:
                file.write(json.dumps({"sentence": text, "label": label}) + "\n")
    recipe: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float32", "device": "cpu", "kv_tokens": 2048},
        "estimator": {"num_seeds": 4, "batch_size": 4, "eps": 1e-3, "lr": 1e-3, "momentum": 0.5},
        "task": {"preset": "sst2", "train": {"path": str(rows)}, "holdout": 8},
        "fleet": {"threads_per_replica": 1},
        "run": {"steps": num_steps, "seed": 3, "check_every": 20, "eval_every": 25},
    }
    path = folder / "chaos.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def _make_model(folder: Path) -> Path:
    words = sorted({word for text in workloads.BAD + workloads.GOOD for word in text.split()})
    names = ["<s>", "</s>", "<unk>", *sorted({*words, *workloads.OPTIONS, "It", "was"})]
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(names),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).save_pretrained(folder)
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def undisturbed(recipe: Path, folder: Path) -> bytes:
    """The ledger of the run as one process takes it, from start to end."""
    command = [sys.executable, str(ROOT / "launch.py"), "train", str(recipe)]
    arguments = ["fleet.kind=local", f"run.dir={folder}"]
    subprocess.run([*command, *arguments], check=True, capture_output=True)
    return (folder / "ledger.jsonl").read_bytes()


def _range(text: str) -> list[int]:
    """Such as 0-9, or 3."""
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=_range, default="0-9", metavar="FIRST-LAST")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--nodes", type=int, default=NUM_NODES, help="beside the head")
    arguments = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_recipe(Path(folder), arguments.steps)
        ledger = undisturbed(recipe, Path(folder) / "undisturbed")
        for seed in arguments.seeds:
            outcomes.append(survive(seed, recipe, ledger, arguments.nodes))
            print(f"seed {seed}: {outcomes[-1].failure or 'survived'}", flush=True)
            for each in outcomes[-1].left:
                print(f"left behind: {each}", flush=True)
    rows = [outcome.row() for outcome in outcomes]
    print(measure.header())
    measure.print_table(list(rows[0]), [list(row.values()) for row in rows])
    whole = [{**row, "failure": each.failure} for row, each in zip(rows, outcomes, strict=True)]
    print(f"written to {measure.write_results('chaos', whole)}")
    if any(each.failure or each.left or not each.is_equal for each in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
