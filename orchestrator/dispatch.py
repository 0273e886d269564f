"""Who computes what next, and which call is given up: the fleet's policy, in pure code.

Owns the queue of a round, the calls that run, and what the fleet's own times say of them. Replicas
and tasks are numbers, the clock is handed in; knows nothing of Ray, of probes, or of how a replica
is killed or started. Whatever it decides costs time alone: a task's answer is the same whoever
computes it, and each task is answered once.
"""

import math
from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

MIN_KNOWN = 8  # calls of a kind before their median counts for anything
RECENT = 512  # calls of a kind that the median is over: two of each replica of a large fleet
MOST_COPIES = 3  # of a task at a time: one in two thousand is slow twice where one in fifty is once
BRIEF_S = 0.05  # what takes less is best given together: a call's latency is some twentieth of it
SHORT_S = 0.25  # and a hundredth of this: what takes longer gains little from being given ahead
PULSE_S = 1.0  # longest sleep between two looks at what is late
LONGEST_PAUSE_S = 300.0  # between two attempts to start a replica


@dataclass(frozen=True, slots=True)
class Limits:
    """How much patience the fleet has."""

    slow_factor: float = 2.0
    """What takes so many times the median is computed once more by a replica that would be idle.
    Below it a copy would rarely answer first, and would keep its replica from the next step's
    work."""
    deadline_factor: float = 10.0
    """A call that takes so many times the median is given up, and its replica replaced."""
    deadline_floor_s: float = 30.0
    """But not before this: to start a replica takes as long, and so may a busy disk or network."""
    first_call_s: float = 1800.0
    """For a replica to load, for each part of its replay, and for its first call of a kind, which
    compiles and captures; in a run that is resumed the first of all replays the ledger."""
    patience_s: float = 600.0
    """For a fleet of which too little is left to get a replica back."""
    most_losses: int = 4
    """A task that was lost so often is taken to be what kills its replicas."""


@dataclass(slots=True)
class Work:
    """What became of the units of work of one kind."""

    done: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    """By replica, those whose answers it was the first to give."""
    seconds: dict[int, float] = field(default_factory=dict)
    """By replica, of a unit in its latest answer."""
    num_copied: float = 0
    """Those that were computed once more because they were slow."""
    num_requeued: float = 0
    """Those that waited anew because their replica was lost."""


class TaskLost(Exception):
    """A task has taken too many replicas with it."""


