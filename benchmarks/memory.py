"""Holds what `cai plan` says that training takes against what it takes: the most memory of a process, run by run.

    python benchmarks/memory.py                 every stage, in full and with an adapter, three sizes, 1 and 2 processes
    python benchmarks/memory.py --quick         sft of the embedded model
    python benchmarks/memory.py --only dpo --model random-135m --processes 2

Each run trains two steps on random words in processes of its own, whose peaks the stage records (`memory.json`). Ours
is the planned peak, plain the measured one; `ratio` is the one furthest from 1. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.support import language_models, measurement

KINDS = ("sft", "reward", "dpo", "ppo")
MODELS = ("micro", "random-135m", "random-350m")
MICRO_BATCH = {"sft": 8, "reward": 4, "dpo": 4, "ppo": 8}
WORDS = ("the", "a", "of", "to", "be", "kind", "help", "with", "question", "answer", "because", "people", "plan")
LENGTH = 128
"""Words of a response, a token or a little more each."""
REWARD = "def shortness(prompts, responses):\n    return [-len(response) / 100 for response in responses]\n"


def main() -> None:
    """Runs all combinations that the options leave, and prints the planned and measured peak of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=KINDS, action="append")
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--adapter", choices=["no", "yes"], action="append")
    parser.add_argument("--processes", type=int, choices=[1, 2], action="append")
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return train(json.loads(options.work))
    if options.quick:
        grid = [("sft", "micro", "no", 1)]
    else:
        grid = list(
            itertools.product(
                options.only or KINDS,
                options.model or MODELS,
                options.adapter or ["no", "yes"],
                options.processes or [1, 2],
            )
        )
    runs = [measure(*combination, options.micro_batch) for combination in grid]
    worst = max(runs, key=lambda run: abs(run["planned"] - run["measured"]) / run["measured"])
    outside = [run for run in runs if not is_close(run)]
    print(f"{len(runs) - len(outside)} of {len(runs)} within 15 % or 200 MB")
    packages = ("torch", "transformers", "trl", "peft")
    figures = {"runs": runs, "within_bounds": len(runs) - len(outside)}
    sizes = {"runs": len(runs), "words": LENGTH}
    print(
        json.dumps(
            measurement.result("memory", worst["planned"], worst["measured"], "bytes", sizes, packages, **figures)
        )
    )


def is_close(run: Mapping[str, Any]) -> bool:
    """Whether the plan is within 15 % or 200 MB of what was measured."""
    gap = abs(run["planned"] - run["measured"])
    return bool(gap <= 0.15 * run["measured"] or gap <= 200e6)


