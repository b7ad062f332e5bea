"""A policy and its value function as one module, so that whatever wraps a model (DDP, DeepSpeed, autocast) wraps both.

The value function is a linear head on the policy's last hidden states or, as a `critic`, a model of its own with one
score a token. The head begins at zero: every value is 0 until it has learned. Log-probabilities come from TRL's fused
language-model head, tile by tile, or on a CPU from that of `cai.attention.cpu_kernels`: logits of a whole batch never
exist.

Left out: sharing a trunk with a critic through adapters, several policies.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from peft import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from cai.attention.cpu_kernels import add_lm_head
from cai.training.arguments import without_dropout

VALUE_FILE = "value.safetensors"
"""In a checkpoint's folder: what of the value function is not the policy's."""
POLICY = "policy."
"""Begins the names of the policy's weights in the module."""


class Scored(NamedTuple):
    """What the module says of sequences, each (batch, seq − 1): column t is about the token at t + 1.

    `log_probs` and `entropy` in nats, zero where the label is -100; `values` are of the state before that token,
    empty where none were asked for.
    """

    log_probs: Tensor
    entropy: Tensor
    values: Tensor


def add_scoring(model: PreTrainedModel, temperature: float, *, entropy: bool = False) -> None:
    """Makes `model(…, labels=labels, fused_lm_head=True)` give log-probabilities at `temperature`, and entropy."""
    add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", *(["entropy"] if entropy else [])))
    add_lm_head(model, entropy=entropy, temperature=temperature)


class ActorCritic(nn.Module):
    """`policy` is a causal language model, or one with an adapter; `critic` a sequence classifier with one label."""

    def __init__(
        self, policy: PreTrainedModel, critic: PreTrainedModel | None = None, temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic
        add_scoring(self.language_model, temperature, entropy=True)
        width = self.language_model.config.get_text_config().hidden_size
        self.value_head = nn.Linear(width, 1) if critic is None else None
        if self.value_head is not None:
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
            self.value_head.to(self.language_model.device)
            weight = next(self.language_model.parameters())
            if hasattr(weight, "ds_id"):  # parted by ZeRO-3, which lays all weights into one buffer
                self.value_head.to(weight.dtype)
        without_dropout(self)

    @property
    def language_model(self) -> PreTrainedModel:
        """The policy below its adapter."""
        return self.policy.get_base_model() if is_peft_model(self.policy) else self.policy  # type: ignore[no-any-return]

    @property
    def config(self) -> Any:
        """The policy's: trainers and DeepSpeed read sizes from it."""
        return self.policy.config

    @property
    def value_parameters(self) -> list[nn.Parameter]:
        """What the value function alone learns."""
        part = self.value_head if self.critic is None else self.critic
        assert part is not None
        return [each for each in part.parameters() if each.requires_grad]

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """For trainers: activations are computed again instead of kept."""
        for model in (self.policy, self.critic):
            if model is not None:
                model.gradient_checkpointing_enable(**options)
        if is_peft_model(self.policy):
            self.policy.enable_input_require_grads()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, valued: bool = True) -> Scored:
        """input_ids, attention_mask, labels: (batch, seq), padded on the right; -100 where no token was drawn.

        Without `valued` no value function is asked.
        """
        seen: list[Tensor] = []
        body = self.language_model.base_model
        hook = body.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
        try:
            output = self.policy(
                input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False, fused_lm_head=True
            )
        finally:
            hook.remove()
        if not valued:
            return Scored(output.log_probs, output.entropy, output.log_probs.new_empty(0))
        if self.critic is None:
            assert self.value_head is not None
            hidden, head = seen[0], self.value_head
        else:
            hidden = self.critic.base_model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).last_hidden_state
            head = self.critic.score
        with torch.autocast(hidden.device.type, enabled=False):  # bfloat16 has three digits; a float32 head keeps more
            values = head(hidden[:, :-1].to(next(head.parameters()).dtype)).squeeze(-1).float()
        return Scored(output.log_probs, output.entropy, values)

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Writes the policy as a model's or an adapter's folder, and the value function beside it.

        `state` is the module's whole state where its weights are spread over processes.
        """
        whole = dict(self.state_dict() if state is None else state)
        policy = {name.removeprefix(POLICY): each for name, each in whole.items() if name.startswith(POLICY)}
        self.policy.save_pretrained(folder, state_dict=policy)
        value = {name: each.detach().contiguous().cpu() for name, each in whole.items() if not name.startswith(POLICY)}
        save_file(value, folder / VALUE_FILE, metadata={"format": "pt"})

    def load(self, folder: Path) -> None:
        """Takes the weights that `save` wrote."""
        self.load_state_dict(load_file(folder / VALUE_FILE), strict=False)
        if is_peft_model(self.policy):
            set_peft_model_state_dict(self.policy, load_peft_weights(str(folder), device="cpu"))
            return
        state: dict[str, Tensor] = {}
        for path in sorted(folder.glob("model*.safetensors")):
            state |= load_file(path)
        found = self.policy.load_state_dict(state, strict=False)
        tied = set(getattr(self.policy, "all_tied_weights_keys", None) or {})
        if missing := (set(found.missing_keys) - tied) | set(found.unexpected_keys):
            raise ValueError(f"{folder}: weights do not fit the policy: {', '.join(sorted(missing)[:3])}")
