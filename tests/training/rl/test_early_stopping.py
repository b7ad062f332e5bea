"""Early stopping: when a policy is stopped, and when it is not."""

from __future__ import annotations

import pytest

from cai.contracts.training_config import Limits
from cai.training.rl.early_stopping import reason_to_stop, repetition

FIRST = {"reward": 0.0, "kl": 0.0, "length": 40.0, "unfinished": 0.02, "repetition": 0.01}


def test_a_better_policy_goes_on_and_so_does_one_whose_responses_grow_while_its_reward_falls() -> None:
    assert reason_to_stop(Limits(), FIRST, {**FIRST, "reward": 2.0, "kl": 9.0, "length": 60.0}) is None
    assert reason_to_stop(Limits(), FIRST, {**FIRST, "reward": -1.0, "length": 500.0}) is None


@pytest.mark.parametrize(("changed_figures", "message"), [
    ({"kl": 101.0}, "the KL to the reference is 101.0 nats"),
    ({"reward": float("nan")}, "`reward` is nan"),
    ({"reward": 1.0, "length": 130.0}, "responses have 130 tokens, 40 at first"),
    ({"reward": 1.0, "unfinished": 0.5}, "50% are cut off, 2% at first"),
    ({"reward": 1.0, "repetition": 0.4}, "40% of their token runs are repeated, 1% at first"),
])  # fmt: skip
def test_it_stops_and_says_why(changed_figures: dict[str, float], message: str) -> None:
    assert message in (reason_to_stop(Limits(), FIRST, {**FIRST, **changed_figures}) or "")


def test_repetition_is_the_share_of_runs_that_came_before() -> None:
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([1, 2, 1, 2, 1, 2, 1, 2]) == pytest.approx(3 / 5)
    assert repetition([1, 2, 3]) == 0
