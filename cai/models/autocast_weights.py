"""Stores weights as autocast would convert them, so that a frozen copy of a trained model takes half the memory.

A model that is trained keeps float32 weights, and autocast converts those of its matrix products at each forward pass.
A frozen copy with these weights converted once computes the same numbers, to the last bit: the log-ratio of a policy
to its reference is exactly zero before the first step. In a copy that is bfloat16 throughout it is not, because
embeddings, norms and the residual stream, which autocast leaves in float32, are rounded too.

Left out: experts of a mixture, whose grouped products autocast leaves in float32 (pytorch/pytorch#174763).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_CONVERTED = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d)
"""Modules whose weights autocast converts."""


def convert_as_autocast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Converts the weights that autocast would convert to `dtype`, in place and one at a time.

    The model is for forward passes under autocast alone from then on. A head that is tied to the embeddings stays
    float32, as they do.
    """
    for weight in weights_converted_by_autocast(model):
        weight.data = weight.data.to(dtype)


def weights_converted_by_autocast(model: PreTrainedModel) -> list[nn.Parameter]:
    """The weights that autocast converts at each forward pass: those of matrix products, each once."""
    embedding_ids = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, _CONVERTED):
            weights |= {id(weight): weight for weight in module.parameters(recurse=False)}
    return [weight for weight_id, weight in weights.items() if weight_id not in embedding_ids]
