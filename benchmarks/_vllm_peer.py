"""What vLLM's CPU build reaches with the embedded model, to measure ours against.

    python benchmarks/_vllm_peer.py --python .venv-servers/bin/python --json

128 prompts of the embedded world, 4 samples each, up to 64 new tokens, temperature 1, at most 128 at once, in bfloat16:
by vLLM in process (`LLM.generate`), and by `vllm serve` on loopback. The best of five passes after one that warms up
counts, and of the two ways the faster is the peer. Settings are those that were fastest of what was tried: compiled, no
seeds of single requests, no log-probabilities, texts left as ids, all of which `cai` cannot do without. The model's
heads are padded to a width that vLLM has kernels for (`_wider_heads`). `make .venv-servers/.installed` makes the
environment. The parts that need vLLM are run by this file under that interpreter.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PROMPTS, SAMPLES, NEW_TOKENS, AT_ONCE, PASSES = 128, 4, 64, 128, 5
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
}
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""Scheduling and model in one process: in process, a third less time of two cores."""

Figures = dict[str, Any]


def inputs(folder: Path, prompts: int) -> Path:
    """The model and the ids of the prompts, in a file in `folder` that the other interpreter reads."""
    import torch
    from _wider_heads import widened

    from cai.models.chat import Chat
    from cai.models.reference import resolve
    from cai.prompt_sets.prompt_files import PromptSet, read_prompt_set

    rows = read_prompt_set(PromptSet.model_validate({"source": "micro", "limit": prompts}), folder).prompts
    chat = Chat.load(resolve("micro", folder=folder))
    spec = {
        "model": str(widened(folder / "model", dtype=torch.bfloat16)),
        "prompts": [chat.prompt_ids(row["messages"]) for row in rows],
        "end_ids": sorted(chat.end_ids),
    }
    path = folder / "spec.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


def in_process(spec: Figures) -> Figures:
    """Runs under vLLM's interpreter."""
    from vllm import LLM, SamplingParams

    model = LLM(
        spec["model"], dtype="bfloat16", load_format="safetensors", max_num_seqs=AT_ONCE, generation_config="vllm",
        disable_log_stats=True,
    )  # fmt: skip
    sampling = SamplingParams(
        n=SAMPLES, temperature=1.0, max_tokens=NEW_TOKENS, stop_token_ids=spec["end_ids"], detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in spec["prompts"]]

    def once() -> int:
        done = model.generate(prompts, sampling, use_tqdm=False)
        return sum(len(output.token_ids) for one in done for output in one.outputs)

    return best(once, os.getpid())


def at_server(spec: Figures) -> Figures:
    """Runs under vLLM's interpreter, whose environment has an HTTP client that asks for little of the two cores."""
    import aiohttp

    async def all_of_them() -> int:
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(session: aiohttp.ClientSession, ids: list[int]) -> int:
            body = {"model": "micro", "prompt": ids, "max_tokens": NEW_TOKENS, "temperature": 1.0}
            async with gate, session.post(f"{spec['url']}/v1/completions", json=body) as answer:
                answer.raise_for_status()
                return int((await answer.json())["usage"]["completion_tokens"])

        connector = aiohttp.TCPConnector(limit=AT_ONCE)
        async with aiohttp.ClientSession(connector=connector) as session:
            return sum(await asyncio.gather(*[one(session, ids) for ids in spec["prompts"] for _ in range(SAMPLES)]))

    return best(lambda: asyncio.run(all_of_them()), spec["pid"])


def best(once: Callable[[], int], pid: int) -> Figures:
    """The fastest of several passes of `once`, which returns tokens; CPU seconds are of `pid` and its children."""
    once()
    passes = []
    for _ in range(PASSES):
        began, used = time.perf_counter(), _cpu_seconds(pid)
        tokens = once()
        seconds = time.perf_counter() - began
        passes.append(
            {
                "tokens_per_second": round(tokens / seconds, 1),
                "tokens": tokens,
                "seconds": round(seconds, 3),
                "cpu_seconds": round(_cpu_seconds(pid) - used, 3),
            }
        )
    return {**max(passes, key=lambda one: one["tokens_per_second"]), "passes": passes}


