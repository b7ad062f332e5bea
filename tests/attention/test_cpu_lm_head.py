"""The CPU's language-model head gives what TRL's head gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_models import random_model
from tiny_models import Tiny
from trl.trainer.utils import add_fused_lm_head

from cai.attention import cpu_lm_head
from cai.attention.cpu_lm_head import add_cpu_lm_head
from cai.models.loading import load_causal_lm


def batch() -> dict[str, Any]:
    """Three padded rows. Of the first two a part has labels, of the third nothing."""
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
@pytest.mark.usefixtures("pads_sizes")
def test_the_head_gives_trls_figures_and_gradients_also_where_a_model_scales_or_caps_its_logits(
    family: str, config: dict[str, Any], temperature: float
) -> None:
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
