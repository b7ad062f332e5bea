"""Models of many architectures with random weights, two layers and 64 tokens, without a tokenizer."""

from __future__ import annotations

from typing import Any

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def random_model(architecture: str, auto_class: str = "AutoModelForCausalLM", **config: Any) -> Any:
    """A model of transformers' architecture of that name, the same at each call."""
    import torch
    import transformers

    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model(architecture, **{**SHAPE, **config})
    return getattr(transformers, auto_class).from_config(settings)
