"""What a stranger's files, and whoever shares the network, can do to a run: nothing but be refused.

And what a run never writes down: the secrets of its environment.
"""

import ast
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import DEVICE
from test_launch import ROOT, launch, mistake
from test_run_folder import parent  # noqa: F401 -- a fixture

from orchestrator import metrics, run_folder
from orchestrator.config import Config, ConfigError
from orchestrator.recipe_file import load
from orchestrator.replica import Replica

SOURCES = [ROOT / "launch.py", *(ROOT / "orchestrator").rglob("*.py")]
SOURCES += [path for name in ("examples", "benchmarks") for path in (ROOT / name).rglob("*.py")]
# Calls that make objects, or run code, out of what a file holds.
UNSAFE = {
    ("pickle", "load"),
    ("pickle", "loads"),
    ("pickle", "Unpickler"),
    ("marshal", "load"),
    ("marshal", "loads"),
    ("shelve", "open"),
    ("joblib", "load"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("yaml", "unsafe_load_all"),
}
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
SECRETS = {
    "HF_TOKEN": "hf_aSecretThatNobodyMayRead",
    "AWS_SECRET_ACCESS_KEY": "aws/Secret+ThatNobodyMayRead",
    "WANDB_API_KEY": "wandbSecretThatNobodyMayRead",
}
MEMORY = 2 << 30  # bytes of address space: far less than what lies in the files


# ---------------------------------------------------------------- files


def unsafe_calls(source: str) -> list[str]:
    """Calls in a program's text that could run what a file brings along."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            is_unsafe = tuple(name.rsplit(".", 1)) in UNSAFE or name in ("eval", "exec")
            is_unsafe |= name == "torch.load" and given.get("weights_only") != "True"
            is_unsafe |= name.endswith("load") and given.get("allow_pickle", "False") != "False"
            is_unsafe |= name == "yaml.load" and ast.unparse(node.args[1]) != "_Loader"
            is_unsafe |= given.get("trust_remote_code") == "True"
            if is_unsafe:
                found.append(ast.unparse(node))
        if isinstance(node, ast.ImportFrom) and node.module in {module for module, _ in UNSAFE}:
            found.append(ast.unparse(node))  # would hide a call's name
    return found


def test_no_file_is_unpickled_and_no_text_is_run() -> None:
    assert unsafe_calls("pickle.load(f); torch.load(f); np.load(f, allow_pickle=True)") != []
    assert len(SOURCES) > 60
    calls = {path.name: unsafe_calls(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {name: found for name, found in calls.items() if found} == {}


@pytest.mark.parametrize("is_trusted", [False, True])
def test_code_in_a_models_folder_runs_only_where_the_recipe_says_so(
    is_trusted: bool, recipe: dict[str, Any], tmp_path: Path
) -> None:
    folder, marker = tmp_path / "model", tmp_path / "has_run"
    shutil.copytree(recipe["model"]["path"], folder)
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    for name, classes in {
        "config.json": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
        "tokenizer_config.json": {"AutoTokenizer": ["evil.T", None]},
    }.items():
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, "auto_map": classes}))
    model = {**recipe["model"], "path": str(folder), "trust_remote_code": is_trusted}
    config = Config.model_validate({**recipe, "model": model})
    if is_trusted:
        with pytest.raises(Exception, match="evil"):  # it has no such classes
            Replica(config, DEVICE)
    else:
        Replica(config, DEVICE).close()
    assert marker.exists() == is_trusted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: !!python/object/apply:os.system ['touch {marker}']", "could not determine"),
        ("run: !!python/name:os.system", "could not determine"),
        ("a: &a [1, 1]\nrun: {{steps: [*a, *a]}}", "write the value out"),
        ("run: " + "[" * 20_000, "nested too deeply"),
        ("# " + "x" * (1 << 20), "so no recipe"),
    ],
    ids=["object", "name", "alias", "nested", "long"],
)
def test_a_recipe_is_plain_values(text: str, words: str, tmp_path: Path) -> None:
    path, marker = tmp_path / "config.yaml", tmp_path / "has_run"
    path.write_text(text.format(marker=marker))
    with pytest.raises(ConfigError, match=words) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "config.yaml.new", "ledger.jsonl", "metrics.jsonl", "summary.json.new"]
    + ["log.txt", "training.lock", "report", "snapshots/5.safetensors"],
)
def test_a_run_folder_whose_files_lie_elsewhere_is_refused(
    name: str,
    parent: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Whether what the link leads to is there or not. A link inside of the folder does no harm."""
    (parent / "latest").symlink_to(parent / "ledger.jsonl")
    run_folder.reopen(parent)
    precious = tmp_path / "precious"
    path = parent / name
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        precious.write_bytes(path.read_bytes())
        path.unlink()
    path.symlink_to(precious)
    before = precious.read_bytes() if precious.exists() else None
    with pytest.raises(ConfigError, match="leads out of the run folder, to .*precious"):
        run_folder.reopen(parent)
    with pytest.raises(ConfigError, match="leads out of the run folder, to .*precious"):
        run_folder.branch(parent, tmp_path / "fork", [])
    assert (precious.read_bytes() if precious.exists() else None) == before
    path.unlink()
    os.mkfifo(path)  # to read it would take for ever
    with pytest.raises(ConfigError, match="is no plain file"):
        run_folder.reopen(parent)


def test_links_that_lead_to_each_other_are_refused(parent: Path) -> None:  # noqa: F811
    (parent / "log.txt").symlink_to("log.old")
    (parent / "log.old").symlink_to("log.txt")
    with pytest.raises(ConfigError, match="leads nowhere"):
        run_folder.reopen(parent)
    assert "no run folder" in mistake("inspect", parent / "log.txt")


def test_every_verb_refuses_such_a_folder(parent: Path, tmp_path: Path) -> None:  # noqa: F811
    (parent / "log.txt").symlink_to(tmp_path / "precious")
    verbs: list[list[str | Path]] = [
        ["train", "--resume", parent],
        ["eval", parent, "--out", tmp_path / "x.jsonl"],
        ["export", parent, tmp_path / "model"],
        ["report", parent],
        ["inspect", parent],
        ["fork", parent, tmp_path / "fork", "--at", "3"],
    ]
    for verb in verbs:
        assert "leads out of the run folder" in mistake(*verb)
    assert not (tmp_path / "precious").exists()


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


FLOODS = ["10 GB without a line break", "a line of 1 GB", "nothing but brackets"]


def append_flood(path: Path, flood: str) -> None:
    """Behind what the file holds. Holes take no room on the disk."""
    with path.open("ab") as file:
        if flood == "nothing but brackets":
            file.write(b"[" * (1 << 19) + b"\n")
            return
        file.truncate(file.tell() + (10**10 if flood.startswith("10 GB") else 10**9))
    if flood == "a line of 1 GB":
        with path.open("ab") as file:
            file.write(b"\n{}\n")


@pytest.mark.parametrize("flood", FLOODS[:2])
def test_a_ledger_that_floods_is_refused_in_little_memory(
    flood: str,
    parent: Path,  # noqa: F811
) -> None:
    append_flood(parent / "ledger.jsonl", flood)
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "inspect", str(parent)],
        capture_output=True,
        text=True,
        preexec_fn=limited,
        timeout=120,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "ledger.jsonl: line 8: is damaged" in done.stderr


