"""A fleet for a run: made, started, checked and closed.

Owns what each kind of fleet needs imported, and what the user is told meanwhile. Knows nothing of
what the fleet is started for.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from orchestrator import assets, environment
from orchestrator.cluster_metrics import ClusterMetrics
from orchestrator.config import Config, ConfigError
from orchestrator.metrics import Observer
from orchestrator.records import Fleet, FleetState, ReplicaInfo, StepUpdate
from orchestrator.run_folder import Run

Say = Callable[[str], None]


@contextmanager
def started(
    run: Run,
    log: Path,
    say: Say,
    past: Iterable[StepUpdate] = (),
    *,
    watch: Callable[[Callable[[], FleetState]], None] | None = None,
) -> Iterator[tuple[Fleet, ReplicaInfo]]:
    """A fleet whose replicas all see this process's data, and stand at the base model, or at a
    snapshot of `past`: a run's updates, which the fleet then has. `watch` is given, before it
    starts, what tells its state."""
    config = run.config
    _prepare_model(config, say)
    number, kind = config.fleet.num_replicas, config.fleet.kind
    if number == "auto":
        say(f"starting {kind} replicas ...")
    else:
        say(f"starting {number} {kind} replica{'s' * (number > 1)} ...")
    fleet = _make_fleet(run, log, say)
    for update in past:
        fleet.apply(update)
    if watch is not None:
        watch(fleet.state)
    try:
        info = fleet.start()
        if info.data_hash != run.data.fingerprint():
            raise ConfigError(
                "task: the replicas read other rows than this process does; task.train and "
                "task.test must hold the same on every node"
            )
        say(f"{info.model_class}, {info.num_parameters:,} parameters, on {info.device}")
        yield fleet, info
    finally:
        fleet.close()


@contextmanager
def monitored(run: Run, fleet: Fleet) -> Iterator[list[Observer]]:
    """Those who publish what a run does, within, to its cluster's monitoring: none without Ray."""
    if run.config.fleet.kind != "ray":
        yield []
        return
    from orchestrator.actors import exporters

    published = ClusterMetrics(*exporters(run.folder.resolve().name), fleet.state)
    try:
        yield [published]
    finally:
        published.close()


def _prepare_model(config: Config, say: Say) -> None:
    """Let the user see what would otherwise be a silent first minute."""
    path = config.model.path
    if path.endswith(".gguf"):
        folder = assets.dequantized_folder(assets.resolve_file("model.path", path))
        if not folder.exists():
            say(f"de-quantising {path}, this once, into {folder} ...")
            from orchestrator import checkpoint

            checkpoint.locate(path)


def _make_fleet(run: Run, log: Path, say: Say) -> Fleet:
    """Imports what the kind of fleet needs: Ray here, or torch and SGLang."""
    config = run.config
    if config.fleet.kind == "ray":
        from orchestrator.actors import ActorFleet

        return ActorFleet(config, log, say, pieces=run.pieces)
    with environment.importing():
        import torch

        from orchestrator import dist_patch

        device = config.model.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dist_patch.apply(device)
        from orchestrator.local import LocalFleet  # imports SGLang: it has to follow the patches

    return LocalFleet(config, device, say)


def with_one_replica(run: Run) -> Run:
    alone = {"num_replicas": 1, "min_replicas": 1, "max_replicas": None}
    fleet = run.config.fleet.model_copy(update=alone)
    return replace(run, config=run.config.model_copy(update={"fleet": fleet}))
