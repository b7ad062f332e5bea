"""Everything that is tuned for CPUs, with the reason for each number. Nothing here changes a result beyond rounding.

`applies_to` decides for all of it. Sizes: `pad_to_multiple`, `length_bucket`, `tokens_per_pass`, `KV_CACHE_STEP`.
Attention: `float32_attention` for whole models, `causal_attention` for the token trees of training
(`cai.attention.token_trees`). Memory: `return_freed_memory`. The language-model head for CPUs is
`cai.attention.cpu_lm_head`. On other devices these functions return their input or do nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

KV_CACHE_STEP = 32
"""Tokens by which the generated-token KV cache grows: products of other sizes take up to twice as long on a CPU."""
MAX_KEPT_SCORES = 2**24
"""Attention scores that a layer keeps of a micro-batch for its backward pass, 32 MiB in bfloat16. Where there would be
more, torch's fused attention, which keeps none, computes them."""
_MAX_TOKENS_PER_PASS = 4096
"""The activations of more tokens do not fit into a CPU's caches."""
_MAX_TOKENS_PER_GPU_PASS = 16_384
"""Activations of more tokens take the place of keys and values. Not measured on a GPU yet."""
_SHORTEST_BUCKET = 32
"""Tokens, a power of two: padding prompts up to this length costs little."""


def applies_to(device: torch.device) -> bool:
    """Whether what is computed on this device is tuned for CPUs; the tests run it untuned on a CPU, as on a GPU."""
    return device.type == "cpu"


def tokens_per_pass(token_budget: int, device: torch.device) -> int:
    """Tokens that are best computed in one forward pass where `token_budget` of them may be held."""
    return min(token_budget, _MAX_TOKENS_PER_PASS if applies_to(device) else _MAX_TOKENS_PER_GPU_PASS)


def length_bucket(n_tokens: int, device: torch.device) -> int:
    """The length bucket of a prompt: the longest prompt length in the bucket, in tokens.

    On a CPU padding costs more than additional kernel calls, so that lengths in one bucket differ by less than a factor
    of two. On other devices additional calls cost more, so that one bucket takes all prompts.
    """
    return max(_SHORTEST_BUCKET, 1 << (n_tokens - 1).bit_length()) if applies_to(device) else sys.maxsize


def pad_to_multiple(size: int, dtype: torch.dtype, device: torch.device, multiple: int = 32) -> int:
    """The size to pad to, `size` or a little more: a multiple of `multiple`, or a power of two below it."""
    if not size or not prefers_padded_sizes(dtype, device):
        return size
    return 1 << (size - 1).bit_length() if size < multiple else -(-size // multiple) * multiple


def prefers_padded_sizes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether some sizes take much longer than others, as in bfloat16 on a CPU.

    oneDNN compiles a kernel for a product of a new size, which takes 1 to 6 ms: ten times the product itself in a small
    model. And an AVX-512 vector holds 32 numbers: a softmax over rows of 190 takes twice the time of one over 192,
    because the rest of each row is computed number by number.
    """
    return applies_to(device) and dtype == torch.bfloat16


def matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision in which a CPU multiplies tensors of `dtype`: autocast's, where autocast is on."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else dtype


@contextlib.contextmanager
def float32_attention(device: torch.device) -> Iterator[None]:
    """Within the block, models on a CPU that use torch's attention compute it in float32, whatever their precision.

    The backward pass of torch's attention takes two to three times as long in bfloat16 as in float32 for sequences of
    up to some 200 tokens; for longer ones both take the same time.
    """
    if not applies_to(device):
        yield
        return
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _float32_attention  # hides the library's entry until it is deleted
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def _float32_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """query, key, value: (batch, heads, seq, width); returns (batch, seq, heads, width) in the value's precision."""
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast("cpu", enabled=False):
        output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return output.to(value.dtype), None


def causal_attention(scale: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention on a CPU, in the way whose backward pass is the fastest there.

    In bfloat16 that is two matrix products and a softmax, which take half the time of torch's attention. They round the
    scores to bfloat16 before the softmax, as transformers' eager attention does: a query's gradient is off by 0.4 %
    where scores have a standard deviation of 1, by 2 % at 9 and 7 % at 36 (eager: 0.4, 2.5 and 9 %; float32: 0.2 %).

    query: (batch, heads, seq, width); key and value may have fewer heads; returns (batch, heads, seq, value width).
    """
    dtype, length = query.dtype, query.shape[2]
    is_grouped = query.shape[1] != key.shape[1]
    with torch.autocast("cpu", enabled=False):
        if dtype == torch.float32 or query[..., 0].numel() * length > MAX_KEPT_SCORES:
            query, key, value = query.float(), key.float(), value.float()
            out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=is_grouped)
            return out.to(dtype)
        if is_grouped:
            key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
        future = query.new_full((length, length), -math.inf).triu(1)
        scores = torch.baddbmm(future, query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), alpha=scale)
        return (scores.softmax(dim=-1) @ value.flatten(0, 1)).view(*query.shape[:-1], -1)


def return_freed_memory(device: torch.device) -> None:
    """Where models are on a CPU, makes the C library return freed blocks of 256 KiB and more to the operating system.

    glibc raises that threshold to 32 MiB by itself and keeps smaller blocks. Batches of changing lengths then leave
    gaps that no later batch fits into: nearly half of what activations take in ten layers of width 576. Returning
    blocks of 4 MiB costs 5 % of a PPO run's time on a model of 50 million parameters and 10 % on one of 4 million, so
    that only trainers with large activations do. With 1 MiB, micro-batches of two pairs still took 525 MB more of a
    model of 350 million parameters, whose tensors are smaller than that. What 256 KiB costs in time is
    not measured yet.
    """
    if not applies_to(device):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(-3, 2**18)  # M_MMAP_THRESHOLD
