"""The fleet's policy over simulated replicas: what a step costs to schedule, and what it spares.

    python -m benchmarks.fleet [--replicas 1 4 16 64 256] [--steps 50] [--results FOLDER]

Replicas are simulated in virtual time: each answers after a drawn delay with a long tail. The cost
is real: the processor time that `dispatch` takes for a step, four tasks a replica. What Ray takes
to carry a call is not in it.
"""

import argparse
import heapq
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from orchestrator import environment
from orchestrator.dispatch import Dispatcher, Limits

environment.prepare(threads=1)

from benchmarks import measure  # noqa: E402

TASKS_PER_REPLICA = 4
START_S = 60.0  # virtual: to start a replica anew
PATIENT = Limits(slow_factor=float("inf"), deadline_factor=float("inf"))  # never acts on a delay

Delay = Callable[[random.Random], float]


def long_tailed(draw: random.Random) -> float:
    """Seconds: around 1, and for one call in fifty up to 20."""
    return draw.uniform(0.9, 1.1) + (draw.uniform(1, 20) if draw.random() < 0.02 else 0.0)


@dataclass
class Simulation:
    """A fleet of replicas that answer late, stall or die."""

    num_replicas: int
    delay: Delay = long_tailed
    limits: Limits = Limits()
    stall: float = 0.0
    """Probability that a call is never answered."""
    death: float = 0.0
    """Probability that a replica dies half way through a call."""
    seed: int = 0
    now: float = 0.0
    cost: float = 0.0
    """Processor seconds spent in the policy."""
    num_deaths: int = 0
    num_given_up: int = 0
    events: list[tuple[float, int, str, int, int]] = field(default_factory=list)
    """Time, a number that breaks ties, what happens, to which replica, in which of its lives."""

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.dispatcher = Dispatcher(self.limits, lambda: self.now)
        self.lives = [0] * self.num_replicas
        self.busy_until = [0.0] * self.num_replicas
        self.num_events = 0
        for replica in range(self.num_replicas):
            self.dispatcher.join(replica)

    def step(self, num_tasks: int) -> tuple[list[int], float]:
        """A round: how often each task was answered, in order, and the virtual seconds it took."""
        started = self.now
        answers = [0] * num_tasks
        self.dispatcher.begin("evaluate", [1] * num_tasks)
        while not self.dispatcher.is_done:
            with self._counted():
                pairs, pause = self.dispatcher.assign(), self.dispatcher.pause()
            for replica, _ in pairs:
                self._start_call(replica)
            self._sleep(pause)
            while self.events and self.events[0][0] <= self.now:
                _, _, what, replica, life = heapq.heappop(self.events)
                if life == self.lives[replica]:  # not of one that was given up
                    self._happen(what, replica, answers)
            with self._counted():
                overdue = self.dispatcher.overdue()
            for replica in overdue:
                self.num_given_up += 1
                self._lose(replica)
        return answers, self.now - started

    def _happen(self, what: str, replica: int, answers: list[int]) -> None:
        if what == "answer":
            with self._counted():
                task = self.dispatcher.answered(replica)
            if task is not None:
                answers[task] += 1
        elif what == "death":
            self.num_deaths += 1
            self._lose(replica)
        else:
            self.dispatcher.join(replica)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        started = time.thread_time()
        yield
        self.cost += time.thread_time() - started

    def _start_call(self, replica: int) -> None:
        """Now, or after the call that the replica is at."""
        started = max(self.now, self.busy_until[replica])
        if math.isinf(started):  # it never answers again
            return
        delay, chance = self.delay(self.draw), self.draw.random()
        self.busy_until[replica] = math.inf
        if chance < self.death:
            self._schedule(started + delay / 2, "death", replica)
        elif chance >= self.death + self.stall:
            self.busy_until[replica] = started + delay
            self._schedule(started + delay, "answer", replica)

    def _schedule(self, when: float, what: str, replica: int) -> None:
        self.num_events += 1
        event = (when, self.num_events, what, replica, self.lives[replica])
        heapq.heappush(self.events, event)

    def _sleep(self, pause: float) -> None:
        """Until something happens, but no longer than so many seconds."""
        until = self.now + pause
        self.now = min(until, self.events[0][0]) if self.events else until

    def _lose(self, replica: int) -> None:
        self.lives[replica] += 1
        self.busy_until[replica] = 0.0
        self.dispatcher.lost(replica)
        self._schedule(self.now + START_S, "start", replica)


def cost(num_replicas: int, num_steps: int) -> float:
    """Median processor seconds that the policy takes for a step."""
    simulation = Simulation(num_replicas)
    costs = []
    for _ in range(num_steps):
        simulation.cost = 0.0
        simulation.step(TASKS_PER_REPLICA * num_replicas)
        costs.append(simulation.cost)
    return statistics.median(costs)


def step_times(num_replicas: int, num_steps: int, limits: Limits) -> list[float]:
    """Virtual seconds of each step."""
    simulation = Simulation(num_replicas, limits=limits)
    return [simulation.step(TASKS_PER_REPLICA * num_replicas)[1] for _ in range(num_steps)]


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def draw(costs: dict[int, float], shares: dict[str, list[float]], path: Path) -> None:
    """What a step costs by the fleet's size, and how long the last fleet's steps take."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.loglog(list(costs), [1e3 * value for value in costs.values()], "o-", base=2)
    left.set_yscale("log", base=10)
    left.set_xticks(list(costs), [str(number) for number in costs])
    left.set(xlabel="replicas", ylabel="processor time of a step, ms")
    for name, times in shares.items():
        right.plot(sorted(times), np.linspace(0, 1, len(times)), label=name)
    right.set(xlabel="a step takes at most, s", ylabel="share of steps", xlim=(0, None))
    right.legend(title=f"{list(costs)[-1]} replicas", frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help="a folder")
    chosen = parser.parse_args(arguments)
    rows, costs = [], {}
    for num_replicas in chosen.replicas:
        costs[num_replicas] = cost(num_replicas, chosen.steps)
        times = {
            "with the policy": step_times(num_replicas, chosen.steps, Limits()),
            "without": step_times(num_replicas, chosen.steps, PATIENT),
        }
        ours, patient = times.values()
        rows.append(
            {
                "replicas": num_replicas,
                "cost, ms": 1e3 * costs[num_replicas],
                "step, s": statistics.median(ours),
                "p95, s": percentile(ours, 0.95),
                "patient, s": statistics.median(patient),
                "patient p95, s": percentile(patient, 0.95),
            }
        )
    print(measure.header())
    measure.print_table(list(rows[0]), [list(row.values()) for row in rows])
    path = measure.write_results("fleet", rows, chosen.results)
    draw(costs, times, path.with_suffix(".svg"))
    print(f"written to {path}, and drawn beside it")


if __name__ == "__main__":
    main()
