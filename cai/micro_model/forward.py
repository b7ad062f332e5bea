"""The forward pass and the loss of the small model's pretraining, written for CPUs.

It computes what transformers' Llama computes, from the same parameters, in bfloat16 throughout. One decoder layer is
compiled and used for all layers. The loss computes logits once and keeps their gradient instead of the probabilities.
Gradients arrive in the Llama's parameters, so optimizer, resume points and export need no special case. Left out: what
this Llama does not have, such as key-value groups, biases, dropout and scaled positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from cai.micro_model.packing import Batch

HALF = torch.bfloat16
BLOCKS = 2
"""Blocks of queries on a CPU: the first block skips the second half of the keys, which the causal mask hides."""


def loss_of(model: LlamaForCausalLM, batch: Batch, *, compiled: bool = True) -> Tensor:
    """Weighted mean cross-entropy in nats; a soft target divides its weight between two tokens."""
    hidden, table = _hidden(model, batch, compiled)
    device = hidden.device
    columns = (batch.targets, batch.others, batch.shares, batch.weights)
    targets, others, shares, weights = (column.to(device).reshape(-1, 1) for column in columns)
    flat = hidden.reshape(-1, hidden.shape[-1])
    kernel = _compile(_loss_and_gradient) if compiled else _loss_and_gradient
    loss: Tensor = _Head.apply(flat, table, targets, others, shares, weights / weights.sum(), kernel)  # type: ignore[no-untyped-call]
    return loss


def logits_of(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Logits of shape (rows, length, vocabulary)."""
    hidden, table = _hidden(model, batch, compiled=False)
    return hidden @ table.t()


def _hidden(model: LlamaForCausalLM, batch: Batch, compiled: bool) -> tuple[Tensor, Tensor]:
    """Hidden states after the last norm, (rows, length, width), and the tied embeddings, both in bfloat16."""
    config, core = model.config, model.model
    device, eps = core.embed_tokens.weight.device, config.rms_norm_eps
    layer = _compile(_layer) if compiled else _layer
    table = core.embed_tokens.weight.to(HALF)
    angles = batch.positions.to(device)[..., None].float() * core.rotary_emb.inv_freq.to(device).float()
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    mask = torch.zeros(batch.mask.shape, dtype=HALF, device=device).masked_fill_(~batch.mask.to(device), -1e4)
    x = F.embedding(batch.ids.to(device), table)
    for decoder_layer in core.layers:
        a, m = decoder_layer.self_attn, decoder_layer.mlp
        qkv = torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]).to(HALF)
        gate_up = torch.cat([m.gate_proj.weight, m.up_proj.weight]).to(HALF)
        x = layer(
            x, cos, sin, mask, decoder_layer.input_layernorm.weight, qkv, a.o_proj.weight.to(HALF),
            decoder_layer.post_attention_layernorm.weight, gate_up, m.down_proj.weight.to(HALF),
            config.num_attention_heads, eps,
        )  # fmt: skip
    return _norm(x, core.norm.weight, eps), table


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight).to(HALF)


def _layer(
    x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, before: Tensor, qkv: Tensor, out: Tensor, after: Tensor,
    gate_up: Tensor, down: Tensor, heads: int, eps: float,
) -> Tensor:  # fmt: skip
    """One decoder layer; x of shape (rows, length, width) in bfloat16, the norms' weights in float32."""
    rows, length, width = x.shape
    parts = F.linear(_norm(x, before, eps), qkv).view(rows, length, 3, heads, width // heads)
    q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
    q = _rotate(q, cos, sin) * (width // heads) ** -0.5
    mixed = _attend(q.contiguous(), _rotate(k, cos, sin), v.contiguous(), mask)
    x = x + F.linear(mixed.transpose(1, 2).reshape(rows, length, width), out)
    gate, up = F.linear(_norm(x, after, eps), gate_up).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, down)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(HALF)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of (rows, heads, length, size); written out on a CPU, where torch's kernel has a slow backward pass."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    length, outputs = q.shape[2], []
    for i in range(BLOCKS):
        start, stop = length * i // BLOCKS, length * (i + 1) // BLOCKS
        scores = torch.matmul(q[:, :, start:stop], k[:, :, :stop].transpose(-1, -2))
        shares = torch.softmax(scores.float() + mask[:, :, start:stop, :stop], dim=-1).to(HALF)
        outputs.append(torch.matmul(shares, v[:, :, :stop]))
    return torch.cat(outputs, dim=2)


def _loss_and_gradient(
    logits: Tensor, targets: Tensor, others: Tensor, shares: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient by the logits (tokens, vocabulary); the other arguments are (tokens, 1)."""
    wide = logits.float()
    log_sum = torch.logsumexp(wide, dim=-1, keepdim=True)
    target_logits, other_logits = wide.gather(-1, targets), wide.gather(-1, others)
    loss = (weights * (log_sum - shares * target_logits - (1 - shares) * other_logits)).sum()
    token = torch.arange(logits.shape[-1], device=logits.device)
    target_probs = torch.where(token == targets, shares, 0.0) + torch.where(token == others, 1 - shares, 0.0)
    return loss, (weights * (torch.exp(wide - log_sum) - target_probs)).to(HALF)


class _Head(torch.autograd.Function):
    """Logits of tied embeddings and the loss; saves the gradient of the logits instead of the probabilities."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor, others: Tensor, shares: Tensor, weights: Tensor,
        kernel: Callable[..., tuple[Tensor, Tensor]],
    ) -> Tensor:  # fmt: skip
        loss, gradient = kernel(hidden @ table.t(), targets, others, shares, weights)
        ctx.save_for_backward(hidden, table, gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, table, gradient = ctx.saved_tensors
        scaled = scale[0].to(HALF)
        return gradient @ table * scaled, gradient.t() @ hidden * scaled, None, None, None, None, None
