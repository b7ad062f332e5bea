"""Log-probabilities, entropy and values are those of the plain computation, also after a resume point."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import Tiny
from transformers import AutoModelForCausalLM

from cai.models.loading import load_causal_lm, load_sequence_classifier
from cai.training.rl.actor_critic import ActorCritic


def batch(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two prompts of 4 tokens with responses of 5 and 3, and so on, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 60, (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, 7:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return ids, mask, labels


def with_lora(policy: object, dropout: float = 0.0) -> object:
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM")
    adapted = get_peft_model(policy, config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return adapted


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tiles", [False, True])
def test_log_probabilities_and_entropy_are_those_of_the_whole_softmax(
    family: str, temperature: float, tiles: bool, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tiles:
        monkeypatch.setattr("cai.attention.cpu_lm_head.MAX_LOGITS", 0)
    ids, mask, labels = batch()
    plain = load_causal_lm(tiny(family))
    logits = plain(input_ids=ids, attention_mask=mask).logits.float() / temperature
    log_probs = logits.log_softmax(dim=-1)[:, :-1]
    sampled = labels[:, 1:] != -100
    output = ActorCritic(load_causal_lm(tiny(family)), temperature=temperature)(ids, mask, labels)
    of_targets = log_probs.gather(2, ids[:, 1:, None]).squeeze(2)
    assert torch.allclose(output.log_probs, of_targets * sampled, atol=1e-5)
    assert torch.allclose(output.entropy, torch.special.entr(log_probs.exp()).sum(dim=-1) * sampled, atol=1e-4)
    assert not output.values.any()  # the head begins at zero
    assert output.values.shape == (3, 8)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_nothing_drops_out_while_it_trains(family: str, tiny: Tiny) -> None:
    policy, critic = load_causal_lm(tiny(family)), load_sequence_classifier(tiny(family))
    for module in (*policy.modules(), *critic.modules()):
        if hasattr(module, "attention_dropout"):  # a probability that attention takes as an argument
            module.attention_dropout = 0.5
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    policy = with_lora(policy.requires_grad_(True), dropout=0.5)
    plain = policy(batch()[0]).logits
    assert not torch.equal(policy.train()(batch()[0]).logits, plain)  # it would
    model = ActorCritic(policy, critic).train()
    first, second = model(*batch()), model(*batch())
    assert torch.equal(first.log_probs, second.log_probs)
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.log_probs, model.eval()(*batch()).log_probs)


def test_without_values_the_value_function_is_not_computed(tiny: Tiny) -> None:
    model = ActorCritic(load_causal_lm(tiny("llama")), load_sequence_classifier(tiny("llama")))
    value_calls: list[object] = []
    for module in (model.critic, model.critic.base_model):
        module.register_forward_hook(lambda *call: value_calls.append(call))
    output = model(*batch(), with_values=False)
    assert value_calls == []
    assert torch.equal(output.log_probs, model(*batch()).log_probs)
    assert len(value_calls) == 1


def test_a_critic_values_each_token_and_shares_nothing_with_the_policy(tiny: Tiny) -> None:
    torch.manual_seed(0)
    model = ActorCritic(load_causal_lm(tiny("llama")).requires_grad_(True), load_sequence_classifier(tiny("llama")))
    ids, mask, labels = batch()
    output = model(ids, mask, labels)
    assert output.values.std() > 0
    shorter = model(ids[:, :6], mask[:, :6], labels[:, :6])
    assert torch.allclose(output.values[:, :5], shorter.values, atol=1e-5)  # the future is not seen
    output.values.sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.policy.parameters())


@pytest.mark.parametrize("kind", ["all_weights", "adapter", "critic"])
def test_a_resume_point_restores_the_same_module(kind: str, tmp_path: Path, tiny: Tiny) -> None:
    def build() -> ActorCritic:
        policy = load_causal_lm(tiny("llama")).requires_grad_(True)
        critic = load_sequence_classifier(tiny("llama")) if kind == "critic" else None
        return ActorCritic(with_lora(policy) if kind == "adapter" else policy, critic)  # type: ignore[arg-type]

    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save(tmp_path)
    torch.manual_seed(1)
    restored = build()
    restored.load(tmp_path)
    before, after = model(*batch()), restored(*batch())
    assert torch.equal(before.log_probs, after.log_probs)
    assert torch.equal(before.values, after.values)
    assert before.values.any()
    assert not any(path.suffix in {".bin", ".pt"} for path in tmp_path.iterdir())


def test_the_policy_in_a_resume_point_is_a_model_by_itself(tmp_path: Path, tiny: Tiny) -> None:
    model = ActorCritic(load_causal_lm(tiny("llama")))
    model.save(tmp_path)
    ids, mask, _ = batch()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids=ids, attention_mask=mask).logits, model.policy(ids, attention_mask=mask).logits)
