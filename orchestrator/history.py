"""The history of a run: the numbers of its steps and looks, as arrays.

Owns how metrics.jsonl becomes columns, of which each step has its latest value. Knows nothing of
what is drawn of them.
"""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from orchestrator import metrics
from orchestrator.charts import Points
from orchestrator.metrics import Evaluation


@dataclass(frozen=True, slots=True)
class History:
    """What metrics.jsonl holds."""

    columns: Mapping[str, Points]
    """Per number that steps have, its values at them."""
    evaluations: Sequence[Evaluation]
    """Looks at held-out rows."""
    dev: Sequence[Evaluation]
    """Looks at dev rows."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """That of the run in a folder, which may have none yet."""
        steps: dict[str, array[float]] = {}
        values: dict[str, array[float]] = {}
        for entry in metrics.entries(folder):
            if entry["kind"] == "step":
                for name, value in _numbers(entry):
                    steps.setdefault(name, array("d")).append(entry["step"])
                    values.setdefault(name, array("d")).append(value)
        columns = {name: _latest(steps[name], values[name]) for name in steps}
        looks = {(look.split, look.step): look for look in metrics.evaluations(folder)}
        ordered = [looks[key] for key in sorted(looks)]
        held_out = [look for look in ordered if look.split == "test"]
        return cls(columns, held_out, [look for look in ordered if look.split == "dev"])

    def total(self, name: str) -> float:
        return float(np.nansum(self.columns[name].values)) if name in self.columns else 0.0


def _numbers(entry: dict[str, Any]) -> Iterator[tuple[str, float]]:
    lost = metrics.lost_in(entry)
    if lost is not None:
        yield "lost_samples", sum(lost.values())
    kv = entry.get("kv")
    parts = {f"kv_{name}": value for name, value in kv.items()} if isinstance(kv, dict) else {}
    for name, value in {**entry, **parts}.items():
        if name not in ("kind", "step") and isinstance(value, int | float):
            yield name, value


def _latest(steps: Sequence[float], values: Sequence[float]) -> Points:
    """In the order of steps; of a step that is there twice, the entry that was written last."""
    _, first_from_the_end = np.unique(np.array(steps)[::-1], return_index=True)
    index = len(steps) - 1 - first_from_the_end
    return Points(np.array(steps)[index], np.array(values)[index])
