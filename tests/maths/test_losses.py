"""The losses against numpy and finite differences, estimates of KL against the exact one, and PPO's against TRL's own.

TRL's losses of preferences are held against ours where they are trained with, in stages/.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
import trl_ppo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cai.contracts.engine import Completion, Request, Sampling
from cai.contracts.model import Model
from cai.contracts.profile import load_profile
from cai.engines.local.local_engine import LocalEngine
from cai.maths import losses
from cai.micro.conversations import prompts
from cai.models.loading import load_causal_lm
from cai.models.reference import resolve

RANDOM = np.random.default_rng(7)
MARGINS = np.concatenate([RANDOM.normal(scale=4, size=40), [0.0, 30.0, -30.0, 500.0, -500.0]])
LABELS = np.concatenate([RANDOM.uniform(size=40), [0.3, 1.0, 1.0, 0.0, 0.25]])


def tensor(values):  # type: ignore[no-untyped-def]
    return torch.tensor(values, dtype=torch.float64)


def test_bradley_terry_is_the_cross_entropy_of_label_and_margin() -> None:
    expected = LABELS * np.logaddexp(0, -MARGINS) + (1 - LABELS) * np.logaddexp(0, MARGINS)
    np.testing.assert_allclose(losses.bradley_terry(tensor(MARGINS), tensor(LABELS)).numpy(), expected, atol=1e-12)


def test_the_losses_stay_finite_where_a_sigmoid_would_have_run_out_of_digits() -> None:
    loss = losses.bradley_terry(torch.tensor([1e4, -1e4]), torch.tensor([0.9, 0.9]))
    assert loss.tolist() == pytest.approx([1e3, 9e3])


def test_dpo_is_bradley_terry_on_implicit_rewards() -> None:
    chosen, rejected = RANDOM.normal(size=(2, 30)) * 9
    p = RANDOM.uniform(size=30)
    expected = p * np.logaddexp(0, -0.3 * (chosen - rejected)) + (1 - p) * np.logaddexp(0, 0.3 * (chosen - rejected))
    loss = losses.direct_preference(tensor(chosen), tensor(rejected), tensor(p), beta=0.3)
    np.testing.assert_allclose(loss.numpy(), expected, atol=1e-12)


def test_a_policy_that_is_its_own_reference_loses_log_two_for_any_label() -> None:
    zero = torch.zeros(5)
    assert losses.direct_preference(zero, zero, torch.rand(5), beta=0.1).tolist() == pytest.approx([math.log(2)] * 5)


def test_the_likelihood_is_expected_under_the_label_and_counted_a_token() -> None:
    chosen, rejected = -RANDOM.uniform(1, 90, size=(2, 30))
    long, short = RANDOM.integers(1, 60, size=(2, 30))
    p = RANDOM.uniform(size=30)
    loss = losses.negative_log_likelihood(*(tensor(values) for values in (chosen, rejected, long, short, p)))
    np.testing.assert_allclose(loss.numpy(), -p * chosen / long - (1 - p) * rejected / short, atol=1e-12)
    certain = losses.negative_log_likelihood(*map(tensor, (chosen, rejected, long, short, np.ones(30))))
    np.testing.assert_allclose(certain.numpy(), -chosen / long, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    margins = tensor(MARGINS[:40]).requires_grad_()
    assert torch.autograd.gradcheck(losses.bradley_terry, (margins, tensor(LABELS[:40])))
    chosen, rejected = (tensor(RANDOM.normal(size=12)).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(losses.direct_preference, (chosen, rejected, tensor(LABELS[:12]), 0.2))


def test_the_loss_is_least_where_the_margin_is_the_labels_log_odds() -> None:
    p = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    margins = torch.logit(p).requires_grad_()
    loss = losses.bradley_terry(margins, p)
    loss.sum().backward()
    assert margins.grad.abs().max() < 1e-12
    entropy = torch.special.entr(p) + torch.special.entr(1 - p)
    assert loss.tolist() == pytest.approx(entropy.tolist())


def test_swapping_the_responses_and_the_label_changes_nothing() -> None:
    margins, p = tensor(MARGINS), tensor(LABELS)
    torch.testing.assert_close(losses.bradley_terry(margins, p), losses.bradley_terry(-margins, 1 - p))


# By reinforcement.


class Responses(NamedTuple):
    """Tensors (batch, seq) in float64, and the mask that says how much of each row there is."""

    kl: Tensor
    values: Tensor
    scores: Tensor
    mask: Tensor


def responses(lengths: list[int], seed: int, seq: int = 9) -> Responses:
    """Random ones of those lengths. Behind their ends lies what must never be read."""
    random = np.random.default_rng(seed)
    mask = torch.arange(seq) < torch.tensor(lengths)[:, None]
    kl, values = (tensor(random.normal(size=mask.shape)).masked_fill(~mask, math.nan) for _ in range(2))
    return Responses(kl, values, tensor(random.normal(scale=3, size=len(lengths))), mask)


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**32 - 1)
FRACTIONS = st.sampled_from([0.0, 1.0]) | st.floats(0, 1)


@given(LENGTHS, SEEDS)
def test_the_score_stands_at_the_last_token_and_the_penalty_at_every_one(lengths: list[int], seed: int) -> None:
    batch = responses(lengths, seed)
    rewards = losses.rewards_at_tokens(batch.scores, batch.kl, batch.mask, 0.3).numpy()
    for reward, kl, score, length in zip(rewards, batch.kl.numpy(), batch.scores.tolist(), lengths, strict=True):
        expected = -0.3 * kl[:length]
        expected[-1] += score
        np.testing.assert_allclose(reward[:length], expected, atol=1e-12)
        assert not reward[length:].any()


def test_a_response_of_one_token_gets_its_score_there() -> None:
    reward = losses.rewards_at_tokens(torch.tensor([2.0]), torch.tensor([[0.5, 7.0]]), torch.tensor([[True, False]]), 1)
    assert reward.tolist() == [[1.5, 0.0]]


@given(LENGTHS, SEEDS, FRACTIONS, FRACTIONS)
@settings(deadline=None)
def test_advantages_are_the_discounted_sum_of_temporal_differences(lengths, seed, gamma, lam):
    """The definition, of order n²: each advantage by a sum of its own, and each row by itself without its padding."""
    batch = responses(lengths, seed)
    advantages, returns = losses.generalised_advantages(batch.kl, batch.values, batch.mask, gamma, lam)
    for row, length in enumerate(lengths):
        reward, value = batch.kl[row, :length].numpy(), batch.values[row, :length].numpy()
        delta = reward + gamma * np.append(value[1:], 0.0) - value
        expected = [sum((gamma * lam) ** k * delta[t + k] for k in range(length - t)) for t in range(length)]
        np.testing.assert_allclose(advantages[row, :length].numpy(), expected, atol=1e-9)
        np.testing.assert_allclose(returns[row, :length].numpy(), expected + value, atol=1e-9)
        assert not advantages[row, length:].any()
        assert not returns[row, length:].any()


def test_advantages_at_the_ends_of_lambda_are_errors_of_one_step_and_of_the_whole_return() -> None:
    batch = responses([6, 9], seed=1)
    one_step, _ = losses.generalised_advantages(batch.kl, batch.values, batch.mask, 0.9, 0.0)
    _, full_return = losses.generalised_advantages(batch.kl, batch.values, batch.mask, 1.0, 1.0)
    first = batch.kl[:, 0] + 0.9 * batch.values[:, 1] - batch.values[:, 0]
    torch.testing.assert_close(one_step[:, 0], first)
    torch.testing.assert_close(full_return[:, 0], batch.kl.nansum(dim=1))


@given(LENGTHS, SEEDS)
def test_whitened_values_have_mean_zero_and_variance_one_over_the_mask(lengths: list[int], seed: int) -> None:
    batch = responses(lengths, seed)
    white = losses.whitened(batch.values, batch.mask)
    assert not white[~batch.mask].any()
    inside = batch.values[batch.mask].numpy()
    if len(inside) == 1:
        assert white[batch.mask].tolist() == inside.tolist()
        return
    expected = (inside - inside.mean()) / np.sqrt(inside.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(white[batch.mask].numpy(), expected, atol=1e-9)


def test_whitening_values_that_are_all_equal_gives_zeros() -> None:
    assert losses.whitened(torch.full((2, 3), 4.0), torch.ones(2, 3, dtype=torch.bool)).abs().max() == 0


def test_the_clipped_losses_are_those_of_numpy() -> None:
    new, old, advantages, returns = RANDOM.normal(size=(4, 50))
    ratio = np.exp(new - old)
    policy = np.maximum(-advantages * ratio, -advantages * np.clip(ratio, 0.8, 1.2))
    loss = losses.clipped_policy(*(tensor(values) for values in (new, old, advantages)), clip=0.2)
    np.testing.assert_allclose(loss.numpy(), policy, atol=1e-12)
    value = 0.5 * np.maximum((new - returns) ** 2, (np.clip(new, old - 0.4, old + 0.4) - returns) ** 2)
    loss = losses.clipped_value(*(tensor(values) for values in (new, old, returns)), clip=0.4)
    np.testing.assert_allclose(loss.numpy(), value, atol=1e-12)


def test_gradients_of_the_clipped_losses_are_those_of_finite_differences() -> None:
    new, old, advantages, returns = (tensor(values) for values in RANDOM.normal(size=(4, 60)))
    assert torch.autograd.gradcheck(losses.clipped_policy, (new.requires_grad_(), old, advantages, 0.2))
    assert torch.autograd.gradcheck(losses.clipped_value, (new, old, returns, 0.3))


@pytest.mark.parametrize(
    ("ratio", "advantage", "pulls"),
    [(1.5, 1.0, False), (0.5, -1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (1.1, 1.0, True), (0.9, -1.0, True)],
)
def test_a_token_pulls_unless_its_ratio_has_gone_too_far_the_way_that_pays(ratio, advantage, pulls):
    new = torch.tensor([math.log(ratio)], requires_grad=True)
    losses.clipped_policy(new, torch.zeros(1), torch.tensor([advantage]), clip=0.2).backward()
    assert new.grad is not None
    assert new.grad.item() == pytest.approx(-advantage * ratio if pulls else 0.0)


@pytest.mark.parametrize(("value", "target", "pulls"), [(0.6, 2.0, False), (0.2, 2.0, True), (0.6, 0.0, True)])
def test_a_value_that_has_gone_far_enough_towards_its_return_pulls_no_further(value, target, pulls):
    new = torch.tensor([value], requires_grad=True)
    losses.clipped_value(new, torch.zeros(1), torch.tensor([target]), clip=0.4).backward()
    assert new.grad is not None
    assert new.grad.item() == pytest.approx(value - target if pulls else 0.0)


N_SAMPLES = 4096


class SampledTokens(NamedTuple):
    """Log-probabilities of sampled tokens by both models, (positions, samples), and the exact KL."""

    log_probs: Tensor
    ref_log_probs: Tensor
    exact: Tensor
    """(positions,) over the whole vocabulary, nats"""


@functools.cache
def sampled_tokens() -> SampledTokens:
    """The embedded model as policy, at the positions of its own responses; the reference is it, changed a little."""
    micro: Model = resolve("micro", folder=trl_ppo.FILE.parent)
    conversations = [prompt["messages"] for prompt in prompts("train", limit=6)]
    requests = [Request(str(n), messages, n, Sampling(max_new_tokens=16)) for n, messages in enumerate(conversations)]
    with LocalEngine(micro, load_profile("cpu")) as engine:
        written = {answer.id: answer for answer in engine.generate(requests) if isinstance(answer, Completion)}
        rows = [(engine.chat.prompt_ids(turns), written[str(n)].token_ids) for n, turns in enumerate(conversations)]
    policy, reference = load_causal_lm(micro), load_causal_lm(micro)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        for weight in reference.parameters():
            weight.add_(0.15 * weight.std() * torch.randn_like(weight) if weight.dim() > 1 else 0)
        pairs = [[_next_tokens(model, *row) for model in (policy, reference)] for row in rows]
        log_p, log_q = (torch.cat(values) for values in zip(*pairs, strict=True))
        tokens = torch.multinomial(log_p.exp(), N_SAMPLES, replacement=True)
        exact = (log_p.exp() * (log_p - log_q)).sum(-1)
        return SampledTokens(log_p.gather(1, tokens), log_q.gather(1, tokens), exact)


def _next_tokens(model: torch.nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    """Log-probabilities of every token at each place of the response, (seq, vocabulary)."""
    logits: Tensor = model(torch.tensor([prompt + response])).logits
    return logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)


def errors(estimates: Tensor, exact: Tensor) -> float:
    """By how many standard errors the mean of the estimates misses the exact mean."""
    by_position = estimates.var(dim=1) / estimates.shape[1]
    error = estimates.mean() - exact.mean()
    return float(error / (by_position.sum().sqrt() / len(exact)))


def test_both_estimators_are_unbiased_and_k3_varies_less() -> None:
    policy, reference, exact = sampled_tokens()
    assert len(exact) > 50
    assert exact.mean() > 0.02, "the models are nearly the same, and every estimator would do"
    k1, k3 = (losses.kl_estimate(policy, reference, name) for name in ("k1", "k3"))
    assert abs(errors(k1, exact)) < 4
    assert abs(errors(k3, exact)) < 4
    assert k3.min() >= 0 > k1.min()
    assert k3.var(dim=1).mean() < 0.5 * k1.var(dim=1).mean()


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_an_estimator_with_its_arguments_swapped_would_miss_the_exact_divergence(name: losses.KLEstimator) -> None:
    """What the test above is worth: it would not pass on another sign, nor on the ratio upside down."""
    policy, reference, exact = sampled_tokens()
    assert abs(errors(losses.kl_estimate(reference, policy, name), exact)) > 8


@pytest.mark.parametrize("case", trl_ppo.CASES)
def test_losses_on_stored_rollouts_are_those_of_trl(case: str) -> None:
    """TRL reads a value at the column behind the last token of a response that ended early, and puts the score there.

    So its responses have one token more than ours in rewards, values and returns, and the same in advantages and in
    the policy's loss. Where all responses fill their column (`whole`), the two are one. Whitening rewards is its own
    (to variance 1, the mean kept). Like ours, its whitening divides by the unbiased variance, and its means are over
    the tokens of a minibatch, not over responses.
    """
    theirs = trl_ppo.stored(case)
    mask, longer = theirs.mask, theirs.mask_and_one_more
    assert mask.all() == (case == "whole")
    assert (mask.sum(1) == 1).any() == (case != "whole")
    config = theirs.settings
    kl = losses.kl_estimate(theirs.log_probs, theirs.ref_log_probs, config["kl_estimator"]).masked_fill(~mask, 0.0)
    assert kl.sum(1).mean().item() == pytest.approx(theirs.logged["objective/kl"], abs=1e-5)
    ended = (theirs.token_ids[:, trl_ppo.QUERY :] == trl_ppo.END).any(1)
    scores = theirs.scores - (~ended * config["missing_eos_penalty"] if config["missing_eos_penalty"] else 0.0)
    assert scores.mean().item() == pytest.approx(theirs.logged["objective/scores"], abs=1e-5)
    rewards = losses.rewards_at_tokens(scores, kl, longer, config["kl_coef"])
    if config["whiten_rewards"]:
        rewards = losses.whitened(rewards, longer) + rewards[longer].mean()
        torch.testing.assert_close(rewards[longer], theirs.whitened_rewards[longer], atol=1e-5, rtol=0)
    advantages, returns = losses.generalised_advantages(rewards, theirs.values, longer, config["gamma"], config["lam"])
    torch.testing.assert_close(advantages[longer], theirs.advantages[longer], atol=1e-5, rtol=0)
    white = losses.whitened(advantages, mask)
    torch.testing.assert_close(white[mask], theirs.whitened_advantages[mask], atol=1e-5, rtol=0)
    assert (theirs.policy_clipped[1:] > 0.1).all(), "nothing was clipped: the losses would say little"
    for step, rows in enumerate(theirs.step_rows):
        policy = losses.clipped_policy(
            theirs.step_log_probs[step], theirs.log_probs[rows], white[rows], config["cliprange"]
        )
        value = losses.clipped_value(
            theirs.step_values[step], theirs.values[rows], returns[rows], config["cliprange_value"]
        )
        assert policy[mask[rows]].mean().item() == pytest.approx(theirs.policy_losses[step].item(), abs=1e-5)
        assert value[longer[rows]].mean().item() == pytest.approx(theirs.value_losses[step].item(), abs=1e-5)


@pytest.mark.parametrize("case", trl_ppo.CASES)
def test_training_on_stored_rollouts_by_these_losses_goes_the_way_that_trl_went(case: str) -> None:
    """From the same weights, over two epochs of two minibatches: the log-probabilities and values of each step."""
    theirs = trl_ppo.stored(case)
    options, mask, longer = theirs.settings, theirs.mask, theirs.mask_and_one_more
    returns = theirs.advantages + theirs.values.masked_fill(~longer, 0.0)
    policy, critic = trl_ppo.model("policy"), trl_ppo.model("value")
    weights = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=options["learning_rate"], weight_decay=0)
    for step, rows in enumerate(theirs.step_rows):
        token_ids = theirs.token_ids[rows]
        is_token = token_ids != trl_ppo.PAD
        context = {"attention_mask": is_token, "position_ids": (is_token.cumsum(1) - 1).clamp(0)}
        logits = policy(token_ids, **context).logits[:, trl_ppo.QUERY - 1 : -1] / options["temperature"]
        log_probs = logits.log_softmax(-1).gather(-1, token_ids[:, trl_ppo.QUERY :, None]).squeeze(-1)
        values = critic.score(critic.model(token_ids, **context).last_hidden_state)[:, trl_ppo.QUERY - 1 : -1, 0]
        is_response, has_value = mask[rows], longer[rows]
        torch.testing.assert_close(
            log_probs[is_response], theirs.step_log_probs[step][is_response], atol=1e-3, rtol=1e-3
        )
        torch.testing.assert_close(values[has_value], theirs.step_values[step][has_value], atol=1e-3, rtol=1e-3)
        policy_loss = losses.clipped_policy(
            log_probs, theirs.log_probs[rows], theirs.whitened_advantages[rows], options["cliprange"]
        )
        value_loss = losses.clipped_value(values, theirs.values[rows], returns[rows], options["cliprange_value"])
        (policy_loss[is_response].mean() + options["vf_coef"] * value_loss[has_value].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
