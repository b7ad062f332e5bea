"""The engine `vllm` with a stand-in for its worker; `make test-servers` runs the real one."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_contract import completions_by_id, conversation
from peft import LoraConfig, get_peft_model
from tiny_models import Tiny

from cai.contracts.engine import Choice, Completion, Question, Request, Sampling
from cai.contracts.profile import Profile, load_profile
from cai.engines import open_engine, vllm
from cai.engines.vllm import VllmEngine
from cai.models.loading import load_causal_lm, load_tokenizer
from cai.models.reference import resolve
from cai.models.saving import save_model
from cai.storage.rows import Failure
from cai.text.errors import BadInput, StageFailed

Open = Callable[..., VllmEngine]
STAND_IN = Path(__file__).parents[1] / "support" / "stand_in_worker.py"


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where workers of this test leave their logs."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def opened(tiny: Tiny, logs: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    monkeypatch.setattr(vllm, "WORKER", STAND_IN)

    def open_(fault: str = "", family: str = "llama", **options: object) -> VllmEngine:
        monkeypatch.setenv("STAND_IN", fault)
        settings = {"engine": "vllm", "device": "cpu", "dtype": "float32"}
        settings |= {"vllm": {"python": sys.executable, **options}}
        engine = open_engine(tiny(family), Profile.model_validate(settings))
        assert isinstance(engine, VllmEngine)
        return engine

    return open_


def requests(n: int, **sampling: object) -> list[Request]:
    settings = Sampling(max_new_tokens=4, **sampling)  # type: ignore[arg-type]
    return [Request(f"{i}", conversation(f"Say {i}"), i, settings) for i in range(n)]


def questions(n: int) -> list[Question]:
    return [Question(f"{i}", conversation(f"Say {i}")) for i in range(n)]


@pytest.mark.parametrize("workers", [1, 3])
def test_each_request_is_answered_once_whatever_else_a_worker_says(opened: Open, workers: int) -> None:
    with opened("answers twice", data_parallel=workers) as engine:
        completions = completions_by_id(engine.generate(requests(10)), requests(10))
        choices = list(engine.choose(questions(10)))
    assert sorted(choice.id for choice in choices) == [f"{n}" for n in range(10)]
    for completion in completions.values():
        assert completion.token_ids == completion.prompt_ids[:4]
        assert completion.log_probs == [math.log(0.25)] * 4
    for choice in choices:
        assert choice.log_probs == (math.log(0.25),) * 2
        assert choice.option_probability == pytest.approx(0.5)


def test_a_caller_that_stops_reading_takes_no_answers_from_the_next(opened: Open) -> None:
    with opened() as engine:
        next(engine.generate(requests(5)))
        answers = list(engine.choose(questions(3)))
    assert all(isinstance(answer, Choice) for answer in answers)
    assert sorted(answer.id for answer in answers) == ["0", "1", "2"]


def test_nothing_is_started_where_nothing_is_asked(opened: Open, logs: Path) -> None:
    with opened("never starts") as engine:
        assert list(engine.generate([])) == []
        assert list(engine.choose([])) == []
        assert not list(logs.glob("cai-vllm-*"))


@pytest.mark.parametrize(("fault", "words"), [
    ("never starts", "exit code 1 before its model was loaded; its last words: the last words of vLLM"),
    ("has an error", "before its model was loaded: ValueError: no such architecture"),
    ("dies", "signal 9 in the middle of its work"),
    ("half a line", "signal 9 in the middle of its work"),
])  # fmt: skip
def test_a_worker_that_fails_is_reported_with_its_log(opened: Open, logs: Path, fault: str, words: str) -> None:
    results: list[Completion | Failure] = []
    with pytest.raises(StageFailed) as caught, opened(fault) as engine:
        results.extend(engine.generate(requests(5)))
    assert words in str(caught.value)
    (log,) = logs.glob("cai-vllm-*.log")
    assert str(caught.value).endswith(f"see {log}")
    assert "no answer" in log.read_text()
    assert len(results) == (2 if "middle" in words else 0)


def test_an_interpreter_without_vllm_or_none_at_all_is_bad_input(opened: Open) -> None:
    has_none = "has no vLLM: give the interpreter of an environment that has it as `--vllm-python`"
    with pytest.raises(BadInput, match=has_none), opened("has no vllm") as engine:
        list(engine.generate(requests(1)))
    with pytest.raises(BadInput, match="does not start: No such file"), opened(python="/nowhere/python") as engine:
        list(engine.generate(requests(1)))


def test_vllm_on_another_device_than_the_profile_says_is_bad_input(opened: Open) -> None:
    words = r"says `device: cpu`, but the vLLM of .* runs on cuda"
    with pytest.raises(BadInput, match=words), opened("on a GPU") as engine:
        list(engine.generate(requests(1)))


@pytest.mark.parametrize(
    ("fault", "words"), [("refuses", "vLLM refused it: it is too odd"), ("aborts", "vLLM ended it as abort")]
)
def test_what_vllm_does_not_answer_is_a_failure_beside_the_answers(opened: Open, fault: str, words: str) -> None:
    with opened(fault) as engine:
        results = list(engine.generate(requests(3)))
    assert [result.reason for result in results if isinstance(result, Failure)] == [words]
    assert sum(isinstance(result, Completion) for result in results) == 2


@pytest.mark.parametrize(
    ("options", "sampling", "words"),
    [({}, {"temperature": 0.001}, "0.01"), ({"max_model_len": 6}, {}, "takes 6 in all")],
    ids=["vLLM would change the temperature", "the profile shortens the context"],
)
def test_what_vllm_would_answer_otherwise_is_a_failure(opened: Open, options, sampling, words: str) -> None:
    with opened(**options) as engine:
        (failure,) = engine.generate(requests(1, **sampling))
    assert words in failure.reason


def test_a_worker_ends_with_its_engine_and_log(opened: Open, logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "_GRACE_SECONDS", 0.2)
    with opened("stays") as engine:
        list(engine.generate(requests(1)))
        pids = [worker._process.pid for worker in engine._workers]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not list(logs.glob("cai-vllm-*"))


def test_the_worker_itself_ends_when_its_parent_is_gone(tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text("import time\ntime.sleep(600)\n")  # as if it were loading
    environment = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(vllm.WORKER)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)
    worker.stdin.write(b'{"arguments": {}, "adapter": null}\n')
    worker.stdin.flush()
    time.sleep(0.5)
    assert worker.poll() is None
    worker.stdin.close()  # what the system does when a parent is killed
    assert worker.wait(60) == -9


def test_each_worker_gets_its_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = Profile.model_validate({"device": "cuda", "vllm": {"tensor_parallel": 2, "data_parallel": 2}})

    def devices() -> list[str]:
        return [environment["CUDA_VISIBLE_DEVICES"] for environment in vllm._environments(profile)]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices() == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert devices() == ["4,5", "6,7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    with pytest.raises(BadInput, match=r"wants 4 GPUs .* names 4,5,6"):
        devices()


@pytest.mark.parametrize(("visible", "device"), [(None, "2"), ("4,5,6", "6")])
def test_each_rank_has_a_worker_on_its_gpu(visible: str | None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "6", "LOCAL_RANK": "2", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1",
              "TORCHELASTIC_USE_AGENT_STORE": "True", "ACCELERATE_USE_DEEPSPEED": "true"}  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (environment,) = vllm._environments(Profile.model_validate({"device": "cuda", "engine": "vllm"}))
    assert environment["CUDA_VISIBLE_DEVICES"] == device
    assert not variables.keys() & environment.keys()


def test_vllm_takes_sequences_as_long_as_requests_need_and_starts_again_for_longer_ones(opened: Open) -> None:
    def long_request(n_tokens: int) -> Request:
        return Request("long", conversation("Say it"), 0, Sampling(max_new_tokens=n_tokens))

    with opened() as engine:
        limits, processes = [], []
        for request in (*requests(2), long_request(2000), long_request(2100), long_request(10), long_request(4000)):
            (completion,) = engine.generate([request])
            assert isinstance(completion, Completion)
            limits.append(engine._first_line()["arguments"]["max_model_len"])
            processes.append(engine._workers[0]._process.pid)
        assert limits == [2048, 2048, 2048, 4096, 4096, 4096], "powers of two, and at most the model's own 4096"
        assert [processes.index(process) for process in processes] == [0, 0, 0, 3, 3, 3]
    with opened(max_model_len=300) as engine:
        list(engine.choose(questions(2)))
        assert engine._first_line()["arguments"]["max_model_len"] == 300


def test_an_adapter_is_served_on_its_base_and_a_stacked_one_merged(opened: Open, tiny: Tiny, tmp_path: Path) -> None:
    adapter = tiny("lora")
    with opened(family="lora") as engine:
        first_line = engine._first_line()
        assert first_line["adapter"] == adapter.path
        assert first_line["arguments"]["enable_lora"] is True
        assert Path(first_line["arguments"]["model"]) != Path(adapter.path)
    lm = get_peft_model(load_causal_lm(adapter), LoraConfig(r=4, target_modules=["q_proj"]))
    save_model(tmp_path / "stacked", lm, load_tokenizer(adapter), adapter, {})
    stacked = resolve(str(tmp_path / "stacked"), folder=tmp_path)
    profile = Profile.model_validate({"engine": "vllm", "device": "cpu", "dtype": "float32"})
    with VllmEngine(stacked, profile) as engine:
        first_line = engine._first_line()
        assert first_line["adapter"] is None
        merged = Path(first_line["arguments"]["model"])
        weights = load_causal_lm(resolve(str(merged), folder=tmp_path)).state_dict()
        expected = load_causal_lm(stacked).state_dict()
        assert all(expected[name].equal(weight) for name, weight in weights.items())
    assert not merged.exists()


def test_arguments_that_are_not_the_profiles_to_change_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("engine: vllm\nvllm: {extra: {trust_remote_code: true}}\n")
    with pytest.raises(BadInput, match=r"mine.yaml:2:\d+: .*'trust_remote_code', which `cai` sets itself"):
        load_profile(str(path))
    path.write_text("engine: vllm\nvllm: {python: nowhere/python}\n")
    with pytest.raises(BadInput, match=r"mine.yaml:2:\d+: .*no such file: .*nowhere/python"):
        load_profile(str(path))
