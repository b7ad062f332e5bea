"""Micro-batches read as trees give the values and gradients of padded ones, with fewer tokens through the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_stages import CPU, preference, run_stage, sample

from cai.contracts.model import Model
from cai.training import loop
from cai.training.metrics import read_metrics

torch = pytest.importorskip("torch")

SIZE = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROWS = [[5, 9, 9, 4, 7, 8], [5, 9, 9, 4, 11], [6, 9, 9], [5, 9, 9, 4, 7, 8, 3, 3], [5]]
"""Of their 23 tokens 12 are distinct: the second parts from the first after four, the fourth goes on from it."""
DISTINCT = 12
ROUNDED = 16
"""Tokens that are computed where few sizes are best."""


def model_of(family: str, kind: str = "AutoModelForCausalLM", **config: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, kind).from_config(transformers.AutoConfig.for_model(family, **{**SIZE, **config}))


def batch() -> dict[str, Any]:
    longest = max(map(len, ROWS))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in ROWS])
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
def test_values_and_gradients_are_those_of_the_padded_batch(
    family: str, kind: str, config: dict[str, Any], pad_to_multiple: bool
) -> None:
    from cai.attention.token_trees import each_token_once

    model = model_of(family, kind, **config)
    expected, gradients = learned(model, batch())
    seen = tokens_of(model)
    with each_token_once([model]):
        seen.clear()
        found, found_gradients = learned(model, batch())
        assert seen == [ROUNDED if pad_to_multiple else DISTINCT]
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
        ("electra", {"is_decoder": False, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    ],
)
def test_models_that_drop_at_random_or_attend_otherwise_read_rows(family: str, config: dict[str, Any]) -> None:
    from cai.attention.token_trees import each_token_once

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
    from cai.attention.token_trees import each_token_once

    model = model_of("llama").eval()
    inputs = {"input_ids": torch.tensor([[7, 8, 9, 10, 11]]), **otherwise}
    expected = model(**inputs).logits
    with each_token_once([model]):
        torch.testing.assert_close(model(**inputs).logits, expected, atol=0, rtol=0)


def test_models_inside_others_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from cai.attention import token_trees

    model = model_of("llama")
    tried = []
    monkeypatch.setattr(token_trees, "_agrees", lambda body: tried.append(body) or True)
    with token_trees.each_token_once([torch.nn.ModuleDict({"policy": model, "same": model}), model]):
        pass
    assert tried == [model.model]


@pytest.mark.parametrize("size", [(64, 2), (256, 6)])
def test_rounding_in_bfloat16_is_no_reason_to_read_rows(size: tuple[int, int]) -> None:
    from cai.attention.token_trees import each_token_once

    shape = dict(zip(("hidden_size", "num_hidden_layers"), size, strict=True))
    model = model_of("llama", **shape).to(torch.bfloat16).eval()
    with each_token_once([model]), torch.no_grad():
        seen = tokens_of(model)
        model(**batch())
    assert seen == [ROUNDED]


@pytest.mark.parametrize("switch", ["gradient_checkpointing", "neftune"])
def test_what_a_trainer_switches_on_later_reads_rows(switch: str) -> None:
    from cai.attention.token_trees import each_token_once

    model = model_of("llama").train()
    seen = tokens_of(model)
    with each_token_once([model]):
        if switch == "neftune":
            model.get_input_embeddings().neftune_noise_alpha = 5.0
        else:
            model.gradient_checkpointing_enable()
        seen.clear()
        model(**batch()).logits.sum().backward()
        assert set(seen) == {5 * 8}
        model.eval()
        model(**batch())
    assert seen[-1] == DISTINCT


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_stages_learn_the_same_from_trees_as_from_rows(
    kind: str, checkpointing: bool, tmp_path: Path, tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cai.attention import token_trees

    held_out = [preference(number, p=0.8, tags=["held_out"]) for number in range(30, 36)]
    rows = [sample(n) for n in range(12)] if kind == "sft" else [preference(n) for n in range(12)] + held_out
    profile = CPU.model_copy(update={"gradient_checkpointing": checkpointing})
    settings = {"profile": profile, "batch_size": 4, "train": {"max_steps": 3, "learning_rate": 1e-3}}
    sizes: list[tuple[int, int]] = []
    build = token_trees.Tree.__init__

    def spy(tree: Any, ids: Any, mask: Any, dtype: Any) -> None:
        build(tree, ids, mask, dtype)
        if ids.shape[1] > 6:  # no trial
            sizes.append((tree.ids.numel(), int(mask.sum())))

    monkeypatch.setattr(token_trees.Tree, "__init__", spy)
    run_stage(kind, tmp_path / "trees", rows, tiny("llama"), **settings)
    learned_from = sizes[:3]
    monkeypatch.setattr(loop, "each_token_once", lambda models: contextlib.nullcontext())
    run_stage(kind, tmp_path / "rows", rows, tiny("llama"), **settings)
    trees, plain = ([e for e in read_metrics(tmp_path / name) if "loss" in e] for name in ("trees", "rows"))
    assert [each["loss"] for each in trees] == pytest.approx([each["loss"] for each in plain], abs=1e-5)
    assert [each["grad_norm"] for each in trees] == pytest.approx([each["grad_norm"] for each in plain], rel=1e-3)
    if not checkpointing:
        assert len(learned_from) == 3
        assert kind == "sft" or all(distinct < tokens for distinct, tokens in learned_from)
