"""Which models share prefixes, and which have to compute each row whole."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from architectures import build_causal_lm
from engine_contract import conversation
from local_engines import assert_same_choices, judge_questions, local_engine, with_and_without_shared_prefixes
from tiny_models import Tiny

from cai.attention import prefill as prefill_module
from cai.attention.prefill import find_sharing_obstacle, prefill
from cai.contracts.engine import Request, Sampling
from cai.contracts.model import Model
from cai.models.loading import load_causal_lm
from cai.text.errors import BadInput

SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}


def test_a_model_with_another_attention_computes_each_row_whole(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load_causal_lm(tiny("llama"))
    lm.set_attn_implementation("eager")
    assert find_sharing_obstacle(lm) is None
    attention = type(lm.model.layers[0].self_attn)
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda self, *args, **rest: forward(self, *args, softcap=3.0, **rest))
    assert "its attention has 'softcap'" in str(find_sharing_obstacle(lm))


def test_a_model_that_ignores_positions_computes_each_row_whole(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load_causal_lm(tiny("llama"))
    forward = type(lm).forward

    def from_zero(self: torch.nn.Module, position_ids: torch.Tensor | None = None, **rest: object) -> object:
        return forward(self, **rest)

    from_zero.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(lm), "forward", from_zero)
    assert "changes its logits" in str(find_sharing_obstacle(lm))


def test_a_model_with_sliding_windows_computes_each_row_whole() -> None:
    config = transformers.Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert "sliding" in str(find_sharing_obstacle(transformers.Qwen2ForCausalLM(config)))


@pytest.mark.parametrize(("window", "reason"), [(32, "changes its logits"), (200, r"200 tokens \(sliding_window\)")])
@pytest.mark.parametrize("architecture", ["Mistral", "Starcoder2", "Phi3"])
def test_a_window_that_no_layer_type_tells_is_kept(tmp_path: Path, architecture: str, window: int, reason: str) -> None:
    """A short one shows in the trial, which is longer; a long one is taken from the config."""
    tokenizer = tiny_models.build_tokenizer("llama")
    shape = {**SHAPE, "vocab_size": len(tokenizer), "num_key_value_heads": 2, "initializer_range": 0.3}
    shape |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 4096}
    config = getattr(transformers, f"{architecture}Config")(**shape, sliding_window=window)
    torch.manual_seed(0)
    getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = Model(architecture, str(tmp_path))
    engine, row_by_row = with_and_without_shared_prefixes(model, token_budget=2048)
    with pytest.warns(UserWarning, match=reason) as warnings:
        results = [list(engine.choose(judge_questions(2))) for _ in range(2)]
    assert len(warnings) == 1
    assert_same_choices(results[0], row_by_row.choose(judge_questions(2)))
    assert_same_choices(results[1], results[0])


def test_a_window_that_is_off_or_never_full_keeps_nothing_from_sharing() -> None:
    shape = {**SHAPE, "max_position_embeddings": 64, "num_key_value_heads": 2}
    for window in (None, 64):
        config = transformers.MistralConfig(**shape, sliding_window=window)
        assert find_sharing_obstacle(transformers.MistralForCausalLM(config)) is None
    unused = transformers.Qwen2Config(**shape, use_sliding_window=False, sliding_window=4)
    assert find_sharing_obstacle(transformers.Qwen2ForCausalLM(unused)) is None


def test_rotary_positions_that_depend_on_the_longest_row_are_not_shared() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = transformers.LlamaConfig(**SHAPE, rope_parameters=rope, max_position_embeddings=64)
    assert "depend on the length" in str(find_sharing_obstacle(transformers.LlamaForCausalLM(config)))


@pytest.mark.parametrize(("architecture", "config", "reason"), [
    ("doge", {"keep_window_size": 16}, "has a mask of its own"),
    ("doge", {"keep_window_size": 2048}, r"2048 tokens \(keep_window_size\)"),
    ("openai-gpt", {}, "none that can be replaced"),
])  # fmt: skip
def test_attention_that_is_more_than_keys_and_values_is_not_shared(
    architecture: str, config: dict[str, int], reason: str
) -> None:
    """With random weights these masks change nothing, or so little that it could be rounding."""
    assert re.search(reason, str(find_sharing_obstacle(build_causal_lm(architecture, 64, **config))))


def test_a_model_that_keeps_states_is_refused_in_one_sentence(tmp_path: Path) -> None:
    tokenizer = tiny_models.build_tokenizer("llama")
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=len(tokenizer), state_size=4)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = local_engine(Model("mamba", str(tmp_path)))
    with pytest.warns(UserWarning, match="computes each row whole"), pytest.raises(BadInput, match="takes no cache"):
        list(engine.generate([Request("a", conversation("a"), 0, Sampling(4))]))


@pytest.mark.parametrize("architecture", ["Qwen3", "Mixtral", "Phi3", "OPT", "Cohere", "DeepseekV3"])
def test_attention_of_many_kinds_can_be_shared(architecture: str) -> None:
    shape = {**SHAPE, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0, "head_dim": 8}
    shape |= {"num_local_experts": 2, "ffn_dim": 16, "word_embed_proj_dim": 16}
    shape |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 10}
    shape |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    if architecture == "DeepseekV3":
        shape |= {"head_dim": 4}
    config = getattr(transformers, f"{architecture}Config")(**shape)
    torch.manual_seed(0)
    assert find_sharing_obstacle(getattr(transformers, f"{architecture}ForCausalLM")(config).eval()) is None


def test_a_model_that_takes_no_other_attention_is_found_out() -> None:
    config = transformers.GPTJConfig(n_embd=16, n_layer=2, n_head=2, rotary_dim=4, vocab_size=64, initializer_range=0.3)
    torch.manual_seed(0)
    assert "none that can be replaced" in str(find_sharing_obstacle(transformers.GPTJForCausalLM(config).eval()))


def test_a_model_with_eager_attention_shares_and_is_left_as_it_was(tiny: Tiny) -> None:
    lm = load_causal_lm(tiny("qwen2"))
    lm.set_attn_implementation("eager")
    assert find_sharing_obstacle(lm) is None
    assert lm.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_bfloat16_models_share_too(tiny: Tiny, family: str) -> None:
    assert find_sharing_obstacle(load_causal_lm(tiny(family), "bfloat16")) is None


def test_fused_attention_gets_contiguous_inputs(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch computes attention with keys whose last dimension is not contiguous in many steps."""
    fused, strides = prefill_module.scaled_dot_product_attention, []

    def spy(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> Any:
        strides.extend(tensor.stride(-1) for tensor in (query, key, value))
        return fused(query, key, value, *rest, **options)

    monkeypatch.setattr(prefill_module, "scaled_dot_product_attention", spy)
    model = load_causal_lm(tiny("llama"))
    prefixes = prefill(model, [[5, 6, 7, 8], [9, 10]])[1]()
    n_strides = len(strides)
    prefill(model, [[3] * 200, [4] * 150], prefixes, [0, 1])
    assert len(strides) > n_strides > 0
    assert set(strides) == {1}
