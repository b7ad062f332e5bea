"""Training micro-batches without padding and without tokens that are computed twice.

Outside of attention a model computes one token at a time, and the state of a token depends on nothing after it. So the
rows of a batch form a tree: two responses to a prompt hold the prompt once. Its distinct tokens go through the body of
the model as one row; attention lays them out as rows again, and the output is laid out as the caller expects. Values
and gradients are those of the padded batch, up to rounding.

For CPUs, where the time of a product grows with its tokens. Left out: models whose attention is not plainly causal or
that have dropout, rows padded on the left, gradient checkpointing, NEFTune. They train as they do without this module.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from cai.attention import cpu_tuning
from cai.attention.cpu_tuning import causal_attention, matmul_dtype, pad_to_multiple
from cai.attention.patched_attention import (
    TRIAL_ERRORS,
    find_layout_obstacle,
    is_rounding,
    longest_tried_window,
    patched_attention,
)

if TYPE_CHECKING:
    from transformers.modeling_outputs import BaseModelOutputWithPast

_UNSUPPORTED_ARGUMENTS = (
    "position_ids", "past_key_values", "inputs_embeds", "output_hidden_states", "output_attentions",
)  # fmt: skip
"""Arguments with which a body computes its rows as they are."""


class TokenTree:
    """The distinct tokens of `ids`, (row, column), where `mask` is true: two are one if their rows agree up to them.

    `ids` and `positions`, (token,), are those of the distinct tokens. Each row of `mask` is True up to its padding.
    Where `dtype` prefers padded sizes (`cai.attention.cpu_tuning`), attention sees more padding columns, and copies of
    the first token, whose states nothing uses, fill the tree up.
    """

    def __init__(self, ids: Tensor, mask: Tensor, dtype: torch.dtype) -> None:
        padded_size = functools.partial(pad_to_multiple, dtype=dtype, device=ids.device)
        n_padding = padded_size(ids.shape[1], multiple=8) - ids.shape[1]
        ids, mask = (pad(tensor, (0, n_padding)) for tensor in (ids, mask))
        token_ids, is_token = ids.cpu().numpy(), mask.cpu().numpy().astype(bool)
        self.shape = token_ids.shape
        nodes = np.zeros(self.shape, dtype=np.int64)  # padding points to the first token; nothing attends to padding
        parents = np.zeros(len(token_ids), dtype=np.int64)
        first_occurrences: list[np.ndarray] = []
        n_nodes, vocabulary = 0, int(token_ids.max(initial=0)) + 1
        for column in range(self.shape[1]):
            rows = np.flatnonzero(is_token[:, column])
            parent_and_token = parents[rows] * vocabulary + token_ids[rows, column]
            _, first_rows, node = np.unique(parent_and_token, return_index=True, return_inverse=True)
            nodes[rows, column] = parents[rows] = n_nodes + node
            first_occurrences.append(rows[first_rows] * self.shape[1] + column)
            n_nodes += len(first_rows)
        first_occurrences.append(np.zeros(padded_size(n_nodes) - n_nodes, dtype=np.int64))
        self._nodes = torch.from_numpy(nodes.reshape(-1)).to(ids.device)
        self._first_occurrences = torch.from_numpy(np.concatenate(first_occurrences)).to(ids.device)
        self.ids = ids.flatten()[self._first_occurrences]
        self.positions = self._first_occurrences % self.shape[1]

    @classmethod
    def without_shared_tokens(cls, rows: int, length: int) -> Self:
        """A tree of full rows that share nothing, the largest of its shape; its tokens are all 0."""
        tree = cls.__new__(cls)
        tree.shape = (rows, length)
        tree._nodes = tree._first_occurrences = torch.arange(rows * length)
        tree.ids, tree.positions = torch.zeros(rows * length, dtype=torch.long), tree._first_occurrences % length
        return tree

    def to_rows(self, states: Tensor) -> Tensor:
        """(token, ...) -> (row, column, ...)."""
        return states.index_select(0, self._nodes).view(*self.shape, *states.shape[1:])

    def to_tokens(self, states: Tensor) -> Tensor:
        """(row, column, ...) -> (token, ...)."""
        return states.flatten(0, 1).index_select(0, self._first_occurrences)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Causal attention within the rows; query, key, value and result are (1, heads, token, width)."""
        dtype = value.dtype  # rotary positions may have made query and key float32
        rows = (self.to_rows(states[0].transpose(0, 1).to(dtype)).transpose(1, 2) for states in (query, key, value))
        return self.to_tokens(causal_attention(scale, *rows).transpose(1, 2)).transpose(0, 1)[None]


