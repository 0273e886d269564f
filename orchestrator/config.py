"""The configuration: what may be written in a recipe, checked completely before anything starts.

Owns the six sections, their defaults and what is wrong with a value. Imports neither torch nor
ray, so that a mistake is told at once. Knows nothing of the file that a recipe is read from
(`recipe_file`), nor of files that it points to: `tasks` and `assets` check those.
"""

import hashlib
import json
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from orchestrator.presets import PRESETS
from orchestrator.templates import MARK, Template

Positive = Annotated[int, Field(ge=1, strict=True)]
NonNegative = Annotated[int, Field(ge=0, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Schedule = Literal["constant", "linear", "cosine"]


class ConfigError(ValueError):
    """A mistake of the user's, told in one line that names the key or file and the value."""


class Section(BaseModel):
    """A frozen group of keys that refuses those it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Model(Section):
    """Which model, in which precision, on which device."""

    path: str
    """A folder in Hugging Face's layout, a hub id, a .gguf file, or package:NAME/FILE."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the live weights and of the forward."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    quantization: str | None = None
    """lora, prefix: how SGLang quantises the base weights, such as fp8; None: as they are."""
    kv_tokens: Positive = 16384
    """Size of a replica's KV pool, in tokens; larger batches are split."""
    share_contexts: bool = True
    """Whether what sequences of a batch begin with alike is computed once, in the same forward."""
    score_graphs: bool = True
    """GPU: capture scoring forwards in CUDA graphs, one a padded batch shape."""
    trust_remote_code: bool = False
    """Whether code that a model's folder brings along may run."""
    allow_fallback: bool = False
    """Whether SGLang may run transformers' code for a model that it does not serve natively."""


class Space(Section):
    """Which parameters are trained, how they are perturbed, and how precisely they are kept."""

    kind: Literal["dense", "lora", "low_rank", "prefix"] = "dense"
    """dense: all weights. lora: an adapter. low_rank: all matrices, by noise of low rank.
    prefix: keys and values of virtual tokens in front of every sequence."""
    master: Literal["float32", "bfloat16", "host"] = "float32"
    """Precision of the trained state; bfloat16 rounds stochastically. lora, prefix: float32.
    host: dense, GPU: float32, in the host's pinned memory, streamed through the GPU."""
    slots: Annotated[int, Field(ge=2, multiple_of=2, strict=True)] = 8
    """lora, low_rank, prefix: perturbations that one forward evaluates together."""
    rank: Positive = 8
    """lora: of the adapter; low_rank: of the noise."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """lora: names of the linear modules that the adapter acts on."""
    alpha: PositiveFloat = 16.0
    """lora: the adapter's output is scaled by alpha / rank."""
    train: Literal["A+B", "B"] = "A+B"
    """lora: both factors, or B alone, with A as it was drawn: LoRA-FA, Zhang et al. 2023."""
    activation: Literal["none", "suffix"] = "none"
    """lora: none: the adapter acts on all tokens. suffix: from the template's {*} on, so that what
    stands before it is the base model's, and computed once."""
    init: str | None = None
    """lora, prefix: a folder with a PEFT adapter to start from, instead of random first values."""
    tokens: Positive = 5
    """prefix: virtual tokens."""
    refresh: Positive = 1
    """low_rank: steps between changes of the noise's right factors (LOZO's nu)."""
    others: Literal["frozen", "dense"] = "frozen"
    """low_rank: what becomes of parameters that are not matrices of linear layers."""

    @property
    def probes_per_group(self) -> int:
        """Probes that a replica is given, or several times as many: those of a forward, or a pair.

        Where batches end depends on this alone, never on the fleet."""
        return 2 if self.kind == "dense" or self._one_by_one else self.slots

    @property
    def _one_by_one(self) -> bool:
        return self.kind == "low_rank" and self.others == "dense"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind in ("lora", "prefix") and self.master != "float32":
            raise ValueError(f"master: {self.master}: space.kind={self.kind} is kept in float32")
        if self.kind == "low_rank" and self.master == "host":
            raise ValueError("master: host: is of no use to space.kind=low_rank; use float32")
        for key, kinds in SPACE_KEYS.items():
            is_default = getattr(self, key) == type(self).model_fields[key].default
            if self.kind not in kinds and not is_default:
                raise ValueError(f"{key}: is of no use to space.kind={self.kind}; leave it out")
        return self


# Keys of a space that only some kinds read.
SPACE_KEYS = {
    "slots": ("lora", "low_rank", "prefix"),
    "rank": ("lora", "low_rank"),
    "targets": ("lora",),
    "alpha": ("lora",),
    "train": ("lora",),
    "activation": ("lora",),
    "init": ("lora", "prefix"),
    "tokens": ("prefix",),
    "refresh": ("low_rank",),
    "others": ("low_rank",),
}


class Estimator(Section):
    """How losses become an update."""

    kind: Literal["two_sided", "one_sided", "fzoo", "es"] = "two_sided"
    """two_sided: both signs of a seed. one_sided: one sign, and the base once. fzoo: the same, its
    step divided by the losses' deviation. es: one sign, compared with the other seeds'."""
    shaping: Literal["none", "z_score", "rank"] = "none"
    """es: losses less the mean of the others, in deviations from the mean, or as ranks."""
    baseline: Literal["batch", "prompt"] = "batch"
    """es, shaped: losses are compared over the batch, or prompt by prompt and then averaged."""
    noise: Literal["gaussian", "rademacher"] = "gaussian"
    num_seeds: Annotated[int, Field(ge=1, le=64, strict=True)] = 1
    """Perturbations a step."""
    batch_size: Positive = 16
    """Training examples a step; all probes of a step score the same ones."""
    seeds_schedule: Schedule = "constant"
    """How perturbations a step go from `num_seeds` to `num_seeds_final` over the run."""
    num_seeds_final: Annotated[int, Field(ge=1, le=64, strict=True)] | None = None
    eps: PositiveFloat = 1e-3
    """Size of a perturbation."""
    eps_schedule: Schedule = "constant"
    """How that goes from `eps` to `eps_final` over the run."""
    eps_final: PositiveFloat | None = None
    lr: PositiveFloat = 1e-6
    """Learning rate at its peak."""
    schedule: Schedule = "constant"
    warmup_steps: NonNegative = 0
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled: a step multiplies the weights by 1 - lr * weight_decay."""
    decay_towards: Literal["zero", "start"] = "zero"
    """start: it multiplies their distance from the run's first weights, which are kept for that."""
    clip: PositiveFloat | None = None
    """Bound on a seed's projected gradient |g|; None: as it is."""
    second_moment: Annotated[float, Field(gt=0, lt=1)] | None = None
    """two_sided, one_sided, es unshaped: steps are divided by the root of a decaying mean of g^2,
    which decays by this factor a step (MEAZO); None: as they are."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the last step's move that a step makes again, drawn again from earlier seeds."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, value in (
            ("num_seeds", self.num_seeds),
            ("num_seeds_final", self.num_seeds_final),
        ):
            if self.kind in ("fzoo", "es") and value == 1:
                raise ValueError(f"{key}: 1: estimator.kind={self.kind} compares at least 2")
        for key, kind in (("eps", "eps_schedule"), ("num_seeds", "seeds_schedule")):
            schedule, final = getattr(self, kind), getattr(self, f"{key}_final")
            if schedule == "constant" and final is not None:
                raise ValueError(
                    f"{key}_final: {final} is never reached with {kind}=constant; choose linear "
                    "or cosine"
                )
            if schedule != "constant" and final is None:
                raise ValueError(f"{key}_final: missing; {kind}={schedule} has to end somewhere")
        if self.shaping != "none" and self.kind != "es":
            raise ValueError(f"shaping: is of no use to estimator.kind={self.kind}; leave it out")
        if self.baseline == "prompt" and self.shaping == "none":
            raise ValueError(
                f"baseline: {self.baseline}: is of use to estimator.kind=es with shaping z_score "
                "or rank alone; other kinds subtract prompt by prompt as it is; leave it out"
            )
        if self.second_moment is not None and (self.kind == "fzoo" or self.shaping != "none"):
            raise ValueError(
                f"second_moment: {self.second_moment}: the step of estimator.kind={self.kind} "
                "with these settings does not depend on the losses' size already; leave it out"
            )
        if self.lr * self.weight_decay >= 1:
            raise ValueError(
                f"weight_decay: {self.weight_decay} times lr {self.lr} is not below 1, so a step "
                "would turn the weights' signs"
            )
        return self


class Source(Section):
    """Where rows come from."""

    path: str
    """A .jsonl, .csv or .parquet file, package:NAME/FILE for one inside an installed package, a
    folder that `datasets` saved or reads, or hub:OWNER/NAME."""
    name: str | None = None
    """Folders and the hub: which of its data sets."""
    split: str | None = None
    """Folders and the hub: which split of it; may be left out where there is but one."""
    revision: str | None = None
    """The hub: branch, tag or commit."""
    where: dict[str, str] = {}
    """Keep only rows whose fields have these values."""
    rename: dict[str, str] = {}
    """Field names of the file, to the names that the template uses."""


class Reward(Section):
    """The user's own function of a row and a generated text, and how it is called."""

    function: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]
    """MODULE:FUNCTION; called as function(row, text) in worker processes, it returns a number."""
    path: str = "."
    """Folder that the module is looked for in, before the working directory and what is
    installed."""
    samples: Positive = 4
    """Texts that each probe generates a prompt."""
    temperature: NonNegativeFloat = 1.0
    """At which those are drawn; looks at held-out rows take the most likely token."""
    failed: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """What a sample counts whose call fails."""
    timeout: PositiveFloat = 10.0
    """Seconds, by the clock, that a call may take."""
    workers: Positive = 2
    """Processes of a replica that call the function."""
    environment: list[str] = []
    """Names of environment variables that the function is to see beside the usual few."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"samples: {self.samples} at temperature 0 would all be the same; set it to 1"
            )
        return self


class Task(Section):
    """Labelled rows, a template that turns one into prompts, and what an answer is worth."""

    preset: str | None = None
    """Fills in what is not given: template, options, label, loss, metric and rows."""
    template: str
    """Text with {field} for a row's fields and {option} for the candidate."""
    options: list[str] = []
    """The candidates, or fields of the row that hold them; none: answers are generated."""
    label: str = "label"
    """The field that holds the right option: its number from 0, its text, or a list of texts.
    Generated answers: the field with the right answers."""
    label_names: list[str] = []
    """What the label's field calls the options, in their order."""
    unconditional: str = "{option}"
    """What calibration scores: the template without its row."""
    loss: Literal["option_ce", "lm"] = "option_ce"
    """option_ce: cross-entropy over the options. lm: over the right option's tokens."""
    objective: Literal["loss", "accuracy", "f1", "exact_match", "reward"] = "loss"
    """What is made small: the loss, or minus a metric's mean over the batch."""
    metric: Literal["accuracy", "f1", "exact_match", "reward"] = "accuracy"
    """accuracy: of the best-scored option. The others: of a generated answer; f1 and exact_match
    as SQuAD has them."""
    reward: Reward | None = None
    """What objective or metric `reward` is of."""
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] = ["\n"]
    """Generated answers end before the first of these texts."""
    max_new_tokens: Positive = 50
    """Generated answers: their longest, in tokens."""
    demonstrations: NonNegative = 0
    """Training rows that stand, answered, before every prompt; they are not trained on."""
    train: Source
    test: Source | None = None
    holdout: Positive | None = None
    """Without `test`: how many rows of `train` are held out, by a fixed permutation."""
    num_train: Positive | None = None
    """Rows of `train` that are trained on, drawn by a fixed permutation; None: all."""
    num_dev: Positive | None = None
    """Rows of `train` that choose the best checkpoint, drawn by the same permutation."""
    num_test: Positive | None = None
    """Rows of `test` that are used, drawn by a fixed permutation; None: all."""
    group_by: str | None = None
    """A field, such as a passage's: training rows with the same value there are drawn together, so
    that they share a batch."""
    max_length: Positive = 512
    """Prompts are cut to this many tokens, from the left."""

    @property
    def is_generated(self) -> bool:
        """Whether the model writes the answer, rather than choose among options."""
        return self.metric != "accuracy"

    @property
    def needs_answers(self) -> bool:
        """Whether rows of generated answers must hold right ones: a reward alone asks for none."""
        return {self.objective, self.metric} != {"reward"} or self.demonstrations > 0

    @property
    def has_mark(self) -> bool:
        """Whether the template says from where an activated adapter acts."""
        return Template.parse(self.template).mark is not None

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        options = values.get("options")
        if isinstance(options, list) and any(isinstance(option, bool) for option in options):
            raise ValueError(f"options: {options!r}: YAML reads Yes and No as such; quote them")
        if values.get("preset") is None:
            return values
        name = values["preset"]
        if not isinstance(name, str) or name not in PRESETS:
            known = ", ".join(sorted(PRESETS))
            raise ValueError(f"preset: {name!r} is not a preset; there are: {known}")
        preset = dict(PRESETS[name])
        if "train" in values or values.get("holdout") is not None:
            del preset["test"]  # the user's rows are not to be tested on others
        return {**preset, **values}

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, text in (("template", self.template), ("unconditional", self.unconditional)):
            if not _parsed(key, text).takes_option:
                raise ValueError(f"{key}: {text!r} has no place for {{option}}")
        unmarked = [("unconditional", self.unconditional)]
        for key, text in [*unmarked, *[("options", option) for option in self.options]]:
            if MARK in text:
                raise ValueError(f"{key}: {text!r}: {MARK} belongs into task.template alone")
        self._check_options()
        if len(self.label_names) not in (0, len(self.options)):
            raise ValueError(
                f"label_names: {self.label_names!r} are not as many as options: {self.options!r}"
            )
        if self.test is None and self.holdout is None:
            raise ValueError("holdout: missing; without task.test, rows of task.train are held out")
        if self.test is not None and self.holdout is not None:
            raise ValueError(f"holdout: {self.holdout} is given beside task.test; leave one out")
        return self

    def _check_options(self) -> None:
        if self.objective != "loss" and (self.objective == "accuracy") == self.is_generated:
            raise ValueError(
                f"objective: {self.objective} cannot be measured of answers whose metric is "
                f"{self.metric}: accuracy is of options, f1, exact_match and reward of generated "
                "answers"
            )
        is_rewarded = "reward" in (self.objective, self.metric)
        if is_rewarded != (self.reward is not None):
            raise ValueError(
                "reward: missing; objective and metric reward want task.reward.function"
                if is_rewarded
                else "reward: is of no use where neither objective nor metric is reward"
            )
        if self.is_generated:
            if self.options or (self.needs_answers and self.loss != "lm"):
                raise ValueError(
                    f"metric: {self.metric} is of generated answers, which have no options and "
                    "are trained on by loss: lm"
                )
            if self.max_new_tokens >= self.max_length:
                raise ValueError(
                    f"max_new_tokens: {self.max_new_tokens} leaves nothing of max_length: "
                    f"{self.max_length} for a prompt"
                )
            return
        templates = [_parsed("options", option) for option in self.options]
        if len(templates) < 2 and not any(template.only_field for template in templates):
            raise ValueError(
                f"options: {self.options!r} is not accepted: there must be two, or a field that "
                "holds them, such as {choices}"
            )
        if any(template.takes_option for template in templates):
            raise ValueError(f"options: {self.options!r}: an option cannot hold {{option}}")
        if len(set(self.options)) != len(self.options):
            raise ValueError(f"options: {self.options!r} repeats an option")


