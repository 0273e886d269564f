"""Activated adapters: PEFT's scores, and a cache that is never wrong."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import conftest
import pytest
import small_tokenizers
import torch
import yaml
from conftest import DEVICE, VOCABULARY, WORDS
from peft import LoraConfig, PeftModel, get_peft_model
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from slots import MODULES, adapted_engine
from test_training import ACTIVATED, MARKED, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator import tasks
from orchestrator.batches import Batches
from orchestrator.checkpoint import Checkpoint
from orchestrator.config import Config, ConfigError, Task
from orchestrator.driver import Driver
from orchestrator.encoder import Encoder
from orchestrator.engine import Engine
from orchestrator.local import LocalFleet
from orchestrator.metrics import Evaluation, StepMetrics
from orchestrator.pools import Pools
from orchestrator.records import StepUpdate
from orchestrator.replica import Replica
from orchestrator.sampling import Sampling
from orchestrator.seed_sync import Header, Ledger
from orchestrator.spaces import SpacePlan

CUE = [4, 3]
"""Tokens from which the adapters act; they are never drawn."""
SLOTS: list[str | None] = [None, "slot 0", "slot 1"]
POOL = 160


@pytest.fixture(scope="module", params=["llama", "opt"])
def activated(
    request: pytest.FixtureRequest,
    model_folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Engine, list[Any]]]:
    """An engine with two adapters in its slots; PEFT's models of the base and of both."""
    folder = model_folders[request.param]
    root = tmp_path_factory.mktemp(request.param)
    engine, plain = adapted_engine(folder, root, kv_tokens=POOL)
    yield engine, [plain[0], *(activated_model(folder, model) for model in plain[1:])]
    engine.close()


def activated_model(folder: Path, adapted: Any) -> Any:
    """The adapter of a PEFT model, as one that acts from the cue on."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=MODULES,
        alora_invocation_tokens=CUE,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, settings)
    model.load_state_dict(adapted.state_dict())
    return model.eval()


Row = tuple[list[int], tuple[int, int], int]


def words(draw: random.Random, low: int, high: int) -> list[int]:
    return [draw.randrange(5, len(VOCABULARY)) for _ in range(draw.randint(low, high))]


def some_rows(draw: random.Random, contexts: Sequence[list[int]], count: int) -> list[Row]:
    """Contexts, each with the cue, words and an option behind it."""
    rows: list[Row] = []
    for _ in range(count):
        context = draw.choice(contexts)
        stem = [*context, *CUE, *words(draw, 0, 4)]
        for _ in range(2):
            option = words(draw, 1, 3)
            rows.append(([*stem, *option], (len(stem), len(stem) + len(option)), len(context)))
    return rows


def scored(engine: Engine, rows: Sequence[Row], base: str | None) -> list[float]:
    sequences, spans, contexts = zip(*rows, strict=True)
    found = engine.score(sequences, spans, adapters=SLOTS, contexts=contexts, base=base)
    return [span.sum for span in found.spans]


@torch.no_grad()
def reference(models: Sequence[Any], rows: Sequence[Row]) -> list[float]:
    found = []
    for model in models:
        for tokens, (start, end), _ in rows:
            logprobs = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
            found.append(sum(float(logprobs[p - 1, tokens[p]]) for p in range(start, end)))
    return found


def test_scores_equal_pefts_activated_lora(activated: tuple[Engine, list[Any]]) -> None:
    engine, models = activated
    draw = random.Random(0)
    contexts = [words(draw, 1, 20) for _ in range(3)]
    contexts.append([*contexts[0], *CUE, *contexts[1]])  # the cue's last occurrence counts
    rows = some_rows(draw, contexts, 8)
    expected = reference(models, rows)
    assert scored(engine, rows, None) == pytest.approx(expected, abs=2e-4)
    first = scored(engine, rows, "weights")
    assert first == scored(engine, rows, "weights") == scored(engine, rows, None)
    size = len(rows)
    for number in (1, 2):  # the adapters matter
        assert expected[number * size : (number + 1) * size] != pytest.approx(expected[:size])


def exercise(engine: Engine, seed: int) -> None:
    """Random calls that fill and use the cache, with evictions between them: every activated score
    must be, bit for bit, that of a call that finds and leaves nothing."""
    draw = random.Random(seed)
    cache = engine._pools.cache
    # contexts that begin alike, and are more than the pool holds
    trunk = words(draw, 5, 5)
    contexts = [[*trunk[: draw.randint(0, 5)], *words(draw, 10, 25)] for _ in range(8)]
    contexts += [context[: draw.randint(1, 9)] for context in contexts[:3]]
    for _ in range(25):
        rows = some_rows(draw, contexts, draw.randint(1, 3))
        if draw.random() < 0.4:  # whole sequences under an adapter, whose entries stay
            sequences, spans, _ = zip(*rows, strict=True)
            engine.score(sequences, spans, f"step {draw.randint(0, 2)}", ["slot 1"])
        if draw.random() < 0.3:
            cache.evict(EvictParams(num_tokens=draw.randint(1, POOL)))
        assert scored(engine, rows, "weights") == scored(engine, rows, None)
    assert engine.free_slots() == (engine.kv_tokens, engine._pools.max_sequences)


def test_reuse_changes_no_bit_whatever_is_evicted(activated: tuple[Engine, list[Any]]) -> None:
    engine, _ = activated
    before = engine._pools.cache.num_evicted
    exercise(engine, seed=1)
    assert engine._pools.cache.num_evicted > before + 3 * POOL


@pytest.mark.parametrize("activated", ["llama"], indirect=True)
def test_without_namespaces_reuse_would_be_wrong(
    activated: tuple[Engine, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `exercise` asserts depends on the namespaces: it fails where they are dropped."""
    engine, _ = activated
    make, find = Pools._new, Pools.find

    def made(self: Pools, *arguments: Any, **named: Any) -> Any:
        request = make(self, *arguments, **named)
        request.extra_key = None
        return request

    monkeypatch.setattr(Pools, "_new", made)
    nameless: Any = None
    monkeypatch.setattr(Pools, "find", lambda self, tokens, _: find(self, tokens, nameless))
    with pytest.raises(AssertionError):
        exercise(engine, seed=1)
    monkeypatch.undo()
    engine._pools.cache.evict(EvictParams(num_tokens=POOL))


