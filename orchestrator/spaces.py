"""The recipe's space: what the engine must make room for, and the space built upon it.

Owns the choice between the spaces and everything about it that can be refused before a model is
loaded. Knows nothing of how a space works.
"""

import hashlib
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from orchestrator.adapters import AdapterPlan, bytes_per_slot
from orchestrator.checkpoint import Checkpoint
from orchestrator.config import Config, ConfigError
from orchestrator.dense import DenseSpace
from orchestrator.engine import Engine
from orchestrator.export import ADAPTER_WEIGHTS, AdapterSettings, read_adapter, read_prefix
from orchestrator.lora import LoraSpace
from orchestrator.low_rank import LowRankSpace
from orchestrator.parameters import canonical_tensors
from orchestrator.prefix import PrefixSpace
from orchestrator.prefix_slots import PrefixPlan
from orchestrator.space import Space

ALL_LINEAR = "all-linear"


class SpacePlan:
    """A space that is yet to be built."""

    def __init__(
        self, config: Config, checkpoint: Checkpoint, invocation: tuple[int, ...] = ()
    ) -> None:
        """`invocation` are the tokens from which an activated adapter acts.

        Raises ConfigError, before anything is loaded, for what cannot be.
        """
        self._invocation = invocation
        self._config = config
        self._checkpoint = checkpoint
        self._initial: dict[str, torch.Tensor] | None = None
        self._initial_prefix: torch.Tensor | None = None
        self.initial_hash = ""
        """Distinguishes runs that start from different adapters; empty for none."""
        self.adapters: AdapterPlan | None = None
        self.prefixes: PrefixPlan | None = None
        """What the engine is to make room for: slots of one kind or of the other."""
        if config.space.master == "host":
            self._check_host()
        if config.space.kind == "prefix":
            self.prefixes = self._plan_prefixes()
        elif config.space.kind != "dense":
            self.adapters = self._plan_adapters()
            self._check_memory(self.adapters)

    @property
    def rows_per_sequence(self) -> int:
        """How often a sequence stands in a batch."""
        return self._config.space.probes_per_group if self.adapters or self.prefixes else 1

    def _plan_adapters(self) -> AdapterPlan:
        space = self._config.space
        if space.kind == "low_rank":
            modules = tuple(sorted(self._checkpoint.linear_modules()))
            return AdapterPlan(space.slots, space.rank, 1 / math.sqrt(space.rank), modules)
        modules = self._targets()
        self._settings = AdapterSettings(space.rank, space.alpha, modules, self._invocation)
        if space.init is not None:
            self._read_initial(Path(space.init))
        # One slot more: the trained adapter itself.
        return AdapterPlan(space.slots + 1, space.rank, space.alpha / space.rank, modules)

    def _targets(self) -> tuple[str, ...]:
        known = self._checkpoint.linear_modules()
        targets = self._config.space.targets
        if targets == ALL_LINEAR:
            return tuple(sorted(known))
        for name in targets:
            if name not in known:
                raise ConfigError(
                    f"space.targets: {name}: the model has no such linear module in its layers; "
                    f"there are: {', '.join(sorted(known))}"
                )
        return tuple(sorted(set(targets)))

    def _read_initial(self, folder: Path) -> None:
        settings, self._initial = read_adapter(folder)
        for key, ours, theirs in (
            ("rank", self._settings.rank, settings.rank),
            ("alpha", self._settings.alpha, settings.alpha),
            ("targets", list(self._settings.modules), list(settings.modules)),
        ):
            if ours != theirs:
                raise ConfigError(
                    f"space.init: {folder}: has {key} {theirs}; space.{key} is {ours}: set it to "
                    "the adapter's"
                )
        if settings.invocation != self._invocation:
            raise ConfigError(
                f"space.init: {folder}: acts from the tokens {list(settings.invocation)} on (none: "
                f"on all), and this recipe's adapter from {list(self._invocation)}; change "
                "space.activation, or the text behind {*} in task.template"
            )
        self.initial_hash = _adapter_hash(folder)

    def _plan_prefixes(self) -> PrefixPlan:
        """Refuse more slots than the KV pool holds, and say how many fit."""
        space, kv_tokens = self._config.space, self._config.model.kv_tokens
        # Beside the slots and the trained prefix, a forward needs a token a row, at the least.
        fit = max(0, kv_tokens - space.tokens) // (space.tokens + 1)
        if space.slots > fit:
            raise ConfigError(
                f"space.slots: {space.slots} slots of {space.tokens} tokens do not fit into "
                f"model.kv_tokens, {kv_tokens}; {fit // 2 * 2} do"
            )
        if space.init is not None:
            folder = Path(space.init)
            self._initial_prefix = read_prefix(folder)
            if len(self._initial_prefix) != space.tokens:
                raise ConfigError(
                    f"space.init: {folder}: has {len(self._initial_prefix)} tokens; space.tokens "
                    f"is {space.tokens}: set it to the adapter's"
                )
            self.initial_hash = _adapter_hash(folder)
        return PrefixPlan(space.slots + 1, space.tokens)

    def _check_host(self) -> None:
        """Refuse a master in the host's memory where there is no GPU, or no memory for it."""
        if self._config.model.device == "cpu" or not torch.cuda.is_available():
            raise ConfigError(
                "space.master: host: there is no GPU to stream it through; use float32"
            )
        needed = torch.float32.itemsize * sum(
            math.prod(self._checkpoint.shape(name)) for name in self._checkpoint.names
        )
        free = _free_bytes("cpu")
        if needed > free:
            raise ConfigError(
                f"space.master: host: needs {needed / 2**30:.1f} GiB of the host's memory, of "
                f"which {free / 2**30:.1f} are free; use bfloat16, or another machine"
            )

    def _check_memory(self, plan: AdapterPlan) -> None:
        """Refuse more slots than there is memory for, and say how many fit."""
        model = self._config.model
        modules = self._checkpoint.linear_modules()
        shapes = [shape for name in plan.modules for shape in modules[name]]
        itemsize = getattr(torch, model.dtype).itemsize
        each = bytes_per_slot(shapes, plan.rank, itemsize)
        weights = itemsize * sum(
            math.prod(self._checkpoint.shape(name)) for name in self._checkpoint.names
        )
        weights //= self._config.fleet.tp_size  # of a rank
        fit = max(0, _free_bytes(model.device) - weights) // each
        if plan.num_slots > fit:
            raise ConfigError(
                f"space.slots: {self._config.space.slots} slots of {each / 2**20:.1f} MiB do not "
                f"fit beside the model; {max(0, fit - 1) // 2 * 2} do"
            )

    def build(self, engine: Engine) -> Space:
        """The space, over an engine that was made with `adapters` and `prefixes`.

        Raises ConfigError where SGLang gives adapters to fewer modules than are to have them.
        """
        self._check_slots(engine)
        config, rank = self._config, engine.world.rank
        space, estimator = config.space, config.estimator
        anchored = estimator.decay_towards == "start"
        if space.kind == "lora":
            assert engine.slots is not None
            return LoraSpace(
                engine.slots,
                self._settings,
                noise_kind=estimator.noise,
                seed=config.run.seed,
                initial=self._initial,
                train=space.train,
                anchored=anchored,
            )
        if space.kind == "prefix":
            assert engine.prefixes is not None
            return PrefixSpace(
                engine.prefixes,
                noise_kind=estimator.noise,
                seed=config.run.seed,
                initial=self._initial_prefix,
                anchored=anchored,
            )
        tensors = canonical_tensors(engine.model, self._checkpoint, rank)
        on_host = space.master == "host"
        master_dtype = torch.float32 if on_host else getattr(torch, space.master)
        choices: dict[str, Any] = {"master_dtype": master_dtype, "anchored": anchored}
        if space.kind == "dense":
            choices["host_of"] = engine.model if on_host else None
            return DenseSpace(tensors, noise=estimator.noise, **choices)
        assert engine.slots is not None
        return LowRankSpace(
            tensors,
            engine.slots,
            noise_kind=estimator.noise,
            rank=space.rank,
            run_seed=config.run.seed,
            refresh=space.refresh,
            train_others=space.others == "dense",
            **choices,
        )

    def _check_slots(self, engine: Engine) -> None:
        """Nothing may stay untrained in silence: experts, or what a checkpoint has fused itself."""
        if self.adapters is None or engine.slots is None:
            return
        served = Counter(factor.name.split(".")[-3] for factor in engine.slots.factors)
        wanted = self._checkpoint.linear_modules()
        for module in self.adapters.modules:
            num_served = served[module] // 2
            if num_served != len(wanted[module]):
                raise ConfigError(
                    f"space.kind: {self._config.space.kind}: adapters reach {num_served} of the "
                    f"model's {len(wanted[module])} {module}; name others in space.targets, or "
                    "choose space.kind=dense"
                )


def _adapter_hash(folder: Path) -> str:
    with (folder / ADAPTER_WEIGHTS).open("rb") as file:
        return "+" + hashlib.file_digest(file, "sha256").hexdigest()


def _free_bytes(device: str) -> int:
    """Memory that is free where the model will be."""
    if device != "cpu" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2**62
