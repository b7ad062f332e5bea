"""One contract for all engines: in this process, vLLM in its own, `vllm serve` and `transformers serve`, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from contract import CASES, Case, Reference, Subject
from listening import Server

from cai.checkpoint import Model
from cai.engines import open_engine
from cai.profile import Profile


@pytest.fixture(scope="module", params=["local", "vllm", "vllm serve", "transformers serve"])
def subject(
    request: pytest.FixtureRequest, model: Model, python: Path, server: Callable[[str], Server], reference: Reference
) -> Iterator[Subject]:
    settings: dict[str, object] = {"device": "cpu", "dtype": "float32", "token_budget": 4096}
    if request.param == "vllm":
        extra = {"enforce_eager": True}  # compiling takes longer than all the tests
        settings |= {"engine": "vllm", "vllm": {"python": python, "cpu_cache_gib": 1, "extra": extra}}
    elif request.param != "local":
        at = server(request.param.split()[0])
        name = "micro" if request.param == "vllm serve" else model.path
        settings |= {"engine": "server", "server": {"url": at.url, "names": {model.name: name}}}
    with open_engine(model, Profile.model_validate(settings)) as engine:
        yield Subject(engine, reference)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_engine_keeps_the_contract(subject: Subject, case: Case) -> None:
    case(subject)
