"""Continuous batching gives the responses of one row at a time within its token budget; tokens have their shares."""

from __future__ import annotations

import pytest
import torch
from engine_contract import completions_by_id, conversation
from local_engines import local_engine, make_end_of_turn_likely
from tiny_models import Tiny

from cai.contracts.engine import Completion, Request, Sampling
from cai.engines.local import decoding
from cai.engines.local.token_sampling import sample_tokens
from cai.engines.retry import generate_all


@pytest.mark.usefixtures("pads_sizes")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "thinking", "lora"])
def test_responses_are_those_of_one_response_a_row_whatever_runs_beside_them(tiny: Tiny, family: str) -> None:
    """In float32, so that rounding hardly ever decides; samples of one prompt, long and short prompts."""
    prompts = ["how deep is the sea?", "write a poem about the sea " * 9, "a", "which is " * 30, "and then?"]
    requests = [
        Request(f"{n}-{k}", conversation(text), 10 * n + k, Sampling(12, temperature=(0.0, 1.0)[k % 2]))
        for n, text in enumerate(prompts)
        for k in range(1 + n % 3 * 2)
    ]
    row_by_row = local_engine(tiny(family), shares_prefixes=False)
    expected = completions_by_id(row_by_row.generate(requests), requests)
    for budget in (256, 700, 16384):
        engine = local_engine(tiny(family), token_budget=budget)
        completions = completions_by_id(engine.generate(requests), requests)
        assert engine._shares_prefixes
        for id, completion in completions.items():
            assert completion.token_ids == expected[id].token_ids
            assert completion.log_probs == pytest.approx(expected[id].log_probs, abs=1e-4)


@pytest.mark.parametrize("max_new_tokens", [8, 33])
@pytest.mark.parametrize("budget", [500, 2000])
@pytest.mark.parametrize("n_samples", [1, 3])
def test_keys_and_values_of_rows_and_prompts_stay_within_the_budget(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, n_samples: int, max_new_tokens: int, budget: int
) -> None:
    """Few long prompts with several samples; many shorter ones, with several or one: then fewer rows run at once."""
    n_held: list[int] = []
    decode_step = decoding._RunningBatch.decode_step

    def count_tokens(self: decoding._RunningBatch) -> torch.Tensor:
        logits = decode_step(self)
        n_prompt_tokens = sum(bucket.prefixes.mask.numel() for bucket in self.buckets.values())
        keys = self.generated.keys[0]
        n_held.append(n_prompt_tokens + keys.shape[0] * keys.shape[-1])
        return logits

    monkeypatch.setattr(decoding._RunningBatch, "decode_step", count_tokens)
    texts = ["which is deeper " * 12] * 3 + [f"a {n} and a {n}" for n in range(40)]
    requests = [
        Request(f"{n}-{k}", conversation(text), 10 * n + k, Sampling(max_new_tokens))
        for n, text in enumerate(texts)
        for k in range(8 if n < 9 else n_samples)
    ]
    engine = local_engine(tiny("llama"), token_budget=budget)
    completions_by_id(engine.generate(requests), requests)
    assert 0.6 * budget < max(n_held) <= budget


def test_rows_that_finish_at_any_token_make_room_for_others(tiny: Tiny) -> None:
    """Many short prompts after few long ones: rows are admitted before the generated-token KV cache has room for them,
    and finish with their first token."""
    texts = ["which is deeper " * 30] * 4 + [f"a {n}" for n in range(60)]
    requests = [Request(str(n), conversation(text), n, Sampling(20)) for n, text in enumerate(texts)]

    def complete(shares_prefixes: bool, budget: int) -> dict[str, Completion]:
        engine = local_engine(tiny("llama"), shares_prefixes=shares_prefixes, token_budget=budget)
        make_end_of_turn_likely(engine)
        return completions_by_id(engine.generate(requests), requests)

    expected = {id: completion.token_ids for id, completion in complete(False, 16384).items()}
    assert {1, 2, 3} < {len(token_ids) for token_ids in expected.values()}
    for budget in (256, 600, 2000, 16384):
        assert {id: completion.token_ids for id, completion in complete(True, budget).items()} == expected


@pytest.mark.parametrize("shares_prefixes", [True, False])
def test_tokens_are_counted_while_no_response_is_complete(tiny: Tiny, shares_prefixes: bool) -> None:
    engine = local_engine(tiny("llama"), shares_prefixes=shares_prefixes)
    requests = [Request(f"{n}", conversation(f"{n}?"), n, Sampling(12)) for n in range(3)]
    n_tokens: list[int] = []
    n_before: list[int] = []
    completions = generate_all(
        engine, requests, 0, on_completion=lambda _: n_before.append(sum(n_tokens)), on_tokens=n_tokens.append
    )
    sampled = [completion.n_tokens for completion in completions.values() if isinstance(completion, Completion)]
    assert sum(n_tokens) == sum(sampled)
    assert len(n_tokens) >= max(sampled) - 1
    assert n_before[0] >= min(sampled)
    assert engine.on_tokens is None


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
