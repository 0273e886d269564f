"""The documents' programs run, and say what is there."""

import inspect
import re
from pathlib import Path

import pytest

from orchestrator import dist_patch

DOCS = Path(__file__).parent.parent / "docs"


def test_the_programs_of_opt_md_run(
    model_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other in one namespace, as a reader would, on a tiny model."""
    text = (DOCS / "opt.md").read_text(encoding="utf-8")
    programs = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(programs) >= 6
    namespace: dict[str, object] = {}
    for program in programs:
        program = program.replace("facebook/opt-125m", str(model_folders["opt"]))
        exec(compile(program, "docs/opt.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "patched:" in printed
    assert "computed: 2 of 7" in printed


def test_opt_md_names_every_patch() -> None:
    text = (DOCS / "opt.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE))
    functions = inspect.getmembers(dist_patch, inspect.isfunction)
    patches = {name for name, function in functions if function.__module__ == dist_patch.__name__}
    assert {name for name in patches if not name.startswith("_")} - {"apply"} == listed


def test_structures_md_names_every_module() -> None:
    text = (DOCS / "structures.md").read_text(encoding="utf-8")
    package = DOCS.parent / "orchestrator"
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert modules <= set(re.findall(r"`(\w+\.py)`", text))
