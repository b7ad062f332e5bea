"""Every architecture of transformers that a small model can be built of scores and samples what each row has alone.

A row alone is a forward pass over it without cache, padding or company: the model as transformers has it.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from architectures import build_causal_lm
from engine_contract import conversation
from local_engines import local_engine
from tiny_models import Tiny
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cai.contracts.engine import Choice, Completion, Question, Request, Sampling
from cai.engines.local.local_engine import LocalEngine
from cai.text.errors import BadInput

SHARES_PREFIXES = """
apertus arcee aria_text axk1 bert bert-generation biogpt bitnet cohere ctrl deepseek_v2 deepseek_v3 dots1 electra ernie
ernie4_5 ernie4_5_moe flex_olmo gemma glm glm4 glm4_moe glm4_moe_lite gpt-sw3 gpt2 gpt_bigcode gpt_neox granite
granitemoe granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe
laguna llama longcat_flash mellum minicpm3 minimax_m2 minimax_m3_vl_text ministral3 mistral mixtral nanochat nemotron
olmo olmo2 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe roc_bert seed_oss smollm3 solar_open
stablelm starcoder2 youtu
"""
"""Architectures whose attention can be replaced. One that leaves this list has become several times slower."""
TAKES_PADDING = """
afmoe axk2 bamba beam big_bird bloom codegen cohere2 cohere2_moe cwm deepseek_v32 diffllama doge dots3_note_text exaone4
exaone_moe falcon falcon_h1 flint gemma2 gemma3_text gemma3n_text gemma4_text gemma4_unified_text glm_moe_dsa gpt_neo
gpt_neox_japanese gpt_oss gptj granite_swa granitemoe_swa granitemoehybrid hrm_text hy_v4 jamba kolibri1 lfm2 lfm2_moe
lfm3 llama4_text megatron-bert mimo_v2_flash ministral modernbert-decoder moshi mpt nemotron_h olmo3 olmo_hybrid
qwen3_5_moe_text qwen3_5_text qwen3_next rembert roformer vaultgemma xglm
"""
"""Each row is computed whole; rows of different lengths share batches."""
TAKES_EQUAL_LENGTHS = """
bart bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text marian mbart mvp pegasus plbart recurrent_gemma
roberta roberta-prelayernorm trocr xlm-roberta xlm-roberta-xl
"""
"""Padding, or positions that begin at 0, would change their logits."""
TAKES_NO_CACHE = "cpmant falcon_mamba mamba mamba2 minimax openai-gpt reformer rwkv xlm xlnet xlstm"
"""They score, and sampling is refused in one sentence."""
COMPOSITES = "dots3_note gemma3 gemma3n gemma4 gemma4_unified llama4 qwen3_5 qwen3_5_moe"
NOT_BUILT = {
    **dict.fromkeys(COMPOSITES.split(), "its text model is an architecture of its own"),
    **dict.fromkeys(
        ("cohere_compass_text", "gemma4_assistant", "gemma4_unified_assistant", "qwen4_exp", "qwen4_exp_text", "zamba",
         "zamba2", "zaya"),
        "its config checks its sizes against each other",
    ),
    **dict.fromkeys(
        ("blt", "emu3", "fuyu", "git", "got_ocr2", "mllama", "moss_transcribe_diarize", "musicgen", "musicgen_melody",
         "phi4_multimodal", "whisper"),
        "its config consists of those of several models, with images, sound or patches of bytes",
    ),
    "dbrx": "its default config has no rotary base (transformers 5.23)",
    "deepseek_v4": "5 million parameters at its smallest",
    "xmod": "it computes only texts whose language it is told",
    **dict.fromkeys(
        ("bailing_hybrid", "inkling_text", "inkling2_text", "kimi_linear", "prophetnet"),
        "it takes more than 4 seconds, without its kernels for GPUs",
    ),
}  # fmt: skip
"""Why no model of these architectures is tried here."""
TOLERANCE = {"nemotron_h": 1e-2, "hrm_text": 1e-3}
"""Nats; 1e-4 elsewhere. These round more."""
WAYS = {
    **dict.fromkeys(SHARES_PREFIXES.split(), "shares prefixes"),
    **dict.fromkeys(TAKES_PADDING.split(), "takes padding"),
    **dict.fromkeys(TAKES_EQUAL_LENGTHS.split(), "takes equal lengths"),
    **dict.fromkeys(TAKES_NO_CACHE.split(), "takes no cache"),
}
TEXTS = ["Hi", "B", "How deep is it?", "the sea", "sea " * 5, "lock " * 12, "poem " * 12, "sea " * 12, "lock " * 30]


def test_every_causal_architecture_is_tried_or_has_a_reason() -> None:
    assert not set(WAYS) & set(NOT_BUILT)
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) == set(WAYS) | set(NOT_BUILT)
    assert len(WAYS) > 140


@pytest.mark.parametrize("architecture", WAYS)
def test_scores_and_greedy_texts_in_a_batch_are_those_of_each_row_alone(tiny: Tiny, architecture: str) -> None:
    engine = _engine(tiny, architecture)
    tolerance = TOLERANCE.get(architecture, 1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the ways that are slower are announced
        way = WAYS[architecture]
        if way == "takes no cache":
            with pytest.raises(BadInput, match=r"cannot sample from .* takes? no cache.*engines `vllm` and `server`"):
                list(engine.generate([_request(0)]))
        else:
            assert _way(engine) == way
            _assert_texts_are_those_of_each_row_alone(engine, tolerance)
        _assert_scores_are_those_of_each_row_alone(engine, tolerance)


def _engine(tiny: Tiny, architecture: str) -> LocalEngine:
    """An engine with a random model of that architecture, in which one token in eight ends a response."""
    engine = local_engine(tiny("llama"), token_budget=4096)
    vocab_size = len(engine.chat.tokenizer)
    engine._use(build_causal_lm(architecture, vocab_size, use_cache=False))  # where nobody asks for a cache
    engine.chat.end_ids = frozenset(range(0, vocab_size, 8))
    return engine


def _way(engine: LocalEngine) -> str:
    if engine._shares_prefixes:
        return "shares prefixes"
    return "takes equal lengths" if engine._padding.obstacle else "takes padding"


def _request(number: int) -> Request:
    return Request(f"{number}", conversation(TEXTS[number]), number, Sampling(10, temperature=0.0))


def _assert_texts_are_those_of_each_row_alone(engine: LocalEngine, tolerance: float) -> None:
    completions = list(engine.generate([_request(number) for number in range(len(TEXTS))]))
    assert len(completions) == len(TEXTS)
    for completion in completions:
        assert isinstance(completion, Completion)
        log_probs = _log_probs_alone(engine, [*completion.prompt_ids, *completion.token_ids])
        log_probs = log_probs[len(completion.prompt_ids) - 1 : -1]
        expected = log_probs[range(len(completion.token_ids)), completion.token_ids]
        assert completion.log_probs == pytest.approx(expected.tolist(), abs=tolerance)
        log_probs[:, engine.chat.pad_id] = -torch.inf  # never sampled
        assert (log_probs.amax(dim=-1) - expected).max() < 2 * tolerance, "a token is not the likeliest"
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 10


def _assert_scores_are_those_of_each_row_alone(engine: LocalEngine, tolerance: float) -> None:
    questions = [Question(text, conversation(text)) for text in TEXTS]
    for choice in engine.choose(questions):
        assert isinstance(choice, Choice)
        prompt, options = engine.chat.question(conversation(choice.id), ("A", "B"))
        expected = _log_probs_alone(engine, prompt)[-1, options]
        assert choice.log_probs == pytest.approx(expected.tolist(), abs=tolerance)


@torch.no_grad()
def _log_probs_alone(engine: LocalEngine, ids: list[int]) -> Any:
    """(token, vocabulary) log-probabilities of the token behind each."""
    return engine.lm(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)
