"""Engines: conversations in; text, token ids and log-probabilities out.

An engine turns messages into token ids once, with `cai.models.chat`, and returns the ids with every completion, so that
a trainer never decodes and encodes again. Requests carry messages rather than ids because a hosted server takes nothing
else. Results come in any order, with the id of their request; a request without an answer is a `Failure`, never an
exception and never a score.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cai.contracts.model import Model
    from cai.contracts.profile import Profile

from cai.contracts.engine import Engine


def open_engine(model: Model, profile: Profile) -> Engine:
    """The engine that `profile` names, for `model`; the server for a model that is known by its name there alone."""
    if model.served or profile.engine == "server":
        from cai.engines.server import ServerEngine

        return ServerEngine(model, profile.server)
    if profile.engine == "vllm":
        from cai.engines.vllm import VllmEngine

        return VllmEngine(model, profile)
    from cai.engines.local.local_engine import LocalEngine

    return LocalEngine(model, profile)