@contextlib.contextmanager
def compute_shared_tokens_once(models: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block, the bodies of these models compute batches as token trees, where they are on a CPU and can."""
    modules = {id(module): module for model in models for module in model.modules()}
    bodies = [
        module
        for module in modules.values()
        if isinstance(module, PreTrainedModel) and module.base_model is module and _supports_token_trees(module)
    ]
    with contextlib.ExitStack() as stack:
        for body in bodies:
            stack.enter_context(_patched_forward(body))
        yield


@contextlib.contextmanager
def _patched_forward(body: PreTrainedModel) -> Iterator[None]:
    instance_forward = vars(body).get("forward")  # usually None: the class has it
    body.forward = functools.partial(_forward_as_tree, body, body.forward)
    try:
        yield
    finally:
        del body.forward
        if instance_forward is not None:
            body.forward = instance_forward


def _forward_as_tree(
    body: PreTrainedModel, plain_forward: Callable[..., BaseModelOutputWithPast], input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None, **options: Any,
) -> BaseModelOutputWithPast:  # fmt: skip
    """A body's forward pass over the token tree of a batch, or its plain one where that is not the same."""
    needs_rows = _needs_rows(body) or any(options.get(name) is not None for name in _UNSUPPORTED_ARGUMENTS)
    if input_ids is None or needs_rows or not _is_padded_on_the_right(attention_mask):
        return plain_forward(input_ids=input_ids, attention_mask=attention_mask, **options)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    tree = TokenTree(input_ids, mask, matmul_dtype(body.dtype))
    with patched_attention(body, tree.attend):
        output = plain_forward(tree.ids[None], **{**options, "position_ids": tree.positions[None], "use_cache": False})
    output.last_hidden_state = tree.to_rows(output.last_hidden_state[0])[:, : input_ids.shape[1]]
    return output


def _needs_rows(body: PreTrainedModel) -> bool:
    """Whether a trainer has switched on gradient checkpointing or NEFTune."""
    # Checkpointed layers are computed again outside of the patch; NEFTune's noise is scaled by the length of a row.
    noise = getattr(body.get_input_embeddings(), "neftune_noise_alpha", None)
    return body.training and (noise is not None or any(getattr(m, "gradient_checkpointing", 0) for m in body.modules()))


def _is_padded_on_the_right(mask: Tensor | None) -> bool:
    """Whether every row of a mask, (row, column), begins with a token and has no token after padding."""
    return mask is None or (mask.dim() == 2 and bool(mask[:, 0].all() and (mask[:, 1:] <= mask[:, :-1]).all()))


def _supports_token_trees(body: PreTrainedModel) -> bool:
    """Whether the body computes the same either way, as far as config, modules and a trial tell."""
    config = body.config.get_text_config(decoder=True)
    if (
        not cpu_tuning.applies_to(body.device)
        or any(hasattr(parameter, "ds_id") for parameter in body.parameters())  # partitioned by ZeRO-3
        or find_layout_obstacle(body)
        or getattr(config, "output_router_logits", False)
        # A tree would drop the same elements in all rows that share a token.
        or any(getattr(module, name) > 0 for module in body.modules() for name in dropout_attributes(module))
    ):
        return False
    # Two rows differ after a beginning; the third continues another beginning as the first does. What that beginning
    # changes is the measure of how much the two ways may differ, whatever the precision.
    beginning = [4, 9, *(6 + (7 * n) % 50 for n in range(1 + longest_tried_window(body)))]
    rows = [[*beginning, 8, 7, 5], [*beginning, 5, 0, 0], [*beginning[1:], 4, 8, 7, 5]]
    ids = torch.tensor(rows, device=body.device)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    n = len(beginning)
    # `causal_attention` takes another way in bfloat16, in which most train. Weights of several precisions, as a frozen
    # reference has them, are for autocast alone.
    has_one_precision = len({weight.dtype for weight in body.parameters() if weight.is_floating_point()}) == 1
    for uses_bfloat16 in (False, True) if has_one_precision else (True,):
        try:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=uses_bfloat16):
                plain = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
                tree = _forward_as_tree(body, body.forward, ids, mask, use_cache=False).last_hidden_state.float()
        except TRIAL_ERRORS:
            return False
        difference = (plain - tree)[mask.bool()].abs().max()
        from_later_tokens = (plain[0, :n] - plain[1, :n]).abs().max()  # 0 if attention is causal
        from_beginning = (plain[0, n:] - plain[2, n:]).abs().max()
        dtype = torch.bfloat16 if uses_bfloat16 else body.dtype
        if not is_rounding(float(torch.maximum(difference, from_later_tokens)), float(from_beginning), dtype):
            return False
    return True


def dropout_attributes(module: nn.Module) -> list[str]:
    """The attributes of a module, without its children, that are dropout probabilities."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return ["p"]
    # A module keeps a number with `drop` in its name for a function, most often for attention.
    return [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
