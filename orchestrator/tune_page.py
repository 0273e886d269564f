"""What `launch.py tune` leaves in its folder: tune.json, and tune.html with the curve drawn.

The page needs no other file and no network. Knows the proposal and charts; measures nothing.
"""

import html
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np

from orchestrator import charts, strict_json, tune, whole_file
from orchestrator.charts import Points
from orchestrator.config import Config
from orchestrator.report import STYLE
from orchestrator.tune import Proposal

FIGURES, PAGE = "tune.json", "tune.html"


def write(folder: Path, config: Config, proposal: Proposal) -> Path:
    """Write both files into a folder that is there; the page's path."""
    numbers = strict_json.text(figures(config, proposal), indent=2)
    whole_file.write(folder / FIGURES, numbers + "\n")
    whole_file.write(folder / PAGE, _page(config, proposal))
    return folder / PAGE


def figures(config: Config, proposal: Proposal) -> dict[str, object]:
    """All numbers, as tune.json has them."""
    curve = proposal.curve
    columns = zip(
        curve.eps,
        curve.differences(),
        curve.changes(),
        curve.curved(config.estimator.kind),
        curve.plus.tolist(),
        curve.minus.tolist(),
        strict=True,
    )
    names = ("eps", "difference", "slopes_differ", "curvature_part", "plus", "minus")
    return {
        "overrides": list(proposal.overrides),
        "eps": asdict(proposal.eps),
        "lr": asdict(proposal.lr),
        "loss": curve.base,
        "repeat_noise": curve.noise,
        "curve": [dict(zip(names, row, strict=True)) for row in columns],
        "signal": asdict(proposal.signal),
        "seeds": [
            {"num_seeds": count, "signal_to_noise": proposal.signal.steps_signal(count), "lr": rate}
            for count, rate in zip(tune.COUNTS, proposal.rates, strict=True)
        ],
    }


def _page(config: Config, proposal: Proposal) -> str:
    settings, curve, chosen = config.estimator, proposal.curve, proposal.eps
    what = html.escape(f"{config.model.path} · {config.space.kind} · {settings.kind}")
    differences = {"|L+ - L-|": Points(curve.eps, curve.differences())}
    if chosen.noise:
        flat = np.full(len(curve.eps), math.sqrt(2) * chosen.noise)
        differences["its noise"] = Points(curve.eps, flat)
    parts = {
        "slopes differ": Points(curve.eps, 100 * curve.changes()),
        "curvature's part": Points(curve.eps, 100 * curve.curved(settings.kind)),
    }
    counts = np.array(tune.COUNTS, np.float64)
    signal = np.array([proposal.signal.steps_signal(count) for count in tune.COUNTS])
    rates = {"lr": Points(counts, np.array(proposal.rates))}
    figures = [
        _figure(
            "Difference of both signs over eps",
            differences,
            chosen.eps,
            "root mean square over the seeds; straight where the loss is linear",
        ),
        _figure(
            "What eps spoils",
            parts,
            chosen.eps,
            "per cent: slopes against those at the next smaller eps; curvature against the "
            "difference that one sign measures",
        ),
        _figure(
            "A step's signal to noise over seeds",
            {"signal to noise": Points(counts, signal)},
            settings.num_seeds,
            "a step's expected gain over its deviation, for one batch",
        ),
        _figure("lr over seeds", rates, settings.num_seeds, "by the same rule"),
    ]
    told = html.escape("\n".join(tune.lines(settings, proposal)))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>tune</title>
<style>
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
<header>
<p>{what}</p>
<h1>eps {chosen.eps:g}, lr {proposal.lr.lr:g}</h1>
<p>{html.escape(chosen.reason)}.</p>
<p>lr: {html.escape(proposal.lr.reason)}.</p>
</header>
<h2>Measured before training</h2>
<div class="charts">
{"".join(figures)}</div>
<h2>Figures</h2>
<div class="card"><pre class="code">{told}</pre></div>
</main>
</body>
</html>
"""


def _figure(title: str, lines: dict[str, Points], marked: float, note: str) -> str:
    colours = charts.legend(list(lines))
    legend = "".join(
        f'<i class="swatch" style="background:{colour}"></i>{html.escape(name)}'
        for name, colour in colours
    )
    svg = charts.logarithmic(title, lines, marked)
    return (
        f"<figure><figcaption>{title}<span>dashed: {marked:g}</span></figcaption>"
        f'<div role="img" aria-label="{title}">{svg}</div><p>{legend}</p><p>{note}</p></figure>\n'
    )
