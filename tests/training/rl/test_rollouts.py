"""Rollouts: what is learned from which token, that a resume point holds all of it, and that an update is TRL's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trl_ppo

from cai.maths import losses
from cai.storage.rows import Failure
from cai.training.rl.actor_critic import ActorCritic
from cai.training.rl.rollouts import Episode, Rollout, pad_episodes

EOS = 7


def episode(n: int, *, score: float | None = 1.0, finished: bool = True, value: float = 0.0) -> Episode:
    ids = [10 + n] * (n - 1) + [EOS if finished else 11]
    scores = {} if score is None else {"f": score}
    made = Episode(f"p{n}", [1, 2, 3], ids, f"text {n} \u2603", finished, [-0.5] * n, scores)
    made.score = score
    made.log_probs, made.ref_log_probs, made.values = -torch.rand(n), -torch.rand(n), torch.full((n,), value)
    return made


def estimated(episodes: list[Episode], **options: float) -> Rollout:
    rollout = Rollout(3, episodes)
    settings = {"kl_coefficient": 0.0, "gamma": 1.0, "lam": 1.0, "missing_end": 0.0, **options}
    rollout.estimate_advantages(**settings)  # type: ignore[arg-type]
    return rollout


def test_a_batch_pads_on_the_right_and_labels_only_sampled_tokens() -> None:
    batch = pad_episodes([episode(4), episode(2)], pad_id=0, device=torch.device("cpu"))
    assert batch.input_ids.tolist() == [[1, 2, 3, 14, 14, 14, EOS], [1, 2, 3, 12, EOS, 0, 0]]
    assert batch.attention_mask.sum(dim=1).tolist() == [7, 5]
    assert batch.labels[1].tolist() == [-100, -100, -100, 12, EOS, -100, -100]
    values = [torch.arange(4.0), torch.arange(2.0) + 10]
    scattered = batch.scatter(values)
    assert scattered[0].tolist() == [0, 0, 0, 1, 2, 3]
    assert [tensor.tolist() for tensor in batch.split(scattered)] == [tensor.tolist() for tensor in values]


def test_the_score_stands_at_the_end_of_text_whatever_pads() -> None:
    # Without discount or values each token's return is the score; with lambda 0 only the last token sees it.
    rollout = estimated([episode(4, score=2.0), episode(2, score=-1.0)], lam=0.0)
    assert [row.returns.tolist() for row in rollout.episodes] == [[0, 0, 0, 2], [0, -1]]
    rollout = estimated([episode(4, score=2.0), episode(2, score=-1.0)])
    assert [row.returns.tolist() for row in rollout.episodes] == [[2] * 4, [-1] * 2]


def test_advantages_are_white_over_the_whole_rollout() -> None:
    rollout = estimated([episode(n, score=float(n)) for n in range(1, 7)], kl_coefficient=0.1)
    advantages = torch.cat([row.advantages for row in rollout.episodes])
    assert len(advantages) == 21
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-6)
    assert float(advantages.var()) == pytest.approx(1, abs=1e-5)


def test_a_response_without_an_end_pays_for_it() -> None:
    rollout = estimated([episode(3, score=1.0, finished=False), episode(2, score=1.0)], missing_end=0.75)
    assert [float(row.returns[-1]) for row in rollout.episodes] == [0.25, 1.0]
    assert [row.score for row in rollout.episodes] == [1.0, 1.0]  # what it was worth stays what it was


def test_an_episode_whose_reward_failed_counts_nowhere() -> None:
    alone = estimated([episode(3, score=1.0), episode(2, score=0.0)])
    torch.manual_seed(1)
    beside = estimated([alone.episodes[0], episode(5, score=None), alone.episodes[1]])
    assert [len(row.token_ids) for row in beside.learned] == [3, 2]
    assert not beside.episodes[1].advantages.any()
    assert beside.episodes[1].n_learned_tokens == 0
    assert float(beside.kl("k1")) == pytest.approx(float(alone.kl("k1")))


def test_the_explained_variance_is_one_for_values_that_are_right_and_nothing_for_constant_ones() -> None:
    right = estimated([episode(3, score=1.0, value=1.0), episode(2, score=-2.0, value=-2.0)])
    assert right.explained_variance() == pytest.approx(1)
    constant = estimated([episode(3, score=1.0, value=0.4), episode(2, score=-2.0, value=0.4)])
    assert constant.explained_variance() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("episodes", [[episode(1)], [episode(3, value=0.2), episode(2, value=0.7)]])
def test_where_all_returns_are_equal_there_is_no_variance_to_explain(episodes: list[Episode]) -> None:
    rollout = estimated(episodes)
    assert rollout.explained_variance() is None
    assert all(row.advantages.isfinite().all() for row in rollout.episodes)


def test_a_rollout_comes_back_from_disk_to_the_last_bit(tmp_path: Path) -> None:
    rollout = estimated([episode(3), episode(4, score=None), episode(1, finished=False)], kl_coefficient=0.3)
    rollout.episodes[1].text = "\u2603" * 40_000_000  # more than a safetensors header can hold
    rollout.episodes[1].failure = Failure("prompt", "the server is gone", "transient")
    rollout.save(tmp_path, {"kl_coef": 1 / 3})
    restored_rollout, numbers = Rollout.load(tmp_path)
    assert numbers == {"kl_coef": 1 / 3}
    assert restored_rollout.number == 3
    for before, after in zip(rollout.episodes, restored_rollout.episodes, strict=True):
        for name, value in vars(before).items():
            restored = getattr(after, name)
            assert torch.equal(value, restored) if isinstance(value, torch.Tensor) else value == restored, name


def test_an_update_from_the_same_rollout_is_that_of_trl() -> None:
    """TRL 1.12.0's update (`trl_ppo`), in the case without end tokens alone, where both give the same rewards and
    values; `test_losses` covers the others."""
    theirs = trl_ppo.stored("whole")
    options = theirs.settings
    rollout = Rollout(0, trl_ppo.episodes("whole"))
    rollout.estimate_advantages(
        kl_coefficient=options["kl_coef"], gamma=options["gamma"], lam=options["lam"], missing_end=0.0
    )
    advantages = torch.stack([episode.advantages for episode in rollout.episodes])
    torch.testing.assert_close(advantages, theirs.whitened_advantages, atol=1e-5, rtol=0)
    assert rollout.kl(options["kl_estimator"]).item() == pytest.approx(theirs.logged["objective/kl"], abs=1e-5)

    module = ActorCritic(trl_ppo.model("policy"), trl_ppo.model("value"), options["temperature"])
    optimizer = torch.optim.AdamW(module.parameters(), lr=options["learning_rate"], weight_decay=0)
    for step, rows in enumerate(theirs.step_rows.tolist()):
        episodes = [rollout.episodes[row] for row in rows]
        batch = pad_episodes(episodes, trl_ppo.PAD, torch.device("cpu"))
        output = module(batch.input_ids, batch.attention_mask, batch.labels)
        old_log_probs, old_values, advantages, returns = (
            batch.scatter([getattr(episode, name) for episode in episodes])
            for name in ("log_probs", "values", "advantages", "returns")
        )
        policy = losses.clipped_policy(output.log_probs, old_log_probs, advantages, options["cliprange"])
        value = losses.clipped_value(output.values, old_values, returns, options["cliprange_value"])
        assert policy[batch.response_mask].mean().item() == pytest.approx(theirs.policy_losses[step].item(), abs=1e-4)
        assert value[batch.response_mask].mean().item() == pytest.approx(theirs.value_losses[step].item(), abs=1e-4)
        (policy + options["vf_coef"] * value)[batch.response_mask].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
