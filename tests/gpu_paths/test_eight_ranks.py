"""Eight ranks on two stand-in nodes under ZeRO-3, with batches and examples for fewer than eight."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_paths
import pytest
from tiny_models import Tiny

from cai.document.shipped import shipped_folder
from cai.storage import run_folder
from cai.storage.rows import read_rows
from cai.training.metrics import read_metrics

pytest.importorskip("deepspeed")

RECIPE = """
name: eight
model: {model}
prompts:
  few: {{source: prompts.jsonl}}
stages:
  - {{id: responses, kind: sample, prompts: few, max_new_tokens: 6, journal_batch: 2}}
  - {{id: preferences, kind: prefer, pairs: {{source: pairs.jsonl}}}}
  - {{id: policy, kind: dpo, from: preferences, batch_size: 8,
     train: {{max_steps: 2, learning_rate: 1.0e-3, warmup_steps: 0}}}}
"""
PROFILE = """
device: cpu
dtype: bfloat16
gradient_checkpointing: true
nodes: 2
processes: 8
threads: 1
micro_batch: 2
address: 127.0.0.1
accelerate: {configs}/accelerate/cpu-2-ranks-zero3.yaml
launcher: [bash, {configs}/multi-node/on-each.sh, hosts.txt]
"""
SSH = '#!/bin/bash\n[ "$4" = second ] && exec bash -c "$5"\n'
"""Stands for ssh -tt -o BatchMode=yes HOST COMMAND: the second node is this machine."""
N_PROMPTS, N_PAIRS = 5, 6


def test_fewer_batches_and_examples_than_ranks_are_all_computed(tiny: Tiny, tmp_path: Path) -> None:
    questions = [{"prompt": f"What is {number}?"} for number in range(N_PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    talks = [f"\n\nHuman: What is {number}?\n\nAssistant: It is {number * 7} " for number in range(N_PAIRS)]
    pairs = [{side: f"{talk}{side}." for side in ("chosen", "rejected")} for talk in talks]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny("llama").path))
    (tmp_path / "nodes.yaml").write_text(PROFILE.format(configs=shipped_folder("configs")))
    (tmp_path / "hosts.txt").write_text("first\nsecond\n")
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(SSH)
    ssh.chmod(0o755)
    command = [sys.executable, "-m", "cai", "run", "recipe.yaml", "--runs", "runs", "--on", "nodes.yaml"]
    code_path = os.pathsep.join([str(gpu_paths.SITE), str(Path(__file__).parent.parent.parent)])
    environment = {**os.environ, "PATH": f"{ssh.parent}:{os.environ['PATH']}", "PYTHONPATH": code_path}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    folders = run_folder.latest(tmp_path / "runs" / "eight")
    records = read_rows(folders["responses"] / "records.jsonl")
    assert len({row["prompt_id"] for row in records}) == len(records) == N_PROMPTS
    metrics = read_metrics(folders["policy"])
    assert [entry["step"] for entry in metrics if "loss" in entry] == [1, 2]
    assert metrics[0]["loss"] == pytest.approx(0.693, abs=0.01), "the reference is the policy before its first step"
    assert metrics[1]["loss"] < metrics[0]["loss"]
