"""The losses against numpy, against finite differences, and against TRL's own hard ones."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from cai import losses  # noqa: E402

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
    loss = losses.negative_log_likelihood(*(tensor(each) for each in (chosen, rejected, long, short, p)))
    np.testing.assert_allclose(loss.numpy(), -p * chosen / long - (1 - p) * rejected / short, atol=1e-12)
    certain = losses.negative_log_likelihood(*(tensor(each) for each in (chosen, rejected, long, short, np.ones(30))))
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
    assert loss.tolist() == pytest.approx(losses.label_entropy(p).tolist())
    assert losses.label_entropy(torch.tensor([0.0, 1.0])).tolist() == [0.0, 0.0]


def test_swapping_the_responses_and_the_label_changes_nothing() -> None:
    margins, p = tensor(MARGINS), tensor(LABELS)
    torch.testing.assert_close(losses.bradley_terry(margins, p), losses.bradley_terry(-margins, 1 - p))
