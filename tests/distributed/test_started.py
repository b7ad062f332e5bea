"""Training in processes that `cai run` starts: on two nodes, ended from outside, or ended by one that dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import Tiny

from cai.contracts.profile import load_profile
from cai.document.shipped import shipped_folder
from cai.run import launch
from cai.run.pipeline import run_recipe
from cai.run.plan import Options
from cai.run.recipe import load_recipe
from cai.storage import run_folder
from cai.storage.files import read_json, write_json
from cai.text.progress import PlainDisplay

pytest.importorskip("deepspeed")

ZERO = "cpu-2-ranks-zero2"
RECIPE = """
name: ended
model: {model}
stages:
  - {{id: preferences, kind: prefer, pairs: {{source: pairs.jsonl}}}}
  - {{id: policy, kind: dpo, from: preferences, batch_size: 8,
     train: {{max_steps: 40, learning_rate: 1.0e-3, save_steps: 100}}}}
"""
DISTURBANCE = """
import os, sys
forks = any("multiprocessing.forkserver" in word for word in sys.orig_argv)
if "DISTURBED_RANK" in os.environ and ("RANK" in os.environ or forks):
    import time
    from cai.training.loop import StageCallback
    on_step_end = StageCallback.on_step_end
    def disturbed(self, args, state, control, **options):
        if state.global_step == 2 and os.environ["RANK"] == os.environ["DISTURBED_RANK"]:
            exec(os.environ["DISTURBANCE"])
        return on_step_end(self, args, state, control, **options)
    StageCallback.on_step_end = disturbed
