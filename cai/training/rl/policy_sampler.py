"""The policy as an engine: an inference copy of its weights, updated before each rollout.

Every rank holds the copy unpartitioned, in the precision in which the device decodes fastest, with an adapter merged
into it. So a rank's decoding never waits for another's: under ZeRO-3 the weights are gathered once a rollout, one
module at a time, and not once a token. The cost is the memory of one more copy in that precision.

With `engine: vllm` the copy is vLLM's, in a process of its own on the rank's device. It loads the weights from a folder
in shared memory, which one rank of a machine writes. Every response has its own seed there too, but what is sampled
also depends, by rounding, on what vLLM computes at the same time. With other engines the copy is in this process, where
only the seed decides a response; its memory is released while the policy learns, vLLM's is not.

Left out: servers, which have no common way to receive weights; one vLLM for several ranks; a vLLM that sleeps while the
policy learns.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from cai.contracts.engine import Completion, Request, Sampling
from cai.contracts.model import Model
from cai.contracts.profile import Profile
from cai.engines.local.local_engine import LocalEngine
from cai.engines.vllm import VllmEngine
from cai.models.loading import load_causal_lm, load_tokenizer, pick_device, pick_dtype, unpartitioned
from cai.models.quantised import dequantise
from cai.storage.rows import Failure, stable_id
from cai.text.errors import StageFailed

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]]
"""Gathers parameters that are partitioned over processes for as long as the context manager is open."""
_SHARED_MEMORY = Path("/dev/shm")
_LOG_PROB_TOLERANCE = 0.2
"""Greatest mean difference, in nats, of a token's log-probabilities that counts as rounding."""


def open_sampler(start: Model, profile: Profile, folder: Path, longest: int) -> Sampler:
    """The profile's sampler for a policy that starts as `start` in the stage whose folder is `folder`.

    No prompt and response have more than `longest` tokens together.
    """
    return VllmSampler(start, profile, folder, longest) if profile.engine == "vllm" else PolicySampler(start, profile)


def generate_all(
    sampler: Sampler, requests: Sequence[Request], on_completion: Callable[[], None] | None = None
) -> list[Completion]:
    """A completion for each request, in their order; then releases the sampler. Raises StageFailed for a failure.

    `on_completion` is called as each completion comes in.
    """
    completions: dict[str, Completion] = {}
    for result in sampler.generate(requests):
        if isinstance(result, Failure):
            raise StageFailed(f"a response could not be sampled: {result.reason}")
        completions[result.id] = result
        if on_completion:
            on_completion()
    sampler.release()
    return [completions[request.id] for request in requests]


class PolicySampler:
    """A copy of the policy in this process, which samples with the latest weights that `update` got."""

    def __init__(self, start: Model, profile: Profile) -> None:
        with unpartitioned():
            self.copy = load_causal_lm(start, profile.dtype, profile.device).requires_grad_(False)
        self.engine = LocalEngine(start, profile, self.copy)
        self._shapes = {name: parameter.shape for name, parameter in self.copy.named_parameters()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """Frees the copy's memory until the next `update`."""
        for parameter in self.copy.parameters():
            parameter.data = parameter.data.new_empty(0)

    @torch.no_grad()
    def update(self, policy: PreTrainedModel, gather: Gather) -> None:
        """Copies the policy's weights, an adapter merged. To be called on every rank."""
        targets = dict(self.copy.named_parameters())
        for name, target in targets.items():
            if target.shape != self._shapes[name]:
                target.data = target.data.new_empty(self._shapes[name])
        for name, weight in merged_weights(policy, gather):
            if (target := targets.get(name)) is not None:
                target.copy_(weight)
        if self.copy.device.type != "cpu":  # since the last rollout the optimizer has got its state
            self.engine.fit_budget()

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion | Failure]:
        """A completion or a failure for each request, in no particular order."""
        return self.engine.generate(requests)


