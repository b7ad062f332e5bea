"""Proximal policy optimisation: the policy learns from rewards of the responses that it samples.

Bai et al. 2022 (arXiv 2212.08073, section 4) with a reward model trained on preferences; Lee et al. 2023 (arXiv
2309.00267) with the judge's own ratings. The method is in `cai.training.rl.ppo_trainer`. The reference is the stage's
starting policy: a frozen copy where all weights are trained, the model with its adapter off where `lora:` is set.
Responses are sampled with vLLM where the profile says `engine: vllm`, else in this process
(`cai.training.rl.policy_sampler`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cai.contracts.context import Context
from cai.contracts.engine import Sampling
from cai.contracts.references import ModelRef
from cai.contracts.training_config import Copy, ReinforcementConfig
from cai.text.errors import BadInput
from cai.text.left_out import failure_reasons

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Config(ReinforcementConfig):
    train_class: ClassVar[str] = "cai.training.rl.ppo_config:PPOConfig"
    owned: ClassVar[tuple[str, ...]] = ("num_train_epochs", "max_steps")
    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 1e-6,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.05,  # below 1: of all steps
    }

    kind: Literal["ppo"] = "ppo"
    rollouts: int = Field(16, ge=1, description="Times that responses are sampled and learned from.")
    rollout_size: int = Field(256, ge=1, description="Responses in each; a multiple of batch_size.")
    reference: Literal["start", "none"] = Field("start", description="KL to: the stage's starting policy, or nothing.")
    critic: ModelRef | None = Field(None, description="Where a value model starts from; absent = a head on the policy.")

    @property
    def responses_at_once(self) -> int:
        """Those of one rollout."""
        return self.rollout_size

    def copies_of_start(self) -> tuple[Copy, ...]:
        """The policy that samples, and a reference where no adapter can be switched off."""
        return ("sampler",) if self.lora is not None or self.reference == "none" else ("sampler", "whole reference")

    @model_validator(mode="after")
    def _whole_steps(self) -> Self:
        size, horizon = self.rollout_size, self.train.get("kl_horizon", self.rollout_size)
        if size % self.batch_size:
            raise ValueError(f"found rollout_size {size} with batch_size {self.batch_size}, expected a multiple of it")
        if self.train.get("kl_target") is not None and horizon < size:
            expected = f"rollout_size {size} or more: the coefficient would overshoot"
            raise ValueError(f"found `kl_horizon: {horizon}` under `train`, expected {expected}")
        for name, (least, greatest) in RANGES.items():
            value = self.train.get(name)
            if isinstance(value, int | float) and not least <= value <= greatest:
                upper_bound = "or more" if greatest == math.inf else f"to {greatest:g}"
                raise ValueError(f"found `{name}: {value}` under `train`, expected {least:g} {upper_bound}")
        return self


def run(config: Config, context: Context) -> dict[str, Any]:
    """Trains the policy on prompts that are not held out. Raises StageFailed where none fits or a limit is passed."""
    from cai.models.chat import Chat
    from cai.report.pictures import draw_training_curves
    from cai.training import metrics
    from cai.training.rl.actor_critic import ActorCritic, add_log_prob_head, with_adapter
    from cai.training.rl.policy_sampler import open_sampler
    from cai.training.rl.ppo_trainer import PPOTrainer
    from cai.training.rl.rewards import Rewards, select_usable_prompts
    from cai.training.stage_training import stage_training

    with (
        stage_training(config, context) as training,
        Rewards(config.rewards, context, training.chat) as rewards,
        open_sampler(training.start, context.profile, context.folder, config.max_length) as sampler,
    ):
        chat = training.chat
        all_prompts = context.prompts(config.prompts)
        prompts, left_out = select_usable_prompts(all_prompts, config, chat, rewards)
        training.require(prompts, "no prompt to respond to", left_out)
        training.report_left_out("prompts", len(all_prompts), left_out)

        longest = config.max_new_tokens + max(len(chat.prompt_ids(prompt["messages"])) for prompt in prompts)
        args = training.arguments(longest, num_train_epochs=config.rollouts, include_num_input_tokens_seen="no")
        policy = training.load_language_model()
        reference: PreTrainedModel | str | None = None
        if config.lora is not None:
            policy = with_adapter(policy, training.adapter("CAUSAL_LM", policy))
        if config.reference == "start":
            reference = "adapter off"
            if config.lora is None:
                reference = training.load_reference(whole=True)
                add_log_prob_head(reference, config.temperature)
        critic = None
        if config.critic is not None:
            critic_start = context.model(config.critic)
            if not chat.same_ids(Chat.load(critic_start)):
                raise BadInput(
                    f"stage {config.id!r}: the critic {config.critic!r} reads other token ids than the policy, "
                    f"expected a model with the same tokenizer and chat template"
                )
            critic = training.load_classifier(critic_start)
        trainer = PPOTrainer(
            ActorCritic(policy, critic, config.temperature), args,
            prompts=prompts, sampler=sampler, rewards=rewards, reference=reference, rollout_size=config.rollout_size,
            sampling=Sampling(config.max_new_tokens, config.temperature), pad_id=chat.pad_id, folder=context.folder,
            limits=config.limits, processing_class=chat.tokenizer, progress=context.progress,
        )  # fmt: skip
        figures = training.train(trainer)
        context.report_left_out(
            trainer.n_scored, "responses", failure_reasons(trainer.reward_failures, {"transient": ""})
        )
        training.save(trainer, submodule="policy")
    if trainer.is_world_process_zero():
        reward_lines = {f"reward/{name}": name for name in rewards.names}
        draw_training_curves(context.folder, {"reward": reward_lines, **CURVE_PANELS})
    rollouts = [entry for entry in metrics.read_metrics(context.folder) if "reward" in entry]
    trends = {name: {"first": rollouts[0].get(name), "last": rollouts[-1].get(name)} for name in TREND_METRICS}
    counts = {"prompts": len(prompts), "left_out": +left_out, "rollouts": len(rollouts)}
    return {"training": {config.id: {**figures, **counts, **trends}}}


RANGES = {
    "num_ppo_epochs": (1, math.inf), "kl_coef": (0, math.inf), "kl_target": (1e-6, math.inf),
    "kl_horizon": (1, math.inf), "gamma": (0, 1), "lam": (0, 1), "cliprange": (1e-6, math.inf),
    "cliprange_value": (1e-6, math.inf), "vf_coef": (0, math.inf), "value_lr_multiple": (1e-6, math.inf),
    "missing_eos_penalty": (0, math.inf),
}  # fmt: skip
"""Least and greatest value of PPO's own numbers under `train:`."""
CURVE_PANELS = {
    "KL from the reference, nats a response": {"kl": "KL"},
    "entropy, nats a token": {"policy/entropy": "entropy"},
    "tokens of a response": {"length": "mean"},
    "share of responses": {"unfinished": "cut off", "repetition": "runs that repeat"},
    "share of tokens": {"policy/clip_fraction": "policy clipped", "value/clip_fraction": "value clipped"},
    "variance of returns that values explain": {"value/explained_variance": "share"},
}
"""Panels of `curves.svg` beside each source's reward: title to lines, a metric to its label."""

TREND_METRICS = ("reward", "kl", "length", "unfinished", "value/explained_variance")
"""Metrics that the stage reports for its first and last rollout."""
