"""TRL 1.12.0's PPOTrainer on what `ppo.py` gives it: the plain side, run under an interpreter that has that version.

    ENVIRONMENT/bin/python benchmarks/_trl_ppo_peer.py SPEC.json SEED      as `ppo.py` calls it

As an experienced user would have it run fast: one forward over the whole batch where nothing is learned, no
accumulation (with it this version takes one step an epoch, however many minibatches there are), no checkpoints and no
samples along the way, and mixed precision by accelerate's own variable, since `bf16=True` no longer reaches this
trainer.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import _measure

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

    before = _measure.rss()
    clock = _measure.Clock(spec["cpu_seconds"])

    class Times(TrainerCallback):  # type: ignore[misc]
        """When each update ended."""

        ends: list[float]

        def __init__(self) -> None:
            self.ends = []

        def on_train_begin(self, *_: object, **__: object) -> None:
            self.ends.append(clock.now())

        def on_step_end(self, *_: object, **__: object) -> None:
            self.ends.append(clock.now())

    times = Times()
    frozen = {"dtype": getattr(torch, spec["plain"]["frozen"])}
    tokenizer = AutoTokenizer.from_pretrained(spec["policy"], padding_side="left")
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=arguments(PPOConfig, spec, seed, folder),
            processing_class=tokenizer,
            model=LlamaForCausalLM.from_pretrained(spec["policy"], dtype=torch.float32),
            ref_model=LlamaForCausalLM.from_pretrained(spec["policy"], **frozen),
            reward_model=LlamaForSequenceClassification.from_pretrained(spec["reward"], **frozen),
            value_model=LlamaForSequenceClassification.from_pretrained(
                spec[spec["plain"]["value"]], num_labels=1, dtype=torch.float32
            ),
            train_dataset=Dataset.from_dict({"input_ids": [prompt["ids"] for prompt in spec["prompts"]]}),
            callbacks=[times],
        )
        trainer.train()
    logged = [each for each in trainer.state.log_history if "objective/scores" in each]
    rewards, kl = ([each[name] for each in logged] for name in ("objective/scores", "objective/kl"))
    return _measure.training_figures(times.ends, rewards, kl, before)  # type: ignore[no-any-return]


def arguments(config: Any, spec: Spec, seed: int, folder: str) -> Any:
    """TRL's settings of what `ppo.py` says."""
    return config(
        output_dir=folder,
        seed=seed,
        per_device_train_batch_size=spec["batch"],
        gradient_accumulation_steps=1,
        num_mini_batches=spec["minibatches"],
        num_ppo_epochs=spec["epochs"],
        total_episodes=spec["batch"] * spec["updates"],
        local_rollout_forward_batch_size=spec["batch"],
        response_length=spec["new_tokens"],
        stop_token="eos",
        temperature=spec["temperature"],
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        kl_coef=spec["kl"],
        kl_estimator=spec["kl_estimator"],
        cliprange=spec["clip"],
        cliprange_value=spec["clip_value"],
        vf_coef=spec["value_weight"],
        gamma=spec["gamma"],
        lam=spec["lam"],
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,  # mixed precision is set by accelerate's variable
    )


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps(run(spec, int(sys.argv[2]))))


if __name__ == "__main__":
    main()
