"""RLOO finds a known optimum."""

from __future__ import annotations

from pathlib import Path

from bandit import BETA, PROMPT, Bandit, Rewards
from tiny_models import Tiny
from trl import RLOOConfig

from cai.contracts.profile import Profile
from cai.contracts.training_config import Limits
from cai.models.chat import Chat
from cai.models.loading import load_causal_lm
from cai.training.rl.policy_sampler import PolicySampler
from cai.training.rl.rloo_trainer import LeaveOneOutTrainer
from cai.training.tokenised_rows import as_dataset


def test_a_bandit_ends_at_the_optimum_that_is_known(tmp_path: Path, tiny: Tiny) -> None:
    model, bandit = tiny("llama"), Bandit(tiny("llama"))
    chat = Chat.load(model)
    args = RLOOConfig(
        output_dir=str(tmp_path / "checkpoints"), per_device_train_batch_size=128, num_generations=128, beta=BETA,
        max_completion_length=1, max_steps=60, learning_rate=8e-3, lr_scheduler_type="linear", seed=1, data_seed=1,
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    rloo = LeaveOneOutTrainer(
        prompts={PROMPT["id"]: PROMPT}, rewards=Rewards(bandit.score),
        sampler=PolicySampler(model, Profile(device="cpu", dtype="float32")),
        reference=load_causal_lm(model).requires_grad_(False), end_ids=sorted(chat.end_ids), folder=tmp_path,
        limits=Limits(), args=args, model=load_causal_lm(model).requires_grad_(True),
        train_dataset=as_dataset([{"prompt": PROMPT["id"]}]), processing_class=chat.tokenizer,
    )  # fmt: skip
    rloo.train()
    bandit.assert_solved(rloo.model)
