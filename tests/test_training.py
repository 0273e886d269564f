"""The whole system against the algorithm written out in plain torch and transformers."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import DEVICE
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator import noise
from orchestrator.config import Config
from orchestrator.driver import Driver
from orchestrator.local import LocalFleet
from orchestrator.seed_sync import Header, Ledger

STEPS = 20


def batches(seed: int, size: int, num_rows: int) -> Iterator[list[int]]:
    """Each epoch in an order of its own; a batch may reach into the next."""
    ids: list[int] = []
    for epoch in range(STEPS * size // num_rows + 2):
        ids += noise.permutation(seed, epoch, num_rows).tolist()
    for step in range(STEPS):
        yield ids[step * size : (step + 1) * size]


@torch.no_grad()
def plain_loop(config: Config) -> tuple[list[float], dict[str, torch.Tensor]]:
    """MeZO as in the paper's box, on one model; shares only the noise specification.

    Its learning rate is the recipe's: two steps of warm-up, then half a cosine.
    """
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    weights = {name: value.data.clone() for name, value in model.named_parameters()}
    rows = [json.loads(line) for line in Path(config.task.train.path).read_text().splitlines()]
    settings, seen = config.estimator, []

    def z(seed: int, name: str) -> torch.Tensor:
        drawn = noise.draw(settings.noise, seed, name, 0, weights[name].numel())
        return torch.from_numpy(drawn).reshape(weights[name].shape)

    def loss(seed: int, scale: float, examples: list[int]) -> float:
        for name, value in model.named_parameters():
            value.data.copy_(weights[name] + scale * z(seed, name))
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
                [loss(seed, sign * settings.eps, examples) for sign in (1, -1)] for seed in seeds
            ]
            gradients = [(plus - minus) / (2 * settings.eps) for plus, minus in pairs]
        else:
            base = loss(0, 0.0, examples)
            gradients = [
                (loss(seed, settings.eps, examples) - base) / settings.eps for seed in seeds
            ]
        for name, value in weights.items():
            moves = [
                -lr / len(seeds) * g * z(s, name) for g, s in zip(gradients, seeds, strict=True)
            ]
            weights[name] = value * (1 - lr * settings.weight_decay) + sum(moves)
    return seen, weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind", "drawn"),
    [
        ("opt", "two_sided", "gaussian"),
        ("opt", "one_sided", "rademacher"),
        ("llama", "two_sided", "rademacher"),
        ("llama", "one_sided", "gaussian"),
    ],
)
def test_twenty_steps_equal_the_plain_loop(
    family: str,
    kind: str,
    drawn: str,
    recipe: dict[str, Any],
    model_folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    values = yaml.safe_load(yaml.safe_dump(recipe))
    values["model"]["path"] = str(model_folders[family])
    values["estimator"] |= {"kind": kind, "noise": drawn}
    values["run"]["steps"] = STEPS
    config = Config.model_validate(values)
    expected_losses, expected_weights = plain_loop(config)

    fleet = LocalFleet(config, DEVICE)
    info = fleet.start()
    header = Header(1, 1, config.model.path, info.weights_hash, config.identity(), "", ())
    with Ledger.create(tmp_path / "ledger.jsonl", header) as ledger:
        Driver(config, fleet, ledger, [], num_train=40, num_test=50).train()
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
    for tensor in fleet._replicas[0].space.tensors:
        name = tensor.region.name
        expected = expected_weights[name].ravel()
        np.testing.assert_allclose(tensor.master.cpu().ravel(), expected, atol=1e-5, err_msg=name)
    fleet.close()