class _Times:
    """Seconds a unit of work of the latest calls, with their median at hand."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque()
        self._ordered: list[float] = []

    def add(self, value: float) -> None:
        self._latest.append(value)
        insort(self._ordered, value)
        if len(self._latest) > RECENT:
            del self._ordered[bisect_left(self._ordered, self._latest.popleft())]

    @property
    def median(self) -> float | None:
        """None while too few calls are known."""
        if len(self._ordered) < MIN_KNOWN:
            return None
        return self._ordered[len(self._ordered) // 2]


@dataclass(slots=True)
class _Call:
    """A task that a replica is computing, or starts next; `started` is infinite until then."""

    round: int
    kind: str
    task: int
    size: float
    started: float
    is_first: bool


class Dispatcher:
    """Rounds of tasks over replicas that come and go.

    A round's caller hands out what `assign` returns, reports `answered` and `lost`, and looks at
    `overdue` after at most `pause` seconds, until the round `is_done`. A replica may be handed its
    next task while it is at one; it answers them in that order.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float], min_replicas: int = 1) -> None:
        """`clock` gives seconds, from any origin. Nothing is handed out while fewer replicas are
        up than `min_replicas`."""
        self._limits = limits
        self._clock = clock
        self._min_replicas = min_replicas
        self._places: list[int] = []  # all replicas that there have been, up or not
        self._free: dict[int, None] = {}
        self._calls: dict[int, _Call] = {}  # by replica, the earliest first
        self._next: dict[int, _Call] = {}  # by replica, what it starts after its call
        self._hungry: dict[int, None] = {}  # replicas at work for this round with nothing next
        self._known: dict[int, set[str]] = {}  # the kinds of calls that a replica has answered
        self._times: dict[str, _Times] = {}
        # Seconds a unit in any call; by kind, and whether it was a replica's first of the kind.
        self._slowest: dict[tuple[str, bool], float] = {}
        self.work: defaultdict[str, Work] = defaultdict(Work)  # by kind
        self._short_since = clock()
        self._round = 0
        self._waiting: dict[int, None] = {}  # tasks, in their order
        self._homes: Sequence[int] = []
        self._shares: dict[int, list[int]] | None = None  # by replica; None: to be dealt anew
        self._own: dict[int, int] | None = None  # in a round of one task each: those to be started
        self._begin("", [])

    # ---------------------------------------------------------------- replicas

    @property
    def replicas(self) -> list[int]:
        """Those that can be given work, now or after what they do."""
        return sorted(self._known)

    def join(self, replica: int) -> None:
        """A replica is up."""
        self._known[replica] = set()
        self._free[replica] = None
        self._places = sorted({*self._places, replica})
        self._shares = None

    def lend(self) -> int | None:
        """A replica that computes nothing, for other work until it is given back or lost; None if
        there is none."""
        return self._free.popitem()[0] if self._free else None

    def give_back(self, replica: int) -> None:
        """A replica that was lent is free again."""
        self._free[replica] = None

    def lost(self, replica: int) -> None:
        """A replica is gone, or given up; what it computed goes to the head of the queue.

        Raises TaskLost if that has been lost too often.
        """
        was_short = self.is_short
        del self._known[replica]
        self._free.pop(replica, None)
        self._shares = None
        if self.is_short and not was_short:
            self._short_since = self._clock()
        self._hungry.pop(replica, None)
        following, call = self._next.pop(replica, None), self._calls.pop(replica, None)
        if self._own is not None:  # nobody else can answer what was its own
            was_asked = call is not None and self._is_open(call)
            self._left -= was_asked or self._own.pop(replica, None) is not None
            return
        for gone in (following, call):  # in the queue the earlier one comes first again
            if gone is not None and self._is_open(gone):
                self._requeue(gone, replica)
        if call is not None and self._is_open(call):
            self._losses[call.task] += 1
            if self._losses[call.task] >= self._limits.most_losses:
                raise TaskLost

    def _requeue(self, call: _Call, replica: int) -> None:
        """A call that the replica will not answer; its task waits anew, unless it was copied."""
        self._runners[call.task] -= 1
        if self._newest[call.task] == replica:
            self._waiting = {call.task: None, **self._waiting}
            self.work[call.kind].num_requeued += call.size

    @property
    def is_short(self) -> bool:
        """Whether too few replicas are up to go on."""
        return len(self._known) < self._min_replicas

    def is_hopeless(self, *, is_loading: bool) -> bool:
        """Whether the fleet has been short for too long. A replica that loads is awaited."""
        waited = self._clock() - self._short_since
        return self.is_short and not is_loading and waited >= self._limits.patience_s

    # ---------------------------------------------------------------- work

    def together(self, kind: str, number: int, size: float) -> int:
        """How many of a round's `number` parts of `size` units of work to make one task: as many as
        take no longer than BRIEF_S and divide a replica's share, so that all end together."""
        median = self._median(kind)
        if median is None or not number:
            return 1
        share = math.ceil(number / max(1, len(self._known)))
        even = (count for count in range(share, 1, -1) if share % count == 0)
        return next((count for count in even if count * size * median <= BRIEF_S), 1)

    def begin(self, kind: str, sizes: Sequence[float], homes: Sequence[int] | None = None) -> None:
        """A round of tasks, each for any replica. `sizes` are units of work; times are compared
        among calls of a `kind`.

        Tasks of the same number in `homes` are by preference the same replica's in all rounds;
        without, that is a task's place in the round.
        """
        self._begin(kind, sizes)
        self._homes = range(len(sizes)) if homes is None else homes
        self._shares = None

    def begin_each(self, kind: str) -> list[int]:
        """A round of one task for each replica that is up: task i is for the i-th returned."""
        replicas = self.replicas
        self._begin(kind, [1] * len(replicas))
        self._waiting.clear()
        self._own = {replica: task for task, replica in enumerate(replicas)}
        return replicas

    def _begin(self, kind: str, sizes: Sequence[float]) -> None:
        self._round += 1
        self._kind, self._sizes = kind, sizes
        self._waiting = dict.fromkeys(range(len(sizes)))
        self._own = None
        self._answered = [False] * len(sizes)
        self._runners, self._losses = [0] * len(sizes), [0] * len(sizes)
        self._newest = [-1] * len(sizes)  # the replica that was given a task last
        self._hungry = {}
        self._left = len(sizes)

    @property
    def is_done(self) -> bool:
        return not self._left

    def assign(self) -> list[tuple[int, int]]:
        """Replicas and the tasks that they are to start now, or next."""
        if self.is_short:
            return []
        now = self._clock()
        if self._own is not None:
            pairs = [
                (replica, task) for replica, task in self._own.items() if replica in self._free
            ]
        else:
            pairs = self._at_home(list(self._free))
            busy = {replica for replica, _ in pairs}
            others = [replica for replica in self._free if replica not in busy]
            taken = self._taken(len(others))
            copies = self._copies(len(others) - len(taken), now)
            pairs += zip(others, [*taken, *copies], strict=False)
        for replica, task in pairs:
            del self._free[replica]
            if self._own is not None:
                del self._own[replica]
            self._calls[replica] = call = self._call(replica, task, now)
            if not call.is_first:
                self._hungry[replica] = None
        return pairs + self._ahead()

    def _call(self, replica: int, task: int, now: float) -> _Call:
        if self._runners[task]:
            self.work[self._kind].num_copied += self._sizes[task]
        self._runners[task] += 1
        self._newest[task] = replica
        is_first = self._kind not in self._known[replica]
        return _Call(self._round, self._kind, task, self._sizes[task], now, is_first)

    def _ahead(self) -> list[tuple[int, int]]:
        """Replicas at work and the tasks of their own shares that they start next, without waiting
        until their answers are heard. Short ones, as long as there is as much for the others:
        what a replica has been given is not taken back because another one is faster."""
        pairs: list[tuple[int, int]] = []
        median = self._median(self._kind)
        if median is None:
            return pairs
        for replica in list(self._hungry):
            if len(self._waiting) < len(self._known) - len(self._next):
                break
            del self._hungry[replica]  # looked at once in a call
            if median * self._calls[replica].size > SHORT_S:
                continue
            for taker, task in self._at_home([replica]):
                self._next[taker] = self._call(taker, task, math.inf)
                pairs.append((taker, task))
        return pairs

    def _at_home(self, replicas: Sequence[int]) -> list[tuple[int, int]]:
        """Replicas with waiting tasks of their own shares, which they take out of the queue; not
        one that they are at, which waits anew since the replica that had its copy is lost.

        So a replica meets again, step by step and look by look, what it has in its cache.
        """
        pairs: list[tuple[int, int]] = []
        for replica in replicas if self._waiting else ():
            call = self._calls.get(replica)
            at = call.task if call else None
            own = (task for task in self._share(replica) if task in self._waiting and task != at)
            task = next(own, None)
            if task is not None:
                pairs.append((replica, task))
                del self._waiting[task]
        return pairs

    def _taken(self, number: int) -> list[int]:
        """Up to so many waiting tasks out of the queue, whosever they are: no replica is idle while
        there is work. They are the last, so that what a replica takes lies next to each other."""
        return [self._waiting.popitem()[0] for _ in range(min(number, len(self._waiting)))]

    def _share(self, replica: int) -> list[int]:
        """The tasks of a round whose home the replica is."""
        if self._shares is None:
            self._shares = {other: [] for other in self._known}
            for task, home in enumerate(self._homes):
                self._shares[self._home(home)].append(task)
        return self._shares[replica]

    def _home(self, number: int) -> int:
        """The replica for a number: counted round and round, over all that there have been.

        While that one is not up another stands in for it, which depends on no third one. So only
        what was its own moves, and goes back.
        """
        usual = self._places[number % len(self._places)]
        if usual in self._known:
            return usual
        return max(self._known, key=lambda replica: hash((number, replica)))

    def _copies(self, number: int, now: float) -> list[int]:
        """Up to so many tasks that are slow, each to be computed once more."""
        if not number or not self._left:
            return []
        slow = (call.task for call, since in self._copyable() if since <= now)
        return [task for task, _ in zip(slow, range(number), strict=False)]

    def _copyable(self) -> list[tuple[_Call, float]]:
        """The newest calls of tasks that may be copied, and since when they are slow; the last of
        them is the next that will be. What a slow replica was to start next is as late."""
        median = self._median(self._kind)
        if median is None or self._own is not None:
            return []
        now, found = self._clock(), []
        for replica, call in self._calls.items():
            since = call.started + self._limits.slow_factor * median * call.size
            if self._is_copyable(call, replica):
                found.append((call, since))
                if since > now:  # later ones were started later
                    break
            following = self._next.get(replica)
            if since <= now and following is not None and self._is_copyable(following, replica):
                found.append((following, since))
        return found

    def _is_copyable(self, call: _Call, replica: int) -> bool:
        is_newest = self._is_open(call) and self._newest[call.task] == replica
        return is_newest and self._runners[call.task] < MOST_COPIES

    def answered(self, replica: int) -> int | None:
        """A replica's call has returned: its task, or None if that is answered already."""
        call, now = self._calls.pop(replica), self._clock()
        self._hungry.pop(replica, None)
        if (following := self._next.pop(replica, None)) is None:
            self._free[replica] = None
        else:
            following.started = now
            self._calls[replica] = following
            if following.round == self._round:
                self._hungry[replica] = None
        seconds = (now - call.started) / call.size
        work = self.work[call.kind]
        likes = call.kind, call.is_first
        self._slowest[likes] = max(seconds, self._slowest.get(likes, 0.0))
        if seconds:  # else it was heard at once with the call before, and tells nothing
            work.seconds[replica] = seconds
        if call.is_first:
            self._known[replica].add(call.kind)
        elif seconds:
            self._times.setdefault(call.kind, _Times()).add(seconds)
        if not self._is_open(call):
            return None
        work.done[replica] += call.size
        self._answered[call.task] = True
        self._waiting.pop(call.task, None)  # of a copy that was lost
        self._left -= 1
        return call.task

    def overdue(self) -> list[int]:
        """Replicas whose calls are past their deadlines, of earlier rounds too."""
        now, late = self._clock(), []
        for replica, call in self._calls.items():
            if now - call.started < self._limits.deadline_floor_s:
                break  # and so are those that were started later
            if now - call.started >= self._allowed(call):
                late.append(replica)
        return late

    def _allowed(self, call: _Call) -> float:
        """Seconds that a call may take."""
        limits, median = self._limits, self._median(call.kind)
        if median is None:  # of a few calls nothing but the longest tells
            first = self._slowest.get((call.kind, True), math.inf)
            slowest = self._slowest.get((call.kind, call.is_first), first)
            return max(limits.first_call_s, limits.deadline_factor * slowest * call.size)
        usual = max(limits.deadline_floor_s, limits.deadline_factor * median * call.size)
        return max(limits.first_call_s, usual) if call.is_first else usual

    def pause(self) -> float:
        """Seconds in which nothing but an answer needs attention."""
        has_idle = self._free and not self._waiting and not self.is_short
        copyable = self._copyable() if has_idle else []
        if not copyable:
            return PULSE_S
        return min(PULSE_S, max(0.0, copyable[-1][1] - self._clock()))

    def _median(self, kind: str) -> float | None:
        times = self._times.get(kind)
        return times.median if times else None

    def _is_open(self, call: _Call) -> bool:
        return call.round == self._round and not self._answered[call.task]


def pause_before_attempt(failures: int) -> float:
    """Seconds before a replica is started again that has failed so often without an answer in
    between: none at first."""
    return min(LONGEST_PAUSE_S, 2.0 ** (failures - 1)) if failures > 1 else 0.0
