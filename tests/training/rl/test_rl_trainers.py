"""PPO and RLOO find a known optimum; PPO counts what fails, and computes the same however a step is split."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Tiny
from torch import Tensor
from training_stages import numbered_prompts
from trl import RLOOConfig

from cai.contracts.engine import Sampling
from cai.contracts.model import Model
from cai.contracts.profile import Profile
from cai.contracts.training_config import Limits
from cai.models.chat import Chat
from cai.models.loading import load_causal_lm
from cai.storage.rows import Failure
from cai.text.errors import StageFailed
from cai.training.rl.actor_critic import ActorCritic, add_log_prob_head
from cai.training.rl.policy_sampler import PolicySampler
from cai.training.rl.ppo_config import PPOConfig
from cai.training.rl.ppo_trainer import PPOTrainer
from cai.training.rl.rewards import Response
from cai.training.rl.rloo_trainer import LeaveOneOutTrainer
from cai.training.rl.rollouts import Episode, Rollout
from cai.training.tokenised_rows import as_dataset

CPU = Profile(device="cpu", dtype="float32")
PROMPT = numbered_prompts(1)[0]
BETA = 0.5
"""Weight of the KL to the starting model."""


class Rewards:
    """Scores by a function of the response; None is a failure."""

    names = ("f",)

    def __init__(self, score: Callable[[Response], float | None]) -> None:
        self.score = score

    def scores(self, responses: Sequence[Response], **_: Any) -> list[dict[str, float] | Failure]:
        scored = [(response, self.score(response)) for response in responses]
        return [Failure(response.prompt["id"], "none") if score is None else {"f": score} for response, score in scored]

    def total(self, scores: Mapping[str, float]) -> float:
        return scores["f"]


class Bandit:
    """One prompt, one token, one arm in three pays: the arms are the first tokens of a response to `PROMPT`."""

    def __init__(self, model: Model) -> None:
        chat = Chat.load(model)
        self.ids = chat.prompt_ids(PROMPT["messages"])
        self.before = self._arms(load_causal_lm(model))
        self.pays = torch.arange(len(self.before)) % 3 == 0
        self.can_be_sampled = torch.arange(len(self.before)) != chat.pad_id
        assert self.before[self.pays].sum() < 0.45

    def score(self, response: Response) -> float:
        return float(self.pays[response.token_ids[0]])

    def assert_solved(self, policy: Any) -> None:
        """Compares with the optimum of E[r] - β KL, π ∝ π_ref exp(r/β).

        The policy must have the optimum's share of paying arms, and nine tenths of its gain.
        """
        after = self._arms(policy)
        optimum = self.before * torch.exp(self.pays.float() / BETA)
        optimum /= optimum.sum()
        assert float(after[self.pays].sum()) == pytest.approx(float(optimum[self.pays].sum()), abs=0.03)
        gain, most = (self._objective(arms) - self._objective(self.before) for arms in (after, optimum))
        assert gain > 0.9 * most

    def _objective(self, arms: Tensor) -> float:
        return float(arms[self.pays].sum() - BETA * (arms * (arms / self.before).log())[self.can_be_sampled].sum())

    @torch.no_grad()
    def _arms(self, model: Any) -> Tensor:
        """(vocabulary,): the distribution of a response's first token."""
        arms: Tensor = model(input_ids=torch.tensor([self.ids])).logits[0, -1].float().softmax(dim=0)
        return arms


def prompts(n: int) -> list[Any]:
    """Prompt rows, every other one of them long."""
    rows = numbered_prompts(n)
    for row in rows[1::2]:
        row["messages"][0]["content"] += " Say it, please!" * 6
    return rows


def trainer(
    model: Model, folder: Path, score: Callable[[Response], float | None], *, n_prompts: int = 8,
    rollout_size: int = 32, tokens: int = 8, micro: int = 8, batch: int = 16, limits: Limits | None = None,
    reference: bool = True, **train: Any,
) -> PPOTrainer:  # fmt: skip
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    args = PPOConfig(**{
        "output_dir": str(folder / "checkpoints"), "per_device_train_batch_size": micro, "seed": 1,
        "gradient_accumulation_steps": batch // micro, "num_train_epochs": 2, "learning_rate": 1e-3, "use_cpu": True,
        "bf16": False, "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", **train,
    })  # fmt: skip
    frozen = load_causal_lm(model).requires_grad_(False)
    add_log_prob_head(frozen, 1.0)
    return PPOTrainer(
        ActorCritic(load_causal_lm(model).requires_grad_(True)), args, prompts=prompts(n_prompts),
        sampler=PolicySampler(model, CPU), rewards=Rewards(score), reference=frozen if reference else None,
        rollout_size=rollout_size, sampling=Sampling(tokens, 1.0), pad_id=Chat.load(model).pad_id, folder=folder,
        limits=limits or Limits(kl=1000, length=1000),
    )  # fmt: skip