def _parsed(key: str, text: str) -> Template:
    try:
        return Template.parse(text)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


class FleetSection(Section):
    """Where the replicas run."""

    kind: Literal["ray", "local"] = "ray"
    """ray: one actor a replica. local: in this process, for tests and small runs."""
    num_replicas: int | Literal["auto"] = 1
    """Wanted at the start; auto: as many as the cluster has room for; of kind local, one."""
    min_replicas: Positive = 1
    """ray: below so many that are ready, the run does not begin, and pauses."""
    max_replicas: Positive | None = None
    """ray: with it, or with num_replicas auto, the fleet grows into nodes that join the cluster,
    up to so many, and shrinks with nodes that leave."""
    gpus_per_replica: Annotated[float, Field(gt=0, le=1)] = 1
    """ray: share of a GPU that a replica takes; replicas that share one share its memory, too."""
    threads_per_replica: Positive = 1
    """CPU threads of a replica, or of each of its ranks; part of the run's identity, since it
    orders float sums."""
    tp_size: Positive = 1
    """ray: ranks of a replica, processes of one node that hold one model together; with GPUs, one
    each. Part of the run's identity if above 1."""
    affinity: Literal["none", "context"] = "none"
    """context: batches are cut by context, and a replica is given those whose contexts it holds.
    Part of the run's identity, with `pieces`: the cut decides batch shapes."""
    pieces: Annotated[int, Field(ge=2, strict=True)] = 8
    """affinity: that contexts are dealt to; a multiple of `num_replicas`, at best."""

    @model_validator(mode="before")
    @classmethod
    def _check_number(cls, values: Any) -> Any:
        number = values.get("num_replicas", 1) if isinstance(values, dict) else 1
        if number != "auto" and (type(number) is not int or number < 1):
            raise ValueError(
                f"num_replicas: {number!r} is not accepted: it is a number from 1, or auto"
            )
        return values

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.kind == "local" and (self.min_replicas > 1 or self.max_replicas is not None):
            key = "max_replicas" if self.max_replicas is not None else "min_replicas"
            raise ValueError(
                f"{key}: {getattr(self, key)}: a fleet of kind local neither grows nor waits; "
                "leave it out, or use kind ray"
            )
        if self.tp_size > 1 and self.kind == "local":
            raise ValueError(
                f"tp_size: {self.tp_size}: ranks are processes, and a fleet of kind local is one; "
                "leave it out, or use kind ray"
            )
        if self.tp_size > 1 and self.gpus_per_replica != 1:
            raise ValueError(
                f"gpus_per_replica: {self.gpus_per_replica:g}: with tp_size {self.tp_size} each "
                "rank takes a whole GPU; leave it out"
            )
        number = None if self.num_replicas == "auto" else self.num_replicas
        for most, key in ((number, "num_replicas"), (self.max_replicas, "max_replicas")):
            if most is not None and self.min_replicas > most:
                raise ValueError(
                    f"min_replicas: {self.min_replicas} is above {key}, {most}; lower it, or raise "
                    f"{key}"
                )
        if number is not None and self.max_replicas is not None and self.max_replicas < number:
            raise ValueError(
                f"max_replicas: {self.max_replicas} is below num_replicas, {number}; raise it, or "
                "lower num_replicas"
            )
        return self

    @model_validator(mode="after")
    def _check_pieces(self) -> Self:
        if self.affinity == "none" and self.pieces != type(self).model_fields["pieces"].default:
            raise ValueError(
                f"pieces: {self.pieces}: is of no use to fleet.affinity=none; leave it out"
            )
        return self

    @property
    def is_elastic(self) -> bool:
        """Whether the number of replicas follows the cluster's nodes."""
        return self.num_replicas == "auto" or self.max_replicas is not None


