"""The forward's own kernels on a GPU; layers that they do not serve go SGLang's way."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from test_forward_kernels import TOLERANCES, check_attention, check_log_softmax, check_norm

from orchestrator.attention_triton import attend
from orchestrator.engine import Engine
from orchestrator.score_graphs import WARMUPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SEQUENCES = [[3, 4, 5, 6, 7], [8, 9, 10], [11, 12, 13, 14, 15, 16, 3, 4] * 9]
SPANS = [(1, len(tokens)) for tokens in SEQUENCES]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_attention_is_the_plain_one(dtype: torch.dtype) -> None:
    check_attention("cuda", dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_norms_are_those_of_exact_sums(dtype: torch.dtype) -> None:
    check_norm("cuda", dtype)


def test_log_probabilities_are_those_of_plain_softmax() -> None:
    check_log_softmax("cuda")


def test_only_plain_layers_leave_sglang_s_kernel(
    model_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One layer's logits are capped: it still gives what it gives without a graph."""
    eager = Engine(
        str(model_folders["llama"]),
        dtype="float32",
        device="cuda",
        kv_tokens=4096,
        score_graphs=False,
    )
    replayed = Engine(str(model_folders["llama"]), dtype="float32", device="cuda", kv_tokens=4096)
    plain = [span.sum for span in eager.score(SEQUENCES, SPANS).spans]
    for engine in (eager, replayed):
        layers = [part for part in engine.model.modules() if isinstance(part, RadixAttention)]
        layers[0].logit_cap = 0.05
    expected = [span.sum for span in eager.score(SEQUENCES, SPANS).spans]
    assert expected != pytest.approx(plain, abs=1e-3)
    attended = []

    def counting(*arguments: Any, **named: Any) -> torch.Tensor:
        attended.append(len(arguments[0]))
        return attend(*arguments, **named)

    monkeypatch.setattr("orchestrator.score_attention.attend", counting)
    found = [span.sum for span in replayed.score(SEQUENCES, SPANS).spans]
    assert found == pytest.approx(expected, abs=1e-4)
    assert len(attended) == (WARMUPS + 1) * (len(layers) - 1)
    eager.close()
    replayed.close()