"""
"""A module that Python imports at its start: executes code from the environment at the second step of one rank."""


@pytest.fixture
def recipe(tmp_path: Path, tiny: Tiny) -> Path:
    talks = [f"\n\nHuman: What is {number}?\n\nAssistant: It is {number * 7} " for number in range(24)]
    pairs = [{side: f"{talk}{side}." for side in ("chosen", "rejected")} for talk in talks]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny("llama").path))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(DISTURBANCE)
    return tmp_path / "recipe.yaml"


def command(recipe: Path, profile: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("cai")), "run", str(recipe), "--runs", str(recipe.parent), "--on", profile],
        env={**os.environ, "PYTHONPATH": str(recipe.parent / "site"), **environment},
        cwd=recipe.parent, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip


def metrics(recipe: Path, folder: str = "ended") -> list[dict[str, Any]]:
    """What is logged so far, without an incomplete last line."""
    files = list(recipe.parent.glob(f"{folder}/policy-*/metrics.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().split("\n")[:-1]]


def until(condition: Callable[[], object], child: subprocess.Popen[str]) -> None:
    """Waits until a condition is true while the child runs."""
    while not condition():
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.02)


def processes(recipe: Path) -> list[str]:
    """Command lines of processes that still work on the recipe's run, or were started beside it, after a moment."""
    end = time.monotonic() + 5  # the process that forks ends when it sees that `cai run` has
    while True:
        command_lines = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                arguments = (path / "cmdline").read_bytes().decode().split("\0")
                names_folder = any(word.startswith(str(recipe.parent)) for word in arguments)
                if names_folder or (path / "cwd").readlink() == recipe.parent:
                    command_lines.append(" ".join(arguments))
        if not command_lines or time.monotonic() > end:
            return command_lines
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("profile", "send"), [("cpu", os.kill), (ZERO, os.kill), ("cpu-2-cores", os.kill), ("cpu-2-cores", os.killpg)]
)
def test_sigterm_ends_training_at_a_resume_point_and_the_next_run_continues_as_if_undisturbed(
    profile: str, send: Callable[[int, int], None], recipe: Path
) -> None:
    child = command(recipe, profile)
    until(lambda: len(metrics(recipe)) >= 2, child)
    send(child.pid, signal.SIGTERM)
    stderr = child.communicate(timeout=600)[1]
    assert child.returncode == 143, stderr
    assert stderr.endswith("Interrupted. What was finished is kept; the same command goes on from there.\n")
    [folder] = recipe.parent.glob("ended/policy-*")
    # On a machine that is busy there is one for the time that has passed, too.
    step = max(int(point.parent.name.rpartition("-")[2]) for point in folder.glob("checkpoints/*/COMPLETE"))
    assert f"policy: stopped at step {step}; a resume point has what was learned" in stderr
    assert 2 <= step == len(metrics(recipe)) < 40
    assert not (folder / "stop").exists()
    assert not processes(recipe)
    second_run = command(recipe, profile)
    stderr = second_run.communicate(timeout=600)[1]
    assert second_run.returncode == 0, stderr
    assert f"resuming from checkpoint-{step}" in stderr
    alone = load_profile("cpu").model_copy(update={"dtype": "float32"}) if profile == ZERO else load_profile(profile)
    run_recipe(load_recipe(recipe), alone, recipe.parent / "undisturbed", Options(), PlainDisplay())
    assert len(metrics(recipe)) == 40
    for mine, theirs in zip(metrics(recipe), metrics(recipe, "undisturbed"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    if profile != ZERO:
        resumed, undisturbed = (run_folder.latest(recipe.parent / name)["policy"] for name in ("ended", "undisturbed"))
        assert read_json(resumed / "DONE")["digest"] == read_json(undisturbed / "DONE")["digest"]
        assert (resumed / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()


def test_another_sigterm_ends_it_at_once(recipe: Path) -> None:
    hangs = recipe.parent / "hangs"
    waiting = f"open({str(hangs)!r}, 'w'); time.sleep(1000)"
    child = command(recipe, "cpu-2-ranks", DISTURBED_RANK="0", DISTURBANCE=waiting)
    until(hangs.exists, child)
    child.send_signal(signal.SIGTERM)
    until(lambda: list(recipe.parent.glob("ended/policy-*/stop")), child)
    child.send_signal(signal.SIGTERM)
    stderr = child.communicate(timeout=60)[1]
    assert child.returncode == 143, stderr
    assert not list(recipe.parent.glob("ended/policy-*/checkpoints/checkpoint-*"))
    assert not processes(recipe)


@pytest.mark.parametrize("profile", [ZERO, "cpu-2-cores"])
@pytest.mark.parametrize(("disturbance", "message"), [
    ("os.kill(os.getpid(), 9)", "stage 'policy', process 1, ended with signal 9; see "),
    ("raise ValueError('the disk is full')", "stage 'policy', process 1: ValueError: the disk is full; see "),
])  # fmt: skip
def test_a_dying_rank_ends_them_all_with_its_error(disturbance: str, message: str, profile: str, recipe: Path) -> None:
    child = command(recipe, profile, DISTURBED_RANK="1", DISTURBANCE=disturbance)
    until(lambda: metrics(recipe), child)
    stderr = child.communicate(timeout=60)[1]  # seconds, of which it needs few
    assert child.returncode == 3, stderr
    assert stderr.splitlines()[-1].startswith(message), stderr
    assert not processes(recipe)


TWO_NODES = """
device: cpu
dtype: float32
nodes: 2
processes: 2
threads: 1
address: 127.0.0.1
accelerate: {configs}/accelerate/cpu-2-ranks-zero2.yaml
launcher: [bash, {configs}/multi-node/on-each.sh, hosts.txt]
"""


def test_two_nodes_learn_what_one_process_does(recipe: Path) -> None:
    home = recipe.parent
    (home / "nodes.yaml").write_text(TWO_NODES.format(configs=shipped_folder("configs")))
    (home / "hosts.txt").write_text("first\nsecond\n")
    ssh = home / "site" / "ssh"
    ssh.write_text('#!/bin/bash\n[ "$4" = second ] && exec bash -c "$5"\n')  # ssh -tt -o BatchMode=yes HOST COMMAND
    ssh.chmod(0o755)
    child = command(recipe, str(home / "nodes.yaml"), PATH=f"{ssh.parent}:{os.environ['PATH']}")
    stderr = child.communicate(timeout=600)[1]
    assert child.returncode == 0, stderr
    alone = load_profile("cpu").model_copy(update={"dtype": "float32"})
    run_recipe(load_recipe(recipe), alone, home / "undisturbed", Options(), PlainDisplay())
    assert len(metrics(recipe)) == 40
    for mine, theirs in zip(metrics(recipe), metrics(recipe, "undisturbed"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


def test_the_killed_process_is_named_and_not_the_one_that_lost_its_connection(tmp_path: Path) -> None:
    write_json(tmp_path / "error-0.json", {"time": 1.0, "message": "Connection reset by peer", "kind": "StageFailed"})
    (tmp_path / "log.txt").write_text("")
    killed = launch._first_error(tmp_path, "policy", [3, -9], kernel_killed=False)
    assert str(killed).startswith("stage 'policy', process 1, ended with sig")
    ended = launch._first_error(tmp_path, "policy", [3, -15], kernel_killed=False)
    assert str(ended) == "Connection reset by peer"