def test_what_is_reused_is_the_contexts(activated: tuple[Engine, list[Any]]) -> None:
    engine, _ = activated
    engine._pools.cache.evict(EvictParams(num_tokens=POOL))
    context = list(range(5, 15))
    sequences = [[*context, *CUE, 6, option] for option in (7, 8)]
    call: dict[str, Any] = {"adapters": SLOTS, "contexts": [10, 10]}
    first = engine.score(sequences, [(13, 14)] * 2, base="weights", **call)
    again = engine.score(sequences, [(13, 14)] * 2, base="weights", **call)
    other = engine.score(sequences, [(13, 14)] * 2, base="other weights", **call)
    alone = engine.score(sequences, [(13, 14)] * 2, **call)
    assert (first.num_tokens, first.num_reused, first.num_asked) == (10 + 3 * 3, 0, 3 * 2 * 13)
    assert (again.num_tokens, again.num_reused, again.num_asked) == (3 * 3, 10, 3 * 2 * 13)
    assert (other.num_tokens, alone.num_tokens) == (first.num_tokens, first.num_tokens)
    assert engine._pools.cache.total_size() == 2 * 10  # suffixes leave nothing


def test_generation_equals_pefts(activated: tuple[Engine, list[Any]]) -> None:
    engine, models = activated
    draw = random.Random(5)
    contexts = [words(draw, 3, 12) for _ in range(3)]
    prompts, sizes = [], []
    for _ in range(6):
        context = draw.choice(contexts)
        prompts.append([*context, *CUE, *words(draw, 0, 3)])
        sizes.append(len(context))
    expected = []
    for model in models:
        for prompt in prompts:
            found = model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=5,
                do_sample=False,
                eos_token_id=None,
            )
            expected.append(tuple(found[0, len(prompt) :].tolist()))
    for base in (None, "weights", "weights"):
        answers = engine.generate(prompts, Sampling(5), adapters=SLOTS, contexts=sizes, base=base)
        assert [tuple(each.tokens) for each in answers] == expected
        assert engine.free_slots() == (engine.kv_tokens, engine._pools.max_sequences)
    assert all(each.num_reused == size for each, size in zip(answers, sizes * 3, strict=True))


