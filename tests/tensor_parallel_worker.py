"""What one rank of a tensor-parallel model computes; run as a process per rank.

`python tensor_parallel_worker.py RANK SIZE FOLDER`: FOLDER/models holds the models; rank 0 leaves
FOLDER/FAMILY.pt, and exported models in FOLDER/exported.
"""

import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bare import adapter_runner, last_logits
from conftest import DEVICE, VOCABULARY, recorded
from sglang.srt.distributed import parallel_state

from orchestrator import snapshot_folder
from orchestrator.adapters import AdapterPlan
from orchestrator.checkpoint import Checkpoint
from orchestrator.dense import DenseSpace
from orchestrator.engine import Engine
from orchestrator.export import AdapterSettings, write_model
from orchestrator.lora import LoraSpace
from orchestrator.low_rank import LowRankSpace
from orchestrator.parameters import canonical_tensors
from orchestrator.prefix import PrefixSpace
from orchestrator.prefix_slots import PrefixPlan
from orchestrator.records import MARK_SIZE, Probe, StepUpdate
from orchestrator.runner import World, gather_from_ranks
from orchestrator.sampling import Sampling
from orchestrator.snapshots import Snapshots

FAMILIES = ["opt", "opt-350m", "opt-untied", "llama", "qwen3"]
SLOT_FAMILIES = ["opt", "llama"]
ADAPTER = "adapter"
OPT_LINEAR_MODULES = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
SEQUENCES = [[3, 4, 5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16, 3, 4, 5]]
UPDATE = StepUpdate(step=0, seeds=(7, 2**63 + 8), coefficients=(0.01, -0.02), decay=0.875)


def observe(family: str, models: Path, exported: Path, world: World) -> dict[str, Any]:
    """All that must not depend on how many ranks hold the model."""
    folder = models / family
    engine = Engine(
        str(folder), dtype="float32", device=DEVICE, kv_tokens=256, threads=1, world=world
    )
    spans = [(1, len(tokens)) for tokens in SEQUENCES]
    seen: dict[str, Any] = {}
    with recorded(engine) as logits:
        seen["scores"] = [span.sum for span in engine.score(SEQUENCES, spans).spans]
    seen["logits"] = torch.cat(logits)
    drawn = Sampling(8, temperature=1.0, top_p=0.9)
    found = [
        *engine.generate(SEQUENCES, Sampling(8)),
        *engine.generate(SEQUENCES * 2, drawn, seeds=range(6)),
    ]
    seen["generated"] = [each.tokens for each in found]
    tensors = canonical_tensors(engine.model, Checkpoint(folder), world.rank)
    for master in ("float32", "bfloat16"):
        dtype = getattr(torch, master)
        space = DenseSpace(tensors, noise="gaussian", master_dtype=dtype)
        seen["num_parameters"] = space.num_parameters
        seen[f"{master} digests"] = [space.digest(), space.trained.digest(live=True)]
        space.trained.perturb(5, 1e-3)
        seen[f"{master} digests"].append(space.trained.digest(live=True))
        seen[f"{master} loss"] = engine.score(SEQUENCES, spans).spans[0].mean
        space.apply(UPDATE)
        space.settle()
        seen[f"{master} digests"] += [space.digest(), space.trained.digest(live=True)]
        weights = dict(space.weights())
        seen[f"{master} weights"] = weights
        exported.mkdir(exist_ok=True)
        write_model(folder, exported / f"{family}-{master}", weights.items())
        snapshots = Snapshots(exported / f"{family}-{master}-snapshots", family)
        snapshots.write(space, 1, bytes(MARK_SIZE), space.digest())
        space.digest()  # all ranks wait for the first
        for tensor in tensors:  # as the next space expects it
            tensor.live.copy_(tensor.initial)
        fresh = DenseSpace(tensors, noise="gaussian", master_dtype=dtype)
        seen[f"{master} restored"] = [snapshots.restore(fresh, bytes(MARK_SIZE)), fresh.digest()]
        seen[f"{master} snapshot"] = snapshot_folder.path_of(snapshots.folder, 1).read_bytes()
        for tensor in tensors:
            tensor.live.copy_(tensor.initial)
    anchored = DenseSpace(tensors, noise="gaussian", master_dtype=torch.float32, anchored=True)
    anchored.apply(UPDATE)
    anchored.apply(replace(UPDATE, step=1))
    seen["anchored digest"] = anchored.digest()
    engine.close()
    return seen


