"""The whole system against the algorithm written out in plain torch and transformers."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import DEVICE, write_questions
from numpy.typing import NDArray
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator import noise, tasks
from orchestrator.batches import Batches
from orchestrator.config import Config
from orchestrator.driver import Driver
from orchestrator.local import LocalFleet
from orchestrator.noise import NoiseKind
from orchestrator.pieces import Pieces
from orchestrator.records import StepUpdate
from orchestrator.seed_sync import Header, Ledger

STEPS = 20
LORA = {"kind": "lora", "rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"], "slots": 4}
LOW_RANK = {"kind": "low_rank", "rank": 2, "slots": 2}
ACTIVATED = {**LORA, "activation": "suffix"}
PREFIX = {"kind": "prefix", "tokens": 3, "slots": 4}
MARKED = "{sentence|strip} {*}It was {option}"
MARKED_QUESTION = "{context} {*}so what was {question} It {option}"


def batches(seed: int, size: int, num_rows: int) -> Iterator[list[int]]:
    """Each epoch in an order of its own; a batch may reach into the next."""
    ids: list[int] = []
    for epoch in range(STEPS * size // num_rows + 2):
        ids += noise.permutation(seed, epoch, num_rows).tolist()
    for step in range(STEPS):
        yield ids[step * size : (step + 1) * size]


def trained_model(config: Config) -> tuple[torch.nn.Module, Mapping[str, torch.Tensor]]:
    """transformers' model, or PEFT's around it, and what of it is trained, by canonical name."""
    space = config.space
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    named = dict(model.named_parameters())
    if space.kind == "dense" or space.others == "dense":
        return model, named
    if space.kind == "low_rank":
        return model, {name: value for name, value in named.items() if is_matrix(name, value)}
    if space.kind == "prefix":
        return prefix_model(config, model)
    adapter = LoraConfig(
        r=space.rank, lora_alpha=int(space.alpha), target_modules=list(space.targets)
    )
    if space.activation == "suffix":
        tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        adapter.alora_invocation_tokens = tokenizer("It was").input_ids
        adapter.task_type = "CAUSAL_LM"
    model = get_peft_model(model, adapter)
    factors = {
        name.removeprefix("base_model.model.").replace(".default", ""): value
        for name, value in model.named_parameters()
        if "lora_" in name
    }
    for name, value in factors.items():
        if "lora_A" in name:  # PEFT's B is zero
            drawn = noise.uniform(config.run.seed, name, value.numel())
            bound = 1 / math.sqrt(value.shape[1])
            value.data.copy_(torch.from_numpy(2 * drawn - 1).view(value.shape) * bound)
    return model, factors


def prefix_model(
    config: Config, model: torch.nn.Module
) -> tuple[torch.nn.Module, Mapping[str, torch.Tensor]]:
    """PEFT's, and the columns of its table: per layer keys, then values."""
    num_tokens = config.space.tokens
    model = get_peft_model(
        model,
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_tokens),
    )
    encoders: Any = model.prompt_encoder
    table = encoders["default"].embedding.weight.data
    parts = table.chunk(4, dim=1)  # two layers
    names = [f"model.layers.{n}.prefix_{part}" for n in (0, 1) for part in ("key", "value")]
    for name, part in zip(names, parts, strict=True):
        drawn = noise.uniform(config.run.seed, name, part.numel())
        part.copy_(torch.from_numpy(0.2 * drawn - 0.1).view(part.shape))
    return model, dict(zip(names, parts, strict=True))


def is_matrix(name: str, value: torch.Tensor) -> bool:
    return ".layers." in name and value.dim() == 2


