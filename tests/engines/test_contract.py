"""The engine contract, kept by the engines `local` and, against several small servers, `server`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models
from engine_contract import CASES, Case, Reference, Subject
from small_server import Behaviour, ServedModel, serving
from tiny_models import Tiny

from cai.contracts.profile import Profile
from cai.engines import open_engine
from cai.models.reference import resolve

SERVERS = {
    "vllm": Behaviour(),
    "older vllm": Behaviour(takes_option_ids=False),
    "ids, nothing of vllm's own": Behaviour(takes_extensions=False),
    "messages alone": Behaviour(takes_ids=False),
    "hosted": Behaviour(takes_ids=False, takes_extensions=False, limit_field="max_completion_tokens"),
}


FAMILIES = [name for name, family in tiny_models.FAMILIES.items() if family.template] + ["lora", "base"]


@pytest.fixture(scope="module", params=[*(f"local {name}" for name in FAMILIES), *SERVERS, "known by name alone"])
def subject(request: pytest.FixtureRequest, tiny: Tiny) -> Iterator[Subject]:
    settings = {"device": "cpu", "dtype": "float32", "token_budget": 1024}
    if request.param.startswith("local"):
        family = request.param.split()[1]
        model = tiny(family, **({"chat_template": tiny_models.PLAIN} if family == "base" else {}))
        with open_engine(model, Profile.model_validate(settings)) as engine:
            yield Subject(engine, Reference(model))
        return
    model = tiny("llama")
    reference = Reference(model)
    behaviour = SERVERS.get(request.param, Behaviour(takes_ids=False))
    with serving(ServedModel(model), behaviour) as server:
        if request.param == "known by name alone":
            model = resolve("served:tiny", folder=Path())  # its special tokens are sent as they are written
        settings |= {"engine": "server", "server": {"url": server.url, "names": {model.name: "tiny"}}}
        with open_engine(model, Profile.model_validate(settings)) as engine:
            yield Subject(engine, reference, sent=None if model.served else server.requests)


@pytest.mark.filterwarnings("ignore:server .* takes no token ids")
@pytest.mark.filterwarnings("ignore:the tokenizer of model 'served")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_engine_keeps_the_contract(subject: Subject, case: Case) -> None:
    case(subject)
