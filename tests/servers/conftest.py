"""Real servers and vLLM itself, from the environment that `make test-servers` makes, on the embedded model."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from engine_contract import Reference
from listening_server import Server

from benchmarks.support.padded_heads import write_with_padded_heads
from cai.contracts.model import Model
from cai.models.reference import resolve

# Several threads cost more than they save on a model of this size.
torch.set_num_threads(1)
os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

BIN = Path(__file__).parents[2] / ".venv-servers" / "bin"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def python() -> Path:
    """The interpreter with vLLM."""
    return BIN / "python"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The embedded model in float32, its heads as wide as vLLM's CPU kernels take them."""
    folder = write_with_padded_heads(tmp_path_factory.mktemp("models") / "micro", dtype=torch.float32)
    return resolve(str(folder), folder=folder)


@pytest.fixture(scope="session")
def reference(model: Model) -> Reference:
    return Reference(model)


@pytest.fixture(scope="session")
def server(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    """`server("vllm")` or `server("transformers")` is a server that is ready, the same for all tests."""
    home = tmp_path_factory.mktemp("servers")
    started: dict[str, Server] = {}

    def get(kind: str) -> Server:
        if kind not in started:
            started[kind] = _server(kind, model.path, home)
            started[kind].start()
            started[kind].wait()
        return started[kind]

    try:
        yield get
    finally:
        for process in started.values():
            process.kill()


def _server(kind: str, model: str, home: Path) -> Server:
    if kind == "vllm":
        command = [
            str(BIN / "vllm"), "serve", model, "--served-model-name", "micro", "--dtype", "float32", "--enforce-eager",
            "--load-format", "safetensors", "--max-num-seqs", "128",
        ]  # fmt: skip
        environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1"}
    else:
        command = [str(BIN / "transformers"), "serve", model, "--device", "cpu", "--dtype", "float32"]
        environment = {"HF_HUB_CACHE": str(home)}  # without this folder listing the models fails
    return Server(command, home / f"{kind}.log", _free_port(), environment)
