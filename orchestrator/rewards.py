"""Values of generated texts by the user's own function, called in worker processes.

Owns the workers: their life, what they see of this process, and what a call that fails counts.
Nothing that the function does reaches this process: it neither imports the module nor unpickles
an answer, and a worker that hangs is killed. Knows nothing of models, or what values are for.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from orchestrator.config import ConfigError, Reward
from orchestrator.records import FAILURES

logger = logging.getLogger(__name__)
WORKER = Path(__file__).with_name("reward_worker.py")
START_S = 120.0  # for the user's module to be imported
LOOK_S = 1.0  # between two looks at whether workers are alive
# What a worker sees of this process's environment, which may hold secrets.
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


@dataclass(frozen=True, slots=True)
class Judged:
    """A text's value, and how the call for it failed, one of FAILURES, if it did."""

    value: float
    failure: str | None = None


Asked = tuple[dict[str, Any], str]
"""A row's fields and a generated text."""


def count(judged: Sequence[Judged]) -> tuple[int, ...]:
    """How many calls failed, by FAILURES."""
    failures = [each.failure for each in judged]
    return tuple(failures.count(kind) for kind in FAILURES)


def check(reward: Reward) -> None:
    """Raise ConfigError, in one line, if a worker cannot import the function."""
    pool = RewardPool(reward)
    try:
        pool.start()
    finally:
        pool.close()


