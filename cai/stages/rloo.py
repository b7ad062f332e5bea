"""Reinforcement learning without a critic: the policy learns from how each response compares with its siblings.

RLOO (Ahmadian et al. 2024, arXiv 2402.14740), with TRL's trainer (`cai.training.rl.rloo_trainer`). Every step takes
`batch_size` / `n` prompts and samples `n` responses to each. A response is worth its rewards
(`cai.training.rl.rewards`), less `beta` times its divergence from the reference, which is the stage's starting policy:
a frozen copy where all weights are trained, the model with its adapter off where `lora:` is set. Responses are sampled
with vLLM where the profile says `engine: vllm`, else in this process (`cai.training.rl.policy_sampler`).

Each step logs: reward by source and its spread, the share of prompts whose responses all have the same reward, KL from
the reference (nats a response), entropy, lengths, the shares of responses that are cut off and of token runs that
repeat, the share of responses whose probability ratio was clipped, and how many had no reward. As with PPO, the stage
stops before it learns from responses that pass its `limits`, and `samples.jsonl` has some of each step's responses.

Left out: several optimizer steps from one batch of responses other than by passing over all of it again
(`train: {num_iterations}`), and advantages by token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cai.contracts.context import Context
from cai.contracts.training_config import Copy, ReinforcementConfig
from cai.text.errors import StageFailed
from cai.text.left_out import failure_reasons

CURVE_PANELS = {
    "KL from the reference, nats a response": {"kl": "KL"},
    "entropy, nats a token": {"entropy": "entropy"},
    "tokens of a response": {"length": "mean", "length/max": "longest"},
    "share of responses": {"unfinished": "cut off", "repetition": "runs that repeat", "clip_fraction": "clipped"},
}
"""Panels of `curves.svg` beside each source's reward: title to lines, a metric to its label."""


class Config(ReinforcementConfig):
    train_class: ClassVar[str] = "trl.trainer.rloo_config:RLOOConfig"
    owned: ClassVar[tuple[str, ...]] = (
        "num_generations", "num_generations_eval", "max_completion_length", "generation_batch_size",
        "steps_per_generation", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs",
        "chat_template_kwargs", "cache_implementation", "pad_to_multiple_of", "shuffle_dataset", "reward_weights",
        "disable_dropout", "mask_truncated_completions", "sync_ref_model", "ref_model_mixup_alpha",
        "ref_model_sync_steps", "log_completions", "log_multimodal", "num_completions_to_print", "log_unique_prompts",
        "use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex",
        "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port",
        "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size",
        "use_transformers_continuous_batching", "transformers_continuous_batching_config", "use_transformers_paged",
    )  # fmt: skip
    defaults: ClassVar[Mapping[str, Any]] = {
        "num_train_epochs": 1,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "beta": 0.05,
    }

    kind: Literal["rloo"] = "rloo"
    n: int = Field(4, ge=2, description="Responses to each prompt of a step.")

    def copies_of_start(self) -> tuple[Copy, ...]:
        """The policy that samples, and a reference where it is compared with one and no adapter can be switched off."""
        return ("sampler",) if self.lora is not None or self.train.get("beta") == 0 else ("sampler", "reference")

    @model_validator(mode="after")
    def _whole_prompts(self) -> Self:
        if self.batch_size % self.n:
            raise ValueError(f"found batch_size {self.batch_size} with n {self.n}, expected a multiple of n")
        return self


def run(config: Config, context: Context) -> dict[str, Any]:
    """Trains the policy on prompts that are not held out. Raises StageFailed where there are too few for one step."""
    from cai.report.pictures import draw_training_curves
    from cai.training import metrics
    from cai.training.rl.policy_sampler import open_sampler
    from cai.training.rl.rewards import Rewards, select_usable_prompts
    from cai.training.rl.rloo_trainer import LeaveOneOutTrainer
    from cai.training.stage_training import describe_left_out, stage_training
    from cai.training.tokenised_rows import as_dataset

    with stage_training(config, context) as training, Rewards(config.rewards, context, training.chat) as rewards:
        all_prompts = context.prompts(config.prompts)
        prompts, left_out = select_usable_prompts(all_prompts, config, training.chat, rewards)
        if len(prompts) < config.batch_size // config.n:
            raise StageFailed(
                f"stage {config.id!r}: found {len(prompts)} prompts to respond to, expected the "
                f"{config.batch_size // config.n} of one step; left out: {describe_left_out(left_out)}"
            )
        training.report_left_out("prompts", len(all_prompts), left_out)
        with open_sampler(training.start, context.profile, context.folder, config.max_length) as sampler:
            prompt_lengths = [len(training.chat.prompt_ids(prompt["messages"])) for prompt in prompts]
            args = training.arguments(
                max(prompt_lengths) + config.max_new_tokens,
                num_generations=config.n,
                max_completion_length=config.max_new_tokens,
                temperature=config.temperature,
                reward_weights=[reward.weight for reward in config.rewards],
            )
            model = training.load_language_model()
            needs_frozen_copy = "reference" in config.copies_of_start()
            trainer = LeaveOneOutTrainer(
                model=model, reference=training.load_reference() if needs_frozen_copy else None, args=args,
                sampler=sampler, rewards=rewards, prompts={prompt["id"]: prompt for prompt in prompts},
                end_ids=sorted(training.chat.end_ids), folder=context.folder, limits=config.limits,
                progress=context.progress,
                train_dataset=as_dataset([{"prompt": prompt["id"]} for prompt in prompts]),
                processing_class=training.chat.tokenizer, peft_config=training.adapter("CAUSAL_LM", model),
            )  # fmt: skip
            figures = training.train(trainer)
            context.report_left_out(
                trainer.n_scored, "responses", failure_reasons(trainer.reward_failures, {"transient": ""})
            )
            training.save(trainer, prompts=len(prompts))
    steps = metrics.read_metrics(context.folder)
    if trainer.is_world_process_zero():
        reward_lines = {f"reward/{name}": name for name in rewards.names}
        draw_training_curves(context.folder, {"reward": reward_lines, **CURVE_PANELS})
    trend_metrics = ("reward", *(f"reward/{name}" for name in rewards.names), "kl", "entropy", "length")
    trends = {name: {"first": steps[0].get(name), "last": steps[-1].get(name)} for name in trend_metrics}
    counts = {
        "prompts": len(all_prompts),
        "examples": len(prompts),
        "left_out": +left_out,
        "failed_responses": sum(int(entry.get("failed", 0)) for entry in steps),
    }
    return {"training": {config.id: {**figures, **trends, **counts}}}
