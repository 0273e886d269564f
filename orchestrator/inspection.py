"""What a run's ledger holds, line by line of text: for `launch.py inspect`.

Reads the run's folder only. Every step is decoded, so that all that could be wrong is found.
"""

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from orchestrator import metrics, snapshot_folder
from orchestrator.config import ConfigError
from orchestrator.seed_sync import Header, LedgerError, StepRecords, Survey, survey

LATEST = 100  # steps that the second of the rates is of


def inspect(folder: Path) -> Iterator[str]:
    """Lines to show; ends with the LedgerError that tells of damage, if there is any.

    ConfigError for a folder without a ledger.
    """
    path = folder / metrics.LEDGER_FILE
    if not path.is_file():
        raise ConfigError(f"{folder}: no run folder, it holds no {metrics.LEDGER_FILE}")
    found, damage = Survey(), None
    try:
        survey(path, found)
    except OSError as error:
        raise LedgerError(f"{path}: cannot be read: {error.strerror}") from None
    except LedgerError as error:
        damage = error
    if found.header is not None:
        lines = chain(
            _header(found.header),
            _steps(path, found),
            _rates(folder, found.num_steps),
            _snapshots(folder),
        )
        for name, value in lines:
            yield f"{name:<16}{value}"
    if damage is not None:
        raise damage


def _header(header: Header) -> Iterator[tuple[str, str]]:
    yield "format", f"{header.format}, noise version {header.noise_version}"
    yield "model", header.model
    for name in ("weights_hash", "config_hash", "data_hash"):
        yield name.replace("_", " "), getattr(header, name)
    yield "versions", ", ".join(f"{name} {version}" for name, version in header.versions)
    for step, config_hash, data_hash, digest in header.forked_from:
        yield "forked", f"at step {step} from config {config_hash}, data {data_hash}"
        yield "", f"whose ledger had sha256 {digest} up to there"


def _steps(path: Path, found: Survey) -> Iterator[tuple[str, str]]:
    number = found.num_steps
    yield "steps", f"0 to {number - 1}, {number:,} in all, no gaps" if number else "none"
    dropped = seeds = touched = 0
    for record in StepRecords(path, found):
        seeds += len(record.seeds)
        dropped += len(record.dropped)
        touched += bool(record.dropped)
    yield "seeds", f"{seeds:,}, of which {dropped:,} dropped, in {touched:,} steps"
    each = f", {found.size / number:,.0f} a step" if number else ""
    yield "bytes", f"{path.stat().st_size:,}{each}"
    if found.torn:
        yield "torn", f"the last line, {found.torn:,} bytes; a resumed run takes it off"


def _rates(folder: Path, num_steps: int) -> Iterator[tuple[str, str]]:
    """From metrics.jsonl, where a step that was noted twice counts once, as it was last."""
    seconds = {}
    for entry in metrics.entries(folder):
        if entry["kind"] == "step" and entry["step"] < num_steps:
            seconds[entry["step"]] = float(entry["seconds"])
    if sum(seconds.values()):
        latest = list(islice(reversed(seconds.values()), LATEST))
        yield (
            "steps a second",
            (
                f"{len(seconds) / sum(seconds.values()):.3g}; of the last {len(latest)}: "
                f"{len(latest) / sum(latest):.3g}"
            ),
        )
    if len(seconds) < num_steps:
        yield "without metrics", f"{num_steps - len(seconds):,} steps"


def _snapshots(folder: Path) -> Iterator[tuple[str, str]]:
    found = snapshot_folder.listed(folder / snapshot_folder.FOLDER)
    sizes = [f"step {step} ({path.stat().st_size:,} bytes)" for step, path in found.items()]
    if sizes:
        yield "snapshots", ", ".join(sizes)
