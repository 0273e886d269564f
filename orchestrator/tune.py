"""Proposes eps and lr from measurements that a fleet makes before any training.

Owns what is measured, and what follows from it; the functions from losses to proposals are pure.
With o = L(theta + eps z) - L(theta - eps z), a seed's slope is o / (2 eps), and its curvature along
z is (L(theta + eps z) + L(theta - eps z) - 2 L(theta)) / eps^2. Knows no tensors and no files.

eps. A slope does not depend on eps where the loss is linear in it: too small an eps divides the
loss's rounding by itself, too large a one meets the third derivative. The range where neighbours on
a logarithmic grid agree shows both ends.

lr. A step along u = 1/n sum_i g_i z_i changes the loss by -lr S + lr^2 / 2 u'Hu on the mean, with S
the power of a slope on all rows. From slopes of the same seeds on several batches come S and what
batches add to it, W; from curvatures tr H, and weighted by g^2 also c = g'Hg / |g|^2, since for
Gaussian z the mean of g^2 z'Hz is (S + W) (tr H + 2 c). Then the mean of u'Hu is
(S + W) C, C = tr H / n + (1 + 1/n) c, and the best rate is S / (S + W) / C.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator import estimator, noise_floor
from orchestrator.batches import Batches
from orchestrator.config import Config, ConfigError, Estimator
from orchestrator.records import Fleet, Probe

Numbers = NDArray[np.float64]

GRID = tuple(float(f"{10 ** (exponent / 2):.1e}") for exponent in range(-10, 1))  # 1e-5 to 1
CURVE_SEEDS, SLOPE_SEEDS, SLOPE_BATCHES = 4, 8, 4
LINEAR = 0.1  # share by which neighbouring slopes may differ
MOST_CURVED = 0.5  # one sign: the common curvature's share of a difference
CAUTION = 0.5  # of the best rate; keeps three quarters of a step's gain
MOST_GAIN = 0.05  # share of the loss that one step may be expected to take off
LEAST_SIGNAL = 0.05  # share of a slope's power: less cannot be told from none with so few probes
RANK_SLOPE = 1 / (2 * math.sqrt(math.pi))  # of a centred rank, in a normal loss's deviations
COUNTS = (1, 2, 4, 8, 16, 32, 64)
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Curve:
    """Losses of both signs over eps, on one batch: `plus` and `minus` are [eps, seed].

    NaN stands for all that is not finite.
    """

    noise: float | None
    """Standard deviation of a repeated loss."""
    base: float
    eps: Numbers
    plus: Numbers
    minus: Numbers

    def slopes(self) -> Numbers:
        return np.asarray((self.plus - self.minus) / (2 * self.eps[:, None]))

    def differences(self) -> Numbers:
        """Root mean square of L+ - L- over the seeds, [eps]."""
        return _root_mean_square(self.plus - self.minus)

    def changes(self) -> Numbers:
        """How much slopes differ from those at the next smaller eps, as a share, [eps]."""
        slopes = self.slopes()
        size = np.sqrt((_mean_square(slopes[1:]) + _mean_square(slopes[:-1])) / 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.append(math.nan, _root_mean_square(slopes[1:] - slopes[:-1]) / size)

    def curved(self, kind: str) -> Numbers:
        """What curvature adds to a difference that one sign measures, as a share of it, [eps]."""
        even = (self.plus + self.minus) / 2 - self.base
        if kind == "es":  # the seeds' mean takes the common part away
            even = even - even.mean(axis=1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            return _root_mean_square(even) / (self.differences() / 2)


@dataclass(frozen=True, slots=True)
class EpsChoice:
    """`low` and `high` bound where slopes do not depend on eps."""

    eps: float
    low: float
    high: float
    is_linear: bool
    noise: float | None
    """Of a loss: that of repeats, or what lies between it and a line below `low`, if more."""
    reason: str


@dataclass(frozen=True, slots=True)
class Slopes:
    """Losses at one eps: `plus` and `minus` are [batch, seed], `base` is [batch]."""

    eps: float
    base: Numbers
    plus: Numbers
    minus: Numbers


@dataclass(frozen=True, slots=True)
class Signal:
    """What a slope is made of, in squares of it, and the loss's curvature."""

    signal: float
    """Power of a slope on all rows: the squared length of the gradient. 0 where not seen."""
    batch_noise: float
    """Power that a batch, rather than all rows, adds."""
    trace: float
    """Mean curvature along z: the trace of the Hessian."""
    trace_error: float
    """Standard error of that."""
    along: float
    """Curvature along the gradient."""
    scale: float
    """What a step's gain is measured by, see `scale`."""
    spread: float
    """Standard deviation of a step's perturbed losses, over eps."""

    def steps_signal(self, num_seeds: int) -> float:
        """Mean over deviation of what a step of so many seeds gains, to first order in lr.

        A seed gains (a + x) a, with a normal of variance S and x, of variance W, the batch's.
        """
        if not self.signal:
            return 0.0
        return math.sqrt(num_seeds / (2 + self.batch_noise / self.signal))

    def curvature(self, num_seeds: int) -> float:
        """C above; if the trace is not clearly above 0, with as much as it may well be."""
        is_seen = self.trace > 2 * self.trace_error
        trace = self.trace if is_seen else max(0.0, self.trace + 2 * self.trace_error)
        return trace / num_seeds + (1 + 1 / num_seeds) * self.along


