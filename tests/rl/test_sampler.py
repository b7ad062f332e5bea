"""The copy that draws is the policy, whatever the policy is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest

from cai.checkpoint import Model, load_causal_lm
from cai.engines import Completion, Request, Sampling
from cai.profile import Profile

torch = pytest.importorskip("torch")

from test_actor_critic import batch, with_lora  # noqa: E402

from cai.rl.sampler import PolicySampler  # noqa: E402

CPU = Profile(device="cpu", dtype="float32")


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen2"])
def test_the_copy_answers_like_the_policy_that_it_was_updated_to(
    family: str, adapter: bool, tiny: Callable[..., Model]
) -> None:
    torch.manual_seed(0)
    sampler = PolicySampler(tiny(family), CPU)
    policy = load_causal_lm(tiny(family))
    with torch.no_grad():
        for each in policy.parameters():
            each.add_(0.05 * torch.randn_like(each))
    if adapter:
        policy = with_lora(policy)
    ids, mask, _ = batch()
    with torch.no_grad():
        wanted = policy(input_ids=ids, attention_mask=mask).logits
        assert not torch.allclose(sampler.copy(input_ids=ids, attention_mask=mask).logits, wanted, atol=1e-2)
        gathered: list[int] = []

        def gather(parameters: object) -> contextlib.AbstractContextManager[None]:
            gathered.append(len(list(parameters)))  # type: ignore[call-overload]
            return contextlib.nullcontext()

        sampler.update(policy, gather)
        assert torch.allclose(sampler.copy(input_ids=ids, attention_mask=mask).logits, wanted, atol=1e-4)
    assert sum(gathered) >= len(list(sampler.copy.parameters()))


def test_it_draws_what_the_updated_policy_finds_likely(tiny: Callable[..., Model]) -> None:
    sampler = PolicySampler(tiny("llama"), CPU)
    requests = [Request(str(n), [{"role": "user", "content": "Hi"}], n, Sampling(4, 1.0)) for n in range(4)]
    before = [each.token_ids for each in sampler.draw(requests) if isinstance(each, Completion)]
    policy = load_causal_lm(tiny("llama"))
    with torch.no_grad():
        policy.get_output_embeddings().weight[33] += 3 * policy.model.norm.weight
        policy.get_output_embeddings().weight.mul_(5)
    sampler.release()
    assert not sum(each.numel() for each in sampler.copy.parameters())
    sampler.update(policy, lambda parameters: contextlib.nullcontext())
    after = [each.token_ids for each in sampler.draw(requests) if isinstance(each, Completion)]
    assert len(before) == len(after) == 4
    assert before != after
