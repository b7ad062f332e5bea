"""The losses as pure tensor maths: tensors in, one loss a pair or a token out; no models, configs or reductions.

Losses on preferences take a soft label: `p_chosen` is the probability that the chosen response is the better one. Each
is the expectation of its hard form under that label, p · loss(chosen, rejected) + (1 − p) · loss(rejected, chosen), so
p = 1 gives the published loss. With p = ½ the two losses on margins are lowest where both responses are equal.

Losses on rewards are those of proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347). `mask` (batch,
seq) is true at a response's tokens, which start in the first column and have no gaps. Where it is false, values are
ignored and results are zero.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry(margins: Tensor, p_chosen: Tensor) -> Tensor:
    """Negative log-likelihood of a reward model, −[p log σ(Δ) + (1 − p) log σ(−Δ)], in nats.

    The hard form is Bradley and Terry 1952, as in Ouyang et al. 2022 (arXiv 2203.02155, eq. 1); the soft one is the
    cross-entropy of Bai et al. 2022 (arXiv 2212.08073) and Lee et al. 2023 (arXiv 2309.00267).
    The loss is lowest where σ(Δ) = p.

    margins:  (pairs,) Δ = reward of the chosen response − reward of the rejected one
    p_chosen: (pairs,) label in [0, 1]
    returns:  (pairs,)
    """
    return -(p_chosen * logsigmoid(margins) + (1 - p_chosen) * logsigmoid(-margins))


def direct_preference(chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, p_chosen: Tensor, beta: float) -> Tensor:
    """DPO with a soft label: `bradley_terry` on the implicit rewards β log π/π_ref, in nats.

    The hard form is Rafailov et al. 2023 (arXiv 2305.18290, eq. 7). With p = 1 − ε for every pair this is conservative
    DPO (Mitchell 2023, ericmitchell.ai/cdpo.pdf). It is log 2 for any label while policy and reference are equal.

    chosen_log_ratios, rejected_log_ratios: (pairs,) log π(response) − log π_ref(response), summed over the tokens
    p_chosen: (pairs,) label in [0, 1]
    beta:     strength of the KL penalty towards the reference
    returns:  (pairs,)
    """
    return bradley_terry(beta * (chosen_log_ratios - rejected_log_ratios), p_chosen)


def negative_log_likelihood(
    chosen_log_probs: Tensor, rejected_log_probs: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor,
    p_chosen: Tensor,
) -> Tensor:  # fmt: skip
    """Expected negative log-likelihood under the label, p · NLL(chosen) + (1 − p) · NLL(rejected), in nats a token.

    The hard form is the second term of Pang et al. 2024 (arXiv 2404.19733, eq. 1). It keeps the likelihood of the
    chosen response from falling along with that of the rejected one. An even label raises the likelihood of both.

    chosen_log_probs, rejected_log_probs: (pairs,) log π(response), summed over the tokens
    chosen_lengths, rejected_lengths:     (pairs,) tokens
    p_chosen: (pairs,) label in [0, 1]
    returns:  (pairs,)
    """
    chosen, rejected = chosen_log_probs / chosen_lengths, rejected_log_probs / rejected_lengths
    return -(p_chosen * chosen + (1 - p_chosen) * rejected)


KLEstimator = Literal["k1", "k3"]
"""Estimator of the KL divergence from the reference at each token, named as in Schulman 2020.

Both have the KL's value as their mean. In a reward, where only the gradient of the log-probability of the sampled token
acts, only k1 has the KL's gradient as well: that of k3 is ∇KL(π ‖ π_ref) − ∇KL(π_ref ‖ π), which mostly points away
from the reference.
"""


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, estimator: KLEstimator) -> Tensor:
    """KL(π ‖ π_ref) estimated at tokens sampled from π, in nats (Schulman 2020, joschu.net/blog/kl-approx.html).

    With r = π_ref/π: k1 = −log r and k3 = (r − 1) − log r. Both are unbiased; k3 is never negative, and has the lower
    variance while the two policies are similar.

    log_probs, ref_log_probs: (…,) natural log-probability of each sampled token
    returns: (…,)
    """
    log_ratio = ref_log_probs - log_probs
    return -log_ratio if estimator == "k1" else torch.expm1(log_ratio) - log_ratio


def rewards_at_tokens(scores: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """The reward of each token: −coefficient · KL, plus the response's score at its last token.

    Ziegler et al. 2019 (arXiv 1909.08593, eq. 2), spread over tokens as in Ouyang et al. 2022 (arXiv 2203.02155).

    scores: (batch,);  kl: (batch, seq), nats, by k1 (see `KLEstimator`);  mask: (batch, seq), at least one token a row
    returns: (batch, seq)
    """
    rewards = (-coefficient * kl).masked_fill(~mask, 0.0)
    last = mask.sum(dim=1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16): advantages and returns.

    A_t = Σ_k (γλ)^k δ_{t+k} with δ_t = r_t + γ V_{t+1} − V_t, where V after a response's last token is 0. The returns,
    A + V, are the value function's targets.

    rewards, values, mask: (batch, seq);  gamma, lam: in [0, 1]
    returns: two of (batch, seq)
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(rewards)
    advantage, next_value = torch.zeros_like(rewards[:, 0]), torch.zeros_like(values[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * advantage
        advantages[:, t], next_value = advantage, values[:, t]
    return advantages, advantages + values


def whitened(values: Tensor, mask: Tensor) -> Tensor:
    """Values scaled to mean 0 and variance 1 over the true entries of `mask`; fewer than two are left unchanged.

    values, mask: (batch, seq);  returns: (batch, seq)
    """
    unmasked = values[mask]
    if len(unmasked) < 2:
        return values.masked_fill(~mask, 0.0)
    return ((values - unmasked.mean()) * torch.rsqrt(unmasked.var() + 1e-8)).masked_fill(~mask, 0.0)


def clipped_policy(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's loss of each token, −min(ρA, clip(ρ, 1 − ε, 1 + ε)A) with ρ = π/π_old (arXiv 1707.06347, eq. 7).

    log_probs, old_log_probs, advantages: (…,);  clip: ε;  returns: (…,)
    """
    ratio = torch.exp(log_probs - old_log_probs)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def clipped_value(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """The value function's loss of each token: half the larger squared error of the value and of the clipped value.

    The clipped value is at most `clip` away from the value at the rollout. The paper does not have this loss, but its
    authors' code has (github.com/openai/baselines, ppo2), and so do Ouyang et al. 2022.

    values, old_values, returns: (…,);  returns: (…,)
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
