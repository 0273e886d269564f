"""What adapter slots cost: beside plain prefill of the same tokens, and to write.

    python -m benchmarks.adapters [MODEL ...]

On random weights of a model's shape, one table a model: the share of plain prefill's throughput
that remains with all slots in one forward, paired, medians, and the time to write every slot.
"""

import sys
import tempfile
from contextlib import closing
from typing import Any

from orchestrator import dist_patch, environment

NUM_THREADS = 2
environment.prepare(NUM_THREADS)

import torch  # noqa: E402

from benchmarks.measure import (  # noqa: E402
    DEVICE,
    DTYPE,
    ON_GPU,
    free_memory,
    header,
    medians,
    paired,
    print_table,
    ratio,
    write_results,
)
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


def compare(name: str, modules: tuple[str, ...], turns: int = NUM_TURNS) -> dict[str, Any]:
    """A row: tokens a second without and with slots, the share that is left, and the writing."""
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
    times = paired(calls, turns)
    taken = medians(times)
    num_tokens = NUM_SLOTS * NUM_PROMPTS * NUM_TOKENS
    plain.close()
    adapted.close()
    return {
        "shape": name,
        "targets": "all linear" if modules == SHAPES[name].modules else ", ".join(modules),
        "plain_tokens_a_second": num_tokens / taken["plain"],
        "tokens_a_second": num_tokens / taken["slots"],
        "share": ratio(times, "plain", "slots"),
        "write_ms": 1e3 * taken["write"],
    }


if __name__ == "__main__":
    print(header())
    rows = []
    for model in sys.argv[1:] or DEFAULT_MODELS:
        for targets in (("q_proj", "v_proj"), SHAPES[model].modules):
            rows.append(compare(model, targets))
            print_table([*rows[-1]], [[*rows[-1].values()]])
            free_memory()
    write_results("adapters", rows)