def test_final_hidden_states_equal_pefts(activated: tuple[Engine, list[Any]]) -> None:
    engine, models = activated
    rows = some_rows(random.Random(7), [words(random.Random(8), 3, 12) for _ in range(3)], 10)
    sequences = [tokens for tokens, _, _ in rows]
    sizes = [context for _, _, context in rows]
    for base in (None, "weights", "weights"):
        for adapter, model in zip(SLOTS, models, strict=True):
            found = engine.last_hidden(sequences, adapter, sizes, base)
            with torch.no_grad():
                expected = [
                    model(
                        input_ids=torch.tensor([tokens]), output_hidden_states=True
                    ).hidden_states[-1][0, -1]
                    for tokens in sequences
                ]
            torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=0)
    assert engine.free_slots() == (engine.kv_tokens, engine._pools.max_sequences)
    with pytest.raises(ValueError, match="a prompt of 3 tokens, a context of 3"):
        engine.last_hidden([[5, 6, 7]], None, [3])


def test_a_span_right_behind_its_context_is_refused(activated: tuple[Engine, list[Any]]) -> None:
    with pytest.raises(ValueError, match="context of 3"):
        activated[0].score([[5, 6, 7, 8]], [(3, 4)], contexts=[3])


@pytest.fixture
def marked(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe whose adapter acts from `It was` on."""
    values: dict[str, Any] = yaml.safe_load(yaml.safe_dump(recipe))
    values["space"] = dict(ACTIVATED)
    values["task"]["template"] = MARKED
    return values


@pytest.mark.slow
def test_the_ledger_depends_on_neither_pool_nor_looks(
    marked: dict[str, Any], tmp_path: Path
) -> None:
    """A pool that holds a step's contexts and no more computes them again and again, to the same
    bits; looks at held-out rows, which push others out, change nothing either."""
    marked["estimator"] |= {"num_seeds": 4, "batch_size": 3}
    marked["run"]["steps"] = 12
    marked["model"]["kv_tokens"] = 4096
    whole = train(Config.model_validate(marked), tmp_path / "large.jsonl")
    marked["model"]["kv_tokens"] = 96
    assert train(Config.model_validate(marked), tmp_path / "small.jsonl") == whole
    marked["run"] |= {"eval_every": 2, "verify_cache": 5}
    assert train(Config.model_validate(marked), tmp_path / "looks.jsonl") == whole


def test_looks_before_and_after_training_share_contexts(marked: dict[str, Any]) -> None:
    marked["model"]["kv_tokens"] = 4096
    replica = Replica(Config.model_validate(marked), DEVICE)
    first = replica.score([], "test", range(10))
    update = StepUpdate(0, seeds=(5,), coefficients=(0.1,), decay=1.0)
    again = replica.score([update], "test", range(10))
    suffixes = len(["It", "was"]) * 10
    assert again.num_tokens == suffixes < first.num_tokens
    assert [example.scores for example in first.examples] != [e.scores for e in again.examples]
    replica.close()


class Counter:
    """Adds up what steps tell of their tokens."""

    def __init__(self) -> None:
        self.asked = self.computed = 0

    def step(self, step: StepMetrics) -> None:
        self.asked += step.kv.asked
        self.computed += step.kv.computed

    def evaluation(self, evaluation: Evaluation) -> None:
        pass


def write_passages(path: Path, num_passages: int) -> Path:
    """Passages of 200 to 400 words, each with 5 questions of up to 40 and 2 to 10 options."""
    draw = random.Random(0)
    others = [word for word in WORDS if word != "what"]

    def salad(low: int, high: int) -> str:
        return " ".join(draw.choices(others, k=draw.randint(low, high)))

    with path.open("w") as file:
        for _ in range(num_passages):
            passage = salad(200, 400)
            for _ in range(5):
                options = list({salad(1, 8): None for _ in range(draw.randint(2, 10))})
                row = {"passage": passage, "question": salad(5, 37), "options": options}
                file.write(json.dumps({**row, "label": 0}) + "\n")
    return path


@pytest.mark.slow
def test_most_tokens_of_real_shapes_are_reused(
    marked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of 50 steps. The words' number is the tokens' here."""
    monkeypatch.setitem(conftest.GATED, "max_position_embeddings", 512)
    marked["model"] |= {
        "path": str(conftest.make_model(tmp_path / "model", "llama")),
        "kv_tokens": 16384,
    }
    marked["task"] = {
        "template": "{passage} {*}what was {question} It {option}",
        "options": ["{options}"],
        "train": {"path": str(write_passages(tmp_path / "rows.jsonl", 41))},
        "holdout": 5,
        "group_by": "passage",
    }
    marked["estimator"] |= {"num_seeds": 1, "batch_size": 8}
    marked["space"]["slots"] = 2
    marked["run"]["steps"] = 50
    config = Config.model_validate(marked)
    fleet, counter = LocalFleet(config, DEVICE), Counter()
    info = fleet.start()
    header = Header(1, 1, config.model.path, info.weights_hash, config.identity(), "", ())
    data = tasks.load(config.task)
    batches = Batches(config, len(data.train), data.groups)
    with Ledger.create(tmp_path / "ledger.jsonl", header) as ledger:
        Driver(config, fleet, ledger, [counter], batches=batches, num_test=5).train()
    fleet.close()
    assert 1 - counter.computed / counter.asked > 0.95


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes"), [("dense", True), ("low_rank", True), ("lora", False), ("prefix", False)]
)
def test_updates_of_the_weights_change_what_entries_are_kept_under(
    kind: str, changes: bool, recipe: dict[str, Any]
) -> None:
    replica = Replica(Config.model_validate({**recipe, "space": {"kind": kind}}), DEVICE)
    before = replica._base
    replica.evaluate([StepUpdate(0, seeds=(5,), coefficients=(0.1,), decay=1.0)], [])
    assert (replica._base != before) == changes
    assert replica.info.weights_hash in before
    replica.close()


