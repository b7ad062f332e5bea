"""Writes the embedded model with wider attention heads, as vLLM's CPU kernels require; it computes the same function.

micro's heads are 56 wide; the kernels support 32, 64, 80, 96 … . Padding with zeros changes no product of queries and
keys. Two things that depend on the width are compensated: scores are divided by its square root, and rotary frequencies
are powers of theta with exponents 2i / width. Padded heads cost 64 / 56 of the time of attention and of its four
projections, about 4 % in all.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cai.models.reference import MICRO


def write_with_padded_heads(
    target: Path, width: int = 64, dtype: torch.dtype | None = None, source: Path = MICRO
) -> Path:
    """Writes the Llama model in `source`, its heads `width` wide, to the folder `target`, which it returns.

    `dtype` None keeps the weights' own.
    """
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    old: int = config["head_dim"]
    config["head_dim"] = width
    config["rope_parameters"]["rope_theta"] **= width / old
    config["dtype"] = str(dtype).removeprefix("torch.") if dtype else config["dtype"]
    weights = {}
    for name, weight in load_file(source / "model.safetensors").items():
        wide = weight.float()
        # Rotary pairs are (i, i + width / 2), so each half is padded at its own end.
        if "q_proj" in name or "k_proj" in name:
            wide = _padded(wide.reshape(-1, 2, old // 2, wide.shape[1]), 2, width // 2).reshape(-1, wide.shape[1])
        if "q_proj" in name:
            wide = wide * math.sqrt(width / old)
        elif "v_proj" in name:
            wide = _padded(wide.reshape(-1, old, wide.shape[1]), 1, width).reshape(-1, wide.shape[1])
        elif "o_proj" in name:
            wide = _padded(wide.reshape(len(wide), -1, old), 2, width).reshape(len(wide), -1)
        weights[name] = wide.to(dtype or weight.dtype).contiguous()
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, target)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _padded(weight: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """`weight` with zeros behind it along `dim`, up to `size`."""
    shape = list(weight.shape)
    shape[dim] = size - weight.shape[dim]
    return torch.cat([weight, weight.new_zeros(shape)], dim=dim)
