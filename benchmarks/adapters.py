"""What adapter slots cost: beside plain prefill of the same tokens, and to write.

    python -m benchmarks.adapters [MODEL ...]

On random weights of a model's shape, one table a model: the share of plain prefill's throughput
that remains with all slots in one forward, paired, medians, and the time to write every slot.
"""

import sys
import tempfile
from contextlib import closing

from orchestrator import dist_patch, environment

NUM_THREADS = 2
environment.prepare(NUM_THREADS)

import torch  # noqa: E402

from benchmarks.measure import DEVICE, DTYPE, ON_GPU, header, medians, paired  # noqa: E402
from benchmarks.shapes import SHAPES  # noqa: E402

dist_patch.apply(DEVICE)

from orchestrator.adapters import AdapterPlan  # noqa: E402
from orchestrator.engine import Engine  # noqa: E402
from orchestrator.export import AdapterSettings  # noqa: E402
from orchestrator.lora import LoraSpace  # noqa: E402
from orchestrator.records import Probe  # noqa: E402

NUM_SLOTS, NUM_PROMPTS, NUM_TOKENS = (16, 16, 64) if ON_GPU else (4, 4, 32)
RANK = 8
NUM_TURNS = 20 if ON_GPU else 9
DEFAULT_MODELS = ["llama-3-8b", "opt-13b"] if ON_GPU else ["opt-125m"]


def load(name: str, folder: str, plan: AdapterPlan | None) -> Engine:
    SHAPES[name].config.save_pretrained(folder)
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
    tokens = torch.randint(5, SHAPES[name].config.vocab_size, shape, generator=generator).tolist()
    spans = [(NUM_TOKENS, NUM_TOKENS + 1)] * len(tokens)
    probes = [Probe(0, seed, 1, 1e-3, (0,)) for seed in range(NUM_SLOTS)]
    with closing(space.placed(probes)) as groups:
        names = [placed.adapter for placed in next(groups)]
    calls = {
        "plain": lambda: plain.score(tokens, spans),
        "slots": lambda: adapted.score(tokens[:NUM_PROMPTS], spans[:NUM_PROMPTS], adapters=names),
        "write": lambda: list(space.placed(probes)),
    }
    taken = medians(paired(calls, NUM_TURNS))
    num_tokens = NUM_SLOTS * NUM_PROMPTS * NUM_TOKENS
    print(
        f"{name}, {'+'.join(modules) if len(modules) < 4 else 'all-linear'}: plain prefill "
        f"{num_tokens / taken['plain']:.0f} tokens/s; {NUM_SLOTS} slots of rank {RANK} in one "
        f"forward {num_tokens / taken['slots']:.0f} ({taken['plain'] / taken['slots']:.2f}); "
        f"writing them {1e3 * taken['write']:.2f} ms",
        flush=True,
    )
    plain.close()
    adapted.close()


if __name__ == "__main__":
    print(header())
    for model in sys.argv[1:] or DEFAULT_MODELS:
        compare(model, ("q_proj", "v_proj"))
        compare(model, SHAPES[model].modules)
