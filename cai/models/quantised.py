"""Weights of 4 bits, for the frozen base of an adapter (QLoRA: Dettmers et al. 2023, arXiv 2305.14314).

bitsandbytes stores a matrix as indices into NormalFloat4, with a scale for each block of 64, and computes with the
matrix that these give in the profile's precision. Embeddings, norms and heads are not quantised. Left out: saving
quantised weights; everything that a stage leaves behind refers to the unquantised base.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def nf4_config(dtype: torch.dtype) -> Any:
    """transformers' config of a base whose products are computed in `dtype`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def dequantise(weight: Tensor) -> Tensor:
    """The matrix that a weight stands for: of a quantised one what it is computed with, of others itself."""
    if not hasattr(weight, "quant_state"):
        return weight
    from peft.utils.integrations import dequantize_bnb_weight

    return dequantize_bnb_weight(weight)  # type: ignore[no-any-return]