@dataclass(frozen=True, slots=True)
class LrChoice:
    lr: float
    reason: str


@dataclass(frozen=True, slots=True)
class Proposal:
    """All that was measured, and what is made of it."""

    curve: Curve
    eps: EpsChoice
    signal: Signal
    lr: LrChoice
    rates: tuple[float, ...]
    """lr for each of COUNTS seeds."""

    @property
    def overrides(self) -> tuple[str, str]:
        """To be copied behind a recipe."""
        return f"estimator.eps={self.eps.eps:g}", f"estimator.lr={self.lr.lr:g}"


# -------------------------------------------------------------------- from losses to proposals


def choose_eps(settings: Estimator, curve: Curve) -> EpsChoice:
    """The largest eps that is linear for certain: one place of the grid below where it ends.

    ConfigError where no eps moves the loss at all.
    """
    changes, eps = curve.changes(), curve.eps
    if not np.isfinite(changes).any():
        raise ConfigError(
            f"estimator.eps: no eps from {eps[0]:g} to {eps[-1]:g} changes the loss and leaves it "
            "finite; see model.dtype, task.template and task.loss"
        )
    first, last = _longest_run(np.nan_to_num(changes, nan=math.inf) <= LINEAR)
    is_linear = last > 0
    if not is_linear:
        last = int(np.nanargmin(changes))
        first = last
    low, end = first - 1, last
    if settings.kind != "two_sided":
        curved = np.nan_to_num(curve.curved(settings.kind), nan=math.inf)
        while last > low and curved[last] > MOST_CURVED:
            last -= 1
    chosen = max(low, last - 1)
    noise = _roughness(curve, low, chosen) if is_linear else curve.noise
    reason = _why_eps(settings, curve, (low, chosen, last), noise, is_curved=last < end)
    if not is_linear:
        reason = (
            f"at no eps do slopes agree with their neighbours' within {LINEAR:.0%}; they do best "
            f"here, within {changes[end]:.0%}: a finer model.dtype or a larger "
            "estimator.batch_size would tell more"
        )
    return EpsChoice(
        float(eps[chosen]), float(eps[low]), float(eps[last]), is_linear, noise, reason
    )


def _why_eps(
    settings: Estimator,
    curve: Curve,
    places: tuple[int, int, int],
    noise: float | None,
    *,
    is_curved: bool,
) -> str:
    low, chosen, last = places
    eps = curve.eps
    parts = [f"slopes are the same within {LINEAR:.0%} from eps {eps[low]:g} to {eps[last]:g}"]
    if noise:
        ratio = curve.differences()[chosen] / (math.sqrt(2) * noise)
        parts.append(f"|L+ - L-| here is {ratio:.3g} times its noise")
    if is_curved:
        parts.append(
            f"beyond, curvature makes over {MOST_CURVED:.0%} of what {settings.kind} measures"
        )
    elif last + 1 < len(eps):
        parts.append("beyond, the loss bends")
    else:
        parts.append("the grid ends there")
    parts.append(
        "one place of the grid is kept from that end"
        if chosen < last
        else "there is no room to keep a distance from that end"
    )
    return "; ".join(parts)


def _roughness(curve: Curve, low: int, chosen: int) -> float | None:
    """Noise of a loss: of repeats, or its distance from the line at all eps below `low`."""
    line = 2 * curve.eps[:low, None] * curve.slopes()[chosen]
    rests = (curve.plus - curve.minus)[:low] - line
    rests = rests[np.isfinite(rests)]
    if not len(rests):
        return curve.noise
    return max(curve.noise or 0.0, float(np.sqrt(np.mean(rests**2) / 2)))


