"""JSON as the standard has it, which every reader takes: it has no word for what is not finite."""

import json
import math


def text(value: object, indent: int | None = None) -> str:
    """The value as JSON, with null in the place of numbers that are not finite."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
