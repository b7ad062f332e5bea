"""The models of ppo.py: a policy with random weights, and a reward model from which it can learn in a few updates.

A policy with purely random weights samples all tokens equally often and never ends a response. This one has a bias, in
a feature that all token embeddings share: token frequencies follow Zipf's law (1949), and about one token in fifty ends
the response. Half of the tokens are good and half are bad, which one feature of the policy's output layer tells apart.

The reward model is constructed, not trained: the score is the mean of good (1) and bad (-1) over the tokens. One
attention head averages over all tokens, and all other layers are the identity, which costs as much time as any weights.

Both are Llamas of one shape with micro's tokenizer and chat template; prompts have only tokens of micro.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from cai.models.reference import FACTS, MICRO

PAD, END = 0, 2
SPECIAL = 6
"""Special tokens; of these, only the end occurs in responses."""
NEVER = -20.0
"""Logit of tokens that responses do not have."""
ENDS = 1 / 50
"""Probability that a token ends the response."""
KIND = 0.3
"""Weight in the policy's output layer of the feature that tells good from bad tokens; other weights are around 0.02."""
SPREAD = 5.0
"""Score of a sequence of good tokens alone."""


def config(width: int, layers: int, vocabulary: int) -> LlamaConfig:
    """Shape of policy and reward model: heads of 64, feed-forward layers with about as many parameters as GPT-2's."""
    return LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(1, width // 64), vocab_size=vocabulary,
        intermediate_size=32 * round(width * 8 / 3 / 32), tie_word_embeddings=False, max_position_embeddings=2048,
        bos_token_id=1, eos_token_id=END, pad_token_id=PAD, num_labels=1,
    )  # fmt: skip


def kinds(shape: LlamaConfig) -> torch.Tensor:
    """(vocabulary,) 1 for a good token, -1 for a bad one, 0 for the tokens of micro, which prompts are made of."""
    micro_size: int = json.loads((MICRO / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    coins = torch.randint(2, (shape.vocab_size,), generator=torch.Generator().manual_seed(0))
    return (2.0 * coins - 1).index_fill(0, torch.arange(micro_size), 0.0)


@torch.no_grad()
def policy(shape: LlamaConfig, folder: Path) -> int:
    """Writes the policy to `folder` and returns its number of parameters."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(shape)
    bias = torch.full((shape.vocab_size,), NEVER)
    ranks = torch.randperm(shape.vocab_size - SPECIAL)
    bias[SPECIAL:] = -torch.log(ranks + 2.7)
    bias[SPECIAL:] += math.log1p(-ENDS) - bias[SPECIAL:].logsumexp(0)
    bias[END] = math.log(ENDS)
    # Feature 0 is as large as all others together, and no layer changes it.
    model.model.embed_tokens.weight[:, 0] = shape.initializer_range * math.sqrt(shape.hidden_size)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
    ids = torch.randint(SPECIAL, shape.vocab_size, (4, 16))
    feature = model.model(ids).last_hidden_state[..., 0].mean()
    model.lm_head.weight[:, 0] = bias / feature
    model.lm_head.weight[:, 1] = KIND * kinds(shape)
    return _save(model, folder)


@torch.no_grad()
def reward_model(shape: LlamaConfig, folder: Path) -> int:
    """Writes the reward model to `folder` and returns its number of parameters.

    Features: 0 is the same for all tokens, 1 is good or bad, 2 receives the mean of 1 over all tokens so far, and 3
    gives tokens that are neither good nor bad the norm of the others.
    """
    model = LlamaForSequenceClassification(shape)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.zero_()
    size = math.sqrt(shape.hidden_size / 2)  # RMS norm makes this of each of two features of size 1
    small = 0.1  # feature 2 is so small that it does not change the norm
    tokens, attention = model.model.embed_tokens.weight, model.model.layers[0].self_attn
    tokens[:, 0], tokens[:, 1], tokens[:, 3] = 1.0, kinds(shape), kinds(shape) == 0
    attention.v_proj.weight[0, 1] = 1.0
    attention.o_proj.weight[2, 0] = small / size
    model.score.weight[0, 2] = SPREAD / small / size
    return _save(model, folder)


def _save(model: LlamaForCausalLM | LlamaForSequenceClassification, folder: Path) -> int:
    """Saves the model with micro's tokenizer, extended to the model's vocabulary; returns the number of parameters."""
    model.save_pretrained(folder)
    for file in ("tokenizer_config.json", "chat_template.jinja", FACTS):
        shutil.copy(MICRO / file, folder)
    tokenizer = json.loads((MICRO / "tokenizer.json").read_text(encoding="utf-8"))
    names = tokenizer["model"]["vocab"]
    names |= {f"<{token}>": token for token in range(len(names), model.config.vocab_size)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return sum(weight.numel() for weight in model.parameters())
