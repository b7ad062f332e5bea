"""A program that serves on the loopback interface, such as `vllm serve`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import pytest

READY_SECONDS = 300.0
"""How long a server may take to be ready."""


@dataclass
class Server:
    """A server on a port of the loopback interface, which can be killed and started again."""

    command: list[str]
    log: Path
    port: int
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Starts it; `wait` returns when it is ready."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command, "--host", "127.0.0.1", "--port", str(self.port)],
                env=os.environ | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"} | self.environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def wait(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health"):
                return
            time.sleep(0.2)
        pytest.fail(f"{self.command[0]} is not ready:\n{self.log.read_text(errors='replace')[-3000:]}")

    def kill(self) -> None:
        """Kills it and all its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
