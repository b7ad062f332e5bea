"""Attention that is computed another way on CPUs gives what torch's own attention gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_models import random_model

from cai.attention import cpu_tuning
from cai.attention.cpu_tuning import float32_attention


def test_attention_is_computed_in_float32_inside_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = torch.nn.functional.scaled_dot_product_attention
    calls = []

    def spy(*args: Any, **options: Any) -> Any:
        calls.append({tensor.dtype for tensor in args} | {torch.is_autocast_enabled("cpu")})
        return attention(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model = random_model("llama").eval()
    ids = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(12) < torch.tensor([[12], [9], [5]])).long()}
    with torch.autocast("cpu", torch.bfloat16):
        before = model(**inputs).logits
        with float32_attention(torch.device("cpu")):
            inside = model(**inputs).logits
        after = model(**inputs).logits
    assert calls[2:4] == [{torch.float32, False}] * 2
    assert all(True in call for call in calls[:2] + calls[4:])
    torch.testing.assert_close(before, after, atol=0, rtol=0)
    torch.testing.assert_close(inside, before, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(("max_scores", "dtype"), [(2**24, "float32"), (2**24, "bfloat16"), (8, "bfloat16")])
@pytest.mark.parametrize(("kv_heads", "width"), [(4, 8), (2, 8), (4, 6)])
def test_causal_attention_is_attention_whichever_way_is_taken(
    max_scores: int, dtype: str, kv_heads: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, calls = cpu_tuning.scaled_dot_product_attention, []
    spy = lambda *args, **options: (calls.append(args), fused(*args, **options))[1]  # noqa: E731
    monkeypatch.setattr(cpu_tuning, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(cpu_tuning, "MAX_KEPT_SCORES", max_scores)
    torch.manual_seed(0)
    length = 12
    shapes = [(3, 4, length, 8), (3, kv_heads, length, 8), (3, kv_heads, length, width)]
    inputs = [torch.randn(shape).to(getattr(torch, dtype)).requires_grad_() for shape in shapes]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        out = cpu_tuning.causal_attention(0.5, *inputs)
    assert out.dtype == inputs[0].dtype
    assert bool(calls) is (dtype == "float32" or max_scores == 8)
    query, (key, value) = (
        exact_inputs[0],
        (tensor.repeat_interleave(4 // kv_heads, dim=1) for tensor in exact_inputs[1:]),
    )
    scores = (0.5 * query @ key.transpose(2, 3)).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    expected = scores.softmax(dim=-1) @ value
    weights = torch.randn(out.shape)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == "float32" else {"atol": 0.06, "rtol": 0.05}
    torch.testing.assert_close(out.double(), expected, **close)
    for tensor, exact in zip(inputs, exact_inputs, strict=True):
        torch.testing.assert_close(tensor.grad.double(), exact.grad, **close)