@pytest.mark.parametrize("flood", FLOODS[1:])
@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json"])
def test_metrics_that_flood_are_passed_over_in_little_memory(
    name: str,
    flood: str,
    parent: Path,  # noqa: F811
) -> None:
    expected = list(metrics.entries(parent))
    append_flood(parent / name, flood)
    program = f"""
        from pathlib import Path
        from orchestrator import metrics
        folder = Path({str(parent)!r})
        print(len(list(metrics.entries(folder))), metrics.read_summary(folder))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        preexec_fn=limited,
        timeout=120,
    )
    assert done.stdout.split() == [str(len(expected)), "None"], done.stderr


# ---------------------------------------------------------------- code


@pytest.fixture
def rewarded(tmp_path: Path, recipe: dict[str, Any]) -> Path:
    """A stranger's recipe, in a folder of its own, with a module beside it."""
    folder = tmp_path / "stranger"
    folder.mkdir()
    module = f"open({str(tmp_path / 'has_run')!r}, 'w')\ndef score(row, text):\n    return 0.5\n"
    (folder / "theirs.py").write_text(module)
    task = {
        "template": "so {sentence} was{option}",
        "objective": "reward",
        "metric": "reward",
        "reward": {"function": "theirs:score"},
        "train": recipe["task"]["train"],
        "holdout": 10,
        "max_new_tokens": 5,
    }
    (folder / "theirs.yaml").write_text(yaml.safe_dump({**recipe, "task": task}))
    return folder


