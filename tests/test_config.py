"""Recipes: what is accepted, what is refused and in which words."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.config import Config, ConfigError, Task
from orchestrator.recipe_file import known_keys, load

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
DEMO = ROOT / "configs" / "demo.yaml"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path: Path) -> None:
    task = load(path).task
    assert task.options or task.is_generated


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_resolved_recipe_reads_back_equal(path: Path, tmp_path: Path) -> None:
    config = load(path, ["run.dir=somewhere"])
    resolved = tmp_path / "config.yaml"
    resolved.write_text(config.dump())
    assert load(resolved) == config


def test_the_readme_of_the_recipes_names_every_key() -> None:
    text = (ROOT / "configs" / "README.md").read_text()
    missing = [key for key in known_keys() if "." in key and f"`{key}`" not in text]
    assert not missing


def test_overrides_win_and_take_yaml_values() -> None:
    config = load(DEMO, ["run.steps=7", "estimator.lr=1e-3", "task.options=[bad, good]"])
    assert (config.run.steps, config.estimator.lr) == (7, 1e-3)
    assert config.task.options == ["bad", "good"]


def test_a_preset_gives_way_to_what_is_written() -> None:
    config = load(DEMO, ["task.template={sentence} In short: {option}"])
    assert config.task.template.startswith("{sentence} In short")
    assert config.task.options == ["terrible", "great"]


REFUSALS = {
    "estimator.lrr=1": "estimator.lrr: unknown key; did you mean estimator.lr?",
    "estimatr.lr=1": "estimatr: unknown key; did you mean estimator?",
    "task.train.file=x": "task.train.file: unknown key; did you mean task.train",
    "estimator.num_seeds=0": "estimator.num_seeds: 0 is not accepted: input should be greater",
    "estimator={kind: fzoo}": "estimator.num_seeds: 1: estimator.kind=fzoo compares at least 2",
    "estimator={kind: es, num_seeds: 4, seeds_schedule: linear, num_seeds_final: 1}": (
        "num_seeds_final: 1: estimator.kind=es compares"
    ),
    "model.quantization=fp8": "demo.yaml: model.quantization: fp8: space.kind=dense trains",
    "estimator.eps_final=1e-4": "estimator.eps_final: 0.0001 is never reached with eps_schedule=",
    "estimator.seeds_schedule=cosine": "estimator.num_seeds_final: missing; seeds_schedule=cosine",
    "estimator={kind: es}": "estimator.num_seeds: 1: estimator.kind=es compares at least 2",
    "estimator.shaping=rank": "estimator.shaping: is of no use to estimator.kind=one_sided",
    "estimator={kind: fzoo, num_seeds: 4, second_moment: 0.9}": "estimator.second_moment: 0.9: the",
    "estimator={kind: es, num_seeds: 4, shaping: rank, second_moment: 0.9}": "second_moment: 0.9:",
    "estimator.second_moment=1": "estimator.second_moment: 1 is not accepted",
    "estimator.momentum=1": "estimator.momentum: 1 is not accepted",
    "estimator.clip=0": "estimator.clip: 0 is not accepted",
    "estimator.eps=.nan": "estimator.eps: nan is not accepted",
    "estimator.lr=.inf": "estimator.lr: inf is not accepted",
    "model.dtype=int8": "model.dtype: 'int8' is not accepted: input should be 'float32'",
    "run.steps=many": "run.steps: 'many' is not accepted",
    "run.seed=-1": "run.seed: -1 is not accepted",
    "task.preset=sst3": "task.preset: 'sst3' is not a preset; there are: boolq, cb, copa, drop,",
    "task.template={sentence} It was": "task.template: '{sentence} It was' has no place for",
    "task.template={option}, {option}": "task.template: '{option}, {option}' has a place for the",
    "task.template={a|upper} {option}": "task.template: {a|upper}: no text function is called",
    "task.unconditional=It was": "task.unconditional: 'It was' has no place for {option}",
    "task.options=[great]": "task.options: ['great'] is not accepted",
    "task.options=[]": "task.options: [] is not accepted: there must be two, or a field that holds",
    "task.options=[Yes, No]": "task.options: [True, False]: YAML reads Yes and No as such; quote",
    "task.options=['{option}', a]": "an option cannot hold {option}",
    "task.label_names=[bad]": "task.label_names: ['bad'] are not as many as options: ['terrible',",
    "task.metric=f1": "task.metric: f1 is of generated answers, which have no options",
    "task={preset: squad, max_new_tokens: 512}": "task.max_new_tokens: 512 leaves nothing of max_",
    "task.objective=f1": "task.objective: f1 cannot be measured of answers whose metric is accu",
    "task={preset: squad, objective: accuracy}": "task.objective: accuracy cannot be measured",
    "task={preset: squad, objective: reward}": "task.reward: missing; objective and metric reward",
    "task={preset: squad, reward: {function: 'a:b'}}": "task.reward: is of no use where neither",
    "task={preset: squad, objective: reward, reward: {function: a.b}}": (
        "task.reward.function: 'a.b' is not accepted"
    ),
    "task={preset: squad, metric: reward, reward: {function: 'a:b', temperature: 0}}": (
        "task.reward.samples: 4 at temperature 0 would all be the same"
    ),
    "task={preset: squad, metric: reward, loss: option_ce, reward: {function: 'a:b'}}": (
        "task.metric: reward is of generated answers"
    ),
    "task.objective=reward": "task.objective: reward cannot be measured of answers whose metric",
    "estimator={kind: es, num_seeds: 4, baseline: prompt}": "estimator.baseline: prompt: is of use",
    "estimator={kind: es, num_seeds: 4, shaping: rank, baseline: prompt}": (
        "estimator.baseline: prompt: is of use where probes generate; task.objective is loss"
    ),
    "task.stop=['']": "task.stop.0: '' is not accepted",
    "task={preset: squad, loss: option_ce}": "task.metric: f1 is of generated answers",
    "task={preset: squad, stop: []}": "task.stop: [] is not accepted",
    "task.num_dev=0": "task.num_dev: 0 is not accepted",
    "task.options=[great, great]": "task.options: ['great', 'great'] repeats an option",
    "task.holdout=null": "task.holdout: missing",
    "task.test={path: x}": "task.holdout: 1000 is given beside task.test",
    "task=5": "task: 5 is not accepted",
    "space={kind: prefix, tokens: 0}": "space.tokens: 0 is not accepted: input should be greater",
    "space={kind: prefix, rank: 4}": "space.rank: is of no use to space.kind=prefix",
    "space={kind: lora, tokens: 4}": "space.tokens: is of no use to space.kind=lora",
    "space={kind: prefix, master: bfloat16}": "space.master: bfloat16: space.kind=prefix is kept",
    "space={kind: low_rank, master: host}": "space.master: host: is of no use to space.kind=low_",
    "space={kind: lora, master: host}": "space.master: host: space.kind=lora is kept in float32",
    "space.master=host": "space.master: host: a CPU's memory is the host's; use float32",
    "fleet={affinity: context}": "fleet.affinity: context: wants space.activation=suffix",
    "fleet={affinity: context, pieces: 1}": "fleet.pieces: 1 is not accepted",
    "fleet.pieces=4": "fleet.pieces: 4: is of no use to fleet.affinity=none; leave it out",
    "run.steps": "'run.steps': overrides are written section.key=value",
    "run.steps.x=1": "'run.steps.x=1': steps is a value, not a section",
    "run.steps=[": "run.steps: '[' is not accepted",
}


@pytest.mark.parametrize("override", REFUSALS)
def test_a_mistake_is_told_in_one_line_that_names_it(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(DEMO, [override])
    assert REFUSALS[override] in str(caught.value)
    assert not re.search(r": \.", str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_preset_brings_its_rows_unless_others_are_given() -> None:
    for name in ("rte", "squad"):
        task = Task.model_validate({"preset": name})
        assert task.test is not None
        assert (task.train.split, task.test.split) == ("train", "validation")
        assert task.train.path == task.test.path
    assert Task.model_validate({"preset": "rte", "holdout": 9}).test is None
    with pytest.raises(ValueError, match="holdout: missing"):
        Task.model_validate({"preset": "rte", "train": {"path": "mine.jsonl"}})


EARLIER_RECIPE = """
model: {path: toy, dtype: float32}
estimator: {num_seeds: 3, lr: 1.0e-3}
task:
  preset: sst2
  template: "{sentence} It was {option}"
  options: [terrible, great]
  label: label
  train: {path: rows.csv, where: {}, rename: {text: sentence}}
  test: null
  holdout: 100
  max_length: 128