def test_an_exported_adapter_gives_the_same_scores_to_peft(
    marked: dict[str, Any], model_folders: dict[str, Path], tmp_path: Path
) -> None:
    replica = Replica(Config.model_validate(marked), DEVICE)
    update = StepUpdate(0, seeds=(5, 6), coefficients=(0.1, -0.2), decay=1.0)
    chunk = replica.score([update], "test", range(12))
    states = torch.from_numpy(replica._hidden(replica._encoder.encode("test", range(12))))
    assert len(replica.linear_probe([update])) == 50
    replica.export([update], tmp_path / "adapter")
    replica.close()
    folder = model_folders["llama"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cue = tokenizer("It was").input_ids
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stored["alora_invocation_tokens"] == cue
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    data = tasks.load(Config.model_validate(marked).task)
    for example, found, state in zip(data.test, chunk.examples, states, strict=False):
        with torch.no_grad():
            for text, score in zip(example.texts, found.scores, strict=True):
                ids = tokenizer(text).input_ids
                output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
                logprobs = output.logits[0, -2].log_softmax(-1)
                assert float(logprobs[ids[-1]]) == pytest.approx(score, abs=1e-4)
                torch.testing.assert_close(
                    state, output.hidden_states[-1][0, -2], atol=1e-4, rtol=0
                )
    # and it is where another run may start, if that acts from the same place
    marked["space"]["init"] = str(tmp_path / "adapter")
    config = Config.model_validate(marked)
    SpacePlan(config, Checkpoint(folder), tuple(cue))
    for invocation in ((), (3,)):
        with pytest.raises(ConfigError, match=r"^space\.init: .*acts from the tokens"):
            SpacePlan(config, Checkpoint(folder), invocation)


@pytest.mark.parametrize("kind", ["dense", "low_rank", "prefix"])
def test_other_spaces_are_not_activated(kind: str, marked: dict[str, Any]) -> None:
    marked["space"] = {"kind": kind, "activation": "suffix"}
    with pytest.raises(ValueError, match=f"activation: is of no use to space.kind={kind}"):
        Config.model_validate(marked)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{text} was it {option}", "has no {\\*}"),
        ("{text} {*}was {*}it {option}", "more than once"),
        ("{text} was it {option}{*} so", "must stand before"),
        ("{text} {*}{option}", "the same in every row"),
        ("{text}{*} {option}", "the same in every row"),
        ("{*}was {text} it {option}", "stands at the beginning"),
    ],
)
def test_a_mark_has_its_place(template: str, message: str, marked: dict[str, Any]) -> None:
    marked["task"]["template"] = template
    with pytest.raises(ValueError, match=message):
        Config.model_validate(marked)


