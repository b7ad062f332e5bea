"""The policy as an engine: a copy of its weights that only writes, brought up to date before each rollout.

The copy is whole on every rank, in the precision in which the device decodes fastest, with an adapter merged into it.
So a rank's decoding never waits for another's: under ZeRO-3 the weights are gathered once a rollout, one module at a
time, and not once a token. What it costs is the memory of one more copy in that precision.

With `engine: vllm` the copy is vLLM's, in a process of its own on the rank's device, and takes the weights from a
folder in shared memory, which one rank of a machine writes; every response has its own seed there too, but what is
drawn also depends, by rounding, on what vLLM computes at the same time. With other engines the copy is in this process,
where nothing but its seed decides a response; its memory is given back while the policy learns, vLLM's is not.

Left out: servers, which have no way to send them weights that all of them know; one vLLM for several ranks; a vLLM that
sleeps while the policy learns.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Protocol, Self

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
from cai.storage.rows import Failure, stable_id
from cai.text.errors import StageFailed

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]]
"""Makes parameters whole while it is open, where they are spread over processes."""
_SHARED_MEMORY = Path("/dev/shm")
_AGREE = 0.2
"""Mean difference in nats of a token's log-probabilities that rounding may make."""


class Sampler(Protocol):
    """Draws responses from the latest weights that `update` was given. A context manager: it ends what it started."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    def update(self, policy: PreTrainedModel, gather: Gather) -> None:
        """Takes the policy's weights, an adapter's product added. To be called on every rank."""

    def draw(self, requests: Sequence[Request]) -> Iterator[Completion | Failure]:
        """A completion or a failure for each request, in no particular order."""

    def release(self) -> None:
        """Gives memory to whoever learns; the next `update` takes it again."""


def open_sampler(start: Model, profile: Profile, folder: Path) -> Sampler:
    """What draws for a policy that starts as `start` in the stage whose folder is `folder`, as the profile says."""
    return VllmSampler(start, profile, folder) if profile.engine == "vllm" else PolicySampler(start, profile)


class PolicySampler:
    """A copy of the policy in this process."""

    def __init__(self, start: Model, profile: Profile) -> None:
        with unpartitioned():
            self.copy = load_causal_lm(start, profile.dtype, profile.device).requires_grad_(False)
        self.engine = LocalEngine(start, profile, self.copy)
        self._shapes = {name: each.shape for name, each in self.copy.named_parameters()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        for each in self.copy.parameters():
            each.data = each.data.new_empty(0)

    @torch.no_grad()
    def update(self, policy: PreTrainedModel, gather: Gather) -> None:
        targets = dict(self.copy.named_parameters())
        for name, target in targets.items():
            if target.shape != self._shapes[name]:
                target.data = target.data.new_empty(self._shapes[name])
        for name, weight in merged_weights(policy, gather):
            if (target := targets.get(name)) is not None:
                target.copy_(weight)

    def draw(self, requests: Sequence[Request]) -> Iterator[Completion | Failure]:
        return self.engine.generate(requests)


class VllmSampler:
    """The policy in vLLM, one on every rank.

    Weights lie in shared memory, or where temporary files do if it has no room, from when they are written until the
    last rank of this machine has read them. The place follows from the stage's folder, so that the ranks agree and a
    stage that is run again removes what a killed one left.
    """

    def __init__(self, start: Model, profile: Profile, folder: Path) -> None:
        self.start, self.profile = start, profile
        name = f"cai-policy-{stable_id(str(folder.resolve()))}"
        self._places = [home / name for home in (_SHARED_MEMORY, Path(tempfile.gettempdir())) if home.is_dir()]
        self._writes = os.environ.get("LOCAL_RANK", "0") == "0"
        self._dtype = pick_dtype(profile.dtype, pick_device(profile.device))
        self._engine: VllmEngine | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._engine is not None:
            self._engine.__exit__(*exception)
        if self._writes:
            self._remove()

    def release(self) -> None:
        """Nothing: vLLM keeps the share of memory that the profile gives it."""

    @torch.no_grad()
    def update(self, policy: PreTrainedModel, gather: Gather) -> None:
        """Raises StageFailed where the weights cannot be written, or vLLM does not take them."""
        state = {}
        for name, weight in merged_weights(policy, gather):
            if self._writes:
                dtype = self._dtype if weight.is_floating_point() else weight.dtype
                state[name] = weight.detach().to("cpu", dtype, copy=True)
        if self._writes:
            self._write(policy.get_base_model() if is_peft_model(policy) else policy, state)
        _wait_for_all()
        if self._engine is None:
            folder = next(place for place in self._places if place.is_dir())
            self._engine = VllmEngine(replace(self.start, path=str(folder)), self.profile, empty=True)
            self._engine.reload()
            self._check(self._engine, policy)
        else:
            self._engine.reload()
        _wait_for_all()
        if self._writes:
            for path in Path(self._engine.model.path).glob("*.safetensors"):
                path.unlink()

    def draw(self, requests: Sequence[Request]) -> Iterator[Completion | Failure]:
        assert self._engine is not None, "`update` comes first"
        return self._engine.generate(requests)

    def _check(self, engine: VllmEngine, policy: PreTrainedModel) -> None:
        """Raises StageFailed where vLLM computes with other weights than the policy's.

        It started without them, so that those which it does not renew show in every number. Once they are the policy's,
        what an update changes would not be seen.
        """
        request = Request("probe", [{"role": "user", "content": "What is it?"}], 0, Sampling(16, 0))
        (said,) = engine.generate([request])
        if isinstance(said, Failure):
            raise StageFailed(f"a response could not be drawn: {said.reason}")
        ids = torch.tensor([[*said.prompt_ids, *said.token_ids]], device=policy.device)
        logits = policy(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        behind = logits[len(said.prompt_ids) - 1 : -1].float().log_softmax(dim=-1)
        ours = behind.gather(-1, ids[0, len(said.prompt_ids) :, None])[:, 0].cpu()
        if not (gap := float((ours - torch.tensor(said.log_probs)).abs().mean())) <= _AGREE:  # nor if it is no number
            raise StageFailed(
                f"vLLM did not take over the weights of the policy, a {policy.config.model_type} model: its "
                f"log-probabilities are {gap:.2g} nats from the policy's, expected {_AGREE:g} or less; draw with "
                f"`engine: local`"
            )

    def _write(self, policy: PreTrainedModel, state: dict[str, Tensor]) -> None:
        """Writes a whole model's folder with these weights; the first time it also chooses the place."""
        try:
            if self._engine is None:
                self._remove()
                size = sum(each.nbytes for each in state.values())
                roomy = [place for place in self._places if shutil.disk_usage(place.parent).free > 1.1 * size]
                folder = (roomy or self._places)[0]
                folder.mkdir(mode=0o700)
                load_tokenizer(self.start).save_pretrained(folder)
            else:
                folder = Path(self._engine.model.path)
            policy.save_pretrained(folder, state_dict=state)
        except (OSError, SafetensorError) as error:
            places = " or ".join(str(place.parent) for place in self._places)
            raise StageFailed(f"the policy's weights could not be written for vLLM into {places}: {error}") from error

    def _remove(self) -> None:
        for place in self._places:
            shutil.rmtree(place, ignore_errors=True)


@torch.no_grad()
def merged_weights(policy: PreTrainedModel, gather: Gather) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of the policy and its buffers, an adapter's product added, by the names that it has without one.

    Each is whole until the next one is asked for. Under ZeRO-3 every rank has to go through all of them.
    """
    adapted = {}
    if is_peft_model(policy):
        policy = policy.get_base_model()
        adapted = {name: module for name, module in policy.named_modules() if isinstance(module, BaseTunerLayer)}
    own = {
        id(weight)
        for module in adapted.values()
        for name, weight in module.named_parameters()
        if not name.startswith("base_layer.")
    }
    for name, weight in policy.named_parameters():
        if id(weight) in own:
            continue
        layer, _, rest = name.partition(".base_layer.")
        module = adapted.get(layer) if rest == "weight" else None
        with gather([weight] if module is None else list(module.parameters())):
            yield (
                f"{layer}.{rest}" if rest else name,
                weight if module is None else weight + module.get_delta_weight("default"),
            )
    kept = policy.state_dict().keys()
    for name, buffer in policy.named_buffers():
        if name in kept:
            yield name.replace(".base_layer.", "."), buffer


def _wait_for_all() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
