"""Training on micro-batches whose tokens are computed once: no padding, and what rows begin with alike only one time.

Outside of attention a model looks at one token at a time, and the state of a token depends on nothing behind it. So the
rows of a batch are read as the tree that they are: two responses to a prompt hold the prompt once. Its distinct tokens
go through the body of the model as one long row; attention lays them out as rows again; what leaves the body is laid
out as its caller expects. Values and gradients are those of the padded batch, up to rounding.

For CPUs, where a product takes as long as it has tokens. Left out: models whose attention is not plainly causal or that
drop out at random, rows padded on the left, gradient checkpointing, NEFTune. They train as they do without this module.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from cai.attention.cpu_kernels import causal_attention, product_dtype
from cai.attention.cpu_sizes import pad_to_multiple
from cai.attention.shared_prefixes import REFUSALS, attending, not_plainly_causal, rounding

if TYPE_CHECKING:
    from transformers.modeling_outputs import BaseModelOutputWithPast

_OTHERWISE = ("position_ids", "past_key_values", "inputs_embeds", "output_hidden_states", "output_attentions")
"""Arguments of a body with which it is called as it is."""


class Tree:
    """The distinct tokens of `ids`, (row, column), where `mask` is true: two are one if all up to them is alike.

    Nothing but padding stands behind a row's first False. Where `dtype` prefers padded sizes, rows have a few
    more columns of padding while attention looks at them, and the first token is there a few times more, for nobody.
    """

    def __init__(self, ids: Tensor, mask: Tensor, dtype: torch.dtype) -> None:
        sizes = functools.partial(pad_to_multiple, dtype=dtype, device=ids.device)
        ids, mask = (pad(each, (0, sizes(ids.shape[1], step=8) - ids.shape[1])) for each in (ids, mask))
        tokens, there = ids.cpu().numpy(), mask.cpu().numpy().astype(bool)
        self.shape = tokens.shape
        nodes = np.zeros(self.shape, dtype=np.int64)  # padding reads the first token; nothing reads padding
        parents = np.zeros(len(tokens), dtype=np.int64)
        first: list[np.ndarray] = []
        size, vocabulary = 0, int(tokens.max(initial=0)) + 1
        for column in range(self.shape[1]):
            rows = np.flatnonzero(there[:, column])
            keys = parents[rows] * vocabulary + tokens[rows, column]
            _, one, node = np.unique(keys, return_index=True, return_inverse=True)
            nodes[rows, column] = parents[rows] = size + node
            first.append(rows[one] * self.shape[1] + column)
            size += len(one)
        first.append(np.zeros(sizes(size) - size, dtype=np.int64))
        self._nodes = torch.from_numpy(nodes.reshape(-1)).to(ids.device)
        self._first = torch.from_numpy(np.concatenate(first)).to(ids.device)
        self.ids = ids.flatten()[self._first]
        self.positions = self._first % self.shape[1]

    def rows(self, states: Tensor) -> Tensor:
        """(token, ...) -> (row, column, ...)."""
        return states.index_select(0, self._nodes).view(*self.shape, *states.shape[1:])

    def tokens(self, states: Tensor) -> Tensor:
        """(row, column, ...) -> (token, ...)."""
        return states.flatten(0, 1).index_select(0, self._first)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Causal attention within the rows; query, key, value and result are (1, heads, token, width)."""
        dtype = value.dtype  # rotary positions may have made the others wider
        rows = (self.rows(each[0].transpose(0, 1).to(dtype)).transpose(1, 2) for each in (query, key, value))
        return self.tokens(causal_attention(scale, *rows).transpose(1, 2)).transpose(0, 1)[None]


@contextlib.contextmanager
def each_token_once(models: Iterable[nn.Module]) -> Iterator[None]:
    """Within, the bodies of these models read batches as trees, as far as they are on a CPU and agree to it."""
    found = {id(each): each for model in models for each in model.modules() if isinstance(each, PreTrainedModel)}
    bodies = [each for each in found.values() if each.base_model is each and _agrees(each)]
    with contextlib.ExitStack() as stack:
        for body in bodies:
            stack.enter_context(_reading_trees(body))
        yield


