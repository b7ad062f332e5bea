"""A policy and its value function as one module, so that whatever wraps a model (DDP, DeepSpeed, autocast) wraps both.

The value function is a linear head on the policy's last hidden states or, as a `critic`, a model of its own with one
score a token. The head starts at zero: every value is 0 until it has learned. Log-probabilities come from TRL's fused
language-model head, tile by tile, or on a CPU from that of `cai.attention.cpu_lm_head`: the logits of a whole batch
never exist at once.

Left out: sharing a trunk with a critic through adapters, several policies.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from cai.attention.cpu_lm_head import add_cpu_lm_head
from cai.training.dropout import configured_dropout, disable_dropout

VALUE_FILE = "value.safetensors"
"""In a resume point: the weights of the value function that are not the policy's."""
POLICY_PREFIX = "policy."
"""Begins the names of the policy's weights in the module."""


class ActorCriticOutput(NamedTuple):
    """What the module computes for sequences, each (batch, seq − 1): column t is about the token at t + 1.

    `log_probs` and `entropy` in nats, zero where the label is -100; `values` are of the state before that token, empty
    where they were not asked for.
    """

    log_probs: Tensor
    entropy: Tensor
    values: Tensor


def add_log_prob_head(model: PreTrainedModel, temperature: float, *, entropy: bool = False) -> None:
    """Makes `model(…, labels=labels, fused_lm_head=True)` return log-probabilities at `temperature`, and entropy."""
    add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", *(["entropy"] if entropy else [])))
    add_cpu_lm_head(model, entropy=entropy, temperature=temperature)


def with_adapter(model: PreTrainedModel, config: PeftConfig) -> Any:
    """The model with a new adapter, in float32 except where weights are partitioned."""
    return get_peft_model(model, config, autocast_adapter_dtype=not _is_partitioned(model))


def _is_partitioned(model: PreTrainedModel) -> bool:
    """Whether ZeRO-3 partitions the model. It then takes one precision for all trained weights (deepspeed#8072)."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


class ActorCritic(nn.Module):
    """`policy` is a causal language model, or one with an adapter; `critic` a sequence classifier with one label."""

    def __init__(
        self, policy: PreTrainedModel, critic: PreTrainedModel | None = None, temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic
        add_log_prob_head(self.language_model, temperature, entropy=True)
        width = self.language_model.config.get_text_config().hidden_size
        self.value_head = nn.Linear(width, 1) if critic is None else None
        if self.value_head is not None:
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
            self.value_head.to(self.language_model.device)
            if _is_partitioned(self.language_model):
                self.value_head.to(next(self.language_model.parameters()).dtype)
        disable_dropout(self)

    @property
    def language_model(self) -> PreTrainedModel:
        """The policy's model without its adapter."""
        return self.policy.get_base_model() if is_peft_model(self.policy) else self.policy  # type: ignore[no-any-return]

    @property
    def config(self) -> Any:
        """The policy's config, from which trainers and DeepSpeed read sizes."""
        return self.policy.config

    @property
    def value_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters that belong to the value function alone."""
        module = self.value_head if self.critic is None else self.critic
        assert module is not None
        return [parameter for parameter in module.parameters() if parameter.requires_grad]

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Called by Trainer where activations are to be recomputed instead of kept."""
        for model in (self.policy, self.critic):
            if model is not None:
                model.gradient_checkpointing_enable(**options)
        if is_peft_model(self.policy):
            self.policy.enable_input_require_grads()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, with_values: bool = True
    ) -> ActorCriticOutput:
        """input_ids, attention_mask, labels: (batch, seq), padded on the right; -100 where no token was sampled."""
        hidden_states: list[Tensor] = []
        body = self.language_model.base_model
        hook = body.register_forward_hook(lambda module, args, output: hidden_states.append(output.last_hidden_state))
        try:
            output = self.policy(
                input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False, fused_lm_head=True
            )
        finally:
            hook.remove()
        if not with_values:
            return ActorCriticOutput(output.log_probs, output.entropy, output.log_probs.new_empty(0))
        if self.critic is None:
            assert self.value_head is not None
            hidden, head = hidden_states[0], self.value_head
        else:
            critic_body, head = self.critic.base_model, self.critic.score
            hidden = critic_body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):  # bfloat16 has three digits: values stay in float32
            values = head(hidden[:, :-1].to(next(head.parameters()).dtype)).squeeze(-1).float()
        return ActorCriticOutput(output.log_probs, output.entropy, values)

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Writes the policy's folder and the value function; `state` is gathered where weights are partitioned."""
        policy_state: dict[str, Tensor] = {}
        value_state: dict[str, Tensor] = {}
        for name, tensor in (self.state_dict() if state is None else state).items():
            if name.startswith(POLICY_PREFIX):
                policy_state[name.removeprefix(POLICY_PREFIX)] = tensor
            else:
                value_state[name] = tensor.detach().contiguous().cpu()
        with configured_dropout(self):
            self.policy.save_pretrained(folder, state_dict=policy_state)
        save_file(value_state, folder / VALUE_FILE, metadata={"format": "pt"})

    def load(self, folder: Path) -> None:
        """Loads the weights that `save` wrote. Raises ValueError where they do not fit the policy."""
        self.load_state_dict(load_file(folder / VALUE_FILE), strict=False)
        if is_peft_model(self.policy):
            set_peft_model_state_dict(self.policy, load_peft_weights(str(folder), device="cpu"))
            return
        state: dict[str, Tensor] = {}
        for path in sorted(folder.glob("model*.safetensors")):
            state |= load_file(path)
        mismatch = self.policy.load_state_dict(state, strict=False)
        tied = set(getattr(self.policy, "all_tied_weights_keys", None) or {})
        if names := (set(mismatch.missing_keys) - tied) | set(mismatch.unexpected_keys):
            raise ValueError(f"{folder}: weights do not fit the policy: {', '.join(sorted(names)[:3])}")
