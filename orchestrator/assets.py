"""What the configuration's paths name: files, files inside installed packages, model folders.

Checks them before anything heavy is imported, and owns the place of the user cache. Knows
nothing of what a file holds.
"""

import hashlib
import importlib.util
import os
from pathlib import Path

from orchestrator.config import ConfigError

PACKAGE_PREFIX = "package:"


def resolve_file(key: str, path: str) -> Path:
    """The file that `path` names: itself, or for package:NAME/FILE one inside a package.

    Raises ConfigError, naming the configuration's `key`, where there is none.
    """
    if not path.startswith(PACKAGE_PREFIX):
        if not Path(path).is_file():
            raise ConfigError(f"{key}: {path}: no such file")
        return Path(path)
    package, _, inside = path.removeprefix(PACKAGE_PREFIX).partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            f"{key}: {path}: the package {package} is not installed; `make setup` installs those "
            "that the recipes name"
        )
    file = Path(found.submodule_search_locations[0]) / inside
    if not file.is_file():
        raise ConfigError(f"{key}: {path}: the package {package} holds no file {inside}")
    return file


def absolute(path: str) -> str:
    """A path that means the same to processes with other working directories."""
    return str(Path(path).absolute()) if Path(path).exists() else path


def check_model(path: str) -> None:
    """Refuse, before anything starts, a model path that cannot be right."""
    if path.endswith(".gguf"):
        resolve_file("model.path", path)
    elif Path(path).exists():
        if not (Path(path) / "config.json").is_file():
            raise ConfigError(f"model.path: {path}: holds no config.json")
    elif path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ConfigError(
            f"model.path: {path}: no such folder, and not a hub id (OWNER/NAME) either"
        )


def check_adapter(path: str) -> None:
    """Refuse, before anything starts, a path that holds no PEFT adapter."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (Path(path) / name).is_file():
            raise ConfigError(f"space.init: {path}: no PEFT adapter: it holds no {name}")


def dequantized_folder(gguf: Path) -> Path:
    """Where the cache keeps, or will keep, the de-quantised form of a GGUF file."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Path(base) / "orchestrator" / "models" / f"{gguf.stem}-{digest[:16]}"
