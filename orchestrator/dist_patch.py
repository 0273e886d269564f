"""Every change that is made to SGLang's behaviour, one function each.

`apply()` is the only entry. It must run before the first import of `orchestrator.engine`, and
never runs at import. Each patch says its symptom, its cause, the versions of SGLang in which both
were seen, and when it can go. Each is idempotent, and refuses a target that does not look as it
did in that version. What a patch replaces stays in reach as `__wrapped__`; the tests show its
symptom, so that a release that mends it is noticed.

With SGLANG_ALLOW_REUSE_DISTRIBUTED unset or false, process groups behave as in stock SGLang.
"""

import functools
import importlib
import importlib.machinery
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

SGLANG_VERSION = "0.5.17"
# The modules of OPT that SGLang's LoRA code does not know by name.
OPT_MODULES = frozenset({"fc1", "fc2"})
_MARK = "_orchestrator_patch"
_LAYERS_WITHOUT_FLOAT32 = (
    ("sglang.srt.layers.layernorm", "RMSNorm"),
    ("sglang.srt.layers.activation", "SiluAndMul"),
    ("sglang.srt.layers.activation", "GeluAndMul"),
    ("sglang.srt.layers.rotary_embedding.base", "RotaryEmbedding"),
)
_LORA_MODULES_THAT_PIN = ("backend.torch_backend", "layers", "lora", "mem_pool")


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
        applied += [leave_nccl_out_on_cpu(), ignore_pinned_memory(), attend_from_new_rows_only()]
    else:
        applied += [compute_float32_natively(), keep_heads_narrow()]
    applied += [name_opt_modules_to_lora()]
    if os.environ.get("SGLANG_ALLOW_REUSE_DISTRIBUTED", "").lower() in ("1", "true"):
        applied += [reuse_world(), reuse_process_groups(), replace_expert_locations()]
    return tuple(name for name in applied if name)