def _cpu_seconds(pid: int) -> float:
    import psutil

    parent = psutil.Process(pid)
    times = [process.cpu_times() for process in [parent, *parent.children(recursive=True)]]
    return sum(float(one.user + one.system) for one in times)


@contextlib.contextmanager
def serving(python: Path, model: str, log: Path) -> Iterator[tuple[str, int]]:
    """(address, process id) of a `vllm serve` that is ready; it ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(python.with_name("vllm")), "serve", model, "--served-model-name", "micro", "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "bfloat16", "--load-format", "safetensors", "--max-num-seqs", str(AT_ONCE),
        "--generation-config", "vllm", "--disable-log-stats", "--disable-uvicorn-access-log",
    ]  # fmt: skip
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | OFFLINE)
    try:
        url = f"http://127.0.0.1:{port}"
        while True:
            if server.poll() is not None:
                raise SystemExit(f"vllm serve ended; see {log}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health"):
                break
            time.sleep(0.5)
        yield url, server.pid
    finally:
        server.terminate()
        server.wait()


def run(python: Path, role: str, spec: Figures, folder: Path) -> Figures:
    """A role of this file under the other interpreter."""
    given, found, log = folder / f"{role}.json", folder / f"{role}-figures.json", folder / f"{role}.log"
    given.write_text(json.dumps(spec), encoding="utf-8")
    with log.open("wb") as output:
        command = [str(python), __file__, "--role", role, str(given), str(found)]
        done = subprocess.run(command, stdout=output, stderr=output, env=os.environ | OFFLINE | ONE_PROCESS)
    if done.returncode:
        sys.exit(log.read_text(errors="replace")[-3000:])
    figures: Figures = json.loads(found.read_text(encoding="utf-8"))
    return figures


def measure(python: Path, prompts: int, ways: list[str]) -> Figures:
    """The faster of `ways`, and the figures of each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec: Figures = json.loads(inputs(folder, prompts).read_text(encoding="utf-8"))
        found: dict[str, Figures] = {}
        if "in_process" in ways:
            found["in_process"] = run(python, "in_process", spec, folder)
        if "server" in ways:
            with serving(python, spec["model"], folder / "serve.log") as (url, pid):
                found["server"] = run(python, "server", spec | {"url": url, "pid": pid}, folder)
    way = max(found, key=lambda one: float(found[one]["tokens_per_second"]))
    version = subprocess.run(
        [str(python), "-c", "import importlib.metadata as m; print(m.version('vllm'))"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "tokens_per_second": found[way]["tokens_per_second"],
        "settings": {
            "vllm": version, "way": way, "dtype": "bfloat16", "prompts": prompts, "samples": SAMPLES,
            "new_tokens": NEW_TOKENS, "at_once": AT_ONCE, "temperature": 1.0, "head_dim": 64,
        },
        "ways": found,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", type=Path, default=Path(".venv-servers/bin/python"), help="interpreter with vLLM")
    parser.add_argument("--ways", nargs="+", choices=("in_process", "server"), default=["in_process", "server"])
    parser.add_argument("--quick", action="store_true", help="16 prompts")
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    parser.add_argument("--role", nargs=3, metavar=("ROLE", "GIVEN", "FOUND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        role, given, found = options.role
        spec = json.loads(Path(given).read_text(encoding="utf-8"))
        figures = in_process(spec) if role == "in_process" else at_server(spec)
        Path(found).write_text(json.dumps(figures), encoding="utf-8")
        return
    figures = measure(options.python.absolute(), 16 if options.quick else PROMPTS, options.ways)
    if not options.json:
        for way, one in figures["ways"].items():
            print(f"{way:12} {one['tokens_per_second']:8.0f} tokens/s, {one['cpu_seconds']:.1f} s of CPU")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
