"""Every change that is made to SGLang's behaviour, one function each.

`apply()` is the only entry. It must run before the first import of `orchestrator.engine`, and
never runs at import. Each patch says its symptom, its cause, the SGLang it was written for and
when it can go; each is idempotent and checks that its target still looks as expected.

With SGLANG_ALLOW_REUSE_DISTRIBUTED unset or false, process groups behave as in stock SGLang.
"""

import importlib
import importlib.machinery
import importlib.metadata
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

SGLANG_VERSION = "0.5.17"
_MARK = "_orchestrator_patch"


def apply(device: str) -> tuple[str, ...]:
    """Apply every patch that `device` ("cpu" or "cuda") calls for; return their names.

    Raises RuntimeError when the installed SGLang is not the one the patches were written for.
    """
    installed = importlib.metadata.version("sglang")
    if installed != SGLANG_VERSION:
        raise RuntimeError(f"dist_patch is for sglang {SGLANG_VERSION}, found {installed}")
    applied = []
    if device == "cpu":
        applied += [use_cpu_engine(), stand_in_for_sgl_kernel()]
    if os.environ.get("SGLANG_ALLOW_REUSE_DISTRIBUTED", "").lower() in ("1", "true"):
        applied += [reuse_process_groups(), replace_expert_locations()]
    return tuple(name for name in applied if name)


def use_cpu_engine() -> str:
    """Make SGLang choose its CPU layers.

    Symptom: on a machine without a GPU, Llama's rotary embedding tries to import vllm.
    Cause: SGLang picks its CPU implementations only where SGLANG_USE_CPU_ENGINE is set.
    Can go when SGLang follows ServerArgs.device instead.
    """
    if "sglang" in sys.modules and os.environ.get("SGLANG_USE_CPU_ENGINE") != "1":
        raise RuntimeError("dist_patch.apply('cpu') must run before sglang is imported")
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    return "use_cpu_engine"


class _AbsentKernels(ModuleType):
    """A module whose every public name is a function that says that the kernels are absent."""

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*args: Any, **kwargs: Any) -> NoReturn:
            raise RuntimeError(
                f"sgl_kernel.{name} was called, but sgl_kernel needs a CUDA driver and this "
                "machine has none; run on a GPU, or use a model that needs no such kernel"
            )

        return absent


def stand_in_for_sgl_kernel() -> str:
    """Let SGLang's CPU layers import where there is no CUDA driver.

    Symptom: ImportError: libcuda.so.1, from `import sgl_kernel`.
    Cause: the wheel's shared library links the driver, and SGLang imports names from it even
    where the CPU path never calls them.
    Can go when sglang-kernel ships a CPU build, or SGLang guards these imports.
    """
    if isinstance(sys.modules.get("sgl_kernel"), _AbsentKernels):
        return "stand_in_for_sgl_kernel"
    try:
        importlib.import_module("sgl_kernel")
        return ""
    except ImportError:
        for name in [name for name in sys.modules if name.split(".")[0] == "sgl_kernel"]:
            del sys.modules[name]
    stand_in = _AbsentKernels("sgl_kernel")
    stand_in.__path__ = []
    stand_in.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None, is_package=True)
    sys.modules["sgl_kernel"] = stand_in
    return "stand_in_for_sgl_kernel"


def reuse_process_groups() -> str:
    """Let a second ModelRunner of a process share the groups that the first one made.

    Symptom: AssertionError: tensor model parallel group is already initialized.
    Cause: sglang.srt.distributed.bootstrap calls initialize_model_parallel for every runner.
    Can go when SGLang's runners take existing groups.
    """
    bootstrap = importlib.import_module("sglang.srt.distributed.bootstrap")
    parallel_state = importlib.import_module("sglang.srt.distributed.parallel_state")
    original = _target(bootstrap, "initialize_model_parallel")
    if hasattr(original, _MARK):
        return "reuse_process_groups"

    def initialize_or_reuse(*, tensor_model_parallel_size: int, **kwargs: Any) -> None:
        if not parallel_state.model_parallel_is_initialized():
            original(tensor_model_parallel_size=tensor_model_parallel_size, **kwargs)
            return
        existing = parallel_state.get_tensor_model_parallel_world_size()
        if existing != tensor_model_parallel_size:
            raise RuntimeError(
                f"this process already holds process groups for tp_size {existing}; a runner "
                f"with tp_size {tensor_model_parallel_size} needs a process of its own"
            )

    _replace(bootstrap, "initialize_model_parallel", initialize_or_reuse)
    return "reuse_process_groups"


def replace_expert_locations() -> str:
    """Let a second ModelRunner of a process set its own expert locations.

    Symptom: AssertionError in set_global_expert_location_metadata, for the second runner.
    Cause: ModelRunner sets process-wide metadata without allow_overwrite.
    Can go when SGLang keeps this metadata per runner.
    """
    model_runner = importlib.import_module("sglang.srt.model_executor.model_runner")
    original = _target(model_runner, "set_global_expert_location_metadata")
    if hasattr(original, _MARK):
        return "replace_expert_locations"

    def set_anew(value: Any, allow_overwrite: bool = True) -> None:
        original(value, allow_overwrite=allow_overwrite)

    _replace(model_runner, "set_global_expert_location_metadata", set_anew)
    return "replace_expert_locations"


def _target(module: ModuleType, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] | None = getattr(module, name, None)
    if function is None or not callable(function):
        raise RuntimeError(
            f"{module.__name__}.{name} is not there: dist_patch wants sglang {SGLANG_VERSION}"
        )
    return function


def _replace(module: ModuleType, name: str, replacement: Callable[..., Any]) -> None:
    setattr(replacement, _MARK, True)
    setattr(module, name, replacement)
