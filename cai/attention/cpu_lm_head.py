"""A language-model head for training on CPUs: logits of labelled tokens alone, in the model's own precision.

TRL's fused head is made for GPUs: on a CPU it also computes logits of prompt and padding, and multiplies in float32.

Left out: vocabularies above `MAX_VOCABULARY`, which train with TRL's head.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from trl.trainer.utils import FusedCausalLMOutput

from cai.attention import cpu_tuning
from cai.attention.cpu_tuning import matmul_dtype, pad_to_multiple

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_VOCABULARY = 32_768
"""Tokens: the width of a tile in TRL's head. Above it, all logits of a micro-batch may be more than memory holds."""
MAX_LOGITS = 2**25
"""Logits at once, 128 MiB in float32. A micro-batch with more of them goes through TRL's tiles."""


def add_cpu_lm_head(model: PreTrainedModel, *, entropy: bool = False, temperature: float = 1.0) -> None:
    """Makes `model(…, labels=labels, fused_lm_head=True)` score labelled tokens alone, if the model is on a CPU.

    Labelled tokens are those whose label is not -100. Logits are divided by `temperature`. Call it after TRL's
    `add_fused_lm_head`, whose contract it keeps: the output has `log_probs` in nats, `label_mask` and, with `entropy`,
    `entropy` and `is_top1`, each (batch, seq - 1) and zero where there is no label.
    """
    if not cpu_tuning.applies_to(model.device) or model.config.get_text_config().vocab_size > MAX_VOCABULARY:
        return
    trl_forward = model.forward

    def forward(
        self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **options: Any
    ) -> Any:
        if not fused_lm_head or labels is None:
            return trl_forward(*args, fused_lm_head=fused_lm_head, labels=labels, **options)
        label_mask = labels[:, 1:] != -100
        targets = labels[:, 1:][label_mask]
        n_targets = len(targets)
        if n_targets * self.config.get_text_config().vocab_size > MAX_LOGITS:
            return trl_forward(*args, fused_lm_head=True, labels=labels, **options)

        def keep_labelled_states(_: object, hidden: tuple[Tensor]) -> Tensor:
            padded_size = pad_to_multiple(n_targets, matmul_dtype(hidden[0].dtype), label_mask.device)
            return pad(hidden[0][:, :-1][label_mask], (0, 0, 0, padded_size - n_targets))

        # The hook runs between body and head, so that the model itself still scales or caps its logits.
        hook = self.get_output_embeddings().register_forward_pre_hook(keep_labelled_states)
        try:
            outputs = trl_forward(*args, **{**options, "use_cache": False})
        finally:
            hook.remove()
        logits = outputs.logits[:n_targets].float()  # (labelled tokens, vocabulary)
        log_probs = (logits if temperature == 1.0 else logits / temperature).log_softmax(dim=-1)

        def scatter(values: Tensor) -> Tensor:
            """(labelled tokens,) -> (batch, seq - 1)."""
            return values.new_zeros(label_mask.shape).masked_scatter(label_mask, values)

        result = FusedCausalLMOutput(
            log_probs=scatter(log_probs.gather(1, targets[:, None]).squeeze(1)),
            label_mask=label_mask,
            aux_loss=getattr(outputs, "aux_loss", None),
        )
        if entropy:
            with torch.no_grad():
                result.entropy = scatter(-log_probs.exp().mul_(log_probs).sum(dim=1))
                result.is_top1 = scatter(log_probs.argmax(dim=1) == targets)
        return result

    model.forward = types.MethodType(forward, model)
