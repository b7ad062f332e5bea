"""Rollout, policy and value function of the stage `ppo`, against an update that TRL 1.12.0's PPO made (`trl_ppo`).

Only the case without end tokens is compared here, where both give the same rewards and values; `test_losses` covers
the others.
"""

from __future__ import annotations

import pytest
import torch
import trl_ppo

from cai.maths import losses
from cai.training.rl.actor_critic import ActorCritic
from cai.training.rl.rollouts import Rollout, pad_episodes


def test_an_update_from_the_same_rollout_is_that_of_trl() -> None:
    theirs = trl_ppo.stored("whole")
    options = theirs.settings
    rollout = Rollout(0, trl_ppo.episodes("whole"))
    rollout.estimate_advantages(
        kl_coefficient=options["kl_coef"], estimator=options["kl_estimator"], gamma=options["gamma"],
        lam=options["lam"], missing_end=0.0,
    )  # fmt: skip
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
