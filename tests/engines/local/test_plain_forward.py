"""Rows computed whole: models with recurrent and linear-attention layers, and models that padding changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_contract import completions_by_id, conversation
from local_engines import assert_same_choices, local_engine
from tiny_models import Tiny, random_model
from transformers import AutoConfig

from cai.attention.patched_attention import _named_windows
from cai.contracts.engine import Question, Request, Sampling
from cai.engines.local.local_engine import LocalEngine
from cai.engines.local.plain_forward import Padding, _batches, _decode_batch
from cai.engines.local.token_sampling import Row, TokenSampler, sample_uniforms

MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 4, "mamba_chunk_size": 8}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
RECURRENT_GEMMA = {
    "num_hidden_layers": 3, "block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 512,
    "head_dim": 8,
}  # fmt: skip
"""Its recurrent layers see padding, and keep their states outside of the cache."""
HYBRIDS: dict[str, dict[str, Any]] = {
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_5_text": LINEAR,
    "qwen3_next": {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 16},
    "granitemoehybrid": {
        **MAMBA, "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2,
        "shared_intermediate_size": 16,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention"], "head_dim": 8, "mamba_num_heads": 4,
        "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1, "chunk_size": 8, "use_mamba_kernels": False,
    },
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 32, "mamba_d_head": 8},
}  # fmt: skip
"""Architectures whose layers keep states beside, or in place of, keys and values."""
WORDS = ["sea ", "lock ", "poem "]
TEXTS = ["Hi", "B", "How deep is it?", "the sea", "Ah", *(word * n for n in (5, 12, 40) for word in WORDS)]


def tiny_engine(tiny: Tiny, architecture: str, **config: Any) -> LocalEngine:
    """An engine with a random model of that architecture. One token in eight ends a response."""
    engine = local_engine(tiny("llama"), token_budget=4096)
    vocab_size = len(engine.chat.tokenizer)
    # Rows are padded with id 0, which is no pad token here: a pad token's embedding is zero and would hide mistakes.
    shape = {"vocab_size": vocab_size, "pad_token_id": 5, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    lm = random_model(architecture, **{**shape, "initializer_range": 0.3, **config}).eval()
    engine = LocalEngine(engine.model, engine.profile, lm)
    engine.chat.end_ids = frozenset(range(0, vocab_size, 8))
    return engine


def assert_answers_are_those_of_each_alone(engine: LocalEngine, temperature: float) -> None:
    """Answers prompts of different lengths, whose responses end at different steps, together and one by one."""
    sampling = Sampling(max_new_tokens=40, temperature=temperature)
    requests = [Request(f"{n}", conversation(text), n, sampling) for n, text in enumerate(TEXTS)]
    completions = completions_by_id(engine.generate(requests), requests)
    lengths = sorted(len(completion.token_ids) for completion in completions.values())
    assert len(set(lengths)) > 2
    assert lengths[len(lengths) // 2] < lengths[-1]  # so that rows are evicted
    for request in requests:
        alone = completions_by_id(engine.generate([request]), [request])[request.id]
        assert completions[request.id].text == alone.text
        assert completions[request.id].token_ids == alone.token_ids
        assert completions[request.id].log_probs == pytest.approx(alone.log_probs, abs=1e-3)
    questions = [Question(text, conversation(text)) for text in TEXTS]
    assert_same_choices(engine.choose(questions), [next(iter(engine.choose([question]))) for question in questions])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("architecture", HYBRIDS)
def test_a_hybrid_model_samples_in_a_batch_what_it_samples_alone(
    tiny: Tiny, architecture: str, temperature: float
) -> None:
    engine = tiny_engine(tiny, architecture, **HYBRIDS[architecture])
    with pytest.warns(UserWarning, match="computes each row whole") as warnings:
        assert_answers_are_those_of_each_alone(engine, temperature)
    assert len(warnings) == 1


@pytest.mark.parametrize("architecture", ["lfm2", "recurrent_gemma"])
def test_a_model_that_padding_changes_batches_prompts_of_equal_length(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    monkeypatch.setattr("transformers.models.lfm2.modeling_lfm2.create_recurrent_attention_mask", lambda **_: None)
    engine = tiny_engine(tiny, architecture, **{**HYBRIDS, "recurrent_gemma": RECURRENT_GEMMA}[architecture])
    batch_sizes = []
    engine.lm.register_forward_hook(lambda _, __, output: batch_sizes.append(len(output.logits)))
    with pytest.warns(UserWarning, match="equal length: padding changes its logits") as warnings:
        assert_answers_are_those_of_each_alone(engine, temperature=1.0)
    assert len(warnings) == 2
    assert max(batch_sizes) > 2


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 24,
    "short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 8.0, 2.0],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.filterwarnings("ignore:.*computes each row whole")
@pytest.mark.parametrize(("architecture", "config"), [
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 24}),
    ("llama", {"rope_parameters": LONGROPE}),
    ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 24}),
], ids=["phi3 longrope", "llama longrope", "llama dynamic"])  # fmt: skip
def test_rotary_frequencies_are_those_of_each_rows_length_while_it_grows(
    tiny: Tiny, architecture: str, config: dict[str, Any]
) -> None:
    """Prompts of 16 to 58 tokens; some rows grow past the 24 at which frequencies change."""
    engine = tiny_engine(tiny, architecture, **config)
    prompts = [engine.chat.prompt_ids(conversation(text)) for text in TEXTS]
    assert min(map(len, prompts)) < 20 < 28 < max(map(len, prompts))
    assert_answers_are_those_of_each_alone(engine, temperature=0.0)
    requests = [Request(f"{n}", conversation(text), n, Sampling(12, temperature=0.0)) for n, text in enumerate(TEXTS)]
    for completion in completions_by_id(engine.generate(requests), requests).values():
        for n, log_prob in enumerate(completion.log_probs):
            ids = torch.tensor([[*completion.prompt_ids, *completion.token_ids[:n]]])
            with torch.no_grad():
                engine.lm(input_ids=torch.tensor([[7]]))  # dynamic NTK forgets longer rows
                log_probs = engine.lm(input_ids=ids).logits[0, -1].log_softmax(dim=-1)
            assert log_prob == pytest.approx(float(log_probs[completion.token_ids[n]]), abs=1e-3)


@pytest.mark.parametrize("config", [
    {"rope_parameters": LONGROPE},
    {"rope_parameters": DYNAMIC, "max_position_embeddings": 24},
], ids=["longrope", "dynamic"])  # fmt: skip
def test_a_finished_row_does_not_make_the_batch_be_computed_again(tiny: Tiny, config: dict[str, Any]) -> None:
    """The last row ends with 25 tokens, where frequencies have changed; the others end below that."""
    lm = tiny_engine(tiny, "llama", **config).lm
    rows = [Row(n, length, sample_uniforms(n, 8)) for n, length in enumerate([12, 13, 14, 15])]
    rows.append(Row(4, 22, sample_uniforms(4, 3)))
    new_tokens = []
    lm.register_forward_pre_hook(
        lambda _, __, options: new_tokens.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    prompts = [[7] * row.prompt_length for row in rows]
    finished = list(_decode_batch(lm, rows, prompts, TokenSampler(Sampling(8), frozenset()), Padding()))
    assert [row.request_index for row in finished] == [4, 0, 1, 2, 3], "a row is returned when it is finished"
    assert [len(row.token_ids) for row in rows] == [8, 8, 8, 8, 3]
    assert new_tokens == [22, *7 * [1]]


@pytest.mark.parametrize("architecture", ["bamba", "falcon_h1", "granitemoehybrid", "lfm2"])
def test_the_chunk_size_of_a_hybrids_scan_does_not_keep_lengths_apart(tiny: Tiny, architecture: str) -> None:
    """With the chunk size and the longest response that are the defaults, rows of several chunks share a batch."""
    config = {name: value for name, value in HYBRIDS[architecture].items() if name != "mamba_chunk_size"}
    engine = tiny_engine(tiny, architecture, **config)
    batch_sizes = []
    engine.lm.register_forward_hook(lambda _, __, output: batch_sizes.append(len(output.logits)))
    texts = ["Hi", "How deep is it?", "sea " * 5, "sea " * 300]
    requests = [Request(f"{n}", conversation(text), n, Sampling(256)) for n, text in enumerate(texts)]
    with pytest.warns(UserWarning, match="computes each row whole") as warnings:
        completions = completions_by_id(engine.generate(requests), requests)
    assert len(warnings) == 1
    lengths = [len(completion.prompt_ids) for completion in completions.values()]
    assert len(set(lengths)) == len(texts)
    assert min(lengths) < 256 < max(lengths)
    assert max(batch_sizes) == len(texts)
    for request in requests:
        alone = completions_by_id(engine.generate([request]), [request])[request.id]
        assert completions[request.id].token_ids == alone.token_ids
        assert completions[request.id].log_probs == pytest.approx(alone.log_probs, abs=1e-3)


@pytest.mark.parametrize(
    ("architecture", "windows"),
    [
        *((name, []) for name in ("bamba", "falcon_h1", "granitemoehybrid", "lfm2", "mamba2", "minimax", "qwen3")),
        *(("gpt_neo", [256]), ("doge", [2048]), ("deepseek_v32", [2048]), ("minimax_m3_vl_text", [])),
        *(("llama4_text", [8192]), ("mistral", [4096]), ("recurrent_gemma", [2048]), ("modernbert-decoder", [128, 64])),
    ],
)
def test_windows_are_what_limits_attention(architecture: str, windows: list[int]) -> None:
    config = AutoConfig.for_model(architecture)
    config.max_position_embeddings = 1 << 20
    assert list(_named_windows(config).values()) == windows


def test_sparse_layers_select_a_number_of_blocks() -> None:
    options = {"index_topk_blocks": 16, "index_block_size": 64}
    config = AutoConfig.for_model(
        "minimax_m3_vl_text", num_hidden_layers=1, layer_types=["minimax_m3_sparse"], **options
    )
    assert list(_named_windows(config).values()) == [16 * 64]


def test_rows_longer_than_a_window_that_no_trial_reaches_are_not_padded(tiny: Tiny) -> None:
    engine = tiny_engine(tiny, "doge", keep_window_size=2048)
    with pytest.warns(UserWarning, match=r"only prompts of equal length where .* more than 2048 tokens"):
        assert engine._padding.longest_row == 2048
    prompts = [[7] * length for length in (5, 2050, 9, 2049, 2050)]
    assert list(_batches(prompts, 0, 1 << 20, engine._padding)) == [[0, 2], [3], [1, 4]]
    assert tiny_engine(tiny, "mistral", sliding_window=2048)._padding.longest_row == float("inf")
