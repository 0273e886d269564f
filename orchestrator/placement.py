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
    """Of each rank."""
    gpus: float
    """Share of one GPU that each rank takes; 0 on a CPU."""
    ranks: int = 1

    @classmethod
    def of(cls, fleet: FleetSection, device: str) -> "Needs":
        """`device` is "cpu" or "cuda"."""
        gpus = fleet.gpus_per_replica if device == "cuda" else 0
        return cls(fleet.threads_per_replica, gpus, fleet.tp_size)

    def room(self, nodes: Iterable[Node]) -> int:
        """Replicas that the nodes hold together."""
        return sum(min(self._on_cpus(node), self.room_on_gpus(node)) for node in nodes)

    def _on_cpus(self, node: Node) -> int:
        return int(node.get("CPU", 0)) // (self.cpus * self.ranks)

    def room_on_gpus(self, node: Node) -> int:
        """Replicas that a node's GPUs hold, each rank on one of them; as many as its CPUs where a
        replica takes none."""
        if not self.gpus:
            return self._on_cpus(node)
        share = round(self.gpus * GPU_SHARES)
        return int(node.get("GPU", 0)) * (GPU_SHARES // share) // self.ranks

    def __str__(self) -> str:
        cpus = self.cpus * self.ranks
        words = f"{cpus} CPU{'s' * (cpus > 1)}"
        return f"{words} and {self.gpu_words}" if self.gpus else words

    @property
    def gpu_words(self) -> str:
        if self.ranks > 1:
            return f"{self.ranks} GPUs of one node"
        return "a GPU" if self.gpus == 1 else f"{self.gpus:g} GPU"


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
                f"with {needs}; {_advice(needs, nodes)}"
            )
        return
    room = sum(map(needs.room_on_gpus, nodes))
    if needs.gpus and room < wanted(fleet, room, has_started=False):
        num_gpus = int(sum(node.get("GPU", 0) for node in nodes))
        raise ConfigError(
            f"fleet.num_replicas: {number} replicas want {needs.gpu_words} each, and the "
            f"cluster has {num_gpus}; lower it, or set model.device=cpu"
        )


def _advice(needs: Needs, nodes: Iterable[Node]) -> str:
    """What to change where no node has room for a replica."""
    has_ranks = needs.ranks > 1
    if not any(map(needs.room_on_gpus, nodes)):
        return f"{'lower fleet.tp_size, or ' * has_ranks}set model.device=cpu"
    return f"lower fleet.threads_per_replica{' or fleet.tp_size' * has_ranks}"