def observe_slots(family: str, models: Path, world: World) -> dict[str, Any]:
    """Scores, digests and state of the spaces over adapter slots, on all linear modules."""
    folder = models / family
    checkpoint = Checkpoint(folder)
    modules = tuple(sorted(checkpoint.linear_modules()))
    seen: dict[str, Any] = {}
    for kind in ("lora", "low_rank"):
        scaling = 2.0 if kind == "lora" else 0.5
        engine = Engine(
            str(folder),
            dtype="float32",
            device=DEVICE,
            kv_tokens=256,
            adapters=AdapterPlan(num_slots=3, rank=4, scaling=scaling, modules=modules),
            world=world,
        )
        assert engine.slots is not None
        if kind == "lora":
            settings = AdapterSettings(4, 8.0, modules)
            space: Any = LoraSpace(engine.slots, settings, noise_kind="gaussian", seed=1)
        else:
            tensors = canonical_tensors(engine.model, checkpoint, world.rank)
            space = LowRankSpace(
                tensors,
                engine.slots,
                noise_kind="gaussian",
                master_dtype=torch.bfloat16,
                rank=4,
                run_seed=1,
            )
        space.apply(UPDATE)
        space.settle()
        seen[f"{kind} digest"] = space.digest()
        seen[f"{kind} parameters"] = space.num_parameters
        spans = [(1, len(tokens)) for tokens in SEQUENCES]
        probes = [Probe(1, 7, sign, 1e-2, (0,)) for sign in (1, -1)]
        with closing(space.placed(probes)) as groups:
            adapters = [placed.adapter for placed in next(groups)]
            scores = engine.score(SEQUENCES, spans, adapters=[*adapters, space.adapter]).spans
            seen[f"{kind} scores"] = [span.sum for span in scores]
        state = space.values() if kind == "lora" else space.weights()
        seen[f"{kind} state"] = dict(state)
        engine.close()
    return seen


def observe_prefix(family: str, models: Path, world: World) -> dict[str, Any]:
    """Scores, digests and state of the space over prefix slots."""
    engine = Engine(
        str(models / family),
        dtype="float32",
        device=DEVICE,
        kv_tokens=256,
        prefixes=PrefixPlan(num_slots=3, num_tokens=4),
        world=world,
    )
    assert engine.prefixes is not None
    space = PrefixSpace(engine.prefixes, noise_kind="gaussian", seed=1)
    space.apply(UPDATE)
    space.settle()
    seen: dict[str, Any] = {
        "prefix digest": space.digest(),
        "prefix parameters": space.num_parameters,
        "prefix state": dict(space.values()),
    }
    spans = [(1, len(tokens)) for tokens in SEQUENCES]
    with closing(space.placed([Probe(1, 7, sign, 0.5, (0,)) for sign in (1, -1)])) as groups:
        adapters = [placed.adapter for placed in next(groups)]
        scores = engine.score(SEQUENCES, spans, adapters=[*adapters, space.adapter]).spans
        seen["prefix scores"] = [span.sum for span in scores]
    engine.close()
    return seen


def copies_differ(models: Path, world: World) -> str:
    """What a rank says whose copy of a tensor that all ranks hold has changed."""
    folder = models / "opt"
    engine = Engine(
        str(folder), dtype="float32", device=DEVICE, kv_tokens=64, threads=1, world=world
    )
    tensors = canonical_tensors(engine.model, Checkpoint(folder), world.rank)
    space = DenseSpace(tensors, noise="gaussian", master_dtype=torch.float32)
    norm = next(tensor for tensor in space.tensors if "layer_norm" in tensor.region.name)
    norm.master[0, 0] += world.rank
    try:
        space.digest()
    except RuntimeError as error:
        return str(error)
    return ""


def observe_adapter(models: Path, adapter: Path, world: World) -> torch.Tensor:
    runner = adapter_runner(models / "opt", [adapter], OPT_LINEAR_MODULES, world)
    return last_logits(runner, SEQUENCES, [ADAPTER, None, ADAPTER])


def nccl_symptom(world: World) -> str:
    """What starting a group over gloo does without the patch that leaves NCCL out of it."""
    ranks = list(range(world.size))
    try:
        unpatched = parallel_state.init_model_parallel_group.__wrapped__
        unpatched([ranks], 0, "gloo", use_custom_allreduce=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    world = World(rank, size, f"file://{folder}/rendezvous")
    for family in FAMILIES:
        seen = observe(family, folder / "models", folder / "exported", world)
        if family in SLOT_FAMILIES:
            seen["slots"] = observe_slots(family, folder / "models", world)
            seen["slots"] |= observe_prefix(family, folder / "models", world)
        if rank == 0:
            torch.save(seen, folder / f"{family}.pt")
    logits = observe_adapter(folder / "models", folder / ADAPTER, world)
    complaints = gather_from_ranks(copies_differ(folder / "models", world))
    symptoms = gather_from_ranks(nccl_symptom(world) if DEVICE == "cpu" else "")
    if rank == 0:
        assert logits.shape == (len(SEQUENCES), len(VOCABULARY))
        others = {"symptoms": symptoms, "complaints": complaints}
        torch.save({"logits": logits, **others}, folder / f"{ADAPTER}.pt")


if __name__ == "__main__":
    main()
