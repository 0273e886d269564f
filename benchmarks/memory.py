"""Memory of each space's steps on a shape, in bytes a parameter of the model.

    python -m benchmarks.memory [--shapes opt-1.3b,...] [--tokens 16x64]
                                [--spaces dense:float32,dense:host,...] [--steps N]

One row a space: an engine with random weights, the space, and its two-sided steps as in
steps.py. `peak` is the most that was allocated on the device during the steps, over what the
process had there before, without the KV pool; `activations` the part of it that was given back
again; `pinned` what the process holds of the host's memory for the device's copies. On a CPU, where
nobody counts what is given back, there is only `held`: the tensors that are there between steps.
"""

import argparse
import gc
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator import dist_patch, environment

NUM_THREADS = 2
environment.prepare(NUM_THREADS)

import torch  # noqa: E402

from benchmarks import measure  # noqa: E402
from benchmarks.measure import DEVICE, ON_GPU  # noqa: E402
from benchmarks.shapes import SHAPES  # noqa: E402

dist_patch.apply(DEVICE)

from benchmarks.steps import OurSteps, Row, Settings, SpaceChoice, load  # noqa: E402
from orchestrator.engine import Engine  # noqa: E402

SHAPES_BY_DEFAULT = "opt-1.3b" if ON_GPU else "opt-tiny"
TOKENS_BY_DEFAULT = "16x64" if ON_GPU else "4x16"
SPACES_BY_DEFAULT = "dense:float32,dense:bfloat16,lora,low_rank" + (",dense:host" if ON_GPU else "")
STEPS_BY_DEFAULT = 20 if ON_GPU else 3
COLUMNS = (
    ("shape", "shape"),
    ("space", "space"),
    ("parameters", "num_parameters"),
    ("held", "held_bytes_a_parameter"),
    ("activations", "activation_bytes_a_parameter"),
    ("peak", "peak_bytes_a_parameter"),
    ("pinned", "pinned_bytes_a_parameter"),
    ("KV pool GB", "kv_pool_gigabytes"),
    ("step ms", "step_ms"),
)


def measured(name: str, space: str, tokens: str, num_steps: int) -> Row:
    """A space's row of the table."""
    shape, choice = SHAPES[name], SpaceChoice.parse(space)
    settings = Settings((tokens,), turns=0, num_probes=1)
    measure.free_memory()
    held_before, pinned_before = held_bytes(), pinned_bytes()
    engine = load(shape, choice, settings)
    trained = choice.build(engine)
    steps = OurSteps(engine, trained, settings.batches(shape)[tokens], settings)
    measure.free_memory()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    times = [measure.seconds(steps.step) for _ in range(num_steps)]
    peak = torch.cuda.max_memory_allocated() if ON_GPU else None
    gc.collect()
    held, pool = held_bytes(), kv_pool_bytes(engine)
    size = sum(value.numel() for value in engine.model.parameters())
    row = {
        "shape": name,
        "space": space,
        "tokens": tokens,
        "num_steps": num_steps,
        "num_parameters": size,
        "num_trained": trained.num_parameters,
        "held_bytes_a_parameter": (held - held_before - pool) / size,
        "activation_bytes_a_parameter": None if peak is None else (peak - held) / size,
        "peak_bytes_a_parameter": None if peak is None else (peak - held_before - pool) / size,
        "pinned_bytes_a_parameter": (pinned_bytes() - pinned_before) / size if ON_GPU else None,
        "kv_pool_gigabytes": pool / 1e9,
        "step_ms": 1e3 * statistics.median(times),
    }
    del steps, trained
    engine.close()
    return row


def held_bytes() -> int:
    """Bytes of all tensors on the device."""
    if ON_GPU:
        return torch.cuda.memory_allocated()
    storages = {}
    for value in gc.get_objects():
        # by its type: to ask some modules' objects for their class loads the module
        if issubclass(type(value), torch.Tensor) and value.device.type == "cpu":
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def pinned_bytes() -> int:
    """Bytes of pinned memory in use, as they were allocated."""
    return int(torch.cuda.host_memory_stats()["active_bytes.current"]) if ON_GPU else 0


def kv_pool_bytes(engine: Engine) -> int:
    """Bytes of keys and values of all layers."""
    pool: Any = engine._runner.model_runner.token_to_kv_pool
    return int(sum(pool.get_kv_size_bytes()))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("--shapes", default=SHAPES_BY_DEFAULT, help=", ".join(SHAPES))
    parser.add_argument("--tokens", default=TOKENS_BY_DEFAULT, help="SEQUENCESxLENGTH, or sst2")
    parser.add_argument("--spaces", default=SPACES_BY_DEFAULT, help="KIND or KIND:PRECISION")
    parser.add_argument("--steps", type=int, default=STEPS_BY_DEFAULT)
    parser.add_argument("--name", default="memory", help="of the file that keeps the results")
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help="its folder")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parse(arguments)
    print(measure.header(), flush=True)
    rows: list[Row] = []
    for shape in chosen.shapes.split(","):
        for space in chosen.spaces.split(","):
            rows.append(measured(shape, space, chosen.tokens, chosen.steps))
            path = measure.write_results(chosen.name, rows, chosen.results)
            print(f"{shape}, {space}: {rows[-1]['held_bytes_a_parameter']:.2f} held", flush=True)
    shown = [(title, key) for title, key in COLUMNS if rows[0][key] is not None]
    measure.print_table(
        [title for title, _ in shown], [[row[key] for _, key in shown] for row in rows]
    )
    print(f"kept in {path}")


if __name__ == "__main__":
    main()
