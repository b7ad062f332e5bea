"""The inference copy equals the policy, whatever the policy is made of. `make test-servers` covers the one in vLLM."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from engine_contract import completions_by_id, conversation
from test_actor_critic import batch, with_lora
from tiny_models import Tiny

from cai.contracts.engine import Completion, Request, Sampling
from cai.contracts.profile import Profile
from cai.engines import vllm
from cai.models.chat import Chat
from cai.models.loading import load_causal_lm
from cai.models.reference import resolve
from cai.text.errors import StageFailed
from cai.training.rl import policy_sampler as sampler_module
from cai.training.rl.policy_sampler import PolicySampler, Sampler, VllmSampler, open_sampler

CPU = Profile(device="cpu", dtype="float32")
REQUESTS = [Request(str(n), conversation("Hi"), n, Sampling(4, 1.0)) for n in range(4)]


def complete(sampler: Sampler) -> dict[str, Completion]:
    return completions_by_id(sampler.generate(REQUESTS), REQUESTS)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen2"])
def test_the_copy_answers_like_the_policy_that_it_was_updated_to(family: str, adapter: bool, tiny: Tiny) -> None:
    torch.manual_seed(0)
    sampler = PolicySampler(tiny(family), CPU)
    policy = load_causal_lm(tiny(family))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    if adapter:
        policy = with_lora(policy)
    ids, mask, _ = batch()
    with torch.no_grad():
        expected = policy(input_ids=ids, attention_mask=mask).logits
        assert not torch.allclose(sampler.copy(input_ids=ids, attention_mask=mask).logits, expected, atol=1e-2)
        gathered: list[torch.Tensor] = []
        sampler.update(policy, lambda parameters: contextlib.nullcontext(gathered.extend(parameters)))
        assert torch.allclose(sampler.copy(input_ids=ids, attention_mask=mask).logits, expected, atol=1e-4)
    assert len(gathered) >= len(list(sampler.copy.parameters()))


def test_it_samples_what_the_updated_policy_finds_likely(tiny: Tiny) -> None:
    sampler = PolicySampler(tiny("llama"), CPU)
    before = [completion.token_ids for completion in complete(sampler).values()]
    policy = load_causal_lm(tiny("llama"))
    with torch.no_grad():
        policy.get_output_embeddings().weight[33] += 3 * policy.model.norm.weight
        policy.get_output_embeddings().weight.mul_(5)
    sampler.release()
    assert not sum(completion.numel() for completion in sampler.copy.parameters())
    sampler.update(policy, contextlib.nullcontext)
    after = [completion.token_ids for completion in complete(sampler).values()]
    assert before != after


@pytest.mark.parametrize(
    ("engine", "kind"), [("local", PolicySampler), ("server", PolicySampler), ("vllm", VllmSampler)]
)
def test_the_policy_is_sampled_here_or_by_vllm(engine: str, kind: type, tiny: Tiny, tmp_path: Path) -> None:
    assert isinstance(open_sampler(tiny("llama"), CPU.model_copy(update={"engine": engine}), tmp_path, 64), kind)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen2", "pad_is_eos", "lora"])
def test_vllm_loads_the_policy_from_a_folder_whose_weights_are_then_removed(
    family: str, adapter: bool, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    start = tiny(family)
    policy = load_causal_lm(start)
    if adapter:
        policy = with_lora(policy)
    ids, mask, _ = batch()
    loaded_logits: list[torch.Tensor] = []

    def load(self: vllm.VllmEngine) -> None:
        assert Chat.load(self.model).same_ids(Chat.load(start))
        model = resolve(self.model.path, folder=tmp_path)
        loaded_logits.append(load_causal_lm(model)(input_ids=ids, attention_mask=mask).logits)

    monkeypatch.setattr(vllm.VllmEngine, "reload", load)
    monkeypatch.setattr(VllmSampler, "_check", lambda self, engine, policy: None)
    monkeypatch.setattr(sampler_module, "_SHARED_MEMORY", tmp_path)
    with torch.no_grad(), VllmSampler(start, CPU, tmp_path / "stage", 64) as sampler:
        folder = sampler._folders[0]
        assert folder.parent == tmp_path
        folder.mkdir()
        (folder / "model-00001-of-00002.safetensors").touch()  # as a stage that was killed leaves it
        for update in range(2):
            for parameter in policy.parameters():
                parameter.add_(0.05 * update * torch.randn_like(parameter))
            sampler.update(policy, contextlib.nullcontext)
            assert torch.allclose(loaded_logits[-1], policy(input_ids=ids, attention_mask=mask).logits, atol=1e-4)
            assert not list(folder.glob("*.safetensors"))
        assert not torch.allclose(*loaded_logits, atol=1e-2)
    assert not folder.exists()


def test_weights_that_do_not_fit_on_disk_end_it(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    policy = load_causal_lm(tiny("llama"))
    monkeypatch.setattr(policy, "save_pretrained", full)
    with VllmSampler(tiny("llama"), CPU, tmp_path, 64) as sampler:
        message = "the policy's weights could not be written for vLLM into .*: .*No space left on device"
        with pytest.raises(StageFailed, match=message):
            sampler.update(policy, contextlib.nullcontext)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Profile:
    """A profile whose vLLM worker is a stand-in that does not load weights."""
    monkeypatch.setattr(vllm, "WORKER", Path(__file__).parents[2] / "support" / "stand_in_worker.py")
    return CPU.model_copy(update={"vllm": CPU.vllm.model_copy(update={"python": Path(sys.executable)})})


def test_a_vllm_with_other_weights_than_the_policys_ends_it(tiny: Tiny, tmp_path: Path, stand_in: Profile) -> None:
    with VllmSampler(tiny("llama"), stand_in, tmp_path, 64) as sampler:
        message = r"vLLM did not take over the weights of the policy, a llama model: .* nats .*, expected 0.2 or less"
        with pytest.raises(StageFailed, match=message):
            sampler.update(load_causal_lm(tiny("llama")), contextlib.nullcontext)


def test_vllm_reloads_weights(tiny: Tiny, tmp_path: Path, stand_in: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VllmSampler, "_check", lambda self, engine, policy: None)
    policy = load_causal_lm(tiny("llama"))
    workers = []
    with VllmSampler(tiny("llama"), stand_in, tmp_path, 64) as sampler:
        for update in range(3):
            sampler.update(policy, contextlib.nullcontext)
            workers += sampler._engine._workers
            log_probs = [completion.log_probs for completion in complete(sampler).values()]
            assert set(itertools.chain(*log_probs)) == {math.log(0.25) - 1 - update}
        assert len(workers) == 3
        assert len(set(map(id, workers))) == 1
        workers[0]._process.kill()
        with pytest.raises(StageFailed, match="vLLM ended with signal 9 in the middle of its work"):
            sampler.update(policy, contextlib.nullcontext)
    workers[0].log.unlink()
