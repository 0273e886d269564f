"""What a run publishes for a cluster's monitoring while it goes on.

Owns the series' names and when they are set. Knows no Ray: it is handed what makes a gauge and a
counter (`actors.exporters`), and what tells the fleet's state.
"""

import threading
from collections.abc import Callable
from typing import Any

from orchestrator.metrics import Evaluation, StepMetrics
from orchestrator.records import FleetState

EVERY_S = 2.0  # between two looks at the fleet; Ray's agents tell of every 10 s, by default
Exporter = Callable[[str, str], Any]
"""Makes a gauge, which has `set`, or a counter, which has `inc`, of a name and a description."""


class ClusterMetrics:
    """Publishes the latest step and the fleet's state every few seconds until it is closed.

    Gauges are set again and again: Ray's agent tells once of what a gauge was set to, and forgets.
    """

    def __init__(self, gauge: Exporter, counter: Exporter, state: Callable[[], FleetState]) -> None:
        self._state = state
        self._step = gauge("zo_step", "Steps that are taken: the length of the ledger.")
        self._probes_per_second = gauge("zo_probes_per_second", "Probes a second, latest step.")
        self._kv_reused = gauge(
            "zo_kv_reused_share", "Share of the latest step's prompt tokens that were reused."
        )
        self._probes = counter("zo_probes", "Probes whose losses went into the ledger.")
        self._copied = counter(
            "zo_probes_copied", "Probes computed once more because they were slow."
        )
        self._requeued = counter(
            "zo_probes_requeued", "Probes given to another replica because theirs was lost."
        )
        self._alive = gauge("zo_replicas_alive", "Replicas that can be given work.")
        self._wanted = gauge("zo_replicas", "Replicas that the fleet has places for.")
        self._lag = gauge(
            "zo_ledger_lag_steps",
            "Steps of the ledger that the slowest replica that is up has not taken; 1 is usual.",
        )
        self._latest: StepMetrics | None = None
        self._told = FleetState()
        self._is_closed = threading.Event()
        self._watch = threading.Thread(target=self._watch_fleet, daemon=True)
        self._watch.start()

    def step(self, metrics: StepMetrics) -> None:
        self._latest = metrics
        self._probes.inc(metrics.num_probes)

    def evaluation(self, evaluation: Evaluation) -> None:
        pass

    def close(self) -> None:
        """The last state is published before this returns."""
        self._is_closed.set()
        self._watch.join()

    def _watch_fleet(self) -> None:
        while not self._is_closed.wait(EVERY_S):
            self._publish(self._state())
        self._publish(self._state())

    def _publish(self, state: FleetState) -> None:
        if (latest := self._latest) is not None:
            self._step.set(latest.step + 1)
            self._probes_per_second.set(latest.num_probes / latest.seconds)
            self._kv_reused.set(latest.kv.reused_share)
        self._alive.set(state.num_up)
        self._wanted.set(len(state.replicas))
        self._lag.set(state.lag)
        for counter, now, before in (
            (self._copied, state.num_copied, self._told.num_copied),
            (self._requeued, state.num_requeued, self._told.num_requeued),
        ):
            if now > before:  # counters refuse to be told of nothing
                counter.inc(now - before)
        self._told = state