class _Worker:
    """One process, and the sample that it is at."""

    def __init__(self, reward: Reward) -> None:
        self.channel, theirs = socket.socketpair()
        self.channel.settimeout(reward.timeout)
        descriptor = theirs.fileno()
        # -P: the folder of the worker's file is ours, and no place for the user's modules.
        arguments = [sys.executable, "-P", str(WORKER), str(descriptor), str(os.getpid())]
        with theirs:
            self.process = subprocess.Popen(
                [*arguments, reward.function],
                env=_environment(reward),
                stdin=subprocess.DEVNULL,
                stdout=2,  # what the function prints goes where errors go: to the log
                pass_fds=[descriptor],
                start_new_session=True,
            )
        self.is_ready = False
        self.sample: int | None = None
        self.deadline = time.monotonic() + START_S
        self._unread = b""

    @property
    def is_busy(self) -> bool:
        return not self.is_ready or self.sample is not None

    def ask(self, sample: int, asked: Asked, timeout: float) -> None:
        """OSError where the worker does not take it, or does not take it in time."""
        self.sample, self.deadline = sample, time.monotonic() + timeout
        self.channel.sendall(json.dumps(asked, default=str).encode() + b"\n")

    def heard(self) -> dict[str, Any] | None:
        """Its answer, None while there is none; EOFError if there will not be one."""
        try:
            received = self.channel.recv(65536)
        except OSError:
            received = b""
        if not received:
            raise EOFError("its process ended")
        line, newline, rest = (self._unread + received).partition(b"\n")
        self._unread = rest if newline else line
        if not newline:
            return None
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError):
            raise EOFError("it wrote into the worker's own channel") from None

    def kill(self) -> None:
        """End the process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.channel.close()


class RewardPool:
    """The workers of a replica. They are started when they are first needed."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self._workers: list[_Worker] = []
        self._has_started = self._has_told = False

    def start(self) -> None:
        """Have one worker ready. Raises ConfigError if it cannot import the function."""
        self._fill(1)
        while not any(worker.is_ready for worker in self._workers):
            self._look()

    def judge(self, samples: Sequence[Asked]) -> list[Judged]:
        """The samples' values. Each is called for alone, so that it fails alone.

        ConfigError if no worker could ever import the function.
        """
        judged: dict[int, Judged] = {}
        waiting = deque(range(len(samples)))
        while len(judged) < len(samples):
            self._fill(min(self._reward.workers, len(samples) - len(judged)))
            for worker in [worker for worker in self._workers if not worker.is_busy]:
                if worker.process.poll() is not None:  # before it could be asked anything
                    self._lose(worker, "crash", "its process ended")
                elif waiting:
                    index = waiting.popleft()
                    try:
                        worker.ask(index, samples[index], self._reward.timeout)
                    except OSError as error:
                        kind = "timeout" if isinstance(error, TimeoutError) else "crash"
                        judged[index] = self._lose(worker, kind, str(error))
            for sample, value in self._look():
                # A worker that dies before it is asked anything costs a sample too, or a module
                # that can be imported no more would keep this loop for ever.
                if sample is None and waiting:
                    judged[waiting.popleft()] = value
                elif sample is not None:
                    judged[sample] = value
        return [judged[index] for index in range(len(samples))]

    def close(self) -> None:
        """End all workers, whatever they are at."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def _fill(self, number: int) -> None:
        while len(self._workers) < number:
            self._workers.append(_Worker(self._reward))

    def _look(self) -> list[tuple[int | None, Judged]]:
        """Wait for the next answer or the next worker that fails; samples and their values.

        A value without a sample is that of a worker which failed before it was asked.
        """
        busy = [worker for worker in self._workers if worker.is_busy]
        rest = min(worker.deadline for worker in busy) - time.monotonic() if busy else 0.0
        ready = wait([worker.channel for worker in self._workers], min(max(0.0, rest), LOOK_S))
        values: list[tuple[int | None, Judged]] = []
        for worker in list(self._workers):
            sample, was_busy = worker.sample, worker.is_busy
            if worker.channel in ready:
                try:
                    answer = worker.heard()
                except EOFError as error:
                    lost = self._lose(worker, "crash", str(error))
                    values += [(sample, lost)] if was_busy else []
                    continue
                if answer is not None:
                    values += self._taken(worker, answer)
            elif worker.process.poll() is not None and not wait([worker.channel], 0):
                # What it has started may hold its channel open, so that this tells no end.
                lost = self._lose(worker, "crash", "its process ended")
                values += [(sample, lost)] if was_busy else []
            elif was_busy and time.monotonic() > worker.deadline:
                limit = START_S if sample is None else self._reward.timeout
                values.append((sample, self._lose(worker, "timeout", f"no answer in {limit:g} s")))
        return values

    def _taken(self, worker: _Worker, answer: dict[str, Any]) -> list[tuple[int | None, Judged]]:
        """What a worker's answer comes to."""
        if "ready" in answer:
            worker.is_ready = self._has_started = True
            return []
        if "refused" in answer:
            return [(None, self._lose(worker, "crash", str(answer["refused"])))]
        sample, worker.sample = worker.sample, None
        if "failure" in answer:
            return [(sample, self._failed(answer["failure"], answer["reason"]))]
        return [(sample, Judged(float(answer["value"])))]

    def _lose(self, worker: _Worker, kind: str, reason: str) -> Judged:
        """Do without a worker; another is started when it is needed."""
        self._workers.remove(worker)
        worker.kill()
        if not self._has_started:
            raise ConfigError(
                f"task.reward.function: {self._reward.function}: {reason}; it is looked for in "
                f"task.reward.path ({self._reward.path}), in the working directory, and among what "
                "is installed"
            )
        return self._failed(kind, reason)

    def _failed(self, kind: str, reason: str) -> Judged:
        if not self._has_told:
            self._has_told = True
            logger.warning(
                "%s failed (%s): %s; further failures are only counted",
                self._reward.function,
                kind,
                reason,
            )
        return Judged(self._reward.failed, kind)


def _environment(reward: Reward) -> dict[str, str]:
    names = (*PASSED_ON, *reward.environment)
    paths = [reward.path, os.getcwd(), os.environ.get("PYTHONPATH", "")]
    return {
        **{name: os.environ[name] for name in names if name in os.environ},
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": "1",  # workers are many already
    }