@contextlib.contextmanager
def _reading_trees(body: PreTrainedModel) -> Iterator[None]:
    before = vars(body).get("forward")  # absent, as a rule: the class has it
    body.forward = functools.partial(_forward, body, body.forward)
    try:
        yield
    finally:
        del body.forward
        if before is not None:
            body.forward = before


def _forward(
    body: PreTrainedModel,
    plain: Callable[..., BaseModelOutputWithPast],
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> BaseModelOutputWithPast:
    """What a body's forward pass does instead."""
    otherwise = _looks_at_rows(body) or any(options.get(name) is not None for name in _OTHERWISE)
    if input_ids is None or otherwise or not _padded_on_the_right(attention_mask):
        return plain(input_ids=input_ids, attention_mask=attention_mask, **options)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    tree = Tree(input_ids, mask, product_dtype(body.dtype))
    with attending(body, tree.attend):
        output = plain(tree.ids[None], **{**options, "position_ids": tree.positions[None], "use_cache": False})
    output.last_hidden_state = tree.rows(output.last_hidden_state[0])[:, : input_ids.shape[1]]
    return output


def _looks_at_rows(body: PreTrainedModel) -> bool:
    """Whether what a trainer has switched on needs the rows: layers that are computed again, noise on embeddings.

    Layers would be computed again outside of the tree's attention, and the noise (NEFTune) is scaled by a row's length.
    """
    noise = getattr(body.get_input_embeddings(), "neftune_noise_alpha", None)
    return body.training and (noise is not None or any(getattr(m, "gradient_checkpointing", 0) for m in body.modules()))


def _padded_on_the_right(mask: Tensor | None) -> bool:
    """Whether every row of a mask, (row, column), begins with a token and has none behind padding."""
    return mask is None or (mask.dim() == 2 and bool(mask[:, 0].all() and (mask[:, 1:] <= mask[:, :-1]).all()))


def _agrees(body: PreTrainedModel) -> bool:
    """Whether the body computes the same either way, as far as config, modules and a trial tell.

    In the trial two rows part after three tokens, and a third has what the first has behind another beginning: what
    that changes is the measure of how much the ways may differ, whatever the precision.
    """
    config = body.config.get_text_config(decoder=True)
    if (
        body.device.type != "cpu"
        or any(hasattr(each, "ds_id") for each in body.parameters())  # parted by ZeRO-3
        or not_plainly_causal(body)
        or getattr(config, "output_router_logits", False)
        or any(getattr(each, name) > 0 for each in body.modules() for name in dropouts(each))  # alike in all rows
    ):
        return False
    ids = torch.tensor([[4, 9, 6, 8, 7, 5], [4, 9, 6, 5, 0, 0], [9, 4, 4, 8, 7, 5]], device=body.device)
    there = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], device=body.device)
    for bfloat16 in (False, True):  # attention goes another way then, and that is what most train in
        try:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                plain = body(input_ids=ids, attention_mask=there, use_cache=False).last_hidden_state.float()
                tree = _forward(body, body.forward, ids, there, use_cache=False).last_hidden_state.float()
        except REFUSALS:
            return False
        differ = (plain - tree)[there.bool()].abs().max()
        ahead = (plain[0, :3] - plain[1, :3]).abs().max()  # of what stands behind these tokens they know nothing
        other = (plain[0, 3:] - plain[2, 3:]).abs().max()
        if not rounding(float(torch.maximum(differ, ahead)), float(other)):
            return False
    return True


def dropouts(module: nn.Module) -> list[str]:
    """The attributes that say how much a module itself drops at random.

    Besides those of torch's modules there are probabilities that a module keeps for a function, attention's most often:
    numbers with `drop` in their name.
    """
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return ["p"]
    return [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