def test_a_module_beside_the_recipe_is_not_the_users(rewarded: Path, tmp_path: Path) -> None:
    told = mistake("train", rewarded / "theirs.yaml", f"run.dir={tmp_path / 'run'}")
    assert "task.reward.function: theirs:score: ModuleNotFoundError" in told
    assert not (tmp_path / "has_run").exists()


def test_a_strangers_run_has_no_code_run_that_the_user_does_not_name(
    rewarded: Path, tmp_path: Path
) -> None:
    """To resume or evaluate it, the reward's folder is said again; so is trust in model code."""
    config = load(rewarded / "theirs.yaml", [f"task.reward.path={rewarded}"])
    (rewarded / "config.yaml").write_text(config.dump())
    again = f"task.reward.path={rewarded}"
    resumed = mistake("train", "--resume", rewarded)
    for told in (resumed, mistake("eval", rewarded, "--out", tmp_path / "x.jsonl")):
        assert told.count(again) == 2 and "if you trust it, add" in told
        assert not (tmp_path / "has_run").exists()
    assert run_folder.reopen(rewarded, [again]).config.task.reward is not None
    assert run_folder.reopen(rewarded, judges=False).config.task.reward is not None
    trusting = load(rewarded / "theirs.yaml", ["model.trust_remote_code=true"])
    (rewarded / "config.yaml").write_text(trusting.dump())
    for overrides in ([again], []):
        with pytest.raises(ConfigError, match=r"^model\.trust_remote_code=true: .* if you trust"):
            run_folder.reopen(rewarded, overrides, judges=False)
    told = mistake("export", rewarded, tmp_path / "model")
    assert "model.trust_remote_code=true" in told


# ---------------------------------------------------------------- the network, and secrets


def listening(process: psutil.Process) -> set[tuple[str, str]]:
    """Addresses on which a process and its descendants listen, and the names of these."""
    found = set()
    for each in [process, *process.children(recursive=True)]:
        try:
            sockets = each.net_connections(kind="inet")
            name = each.name()
        except psutil.Error:  # it has ended
            continue
        found |= {(name, each.laddr.ip) for each in sockets if each.status == psutil.CONN_LISTEN}
    return found


@pytest.mark.slow
def test_a_ray_of_our_own_is_private_and_no_secret_is_written(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is there of a run: its folder, what it prints, its page, and Ray's own logs."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    for name in ("RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.delenv(name, raising=False)
    path, folder = tmp_path / "tiny.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(recipe))
    with tempfile.TemporaryDirectory() as ray_folder:  # a short name, for Ray's sockets
        monkeypatch.setenv("RAY_TMPDIR", ray_folder)
        run = subprocess.Popen(
            [sys.executable, str(ROOT / "launch.py"), "train", str(path), "fleet.kind=ray"]
            + [f"run.dir={folder}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        addresses: set[tuple[str, str]] = set()
        while run.poll() is None:
            addresses |= listening(psutil.Process(run.pid))
            time.sleep(0.5)
        printed = run.stdout.read() if run.stdout else ""
        assert run.returncode == 0, printed
        done = launch("report", folder)
        printed += done.stdout + done.stderr
        files = [each for root in (folder, Path(ray_folder)) for each in root.rglob("*")]
        texts = {each: each.read_bytes() for each in files if each.is_file()}
    assert {"gcs_server", "raylet"} <= {name for name, _ in addresses}
    assert {address for _, address in addresses} <= LOOPBACK
    assert folder / "log.txt" in texts and folder / "report" / "index.html" in texts
    assert any(each.name.startswith("raylet") for each in texts)
    for name, value in SECRETS.items():
        assert value not in printed
        assert [each for each, text in texts.items() if value.encode() in text] == [], name


def test_a_signal_to_end_is_honoured_whatever_becomes_of_it() -> None:
    """Here somebody swallows the exception, and goes on for ever."""
    program = """
        import signal, time
        import launch
        launch.GRACE_S = 0.5
        signal.signal(signal.SIGTERM, launch._interrupt)
        while True:
            try:
                print("ready", flush=True)
                time.sleep(60)
            except KeyboardInterrupt:
                print("swallowed", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.terminate()
        printed, told = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "swallowed\nready\n")
    assert "interrupted; ended without a close" in told
