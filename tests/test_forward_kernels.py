"""The forward's own kernels (attention, norm, log-softmax) against plain float64, interpreted.

Triton reads TRITON_INTERPRET when it is first imported, and other tests import it too, so checks
that launch kernels run in processes of their own, which call this module. On a GPU, tests/gpu calls
them without the interpreter.
"""

import itertools
import random
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.functional import layer_norm
from triton_process import run_alone


class Heads(NamedTuple):
    queries: int
    keys: int
    dim: int


LENGTHS = (23, 1, 64, 40, 7, 129, 32)
LAYOUTS = (Heads(3, 3, 128), Heads(4, 2, 64), Heads(3, 1, 80), Heads(2, 2, 96), Heads(6, 2, 16))
COLUMNS = (64, 5120, 769)
VOCABULARIES = (2, 4096, 9001)
EPS = 1e-5
# Relative and absolute.
TOLERANCES = {
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (2e-2, 2e-2),
    torch.float16: (2e-3, 2e-3),
}


def contexts(draw: random.Random) -> list[list[int]]:
    """Per sequence of LENGTHS, rows that it sees before its own; some see none."""
    sizes = (0, 70, 3, 0, 128, 33, 1)
    return [[draw.randrange(sum(LENGTHS)) for _ in range(size)] for size in sizes]


def reference_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    seen: Sequence[Sequence[int]] = ((),) * len(LENGTHS),
) -> torch.Tensor:
    """Of LENGTHS, behind the rows that each has `seen`; float64 [tokens, heads, head_dim]."""
    group = queries.shape[1] // keys.shape[1]
    parts = (queries, keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1))
    outputs = []
    for end, length, before in zip(accumulate(LENGTHS), LENGTHS, seen, strict=True):
        own = list(range(end - length, end))
        places = (own, [*before, *own], [*before, *own])
        query, key, value = (
            part[place].double().transpose(0, 1) for part, place in zip(parts, places, strict=True)
        )
        scores = scale * query @ key.transpose(1, 2)
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device)
        hidden = hidden.triu(1 + len(before))
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        outputs.append((weights @ value).transpose(0, 1))
    return torch.cat(outputs)


def check_attention(device: str, dtype: torch.dtype) -> None:
    """All layouts of heads, as slices of wider rows with NaN around them, all launches.

    Each with and without rows of other sequences before a sequence's own.
    """
    from orchestrator import attention_triton  # noqa: PLC0415  see this module's docstring

    torch.manual_seed(0)
    bounds = torch.tensor([0, *accumulate(LENGTHS)], device=device)
    for heads in LAYOUTS:
        widths = (heads.queries, heads.keys, heads.keys)
        wide = torch.full((sum(LENGTHS) + 1, sum(widths) + 1, heads.dim), float("nan"))
        wide[:-1, :-1] = torch.randn(sum(LENGTHS), sum(widths), heads.dim)
        inner = wide.to(device, dtype)[:-1]
        queries, keys, values = (
            inner[:, end - width : end]
            for end, width in zip(accumulate(widths), widths, strict=True)
        )
        seen = contexts(random.Random(heads.dim))
        places = torch.zeros(len(seen), 130, dtype=torch.int32)
        for row, of_row in zip(places, seen, strict=True):
            row[: len(of_row)] = torch.tensor(of_row, dtype=torch.int32)
        counts = torch.tensor([len(of_row) for of_row in seen], dtype=torch.int32)
        context = attention_triton.Context(counts.to(device), places.to(device))
        plain = reference_attention(queries, keys, values, scale=0.3)
        behind = reference_attention(queries, keys, values, 0.3, seen)
        for launch in (attention_triton.SHORT, attention_triton.LONG, attention_triton.FLOAT32):
            for others, expected in ((None, plain), (context, behind)):
                outputs = attention_triton.attend(
                    queries, keys, values, bounds, max(LENGTHS), 0.3, launch, others
                )
                assert outputs.dtype is dtype
                relative, absolute = TOLERANCES[dtype]
                torch.testing.assert_close(outputs.double(), expected, rtol=relative, atol=absolute)


def check_norm(device: str, dtype: torch.dtype) -> None:
    """The sum's exact bits, and the norm of these, with and without weight and bias."""
    from orchestrator import norm_triton  # noqa: PLC0415  see this module's docstring

    torch.manual_seed(0)
    for columns in COLUMNS:
        rows, update = ((3 * torch.randn(5, columns) + 2).to(device, dtype) for _ in range(2))
        weight, bias = (torch.randn(columns).to(device, dtype) for _ in range(2))
        for scales, moves in ((weight, bias), (weight, None), (None, None)):
            summed, normed = norm_triton.add_layer_norm(rows, update, scales, moves, EPS)
            assert torch.equal(summed, rows + update)
            expected = layer_norm(summed.double(), (columns,), eps=EPS)
            expected = expected if scales is None else expected * scales.double()
            expected = expected if moves is None else expected + moves.double()
            relative, absolute = TOLERANCES[dtype]
            torch.testing.assert_close(normed.double(), expected, rtol=relative, atol=absolute)


