"""The documents' programs run, and say what is there."""

import re
from pathlib import Path

import pytest
from conftest import DEVICE

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
    assert set(dist_patch.apply(DEVICE)) <= listed
    assert all(hasattr(dist_patch, name) for name in listed)


def test_structures_md_names_every_module() -> None:
    text = (DOCS / "structures.md").read_text(encoding="utf-8")
    package = DOCS.parent / "orchestrator"
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert modules <= set(re.findall(r"`(\w+\.py)`", text))