def use_cpu_engine() -> str:
    """Make SGLang choose its CPU layers.

    Symptom: on a machine without a GPU, Llama's rotary embedding tries to import vllm.
    Cause: SGLang picks its CPU implementations only where SGLANG_USE_CPU_ENGINE is set.
    Seen in 0.5.17. Can go when SGLang follows ServerArgs.device instead.
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
    Seen in 0.5.17. Can go when sglang-kernel ships a CPU build, or SGLang guards these imports.
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


def leave_nccl_out_on_cpu() -> str:
    """Let several processes of a machine without a GPU hold a model together, over gloo.

    Symptom: with tp_size 2 on CPU, starting fails inside PyNcclCommunicator.
    Cause: NCCL's library is installed, so every group tries to use it, whatever its backend.
    Seen in 0.5.17. Can go when groups over gloo leave NCCL and the custom all-reduce alone.
    """
    parallel_state = importlib.import_module("sglang.srt.distributed.parallel_state")
    original = _target(
        parallel_state, "init_model_parallel_group", "backend", "use_pynccl", "use_custom_allreduce"
    )

    def init_group(group_ranks: Any, local_rank: int, backend: str, **others: Any) -> Any:
        if backend == "gloo":
            others |= {"use_pynccl": False, "use_custom_allreduce": False}
        return original(group_ranks, local_rank, backend, **others)

    _replace(parallel_state, "init_model_parallel_group", init_group)
    return "leave_nccl_out_on_cpu"


class _Unpinned(ModuleType):
    """Torch, except that what it is asked to pin it leaves where it is."""

    def __init__(self, torch: ModuleType) -> None:
        super().__init__("torch")
        self._torch = torch

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._torch, name)
        if name not in ("tensor", "empty", "zeros", "ones", "arange"):
            return attribute
        return lambda *values, pin_memory=False, **others: attribute(*values, **others)


def ignore_pinned_memory() -> str:
    """Let adapters run where there is no CUDA driver.

    Symptom: RuntimeError, "Cannot access accelerator device when none is available", or "Need to
    provide pin_memory allocator", when an adapter is loaded or used.
    Cause: SGLang's LoRA code pins host memory without asking whether there is a device.
    Seen in 0.5.17. Can go when it asks, as the rest of SGLang does.
    """
    torch = importlib.import_module("torch")
    if torch.cuda.is_available():
        return ""
    for name in _LORA_MODULES_THAT_PIN:
        module: Any = importlib.import_module(f"sglang.srt.lora.{name}")
        if not hasattr(module, "torch"):
            _refuse(f"{module.__name__} does not import torch")
        if not isinstance(module.torch, _Unpinned):
            module.torch = _Unpinned(torch)
    _replace(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)
    return "ignore_pinned_memory"


def attend_from_new_rows_only() -> str:
    """Spare attention on a CPU the rows that a sequence's cached tokens would have.

    Symptom: 16 tokens behind a cached context of 300 take as long in attention as all 316.
    Cause: queries are padded to the whole sequence, and what the padding gives is thrown away.
    Seen in 0.5.17. Can go when TorchNativeAttnBackend hands its new rows a mask.
    """
    torch = importlib.import_module("torch")
    native: Any = importlib.import_module("sglang.srt.layers.attention.torch_native_backend")
    backend, name = native.TorchNativeAttnBackend, "_run_sdpa_forward_extend"
    original = _target(backend, name, "extend_prefix_lens", "sliding_window_size", "encoder_lens")

    def attend(
        own: Any,
        query: Any,
        output: Any,
        k_cache: Any,
        v_cache: Any,
        req_to_token: Any,
        req_pool_indices: Any,
        seq_lens: Any,
        extend_prefix_lens: Any,
        extend_seq_lens: Any,
        encoder_lens: Any = None,  # of cross-attention; SGLang passes it by its place
        **named: Any,
    ) -> Any:
        # [tokens, heads, head_dim]; each sequence's new rows lie one behind the other.
        window = named.get("sliding_window_size")
        is_plain = named.get("causal") and encoder_lens is None
        if not is_plain or (window is not None and window > -1):
            tables = (req_to_token, req_pool_indices, seq_lens, extend_prefix_lens, extend_seq_lens)
            others = (*tables, encoder_lens)
            return original(own, query, output, k_cache, v_cache, *others, **named)
        lengths, sizes = seq_lens.tolist(), extend_seq_lens.tolist()
        start = 0
        for slot, length, size in zip(req_pool_indices.tolist(), lengths, sizes, strict=True):
            places = req_to_token[slot, :length]
            rows, keys, values = (
                part.to(query.dtype).transpose(0, 1)[None]
                for part in (query[start : start + size], k_cache[places], v_cache[places])
            )
            mask = None
            if size < length:
                mask = torch.ones(size, length, dtype=torch.bool).tril(length - size)
            attended = native.scaled_dot_product_attention(
                rows,
                keys,
                values,
                attn_mask=mask,
                enable_gqa=named.get("enable_gqa", False),
                scale=named.get("scaling"),
                is_causal=mask is None,
            )
            output[start : start + size] = attended[0].transpose(0, 1)
            start += size
        return output

    _replace(backend, name, attend)
    return "attend_from_new_rows_only"


def compute_float32_natively() -> str:
    """Run models in float32 on a GPU, with torch's operations where SGLang's kernels cannot.

    Symptom: RuntimeError, "rmsnorm ... failed to dispatch data type Float", from Llama and others.
    Cause: sgl_kernel is compiled for 16-bit values; the layers call it for any.
    Seen in 0.5.17. Can go when sgl_kernel takes float32, or the layers choose by dtype.
    """
    for module_name, class_name in _LAYERS_WITHOUT_FLOAT32:
        layer_class: Any = getattr(importlib.import_module(module_name), class_name, None)
        if layer_class is None or not hasattr(layer_class, "forward_native"):
            _refuse(f"{module_name}.{class_name} has no forward_native")
        _replace(layer_class, "forward_cuda", _native_for_float32(layer_class.forward_cuda))
    return "compute_float32_natively"


def _native_for_float32(original: Callable[..., Any]) -> Callable[..., Any]:
    torch = importlib.import_module("torch")

    def forward(layer: Any, *values: Any, **others: Any) -> Any:
        if any(getattr(value, "dtype", None) is torch.float32 for value in values):
            return layer.forward_native(*values, **others)
        return original(layer, *values, **others)

    return forward


def keep_heads_narrow() -> str:
    """Make float32 logits of a 16-bit head without a float32 copy of it.

    Symptom: with enable_fp32_lm_head a forward takes 10 ms more, on OPT-13B and an H200.
    Cause: every call converts the whole head, and multiplies in float32. Products of 16-bit values
    are exact in float32, and matrix units add them in float32 anyway.
    Seen in 0.5.17. Can go when LogitsProcessor asks the matrix product for float32 itself.
    """
    torch = importlib.import_module("torch")
    processor: Any = importlib.import_module("sglang.srt.layers.logits_processor").LogitsProcessor
    original = _target(processor, "_compute_lm_head", "hidden_states", "lm_head")

    def compute(own: Any, hidden: Any, head: Any, bias: Any = None) -> Any:
        is_plain = hasattr(head, "weight") and not hasattr(head, "set_lora")
        if own.use_fp32_lm_head and is_plain and head.weight.is_cuda:
            narrow, weight = (torch.bfloat16, torch.float16), head.weight
            if weight.dtype in narrow and hidden.dtype is weight.dtype:
                return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return original(own, hidden, head, bias)

    _replace(processor, "_compute_lm_head", compute)
    return "keep_heads_narrow"


def name_opt_modules_to_lora() -> str:
    """Let adapters act on all of OPT's linear modules, at any tp_size.

    Symptom: "all-linear" leaves fc1 and fc2 out; with tp_size 2, fc2's adapter has the wrong shape.
    Cause: LoRA's tables of known and of row-parallel modules do not name them. Only models that
    list them in `supported_lora_modules` get them: others have modules of these names, and cannot
    answer for their sizes.
    Seen in 0.5.17. Can go when a model can say these things of its modules itself.
    """
    utils: Any = importlib.import_module("sglang.srt.lora.utils")
    if "out_proj" not in getattr(utils, "ROW_PARALLELISM_LINEAR_LORA_NAMES", ()):
        _refuse(f"{utils.__name__}.ROW_PARALLELISM_LINEAR_LORA_NAMES does not name out_proj")
    if "fc2" not in utils.ROW_PARALLELISM_LINEAR_LORA_NAMES:
        utils.ROW_PARALLELISM_LINEAR_LORA_NAMES.append("fc2")  # others hold this very list
    name = "auto_detect_lora_target_modules"
    original = _target(utils, name, "model")

    def detect(model: Any) -> set[str]:
        found: set[str] = original(model)
        return found | (OPT_MODULES & set(getattr(model, "supported_lora_modules", ())))

    for module in (utils, importlib.import_module("sglang.srt.lora.lora_manager")):
        _replace(module, name, detect)
    return "name_opt_modules_to_lora"


def reuse_world() -> str:
    """Let the runners of a process share its rank in one world, and need no port for it.

    Symptom: a runner that asks for another rank than its process has silently gets that one; and
    processes that start together now and then fail with EADDRINUSE.
    Cause: once torch.distributed is initialised, later arguments are ignored; and the rendezvous
    is a TCP port that was free when it was looked up, and may be taken when it is used.
    Seen in 0.5.17. Can go when SGLang takes a store, and compares ranks.
    """
    bootstrap = importlib.import_module("sglang.srt.distributed.bootstrap")
    original = _target(bootstrap, "init_distributed_environment", "world_size", "rank", "backend")
    distributed = importlib.import_module("torch.distributed")

    def join_or_reuse(*, world_size: int, rank: int, backend: str, **others: Any) -> None:
        if distributed.is_initialized():
            existing = distributed.get_rank(), distributed.get_world_size()
            if existing != (rank, world_size):
                raise RuntimeError(
                    f"this process is rank {existing[0]} of {existing[1]}; a runner that is rank "
                    f"{rank} of tp_size {world_size} needs a process of its own"
                )
        elif world_size == 1:
            store = distributed.HashStore()
            distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        original(world_size=world_size, rank=rank, backend=backend, **others)

    _replace(bootstrap, "init_distributed_environment", join_or_reuse)
    return "reuse_world"


def reuse_process_groups() -> str:
    """Let a second ModelRunner of a process share the groups that the first one made.

    Symptom: AssertionError: tensor model parallel group is already initialized.
    Cause: sglang.srt.distributed.bootstrap calls initialize_model_parallel for every runner.
    Seen in 0.5.17. Can go when SGLang's runners take existing groups.
    """
    bootstrap = importlib.import_module("sglang.srt.distributed.bootstrap")
    parallel_state = importlib.import_module("sglang.srt.distributed.parallel_state")
    original = _target(bootstrap, "initialize_model_parallel", "tensor_model_parallel_size")

    def initialize_or_reuse(*, tensor_model_parallel_size: int, **others: Any) -> None:
        if not parallel_state.model_parallel_is_initialized():
            original(tensor_model_parallel_size=tensor_model_parallel_size, **others)
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
    Seen in 0.5.17. Can go when SGLang keeps this metadata per runner.
    """
    model_runner = importlib.import_module("sglang.srt.model_executor.model_runner")
    name = "set_global_expert_location_metadata"
    original = _target(model_runner, name, "allow_overwrite")

    def set_anew(metadata: Any, allow_overwrite: bool = True) -> None:
        original(metadata, allow_overwrite=allow_overwrite)

    _replace(model_runner, name, set_anew)
    return "replace_expert_locations"


def _target(module: Any, name: str, *parameters: str) -> Callable[..., Any]:
    """The function that SGLang brings, with the parameters that a patch relies on."""
    function: Callable[..., Any] | None = getattr(module, name, None)
    if function is None:
        _refuse(f"{module.__name__}.{name} is not there")
    if hasattr(function, _MARK):
        function = inspect.unwrap(function)
    for parameter in parameters:
        if parameter not in inspect.signature(function).parameters:
            _refuse(f"{module.__name__}.{name} has no parameter {parameter}")
    return function


def _refuse(problem: str) -> NoReturn:
    raise RuntimeError(f"{problem}: dist_patch is for sglang {SGLANG_VERSION}")


def _replace(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Put a replacement in place, unless one of ours is there already."""
    original = getattr(owner, name)
    if not hasattr(original, _MARK):
        functools.update_wrapper(replacement, original)
        setattr(replacement, _MARK, True)
        setattr(owner, name, replacement)
