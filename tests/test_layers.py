"""Who may import whom: a module knows only those below it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "orchestrator"
LAYERS = [
    {"config", "records", "environment", "output"},
    {"assets", "noise"},
    {"estimator", "seed_sync", "tasks", "objectives", "checkpoint", "sweeps"}
    | {"evaluate", "metrics", "dist_patch"},
    {"engine", "parameters", "progress", "sweeps_numba", "sweeps_triton"},
    {"dense"},
    {"replica"},
    {"actors", "local"},
    {"driver"},
    {"runs"},
]
# Packages that only some modules may know.
OWNERS = {
    "ray": {"actors"},
    "sglang": {"engine"},
    "triton": {"sweeps_triton"},
    "numba": {"sweeps_numba", "replica"},
    "torch": {"engine", "checkpoint", "parameters", "dense", "replica", "sweeps", "sweeps_numba"}
    | {"sweeps_triton", "runs"},
}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imports(module: str) -> set[str]:
    """Full names of all that a module imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None and node.level == 0, f"{module}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer(module: str) -> int:
    return next(index for index, members in enumerate(LAYERS) if module in members)


def test_every_module_has_a_layer() -> None:
    assert set(MODULES) == set().union(*LAYERS)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_knows_only_those_below_it(module: str) -> None:
    for name in imports(module):
        if name.startswith("orchestrator."):
            other = name.split(".")[1]
            assert layer(other) < layer(module), f"{module} imports {other}"


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_have_their_owners(module: str) -> None:
    packages = {name.split(".")[0] for name in imports(module)}
    for package, owners in OWNERS.items():
        assert package not in packages or module in owners, f"{module} imports {package}"