def test_ppo_solves_the_bandit(tmp_path: Path, tiny: Tiny) -> None:
    bandit = Bandit(tiny("llama"))
    ppo = trainer(
        tiny("llama"), tmp_path, bandit.score, n_prompts=1, rollout_size=128, tokens=1, micro=64, batch=64,
        num_train_epochs=35, learning_rate=6e-3, kl_coef=BETA, lr_scheduler_type="linear",
    )  # fmt: skip
    ppo.train()
    bandit.assert_solved(ppo.model.policy)


def test_rloo_solves_the_bandit(tmp_path: Path, tiny: Tiny) -> None:
    model, bandit = tiny("llama"), Bandit(tiny("llama"))
    chat = Chat.load(model)
    args = RLOOConfig(
        output_dir=str(tmp_path / "checkpoints"), per_device_train_batch_size=128, num_generations=128, beta=BETA,
        max_completion_length=1, max_steps=60, learning_rate=8e-3, lr_scheduler_type="linear", seed=1, data_seed=1,
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    rloo = LeaveOneOutTrainer(
        prompts={PROMPT["id"]: PROMPT}, rewards=Rewards(bandit.score), sampler=PolicySampler(model, CPU),
        reference=load_causal_lm(model).requires_grad_(False), end_ids=sorted(chat.end_ids), folder=tmp_path,
        limits=Limits(), args=args, model=load_causal_lm(model).requires_grad_(True),
        train_dataset=as_dataset([{"prompt": PROMPT["id"]}]), processing_class=chat.tokenizer,
    )  # fmt: skip
    rloo.train()
    bandit.assert_solved(rloo.model)


def losses_of(ppo: PPOTrainer) -> list[dict[str, float]]:
    ppo.train()
    return [entry for entry in ppo.state.log_history if "loss" in entry]


def scored_by_length(response: Response) -> float:
    return -abs(len(response.token_ids) - 4) + 0.1 * (response.token_ids[0] % 5)


@pytest.mark.parametrize("micro", [4, 16])
def test_micro_batches_do_not_change_a_step(micro: int, tmp_path: Path, tiny: Tiny) -> None:
    reference, split = (
        losses_of(trainer(tiny("llama"), tmp_path / str(size), scored_by_length, micro=size)) for size in (8, micro)
    )
    assert len(reference) == 8
    for name in ("loss", "policy/loss", "value/loss", "policy/entropy"):
        assert [entry[name] for entry in reference] == pytest.approx([entry[name] for entry in split], abs=1e-5)


def test_at_the_start_of_a_rollout_the_policy_is_its_own_and_the_reference(tmp_path: Path, tiny: Tiny) -> None:
    logged = losses_of(trainer(tiny("llama"), tmp_path, scored_by_length, num_ppo_epochs=1, batch=32))
    assert logged[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert logged[1]["kl"] > 1e-4
    for entry in logged:  # one step a rollout: each follows its sampling
        assert entry["policy/approx_kl"] == pytest.approx(0, abs=1e-6)
        assert entry["policy/clip_fraction"] == 0
        assert entry["sampler_gap"] == pytest.approx(0, abs=1e-4)


def test_without_a_reference_the_kl_is_zero(tmp_path: Path, tiny: Tiny) -> None:
    logged = losses_of(trainer(tiny("llama"), tmp_path, scored_by_length, reference=False))
    assert [entry["kl"] for entry in logged if "kl" in entry] == [0, 0]


def test_a_response_whose_reward_failed_teaches_nothing_and_is_counted(tmp_path: Path, tiny: Tiny) -> None:
    ppo = trainer(tiny("llama"), tmp_path, lambda response: None if response.prompt["id"] == "p1" else 1.0)
    logged = losses_of(ppo)
    assert logged[0]["failed"] == 4  # of 32 responses to 8 prompts
    failed = [episode for episode in ppo.rollout.episodes if episode.score is None]
    assert {episode.prompt_id for episode in failed} == {"p1"}
    assert all(not episode.advantages.any() for episode in failed)
    with pytest.raises(StageFailed, match="32 of 32 responses have no reward, above"):
        trainer(tiny("llama"), tmp_path / "none", lambda response: None).train()


@pytest.mark.parametrize("kl_estimator", ["k1", "k3"])
def test_the_penalty_in_the_reward_has_the_gradient_of_the_kl(kl_estimator: str, tmp_path: Path, tiny: Tiny) -> None:
    """On random categoricals with every token sampled once, so that the expectation over the policy is exact."""
    ppo = trainer(tiny("llama"), tmp_path, lambda response: 0.0, kl_estimator=kl_estimator)
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(8, 6, generator=generator)).requires_grad_()
    log_probs, ref_log_probs = logits.log_softmax(-1), (2 * torch.randn(8, 6, generator=generator)).log_softmax(-1)
    episodes = []
    for log_prob, ref_log_prob in zip(log_probs.detach().flatten(), ref_log_probs.flatten(), strict=True):
        episode = Episode("p", [1], [2], "", True, [float(log_prob)], {"f": 0.0}, 0.0)
        episode.log_probs, episode.ref_log_probs, episode.values = log_prob[None], ref_log_prob[None], torch.zeros(1)
        episodes.append(episode)
    figures = ppo._estimate_advantages(Rollout(0, episodes))
    log_ratios = (log_probs - ref_log_probs).detach()
    measured = log_ratios if kl_estimator == "k1" else torch.expm1(-log_ratios) + log_ratios
    assert figures["kl"] == pytest.approx(float(measured.mean()), rel=1e-5)
    advantages = torch.cat([episode.advantages for episode in episodes]).view_as(logits)
    (of_penalty,) = torch.autograd.grad(-(log_probs.exp().detach() * log_probs * advantages).sum(), logits)
    (of_kl,) = torch.autograd.grad((logits.softmax(-1) * (logits.log_softmax(-1) - ref_log_probs)).sum(), logits)
    for row in range(len(logits)):
        assert torch.cosine_similarity(of_penalty[row], of_kl[row], dim=0) > 0.99


def test_the_objective_is_what_a_response_is_worth_after_all_that_it_pays(tmp_path: Path, tiny: Tiny) -> None:
    settings = {"kl_coef": 0.5, "kl_estimator": "k3", "missing_eos_penalty": 2.0, "gamma": 1.0, "lam": 1.0}
    ppo = trainer(tiny("llama"), tmp_path, scored_by_length, **settings)
    logged = [entry for entry in losses_of(ppo) if "kl" in entry]
    assert logged[1]["unfinished"] > 0
    worth = [float(episode.returns[0]) for episode in ppo.rollout.episodes]  # undiscounted: the sum of its rewards
    assert logged[1]["objective"] == pytest.approx(sum(worth) / len(worth), abs=1e-5)


def test_a_rollout_of_a_single_token_is_learned_from(tmp_path: Path, tiny: Tiny) -> None:
    sizes = {"n_prompts": 1, "rollout_size": 1, "tokens": 1, "micro": 1, "batch": 1}
    logged = losses_of(trainer(tiny("llama"), tmp_path, lambda response: 1.0, **sizes))
    assert len(logged) == 4
    assert all(math.isfinite(value) for entry in logged for value in entry.values())


def test_every_prompt_is_used_before_any_is_used_again(tmp_path: Path, tiny: Tiny) -> None:
    ppo = trainer(tiny("llama"), tmp_path, scored_by_length, n_prompts=24, rollout_size=16)
    orders = [[ppo._prompt_at(number, place)["id"] for place in range(16)] for number in range(6)]
    flat = [prompt_id for order in orders for prompt_id in order]
    for prompt_pass in range(4):
        assert sorted(flat[prompt_pass * 24 : prompt_pass * 24 + 24]) == sorted(f"p{k}" for k in range(24))
    assert flat[:24] != flat[24:48]


def test_the_coefficient_of_the_kl_adapts_to_its_target(tmp_path: Path, tiny: Tiny) -> None:
    settings = {"num_train_epochs": 4, "kl_target": 1e-3, "kl_horizon": 64, "learning_rate": 3e-3}
    logged = losses_of(trainer(tiny("llama"), tmp_path, scored_by_length, **settings))
    coefficients = [entry["kl/coefficient"] for entry in logged if "kl" in entry]
    assert coefficients[1] == pytest.approx(0.05 * (1 - 0.2 * 32 / 64))  # KL 0 in the first rollout: down by a fifth
    assert coefficients[3] > coefficients[2]


def test_a_value_head_explains_returns_after_a_while(tmp_path: Path, tiny: Tiny) -> None:
    settings = {"num_train_epochs": 10, "learning_rate": 3e-3, "cliprange_value": None, "kl_coef": 0.0, "vf_coef": 1.0}
    logged = losses_of(
        trainer(tiny("llama"), tmp_path, lambda response: float(int(response.prompt["id"][1:]) % 2), **settings)
    )
    explained = [entry["value/explained_variance"] for entry in logged if "kl" in entry]
    assert explained[0] == pytest.approx(0, abs=1e-6)
    assert explained[-1] > 0.5


def test_it_stops_before_it_learns_from_a_rollout_that_went_too_far(tmp_path: Path, tiny: Tiny) -> None:
    ppo = trainer(tiny("llama"), tmp_path, scored_by_length, limits=Limits(kl=1e-6), num_train_epochs=3)
    with pytest.raises(StageFailed, match=r"before rollout 2 was learned from: the KL to the reference"):
        ppo.train()
    assert ppo.state.global_step == 4
    assert math.isfinite(ppo.state.log_history[-1]["loss"])
