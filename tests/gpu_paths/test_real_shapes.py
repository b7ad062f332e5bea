"""Prefill and decode of models in their real shapes on a device that is not the CPU: memory and operations."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from stand_in_gpu import StandInGpu
from tiny_models import random_model
from transformers import AutoConfig, AutoModelForCausalLM

from cai.attention.patched_attention import find_layout_obstacle
from cai.contracts.engine import Sampling
from cai.engines.local import plain_forward
from cai.engines.local.decoding import decode
from cai.engines.local.token_sampling import PromptAndSeed

MAX_OPERATIONS_OF_A_LAYER = 64
"""Operations, without views, of a layer of Llama in a decode step; each starts a kernel on a GPU."""
MAX_OPERATIONS_BESIDE_LAYERS = 32
"""Operations of a decode step outside of layers: positions, masks, embeddings, the head."""
QWEN3_8B = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
}  # fmt: skip
LLAMA3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
GEMMA3_4B = {
    "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208, "sliding_window": 1024,
}  # fmt: skip


class FixedTokens:
    """Stands for the sampler where logits have no numbers: every response has `n_tokens` tokens."""

    def __init__(self, n_tokens: int, gpu: StandInGpu) -> None:
        self.gpu = gpu
        self.held_bytes: list[int] = []
        self.operations: list[int] = []
        """Bytes on the device, and operations so far, at each call."""
        self.sampling = Sampling(n_tokens, 0)
        self.end_ids: frozenset[int] = frozenset()

    def extend(self, rows: Any, logits: Any) -> None:
        assert logits.shape[0] == len(rows)
        self.held_bytes.append(self.gpu.bytes)
        self.operations.append(self.gpu.operations.total())
        for row in rows:
            if not row.is_finished:
                row.token_ids.append(7)
                row.log_probs.append(0.0)
                row.is_stopped = len(row.token_ids) == self.sampling.max_new_tokens


def model_of_shape(architecture: str, **shape: Any) -> Any:
    with torch.device("meta"):
        config = AutoConfig.for_model(architecture, **shape)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@pytest.mark.parametrize(
    ("architecture", "shape", "billions", "peak_in_key_values"),
    [("qwen3", QWEN3_8B, 8.19, 2.7), ("llama", LLAMA3_8B, 8.03, 3.0), ("gemma3_text", GEMMA3_4B, 3.88, 2.0)],
    ids=["Qwen3-8B", "Llama-3-8B", "Gemma-3-4B"],
)
def test_prefill_and_decode_hold_weights_keys_and_values_and_little_else(
    architecture: str, shape: dict[str, Any], billions: float, peak_in_key_values: float
) -> None:
    model = model_of_shape(architecture, **shape)
    n_prompts, prompt_length, n_new = 8, 512, 2
    width = shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    bytes_per_token = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * width * 2
    requests = [PromptAndSeed([5] * (prompt_length - 1) + [last], last) for last in range(n_prompts)]
    plain_decode = functools.partial(plain_forward.decode, padding=plain_forward.Padding())
    run = plain_decode if find_layout_obstacle(model) else decode
    with StandInGpu(shapes_only=True) as gpu:
        gpu.put(model)
        weights = gpu.bytes
        sampler = FixedTokens(n_new, gpu)
        assert len(list(run(model, requests, sampler, 65536))) == n_prompts  # type: ignore[arg-type]
    assert weights == pytest.approx(2e9 * billions, rel=0.002)
    prompt_key_values = n_prompts * prompt_length * bytes_per_token
    logits = n_prompts * shape["vocab_size"] * 2
    assert sampler.held_bytes[0] - weights == pytest.approx(prompt_key_values + logits, rel=0.01)
    generated_key_values = n_prompts * n_new * bytes_per_token
    assert sampler.held_bytes[1] - weights <= 1.01 * (prompt_key_values + generated_key_values + 2 * logits)
    assert gpu.peak_bytes - weights < peak_in_key_values * prompt_key_values


def operations_of_a_decode_step(n_layers: int, n_rows: int, prompt_length: int) -> int:
    """Operations of the second decode step, in which nothing grows."""
    model = random_model("llama", num_hidden_layers=n_layers, max_position_embeddings=2048).eval()
    requests = [PromptAndSeed([5 + n % 50] * prompt_length, n) for n in range(n_rows)]
    with StandInGpu(shapes_only=True) as gpu:
        gpu.put(model)
        sampler = FixedTokens(3, gpu)
        assert len(list(decode(model, requests, sampler, 2**20))) == n_rows  # type: ignore[arg-type]
    return sampler.operations[2] - sampler.operations[1]


def test_a_decode_step_has_few_operations_and_no_more_with_more_rows_or_tokens() -> None:
    n_operations = operations_of_a_decode_step(n_layers=2, n_rows=2, prompt_length=8)
    assert operations_of_a_decode_step(n_layers=2, n_rows=48, prompt_length=8) == n_operations
    assert operations_of_a_decode_step(n_layers=2, n_rows=2, prompt_length=1024) == n_operations
    per_layer = operations_of_a_decode_step(n_layers=3, n_rows=2, prompt_length=8) - n_operations
    assert per_layer <= MAX_OPERATIONS_OF_A_LAYER, per_layer
    assert n_operations - 2 * per_layer <= MAX_OPERATIONS_BESIDE_LAYERS, n_operations - 2 * per_layer
