"""Who may import whom: a module knows only those below it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "orchestrator"
LAYERS = [
    {"presets", "templates", "answers", "reward_worker", "strict_json"} | {"whole_file"},
    {"config", "records", "environment", "output", "run_log", "snapshot_folder"},
    {"assets", "noise", "gradients", "tensor_map", "adapter_kernels_triton", "score_plan"}
    | {"attention_triton", "log_softmax_triton", "norm_triton", "objectives"}
    | {"recipe_file"},
    {"rows", "charts", "rewards", "pieces"},
    {"estimator", "seed_sync", "tasks", "checkpoint", "sweeps"}
    | {"evaluate", "metrics", "dist_patch", "adapter_kernels", "sampling", "batches", "dispatch"}
    | {"placement", "seats"},
    {"opt_native", "runner", "adapters", "parameters", "progress", "sweeps_numba", "sweeps_cuda"}
    | {"run_folder", "cluster_metrics"}
    | {
        "prefix_slots",
        "score_attention",
        "encoder",
        "history",
        "scoring_head",
        "inspection",
        "noise_floor",
        "linear_probe",
    },
    {"score_graphs", "pools", "losses", "report"},
    {"contexts"},
    {"generation"},
    {"engine", "sglang_models", "export"},
    {"space", "cache_check"},
    {"slotted", "host_master", "snapshots"},
    {"dense", "lora", "low_rank", "prefix"},
    {"spaces"},
    {"replica"},
    {"actors", "local"},
    {"driver", "tune", "fleets"},
    {"tune_page"},
    {"runs"},
]
# Packages that only some modules may know.
OWNERS = {
    "ray": {"actors"},
    "datasets": {"rows"},
    "pyarrow": {"rows"},
    "sglang": {"engine", "runner", "adapters", "adapter_kernels", "prefix_slots", "opt_native"}
    | {"score_graphs", "score_attention", "scoring_head", "pools", "generation"},
    "matplotlib": {"charts"},
    "sklearn": {"linear_probe"},
    "triton": {"adapter_kernels_triton", "attention_triton", "log_softmax_triton", "norm_triton"},
    "cuda": {"sweeps_cuda"},
    "numba": {"sweeps_numba", "replica"},
    "torch": {
        "engine",
        "contexts",
        "runner",
        "opt_native",
        "tensor_map",
        "checkpoint",
        "parameters",
        "dense",
        "replica",
        "sweeps",
        "sweeps_numba",
    }
    | {"sweeps_cuda", "fleets", "export", "adapters", "space", "spaces", "lora", "low_rank"}
    | {"adapter_kernels", "adapter_kernels_triton", "prefix", "prefix_slots", "slotted"}
    | {"score_graphs", "score_attention", "attention_triton", "norm_triton", "log_softmax_triton"}
    | {"pools", "generation", "sampling", "host_master", "cache_check", "snapshots"}
    | {"scoring_head"},
}
# A folder is one module: all its files together.
MODULES = sorted(
    {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    - {"__init__"}
)


def imports(module: str) -> set[str]:
    """Full names of all that a module imports, wherever in it the import stands."""
    files = [*(PACKAGE / module).glob("*.py"), *PACKAGE.glob(f"{module}.py")]
    names = set()
    for node in ast.walk(ast.parse("\n".join(file.read_text() for file in files))):
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