def check_log_softmax(device: str) -> None:
    """Rows of one block and of several, as slices; huge and hidden logits; NaN where it belongs."""
    from orchestrator import log_softmax_triton  # noqa: PLC0415  see this module's docstring

    torch.manual_seed(0)
    for vocabulary in VOCABULARIES:
        wide = torch.full((6, vocabulary + 5), float("nan"), device=device)
        logits = wide[:, :vocabulary]
        logits.copy_(10 * torch.randn(6, vocabulary))
        logits[1, 1:] = float("-inf")
        logits[2] += 1e4
        logits[3, 0] = 1e4
        logits[4] = -3e38
        logits[4, : vocabulary - 1] = float("-inf")  # whole blocks at the start
        logits[5, vocabulary // 2] = float("nan")
        for token in (0, vocabulary // 2, vocabulary - 1):
            tokens = torch.full((6,), token, device=device)
            found = log_softmax_triton.chosen_logprobs(logits, tokens)
            expected = logits.double().log_softmax(1)[:, token]
            assert found[5].isnan()
            torch.testing.assert_close(found[:5].double(), expected[:5], rtol=1e-6, atol=1e-4)


def check_interpreted() -> None:
    check_log_softmax("cpu")
    check_attention("cpu", torch.float32)
    check_attention("cpu", torch.float16)
    check_norm("cpu", torch.float32)
    check_norm("cpu", torch.float16)


def check_compiles() -> None:
    """For sm_90, without a device: tensor cores, and memory in vectors of 16 bytes."""
    import triton  # noqa: PLC0415  only this process may import it
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    from orchestrator import attention_triton, log_softmax_triton, norm_triton  # noqa: PLC0415

    def ptx(
        kernel: Any, types: dict[str, str], warps: int, stages: int, **constants: object
    ) -> str:
        signature = types | dict.fromkeys(constants, "constexpr")
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(kernel.arg_names)
            if types.get(name, "")[:1] in ("*", "i")
        }
        options = {"num_warps": warps, "num_stages": stages}
        source = ASTSource(kernel, signature, constants, aligned)
        return str(triton.compile(source, GPUTarget("cuda", 90, 32), options).asm["ptx"])

    types = dict.fromkeys(("queries", "keys", "values", "outputs"), "*bf16")
    types |= {"bounds": "*i64", "counts": "*i32", "places": "*i32", "scale": "fp32"}
    types |= {name: "i32" for name in attention_triton._attend.arg_names if "stride" in name}
    for launch in (attention_triton.SHORT, attention_triton.LONG):
        for (dim, padded), shared in itertools.product(
            ((128, 128), (80, 128), (64, 64)), (False, True)
        ):
            text = ptx(
                attention_triton._attend,
                types,
                launch.warps,
                launch.stages,
                HEADS=40,
                GROUP=1,
                HEAD_DIM=dim,
                PADDED_DIM=padded,
                BLOCK_ROWS=launch.rows,
                BLOCK_KEYS=launch.keys,
                HAS_CONTEXT=shared,
            )
            assert "mma" in text and "st.global.v4" in text
            assert "ld.global.v4" in text or "cp.async.cg.shared.global" in text
            assert "ld.global.b16" not in text and "st.global.b16" not in text
    types = dict.fromkeys(("rows", "update", "weight", "bias", "summed", "normed"), "*bf16")
    text = ptx(norm_triton._add_layer_norm, types | {"eps": "fp32"}, 8, 1, COLUMNS=5120, BLOCK=8192)
    assert "ld.global.v4" in text and "st.global.v4" in text
    assert "ld.global.b16" not in text and "st.global.b16" not in text
    types = {"logits": "*fp32", "tokens": "*i64", "logprobs": "*fp32"}
    types |= {"stride": "i64", "vocabulary": "i32"}
    kernel, block = log_softmax_triton._chosen_logprobs, log_softmax_triton.BLOCK
    assert "ld.global.v4" in ptx(kernel, types, log_softmax_triton.WARPS, 1, BLOCK=block)


@pytest.mark.slow
def test_kernels_are_what_they_stand_for() -> None:
    run_alone(check_interpreted, TRITON_INTERPRET="1")


def test_kernels_compile_for_cuda(tmp_path: Path) -> None:
    run_alone(check_compiles, TRITON_CACHE_DIR=str(tmp_path))
