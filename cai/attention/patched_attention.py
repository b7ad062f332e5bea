"""Models run with another attention function, through transformers' attention interface.

`forward_with_attention` is one forward pass with the logits of selected tokens alone. `find_layout_obstacle` and
`is_rounding` tell whether a model computes the same with such an attention as with its own. Left out:
sliding windows, soft caps, attention sinks, position biases, and states in place of keys and values.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface

from cai.attention.cpu_tuning import pad_to_multiple
from cai.attention.rotary_rows import length_dependences

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Attention = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
"""(layer, query, key, value, scale) -> output. Query, key, value and output are (batch, heads, seq, width)."""

TRIAL_ERRORS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError)
"""What models raise when they are tried with an attention that they do not take."""
_NAME = "cai_patched"
_PATCH: ContextVar[Attention] = ContextVar("patch")
_UNSUPPORTED_OPTIONS = ("softcap", "s_aux", "position_bias")
"""Options of attention functions that change the result. `find_layout_obstacle` looks for windows itself."""
_WINDOW_NAME = re.compile(r"window(_size|_len)?$|attention_chunk_size$|local_attention$|attn_chunk_length$|index_topk$")
"""In the names by which configs call the number of tokens that attention reaches back, or selects.

Chunks of a recurrent layer's scan (`mamba_chunk_size`), and what widths are rounded to, limit no attention.
"""
_SELECTED_BLOCKS = ("index_topk_blocks", "index_block_size")
"""How many blocks of keys sparse layers of MiniMax-M3 select, and the tokens of a block."""
_WINDOWS_OF_LAYER_TYPES = ("sliding_window", "attention_chunk_size")
"""Windows of layers that `layer_types` names; without such a layer they are not in use."""
_LONGEST_TRIED_WINDOW = 128
"""Tokens. Trials are longer than windows of up to this many tokens."""


@contextlib.contextmanager
def patched_attention(model: PreTrainedModel, attention: Attention) -> Iterator[None]:
    """Within the block, `attention` is the model's attention. The model gets no mask: `attention` applies its own."""
    implementation, token = model.config._attn_implementation, _PATCH.set(attention)
    model.config._attn_implementation = _NAME
    try:
        yield
    finally:
        model.config._attn_implementation = implementation
        _PATCH.reset(token)


def _call_patch(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **options: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers calls in each layer. It builds no mask, because none is registered under the same name."""
    if unsupported := [name for name in _UNSUPPORTED_OPTIONS if options.get(name) is not None]:
        raise NotImplementedError(f"its attention has {unsupported[0]!r}")
    if attention_mask is not None:
        raise NotImplementedError("its attention has a mask of its own")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    return _PATCH.get()(layer, query, key, value, scale).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _call_patch)


def forward_with_attention(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, attention: Attention, selected: tuple[Tensor, Tensor]
) -> Tensor:
    """One forward pass of `ids`, (batch, seq), with that attention: (n, vocabulary) logits at the `selected` tokens.

    `selected` are their rows and columns, (n,) each. The head sees these alone, because all logits of long rows would
    be larger than everything else. What is multiplied by weights is padded with zeros (`pad_to_multiple`), which
    `attention` does not see.
    """
    padded_dim = 0 if ids.shape[1] == 1 else 1
    size, n_selected = ids.shape[padded_dim], len(selected[0])
    padded_size, padded_selected = (pad_to_multiple(n, model.dtype, model.device) for n in (size, n_selected))

    def attend_without_padding(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        query, key, value = (tensor.narrow(2 * padded_dim, 0, size) for tensor in (query, key, value))
        return _pad_with_zeros(attention(layer, query, key, value, scale), 2 * padded_dim, padded_size)

    def select_states(_: torch.nn.Module, states: tuple[Tensor]) -> tuple[Tensor]:
        return (_pad_with_zeros(states[0][selected][None], 1, padded_selected),)

    head = model.get_output_embeddings()
    assert head is not None
    hook = head.register_forward_pre_hook(select_states)
    ids, positions = (_pad_with_zeros(tensor, padded_dim, padded_size) for tensor in (ids, positions))
    try:
        with patched_attention(model, attend_without_padding):
            logits: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    finally:
        hook.remove()
    return logits[:n_selected]


def _pad_with_zeros(tensor: Tensor, dim: int, size: int) -> Tensor:
    missing = size - tensor.shape[dim]
    return pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [0, missing]) if missing else tensor


def find_layout_obstacle(model: PreTrainedModel) -> str | None:
    """Why this model needs its tokens laid out as whole rows, as far as config and signature tell; None if it does not.

    The reason is a clause about "it", the model. A model without an obstacle has plainly causal attention.
    """
    config = model.config.get_text_config(decoder=True)
    layer_types = set(getattr(config, "layer_types", None) or [])
    if unsupported := sorted(layer_types - {"full_attention"}):
        return f"it has layers of the kind {', '.join(unsupported)}"
    windows = _named_windows(config)
    if layer_types:
        windows = _without_windows_of_layer_types(windows)
    for name, window in windows.items():
        if window > _LONGEST_TRIED_WINDOW:
            return f"its attention reaches back {window} tokens ({name}), which what is shared would outgrow"
    if length_dependences(config):
        return "its rotary frequencies depend on the length of a text"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward pass takes no positions"
    return None


def longest_tried_window(model: PreTrainedModel) -> int:
    """Tokens of the longest window in the config that a trial can exceed; 0 where there is none."""
    windows = _named_windows(model.config.get_text_config(decoder=True)).values()
    return max((window for window in windows if window <= _LONGEST_TRIED_WINDOW), default=0)


def shortest_untried_window(model: PreTrainedModel) -> float:
    """Tokens of the shortest window that is too long for a trial, inf without one.

    Windows that transformers' masks limit are left out: these masks take padding into account.
    """
    windows = _without_windows_of_layer_types(_named_windows(model.config.get_text_config(decoder=True))).values()
    return min((window for window in windows if window > _LONGEST_TRIED_WINDOW), default=math.inf)


def _without_windows_of_layer_types(windows: dict[str, int]) -> dict[str, int]:
    return {name: window for name, window in windows.items() if name not in _WINDOWS_OF_LAYER_TYPES}


def _named_windows(config: PreTrainedConfig) -> dict[str, int]:
    """The windows of a config by name, in tokens, where the model takes longer texts."""
    longest = getattr(config, "max_position_embeddings", None) or math.inf
    numbers = {name: value for name, value in config.to_dict().items() if type(value) is int}
    windows = {name: value for name, value in numbers.items() if _WINDOW_NAME.search(name)}
    if "minimax_m3_sparse" in (getattr(config, "layer_types", None) or ()):
        windows[" x ".join(_SELECTED_BLOCKS)] = math.prod(numbers[name] for name in _SELECTED_BLOCKS)
    return {name: window for name, window in windows.items() if 0 < window < longest}


def is_rounding(difference: float, difference_if_wrong: float, dtype: torch.dtype) -> bool:
    """Whether two computations in `dtype` agree up to rounding, where a mistake would make `difference_if_wrong`."""
    # In float32 rounding changes next to nothing, so that a mistake in a part of the tokens shows as well.
    return difference <= max(1e-3, (1e-3 if dtype == torch.float32 else 0.2) * difference_if_wrong)