run: {steps: 36}
"""


def test_a_run_recorded_before_a_key_was_added_keeps_its_identity(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(EARLIER_RECIPE)
    recorded = "887cec391d057bb91314210395ca697b2223b32eedb54b70376c746f696b70c9"
    assert load(path).identity() == recorded


def test_momentum_wants_noise_that_a_seed_alone_decides() -> None:
    overrides = ["estimator.momentum=0.9", "space={kind: low_rank, refresh: 5}"]
    with pytest.raises(ConfigError, match=r"estimator\.momentum: 0\.9: space\.refresh=5 gives"):
        load(DEMO, overrides)


@pytest.mark.parametrize("master", ["bfloat16", "host"])
def test_decay_towards_the_start_wants_a_float32_master(master: str) -> None:
    overrides = ["estimator.decay_towards=start", f"space.master={master}", "model.device=auto"]
    with pytest.raises(ConfigError, match=r"estimator\.decay_towards: start: wants space\.master="):
        load(DEMO, overrides)


def test_missing_sections_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read: No such file"):
        load(tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: {steps: 3\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml: not valid YAML: .*line 2"):
        load(broken)
    broken.write_text("- 3\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml: must hold sections"):
        load(broken)
    for text, told in (
        ("run: {steps: 3}\nrun: {steps: 4}\n", "run stands twice.*line 2"),
        ("run: {steps: 3, dir: 2026-02-30}\n", "day is out of range"),
        ("run: {[1, 2]: 3}\n", "unhashable key"),
        ("run: !!map [a]\n", "expected a mapping node"),
        ("run: !!bool x\n", "x"),
        ("run: !!timestamp x\n", ""),
    ):
        broken.write_text(text)
        with pytest.raises(ConfigError, match=rf"broken\.yaml: not valid YAML: .*{told}"):
            load(broken)
    broken.write_text("run: {steps: 3}\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml: model: missing"):
        load(broken)


AFFINITIES = (
    "affinity: none",
    "affinity: context",
    "affinity: context, pieces: 4",
    "affinity: context, pieces: 4, num_replicas: 3",
)


def test_identity_holds_what_decides_the_ledger_and_nothing_else() -> None:
    def identity(*overrides: str) -> str:
        return load(DEMO, overrides).identity()

    for free in ("fleet.num_replicas=5", "fleet.kind=local", "run.dir=x", "run.eval_every=3"):
        assert identity(free) == identity()
    for moved in ("model.path=elsewhere", "model.device=auto", "task.train.path=elsewhere.csv"):
        assert identity(moved) == identity()
    for shown in ("task.unconditional=So {option}", "task.label_names=[bad, good]"):
        assert identity(shown) == identity()
    on_gpu = "model.device=cuda"
    assert identity(on_gpu, "space.master=host") == identity("model.score_graphs=false")
    asked = "task={preset: squad, objective: reward, metric: reward, reward: {function: 'a:b'}}"
    for free in ("path=x", "timeout=1", "workers=9", "environment=[KEY]"):
        assert identity(asked, f"task.reward.{free}") == identity(asked)
    for deciding in ("function=a:c", "samples=2", "temperature=0.5", "failed=-1"):
        assert identity(asked, f"task.reward.{deciding}") != identity(asked)
    for deciding in (
        "run.seed=1",
        "estimator.eps=0.5",
        "fleet.threads_per_replica=2",
        "fleet.tp_size=2",
    ):
        assert identity(deciding) != identity()
    cut = ("space={kind: lora, activation: suffix}", "task.template={sentence} {*}It was {option}")
    assert len({identity(*cut, f"fleet={{{fleet}}}") for fleet in AFFINITIES}) == 3
    for deciding in ("task.loss=lm", "task.demonstrations=2", "task.num_dev=2"):
        assert identity(deciding) != identity()


def test_a_config_cannot_be_changed() -> None:
    config: Any = load(DEMO)
    with pytest.raises(ValueError, match="frozen"):
        config.run.steps = 3


def test_loading_a_config_imports_nothing_heavy() -> None:
    program = (
        "import sys; from orchestrator.recipe_file import load; load('configs/demo.yaml');"
        "print(sorted({'torch', 'ray', 'sglang', 'numba', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_no_recipe_names_an_address_or_a_place_of_one_machine() -> None:
    for path in RECIPES:
        assert not re.search(r"https?:|/home/|/root/|/tmp/", path.read_text())
        assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_config_is_the_only_model_of_a_recipe() -> None:
    assert set(Config.model_fields) == {"model", "space", "estimator", "task", "fleet", "run"}


def test_the_fleets_size_is_a_number_or_auto() -> None:
    assert load(DEMO, ["fleet.num_replicas=auto"]).fleet.num_replicas == "auto"
    assert load(DEMO, ["fleet.gpus_per_replica=0.5"]).fleet.gpus_per_replica == 0.5
    for value in ("0", "all", "1.5", "true"):
        with pytest.raises(ConfigError, match=r"fleet\.num_replicas: .* a number from 1, or auto"):
            load(DEMO, [f"fleet.num_replicas={value}"])
    for value in ("0", "1.5"):
        with pytest.raises(ConfigError, match=r"fleet\.gpus_per_replica: .* is not accepted"):
            load(DEMO, [f"fleet.gpus_per_replica={value}"])


def test_the_fleets_bounds_agree() -> None:
    ray = "fleet.kind=ray"
    assert load(DEMO, [ray, "fleet.num_replicas=2", "fleet.max_replicas=4"]).fleet.is_elastic
    assert not load(DEMO, [ray, "fleet.num_replicas=2", "fleet.min_replicas=2"]).fleet.is_elastic
    for overrides, message in (
        (["num_replicas=2", "min_replicas=3"], "min_replicas: 3 is above num_replicas, 2"),
        (["num_replicas=auto", "min_replicas=3", "max_replicas=2"], "min_replicas: 3 is above max"),
        (["num_replicas=2", "max_replicas=1"], "max_replicas: 1 is below num_replicas, 2"),
        (["kind=local", "min_replicas=2", "num_replicas=2"], "min_replicas: 2: a fleet of kind"),
        (["kind=local", "max_replicas=2"], "max_replicas: 2: a fleet of kind local"),
        (["kind=local", "tp_size=2"], "tp_size: 2: ranks are processes"),
        (["tp_size=2", "gpus_per_replica=0.5"], "gpus_per_replica: 0.5: with tp_size 2"),
    ):
        with pytest.raises(ConfigError, match=f"fleet.{message}"):
            load(DEMO, [ray, *(f"fleet.{override}" for override in overrides)])


@pytest.mark.parametrize(
    "text", ["{sentence}: {option}", "{{sentence}} {option}", "a {b c} {option}"]
)
def test_a_template_may_stand_in_an_override_as_it_is(text: str) -> None:
    assert load(DEMO, [f"task.template={text}"]).task.template == text
    with pytest.raises(ConfigError, match="^'estimator={eps: 1, eps: 2}': eps stands twice$"):
        load(DEMO, ["estimator={eps: 1, eps: 2}"])
