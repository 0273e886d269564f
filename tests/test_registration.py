"""How SGLang comes to our OPT: by its external package, in the engine and in its own server."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import DEVICE, GATED, SIZES, renamed
from sglang.srt.models.registry import ModelRegistry
from transformers import GPTNeoXConfig, HeliumConfig, HeliumForCausalLM

from orchestrator import opt_native, sglang_models
from orchestrator.config import ConfigError
from orchestrator.engine import Engine
from orchestrator.sampling import Sampling
from orchestrator.sglang_models import opt

ROOT = Path(__file__).parent.parent
START_S = 120


def test_the_registry_holds_our_class_and_other_models_are_sglang_s() -> None:
    assert opt.EntryClass is opt_native.EntryClass is opt_native.OPTForCausalLM
    assert ModelRegistry.models["OPTForCausalLM"] is opt_native.OPTForCausalLM
    assert ModelRegistry.models["LlamaForCausalLM"].__module__ == "sglang.srt.models.llama"


def test_the_package_holds_nothing_but_models() -> None:
    """SGLang imports whatever lies there."""
    folder = Path(sglang_models.__file__).parent
    assert {path.name for path in folder.glob("*.py")} == {"__init__.py", "opt.py"}


def test_a_model_without_an_implementation_is_refused_before_it_is_read(tmp_path: Path) -> None:
    config = GPTNeoXConfig(**SIZES, architectures=["GPTNeoXForCausalLM"])
    config.save_pretrained(tmp_path)  # no weights: none are looked for
    with pytest.raises(ConfigError, match=r"GPTNeoXForCausalLM; .* model.allow_fallback=true"):
        Engine(str(tmp_path), dtype="float32", device=DEVICE, kv_tokens=64)


def test_the_fallback_runs_where_it_is_allowed(tmp_path: Path) -> None:
    HeliumForCausalLM(HeliumConfig(**GATED, head_dim=16)).save_pretrained(tmp_path)
    choices: dict[str, Any] = {"dtype": "float32", "device": DEVICE, "kv_tokens": 64}
    with pytest.raises(ConfigError, match="HeliumForCausalLM"):
        Engine(str(tmp_path), **choices)
    engine = Engine(str(tmp_path), allow_fallback=True, **choices)
    assert type(engine.model).__module__ == "sglang.srt.models.transformers"
    assert engine.score([[3, 4, 5]], [(1, 3)]).spans[0].sum < 0
    engine.close()


def ask(url: str, request: dict[str, Any] | None = None) -> Any:
    body = None if request is None else json.dumps(request).encode()
    call = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=30) as answer:
        text = answer.read()
    return json.loads(text) if text else None


@pytest.mark.slow
def test_sglang_s_own_server_serves_our_opt(
    engines: Callable[[str], Engine], model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """From a checkpoint whose names SGLang's own OPT would skip without a word."""
    source = model_folders["opt"]
    folder = renamed(source, tmp_path / "bare", lambda name: name.removeprefix("model.decoder."))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((source / name).read_text())
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    attention = "torch_native" if DEVICE == "cpu" else "triton"
    options = f"--device {DEVICE} --dtype float32 --attention-backend {attention} --port {port} "
    options += "--sampling-backend pytorch --max-total-tokens 512 --mem-fraction-static 0.3 "
    options += "--disable-cuda-graph --disable-overlap-schedule --skip-server-warmup"
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "tests/serve.py", "--model-path", folder, *options.split()],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_S
        while True:
            try:
                ask(f"{url}/health")
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (
                    tmp_path / "log"
                ).read_text()[-2000:]
                time.sleep(0.5)
        choices = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
        answer = ask(f"{url}/generate", {"input_ids": [3, 4, 5], "sampling_params": choices})
        assert answer["output_ids"] == engines("opt").generate([[3, 4, 5]], Sampling(8))[0].tokens
    finally:
        os.killpg(server.pid, 9)
        server.wait()
