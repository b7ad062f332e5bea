"""The plain side of ppo.py: TRL 1.12.0's PPOTrainer, under the interpreter of an environment with that version.

    PYTHONPATH=. ENVIRONMENT/bin/python benchmarks/support/ppo_trl.py SPEC.json SEED      as ppo.py calls it

Its settings are those of an experienced user who wants speed: one forward pass over the whole batch where nothing is
trained, no checkpoints and no sample generations. There is no gradient accumulation, because with it TRL 1.12.0 makes
one step an epoch whatever the number of minibatches. Mixed precision is set by accelerate's environment variable,
because TRL 1.12.0 does not pass `bf16=True` on to this trainer.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.support import measurement

Spec = dict[str, Any]


def run(spec: Spec, seed: int) -> dict[str, Any]:
    """Trains by TRL and returns its figures."""
    if spec["plain"]["autocast"]:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    rss_before = measurement.rss()
    clock = measurement.Clock(spec["cpu_seconds"])

    times: list[float] = []
    timer = TrainerCallback()
    timer.on_train_begin = timer.on_step_end = lambda *_, **__: times.append(clock.now())
    frozen = {"dtype": getattr(torch, spec["plain"]["frozen"])}
    tokenizer = AutoTokenizer.from_pretrained(spec["policy"], padding_side="left")
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=trainer_arguments(PPOConfig, spec, seed, folder),
            processing_class=tokenizer,
            model=LlamaForCausalLM.from_pretrained(spec["policy"], dtype=torch.float32),
            ref_model=LlamaForCausalLM.from_pretrained(spec["policy"], **frozen),
            reward_model=LlamaForSequenceClassification.from_pretrained(spec["reward"], **frozen),
            value_model=LlamaForSequenceClassification.from_pretrained(
                spec[spec["plain"]["value"]], num_labels=1, dtype=torch.float32
            ),
            train_dataset=Dataset.from_dict({"input_ids": [prompt["ids"] for prompt in spec["prompts"]]}),
            callbacks=[timer],
        )
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "objective/scores" in entry]
    rewards, kl = ([entry[name] for entry in logged] for name in ("objective/scores", "objective/kl"))
    return measurement.training_figures(times, rewards, kl, rss_before)


def trainer_arguments(config: Any, spec: Spec, seed: int, folder: str) -> Any:
    """TRL's settings as ppo.py specifies them, without mixed precision, which accelerate's variable sets."""
    return config(
        output_dir=folder, seed=seed, per_device_train_batch_size=spec["batch"], gradient_accumulation_steps=1,
        num_mini_batches=spec["minibatches"], num_ppo_epochs=spec["epochs"],
        total_episodes=spec["batch"] * spec["updates"], local_rollout_forward_batch_size=spec["batch"],
        response_length=spec["new_tokens"], stop_token="eos", temperature=spec["temperature"],
        learning_rate=spec["learning_rate"], lr_scheduler_type="constant", kl_coef=spec["kl"],
        kl_estimator=spec["kl_estimator"], cliprange=spec["clip"], cliprange_value=spec["clip_value"],
        vf_coef=spec["value_weight"], gamma=spec["gamma"], lam=spec["lam"], num_sample_generations=0,
        save_strategy="no", report_to="none", logging_steps=1, disable_tqdm=True, use_cpu=True, bf16=False,
    )  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), int(sys.argv[2]))))
