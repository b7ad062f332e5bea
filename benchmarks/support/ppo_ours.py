"""Our side of ppo.py: the trainer of the stage `ppo`, without a recipe.

python benchmarks/support/ppo_ours.py SPEC.json SEED      as ppo.py calls it
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.support import measurement

Spec = dict[str, Any]
MICRO_BATCH = 8
"""Responses in one forward pass of the training."""


def run(spec: Spec, seed: int) -> dict[str, Any]:
    """Trains by `cai.training.rl.ppo_trainer` and returns its figures."""
    from transformers import TrainerCallback, set_seed

    from cai.attention.cpu_tuning import float32_attention
    from cai.contracts.engine import Sampling
    from cai.contracts.profile import load_profile
    from cai.contracts.training_config import Limits
    from cai.models.loading import load_causal_lm
    from cai.models.reference import resolve
    from cai.models.reward_model import RewardModel
    from cai.storage.rows import Failure, stable_id
    from cai.training.rl.actor_critic import ActorCritic, add_log_prob_head
    from cai.training.rl.policy_sampler import PolicySampler
    from cai.training.rl.ppo_config import PPOConfig
    from cai.training.rl.ppo_trainer import PPOTrainer
    from cai.training.rl.rewards import Response

    rss_before = measurement.rss()
    clock = measurement.Clock(spec["cpu_seconds"])
    profile = load_profile("cpu")
    start = resolve(spec["policy"], folder=Path())
    model = RewardModel.load(resolve(spec["reward"], folder=Path()), profile)

    class Rewards:
        """The reward model on the sampled token ids."""

        def scores(
            self, responses: Sequence[Response], *, on_answer: Callable[[float], None]
        ) -> list[dict[str, float] | Failure]:
            ids = [response.prompt_ids + response.token_ids for response in responses]
            return [{"model": score} for score in model.scores(ids)]

        def total(self, scores: Mapping[str, float]) -> float:
            return scores["model"]

    times: list[float] = []
    timer = TrainerCallback()
    timer.on_train_begin = timer.on_epoch_end = lambda *_, **__: times.append(clock.now())
    set_seed(seed)
    reference = load_causal_lm(start, profile.dtype).requires_grad_(False)
    add_log_prob_head(reference, spec["temperature"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            ActorCritic(load_causal_lm(start).requires_grad_(True), temperature=spec["temperature"]),
            trainer_arguments(PPOConfig, spec, seed, folder),
            prompts=[
                {"id": stable_id(prompt["ids"]), "messages": prompt["messages"], "tags": [], "source": "benchmark"}
                for prompt in spec["prompts"]
            ],
            sampler=PolicySampler(start, profile),
            rewards=Rewards(),
            reference=reference,
            rollout_size=spec["batch"],
            sampling=Sampling(spec["new_tokens"], spec["temperature"]),
            pad_id=model.chat.pad_id,
            folder=Path(folder),
            limits=Limits(kl=1e9, length=1e9, unfinished=1.0, repetition=1.0, failed=1.0),
        )
        trainer.add_callback(timer)
        with float32_attention(trainer.args.device):
            trainer.train()
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    rewards, kl = ([entry[name] for entry in logged] for name in ("reward", "kl"))
    return measurement.training_figures(times, rewards, kl, rss_before)


def trainer_arguments(config: Any, spec: Spec, seed: int, folder: str) -> Any:
    """The trainer's settings as ppo.py specifies them."""
    step = spec["batch"] // spec["minibatches"]
    micro = min(MICRO_BATCH, step)
    return config(
        output_dir=folder, seed=seed, num_train_epochs=spec["updates"], num_ppo_epochs=spec["epochs"],
        per_device_train_batch_size=micro, gradient_accumulation_steps=step // micro,
        learning_rate=spec["learning_rate"], lr_scheduler_type="constant", max_grad_norm=0.0, kl_coef=spec["kl"],
        kl_estimator=spec["kl_estimator"], cliprange=spec["clip"], cliprange_value=spec["clip_value"],
        vf_coef=spec["value_weight"], gamma=spec["gamma"], lam=spec["lam"], save_strategy="no", report_to="none",
        logging_steps=1, disable_tqdm=True, use_cpu=True, bf16=True,
    )  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), int(sys.argv[2]))))
