"""Rotary frequencies that depend on the length of a text, taken from each row by itself.

Frequencies change once with longrope (Ding et al. 2024, arXiv:2402.13753), at the length of the original pretraining,
and with every token beyond the context with dynamic NTK scaling. transformers (5.23) takes the length of the longest
row of a pass, and dynamic NTK keeps the length of earlier passes. So a row's logits would depend on the rows beside and
before it. Here every row has the frequencies of its own length, padding not counted.

Left out: positions in several dimensions, as models of images have them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


_MARK = "_cai_computes_rows_apart"
"""Attribute of rotary modules that `use_frequencies_of_each_row` has changed."""


class LengthDependence(NamedTuple):
    """Frequencies change behind `n_tokens`: once, or with every further token if they are `dynamic`."""

    n_tokens: int
    dynamic: bool

    def key(self, length: int) -> int:
        """Rows of `length` tokens with equal keys have equal frequencies."""
        return 0 if length <= self.n_tokens else length if self.dynamic else 1


def length_dependences(config: PreTrainedConfig) -> list[LengthDependence]:
    """How the rotary frequencies of a model with that config depend on length: empty if they do not."""
    return list(_length_dependences(config.get_text_config(decoder=True)))


def _length_dependences(config: PreTrainedConfig) -> Iterator[LengthDependence]:
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # Configs with several types of layers have parameters for each type.
    for rope in [value for value in parameters.values() if isinstance(value, Mapping)] or [parameters]:
        kind = rope.get("rope_type") or rope.get("type")
        if kind == "longrope":
            bound = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
            yield LengthDependence(int(bound), dynamic=False)
        elif kind == "dynamic":
            yield LengthDependence(int(config.max_position_embeddings), dynamic=True)


def frequencies_change(dependences: list[LengthDependence], length: int) -> bool:
    """Whether the frequencies of a text of `length` tokens are others than those without its last token."""
    return any(dependence.key(length) != dependence.key(length - 1) for dependence in dependences)


def use_frequencies_of_each_row(model: PreTrainedModel) -> None:
    """From now on the model computes each row of a batch with the frequencies of its own length."""
    dependences = length_dependences(model.config)
    rotary_modules = [m for m in model.modules() if hasattr(m, "rope_type") and hasattr(m, "inv_freq")]
    if not dependences or any(hasattr(module, _MARK) for module in rotary_modules):
        return
    for module in rotary_modules:
        # A forward pass of the module's own, as libraries' hooks set it, is called like that of its class.
        module.forward = functools.partial(_forward_by_row, module.forward, dependences)
        setattr(module, _MARK, True)
    model.base_model.register_forward_pre_hook(_add_positions, with_kwargs=True)


def _add_positions(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Gives a body the positions of a padded batch, which tell the rows' lengths, where its caller does not."""
    mask = options.get("attention_mask")
    has_positions = any(options.get(name) is not None for name in ("position_ids", "past_key_values"))
    if has_positions or mask is None or mask.dim() != 2:
        return arguments, options
    return arguments, {**options, "position_ids": (mask.long().cumsum(dim=-1) - 1).clamp(min=0)}


def _forward_by_row(
    forward: Callable[..., tuple[Tensor, ...]], dependences: list[LengthDependence], states: Tensor,
    position_ids: Tensor, *arguments: Any, **options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """A rotary module's cosines and sines, (batch, seq, width) each, at `position_ids`, (batch, seq)."""
    if position_ids.dim() != 2:
        return forward(states, position_ids, *arguments, **options)
    by_key: dict[tuple[int, ...], list[int]] = {}
    for row, last_position in enumerate(position_ids.amax(dim=-1).tolist()):
        by_key.setdefault(tuple(dependence.key(last_position + 1) for dependence in dependences), []).append(row)
    parts: list[tuple[Tensor, ...]] = []
    for rows in by_key.values():
        if any(dependence.dynamic for dependence in dependences):  # a short text makes the module forget longer ones
            forward(states, position_ids.new_zeros(1, 1), *arguments, **options)
        parts.append(forward(states, position_ids[rows], *arguments, **options))
    if len(parts) == 1:
        return parts[0]
    row_order = torch.tensor([row for rows in by_key.values() for row in rows], device=position_ids.device)
    index_of_row = row_order.argsort()
    return tuple(torch.cat(tensors).index_select(0, index_of_row) for tensors in zip(*parts, strict=True))
