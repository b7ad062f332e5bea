"""Rotary frequencies that depend on length: a row of a batch has those of its own length, in training too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from tiny_models import random_model

from cai.attention.rotary_rows import frequencies_change, length_dependences, use_frequencies_of_each_row

BOUND = 8
"""Tokens behind which frequencies change."""
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": BOUND,
    "short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 8.0, 2.0],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3 longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": BOUND}),
    "llama longrope": ("llama", {"rope_parameters": LONGROPE}),
    "llama dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": BOUND}),
}
LENGTHS = [13, 3, BOUND, BOUND + 1, 5, 10]


def model_of(name: str, kind: str = "AutoModelForCausalLM", **options: Any) -> Any:
    architecture, config = MODELS[name]
    shape = {"num_key_value_heads": 2, "attention_dropout": 0.0, "initializer_range": 0.3, **config, **options}
    return random_model(architecture, kind, **shape).eval()


@pytest.mark.parametrize("kind", ["AutoModelForCausalLM", "AutoModelForSequenceClassification"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_in_a_padded_batch_are_those_of_each_row_alone(name: str, kind: str) -> None:
    rows = [torch.randint(6, 64, (1, length), generator=torch.Generator().manual_seed(length)) for length in LENGTHS]
    alone, batched = model_of(name, kind, num_labels=1), model_of(name, kind, num_labels=1)
    expected = []
    for row in rows:
        alone(input_ids=torch.tensor([[7]]))  # dynamic NTK forgets the row before
        logits = alone(input_ids=row, attention_mask=torch.ones_like(row)).logits[0]
        logits.square().sum().backward()
        expected.append(logits.detach())
    ids = torch.nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None]
    use_frequencies_of_each_row(batched)
    use_frequencies_of_each_row(batched)  # which changes nothing
    logits = copy.deepcopy(batched)(input_ids=ids, attention_mask=mask.long()).logits
    for row_logits, expected_logits in zip(logits, expected, strict=True):
        torch.testing.assert_close(row_logits[: len(expected_logits)], expected_logits, atol=1e-4, rtol=1e-4)
    logits = batched(input_ids=ids, attention_mask=mask.long()).logits
    (logits[mask] if logits.dim() == 3 else logits).square().sum().backward()
    gradients = [{n: weight.grad for n, weight in model.named_parameters()} for model in (batched, alone)]
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-3)


def test_a_rotary_module_with_a_forward_pass_of_its_own_has_the_frequencies_of_each_row() -> None:
    """accelerate's hooks, among others, set `forward` of an instance."""
    ids = torch.randint(6, 64, (2, 13), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    model, hooked = model_of("llama longrope"), model_of("llama longrope")
    add_hook_to_module(hooked.model.rotary_emb, ModelHook())
    for lm in (model, hooked):
        use_frequencies_of_each_row(lm)
    expected, logits = (lm(input_ids=ids, attention_mask=mask).logits for lm in (model, hooked))
    torch.testing.assert_close(logits, expected)


def test_a_growing_text_changes_its_frequencies_once_or_with_every_token() -> None:
    changes = {
        name: [n for n in range(2, 13) if frequencies_change(length_dependences(model_of(name).config), n)]
        for name in MODELS
    }
    assert changes["phi3 longrope"] == changes["llama longrope"] == [BOUND + 1]
    assert changes["llama dynamic"] == [9, 10, 11, 12]
    assert length_dependences(random_model("gemma3_text", head_dim=8, num_key_value_heads=2).config) == []
