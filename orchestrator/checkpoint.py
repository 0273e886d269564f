"""A model's folder on disk: found, fetched or de-quantised, hashed, and read tensor by tensor.

Owns the user cache of de-quantised GGUF files. Knows Hugging Face's tensor names and shapes;
knows nothing of engines or of what the tensors are for.
"""

import hashlib
import pickle
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.assets import check_model, dequantized_folder, resolve_file
from orchestrator.config import ConfigError

CONFIG = "config.json"
WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")
# Buffers that old checkpoints carry and no parameter holds.
BUFFERS = ("rotary_emb.inv_freq",)


def locate(path: str) -> Path:
    """The folder, in Hugging Face's layout, that holds the model; fetched or made if need be."""
    check_model(path)
    if path.endswith(".gguf"):
        return dequantized(resolve_file("model.path", path))
    if Path(path).is_dir():
        return Path(path)
    folder = Path()
    for pattern in WEIGHT_PATTERNS:  # the second only where the first finds no weights
        allowed = ["*.json", "*.model", "*.txt", "*.jinja", pattern]
        folder = Path(snapshot_download(path, allow_patterns=allowed))
        if any(folder.glob(pattern)):
            break
    return folder


def dequantized(gguf: Path) -> Path:
    """A Hugging Face folder with the GGUF file's weights in float32; made once, then cached."""
    folder = dequantized_folder(gguf)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            _dequantize(gguf, folder)
    return folder


def _dequantize(gguf: Path, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # A folder appears under its final name only when it is whole.
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        Path(unfinished).rename(folder)
        Path(unfinished).mkdir()  # for the context manager to remove
    folder.chmod(0o755)


def weight_files(folder: Path) -> list[Path]:
    """The folder's weight files: safetensors where there are any, else PyTorch's .bin."""
    for pattern in WEIGHT_PATTERNS:
        files = sorted(folder.glob(pattern))
        if files:
            return files
    patterns = " or ".join(WEIGHT_PATTERNS)
    raise ConfigError(f"model.path: {folder}: holds no weights ({patterns})")


def weights_hash(folder: Path) -> str:
    """SHA-256 (hex) over the names and the contents of a folder's weight files."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()


def config_hash(folder: Path) -> str:
    """Hash (16 hex digits) of the model's configuration, which decides what the weights compute."""
    return hashlib.sha256((folder / CONFIG).read_bytes()).hexdigest()[:16]


class Checkpoint:
    """The tensors of a folder's weight files, by the names that they have there.

    .bin files are read with `weights_only`, which runs no code of theirs.
    """

    def __init__(self, folder: Path) -> None:
        """Open all files. Raises ConfigError, naming the file, for one that is damaged."""
        self._readers: dict[str, Any] = {}
        for path in weight_files(folder):
            reader, names = _open(path)
            trained = [name for name in names if not name.endswith(BUFFERS)]
            self._readers.update(dict.fromkeys(trained, reader))

    @property
    def names(self) -> list[str]:
        return list(self._readers)

    def shape(self, name: str) -> tuple[int, ...]:
        reader = self._readers[name]
        if isinstance(reader, dict):
            return tuple(reader[name].shape)
        return tuple(reader.get_slice(name).get_shape())

    def linear_modules(self) -> dict[str, list[tuple[int, int]]]:
        """Names of the linear modules inside the layers, with all their [outputs, inputs]."""
        modules: dict[str, list[tuple[int, int]]] = {}
        for name in self.names:
            *path, module, kind = name.split(".")
            if kind == "weight" and "layers" in path and len(shape := self.shape(name)) == 2:
                modules.setdefault(module, []).append((shape[0], shape[1]))
        return modules

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU, in the file's dtype."""
        reader = self._readers[name]
        tensor: torch.Tensor = reader[name] if isinstance(reader, dict) else reader.get_tensor(name)
        return tensor


def _open(path: Path) -> tuple[Any, list[str]]:
    """A weight file's reader and its tensors' names. Raises ConfigError for a damaged file."""
    try:
        if path.suffix == ".safetensors":
            reader: Any = safe_open(path, framework="pt")
            return reader, list(reader.keys())
        # Files of before torch 1.6 are no archives, and cannot be mapped into memory.
        tensors = torch.load(
            path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True
        )
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "it ends too early")
        raise ConfigError(f"model.path: {path}: not a readable weight file: {reason}") from None
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise ConfigError(f"model.path: {path}: not a weight file: holds other than named tensors")
    return tensors, list(tensors)
