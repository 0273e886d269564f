"""How many replicas there are to be: arithmetic over what a replica takes and what nodes have.

Owns what a replica takes of its node. A node is a map from Ray's names of resources to amounts;
knows nothing of Ray beside these names, nor of what is free of them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orchestrator.config import ConfigError, FleetSection

GPU_SHARES = 10_000  # Ray counts parts of a GPU in these
Node = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Needs:
    """What one replica takes, all of it on one node."""

    cpus: int
    gpus: float
    """A share of one GPU; 0 on a CPU."""

    @classmethod
    def of(cls, fleet: FleetSection, device: str) -> "Needs":
        """`device` is "cpu" or "cuda"."""
        return cls(fleet.threads_per_replica, fleet.gpus_per_replica if device == "cuda" else 0)

    def room(self, nodes: Iterable[Node]) -> int:
        """Replicas that the nodes hold together."""
        return sum(min(self._on_cpus(node), self.room_on_gpus(node)) for node in nodes)

    def _on_cpus(self, node: Node) -> int:
        return int(node.get("CPU", 0)) // self.cpus

    def room_on_gpus(self, node: Node) -> int:
        """Replicas that a node's GPUs hold, each on one of them; as many as its CPUs where a
        replica takes none."""
        if not self.gpus:
            return self._on_cpus(node)
        share = round(self.gpus * GPU_SHARES)
        return int(node.get("GPU", 0)) * (GPU_SHARES // share)

    def __str__(self) -> str:
        cpus = f"{self.cpus} CPU{'s' * (self.cpus > 1)}"
        return f"{cpus} and {self.gpus:g} GPU" if self.gpus else cpus


def wanted(fleet: FleetSection, room: int, *, has_started: bool) -> int:
    """Replicas that there should be now where the cluster has room for so many.

    A fleet that is not elastic waits for room; one that is takes what there is. Of a number that
    is given, one that has started takes more, up to its limit.
    """
    if not fleet.is_elastic:
        assert isinstance(fleet.num_replicas, int)
        return fleet.num_replicas
    limits = [room]
    if fleet.max_replicas is not None:
        limits.append(fleet.max_replicas)
    if fleet.num_replicas != "auto" and not has_started:
        limits.append(fleet.num_replicas)
    return min(limits)


def check(fleet: FleetSection, needs: Needs, nodes: Iterable[Node]) -> None:
    """Refuse, in one line, a fleet that has no room now and could not be waited for.

    A fixed number is only checked against GPUs: Ray is told of fewer CPUs than a machine has, to
    keep others from it.
    """
    nodes, number = list(nodes), fleet.num_replicas
    if fleet.is_elastic:
        if not needs.room(nodes):
            raise ConfigError(
                f"fleet.num_replicas: {number}: no node of the cluster has room for a replica, "
                f"with {needs}; lower fleet.threads_per_replica"
            )
        return
    room = sum(map(needs.room_on_gpus, nodes))
    if needs.gpus and room < wanted(fleet, room, has_started=False):
        num_gpus = int(sum(node.get("GPU", 0) for node in nodes))
        each = "a GPU" if needs.gpus == 1 else f"{needs.gpus:g} GPU"
        raise ConfigError(
            f"fleet.num_replicas: {number} replicas want {each} each, and the cluster has "
            f"{num_gpus}; lower it, or set model.device=cpu"
        )
