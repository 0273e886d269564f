"""Trained weights as a folder that transformers and SGLang load.

Owns the folder's layout: weights under Hugging Face's names, and beside them what else the base
model's folder holds (configuration, tokenizer). Knows nothing of how the weights came to be.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

# What a model's folder holds beside its weights.
COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")
WEIGHT_INDEX = ".index.json"


def write_model(base: Path, folder: Path, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write a model like that in `base`, with these weights: canonical names, whole tensors.

    All weights are of one dtype, which becomes the model's. The folder appears when it is whole.
    Without weights, as on all but the first of several ranks, nothing is written.
    """
    tensors = dict(weights)
    if not tensors:
        return
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        unfinished = Path(temporary) / folder.name
        unfinished.mkdir()
        for pattern in COMPANIONS:
            for file in base.glob(pattern):
                if not file.name.endswith(WEIGHT_INDEX):
                    shutil.copyfile(file, unfinished / file.name)
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)  # the older name of the same key
        config["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        text = json.dumps(config, indent=2) + "\n"
        (unfinished / "config.json").write_text(text, encoding="utf-8")
        save_torch_state_dict(tensors, unfinished)
        unfinished.rename(folder)
