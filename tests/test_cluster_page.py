"""docs/cluster.md and the files beside it: its figures, its YAML, and its commands on two nodes.

The nodes are two of Ray's on this machine, started by the page's own commands. Real Ray, real
SGLang engines, a tiny model.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import ray
import torch
import yaml
from conftest import DEVICE
from ray.autoscaler._private.util import prepare_config, validate_config
from test_fleets import recover
from transformers import AutoModelForCausalLM

from benchmarks.shapes import SHAPES
from orchestrator import actors
from orchestrator.batches import Batches
from orchestrator.cluster_metrics import ClusterMetrics
from orchestrator.config import Config
from orchestrator.driver import Driver
from orchestrator.noise_floor import REPEATS
from orchestrator.recipe_file import load
from orchestrator.seed_sync import Header, Ledger

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"
NUM_STEPS, NUM_PROBES = 5, 4

# -------------------------------------------------------------------- figures


def table(heading: str) -> list[list[str]]:
    """The rows of the page's table with this heading, cell by cell."""
    lines = PAGE.splitlines()
    start = lines.index(heading) + 2
    ends = (index for index in range(start, len(lines)) if not lines[index].startswith("|"))
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[start : next(ends)]]


def measured(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((RESULTS / name).read_text())["rows"]
    return rows


BYTES = "| `space` | bytes a parameter, GPU | host |"
SPACES = ["lora", "dense:bfloat16", "low_rank", "dense:float32", "dense:host"]


def test_bytes_a_parameter_are_those_that_were_measured() -> None:
    rows = {row["space"]: row for row in measured("memory-nvidia-h200.json")}
    for (_, on_gpu, on_host), space in zip(table(BYTES), SPACES, strict=True):
        assert on_gpu == f"{rows[space]['held_bytes_a_parameter']:.2f}"
        assert on_host in ("", f"{rows[space]['pinned_bytes_a_parameter']:.2f}")


def test_a_replicas_memory_follows_from_the_pages_formula() -> None:
    a_parameter = {name: float(row[1]) for row, name in zip(table(BYTES), SPACES, strict=True)}
    for model, *told in table("| model | lora | dense, bfloat16 master | dense |"):
        config = SHAPES[model.lower()].config
        with torch.device("meta"):
            shape = AutoModelForCausalLM.from_config(config)
        num_parameters = sum(each.numel() for each in shape.parameters())
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        width = config.hidden_size // config.num_attention_heads
        pool = 16_384 * 2 * config.num_hidden_layers * heads * width * 2
        for value, space in zip(told, ("lora", "dense:bfloat16", "dense:float32"), strict=True):
            found = (num_parameters * a_parameter[space] + pool) / 1e9 + 0.42
            assert float(value) == pytest.approx(found, abs=0.06), (model, space)


def test_seeds_a_second_are_those_of_the_measured_steps() -> None:
    known = {
        ("opt-13b", row["tokens"], row["space"]): row["ours_ms"]
        for row in measured("steps-13b-nvidia-h200.json")
    }
    (large,) = measured("memory-30b-nvidia-h200.json")
    known["opt-30b", "16x64", "dense:bfloat16"] = large["step_ms"]
    bar = next(row for row in measured("bars-nvidia-h200.json") if "step, opt-1.3b" in row["what"])
    known["opt-1.3b", "16x64", "dense:float32"] = bar["ours"]
    spaces = {"lora": "lora", "lora over fp8": "lora:fp8"}
    rows = table("| model | tokens of a probe | space | seeds a second |")
    for model, tokens, space, told in rows:
        what = "sst2" if "sentences" in tokens else "16x64"
        kind = spaces.get(space) or f"dense:{space.split()[1]}"
        assert told == f"{1000 / known[model.lower(), what, kind]:.1f}", (model, space)


# -------------------------------------------------------------------- files


def test_the_launchers_file_is_what_ray_takes() -> None:
    values = yaml.safe_load((ROOT / "docs/cluster/launcher.yaml").read_text())
    validate_config(prepare_config(values))
    with pytest.raises(jsonschema.ValidationError, match="setup_command"):
        validate_config(prepare_config({**values, "setup_command": ["make"]}))


def record(required: list[str], **properties: Any) -> dict[str, Any]:
    """An object that has no other members."""
    return {
        "type": "object",
        "required": required,
        "properties": properties,
        "additionalProperties": False,
    }


def many(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


# What KubeRay's types for ray.io/v1 and Kubernetes' for pods say of the members that the file has:
# names, types, which must be there.
TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
QUANTITY = {
    "type": "string",
    "pattern": r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))"
    r"(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$",
}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
CONTAINER = record(
    ["name"],
    name=TEXT,
    image=TEXT,
    ports=many(record(["containerPort"], name=TEXT, containerPort=NUMBER)),
    resources=record([], requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts=many(record(["name", "mountPath"], name=TEXT, mountPath=TEXT)),
)
VOLUME = record(
    ["name"],
    name=TEXT,
    persistentVolumeClaim=record(["claimName"], claimName=TEXT, readOnly=FLAG),
    emptyDir=record([], medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY),
)
TEMPLATE = record([], spec=record(["containers"], containers=many(CONTAINER), volumes=many(VOLUME)))
HEAD = record(["rayStartParams", "template"], rayStartParams=TEXTS, template=TEMPLATE)
WORKERS = record(
    ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
    groupName=TEXT,
    replicas=NUMBER,
    minReplicas=NUMBER,
    maxReplicas=NUMBER,
    rayStartParams=TEXTS,
    template=TEMPLATE,
)
RAY_JOB = record(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=record(["name"], name=TEXT),
    spec=record(
        [],
        entrypoint=TEXT,
        backoffLimit=NUMBER,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=NUMBER,
        rayClusterSpec=record(
            ["headGroupSpec"], rayVersion=TEXT, headGroupSpec=HEAD, workerGroupSpecs=many(WORKERS)
        ),
    ),
)


@pytest.fixture(scope="module")
def ray_job() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((ROOT / "docs/cluster/rayjob.yaml").read_text())
    return values


def test_the_ray_job_has_the_form_that_kuberay_takes(ray_job: dict[str, Any]) -> None:
    jsonschema.validate(ray_job, RAY_JOB)
    cluster = ray_job["spec"]["rayClusterSpec"]
    assert f"ray=={cluster['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]


def test_the_ray_jobs_entrypoint_starts_a_run_and_then_continues_it(
    ray_job: dict[str, Any], tmp_path: Path
) -> None:
    """As KubeRay has it: unquoted in a shell's line. `python` tells what it was called with."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\necho "$@"\n')
    stub.chmod(0o755)
    entrypoint = ray_job["spec"]["entrypoint"].replace("/opt/forward-only", str(ROOT))
    entrypoint = entrypoint.replace("/shared", str(tmp_path))

    def called() -> list[str]:
        path = f"{tmp_path}:{os.environ['PATH']}"
        done = subprocess.run(
            ["/bin/sh", "-c", f"env {entrypoint} ;"],
            env={"PATH": path},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()

    program, verb, recipe, *overrides = called()
    assert (program, verb) == ("launch.py", "train")
    assert load(ROOT / recipe, overrides).run.dir == f"{tmp_path}/runs/first"
    (tmp_path / "runs/first").mkdir(parents=True)
    (tmp_path / "runs/first/ledger.jsonl").touch()
    assert called() == ["launch.py", "train", "--resume", f"{tmp_path}/runs/first"]


# -------------------------------------------------------------------- commands


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    lines = "".join(blocks).splitlines()
    return [re.sub(r"\s{2,}# .*", "", line) for line in lines if line]


def command(beginning: str) -> str:
    (found,) = [line for line in commands() if line.startswith(beginning)]
    return found


def free_ports(number: int) -> list[int]:
    listening = [socket.socket() for _ in range(number)]
    for each in listening:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in listening]
    for each in listening:
        each.close()
    return ports


@dataclass(frozen=True)
class Cluster:
    """Two nodes, and how this page's words are to be read here."""

    words: dict[str, str]
    folder: Path
    environment: dict[str, str]
    metrics_ports: tuple[int, int]

    def run(self, line: str, *more: str) -> str:
        """What a line of the page, and more behind it, prints."""
        for word, other in self.words.items():
            line = line.replace(word, other)
        done = subprocess.run(
            ["bash", "-c", " ".join((line, *more))],
            cwd=self.folder / "checkout",
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, recipe: dict[str, Any]) -> Iterator[Cluster]:
    """Started by the page's commands 2 and 3; on ports, and with ends, of its own."""
    folder = tmp_path_factory.mktemp("cluster")
    checkout = folder / "checkout"
    shutil.copytree(ROOT / "orchestrator", checkout / "orchestrator")
    shutil.copy(ROOT / "launch.py", checkout)
    values = {**recipe, "run": {**recipe["run"], "steps": 100_000}}
    values["fleet"] = {"kind": "ray", "num_replicas": "auto"}
    (checkout / "tiny.yaml").write_text(yaml.safe_dump(values))
    gcs, dashboard, client, metrics, *agents = free_ports(7)
    words = {
        "FIRST-NODE": "127.0.0.1",
        "6379": str(gcs),
        "8080": str(metrics),
        "/shared": str(folder / "shared"),
        "configs/demo.yaml": "tiny.yaml",
        "model.device=cuda model.dtype=bfloat16 ": "",
    }
    sessions = Path("/tmp") / f"zo-{os.getpid()}"  # Ray's sockets want a short path
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_TMPDIR": str(sessions),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_ADDRESS": "",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # this process has it for Rays of its own
    }
    sessions.mkdir()
    made = Cluster(words, folder, environment, (metrics, agents[2]))
    common = ["--num-cpus=1", "--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"]
    if DEVICE == "cuda":
        common.append("--num-gpus=1")
    interval = '{"metrics_report_interval_ms": 5000}'
    ports = f"--port={gcs} --dashboard-port={dashboard} --ray-client-server-port={client}"
    agent = "--dashboard-agent-listen-port"
    try:
        made.run(
            command("ray start --head"),
            *common,
            ports,
            f"{agent}={agents[0]} --system-config='{interval}'",
        )
        second = command("ray start --address").replace("8080", str(agents[2]))
        made.run(second, *common, f"{agent}={agents[1]}")
        yield made
    finally:
        end_all(sessions)
        shutil.rmtree(sessions, ignore_errors=True)