class VllmSampler:
    """The policy in vLLM, one on every rank.

    Weights lie in shared memory, or in the folder of temporary files where that is too small, until the last rank of
    this machine has loaded them. The path follows from the stage's folder, so that the ranks agree on it and a stage
    that is run again removes what a killed one left.
    """

    def __init__(self, start: Model, profile: Profile, folder: Path, longest: int) -> None:
        self.start, self.profile, self.longest = start, profile, longest
        name = f"cai-policy-{stable_id(str(folder.resolve()))}"
        self._folders = [parent / name for parent in (_SHARED_MEMORY, Path(tempfile.gettempdir())) if parent.is_dir()]
        self._is_writer = os.environ.get("LOCAL_RANK", "0") == "0"
        self._dtype = pick_dtype(profile.dtype, pick_device(profile.device))
        self._engine: VllmEngine | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._engine is not None:
            self._engine.__exit__(*exception)
        if self._is_writer:
            self._remove()

    def release(self) -> None:
        """Does nothing: vLLM keeps the share of memory that the profile gives it."""

    @torch.no_grad()
    def update(self, policy: PreTrainedModel, gather: Gather) -> None:
        """Copies the weights. Raises StageFailed where they cannot be written, or vLLM does not take them."""
        state = {}
        for name, weight in merged_weights(policy, gather):
            if self._is_writer:
                dtype = self._dtype if weight.is_floating_point() else weight.dtype
                state[name] = weight.detach().to("cpu", dtype, copy=True)
        if self._is_writer:
            self._write(policy.get_base_model() if is_peft_model(policy) else policy, state)
        _barrier()
        if self._engine is None:
            folder = next(folder for folder in self._folders if folder.is_dir())
            model = replace(self.start, path=str(folder))
            self._engine = VllmEngine(model, self.profile, dummy_weights=True, longest=self.longest)
            self._engine.reload()
            self._check(self._engine, policy)
        else:
            self._engine.reload()
        _barrier()
        if self._is_writer:
            for path in Path(self._engine.model.path).glob("*.safetensors"):
                path.unlink()

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion | Failure]:
        assert self._engine is not None, "`update` comes first"
        return self._engine.generate(requests)

    def _check(self, engine: VllmEngine, policy: PreTrainedModel) -> None:
        """Raises StageFailed where vLLM computes with other weights than the policy's."""
        # Done after the first update alone: vLLM has started with empty weights, so that one that it does not load
        # shows in every number. Later an unchanged weight would be too close to the policy's to notice.
        request = Request("probe", [{"role": "user", "content": "What is it?"}], 0, Sampling(16, 0))
        (completion,) = engine.generate([request])
        if isinstance(completion, Failure):
            raise StageFailed(f"a response could not be sampled: {completion.reason}")
        n_prompt = len(completion.prompt_ids)
        ids = torch.tensor([[*completion.prompt_ids, *completion.token_ids]], device=policy.device)
        output = policy(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        logits = output.logits[0, n_prompt - 1 : -1].float()
        log_probs = logits.log_softmax(dim=-1).gather(-1, ids[0, n_prompt:, None])[:, 0].cpu()
        gap = float((log_probs - torch.tensor(completion.log_probs)).abs().mean())
        if not gap <= _LOG_PROB_TOLERANCE:  # `not <=` also refuses NaN
            raise StageFailed(
                f"vLLM did not take over the weights of the policy, a {policy.config.model_type} model: its "
                f"log-probabilities are {gap:.2g} nats from the policy's, expected {_LOG_PROB_TOLERANCE:g} or less; "
                f"sample with `engine: local`"
            )

    def _write(self, policy: PreTrainedModel, state: dict[str, Tensor]) -> None:
        """Writes a model folder with these weights; the first call also chooses which folder."""
        try:
            if self._engine is None:
                self._remove()
                n_bytes = sum(tensor.nbytes for tensor in state.values())
                large_enough = [path for path in self._folders if shutil.disk_usage(path.parent).free > 1.1 * n_bytes]
                folder = (large_enough or self._folders)[0]
                folder.mkdir(mode=0o700)
                load_tokenizer(self.start).save_pretrained(folder)
            else:
                folder = Path(self._engine.model.path)
            policy.save_pretrained(folder, state_dict=state)
        except (OSError, SafetensorError) as error:
            parents = " or ".join(str(path.parent) for path in self._folders)
            raise StageFailed(f"the policy's weights could not be written for vLLM into {parents}: {error}") from error

    def _remove(self) -> None:
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)


Sampler = PolicySampler | VllmSampler


@torch.no_grad()
def merged_weights(policy: PreTrainedModel, gather: Gather) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of the policy and its buffers, an adapter merged, by the names that it has without an adapter.

    A quantised base is the matrix that it is computed with, so that responses are sampled from the policy that learns.

    Each weight stays gathered until the next one is requested. Under ZeRO-3 every rank must consume the whole iterator.
    """
    adapted_layers = {}
    if is_peft_model(policy):
        policy = policy.get_base_model()
        adapted_layers = {name: module for name, module in policy.named_modules() if isinstance(module, BaseTunerLayer)}
    named = [pair for module in adapted_layers.values() for pair in module.named_parameters()]
    adapter_ids = {id(weight) for name, weight in named if not name.startswith("base_layer.")}
    for name, weight in policy.named_parameters():
        if id(weight) in adapter_ids:
            continue
        layer, _, rest = name.partition(".base_layer.")
        module = adapted_layers.get(layer) if rest == "weight" else None
        with gather([weight] if module is None else list(module.parameters())):
            dense = dequantise(weight)
            merged = dense if module is None else dense + module.get_delta_weight("default")
            yield f"{layer}.{rest}" if rest else name, merged
    saved_names = policy.state_dict().keys()
    for name, buffer in policy.named_buffers():
        if name in saved_names:
            yield name.replace(".base_layer.", "."), buffer


def _barrier() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