def measure(kind: str, model: str, adapter: str, processes: int, micro_batch: int | None) -> dict[str, Any]:
    """One run's planned and measured peak, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        work = {
            "folder": folder, "kind": kind, "model": language_models.model_of(model, Path(folder)).path,
            "adapter": adapter == "yes", "processes": processes, "micro_batch": micro_batch or MICRO_BATCH[kind],
        }  # fmt: skip
        start(work)
        record = json.loads((Path(folder) / "stage" / "memory.json").read_text(encoding="utf-8"))
    run = {
        "kind": kind, "model": model, "adapter": adapter, "processes": processes, "longest": record["longest"],
        "micro_batch": record["micro_batch"], "planned": record["planned_peak"], "measured": record["measured_peak"],
        "parts": record["planned"],
    }  # fmt: skip
    ratio = run["planned"] / run["measured"]
    sizes = f"planned {run['planned'] / 1e6:7,.0f} MB, measured {run['measured'] / 1e6:7,.0f} MB"
    print(f"{kind:6} {model:11} adapter {adapter:3} {processes} process: {sizes}, ratio {ratio:.2f}", flush=True)
    return run


def start(work: Mapping[str, Any]) -> None:
    """Trains in processes of their own, which meet over loopback where there are two."""
    write_inputs(work)
    command = [sys.executable, str(Path(__file__).resolve()), "--work", json.dumps(work)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    n = work["processes"]
    shared = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)] if n > 1 else [{}]
    logs = [Path(work["folder"]) / f"log-{rank}.txt" for rank in range(n)]
    children = []
    for rank, log in zip(ranks, logs, strict=True):
        with log.open("wb") as file:
            children.append(subprocess.Popen(command, env={**environment, **rank}, stdout=file, stderr=file))
    for child, log in zip(children, logs, strict=True):
        if child.wait():
            raise SystemExit(log.read_text(encoding="utf-8"))


def write_inputs(work: Mapping[str, Any]) -> None:
    """Rows of random words, as the stages that are read would have left them."""
    from cai.storage.rows import row_lines

    folder, rng = Path(work["folder"]), random.Random(0)
    (folder / "rows").mkdir()
    (folder / "stage").mkdir()
    (folder / "rewards.py").write_text(REWARD, encoding="utf-8")
    n_rows = 2 * batch_size(work) + 8

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=LENGTH))

    rows: list[Any] = []
    for number in range(n_rows):
        common = {"id": f"{number:016x}", "prompt_id": f"{number:08x}", "tags": [],
                  "prompt": [{"role": "user", "content": f"What is {number}?"}]}  # fmt: skip
        if work["kind"] == "sft":
            rows.append({**common, "response": text(), "finish_reason": "stop", "n_tokens": 0, "model": "", "seed": 0})
        else:
            sides = {side: [{"role": "assistant", "content": text()}] for side in ("chosen", "rejected")}
            rows.append({**common, **sides, "pair_id": "", "p_chosen": 0.9, "log_odds": 2.0, "source": "ai"})
    (folder / "rows" / "records.jsonl").write_text("".join(row_lines(rows)), encoding="utf-8")


def batch_size(work: Mapping[str, Any]) -> int:
    """Two micro-batches in each process, so that gradients are accumulated."""
    return 2 * int(work["micro_batch"]) * int(work["processes"])


def train(work: Mapping[str, Any]) -> None:
    """The stage in this process, called as a run calls it."""
    from cai.contracts.context import Context
    from cai.contracts.profile import load_profile
    from cai.contracts.references import failures_read
    from cai.engines import open_engine
    from cai.models.reference import resolve
    from cai.stages import config_class, run_function
    from cai.storage.journal import Journal
    from cai.text.progress import StageLine

    folder, kind = Path(work["folder"]), work["kind"]
    profile = load_profile("cpu").model_copy(
        update={"micro_batch": work["micro_batch"], "processes": work["processes"], "threads": 1}
    )
    settings: dict[str, Any] = {"id": "stage", "kind": kind, "batch_size": batch_size(work)}
    if work["adapter"]:
        settings["lora"] = {"rank": 16}
    if kind == "ppo":
        settings |= {"prompts": "prompts", "rewards": [{"function": "rewards.py:shortness"}], "max_new_tokens": LENGTH,
                     "rollouts": 1, "rollout_size": 2 * batch_size(work)}  # fmt: skip
    else:
        settings |= {"from": ["rows"]}
    config = config_class(kind).model_validate(settings)
    prompts: list[Any] = [
        {"id": f"p{n}", "messages": [{"role": "user", "content": f"What is {n}?"}], "tags": [], "source": ""}
        for n in range(64)
    ]
    context = Context(
        stage_id="stage", folder=folder / "stage", seed=0, profile=profile, progress=StageLine("stage"),
        journal=Journal(folder / "stage"), constitution=None, inputs={"rows": folder / "rows"},
        prompt_sets={"prompts": prompts}, models={"": resolve(work["model"], folder=folder)},
        open_engine=open_engine, home=folder, failures_read=failures_read(config),
    )  # fmt: skip
    run_function(kind)(config, context)


if __name__ == "__main__":
    main()
