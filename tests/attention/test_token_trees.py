"""Micro-batches as token trees give the logits and gradients of padded ones, with fewer tokens through the model."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Tiny, random_model
from training_stages import CPU, preference, run_stage, sample

from cai.attention import token_trees
from cai.attention.token_trees import compute_shared_tokens_once
from cai.training import loop
from cai.training.metrics import read_metrics

ROWS = [[5, 9, 9, 4, 7, 8], [5, 9, 9, 4, 11], [6, 9, 9], [5, 9, 9, 4, 7, 8, 3, 3], [5]]
"""Of their 23 tokens 12 are distinct: the second differs from the first after four, the fourth continues it."""
N_DISTINCT = 12
N_PADDED = 16
"""The distinct tokens, padded to a size that is fast in bfloat16."""
N_IN_ROWS = 5 * 8
"""Tokens of the padded batch."""


def batch() -> dict[str, Any]:
    longest = max(map(len, ROWS))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in ROWS])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def record_n_tokens(model: Any) -> list[int]:
    """How many tokens the model embeds in each pass from now on."""
    n_tokens: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, ids, __: n_tokens.append(ids[0].numel()))
    return n_tokens


def logits_and_gradients(model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The logits of all tokens that are no padding, and the gradients of a loss that depends on all of them."""
    model.zero_grad()
    logits = model(**inputs).logits
    if logits.dim() == 3:
        logits = logits[inputs["attention_mask"].bool()]
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return logits.detach(), gradients


@pytest.mark.parametrize(("family", "kind", "config"), [
    ("llama", "AutoModelForCausalLM", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    ("qwen2", "AutoModelForCausalLM", {"num_key_value_heads": 2}),
    ("gpt_neox", "AutoModelForCausalLM", {}),
    ("llama", "AutoModelForSequenceClassification", {"num_labels": 1}),
])  # fmt: skip
def test_logits_and_gradients_are_unchanged(family: str, kind: str, config: dict[str, Any], pads_sizes: bool) -> None:
    model = random_model(family, kind, **config)
    expected, expected_gradients = logits_and_gradients(model, batch())
    n_tokens = record_n_tokens(model)
    with compute_shared_tokens_once([model]):
        n_tokens.clear()
        logits, gradients = logits_and_gradients(model, batch())
        assert n_tokens == [N_PADDED if pads_sizes else N_DISTINCT]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-4, rtol=1e-4)
    model(**batch())
    assert n_tokens[-1] == N_IN_ROWS, "outside of the block the model is what it was"


@pytest.mark.parametrize(("family", "config"), [
    ("llama", {"attention_dropout": 0.1}),
    ("gpt2", {"resid_pdrop": 0.1}),
    ("mistral", {"sliding_window": 4, "num_key_value_heads": 2}),
    ("mistral", {"sliding_window": 20, "num_key_value_heads": 2}),  # more than the rows here have, not than the trial's
    ("doge", {"keep_window_size": 16, "num_key_value_heads": 2, "hidden_dropout": 0.0}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}}),
    ("bloom", {}),
    ("electra", {"is_decoder": False, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
])  # fmt: skip
def test_models_with_dropout_or_another_attention_compute_rows(family: str, config: dict[str, Any]) -> None:
    model = random_model(family, **config).train()
    with compute_shared_tokens_once([model]):
        n_tokens = record_n_tokens(model)
        model(**batch())
    assert n_tokens == [N_IN_ROWS]


MASK, POSITIONS = torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([[3, 4, 5, 6, 7]])


@pytest.mark.parametrize(
    "arguments", [{"attention_mask": MASK}, {"position_ids": POSITIONS}, {"output_hidden_states": True}]
)
def test_rows_that_are_not_padded_on_the_right_are_computed_as_they_are(arguments: dict[str, Any]) -> None:
    model = random_model("llama").eval()
    inputs = {"input_ids": torch.tensor([[7, 8, 9, 10, 11]]), **arguments}
    expected = model(**inputs).logits
    with compute_shared_tokens_once([model]):
        torch.testing.assert_close(model(**inputs).logits, expected, atol=0, rtol=0)


def test_models_inside_others_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama")
    tried = []
    monkeypatch.setattr(token_trees, "_supports_token_trees", lambda body: tried.append(body) or True)
    with token_trees.compute_shared_tokens_once([torch.nn.ModuleDict({"policy": model, "same": model}), model]):
        pass
    assert tried == [model.model]


@pytest.mark.parametrize("size", [(64, 2), (256, 6)])
def test_rounding_in_bfloat16_is_no_reason_to_compute_rows(size: tuple[int, int]) -> None:
    shape = dict(zip(("hidden_size", "num_hidden_layers"), size, strict=True))
    model = random_model("llama", **shape).to(torch.bfloat16).eval()
    with compute_shared_tokens_once([model]), torch.no_grad():
        n_tokens = record_n_tokens(model)
        model(**batch())
    assert n_tokens == [N_PADDED]


@pytest.mark.parametrize("switch", ["gradient_checkpointing", "neftune"])
def test_what_a_trainer_switches_on_later_computes_rows(switch: str) -> None:
    model = random_model("llama").train()
    n_tokens = record_n_tokens(model)
    with compute_shared_tokens_once([model]):
        if switch == "neftune":
            model.get_input_embeddings().neftune_noise_alpha = 5.0
        else:
            model.gradient_checkpointing_enable()
        n_tokens.clear()
        model(**batch()).logits.sum().backward()
        assert set(n_tokens) == {N_IN_ROWS}
        model.eval()
        model(**batch())
    assert n_tokens[-1] == N_DISTINCT


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_stages_learn_the_same_from_trees_as_from_rows(
    kind: str, checkpointing: bool, tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = [preference(number, p=0.8, tags=["held_out"]) for number in range(30, 36)]
    rows = [sample(n) for n in range(12)] if kind == "sft" else [preference(n) for n in range(12)] + held_out
    profile = CPU.model_copy(update={"gradient_checkpointing": checkpointing})
    settings = {"profile": profile, "batch_size": 4, "train": {"max_steps": 3, "learning_rate": 1e-3}}
    sizes: list[tuple[int, int]] = []
    build = token_trees.TokenTree.__init__

    def spy(tree: Any, ids: Any, mask: Any, dtype: Any) -> None:
        build(tree, ids, mask, dtype)
        if ids.shape[1] > 6:  # the trial has 6 columns
            sizes.append((tree.ids.numel(), int(mask.sum())))

    monkeypatch.setattr(token_trees.TokenTree, "__init__", spy)
    run_stage(kind, tmp_path / "trees", rows, tiny("llama"), **settings)
    training_sizes = sizes[:3]
    monkeypatch.setattr(loop, "compute_shared_tokens_once", contextlib.nullcontext)
    run_stage(kind, tmp_path / "rows", rows, tiny("llama"), **settings)
    for figure, tolerance in {"loss": {"abs": 1e-5}, "grad_norm": {"rel": 1e-3}}.items():
        with_trees, with_rows = (
            [entry[figure] for entry in read_metrics(tmp_path / name) if "loss" in entry] for name in ("trees", "rows")
        )
        assert with_trees == pytest.approx(with_rows, **tolerance)
    if not checkpointing:
        assert len(training_sizes) == 3
        assert kind == "sft" or all(n_distinct < n_tokens for n_distinct, n_tokens in training_sizes)
