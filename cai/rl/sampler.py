"""The policy as an engine: a copy of its weights that only writes, brought up to date before each rollout.

The copy is whole on every rank, in the precision in which the device decodes fastest, with an adapter merged into it.
So a rank's decoding never waits for another's: under ZeRO-3 the weights are gathered once a rollout, one module at a
time, and not once a token. What it costs is the memory of one more copy in that precision, while it draws.

Left out: engines outside of this process, whose weights would have to be sent to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from cai.checkpoint import Model, load_causal_lm, whole
from cai.engines import Completion, Failure, Request
from cai.engines.local import LocalEngine
from cai.profile import Profile

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]]
"""Makes parameters whole while it is open, where they are spread over processes."""


class PolicySampler:
    """Draws responses from the latest weights that `update` was given."""

    def __init__(self, start: Model, profile: Profile) -> None:
        with whole():
            self.copy = load_causal_lm(start, profile.dtype, profile.device).requires_grad_(False)
        self.engine = LocalEngine(start, profile, self.copy)
        self._shapes = {name: each.shape for name, each in self.copy.named_parameters()}

    def release(self) -> None:
        """Gives the copy's memory to whoever learns; the next `update` takes it again."""
        for each in self.copy.parameters():
            each.data = each.data.new_empty(0)

    @torch.no_grad()
    def update(self, policy: PreTrainedModel, gather: Gather) -> None:
        """Takes the policy's weights, an adapter's product added. To be called on every rank."""
        targets = dict(self.copy.named_parameters())
        for name, target in targets.items():
            if target.shape != self._shapes[name]:
                target.data = target.data.new_empty(self._shapes[name])
        adapted = {}
        if is_peft_model(policy):
            policy = policy.get_base_model()
            adapted = {n: m for n, m in policy.named_modules() if isinstance(m, BaseTunerLayer)}
        for name, weight in policy.named_parameters():
            layer, _, rest = name.partition(".base_layer.")
            if (target := targets.get(f"{layer}.{rest}" if rest else name)) is None:
                continue  # an adapter's own
            module = adapted.get(layer) if rest == "weight" else None
            with gather([weight] if module is None else list(module.parameters())):
                target.copy_(weight if module is None else weight + module.get_delta_weight("default"))

    def draw(self, requests: Sequence[Request]) -> Iterator[Completion | Failure]:
        """A completion or a failure for each request, in no particular order."""
        return self.engine.generate(requests)
