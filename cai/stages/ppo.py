"""Proximal policy optimisation: the policy learns from rewards of the responses that it draws.

Bai et al. 2022 (arXiv 2212.08073, section 4) with the rewards of a model that preferences trained; Lee et al. 2023
(arXiv 2309.00267) with those of the judge itself. The method is in `cai.rl.ppo_trainer`. The reference is the stage's
starting policy: a frozen copy where all weights are trained, the model with its adapter off where `lora:` is.

Left out: a policy on an engine other than `local` while it learns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cai.engines import Sampling
from cai.errors import BadInput, StageFailed
from cai.rl.watch import Limits
from cai.stages import Context, ReinforcementConfig, Rows, is_held_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cai.chat import Chat
    from cai.checkpoint import Model
    from cai.records import Prompt
    from cai.rl.rewards import Rewards


class Config(ReinforcementConfig):
    gives: ClassVar[Rows] = "policy"
    names_models: ClassVar[tuple[str, ...]] = (*ReinforcementConfig.names_models, "critic")
    train_class: ClassVar[str] = "cai.rl.ppo_config:PPOConfig"
    owned: ClassVar[tuple[str, ...]] = ("num_train_epochs", "max_steps")
    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 1e-6,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.05,  # below 1: of all steps
    }

    kind: Literal["ppo"] = "ppo"
    rollouts: int = Field(16, ge=1, description="Times that responses are drawn and learned from.")
    rollout_size: int = Field(256, ge=1, description="Responses in each; a multiple of batch_size.")
    reference: Literal["start", "none"] = Field(
        "start", description="What the KL is to: the stage's starting policy; none = nothing."
    )
    critic: str | None = Field(
        None, description="Model or reward stage that a value model starts from; absent = a head on the policy."
    )
    limits: Limits = Field(Limits.model_validate({}), description="How far the policy may go before the stage stops.")


def run(config: Config, context: Context) -> dict[str, Any]:
    """Trains the policy on prompts that are not held out. Raises StageFailed where none fits, or limits are passed."""
    from cai import checkpoint, training
    from cai.chat import Chat
    from cai.rl.actor_critic import ActorCritic
    from cai.rl.ppo_trainer import PPOTrainer
    from cai.rl.rewards import Rewards
    from cai.rl.sampler import PolicySampler

    start = context.model(config.model)
    chat = Chat.load(start)
    with training.quiet(context), Rewards(config.rewards, context, chat) as rewards:
        prompts, left_out = _fitting(config, context, chat, rewards)
        args = training.arguments(config, context, num_train_epochs=config.rollouts, include_num_input_tokens_seen="no")
        policy = training.loaded(checkpoint.load_causal_lm, start, context)
        reference: PreTrainedModel | str | None = None
        if config.lora is not None:
            from peft import get_peft_model

            policy = get_peft_model(policy, training.adapter(config.lora, "CAUSAL_LM"))
        if config.reference == "start":
            reference = "adapter off" if config.lora is not None else _frozen(start, context, config.temperature)
        critic = None
        if config.critic is not None:
            critic = training.loaded(checkpoint.load_sequence_classifier, context.model(config.critic), context)
        trainer = PPOTrainer(
            ActorCritic(policy, critic, config.temperature),
            args,
            prompts=prompts,
            sampler=PolicySampler(start, context.profile),
            rewards=rewards,
            reference=reference,
            rollout_size=config.rollout_size,
            sampling=Sampling(config.max_new_tokens, config.temperature),
            pad_id=chat.pad_id,
            folder=context.folder,
            limits=config.limits,
            processing_class=chat.tokenizer,
        )
        figures = training.train(trainer, context)
        training.save(trainer, context, chat, config.model, {"kind": config.kind}, part="policy")
    rollouts = [entry for entry in training.read_metrics(context.folder) if "reward" in entry]
    shown = {name: {"first": rollouts[0][name], "last": rollouts[-1][name]} for name in SHOWN}
    counts = {"prompts": len(prompts), "left_out": +left_out, "rollouts": len(rollouts)}
    return {"training": {config.id: {**figures, **counts, **shown}}}


SHOWN = ("reward", "kl", "length", "unfinished", "value/explained_variance")
"""What the stage reports of its first and last rollout."""


def _fitting(config: Config, context: Context, chat: Chat, rewards: Rewards) -> tuple[list[Prompt], Counter[str]]:
    """The prompts that responses are drawn to, and how many were left out for which reason."""
    from cai import training

    limit = training.longest(chat, config.max_length)
    left_out: Counter[str] = Counter()
    fitting: list[Prompt] = []
    for prompt in context.prompts(config.prompts):
        if is_held_out(prompt):
            left_out["held_out"] += 1
            continue
        try:
            n_tokens = len(chat.prompt_ids(prompt["messages"]))
        except BadInput:  # a conversation that the model's template does not take
            left_out["refused_by_template"] += 1
            continue
        if n_tokens + config.max_new_tokens > limit:
            left_out["too_long"] += 1
        elif rewards.reason_against(prompt):
            left_out["without_reward"] += 1
        else:
            fitting.append(prompt)
    if not fitting:
        raise StageFailed(f"stage {config.id!r}: no prompt to respond to; left out: {training.reasons(left_out)}")
    return fitting, left_out


def _frozen(start: Model, context: Context, temperature: float) -> PreTrainedModel:
    """The starting policy as it is now and stays. In float32, like the policy: their KL is 0 at the start."""
    from cai import checkpoint
    from cai.rl.actor_critic import add_scoring

    with checkpoint.whole():
        model = checkpoint.load_causal_lm(start, device=context.profile.device).requires_grad_(False)
    add_scoring(model, temperature)
    return model
