"""Two real ranks that stay alive for all tests of a session and run training stages, with and without DeepSpeed.

Starting them takes longer than most jobs, so torch, TRL and DeepSpeed are imported once and the process group is made
once. A job is a training stage under one of the accelerate files in configs/accelerate; the environment that accelerate
would set for that file comes from its own launcher (`launcher_environment`).

As a script this module is one of the ranks: jobs come in on stdin, answers go out on stdout, a JSON object a line.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import gpu_paths

HERE = Path(__file__).parent
PATIENCE = 300.0
"""Seconds for one job; compiling an operation of DeepSpeed's may take a minute or more of them."""
ACCELERATE = HERE.parent.parent / "configs" / "accelerate"


class Pair:
    """Both ranks. Everything that they print goes into the file `log`."""

    def __init__(self, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = log
        self.ranks = [self._start(rank, port) for rank in range(2)]

    def _start(self, rank: int, port: int) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": os.pathsep.join(map(str, (gpu_paths.SITE, HERE, HERE.parent.parent))),
        }  # fmt: skip
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment,
                text=True,
            )  # fmt: skip

    def run(self, profile: str, **job: Any) -> list[dict[str, Any]]:
        """Each rank's answer to a job under configs/accelerate/<profile>.yaml: `figures`, or `error` and `message`."""
        job["environment"] = launcher_environment(profile)
        for rank in self.ranks:
            rank.stdin.write(json.dumps(job) + "\n")
            rank.stdin.flush()
        patience = threading.Timer(PATIENCE, self._kill)
        patience.start()
        answers = [rank.stdout.readline() for rank in self.ranks if rank.stdout is not None]
        patience.cancel()
        assert all(answers), f"a rank died or waited for the other for too long: {self.log.read_text()[-4000:]}"
        return [json.loads(answer) for answer in answers]

    def _kill(self) -> None:
        for rank in self.ranks:
            rank.kill()

    def stop(self) -> None:
        for rank in self.ranks:
            rank.communicate()  # a rank ends when its stdin does


@functools.cache
def launcher_environment(profile: str) -> dict[str, str]:
    """What `accelerate launch --config_file configs/accelerate/<profile>.yaml` adds to the environment of a rank."""
    import torch.distributed.run
    from accelerate.commands.launch import launch_command, launch_command_parser

    command = ["--config_file", str(ACCELERATE / f"{profile}.yaml"), "--num_processes", "2", "nothing.py"]
    before, started = dict(os.environ), torch.distributed.run.run
    added: dict[str, str] = {}
    torch.distributed.run.run = lambda _: added.update(os.environ)
    try:
        launch_command(launch_command_parser().parse_args(command))
    finally:
        torch.distributed.run.run = started
    return {name: value for name, value in added.items() if name.startswith("ACCELERATE_") and name not in before}


def main() -> None:
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print goes to the log
        for line in sys.stdin:
            answers.write(json.dumps(_answer(json.loads(line))) + "\n")
            answers.flush()


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    import traceback

    import torch.distributed
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from cai.text.errors import CaiError

    with mock.patch.dict(os.environ, job.pop("environment")):
        try:
            return {"figures": _train(**job)}
        except BaseException as error:
            if not isinstance(error, CaiError):
                traceback.print_exc()
            return {"error": type(error).__name__, "message": str(error)}
        finally:
            gc.collect()
            unset_hf_deepspeed_config()  # outside of tests a process runs one stage
            if torch.distributed.is_initialized():
                torch.distributed.barrier()


def _train(
    kind: str, folder: str, model: str, config: dict[str, Any], stop_at: int | None = None,
    named: dict[str, str] | None = None, **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """The stage's figures. `stop_at` is a step during which the stage is asked to stop; `settings` are a profile's.

    `named` are the paths of the models that a stage with rewards names.
    """
    import training_stages

    from cai.contracts.profile import Profile
    from cai.models.reference import resolve
    from cai.storage import stopping

    home = Path(folder)

    class Steps(training_stages.Steps):
        def advance(self, items: float = 1, tokens: int = 0) -> None:
            super().advance(items, tokens)
            if self.n_finished == stop_at:
                (home / stopping.STOP).touch()

    processes = int(os.environ["WORLD_SIZE"])
    defaults = {"device": "cpu", "dtype": "float32", "micro_batch": 4, "processes": processes,
                "gradient_checkpointing": gpu_paths.is_on()}  # fmt: skip
    profile = Profile.model_validate({**defaults, **settings})
    start = resolve(model, folder=home.parent)
    if kind in {"ppo", "rloo"}:
        models = {name: resolve(path, folder=home.parent) for name, path in (named or {}).items()}
        return reinforced(kind, home, start, profile, Steps(), {"named": models, **config})
    return training_stages.run_stage(kind, home, None, start, profile=profile, progress=Steps(), **config)


def reinforced(kind: str, home: Path, start: Any, profile: Any, progress: Any, config: dict[str, Any]) -> Any:
    """The figures of a stage that learns from its own responses, rewarded for being short; `tokens` by its progress."""
    import training_stages

    (home.parent / "rewards.py").write_text(training_stages.BREVITY)
    prompts, rewards = [training_stages.prompt_row(n) for n in range(12)], [{"function": "rewards.py:brevity"}]
    config = {"profile": profile, "progress": progress, **config}
    figures = training_stages.reinforce(kind, home, prompts, start, rewards, **config)
    return {**figures, "tokens": progress.tokens}


if __name__ == "__main__":
    main()
