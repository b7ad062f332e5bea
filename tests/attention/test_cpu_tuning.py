"""What is computed another way on CPUs gives what torch's own attention and TRL's language-model head give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import Tiny, random_model
from trl.trainer.utils import add_fused_lm_head

from cai.attention import cpu_lm_head, cpu_tuning
from cai.attention.cpu_lm_head import add_cpu_lm_head
from cai.attention.cpu_tuning import float32_attention
from cai.models.loading import load_causal_lm


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
    query = exact_inputs[0]
    key, value = (tensor.repeat_interleave(4 // kv_heads, dim=1) for tensor in exact_inputs[1:])
    scores = (0.5 * query @ key.transpose(2, 3)).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    expected = scores.softmax(dim=-1) @ value
    weights = torch.randn(out.shape)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == "float32" else {"atol": 0.06, "rtol": 0.05}
    torch.testing.assert_close(out.double(), expected, **close)
    for tensor, exact in zip(inputs, exact_inputs, strict=True):
        torch.testing.assert_close(tensor.grad.double(), exact.grad, **close)


def batch() -> dict[str, Any]:
    """Three padded rows. Of the first two a part has labels, of the third nothing."""
    ids = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([12, 9, 5])
    mask = (torch.arange(12) < lengths[:, None]).long()
    labels = ids.masked_fill((mask == 0) | (torch.arange(12) < 4), -100)
    labels[2] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels, "fused_lm_head": True}


@pytest.mark.parametrize(("family", "config"), [
    ("llama", {"tie_word_embeddings": True}),
    ("gpt_neox", {}),
    ("gemma2", {"final_logit_softcapping": 0.1, "num_key_value_heads": 1, "head_dim": 16}),
    ("cohere", {"logit_scale": 3.0}),
    ("granite", {"logits_scaling": 0.25}),
])  # fmt: skip
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.usefixtures("pads_sizes")
def test_the_head_gives_trls_figures_and_gradients(family: str, config: dict[str, Any], temperature: float) -> None:
    model = random_model(family, **config).eval()
    add_fused_lm_head(model, temperature, outputs=("log_probs", "entropy", "is_top1"))
    weights = torch.randn(3, 11, generator=torch.Generator().manual_seed(2))
    results = []
    for add in (lambda model: None, lambda model: add_cpu_lm_head(model, entropy=True, temperature=temperature)):
        add(model)
        model.zero_grad()
        outputs = model(**batch())
        (outputs.log_probs * weights).sum().backward()
        results.append((outputs, {name: weight.grad.clone() for name, weight in model.named_parameters()}))
    (theirs, their_gradients), (ours, our_gradients) = results
    assert (ours.log_probs[:2] < 0).sum() == 8 + 5
    for name in ("log_probs", "entropy", "is_top1", "label_mask"):
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_gradients, their_gradients, atol=1e-5, rtol=1e-4)


def test_only_labelled_tokens_reach_the_head_and_plain_calls_are_what_they_were(tiny: Tiny, pads_sizes: bool) -> None:
    model = load_causal_lm(tiny("llama"))
    inputs = {name: value for name, value in batch().items() if name not in {"labels", "fused_lm_head"}}
    plain = model(**inputs).logits
    add_fused_lm_head(model)
    add_cpu_lm_head(model)
    shapes: list[tuple[int, ...]] = []
    model.get_output_embeddings().register_forward_hook(lambda _, hidden, __: shapes.append(tuple(hidden[0].shape)))
    model(**batch())
    torch.testing.assert_close(model(**inputs).logits, plain, atol=0, rtol=0)
    assert shapes == [(16 if pads_sizes else 13, 32), (3, 12, 32)]


def test_a_large_vocabulary_keeps_trls_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama")
    forward = model.forward
    monkeypatch.setattr(cpu_lm_head, "MAX_VOCABULARY", 63)
    cpu_lm_head.add_cpu_lm_head(model)
    assert model.forward == forward