@torch.no_grad()
def plain_loop(config: Config) -> tuple[list[float], dict[str, torch.Tensor]]:
    """MeZO as in the paper's box, on one model; shares only the noise specification.

    Its learning rate is the recipe's: two steps of warm-up, then half a cosine.
    """
    model, parameters = trained_model(config)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    weights = {name: value.data.clone() for name, value in parameters.items()}
    rows = [json.loads(line) for line in Path(config.task.train.path).read_text().splitlines()]
    settings, space, seen = config.estimator, config.space, []

    def draw(
        seed: int, name: str, shape: Sequence[int], kind: NoiseKind = settings.noise
    ) -> torch.Tensor:
        drawn = noise.draw(kind, seed, name, 0, math.prod(shape))
        return torch.from_numpy(drawn).reshape(tuple(shape))

    def z(seed: int, name: str, step: int) -> torch.Tensor:
        shape = weights[name].shape
        if space.kind != "low_rank" or not is_matrix(name, weights[name]):
            return draw(seed, name, shape)
        kept = noise.derive_seed(config.run.seed, step - step % space.refresh, 2**32 - 1)
        factors = noise.factor_kind(settings.noise)
        right_seed = kept if space.refresh > 1 else seed
        left = draw(seed, f"{name}.u", (shape[0], space.rank), factors)
        right = draw(right_seed, f"{name}.v", (space.rank, shape[1]), factors)
        return left @ right / math.sqrt(space.rank)

    def loss(seed: int, scale: float, examples: list[int], step: int) -> float:
        for name, value in parameters.items():
            value.data.copy_(weights[name] + scale * z(seed, name, step))
        total = 0.0
        for index in examples:
            prompt = f"{rows[index]['sentence']} It was"
            options = [tokenizer(f"{prompt} {text}").input_ids for text in ("terrible", "great")]
            logprobs = [model(torch.tensor([ids])).logits[0, -2].log_softmax(0) for ids in options]
            scores = torch.stack([row[ids[-1]] for row, ids in zip(logprobs, options, strict=True)])
            total -= float(scores.log_softmax(0)[rows[index]["label"]])
        seen.append(total / len(examples))
        return seen[-1]

    for step, examples in enumerate(batches(config.run.seed, settings.batch_size, len(rows))):
        lr = settings.lr * (
            (step + 1) / 2 if step < 2 else 0.5 + 0.5 * math.cos(math.pi * (step - 2) / 18)
        )
        seeds = [noise.derive_seed(config.run.seed, step, i) for i in range(settings.num_seeds)]
        if settings.kind == "two_sided":
            pairs = [
                [loss(seed, sign * settings.eps, examples, step) for sign in (1, -1)]
                for seed in seeds
            ]
            gradients = [(plus - minus) / (2 * settings.eps) for plus, minus in pairs]
        else:
            base = loss(0, 0.0, examples, step)
            gradients = [
                (loss(seed, settings.eps, examples, step) - base) / settings.eps for seed in seeds
            ]
        for name, value in weights.items():
            moves = [
                -lr / len(seeds) * g * z(s, name, step)
                for g, s in zip(gradients, seeds, strict=True)
            ]
            weights[name] = value * (1 - lr * settings.weight_decay) + sum(moves)
    return seen, weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind", "drawn", "space"),
    [
        ("opt", "two_sided", "gaussian", {}),
        ("opt", "one_sided", "rademacher", {}),
        ("llama", "two_sided", "rademacher", {}),
        ("llama", "one_sided", "gaussian", {}),
        ("opt", "two_sided", "gaussian", LORA),
        ("llama", "one_sided", "rademacher", LORA),
        ("llama", "two_sided", "gaussian", ACTIVATED),
        ("opt", "one_sided", "rademacher", ACTIVATED),
        ("opt", "one_sided", "rademacher", PREFIX),
        ("llama", "two_sided", "gaussian", PREFIX),
        ("opt", "one_sided", "gaussian", {"kind": "low_rank", "rank": 2, "slots": 4}),
        ("llama", "two_sided", "gaussian", {"kind": "low_rank", "rank": 1, "refresh": 3}),
        ("llama", "two_sided", "rademacher", {"kind": "low_rank", "others": "dense"}),
    ],
)
def test_twenty_steps_equal_the_plain_loop(
    family: str,
    kind: str,
    drawn: str,
    space: dict[str, Any],
    recipe: dict[str, Any],
    model_folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    values = yaml.safe_load(yaml.safe_dump(recipe))
    values["model"]["path"] = str(model_folders[family])
    values["estimator"] |= {"kind": kind, "noise": drawn}
    values["space"] = space
    if "activation" in space:
        values["task"]["template"] = MARKED
    if space.get("kind") == "lora":  # as pitfalls go: an adapter wants larger steps
        values["estimator"] |= {"eps": 1e-2, "lr": 1e-2}
    if space.get("kind") == "prefix":  # larger ones yet
        values["estimator"] |= {"eps": 1e-1, "lr": 1e-2}
    values["run"]["steps"] = STEPS
    config = Config.model_validate(values)
    expected_losses, expected_weights = plain_loop(config)

    fleet = LocalFleet(config, DEVICE)
    info = fleet.start()
    header = Header(1, 1, config.model.path, info.weights_hash, config.identity(), "", ())
    with Ledger.create(tmp_path / "ledger.jsonl", header) as ledger:
        Driver(config, fleet, ledger, [], batches=Batches(config, 40), num_test=50).train()
    fleet.digests()  # brings the last update to the replica

    pairs = [pair for record in ledger.records for pair in record.losses]
    losses = [value for pair in pairs for value in pair if value is not None]
    if kind == "one_sided":  # the ledger has each step's base beside every seed
        losses = [
            value
            for record in ledger.records
            for value in (record.losses[0][1], *(pair[0] for pair in record.losses))
            if value is not None
        ]
    assert losses == pytest.approx(expected_losses, abs=1e-4)
    assert max(losses) - min(losses) > 0.05  # the losses do move
    trained: Any = fleet._replicas[0].space
    assert {tensor.region.name for tensor in trained.tensors} == expected_weights.keys()
    for tensor in trained.tensors:
        name = tensor.region.name
        expected = expected_weights[name].ravel()
        np.testing.assert_allclose(tensor.master.cpu().ravel(), expected, atol=1e-5, err_msg=name)
    fleet.close()


def batches_of(config: Config) -> tuple[Batches, int]:
    """A run's batches, and how many rows it holds out."""
    data = tasks.load(config.task)
    pieces = Pieces(config, data.contexts)
    return Batches(config, len(data.train), data.groups, pieces), len(data.test)


def train(config: Config, path: Path, digests: set[str] | None = None) -> list[bytes]:
    """The step lines of a run's ledger, new or continued, by a local fleet; its replicas' digests
    at the end are added to `digests`."""
    fleet = LocalFleet(config, DEVICE)
    info = fleet.start()
    header = Header(1, 1, config.model.path, info.weights_hash, config.identity(), "", ())
    batches, num_test = batches_of(config)
    with Ledger.open(path, header) if path.exists() else Ledger.create(path, header) as ledger:
        Driver(config, fleet, ledger, [], batches=batches, num_test=num_test).train()
    if digests is not None:
        digests |= set(fleet.digests().values())
    fleet.close()
    return path.read_bytes().splitlines(keepends=True)[1:]


TOWARDS_THE_START = {"weight_decay": 20.0, "decay_towards": "start", "lr": 1e-2, "momentum": 0.5}
SCHEDULED = {"eps_schedule": "cosine", "eps_final": 1e-2, "num_seeds_final": 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("space", "estimator"),
    [
        ({}, TOWARDS_THE_START),
        (LORA, TOWARDS_THE_START),
        (PREFIX, TOWARDS_THE_START),
        ({**LOW_RANK, "others": "dense"}, TOWARDS_THE_START),
        ({}, {"kind": "fzoo", "num_seeds": 3, "noise": "rademacher"}),
        ({}, {"kind": "es", "num_seeds": 3, "momentum": 0.9}),
        ({}, {"kind": "es", "num_seeds": 3, "shaping": "rank"}),
        ({}, {"kind": "es", "num_seeds": 4, "shaping": "z_score", "momentum": 0.5}),
        ({}, {"second_moment": 0.9, "clip": 5.0}),
        ({}, {"kind": "one_sided", "seeds_schedule": "linear", "momentum": 0.9, **SCHEDULED}),
    ],
)
def test_a_ledger_replays_to_its_formula_bit_for_bit(
    space: dict[str, Any], estimator: dict[str, Any], recipe: dict[str, Any], tmp_path: Path
) -> None:
    """The state that training ended with is that of its ledger, replayed at once, one by one, and
    in numpy; two replicas that resume write the same."""
    values = yaml.safe_load(yaml.safe_dump(recipe))
    values["space"] = space
    values["estimator"] |= {"weight_decay": 5.0, **estimator}
    config = Config.model_validate(values)
    path, cut = tmp_path / "one.jsonl", tmp_path / "cut.jsonl"
    whole = train(config, path)
    cut.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:4]))
    values["fleet"]["num_replicas"] = 2
    digests = set[str]()
    assert train(Config.model_validate(values), cut, digests) == whole

    updates = [record.update() for record in Ledger.read(path)[1]]
    assert len({update.decay for update in updates}) > 3
    for at_once in (True, False):
        fleet = LocalFleet(config, DEVICE)
        fleet.start()
        trained: Any = fleet._replicas[0].space
        tensors = {tensor.region.name: tensor for tensor in trained.tensors}
        first = {name: tensor.master.cpu().numpy().copy() for name, tensor in tensors.items()}
        for update in updates:
            fleet.apply(update)
            if not at_once:
                fleet.digests()
        digests |= set(fleet.digests().values())
        for name, start in first.items():
            expected = replayed(config, name, start, updates)
            assert np.array_equal(tensors[name].master.cpu(), expected), name
            assert not np.array_equal(start, expected)
        fleet.close()
    assert len(digests) == 1


