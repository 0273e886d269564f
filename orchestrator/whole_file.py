"""A file that is there whole or as it was: written beside, then given its name."""

from pathlib import Path


def write(path: Path, text: str) -> None:
    """Raises OSError where the folder or the disk does not take it."""
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
