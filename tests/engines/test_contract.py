"""The engines that need nothing from outside, held to the contract: `local`, and `server` against several servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_contract import CASES, Case, Reference, Subject
from small_server import Behaviour, Tiny, serving

from cai.contracts.model import Model
from cai.contracts.profile import Profile
from cai.engines import open_engine
from cai.models.reference import resolve

SERVERS = {
    "vllm": Behaviour(),
    "older vllm": Behaviour(listed_ids=False),
    "ids, nothing of vllm's own": Behaviour(strict=True),
    "messages alone": Behaviour(takes_ids=False),
    "hosted": Behaviour(takes_ids=False, strict=True, limit="max_completion_tokens"),
}


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Model]) -> Model:
    return tiny("llama")


@pytest.fixture(scope="module")
def reference(model: Model) -> Reference:
    return Reference(model)


@pytest.fixture(scope="module", params=["local", *SERVERS, "known by name alone"])
def subject(request: pytest.FixtureRequest, model: Model, reference: Reference) -> Iterator[Subject]:
    settings = {"device": "cpu", "dtype": "float32", "token_budget": 4096}
    if request.param == "local":
        with open_engine(model, Profile.model_validate(settings)) as engine:
            yield Subject(engine, reference)
        return
    behaviour = SERVERS.get(request.param, Behaviour(takes_ids=False))
    with serving(Tiny(model), behaviour) as server:
        if request.param == "known by name alone":
            model = resolve("served:tiny", folder=Path())  # its control tokens are sent as they are written
        settings |= {"engine": "server", "server": {"url": server.url, "names": {model.name: "tiny"}}}
        with open_engine(model, Profile.model_validate(settings)) as engine:
            yield Subject(engine, reference, sent=None if model.served else server.asked)


@pytest.mark.filterwarnings("ignore:server .* takes no token ids")
@pytest.mark.filterwarnings("ignore:the tokenizer of model 'served")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_engine_keeps_the_contract(subject: Subject, case: Case) -> None:
    case(subject)
