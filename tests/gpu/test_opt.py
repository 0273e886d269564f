"""OPT on a GPU: graphs change nothing, and bfloat16 is as exact as transformers' own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, recorded
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from orchestrator.engine import Engine
from orchestrator.sampling import Sampling

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SEQUENCES = [[3, 4, 5, 6, 7], [8, 9, 10], [11, 12, 13, 14, 15, 16, 3, 4]]
SPANS = [(1, len(tokens)) for tokens in SEQUENCES]


@pytest.mark.parametrize("family", ["opt", "opt-350m", "llama"])
def test_graphs_change_neither_scores_nor_continuations(
    family: str, engines: Callable[[str], Engine], model_folders: dict[str, Path]
) -> None:
    captured = Engine(
        str(model_folders[family]),
        dtype="float32",
        device="cuda",
        kv_tokens=4096,
        cuda_graphs=True,
    )
    runner = captured._runner.model_runner
    assert (
        type(runner.prefill_cuda_graph_runner).__name__ == "EagerRunner"
    )  # SGLang's would run no hooks
    assert type(runner.decode_cuda_graph_runner).__name__ == "DecodeCudaGraphRunner"
    eager = engines(family)
    assert captured.generate(SEQUENCES, Sampling(64)) == eager.generate(SEQUENCES, Sampling(64))
    scores = [span.sum for span in captured.score(SEQUENCES, SPANS).spans]
    expected = [span.sum for span in eager.score(SEQUENCES, SPANS).spans]
    assert scores == pytest.approx(expected, abs=1e-4)
    captured.close()


@torch.no_grad()
def test_bfloat16_differs_no_more_than_transformers_does(tmp_path: Path) -> None:
    """On random weights of OPT-1.3B's shape, against transformers in float32.

    Both round at the same places, so the two means are draws of one quantity; over 512 tokens they
    are within a few percent of each other, and one rounding more a layer would show.
    """
    torch.manual_seed(0)
    sequences = torch.randint(5, len(VOCABULARY), (8, 65)).tolist()
    config = OPTConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=32,
        ffn_dim=8192,
    )
    OPTForCausalLM(config).save_pretrained(tmp_path)
    engine = Engine(str(tmp_path), dtype="bfloat16", device="cuda", kv_tokens=1024)
    with recorded(engine) as logits:
        engine.score(sequences, [(1, len(tokens)) for tokens in sequences])
    engine.close()
    flat = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).cuda()
        rows = [model(torch.tensor([tokens], device="cuda")).logits[0, :-1] for tokens in sequences]
        flat[dtype] = torch.cat(rows).float().cpu()
        del model
    ours = (torch.cat(logits) - flat[torch.float32]).abs().mean()
    theirs = (flat[torch.bfloat16] - flat[torch.float32]).abs().mean()
    assert ours <= 1.05 * theirs
