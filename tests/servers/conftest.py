"""Real servers and vLLM itself, from the environment that `make test-servers` makes, on the embedded model."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from _wider_heads import widened
from contract import Reference

from cai.checkpoint import Model, resolve

BIN = Path(__file__).parents[2] / ".venv-servers" / "bin"
READY = 300.0
"""Seconds in which a server has to be ready."""


@dataclass
class Server:
    """A program that listens on a port of the loopback, and can be killed and started again."""

    command: list[str]
    log: Path
    port: int
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Returns at once; `wait` returns when it is ready."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command, "--host", "127.0.0.1", "--port", str(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"} | self.environment,
                start_new_session=True,
            )

    def wait(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + READY
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health"):
                return
            time.sleep(0.2)
        pytest.fail(f"{self.command[0]} is not ready:\n{self.log.read_text(errors='replace')[-3000:]}")

    def kill(self) -> None:
        """Ends it and all its children, without a word."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="session")
def python() -> Path:
    """The interpreter with vLLM."""
    return BIN / "python"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The embedded model in float32, its heads as wide as vLLM's CPU kernels take them."""
    folder = widened(tmp_path_factory.mktemp("models") / "micro", dtype=torch.float32)
    return resolve(str(folder), folder=folder)


@pytest.fixture(scope="session")
def reference(model: Model) -> Reference:
    return Reference(model)


@pytest.fixture(scope="session")
def server(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    """`server("vllm")` or `server("transformers")` is one that is ready, the same for all who ask."""
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
        for one in started.values():
            one.kill()


def _server(kind: str, model: str, home: Path) -> Server:
    if kind == "vllm":
        command = [
            str(BIN / "vllm"), "serve", model, "--served-model-name", "micro", "--dtype", "float32", "--enforce-eager",
            "--load-format", "safetensors", "--max-num-seqs", "128",
        ]  # fmt: skip
        environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1"}
    else:
        command = [str(BIN / "transformers"), "serve", model, "--device", "cpu", "--dtype", "float32"]
        environment = {"HF_HUB_CACHE": str(home)}  # without this folder its list of models is an error
    return Server(command, home / f"{kind}.log", _free_port(), environment)