def analyse(config: Config, measured: Slopes) -> Signal:
    """Signal, noise and curvature; ConfigError if losses are not finite on too many batches."""
    finite = np.isfinite(measured.plus + measured.minus).all(axis=1) & np.isfinite(measured.base)
    if finite.sum() < 2:
        raise ConfigError(
            f"estimator.eps: losses at {measured.eps:g} are not finite on most batches; see "
            "model.dtype, or lower estimator.batch_size"
        )
    plus, minus, base = (part[finite] for part in (measured.plus, measured.minus, measured.base))
    slopes = (plus - minus) / (2 * measured.eps)
    batch_noise = float(slopes.var(axis=0, ddof=1).mean())
    signal = float((slopes.mean(axis=0) ** 2).mean()) - batch_noise / len(slopes)
    curvatures = (plus + minus - 2 * base[:, None]) / measured.eps**2
    of_seeds = curvatures.mean(axis=0)
    trace, error = float(of_seeds.mean()), float(of_seeds.std(ddof=1) / math.sqrt(len(of_seeds)))
    power = float((slopes**2).sum())
    weighted = float((slopes**2 * curvatures).sum()) / power if power else trace
    return Signal(
        signal=max(0.0, signal),
        batch_noise=batch_noise,
        trace=trace,
        trace_error=error,
        along=min(max(0.0, (weighted - trace) / 2), max(0.0, trace)),
        scale=scale(config, float(base.mean())),
        spread=float(plus.std(axis=1, ddof=1).mean()) / measured.eps,
    )


def scale(config: Config, loss: float) -> float:
    """What a step's gain is measured by: the loss, or all that a metric can change by. A reward
    may be any number, so it says nothing of what is much."""
    objective = config.task.objective
    if objective == "reward":
        return math.inf
    return abs(loss) if objective == "loss" else 1.0


def choose_lr(settings: Estimator, signal: Signal) -> LrChoice:
    """A rate at which the first step's expected gain is near its best, and not too large.

    ConfigError where the losses do not tell one.
    """
    power = signal.signal + signal.batch_noise
    share = max(LEAST_SIGNAL, signal.signal / power) if power else LEAST_SIGNAL
    curvature, number = signal.curvature(settings.num_seeds), settings.num_seeds
    by_curvature = CAUTION * share / curvature if curvature > 0 else math.inf
    by_gain = MOST_GAIN * signal.scale / (share * power) if power else math.inf
    lr = min(by_curvature, by_gain)
    unit, what = _unit(settings, signal)
    if not 0 < lr * unit < math.inf:
        raise ConfigError(
            f"estimator.lr: with {settings.batch_size} rows a batch the losses tell no rate: no "
            "curvature is seen, and no slope or nothing to measure a gain by; see model.dtype, "
            "task.template and task.objective"
        )
    if by_curvature <= by_gain:
        reason = (
            f"half the rate at which a step of {number} seeds would gain most, a quarter of that "
            f"at which it would gain nothing: curvature {curvature:.3g} along a step, and "
            f"{share:.0%} of the slopes' power are of the gradient, the rest of the batch"
        )
    else:
        reason = f"a step is then expected to gain {MOST_GAIN:.0%} of {signal.scale:.3g}; " + (
            f"the curvature along it ({curvature:.3g}) alone would allow "
            f"{by_curvature / lr:.2g} times as much"
            if curvature > 0
            else "no curvature is seen"
        )
    if signal.signal < LEAST_SIGNAL * power:
        reason += (
            f"; batches hide the gradient, which is taken to be {LEAST_SIGNAL:.0%} of the power: a "
            "larger estimator.batch_size would tell more"
        )
    return LrChoice(_rounded(lr * unit), reason + what)


def _unit(settings: Estimator, signal: Signal) -> tuple[float, str]:
    """What lr is multiplied by for estimators whose g is no slope, and in words."""
    unit, what = 1.0, ""
    if settings.kind == "fzoo" or settings.shaping != "none":
        unit = signal.spread / (RANK_SLOPE if settings.shaping == "rank" else 1.0)
        what = "; in units of losses' deviation, as g is"
    elif settings.second_moment is not None:
        unit = math.sqrt(signal.signal + signal.batch_noise)
        what = "; times the root mean square of g, which the second moment divides by"
    if settings.momentum:
        unit *= 1 - settings.momentum
        what += "; times 1 - momentum, since a step is made again"
    return unit, what


def propose(config: Config, curve: Curve, eps: EpsChoice, measured: Slopes) -> Proposal:
    """All proposals out of all measurements."""
    settings, signal = config.estimator, analyse(config, measured)
    rates = [
        choose_lr(settings.model_copy(update={"num_seeds": count}), signal).lr for count in COUNTS
    ]
    return Proposal(curve, eps, signal, choose_lr(settings, signal), tuple(rates))


