"""Micro-batches read as trees give the values and gradients of padded ones, with fewer tokens through the model."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

SIZE = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROWS = [[5, 9, 9, 4, 7, 8], [5, 9, 9, 4, 11], [6, 9, 9], [5, 9, 9, 4, 7, 8, 3, 3], [5]]
"""Of their 23 tokens 12 are distinct: the second parts from the first after four, the fourth goes on from it."""
DISTINCT = 12


def model_of(family: str, kind: str = "AutoModelForCausalLM", **config: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, kind).from_config(transformers.AutoConfig.for_model(family, **SIZE, **config))


def batch(rows: list[list[int]] = ROWS) -> dict[str, Any]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def tokens_of(model: Any) -> list[int]:
    """How many tokens the model embeds in each pass from now on."""
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, ids, __: seen.append(ids[0].numel()))
    return seen


def learned(model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What a model says of the tokens that are there, and the gradients of something that depends on all of it."""
    model.zero_grad()
    logits = model(**inputs).logits
    there = logits[inputs["attention_mask"].bool()] if logits.dim() == 3 else logits
    (there * torch.linspace(-1, 1, there.numel()).view_as(there)).sum().backward()
    return there.detach(), {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize(
    ("family", "kind", "config"),
    [
        ("llama", "AutoModelForCausalLM", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
        ("qwen2", "AutoModelForCausalLM", {"num_key_value_heads": 2}),
        ("gpt_neox", "AutoModelForCausalLM", {}),
        ("llama", "AutoModelForSequenceClassification", {"num_labels": 1}),
    ],
)
def test_values_and_gradients_are_those_of_the_padded_batch(family: str, kind: str, config: dict[str, Any]) -> None:
    from cai.token_trees import each_token_once

    model = model_of(family, kind, **config)
    expected, gradients = learned(model, batch())
    seen = tokens_of(model)
    with each_token_once([model]):
        seen.clear()
        found, found_gradients = learned(model, batch())
        assert seen == [DISTINCT]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found_gradients, gradients, atol=1e-4, rtol=1e-4)
    model(**batch())
    assert seen[-1] == 5 * 8, "outside of the block the model is what it was"


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"attention_dropout": 0.1}),
        ("gpt2", {"resid_pdrop": 0.1}),
        ("mistral", {"sliding_window": 4, "num_key_value_heads": 2}),
        ("bloom", {}),
    ],
)
def test_models_that_drop_at_random_or_attend_otherwise_read_rows(family: str, config: dict[str, Any]) -> None:
    from cai.token_trees import each_token_once

    model = model_of(family, **config).train()
    with each_token_once([model]):
        seen = tokens_of(model)
        model(**batch())
    assert seen == [5 * 8]


@pytest.mark.parametrize(
    "otherwise",
    [
        {"attention_mask": torch.tensor([[0, 0, 1, 1, 1]])},
        {"position_ids": torch.tensor([[3, 4, 5, 6, 7]])},
        {"output_hidden_states": True},
    ],
)
def test_rows_that_are_not_padded_on_the_right_are_read_as_they_are(otherwise: dict[str, Any]) -> None:
    from cai.token_trees import each_token_once

    model = model_of("llama").eval()
    inputs = {"input_ids": torch.tensor([[7, 8, 9, 10, 11]]), **otherwise}
    expected = model(**inputs).logits
    with each_token_once([model]):
        torch.testing.assert_close(model(**inputs).logits, expected, atol=0, rtol=0)


def test_models_inside_others_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from cai import token_trees

    model = model_of("llama")
    tried = []
    monkeypatch.setattr(token_trees, "_agrees", lambda body: tried.append(body) or True)
    with token_trees.each_token_once([torch.nn.ModuleDict({"policy": model, "same": model}), model]):
        pass
    assert tried == [model.model]
