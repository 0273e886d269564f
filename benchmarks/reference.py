"""MeZO as its authors run it (Malladi et al. 2023, Algorithm 1), written plainly on transformers.

What our steps and evaluations are measured against. As there: the model's own precision is the
only one, noise is drawn tensor by tensor from torch's generator and drawn again for each of a
step's four passes over the parameters, a perturbation is undone by arithmetic, and a batch of
options is padded on the left to its longest. Passes make the copies that the authors' expressions
make. One thing is faster here than there: batches lie on the device before a step begins.

Knows nothing of our engine.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from benchmarks.measure import Stopwatch

SEED_LIMIT = 1_000_000_000
PADDED_MULTIPLE = 8
LORA_RANK, LORA_ALPHA = 8, 16
LORA_MODULES = ("q_proj", "v_proj")


class Batch(Protocol):
    """Tokens on the device, and their loss."""

    def loss(self, model: nn.Module) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Block:
    """Text without padding: cross-entropy of every token but the first."""

    tokens: torch.Tensor  # int64 [sequences, length]

    def loss(self, model: nn.Module) -> torch.Tensor:
        logits = model(input_ids=self.tokens, use_cache=False).logits[:, :-1]
        return functional.cross_entropy(logits.flatten(0, 1).float(), self.tokens[:, 1:].flatten())


@dataclass(frozen=True, slots=True)
class Options:
    """Every option of every example as a sequence of its own, an example's one after the other.

    Cross-entropy over an example's options, whose logits are the mean log-probabilities of their
    tokens.
    """

    tokens: torch.Tensor  # int64 [examples * options, length]
    mask: torch.Tensor  # int64, 1 where there is a token and no padding
    scored: torch.Tensor  # bool [examples * options, length - 1], where the next token is scored
    labels: torch.Tensor  # int64 [examples]

    def loss(self, model: nn.Module) -> torch.Tensor:
        outputs = model(input_ids=self.tokens, attention_mask=self.mask, use_cache=False)
        logprobs = functional.log_softmax(outputs.logits[:, :-1], dim=-1, dtype=torch.float32)
        chosen = logprobs.gather(-1, self.tokens[:, 1:, None])[..., 0]
        means = (chosen * self.scored).sum(-1) / self.scored.sum(-1)
        return functional.cross_entropy(means.view(len(self.labels), -1), self.labels)


def options(
    sequences: Sequence[Sequence[int]],
    lengths: Sequence[int],
    labels: Sequence[int],
    *,
    padding: int,
    device: str,
) -> Options:
    """Sequences whose last `lengths` tokens are the options, padded on the left to the longest."""
    longest = -(-max(map(len, sequences)) // PADDED_MULTIPLE) * PADDED_MULTIPLE
    rows = [[padding] * (longest - len(tokens)) + list(tokens) for tokens in sequences]
    masks = [[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in sequences]
    scored = [[place >= longest - 1 - count for place in range(longest - 1)] for count in lengths]
    return Options(
        tokens=torch.tensor(rows, device=device),
        mask=torch.tensor(masks, device=device),
        scored=torch.tensor(scored, device=device),
        labels=torch.tensor(labels, device=device),
    )


@torch.inference_mode()
def candidate_score(
    model: nn.Module, tokens: Sequence[int], span: tuple[int, int], device: str
) -> float:
    """Mean log-probability of a candidate, tokens start..end of a row's text, by a forward of its
    own: their evaluation scores one row and one candidate at a time."""
    inputs = torch.tensor([list(tokens)], device=device)
    logits = model(input_ids=inputs).logits[0, :-1]
    logprobs = functional.log_softmax(logits, dim=-1, dtype=torch.float32)
    chosen = logprobs.gather(-1, inputs[0, 1:, None])[:, 0]
    return float(chosen[span[0] - 1 : span[1] - 1].mean())


def build(config: Any, *, dtype: torch.dtype, device: str, lora: bool = False) -> nn.Module:
    """A model of a shape with random weights, made on the device itself; with an adapter or not."""
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa"
        )
    model.requires_grad_(True)
    if lora:
        settings = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=[*LORA_MODULES])
        # Adapters in the model's precision, which PEFT would raise to float32.
        model = get_peft_model(model, settings, autocast_adapter_dtype=False)
    made: nn.Module = model.eval()
    return made


class Mezo:
    """The loop's step, on all parameters of a model that require gradients."""

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float,
        lr: float,
        weight_decay: float = 0.0,
        num_probes: int = 1,
    ) -> None:
        self.model = model
        self.parameters = [value for value in model.parameters() if value.requires_grad]
        self.forwards = Stopwatch()
        self._eps, self._lr, self._weight_decay = eps, lr, weight_decay
        self._num_probes = num_probes
        self._seeds = random.Random(0)

    @torch.no_grad()
    def step(self, batch: Batch) -> list[tuple[int, float]]:
        """Perturb, evaluate, update. The seeds, and the gradients along their noise."""
        seeds = [self._seeds.randrange(SEED_LIMIT) for _ in range(self._num_probes)]
        estimates = [(seed, self._gradient(seed, batch)) for seed in seeds]
        for seed, gradient in estimates:
            self.update(seed, gradient)
        return estimates

    @torch.no_grad()
    def perturb(self, seed: int, scale: float) -> None:
        """parameters = parameters + scale * eps * z(seed)"""
        torch.manual_seed(seed)
        for parameter in self.parameters:
            parameter.data = parameter.data + scale * _noise(parameter) * self._eps

    def _gradient(self, seed: int, batch: Batch) -> float:
        self.perturb(seed, 1)
        plus = self._loss(batch)
        self.perturb(seed, -2)
        minus = self._loss(batch)
        gradient = ((plus - minus) / (2 * self._eps)).item()
        self.perturb(seed, 1)
        return gradient

    @torch.inference_mode()
    def _loss(self, batch: Batch) -> torch.Tensor:
        with self.forwards.running():
            return batch.loss(self.model)

    @torch.no_grad()
    def update(self, seed: int, gradient: float) -> None:
        """parameters = parameters - lr / probes * (gradient * z(seed) + weight_decay * parameters)

        Norms and biases do not decay.
        """
        torch.manual_seed(seed)
        lr = self._lr / self._num_probes
        for parameter in self.parameters:
            direction = gradient * _noise(parameter)
            if parameter.ndim > 1:
                direction = direction + self._weight_decay * parameter.data
            parameter.data = parameter.data - lr * direction


def _noise(parameter: torch.Tensor) -> torch.Tensor:
    return torch.normal(
        0.0, 1.0, size=parameter.shape, dtype=parameter.dtype, device=parameter.device
    )
