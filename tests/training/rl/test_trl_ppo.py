"""Rollout, policy and value function of the stage `ppo`, against an update that TRL 1.12.0's PPO made (`trl_ppo`).

Its responses there fill their column, where the two have the same rewards and values; `test_losses` tells the rest.
"""

from __future__ import annotations

import pytest
import torch
import trl_ppo

from cai.maths import losses
from cai.training.rl.actor_critic import ActorCritic
from cai.training.rl.rollouts import Rollout, sequences


def test_an_update_from_the_same_rollout_is_that_of_trl() -> None:
    theirs = trl_ppo.stored("whole")
    options = theirs.settings
    rollout = Rollout(0, trl_ppo.episodes("whole"))
    rollout.estimate_advantages(
        kl_coefficient=options["kl_coef"], estimator=options["kl_estimator"], gamma=options["gamma"],
        lam=options["lam"], missing_end=0.0,
    )  # fmt: skip
    advantages = torch.stack([each.advantages for each in rollout.episodes])
    torch.testing.assert_close(advantages, theirs.whitened_advantages, atol=1e-5, rtol=0)
    assert rollout.kl(options["kl_estimator"]).item() == pytest.approx(theirs.logged["objective/kl"], abs=1e-5)

    module = ActorCritic(trl_ppo.model("policy"), trl_ppo.model("value"), options["temperature"])
    optimizer = torch.optim.AdamW(module.parameters(), lr=options["learning_rate"], weight_decay=0)
    for step, rows in enumerate(theirs.step_rows.tolist()):
        drawn = [rollout.episodes[row] for row in rows]
        batch = sequences(drawn, trl_ppo.PAD, torch.device("cpu"))
        now = module(batch.input_ids, batch.attention_mask, batch.labels)
        old_log_probs, old_values, advantages, returns = (
            batch.spread([getattr(each, name) for each in drawn])
            for name in ("log_probs", "values", "advantages", "returns")
        )
        policy = losses.clipped_policy(now.log_probs, old_log_probs, advantages, options["cliprange"])
        value = losses.clipped_value(now.values, old_values, returns, options["cliprange_value"])
        assert policy[batch.mask].mean().item() == pytest.approx(theirs.policy_losses[step].item(), abs=1e-4)
        assert value[batch.mask].mean().item() == pytest.approx(theirs.value_losses[step].item(), abs=1e-4)
        (policy + options["vf_coef"] * value)[batch.mask].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
