"""A run as one page: RUN_DIR/report/index.html, which needs no other file and no network.

Reads the run's folder only, finished or not; starts nothing and imports nothing heavy but
matplotlib, which `charts` draws with.
"""

import html
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchestrator import charts, metrics, whole_file
from orchestrator.charts import Points
from orchestrator.config import Config, ConfigError, Section
from orchestrator.evaluate import PLAIN, SHARES, interval
from orchestrator.history import History
from orchestrator.metrics import Evaluation, Interval, Summary
from orchestrator.recipe_file import load
from orchestrator.seed_sync import Header, Ledger

FOLDER, PAGE = "report", "index.html"
STYLE = Path(__file__).with_suffix(".css")
METRICS = {"f1": "F1", "exact_match": "exact match"}  # how the page calls them, if not by name


@dataclass(frozen=True, slots=True)
class Story:
    """All that the page tells."""

    folder: Path
    config: Config
    history: History
    header: Header | None
    num_steps: int
    ledger_bytes: int
    summary: Summary | None


def write(folder: Path) -> Path:
    """Write the page of the run in `folder`; its path.

    ConfigError, in one line, for a folder that holds no run, a damaged ledger, or one that cannot
    be written to.
    """
    story = _read(folder)
    page = folder / FOLDER / PAGE
    try:
        page.parent.mkdir(exist_ok=True)
        whole_file.write(page, _page(story))
    except OSError as error:
        raise ConfigError(f"{page}: cannot be written: {error.strerror}") from None
    return page


# -------------------------------------------------------------------- reading


def _read(folder: Path) -> Story:
    path = folder / metrics.CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"{folder}: no run folder, it holds no {metrics.CONFIG_FILE}")
    ledger = folder / metrics.LEDGER_FILE
    header, records = Ledger.read(ledger) if ledger.exists() else (None, [])
    return Story(
        folder=folder,
        config=load(path),
        history=History.read(folder),
        header=header,
        num_steps=len(records),
        ledger_bytes=ledger.stat().st_size if header else 0,
        summary=metrics.read_summary(folder),
    )


# -------------------------------------------------------------------- the page


def _page(story: Story) -> str:
    name = html.escape(story.folder.resolve().name)
    config = story.config
    what = html.escape(
        f"{config.model.path} · {config.space.kind} · {config.estimator.kind}, "
        f"{config.estimator.num_seeds} seeds a step"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
<header>
<p>{name} · {what}</p>
{_headline(story)}
{_facts(story)}
</header>
<h2>Course</h2>
{_course(story.history)}
<h2>Result</h2>
<div class="columns">
{_result(story)}
{_versions(story)}
{_ledger(story)}
{_fleet(story)}
</div>
<h2>Recipe</h2>
<p class="note">Every key as it was resolved; bold where it is not the default.</p>
<div class="columns">
{"".join(_section(name, section) for name, section in config if isinstance(section, Section))}
</div>
</main>
</body>
</html>
"""


def _headline(story: Story) -> str:
    """From the base model's metric to the latest, with what chance leaves open."""
    looks = story.history.evaluations
    first = next((look for look in looks if look.step == 0), None)
    last = looks[-1] if looks and looks[-1].step > 0 else None
    if last is None:
        state = _value(first.metric, first.accuracy) if first else "no evaluation yet"
        told = f"Zero-shot {_metric(first.metric)}; {_certainty(first)}." if first else ""
        return f"<h1>{state}</h1>\n<p>{told}</p>"
    after = f"after {last.step:,} steps" + ("" if story.summary else ", so far")
    metric = _metric(last.metric)
    if first is None:
        told = f"Held-out {metric} {after}; {_certainty(last)}."
        return f"<h1>{_value(last.metric, last.accuracy)}</h1>\n<p>{told}</p>"
    gain = last.accuracy - first.accuracy
    sign = "+" if gain >= 0 else "−"
    points = f"{abs(gain):.3f}" if last.metric in PLAIN else f"{100 * abs(gain):.1f} points"
    before, now = (_value(look.metric, look.accuracy) for look in (first, last))
    return (
        f'<h1>{before} <span>→</span> {now}<span class="gain">{sign} {points}</span></h1>\n'
        f"<p>Held-out {metric}, zero-shot and {after}. Zero-shot: {_certainty(first)}; now: "
        f"{_certainty(last)}.</p>"
    )


def _metric(name: str) -> str:
    return METRICS.get(name, html.escape(name))


def _certainty(look: Evaluation) -> str:
    examples = f"{look.num_examples:,} examples"
    ends = _ends(look.metric, look.accuracy, look.num_examples, look.interval)
    if ends is None:
        return examples
    return f"95 % interval {_range(look.metric, ends)}, of {examples}"


def _ends(metric: str, value: float, number: int, noted: Interval | None) -> Interval | None:
    """The 95 % interval that a run noted; None where an earlier one did not, unless the mean and
    the number of examples give it."""
    if noted is None and metric in SHARES:
        return interval(value, number)
    return noted


def _range(metric: str, ends: Interval) -> str:
    if metric in PLAIN:
        return f"{ends[0]:.3f} to {ends[1]:.3f}"
    return f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f} %"


