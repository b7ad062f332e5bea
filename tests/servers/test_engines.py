"""One contract for all engines: in this process, vLLM in its own, `vllm serve` and `transformers serve`, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import engine_contract
import pytest
from engine_contract import CASES, Case, Reference, Subject
from listening_server import Server

from cai.contracts.engine import Question
from cai.contracts.model import Model
from cai.contracts.profile import Profile
from cai.engines import open_engine
from cai.text.errors import BadInput


@pytest.fixture(scope="module", params=["local", "vllm", "vllm serve", "transformers serve"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def subject(
    kind: str, model: Model, python: Path, server: Callable[[str], Server], reference: Reference
) -> Iterator[Subject]:
    settings: dict[str, object] = {"device": "cpu", "dtype": "float32", "token_budget": 4096}
    if kind == "vllm":
        extra = {"enforce_eager": True}  # compiling takes longer than all the tests
        settings |= {"engine": "vllm", "vllm": {"python": python, "cpu_cache_gib": 1, "extra": extra}}
    elif kind != "local":
        running = server(kind.split()[0])
        name = "micro" if kind == "vllm serve" else model.path
        settings |= {"engine": "server", "server": {"url": running.url, "names": {model.name: name}}}
    with open_engine(model, Profile.model_validate(settings)) as engine:
        yield Subject(engine, reference)


def options_are_refused_in_one_sentence(subject: Subject) -> None:
    with pytest.raises(BadInput, match="gives no log-probabilities for model"):
        list(subject.engine.choose([Question("x", [{"role": "user", "content": "Hi"}])]))


REPLACEMENTS: dict[Case, Case] = {
    engine_contract.options_have_the_log_probabilities_of_a_plain_forward_pass: options_are_refused_in_one_sentence
}
"""Cases of `transformers serve`, which lacks the ability that the original case tests."""
EXPECTED_FAILURES: dict[Case, str] = {
    engine_contract.a_seed_alone_decides_a_text: "it seeds one generator that all requests under way draw from",
    engine_contract.what_cannot_be_answered_is_a_failure_beside_the_answers: (
        "it answers prompts that are longer than the model's context"
    ),
}
"""Cases that its own behaviour breaks in a way that the engine cannot notice."""


@pytest.mark.filterwarnings("ignore:server .* takes no token ids")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_engine_keeps_the_contract(request: pytest.FixtureRequest, subject: Subject, case: Case, kind: str) -> None:
    if kind == "transformers serve":
        if reason := EXPECTED_FAILURES.get(case):
            request.applymarker(pytest.mark.xfail(reason=reason, raises=AssertionError, strict=True))
        case = REPLACEMENTS.get(case, case)
    case(subject)
