"""Tokens are sampled from the distribution that the settings leave, with the model's own log-probabilities."""

from __future__ import annotations

import pytest
import torch

from cai.contracts.engine import Sampling
from cai.engines.local.token_sampling import sample_tokens


def test_sampling_draws_from_the_distribution_that_its_settings_leave() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().repeat(4000, 1)
    even = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    uniforms = torch.stack([even, even[torch.randperm(4000, generator=torch.Generator().manual_seed(0))]], dim=-1)

    def shares(sampling: Sampling, banned_ids: tuple[int, ...] = ()) -> list[float]:
        tokens, log_probs = sample_tokens(logits, uniforms, sampling, banned_ids)
        assert log_probs.tolist() == pytest.approx(logits[0][tokens].tolist(), abs=1e-6)
        return (torch.bincount(tokens, minlength=4) / 4000).tolist()

    assert shares(Sampling()) == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=1e-3)
    assert shares(Sampling(temperature=0)) == [1, 0, 0, 0]
    assert shares(Sampling(temperature=0), banned_ids=(0,)) == [0, 1, 0, 0]
    assert shares(Sampling(temperature=0.5)) == pytest.approx([16 / 30, 9 / 30, 4 / 30, 1 / 30], abs=1e-3)
    assert shares(Sampling(top_k=2)) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=1e-3)
    assert shares(Sampling(top_p=0.65)) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=1e-2)
    assert shares(Sampling(top_p=0.75)) == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0], abs=1e-2)
    assert shares(Sampling(top_p=0.3)) == [1, 0, 0, 0]
    assert shares(Sampling(top_k=3, top_p=0.7)) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=1e-2)
