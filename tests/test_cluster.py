"""Runs on clusters of several Ray nodes, all processes real: as Ray jobs, over a network, harmed.

The nodes are on this machine; where it allows, in network namespaces with addresses of their own.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import DEVICE
from ray.job_submission import JobSubmissionClient
from test_launch import ROOT

from benchmarks import chaos
from orchestrator.batches import Batches
from orchestrator.driver import Driver
from orchestrator.local import LocalFleet
from orchestrator.run_folder import choose, opened_ledger

STEPS = 12
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE != "cpu", reason="the nodes have no GPUs to give"),
]


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory, recipe: dict[str, Any]) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(yaml.safe_dump({**recipe, "run": {**recipe["run"], "steps": STEPS}}))
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, recipe_path: Path) -> bytes:
    """The ledger as one replica in this process writes it."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    run = choose(recipe_path, [f"run.dir={folder}", "fleet.kind=local"])
    folder.mkdir()
    fleet = LocalFleet(run.config, DEVICE)
    with opened_ledger(run, fleet.start(), print) as ledger:
        batches = Batches(run.config, len(run.data.train), run.data.groups)
        Driver(run.config, fleet, ledger, [], batches=batches, num_test=50).train()
    fleet.close()
    return run.ledger_path.read_bytes()


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose name leaves room for those of Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        yield Path(folder)


def finish(command: list[str], processes: chaos.Processes, **options: Any) -> tuple[str, set[int]]:
    """What a command prints, and the parents of the replicas that there were: their nodes."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    nodes: set[int] = set()
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        for replica in processes.named(chaos.REPLICA):
            with suppress(psutil.Error):  # it has ended
                # What a replica starts bears the replica's name at first, and has it for a parent.
                if (parent := replica.parent()) and "raylet" in parent.name():
                    nodes.add(parent.pid)
        time.sleep(0.5)
    process.kill()
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return printed, nodes


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def await_agent(address: str) -> None:
    """Wait until the head can take jobs, which its port tells by taking one."""
    deadline = time.monotonic() + 60
    while True:
        try:
            JobSubmissionClient(address).submit_job(entrypoint="true")
        except RuntimeError as error:
            assert time.monotonic() < deadline, error
            time.sleep(1.0)
        else:
            return


def test_a_ray_job_over_three_nodes_gives_the_local_ledger(
    recipe_path: Path, undisturbed: bytes, short: Path, tmp_path: Path
) -> None:
    """As README.md has it: submitted through the jobs' port, its output followed, from a checkout
    that is sent along; one replica finds room on each node."""
    processes = chaos.Processes()
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    shutil.copy(ROOT / "launch.py", checkout)
    shutil.copytree(ROOT / "orchestrator", checkout / "orchestrator")
    ports = {"dashboard_port": free_port(), "dashboard_agent_listen_port": free_port()}
    with chaos.ray_nodes(3, short, include_dashboard=True, **ports) as nodes:
        await_agent(f"http://{nodes.webui_url}")
        submit = [*RAY, "job", "submit", "--address", f"http://{nodes.webui_url}"]
        train = [sys.executable, "launch.py", "train", str(recipe_path), "fleet.num_replicas=3"]
        told, parents = finish(
            [*submit, "--working-dir", str(checkout), "--", *train, "fleet.kind=ray"]
            + [f"run.dir={tmp_path / 'run'}"],
            processes,
            cwd=tmp_path,
        )
    assert "starting 3 ray replicas" in told  # what the job prints reaches who submitted it
    assert f"step {STEPS}/{STEPS}" in told and "succeeded" in told
    assert len(parents) == 3
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == undisturbed


class Network:
    """Network namespaces on one bridge: machines that know each other by address alone."""

    def __init__(self, num_machines: int) -> None:
        self.name = f"zo{os.getpid() % 100000}"
        self.addresses = [f"10.213.7.{place + 1}" for place in range(num_machines)]
        self._made: list[list[str]] = []

    def __enter__(self) -> "Network":
        try:
            self._do(["link", "add", self.name, "type", "bridge"], ["link", "del", self.name])
            self._do(["link", "set", self.name, "up"])
            for place, address in enumerate(self.addresses):
                space, inner, outer = self.machine(place), "eth0", f"{self.name}v{place}"
                self._do(["netns", "add", space], ["netns", "del", space])
                self._do(["link", "add", outer, "type", "veth", "peer", inner, "netns", space])
                self._do(["link", "set", outer, "master", self.name, "up"])
                self._do(["-n", space, "address", "add", f"{address}/24", "dev", inner])
                self._do(["-n", space, "link", "set", inner, "up"])
                self._do(["-n", space, "link", "set", "lo", "up"])
        except (OSError, subprocess.CalledProcessError) as error:
            self.__exit__()
            reason = getattr(error, "stderr", "") or str(error)
            pytest.skip(f"no network namespaces here: {reason.strip()}")
        return self

    def __exit__(self, *_: object) -> None:
        for command in reversed(self._made):
            subprocess.run(["ip", *command], capture_output=True)

    def _do(self, command: list[str], undo: list[str] | None = None) -> None:
        subprocess.run(["ip", *command], check=True, capture_output=True, text=True)
        if undo:
            self._made.append(undo)

    def machine(self, place: int) -> str:
        return f"{self.name}n{place}"

    def on(self, place: int, command: list[str]) -> list[str]:
        """The command as it runs on a machine."""
        return ["ip", "netns", "exec", self.machine(place), *command]


def test_a_run_over_a_network_gives_the_local_ledger(
    recipe_path: Path,
    undisturbed: bytes,
    short: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nodes that reach each other by their own addresses alone, and no other machine at all."""
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")  # not on the loopback address
    processes = chaos.Processes()
    with Network(3) as network:
        address = f"{network.addresses[0]}:6379"
        for place, own in enumerate(network.addresses):
            start = [*RAY, "start", f"--node-ip-address={own}", "--num-cpus", str(min(place, 1))]
            start += ["--head", "--port=6379", f"--temp-dir={short}", "--include-dashboard=false"]
            if place:
                start = [*start[:-4], f"--address={address}"]
            subprocess.run(network.on(place, start), check=True, capture_output=True, timeout=120)
        try:
            train = [sys.executable, str(ROOT / "launch.py"), "train", str(recipe_path)]
            told, parents = finish(
                network.on(0, [*train, "fleet.kind=ray", "fleet.num_replicas=2"])
                + [f"run.dir={tmp_path / 'run'}"],
                processes,
                env={**os.environ, "RAY_ADDRESS": address},
            )
        finally:
            processes.kill()
    assert len(parents) == 2, told
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == undisturbed


def test_a_run_under_chaos_gives_the_undisturbed_ledger(tmp_path: Path) -> None:
    """A seed of `python -m benchmarks.chaos`, with fewer steps and less harm."""
    recipe = chaos.write_recipe(tmp_path, num_steps=STEPS)
    ledger = chaos.undisturbed(recipe, tmp_path / "run")
    harm = ("stop", "remove", "add", "driver")
    outcome = chaos.survive(1, recipe, ledger, harm=harm)
    assert outcome.failure == ""
    assert outcome.survived == dict.fromkeys(harm, 1)
    assert (outcome.is_equal, outcome.left) == (True, [])
