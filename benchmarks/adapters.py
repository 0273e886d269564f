"""What adapter slots cost: beside plain prefill of the same tokens, to write, and to add up.

    python -m benchmarks.adapters [MODEL ...]

On random weights of a model's shape, one table a model: the share of plain prefill's throughput
that remains with all slots in one forward, paired, medians; the time to write every slot; the time
of a low-rank update beside a copy of the master.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

from orchestrator import dist_patch, environment

NUM_THREADS = 2
environment.prepare(NUM_THREADS)

import torch  # noqa: E402
from transformers import LlamaConfig, OPTConfig  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
dist_patch.apply(DEVICE)

from orchestrator.adapters import AdapterPlan  # noqa: E402
from orchestrator.engine import Engine  # noqa: E402
from orchestrator.export import AdapterSettings  # noqa: E402
from orchestrator.lora import LoraSpace  # noqa: E402
from orchestrator.noise import TensorRegion  # noqa: E402
from orchestrator.records import Probe  # noqa: E402
from orchestrator.space import sweeps_for  # noqa: E402

ON_GPU = DEVICE == "cuda"
NUM_SLOTS, NUM_PROMPTS, NUM_TOKENS = (16, 16, 64) if ON_GPU else (4, 4, 32)
RANK = 8
NUM_TURNS = 20 if ON_GPU else 9
DTYPE = "bfloat16" if ON_GPU else "float32"
OPT_MODULES = ("fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj")
LLAMA_MODULES = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
MODELS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "opt-125m": (OPTConfig(architectures=["OPTForCausalLM"]), OPT_MODULES),
    "opt-13b": (
        OPTConfig(
            hidden_size=5120,
            num_hidden_layers=40,
            num_attention_heads=40,
            ffn_dim=20480,
            architectures=["OPTForCausalLM"],
        ),
        OPT_MODULES,
    ),
    "llama-3-8b": (
        LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            architectures=["LlamaForCausalLM"],
        ),
        LLAMA_MODULES,
    ),
}
DEFAULT_MODELS = ["llama-3-8b", "opt-13b"] if ON_GPU else ["opt-125m"]


def seconds(call: Callable[[], object]) -> float:
    _wait()
    started = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def load(name: str, folder: str, plan: AdapterPlan | None) -> Engine:
    MODELS[name][0].save_pretrained(folder)
    return Engine(
        folder,
        dtype=DTYPE,
        device=DEVICE,
        kv_tokens=2 * NUM_SLOTS * NUM_PROMPTS * NUM_TOKENS,
        threads=NUM_THREADS,
        load_format="dummy",
        adapters=plan,
    )


def compare(name: str, modules: tuple[str, ...]) -> None:
    plan = AdapterPlan(NUM_SLOTS + 1, RANK, 2.0, modules)
    with tempfile.TemporaryDirectory() as folder:
        plain, adapted = load(name, folder, None), load(name, folder, plan)
    assert adapted.slots is not None
    settings = AdapterSettings(RANK, 2.0 * RANK, modules)
    space = LoraSpace(adapted.slots, settings, noise_kind="gaussian", seed=0)
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_SLOTS * NUM_PROMPTS, NUM_TOKENS + 1)
    tokens = torch.randint(5, 30000, shape, generator=generator).tolist()
    spans = [(NUM_TOKENS, NUM_TOKENS + 1)] * len(tokens)
    probes = [Probe(0, seed, 1, 1e-3, (0,)) for seed in range(NUM_SLOTS)]
    with closing(space.placed(probes)) as groups:
        names = [placed.adapter for placed in next(groups)]
    calls = {
        "plain": lambda: plain.score(tokens, spans),
        "slots": lambda: adapted.score(tokens[:NUM_PROMPTS], spans[:NUM_PROMPTS], adapters=names),
        "write": lambda: list(space.placed(probes)),
    }
    times: dict[str, list[float]] = {key: [] for key in calls}
    for turn in range(NUM_TURNS + 2):
        for key, call in calls.items():
            taken = seconds(call)
            if turn >= 2:  # the first compile kernels
                times[key].append(taken)
    medians = {key: statistics.median(values) for key, values in times.items()}
    num_tokens = NUM_SLOTS * NUM_PROMPTS * NUM_TOKENS
    print(
        f"{name}, {'+'.join(modules) if len(modules) < 4 else 'all-linear'}: plain prefill "
        f"{num_tokens / medians['plain']:.0f} tokens/s; {NUM_SLOTS} slots of rank {RANK} in one "
        f"forward {num_tokens / medians['slots']:.0f} ({medians['plain'] / medians['slots']:.2f}); "
        f"writing them {1e3 * medians['write']:.2f} ms",
        flush=True,
    )
    plain.close()
    adapted.close()


def low_rank_update(size: int, num_seeds: int) -> None:
    """One matrix [size, size]: the update against reading and writing the master once."""
    master = torch.randn(size, size, device=DEVICE)
    live = torch.empty_like(master, dtype=getattr(torch, DTYPE))
    left = torch.randn(num_seeds, size, RANK, device=DEVICE)
    right = torch.randn(num_seeds, RANK, size, device=DEVICE)
    sweeps, region = sweeps_for(master.device), TensorRegion("w", 0, size)

    def update() -> None:
        sweeps.low_rank_update(
            master,
            live,
            region,
            left=left,
            right=right,
            coefficients=[1e-9] * num_seeds,
            decay=1.0,
            step=0,
        )

    other = torch.empty_like(master)
    updates, copies = [], []
    for turn in range(NUM_TURNS + 2):
        taken = seconds(update), seconds(lambda: other.copy_(master))
        if turn >= 2:
            updates.append(taken[0])
            copies.append(taken[1])
    ratio = statistics.median(updates) / statistics.median(copies)
    print(
        f"low-rank update, {size} x {size}, rank {RANK}, {num_seeds} seeds: "
        f"{1e3 * statistics.median(updates):.2f} ms, {ratio:.2f} copies of the master",
        flush=True,
    )


if __name__ == "__main__":
    where = torch.cuda.get_device_name() if ON_GPU else f"CPU, {NUM_THREADS} threads"
    print(f"{where}, {DTYPE}, sglang {dist_patch.SGLANG_VERSION}, torch {torch.__version__}")
    for model in sys.argv[1:] or DEFAULT_MODELS:
        compare(model, ("q_proj", "v_proj"))
        compare(model, MODELS[model][1])
    for num_seeds in (1, 8):
        low_rank_update(8192 if ON_GPU else 4096, num_seeds)
