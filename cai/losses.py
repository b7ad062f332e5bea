"""The losses, as pure tensor maths: tensors in, one loss a pair out; no models, no config objects, no reduction.

A label here is a probability, not a verdict: `p` is how likely the chosen response is the better one. Every loss is the
expectation of its hard form under that label, p · loss(chosen, rejected) + (1 − p) · loss(rejected, chosen), so p = 1
gives back the published loss. Of the two losses on margins, p = ½ teaches that the two responses are equal.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry(margins: Tensor, p_chosen: Tensor) -> Tensor:
    """Negative log-likelihood of a reward model, −[p log σ(Δ) + (1 − p) log σ(−Δ)], in nats.

    The hard form is Bradley and Terry 1952, as in Ouyang et al. 2022 (arXiv 2203.02155, eq. 1); the soft one is the
    cross-entropy of Bai et al. 2022 (arXiv 2212.08073) and Lee et al. 2023 (arXiv 2309.00267).
    Lowest where σ(Δ) = p.

    margins:  (pairs,) Δ = reward of the chosen response − reward of the rejected one
    p_chosen: (pairs,) label in [0, 1]
    returns:  (pairs,)
    """
    return -(p_chosen * logsigmoid(margins) + (1 - p_chosen) * logsigmoid(-margins))


def direct_preference(chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, p_chosen: Tensor, beta: float) -> Tensor:
    """DPO with a soft label: `bradley_terry` on the implicit rewards β log π/π_ref, in nats.

    The hard form is Rafailov et al. 2023 (arXiv 2305.18290, eq. 7). With p = 1 − ε for every pair this is conservative
    DPO (Mitchell 2023, ericmitchell.ai/cdpo.pdf). log 2 for any label while the policy is its own reference.

    chosen_log_ratios, rejected_log_ratios: (pairs,) log π(response) − log π_ref(response), summed over the tokens
    p_chosen: (pairs,) label in [0, 1]
    beta:     strength of the tie to the reference
    returns:  (pairs,)
    """
    return bradley_terry(beta * (chosen_log_ratios - rejected_log_ratios), p_chosen)


def negative_log_likelihood(
    chosen_log_probs: Tensor, rejected_log_probs: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor,
    p_chosen: Tensor,
) -> Tensor:  # fmt: skip
    """Expected negative log-likelihood under the label: p of the chosen response's, 1 − p of the rejected one's.

    In nats a token of each response. The hard form is the second term of Pang et al. 2024 (arXiv 2404.19733, eq. 1),
    which keeps the chosen response from becoming less likely while the rejected one becomes so even faster. An even
    label raises both.

    chosen_log_probs, rejected_log_probs: (pairs,) log π(response), summed over the tokens
    chosen_lengths, rejected_lengths:     (pairs,) tokens
    p_chosen: (pairs,) label in [0, 1]
    returns:  (pairs,)
    """
    chosen, rejected = chosen_log_probs / chosen_lengths, rejected_log_probs / rejected_lengths
    return -(p_chosen * chosen + (1 - p_chosen) * rejected)


def label_entropy(p_chosen: Tensor) -> Tensor:
    """The least that either loss on margins can be for these labels, in nats. (pairs,) → (pairs,)"""
    entropy: Tensor = torch.special.entr(p_chosen) + torch.special.entr(1 - p_chosen)
    return entropy
