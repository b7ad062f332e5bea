"""Two pieces of the libraries that are slow on a CPU, done another way: the same numbers up to rounding, sooner.

The backward pass of torch's attention takes two to three times as long in bfloat16 as in float32 for sequences of up to
some 200 tokens; beyond, both take the same. Where rows are not padded on the left, matrix products in bfloat16 take
half the time of either (`causal_attention`), with scores rounded to bfloat16, as in transformers' eager attention.
TRL's fused language-model head is made for GPUs: on a CPU it scores prompt and padding too, and multiplies in float32.

Left out: vocabularies above `LARGEST_VOCABULARY`, whose logits need the tiles of TRL's head, and models that do not
take their attention from transformers' table. Both train as they do without this module.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.trainer.utils import FusedCausalLMOutput

from cai.attention.cpu_sizes import pad_to_multiple

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST_VOCABULARY = 32_768
"""Tokens: the width of a tile in TRL's head. Above, all logits of a micro-batch may be more than memory holds."""
MOST_LOGITS = 2**25
"""Logits at once, 128 MiB in float32; a micro-batch with more of them goes through TRL's tiles."""
MOST_SCORES = 2**24
"""Attention scores that a layer keeps of a micro-batch, 32 MiB in bfloat16. Torch's attention, which keeps none, is for
more of them."""


@contextlib.contextmanager
def float32_attention(device: torch.device) -> Iterator[None]:
    """Models on a CPU that use torch's attention compute it in float32, whatever the rest is computed in."""
    if device.type != "cpu":
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
        output, weights = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **options
        )
    return output.to(value.dtype), weights


def causal_attention(scale: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention on a CPU, in the way whose backward pass is the fastest there.

    Of bfloat16, the scores are rounded before their softmax: a query's gradient is off by 0.4 % where they have a
    standard deviation of 1, by 2 % at 9 and 7 % at 36 (eager attention: 0.4, 2.5 and 9 %; in float32: 0.2 %).

    query: (batch, heads, seq, width); key and value may have fewer heads; returns (batch, heads, seq, value width).
    """
    dtype, length = query.dtype, query.shape[2]
    grouped = query.shape[1] != key.shape[1]
    with torch.autocast("cpu", enabled=False):
        if dtype == torch.float32 or query[..., 0].numel() * length > MOST_SCORES:
            query, key, value = query.float(), key.float(), value.float()
            out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
            return out.to(dtype)
        if grouped:
            key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
        ahead = query.new_full((length, length), -math.inf).triu(1)
        scores = torch.baddbmm(ahead, query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), alpha=scale)
        return (scores.softmax(dim=-1) @ value.flatten(0, 1)).view(*query.shape[:-1], -1)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what a CPU multiplies what has that precision: autocast's, where it is switched on."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else dtype


def give_back_freed_memory() -> None:
    """Makes the C library return blocks of 4 MiB and more to the system when they are freed.

    glibc raises that bound to 32 MiB by itself and keeps what lies below. Batches of ever other lengths then leave gaps
    that none of the next fits into: a fifth of a PPO run's memory on a model of 50 million parameters. It costs a
    twentieth of the time there and a tenth on one of 4 million, so that trainers who need less do without.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(-3, 2**22)  # M_MMAP_THRESHOLD


def add_lm_head(model: PreTrainedModel, *, entropy: bool = False, temperature: float = 1.0) -> None:
    """Makes `model(…, labels=labels, fused_lm_head=True)` score learned tokens alone, if the model is on a CPU.

    Logits are divided by `temperature`. To be called after TRL's `add_fused_lm_head`, whose contract this keeps: the
    output has `log_probs` in nats, `label_mask` and, if asked for, `entropy` and `is_top1`, each (batch, seq − 1) and
    zero where the label is -100.
    """
    if model.device.type != "cpu" or model.config.get_text_config().vocab_size > LARGEST_VOCABULARY:
        return
    without = model.forward

    def forward(
        self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **options: Any
    ) -> Any:
        if not fused_lm_head or labels is None:
            return without(*args, fused_lm_head=fused_lm_head, labels=labels, **options)
        mask = labels[:, 1:] != -100
        targets = labels[:, 1:][mask]
        n = len(targets)
        if n * self.config.get_text_config().vocab_size > MOST_LOGITS:
            return without(*args, fused_lm_head=True, labels=labels, **options)

        def learned(_: object, hidden: tuple[Tensor]) -> Tensor:
            size = pad_to_multiple(n, product_dtype(hidden[0].dtype), mask.device)
            return pad(hidden[0][:, :-1][mask], (0, 0, 0, size - n))

        # Between body and head, so that what a model does to its logits (scales, caps) stays the model's own.
        hook = self.get_output_embeddings().register_forward_pre_hook(learned)
        try:
            outputs = without(*args, **{**options, "use_cache": False})
        finally:
            hook.remove()
        logits = outputs.logits[:n].float()  # (learned tokens, vocabulary)
        log_probs = (logits if temperature == 1.0 else logits / temperature).log_softmax(dim=-1)

        def spread(values: Tensor) -> Tensor:
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        of_targets = log_probs.gather(1, targets[:, None]).squeeze(1)
        result = FusedCausalLMOutput(
            log_probs=spread(of_targets), label_mask=mask, aux_loss=getattr(outputs, "aux_loss", None)
        )
        if entropy:
            with torch.no_grad():
                result.entropy = spread(-log_probs.exp().mul_(log_probs).sum(dim=1))
                result.is_top1 = spread(log_probs.argmax(dim=1) == targets)
        return result

    model.forward = types.MethodType(forward, model)
