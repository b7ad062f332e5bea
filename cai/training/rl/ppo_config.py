"""The fields of `train:` in a `ppo` stage: transformers' arguments and PPO's own, by the names that TRL 1.12 used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments


@dataclass
class PPOConfig(TrainingArguments):  # type: ignore[misc]
    """Schulman et al. 2017 (arXiv 1707.06347) with the details of Ouyang et al. 2022 (arXiv 2203.02155).

    `num_train_epochs` counts rollouts: an epoch of the trainer is `num_ppo_epochs` passes over one rollout.

    The KL in a token's reward is always estimated by k1, whose gradient there is the KL's; k3 would push the policy
    away from the reference. `kl_estimator` sets how the KL is measured: k3 has the lower variance.

    `cliprange_value` suits rewards that differ by about 1. Where they differ by more, values need many rollouts to
    reach them: if `value/clip_fraction` stays high, raise it in proportion or switch it off (null).

    Dropout is off, that of `lora:` too, so that the ratio to the rollout's policy starts at 1.
    """

    num_ppo_epochs: int = field(default=2, metadata={"help": "Passes over each rollout."})
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL to the reference in a token's reward."})
    kl_estimator: Literal["k1", "k3"] = field(
        default="k1", metadata={"help": "Of the KL that is logged and that `kl_target` and `limits` see."}
    )
    kl_target: float | None = field(
        default=None, metadata={"help": "KL of a response in nats, for an adaptive `kl_coef`."}
    )
    kl_horizon: int = field(default=10_000, metadata={"help": "Episodes over which it adapts (Ziegler et al. 2019)."})
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "GAE's lambda."})
    cliprange: float = field(default=0.2, metadata={"help": "How far a token's ratio may move."})
    cliprange_value: float | None = field(default=0.2, metadata={"help": "How far a value may move; None = no limit."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    value_lr_multiple: float = field(default=10.0, metadata={"help": "A value head's learning rate over the policy's."})
    missing_eos_penalty: float = field(
        default=0.0, metadata={"help": "Lowers the score of responses that are cut off."}
    )