def _value(metric: str, value: float) -> str:
    return f"{value:.3f}" if metric in PLAIN else _percent(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _facts(story: Story) -> str:
    history, total = story.history, story.config.run.steps
    facts = [("Steps", f"{story.num_steps:,} <small>of {total:,}</small>")]
    seconds = history.total("seconds")
    if seconds:
        middle = float(np.median(history.columns["seconds"].values))
        facts += [
            ("A step, median", _duration(middle)),
            ("Probes a second", f"{history.total('num_probes') / seconds:,.2f}"),
            ("Tokens a second", f"{history.total('num_tokens') / seconds:,.0f}"),
            ("Time in steps", _duration(seconds)),
            ("Seeds dropped", f"{history.total('num_dropped'):,.0f}"),
        ]
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{items}</dl>'


def _course(history: History) -> str:
    columns = history.columns
    figures = []
    if history.evaluations:
        title = f"Held-out {_metric(history.evaluations[-1].metric)}"
        figures.append(_looks("held_out", title, history.evaluations))
    best = metrics.best(history.dev)
    if best is not None:
        note = f"; best after {best.step:,} steps: {_value(best.metric, best.accuracy)}"
        title = f"{_metric(best.metric)} on dev rows"
        figures.append(_looks("dev", title[0].upper() + title[1:], history.dev, note))

    def draw(name: str, title: str, form: str, note: str = "", **style: bool) -> None:
        points = columns.get(name)
        if points is None or not np.isfinite(points.values).any():
            return
        latest = f"{points.values[-1]:{form}}"
        svg = charts.course(name, points, **style)
        figures.append(_figure(title, f"last {latest}", svg, note))

    draw("loss", "Training loss", ".4f", "mean over the step's probes", smooth=True)
    draw("gradient", "|g|", ".3g", "mean over the step's seeds", smooth=True, from_zero=True)
    draw("lr", "Learning rate", ".3g", from_zero=True)
    draw("seconds", "Seconds a step", ".3g", smooth=True, from_zero=True)
    rates = ("probes", "tokens") if "seconds" in columns else ()
    for what in rates:
        counts, seconds = columns[f"num_{what}"], columns["seconds"]
        rate = Points(seconds.steps, counts.values / seconds.values)
        svg = charts.course(f"{what}_rate", rate, smooth=True, from_zero=True)
        latest = f"last {rate.values[-1]:,.3g}" if what == "probes" else f"{rate.values[-1]:,.0f}"
        figures.append(_figure(f"{what.capitalize()} a second", latest, svg))
    draw("num_dropped", "Dropped losses", ".0f", "seeds whose loss was not finite", from_zero=True)
    draw("lost_samples", "Lost samples", ".0f", "at which the reward failed", from_zero=True)
    note = f"below 1, and so mostly noise: {history.total('below_floor'):,.0f} steps"
    draw("signal_to_noise", "Signal to noise of g", ".3g", note, smooth=True, from_zero=True)
    if asked := history.total("kv_asked"):
        shares = [history.total(f"kv_{where}") / asked for where in ("inside", "across")]
        note = (
            f"share of prompt tokens not computed: {_percent(shares[0])} shared inside a forward, "
            f"{_percent(shares[1])} found in the cache"
        )
        draw("kv_reused_share", "KV reuse", ".2f", note, from_zero=True)
    if not figures:
        return '<p class="note">No step has been taken yet.</p>'
    return f'<div class="charts">\n{"".join(figures)}</div>'


def _looks(name: str, title: str, looks: Sequence[Evaluation], more: str = "") -> str:
    """A metric over the steps; `name` is the chart's own, `more` goes on from its note."""
    steps = np.array([look.step for look in looks], dtype=np.float64)
    values = np.array([look.accuracy for look in looks])
    ends = [_ends(look.metric, look.accuracy, look.num_examples, look.interval) for look in looks]
    known = [end or (value, value) for end, value in zip(ends, values, strict=True)]
    low, high = (np.where(np.isfinite(end), end, values) for end in np.array(known).T)
    is_share = looks[-1].metric not in PLAIN
    svg = charts.with_intervals(name, Points(steps, values), low, high, percent=is_share)
    numbers = sorted({look.num_examples for look in looks})
    note = f"a look takes {' or '.join(f'{number:,}' for number in numbers)} examples{more}"
    if any(ends):
        kind = "Wilson" if looks[-1].metric in SHARES else "normal"
        note = f"bars: 95 % intervals ({kind}); {note}"
    return _figure(title, f"looks: {len(looks)}", svg, note, wide=True)


def _figure(title: str, aside: str, svg: str, note: str = "", *, wide: bool = False) -> str:
    below = f"<p>{note}</p>" if note else ""
    kind = ' class="wide"' if wide else ""
    return (
        f"<figure{kind}><figcaption>{title}<span>{aside}</span></figcaption>"
        f'<div role="img" aria-label="{title} over the steps">{svg}</div>{below}</figure>\n'
    )


# -------------------------------------------------------------------- tables


def _result(story: Story) -> str:
    summary = story.summary
    if summary is None:
        total = story.config.run.steps
        rows = [("State", f"unfinished: {story.num_steps:,} of {total:,} steps")]
        return _card("Final table", _table(rows))
    number, metric = summary.num_held_out, summary.metric
    rows = []
    if summary.baseline_accuracy is not None:
        value = summary.baseline_accuracy
        ends = _ends(metric, value, number, summary.baseline_interval)
        rows.append((f"Zero-shot {_metric(metric)}", _with_interval(metric, value, ends)))
    ends = _ends(metric, summary.final_accuracy, number, summary.final_interval)
    rows.append((f"Final {_metric(metric)}", _with_interval(metric, summary.final_accuracy, ends)))
    if summary.best_step is not None and summary.best_dev is not None:
        best = f"{summary.best_step:,} <small>({_value(metric, summary.best_dev)})</small>"
        rows.append(("Best step by dev rows", best))
    rows += [
        ("Held-out examples", f"{number:,}"),
        ("Steps", f"{summary.steps:,}"),
        ("Wall time of the last process", _duration(summary.wall_s)),
    ]
    if summary.evaluations_per_s is not None:
        rows.append(("Probes a second", f"{summary.evaluations_per_s:,.2f}"))
    if summary.trained_tokens_per_s is not None:
        rows.append(("Tokens a second", f"{summary.trained_tokens_per_s:,.0f}"))
    return _card("Final table", _table(rows, numbers=True))


def _ledger(story: Story) -> str:
    header = story.header
    if header is None:
        return _card("Ledger", _table([("State", "not begun")]))
    each = f", {story.ledger_bytes / story.num_steps:,.0f} a step" if story.num_steps else ""
    rows = [
        ("steps", f"{story.num_steps:,}"),
        ("bytes", f"{story.ledger_bytes:,}{each}"),
        ("digest of the trained state", story.summary.digest if story.summary else "at the end"),
        ("format", str(header.format)),
        ("noise version", str(header.noise_version)),
        ("model", header.model),
        ("weights hash", header.weights_hash),
        ("config hash", header.config_hash),
        ("data hash", header.data_hash),
    ]
    for step, config_hash, _, digest in header.forked_from:
        rows += [
            ("forked", f"at step {step:,} from config {config_hash}"),
            ("parent's ledger", f"sha256 {digest}"),
        ]
    return _card("Ledger", _table(_escaped(rows), "code"))


def _fleet(story: Story) -> str:
    """Who computed how much, once a run with several replicas is finished."""
    numbers = story.summary.fleet if story.summary else None
    probes = numbers["probes"] if numbers else {}
    if numbers is None or len(probes) < 2:
        return ""
    total = sum(probes.values()) or 1
    rows = [
        (html.escape(name), f"{number:,} <small>({_percent(number / total)})</small>")
        for name, number in probes.items()
    ]
    rows += [
        ("slow, computed once more", f"{numbers['copied']:,}"),
        ("of lost replicas, given to others", f"{numbers['requeued']:,}"),
    ]
    return _card("Probes of the last process", _table(rows, numbers=True))


def _versions(story: Story) -> str:
    versions = story.header.versions if story.header else ()
    if story.summary:  # of the process that finished the run; the header has the first one's
        versions = tuple(story.summary.versions.items())
    return _card("Versions", _table(_escaped(versions), "code")) if versions else ""


def _section(name: str, section: Section) -> str:
    """A section of the recipe."""
    rows = "".join(
        f'<tr{" class=chosen" if chosen else ""}><th scope="row">{html.escape(key)}</th>'
        f"<td>{html.escape(_spelt(value))}</td></tr>"
        for key, value, chosen in _keys(section)
    )
    return _card(html.escape(name), f'<table class="code">{rows}</table>')


def _keys(section: Section, prefix: str = "") -> Iterator[tuple[str, object, bool]]:
    """Every key of a section, its value, and whether that is not the default."""
    values = section.model_dump(mode="json")
    given = section.model_dump(mode="json", exclude_defaults=True)
    for name, value in section:
        if isinstance(value, Section):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name, values[name], name in given


def _spelt(value: object) -> str:
    """As the recipe would have it."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _card(title: str, content: str) -> str:
    return f'<div class="card"><h3>{title}</h3>{content}</div>\n'


def _table(rows: Iterable[tuple[str, str]], kind: str = "", *, numbers: bool = False) -> str:
    cell = '<td class="number">' if numbers else "<td>"
    lines = "".join(
        f'<tr><th scope="row">{name}</th>{cell}{value}</td></tr>' for name, value in rows
    )
    return f'<table class="{kind}">{lines}</table>' if kind else f"<table>{lines}</table>"


def _escaped(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(html.escape(name), html.escape(value)) for name, value in rows]


def _with_interval(metric: str, value: float, ends: Interval | None) -> str:
    if ends is None:
        return _value(metric, value)
    return f"{_value(metric, value)} <small>({_range(metric, ends).removesuffix(' %')})</small>"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:,.1f} ms"
    if seconds < 120:
        return f"{seconds:,.2f} s" if seconds < 10 else f"{seconds:,.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"