class Run(Section):
    """How long, from which seed, and where the records go."""

    steps: Positive
    seed: Annotated[int, Field(ge=0, lt=2**64, strict=True)] = 0
    dir: str | None = None
    """Run folder; by default runs/NAME-TIME."""
    eval_every: NonNegative = 0
    """Steps between looks at dev rows, or else at held-out ones; 0: only before and after."""
    eval_examples: Positive | None = None
    """Rows of such a look; of held-out ones, before and after, all are used."""
    check_every: NonNegative = 50
    """Steps between comparisons of the replicas' digests; 0: only at the end."""
    snapshot_every: NonNegative = 0
    """Steps between snapshots of the trained state, from which replicas start instead of replaying
    all steps; 0: none are written, and none are used."""
    verify_cache: NonNegative = 0
    """Every so many probes of a replica are computed again without any reuse, and the run ends if
    the two differ; 0: none."""


class Config(Section):
    """A whole recipe."""

    model: Model
    space: Space = Space()
    estimator: Estimator = Estimator()
    task: Task
    fleet: FleetSection = FleetSection()
    run: Run

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.model.quantization is not None and self.space.kind not in ("lora", "prefix"):
            raise ValueError(
                f"model.quantization: {self.model.quantization}: space.kind={self.space.kind} "
                "trains the base weights, which must not be quantised"
            )
        if self.space.activation == "suffix" and not self.task.has_mark:
            raise ValueError(
                f"task.template: {self.task.template!r} has no {MARK}, from which "
                "space.activation=suffix has the adapter act"
            )
        if self.fleet.affinity == "context" and self.space.activation != "suffix":
            raise ValueError(
                "fleet.affinity: context: wants space.activation=suffix: only contexts that the "
                "base model computes are kept from one step to the next"
            )
        if self.model.device == "cpu" and self.space.master == "host":
            raise ValueError("space.master: host: a CPU's memory is the host's; use float32")
        if self.estimator.decay_towards == "start" and self.space.master != "float32":
            raise ValueError(
                f"estimator.decay_towards: start: wants space.master=float32, not "
                f"{self.space.master}: bfloat16 would be rounded twice a step, and the first "
                "weights are kept beside a master on its own device"
            )
        generates = self.task.objective not in ("loss", "accuracy")
        if self.estimator.baseline == "prompt" and not generates:
            raise ValueError(
                "estimator.baseline: prompt: is of use where probes generate; task.objective is "
                f"{self.task.objective}"
            )
        if self.estimator.momentum and self.space.refresh > 1:
            raise ValueError(
                f"estimator.momentum: {self.estimator.momentum}: space.refresh="
                f"{self.space.refresh} gives an earlier seed other noise later; use refresh 1"
            )
        return self

    @property
    def score_graphs(self) -> bool:
        """GPU: whether scoring forwards are captured. Layers of a graph could not wait for their
        weights one by one."""
        return self.model.score_graphs and self.space.master != "host"

    def identity(self) -> str:
        """Hash (SHA-256, hex) of all that decides a run's ledger, but for weights and rows.

        Those have hashes of their own in the ledger, so that files may move. Left out too is what
        may change when a run is resumed: where it runs and what it shows.
        """
        if self.space.master == "host":  # the bits are those of float32 without graphs
            return self._in_device_memory().identity()
        data = self.model_dump(
            mode="json",
            exclude_defaults=True,  # so that a key that is added later changes no identity
            exclude={
                "model": {"path", "device"},
                "space": {"init"},
                # the options of a row are in the rows' hash; calibration trains nothing
                "task": {
                    **dict.fromkeys(("train", "test", "label_names", "unconditional"), True),
                    "reward": {"path", "timeout", "workers", "environment"},
                },
                "fleet": True,
            },
        )
        data["threads"] = self.fleet.threads_per_replica
        if self.fleet.tp_size > 1:
            data["tp_size"] = self.fleet.tp_size
        if self.fleet.affinity != "none":
            data["pieces"] = self.fleet.pieces
        data["run"] = {"steps": self.run.steps, "seed": self.run.seed}
        canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def meaning(self) -> tuple[object, ...]:
        """What a ledger's seeds and coefficients lead to depends on these keys, and no others."""
        space = self.space.model_dump(mode="json", exclude={"slots", "init"})
        if space["master"] == "host":  # the bits are those of float32
            space["master"] = "float32"
        drawn_from = None if self.space.kind == "dense" else self.run.seed
        return space, self.estimator.noise, self.estimator.decay_towards, drawn_from

    def _in_device_memory(self) -> Self:
        """The same run with its master on the GPU."""
        space = self.space.model_copy(update={"master": "float32"})
        model = self.model.model_copy(update={"score_graphs": False})
        return self.model_copy(update={"space": space, "model": model})

    def dump(self) -> str:
        """The resolved configuration as YAML that `recipe_file.load` reads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
