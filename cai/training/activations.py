"""What a training step holds beside weights, gradients and the optimizer's state: activations, and copies of weights.

The forward and backward pass of a fake model (`cai.models.footprint`) are counted tensor by tensor, so that the figure
is that of the architecture's own code: precision, adapters, recomputed activations and attention included. On a CPU
rows are computed as token trees (`cai.attention.token_trees`) in which no token is shared: the most that they hold.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cai.attention.cpu_lm_head import MAX_LOGITS, MAX_VOCABULARY
from cai.attention.patched_attention import TRIAL_ERRORS, find_layout_obstacle, patched_attention
from cai.attention.token_trees import TokenTree
from cai.contracts.training_config import LoRA
from cai.models.footprint import (
    CountedBytes,
    Head,
    LiveBytes,
    cached_sizes,
    count_weights,
    fake_tensors,
    in_half_where_needed,
    meta_model,
    n_parameters,
    of_all_layers,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class StepSetting:
    """How a model is trained in one process."""

    head: Head
    weights: torch.dtype
    """Precision of trained weights."""
    compute: torch.dtype
    """Precision of products: autocast's where weights are float32, that of frozen weights."""
    checkpointing: bool
    """Whether activations are recomputed instead of kept."""
    on_cpu: bool
    lora: LoRA | None = None
    accumulates: bool = True
    """Whether gradients of earlier micro-batches exist while one is computed."""


@dataclass(frozen=True)
class StepFootprint:
    """Parameters of a model, and what one forward and backward pass holds."""

    n_trained: int
    n_frozen: int
    activation_bytes: int


def step_footprint(config: PreTrainedConfig, setting: StepSetting, rows: int, length: int) -> StepFootprint:
    """The footprint of a micro-batch of `rows` rows with `length` tokens each, all of them labelled."""
    key = ("step", config.to_json_string(), str(setting), rows, length)
    return StepFootprint(*cached_sizes(key, 3, lambda: _measure(config, setting, rows, length)))


def _measure(config: PreTrainedConfig, setting: StepSetting, rows: int, length: int) -> list[int]:
    model = _trained_model(config, setting)
    n_trained, n_frozen = (n_parameters(model, trained=trained) for trained in (True, False))
    n_bytes = of_all_layers(config, setting.head, lambda shallow: _step_bytes(shallow, setting, rows, length))
    if setting.lora is None:  # its gradient comes last, when no activation is left
        n_bytes = max(n_bytes, count_weights(config, setting.head).embeddings * setting.weights.itemsize)
    gradients = 0 if setting.accumulates else n_trained * setting.weights.itemsize  # added as activations are freed
    return [n_trained, n_frozen, max(0, n_bytes - gradients)]


def _trained_model(config: PreTrainedConfig, setting: StepSetting) -> nn.Module:
    """The model without memory, in the precision of its weights, under its adapter."""
    if setting.lora is None:
        return meta_model(config, setting.head, setting.weights)  # type: ignore[no-any-return]
    from peft import LoraConfig, get_peft_model

    model = meta_model(config, setting.head, setting.compute)
    task = "CAUSAL_LM" if setting.head == "language" else "SEQ_CLS"
    rank, modules = setting.lora.rank, setting.lora.target_modules
    return get_peft_model(model, LoraConfig(r=rank, target_modules=modules, task_type=task))  # type: ignore[no-any-return]


def _step_bytes(config: PreTrainedConfig, setting: StepSetting, rows: int, length: int) -> CountedBytes:
    def measure(config: PreTrainedConfig, weights: torch.dtype) -> CountedBytes:
        compute = setting.compute if weights == setting.weights else weights
        return _count_step_bytes(config, replace(setting, weights=weights, compute=compute), rows, length)

    return in_half_where_needed(measure, config, setting.weights)


def _count_step_bytes(config: PreTrainedConfig, setting: StepSetting, rows: int, length: int) -> CountedBytes:
    """What one forward and backward pass holds, with one gradient at a time; kept is what the body's forward leaves."""
    trained = _trained_model(config, setting)
    model: Any = trained.get_base_model() if setting.lora else trained  # type: ignore[operator]
    with fake_tensors(trained):
        if setting.checkpointing:
            with warnings.catch_warnings(action="ignore"):  # of the method's new name in transformers 5.23
                model.gradient_checkpointing_enable({"use_reentrant": False})
            if setting.lora:
                model.enable_input_require_grads()
        _freeze_untied_embeddings(model)
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
        uses_autocast = setting.weights != setting.compute
        with LiveBytes(trained) as live, torch.autocast("cpu", setting.compute, enabled=uses_autocast):
            hidden = _hidden_states(model, rows, length, setting)
            kept = live.n_bytes
            loss = _head_loss(model, hidden.reshape(-1, hidden.shape[-1]), setting)
            del hidden
            loss.backward()  # type: ignore[no-untyped-call]
        return CountedBytes(kept, live.peak)


def _freeze_untied_embeddings(model: PreTrainedModel) -> None:
    """Leaves out a gradient that is larger than the activations of a few layers, and comes when these are gone."""
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output is None or output.weight is not embeddings.weight:
        embeddings.weight.requires_grad_(False)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _hidden_states(model: PreTrainedModel, rows: int, length: int, setting: StepSetting) -> Tensor:
    """(rows, length, width) of the body's last layer."""
    ids = torch.zeros((rows, length), dtype=torch.long)
    body = model.base_model
    if setting.on_cpu and not setting.checkpointing and not find_layout_obstacle(body):
        tree = TokenTree.without_shared_tokens(rows, length)
        with contextlib.suppress(*TRIAL_ERRORS), patched_attention(body, tree.attend):
            states = body(tree.ids[None], position_ids=tree.positions[None], use_cache=False).last_hidden_state
            return tree.to_rows(states[0])
    output = body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return output.last_hidden_state  # type: ignore[no-any-return]


def _head_loss(model: PreTrainedModel, hidden: Tensor, setting: StepSetting) -> Tensor:
    """A loss of the states of all tokens, (token, width), through the head that training uses."""
    head = model.get_output_embeddings()
    if head is None:
        return model.score(hidden).float().sum()  # type: ignore[operator, no-any-return]
    n_tokens, vocabulary = len(hidden), head.weight.shape[0]
    targets = torch.zeros(n_tokens, dtype=torch.long)
    if setting.on_cpu and vocabulary <= MAX_VOCABULARY and n_tokens * vocabulary <= MAX_LOGITS:
        return head(hidden).float().log_softmax(dim=-1).gather(1, targets[:, None]).sum()  # type: ignore[no-any-return]
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    log_probs, *_ = ChunkedLogProbFunction.apply(
        hidden, head.weight, head.bias, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs", "entropy")
    )
    return log_probs.sum()  # type: ignore[no-any-return]
