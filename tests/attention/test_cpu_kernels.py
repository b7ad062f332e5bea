"""The CPU's ways of computing attention and log-probabilities give what the libraries' own give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cai.contracts.model import Model
from cai.models.loading import load_causal_lm

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

SIZE = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def model_of(family: str, **config: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZE, **config)).eval()


def batch() -> dict[str, Any]:
    """Three padded rows. Of the first two a part is learned, of the third nothing."""
    ids = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([12, 9, 5])
    mask = (torch.arange(12) < lengths[:, None]).long()
    labels = ids.masked_fill((mask == 0) | (torch.arange(12) < 4), -100)
    labels[2] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels, "fused_lm_head": True}


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("gpt_neox", {}),
        ("gemma2", {"final_logit_softcapping": 0.1, "num_key_value_heads": 1, "head_dim": 16}),
        ("cohere", {"logit_scale": 3.0}),
        ("granite", {"logits_scaling": 0.25}),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_head_gives_trls_figures_and_gradients_also_where_a_model_scales_or_caps_its_logits(
    family: str, config: dict[str, Any], temperature: float, pad_to_multiple: bool
) -> None:
    from trl.trainer.utils import add_fused_lm_head

    from cai.attention.cpu_kernels import add_lm_head

    model = model_of(family, **config)
    add_fused_lm_head(model, temperature, outputs=("log_probs", "entropy", "is_top1"))
    weights = torch.randn(3, 11, generator=torch.Generator().manual_seed(2))
    results = []
    for add in (lambda model: None, lambda model: add_lm_head(model, entropy=True, temperature=temperature)):
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


def test_only_learned_tokens_reach_the_head_and_plain_calls_are_what_they_were(
    tiny: Callable[..., Model], pad_to_multiple: bool
) -> None:
    from trl.trainer.utils import add_fused_lm_head

    from cai.attention.cpu_kernels import add_lm_head

    model = load_causal_lm(tiny("llama"))
    inputs = {name: value for name, value in batch().items() if name not in {"labels", "fused_lm_head"}}
    plain = model(**inputs).logits
    add_fused_lm_head(model)
    add_lm_head(model)
    shapes: list[tuple[int, ...]] = []
    model.get_output_embeddings().register_forward_hook(lambda _, hidden, __: shapes.append(tuple(hidden[0].shape)))
    model(**batch())
    torch.testing.assert_close(model(**inputs).logits, plain, atol=0, rtol=0)
    assert shapes == [(16 if pad_to_multiple else 13, 32), (3, 12, 32)]


def test_a_large_vocabulary_keeps_trls_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from cai.attention import cpu_kernels

    model = model_of("llama")
    before = model.forward
    monkeypatch.setattr(cpu_kernels, "LARGEST_VOCABULARY", 63)
    cpu_kernels.add_lm_head(model)
    assert model.forward == before


def test_attention_is_computed_in_float32_inside_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from cai.attention.cpu_kernels import float32_attention

    attention = torch.nn.functional.scaled_dot_product_attention
    seen = []

    def spy(*args: Any, **options: Any) -> Any:
        seen.append({tensor.dtype for tensor in args} | {torch.is_autocast_enabled("cpu")})
        return attention(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model = model_of("llama")
    inputs = {name: value for name, value in batch().items() if name not in {"labels", "fused_lm_head"}}
    with torch.autocast("cpu", torch.bfloat16):
        before = model(**inputs).logits
        with float32_attention(torch.device("cpu")):
            inside = model(**inputs).logits
        after = model(**inputs).logits
    assert seen[2:4] == [{torch.float32, False}] * 2
    assert all(True in call for call in seen[:2] + seen[4:])
    torch.testing.assert_close(before, after, atol=0, rtol=0)
    torch.testing.assert_close(inside, before, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(("most", "dtype"), [(2**24, "float32"), (2**24, "bfloat16"), (8, "bfloat16")])
@pytest.mark.parametrize(("kv_heads", "width"), [(4, 8), (2, 8), (4, 6)])
def test_causal_attention_is_attention_whichever_way_is_taken(
    most: int, dtype: str, kv_heads: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cai.attention import cpu_kernels
    from cai.attention.cpu_kernels import causal_attention

    fused, calls = cpu_kernels.scaled_dot_product_attention, []
    spied = lambda *args, **options: (calls.append(args), fused(*args, **options))[1]  # noqa: E731
    monkeypatch.setattr(cpu_kernels, "scaled_dot_product_attention", spied)
    monkeypatch.setattr(cpu_kernels, "MOST_SCORES", most)
    torch.manual_seed(0)
    length = 12
    shapes = [(3, 4, length, 8), (3, kv_heads, length, 8), (3, kv_heads, length, width)]
    given = [torch.randn(shape).to(getattr(torch, dtype)).requires_grad_() for shape in shapes]
    exact = [each.detach().double().requires_grad_() for each in given]
    with torch.autocast("cpu", torch.bfloat16):
        found = causal_attention(0.5, *given)
    assert found.dtype == given[0].dtype
    assert bool(calls) is (dtype == "float32" or most == 8)
    query, key, value = exact[0], *(each.repeat_interleave(4 // kv_heads, dim=1) for each in exact[1:])
    scores = (0.5 * query @ key.transpose(2, 3)).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    expected = scores.softmax(dim=-1) @ value
    weights = torch.randn(found.shape)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == "float32" else {"atol": 0.06, "rtol": 0.05}
    torch.testing.assert_close(found.double(), expected, **close)
    for ours, theirs in zip(given, exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, **close)