def lines(settings: Estimator, proposal: Proposal) -> list[str]:
    """The proposal as a user reads it on a terminal."""
    curve, signal, chosen = proposal.curve, proposal.signal, proposal.eps
    noise = chosen.noise or math.nan
    told = [
        f"loss {curve.base:.4f}, noise of a loss {noise:.2g} "
        f"(repeated: {curve.noise or math.nan:.2g})",
        "",
        "     eps   |L+ - L-|   in noises   slopes differ   curvature's part",
    ]
    parts = curve.curved(settings.kind)
    rows = zip(curve.eps, curve.differences(), curve.changes(), parts, strict=True)
    for eps, difference, change, part in rows:
        mark = "  <" if eps == chosen.eps else ""
        told.append(
            f"{eps:8.2g}{difference:12.3g}{difference / (math.sqrt(2) * noise):12.3g}"
            f"{_share(change):>16}{_share(part):>19}{mark}"
        )
    ratio = signal.batch_noise / signal.signal if signal.signal else math.inf
    told += [
        "",
        f"power of a slope: {signal.signal:.3g} of the gradient, {signal.batch_noise:.3g} of the "
        f"batch of {settings.batch_size} ({ratio:.2g} times as much)",
        f"curvature: {signal.trace:.3g} along z (+- {signal.trace_error:.2g}), {signal.along:.3g} "
        "along the gradient",
        "",
        "   seeds   a step's signal to noise          lr",
    ]
    for count, rate in zip(COUNTS, proposal.rates, strict=True):
        mark = "  <" if count == settings.num_seeds else ""
        told.append(f"{count:8d}{signal.steps_signal(count):27.2g}{rate:12.2g}{mark}")
    return [
        *told,
        "",
        f"eps {chosen.eps:g}: {chosen.reason}",
        f"lr {proposal.lr.lr:g}: {proposal.lr.reason}",
        "",
        " ".join(proposal.overrides),
    ]


# -------------------------------------------------------------------- measuring


def measure(config: Config, fleet: Fleet, batches: Batches, say: Say) -> Proposal:
    """Let the fleet, which stands at the base model, measure; and propose."""
    seeds = estimator.seeds(config.run.seed, 0, SLOPE_SEEDS)
    examples = batches.of(0)
    say(f"measuring the loss over eps, {len(GRID) * CURVE_SEEDS * 2} probes ...")
    noise = noise_floor.measure(config, fleet, 0, examples)
    base, plus, minus = _both_signs(fleet, GRID, seeds[:CURVE_SEEDS], examples)
    curve = Curve(noise, base, np.array(GRID), plus, minus)
    eps = choose_eps(config.estimator, curve)
    say(f"measuring slopes at eps {eps.eps:g}, {SLOPE_BATCHES * SLOPE_SEEDS * 2} probes ...")
    parts = [
        _both_signs(fleet, (eps.eps,), seeds, batches.of(batch)) for batch in range(SLOPE_BATCHES)
    ]
    measured = Slopes(
        eps=eps.eps,
        base=np.array([base for base, _, _ in parts]),
        plus=np.concatenate([plus for _, plus, _ in parts]),
        minus=np.concatenate([minus for _, _, minus in parts]),
    )
    return propose(config, curve, eps, measured)


def _both_signs(
    fleet: Fleet, grid: Sequence[float], seeds: Sequence[int], examples: tuple[int, ...]
) -> tuple[float, Numbers, Numbers]:
    """The unperturbed loss; and those of both signs, [eps, seed] each."""
    probes = [
        Probe(0, seed, sign, eps, examples) for eps in grid for seed in seeds for sign in (1, -1)
    ]
    # Behind the others, so that both signs of a seed stay in one group.
    probes.append(Probe(0, estimator.BASE_SEED, 0, grid[0], examples))
    *perturbed, base = [loss.value for loss in fleet.evaluate(probes)]
    values = [loss if math.isfinite(loss) else math.nan for loss in perturbed]
    pairs = np.array(values).reshape(len(grid), len(seeds), 2)
    return base, pairs[..., 0], pairs[..., 1]


# -------------------------------------------------------------------- parts


def _mean_square(values: Numbers) -> Numbers:
    """Over the seeds, [eps]; NaN where a loss is."""
    return np.asarray(np.mean(values**2, axis=-1))


def _root_mean_square(values: Numbers) -> Numbers:
    return np.asarray(np.sqrt(_mean_square(values)))


def _longest_run(holds: NDArray[np.bool_]) -> tuple[int, int]:
    """First and last place of the longest stretch that holds, the last of equals; 0, 0 if none."""
    best, start = (0, 0), 0
    for place in range(1, len(holds)):
        if not holds[place]:
            continue
        if not holds[place - 1]:
            start = place
        if best == (0, 0) or place - start >= best[1] - best[0]:
            best = (start, place)
    return best


def _share(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else "-"


def _rounded(value: float) -> float:
    """To two digits: more would promise too much."""
    return float(f"{value:.1e}")
