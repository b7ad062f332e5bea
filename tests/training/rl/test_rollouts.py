"""The buffer: what is learned from which token, and that a resume point holds all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cai.training.rl.rollouts import Episode, Rollout, pad_episodes

EOS = 7


def episode(n: int, *, score: float | None = 1.0, finished: bool = True, value: float = 0.0) -> Episode:
    ids = [10 + n] * (n - 1) + [EOS if finished else 11]
    made = Episode(
        f"p{n}", [1, 2, 3], ids, f"text {n} \u2603", finished, [-0.5] * n, {} if score is None else {"f": score}
    )
    made.score = score
    made.log_probs, made.ref_log_probs, made.values = -torch.rand(n), -torch.rand(n), torch.full((n,), value)
    return made


def estimated(episodes: list[Episode], **options: float) -> Rollout:
    rollout = Rollout(3, episodes)
    settings = {"kl_coefficient": 0.0, "estimator": "k1", "gamma": 1.0, "lam": 1.0, "missing_end": 0.0, **options}
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
    rollout.save(tmp_path, {"kl_coef": 1 / 3})
    restored_rollout, numbers = Rollout.load(tmp_path)
    assert numbers == {"kl_coef": 1 / 3}
    assert restored_rollout.number == 3
    for before, after in zip(rollout.episodes, restored_rollout.episodes, strict=True):
        for name, value in vars(before).items():
            restored = getattr(after, name)
            assert torch.equal(value, restored) if isinstance(value, torch.Tensor) else value == restored, name
