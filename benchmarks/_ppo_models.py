"""The models of `ppo.py`: a policy whose weights are random, and a reward model from which a few updates can learn.

A policy of random weights draws every token alike and ends no response. This one has a bias, in a feature that all its
tokens share: tokens are as unequal as words are (Zipf 1949), and one in some fifty ends the response. Half of the
tokens are good and half bad, which the policy tells apart by one feature of its head, as a language model knows words
of a kind. The reward model is built, not trained. It tells how many more are good than bad: one attention head that
attends everywhere alike, behind which its layers are the identity, which costs as much as if they were not.

Both are Llamas of one shape and speak with micro's tokenizer and chat template; tokens beyond micro's never occur in a
prompt.
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
"""Tokens that only templates write; of these, responses have the end alone."""
NEVER = -20.0
ENDS = 1 / 50
KIND = 0.3
"""Weight in the policy's head of the feature that tells good from bad; others are around 0.02."""
SPREAD = 5.0
"""Score of a response all of whose tokens are good, if there were no prompt."""


def config(width: int, layers: int, vocabulary: int) -> LlamaConfig:
    """The shape of policy and reward model: heads of 64, gated layers about as large as ungated ones of 4 × width."""
    return LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(1, width // 64), vocab_size=vocabulary,
        intermediate_size=32 * round(width * 8 / 3 / 32), tie_word_embeddings=False, max_position_embeddings=2048,
        bos_token_id=1, eos_token_id=END, pad_token_id=PAD, num_labels=1,
    )  # fmt: skip


def kinds(shape: LlamaConfig) -> torch.Tensor:
    """(vocabulary,) 1 for a good token, -1 for a bad one, 0 for those of micro: prompts say nothing."""
    micros: int = json.loads((MICRO / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    drawn = torch.randint(2, (shape.vocab_size,), generator=torch.Generator().manual_seed(0))
    return (2.0 * drawn - 1).index_fill(0, torch.arange(micros), 0.0)


@torch.no_grad()
def policy(shape: LlamaConfig, folder: Path) -> int:
    """Writes the policy and returns how many parameters it has."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(shape)
    bias = torch.full((shape.vocab_size,), NEVER)
    ranks = torch.randperm(shape.vocab_size - SPECIAL)
    bias[SPECIAL:] = -torch.log(ranks + 2.7)
    bias[SPECIAL:] += math.log1p(-ENDS) - bias[SPECIAL:].logsumexp(0)
    bias[END] = math.log(ENDS)
    # The first feature is as large as all others together, and no layer writes to it.
    model.model.embed_tokens.weight[:, 0] = shape.initializer_range * math.sqrt(shape.hidden_size)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
    ids = torch.randint(SPECIAL, shape.vocab_size, (4, 16))
    felt = model.model(ids).last_hidden_state[..., 0].mean()
    model.lm_head.weight[:, 0] = bias / felt
    model.lm_head.weight[:, 1] = KIND * kinds(shape)
    return _written(model, folder)


@torch.no_grad()
def reward_model(shape: LlamaConfig, folder: Path) -> int:
    """Writes the reward model and returns how many parameters it has.

    Features: 0 is the same for all tokens, 1 says good or bad, 2 receives the mean of 1 over all tokens so far, and 3
    makes those that are neither as long as the others.
    """
    model = LlamaForSequenceClassification(shape)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.zero_()
    size = math.sqrt(shape.hidden_size / 2)  # what normalisation makes of 1 beside another one
    small = 0.1  # so little of feature 2 that normalising does not see it
    tokens, attention = model.model.embed_tokens.weight, model.model.layers[0].self_attn
    tokens[:, 0], tokens[:, 1], tokens[:, 3] = 1.0, kinds(shape), kinds(shape) == 0
    attention.v_proj.weight[0, 1] = 1.0
    attention.o_proj.weight[2, 0] = small / size
    model.score.weight[0, 2] = SPREAD / small / size
    return _written(model, folder)


def _written(model: LlamaForCausalLM | LlamaForSequenceClassification, folder: Path) -> int:
    """Saves the model with micro's tokenizer, to which the names of all its tokens are added."""
    model.save_pretrained(folder)
    for file in ("tokenizer_config.json", "chat_template.jinja", FACTS):
        shutil.copy(MICRO / file, folder)
    tokenizer = json.loads((MICRO / "tokenizer.json").read_text(encoding="utf-8"))
    names = tokenizer["model"]["vocab"]
    names |= {f"<{token}>": token for token in range(len(names), model.config.vocab_size)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return sum(weight.numel() for weight in model.parameters())