Encode = Callable[..., Encoder]
REWARDED = {"objective": "reward", "metric": "reward", "reward": {"function": "mine:score"}}


@pytest.fixture
def encode(tmp_path: Path) -> Encode:
    """An encoder of rows whose adapter is activated, by one of the small tokenizers."""

    def made(
        kind: str, template: str, texts: list[str], *, bare: bool = False, **choices: Any
    ) -> Encoder:
        path = tmp_path / "rows.jsonl"
        with path.open("w") as file:
            for text in texts:
                file.write(json.dumps({"text": text, "label": 0}) + "\n")
        task = Task.model_validate(
            {
                "template": template,
                "options": [] if bare else ["great", "not so great"],
                "train": {"path": str(path)},
                "test": {"path": str(path)},
                **(REWARDED if bare else {}),
            }
        )
        corpus = [*texts, "Question: was it great? What? Answer: not so great.\n"] * 5
        tokenizer = small_tokenizers.KINDS[kind](corpus)
        choices = {"max_length": 200, **choices}
        return Encoder(
            tasks.load(task),
            small_tokenizers.tokenize(tokenizer),
            bos=tokenizer.bos_token_id,
            is_activated=True,
            **choices,
        )

    return made


PASSAGES = ["a film that was great.", "It was so dull, so long", "so what was it? Answer: great"]
QUESTION = "{text}\n{*}Question: was it great? Answer: {option}"


@pytest.mark.parametrize("kind", small_tokenizers.KINDS)
def test_the_mark_is_a_border_of_tokens(kind: str, encode: Encode) -> None:
    encoder = encode(kind, QUESTION, PASSAGES)
    cue = encoder.invocation
    assert cue
    for encoding in encoder.encode("train", range(len(PASSAGES))):
        assert len({tokens[: encoding.context] for tokens in encoding.sequences}) == 1
        for tokens in encoding.sequences:
            starts = [i for i in range(len(tokens)) if tokens[i : i + len(cue)] == cue]
            assert starts[-1] == encoding.context
    (short,) = encode(kind, QUESTION, PASSAGES, max_length=13).encode("train", [0])
    assert max(map(len, short.sequences)) == 13
    assert short.sequences[0][short.context :][: len(cue)] == cue


@pytest.mark.parametrize(
    ("kind", "template", "texts", "choices", "message"),
    [
        # Qwen's pattern takes a line break to the mark before it
        ("qwen", "{text}{*}\nAnswer: {option}", PASSAGES, {}, "merges what stands on both sides"),
        ("gpt2", "{text}{*}at? {option}", ["so gre", "a gre"], {}, "merges what stands on both"),
        ("gpt2", "{text}\n{*}w{text} {option}", ["as", "hat"], {}, "no token of the text behind"),
        ("gpt2", "{text}\n{*}was {text} {option}", ["it\nwas"], {}, "stands again further on"),
        (
            "gpt2",
            "{text}\n{*}was {text}{option}",
            ["it\nwas"],
            {"bare": True},
            "stands again further on",
        ),
        ("gpt2", QUESTION, PASSAGES, {"max_length": 11}, "task.max_length"),
        ("gpt2", "{text} {*}so {option}", ["", "a film"], {}, "nothing stands before"),
    ],
)
def test_rows_that_peft_would_read_otherwise_are_refused(
    kind: str, template: str, texts: list[str], choices: Any, message: str, encode: Encode
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        encode(kind, template, texts, **choices)
    assert "\n" not in str(caught.value)
    assert "rows.jsonl" in str(caught.value)