def replayed(
    config: Config, name: str, start: NDArray[np.float32], updates: Sequence[StepUpdate]
) -> NDArray[np.float32]:
    """The steps of a whole tensor, [rows, columns] or [1, n], in numpy's float32."""
    rank, kind = config.space.rank, config.estimator.noise

    is_factored = config.space.kind == "low_rank" and "_proj." in name

    def weight(coefficient: float) -> np.float32:
        if is_factored:
            return noise.low_rank_coefficient(coefficient, rank)
        return np.float32(coefficient)

    def z(seed: int) -> NDArray[np.float32]:
        if not is_factored:
            return noise.draw(kind, seed, name, 0, start.size).reshape(start.shape)
        rows, columns = start.shape
        left = noise.factor(kind, seed, f"{name}.u", 0, rows * rank).reshape(rows, rank)
        right = noise.factor(kind, seed, f"{name}.v", 0, rank * columns).reshape(rank, columns)
        return noise.low_rank(left, right)

    value = start
    for update in updates:
        decay = np.float32(update.decay)
        if config.estimator.decay_towards == "zero":
            value = value * decay
        elif decay != 1:
            value = (value - start) * decay + start
        total = np.full_like(start, -0.0)
        for seed, coefficient in zip(update.seeds, update.coefficients, strict=True):
            total = total + weight(coefficient) * z(seed)
        value = value + total
    return value


