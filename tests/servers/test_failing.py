"""What goes wrong with real servers, and with vLLM itself, loses nothing that was answered."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_contract import completions_by_id, conversation
from listening_server import Server
from peft import LoraConfig, get_peft_model

from cai.contracts.engine import Completion, Request, Sampling
from cai.contracts.model import Model
from cai.contracts.profile import Profile
from cai.engines import open_engine
from cai.engines.local.local_engine import LocalEngine
from cai.engines.vllm import VllmEngine
from cai.models.loading import load_causal_lm, load_tokenizer
from cai.models.reference import resolve
from cai.models.saving import save_model
from cai.storage.rows import Failure
from cai.text.errors import StageFailed


def requests(n: int, sampling: Sampling) -> list[Request]:
    return [Request(f"{i}", conversation(f"What are {i} apples?"), i, sampling) for i in range(n)]


@pytest.mark.filterwarnings("ignore:server .* takes no token ids")
@pytest.mark.parametrize("kind", ["vllm", "transformers"])
def test_a_killed_server_answers_each_request_once(kind: str, server: Callable[[str], Server], model: Model) -> None:
    running = server(kind)
    names = {model.name: "micro" if kind == "vllm" else model.path}
    settings = {"url": running.url, "names": names, "concurrency": 8, "retries": 20}
    profile = Profile.model_validate({"device": "cpu", "engine": "server", "server": settings})
    results: list[Completion | Failure] = []
    with open_engine(model, profile) as engine:
        for result in engine.generate(requests(40, Sampling(8, 0))):
            results.append(result)
            if len(results) == 5:
                running.kill()
                running.start()
    completions_by_id(results, requests(40, Sampling(8, 0)))


@pytest.fixture(scope="module")
def adapter(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A low-rank adapter that changes what the model says."""
    folder = tmp_path_factory.mktemp("models") / "adapter"
    torch.manual_seed(0)
    lm = get_peft_model(load_causal_lm(model), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, weight in lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    save_model(folder, lm, load_tokenizer(model), model, {})
    return resolve(str(folder), folder=folder)


def test_vllm_serves_an_adapter_as_if_merged_and_dies_without_loss(adapter: Model, model: Model, python: Path) -> None:
    extra = {"enforce_eager": True, "max_num_seqs": 4}
    settings = {"device": "cpu", "dtype": "float32", "vllm": {"python": python, "cpu_cache_gib": 1, "extra": extra}}
    profile = Profile.model_validate(settings)
    greedy = Sampling(16, 0)
    with VllmEngine(adapter, profile) as engine, LocalEngine(adapter, profile) as local:
        assert engine._first_line()["adapter"] == adapter.path
        with LocalEngine(model, profile) as base:
            texts = []
            for sampled_by in (engine, local, base):
                completions = completions_by_id(sampled_by.generate(requests(8, greedy)), requests(8, greedy))
                texts.append({id: completion.text for id, completion in completions.items()})
        assert texts[0] == texts[1] != texts[2]

        answers = engine.generate(requests(64, Sampling(64, 1.0)))
        results = [next(answers)]
        (worker,) = engine._workers
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(StageFailed, match=r"vLLM ended with signal 9 in the middle of its work.*; see .*\.log"):
            results.extend(answers)
    assert len({result.id for result in results}) == len(results) < 64
    worker.log.unlink()