def end_all(sessions: Path) -> None:
    """End the processes that were started with this folder for their sessions, and no others."""
    ours = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAY_TMPDIR") == str(sessions):
                ours.append(process)
        except psutil.Error:
            continue
    for process in ours:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(ours, timeout=10)


def until(what: Callable[[], bool], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def until_holds(
    expected: Mapping[str, float], exported: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """All series once they have these values, which agents tell some seconds later. A gauge is
    told once each time that it has come to the agent."""
    found: dict[str, float] = {}
    deadline = time.monotonic() + 120
    while not expected.items() <= found.items():
        assert time.monotonic() < deadline, found
        time.sleep(2)
        found = exported()
    return found


def series(text: str, run: str) -> dict[str, float]:
    """The run's own series in Prometheus text."""
    found = re.findall(rf'^(ray_zo_\w+)\{{.*\brun="{run}".*\}} (\S+)$', text, flags=re.MULTILINE)
    return {name: float(value) for name, value in found}


@pytest.mark.slow
def test_a_nodes_agent_exports_the_runs_series(
    cluster: Cluster, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over some steps, and after a replica has died."""
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{cluster.words['6379']}")
    values = {**recipe, "fleet": {"kind": "ray", "num_replicas": 2}}
    values["run"] = {**recipe["run"], "steps": NUM_STEPS}
    config = Config.model_validate(values)
    said: list[str] = []
    fleet = actors.ActorFleet(config, tmp_path / "none" / "log", said.append)

    def exported() -> dict[str, float]:
        """Of both nodes: a driver on their machine may be either's."""
        found: dict[str, float] = {}
        for port in cluster.metrics_ports:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
                found |= series(answer.read().decode(), "tried")
        return found

    try:
        fleet.start()
        recover(fleet)  # the second one, too
        published = ClusterMetrics(*actors.exporters("tried"), fleet.state)
        header = Header(1, 1, "tiny", "", "", "", ())
        with Ledger.create(tmp_path / "ledger.jsonl", header) as ledger:
            batches = Batches(config, 40)
            driver = Driver(config, fleet, ledger, [published], batches=batches, num_test=50)
            driver.train()
        expected = {
            "ray_zo_step": NUM_STEPS,
            "ray_zo_probes_total": NUM_STEPS * NUM_PROBES,
            "ray_zo_replicas_alive": 2,
            "ray_zo_replicas": 2,
            "ray_zo_ledger_lag_steps": 1,
        }
        found = until_holds(expected, exported)
        assert found["ray_zo_probes_per_second"] > 0
        assert 0 < found["ray_zo_kv_reused_share"] < 1  # options share their prompts
        assert found.get("ray_zo_probes_requeued_total", 0) == 0

        fleet.digests()  # both replicas take the last step
        until_holds({"ray_zo_ledger_lag_steps": 0}, exported)
        ray.kill(fleet._seats[0].actor)
        driver.look(NUM_STEPS)
        until_holds({"ray_zo_replicas_alive": 1}, exported)
        state = fleet.state()
        assert state.replicas[0].num_applied == 0
        assert state.replicas[1].num_applied == NUM_STEPS
        num_probes = NUM_STEPS * NUM_PROBES + 2 * REPEATS  # for the noise floor
        assert sum(replica.num_probes for replica in state.replicas) == num_probes
        published.close()
    finally:
        fleet.close()


@pytest.mark.slow
def test_the_pages_commands_run(cluster: Cluster) -> None:
    """A job on both nodes, watched, stopped, and resumed from its ledger as another job."""
    run = cluster.folder / "shared/runs/first"
    done = ["make setup", "ray start --head", "ray start --address"]

    def do(beginning: str) -> str:
        done.append(beginning)
        return cluster.run(command(beginning))

    def num_steps() -> int:
        ledger = run / "ledger.jsonl"
        return ledger.read_bytes().count(b"\n") - 1 if ledger.exists() else 0

    assert "setup:" in (ROOT / "Makefile").read_text()
    do("ray job submit --submission-id first")
    until(lambda: num_steps() > 20)
    assert "2.0/2.0 CPU" in do("ray status")
    found = until_holds(
        {"ray_zo_replicas_alive": 2},
        lambda: series(cluster.run(command("curl"), "|| true"), "first"),
    )
    done.append("curl")
    assert 0 < found["ray_zo_step"] <= num_steps()
    assert "RUNNING" in do("ray job status first")
    do("ray job stop first")
    told = do("ray job logs --follow first")
    assert "replica" in told and "step 1/100000" in told and "interrupted" in told
    assert "\x1b[2K" not in told  # no control codes in a job's log

    before = num_steps()
    do("ray job submit --submission-id again")
    until(lambda: num_steps() > before)
    assert f"continuing after {before} steps" in do("ray job logs again")
    cluster.run("ray job stop again")
    assert "the model is loaded" in do("""grep -h '"replica": 1,'""")
    assert f"{num_steps():,} in all, no gaps" in do("python launch.py inspect")
    ours = [line for line in (run / "log.txt").read_text().splitlines() if line.startswith("{")]
    records = [json.loads(line) for line in ours]
    assert {each["run"] for each in records} == {"first"}
    assert {each.get("replica") for each in records} == {None, 0, 1}
    # at the one that was being computed, or that had just been written down
    assert any(each.get("step") in (before - 1, before) for each in records)
    done.append("""grep -h '"level": "warning"'""")  # nothing was lost here, which grep tells by 1
    assert all(any(line.startswith(each) for each in done) for line in commands())