def with_objective(
    recipe: dict[str, Any], space: dict[str, Any], objective: str, folder: Path
) -> dict[str, Any]:
    """The recipe's values in this space; f1 is of answers, to questions that the folder gets."""
    values: dict[str, Any] = yaml.safe_load(yaml.safe_dump(recipe))
    values["space"] = space
    if objective == "f1":
        rows = write_questions(folder / "rows.jsonl", 50)
        values["task"] = {"preset": "squad", "train": {"path": str(rows)}, "holdout": 10}
        values["task"]["max_new_tokens"] = 8
    if "activation" in space:
        values["task"]["template"] = MARKED if objective == "loss" else MARKED_QUESTION
    values["task"]["objective"] = objective
    return values


@pytest.mark.slow
@pytest.mark.parametrize(
    ("space", "estimator", "objective"),
    [
        (LORA, {}, "loss"),
        (LOW_RANK, {}, "loss"),
        (PREFIX, {}, "loss"),
        (LOW_RANK, {"kind": "es", "second_moment": 0.9, "momentum": 0.5}, "loss"),
        (LORA, {"eps": 0.3}, "f1"),
        (ACTIVATED, {}, "loss"),
        (ACTIVATED, {"eps": 0.3}, "f1"),
        (PREFIX, {"eps": 0.3}, "accuracy"),
    ],
)
def test_slots_give_the_same_ledger_for_any_fleet_and_after_a_resume(
    space: dict[str, Any],
    estimator: dict[str, Any],
    objective: str,
    recipe: dict[str, Any],
    tmp_path: Path,
) -> None:
    values = with_objective(recipe, space, objective, tmp_path)
    values["estimator"] |= {"num_seeds": 4, "lr": 1e-3, **estimator}
    values["run"]["steps"] = STEPS
    whole = train(Config.model_validate(values), tmp_path / "one.jsonl")
    assert len(whole) == STEPS
    losses = [pair for line in whole for pair in json.loads(line)["losses"]]
    assert any(len(set(pair)) == len(pair) for pair in losses if len(pair) > 1) or estimator
    for num_replicas in (2, 3):
        values["fleet"]["num_replicas"] = num_replicas
        path = tmp_path / f"{num_replicas}.jsonl"
        assert train(Config.model_validate(values), path) == whole
    cut = tmp_path / "cut.jsonl"
    header = (tmp_path / "one.jsonl").read_bytes().splitlines(keepends=True)[0]
    cut.write_bytes(header + b"".join(whole[:7]))
    assert train(Config.model_validate(values), cut) == whole
