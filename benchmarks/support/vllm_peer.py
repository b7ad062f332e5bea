"""How many tokens a second vLLM's CPU build generates with the embedded model: the peer of generate.py.

    python benchmarks/support/vllm_peer.py --python .venv-servers/bin/python --json

128 prompts of the embedded world, 4 samples each, up to 64 new tokens, temperature 1, at most 128 sequences at once, in
bfloat16: by `LLM.generate` in process, and by `vllm serve` on loopback. The fastest of five passes after a warm-up
counts; the faster of the two is the peer. Settings are the fastest of those that were tried: compiled, without seeds of
requests, log-probabilities and detokenised texts, all of which `cai` needs. The attention heads are padded to a width
that vLLM has kernels for (padded_heads.py). `make .venv-servers/.installed` makes the environment. This file runs its
parts that need vLLM under that interpreter.
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
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
}  # fmt: skip
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""Scheduler and model in one process, which takes a third less time on two cores."""

Figures = dict[str, Any]


def write_spec(folder: Path, prompts: int) -> Path:
    """Writes the model, and a file with the prompts' ids that the other interpreter reads; returns the file."""
    import torch

    from benchmarks.support.padded_heads import write_with_padded_heads
    from cai.models.chat import Chat
    from cai.models.reference import resolve
    from cai.prompt_sets import PromptSet, read_prompt_set

    rows = read_prompt_set(PromptSet.model_validate({"source": "micro", "limit": prompts}), folder).prompts
    chat = Chat.load(resolve("micro", folder=folder))
    spec = {
        "model": str(write_with_padded_heads(folder / "model", dtype=torch.bfloat16)),
        "prompts": [chat.prompt_ids(row["messages"]) for row in rows],
        "end_ids": sorted(chat.end_ids),
    }
    path = folder / "spec.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


def measure_in_process(spec: Figures) -> Figures:
    """`LLM.generate`. Runs under vLLM's interpreter."""
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
        results = model.generate(prompts, sampling, use_tqdm=False)
        return sum(len(output.token_ids) for result in results for output in result.outputs)

    return fastest_pass(once, os.getpid())


def measure_server(spec: Figures) -> Figures:
    """`vllm serve`. Runs under vLLM's interpreter, whose environment has an HTTP client that needs little CPU time."""
    import aiohttp

    async def complete_all() -> int:
        running = asyncio.Semaphore(AT_ONCE)

        async def complete(session: aiohttp.ClientSession, ids: list[int]) -> int:
            body = {"model": "micro", "prompt": ids, "max_tokens": NEW_TOKENS, "temperature": 1.0}
            async with running, session.post(f"{spec['url']}/v1/completions", json=body) as answer:
                answer.raise_for_status()
                return int((await answer.json())["usage"]["completion_tokens"])

        connector = aiohttp.TCPConnector(limit=AT_ONCE)
        async with aiohttp.ClientSession(connector=connector) as session:
            completions = [complete(session, ids) for ids in spec["prompts"] for _ in range(SAMPLES)]
            return sum(await asyncio.gather(*completions))

    return fastest_pass(lambda: asyncio.run(complete_all()), spec["pid"])


def fastest_pass(once: Callable[[], int], pid: int) -> Figures:
    """The fastest of several calls of `once`, which returns tokens; CPU seconds are those of `pid` and its children."""
    once()
    passes = []
    for _ in range(PASSES):
        start, cpu_start = time.perf_counter(), _cpu_seconds(pid)
        tokens = once()
        seconds = time.perf_counter() - start
        passes.append({
            "tokens_per_second": round(tokens / seconds, 1), "tokens": tokens, "seconds": round(seconds, 3),
            "cpu_seconds": round(_cpu_seconds(pid) - cpu_start, 3),
        })  # fmt: skip
    return {**max(passes, key=lambda figures: figures["tokens_per_second"]), "passes": passes}


def _cpu_seconds(pid: int) -> float:
    import psutil

    parent = psutil.Process(pid)
    times = [process.cpu_times() for process in [parent, *parent.children(recursive=True)]]
    return sum(float(cpu_times.user + cpu_times.system) for cpu_times in times)


@contextlib.contextmanager
def serving(python: Path, model: str, log: Path) -> Iterator[tuple[str, int]]:
    """(address, process id) of a `vllm serve` that is ready; the server ends with the block."""
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


def run_role(python: Path, role: str, spec: Figures, folder: Path) -> Figures:
    """Runs a role of this file, `in_process` or `server`, under the other interpreter."""
    spec_file, figures_file = folder / f"{role}.json", folder / f"{role}-figures.json"
    log = folder / f"{role}.log"
    spec_file.write_text(json.dumps(spec), encoding="utf-8")
    with log.open("wb") as output:
        command = [str(python), __file__, "--role", role, str(spec_file), str(figures_file)]
        completed = subprocess.run(command, stdout=output, stderr=output, env=os.environ | OFFLINE | ONE_PROCESS)
    if completed.returncode:
        sys.exit(log.read_text(errors="replace")[-3000:])
    figures: Figures = json.loads(figures_file.read_text(encoding="utf-8"))
    return figures


def measure(python: Path, prompts: int, ways: list[str]) -> Figures:
    """Figures of each of the `ways`, and the settings and the speed of the fastest."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec: Figures = json.loads(write_spec(folder, prompts).read_text(encoding="utf-8"))
        figures_by_way: dict[str, Figures] = {}
        if "in_process" in ways:
            figures_by_way["in_process"] = run_role(python, "in_process", spec, folder)
        if "server" in ways:
            with serving(python, spec["model"], folder / "serve.log") as (url, pid):
                figures_by_way["server"] = run_role(python, "server", spec | {"url": url, "pid": pid}, folder)
    fastest = max(figures_by_way, key=lambda way: float(figures_by_way[way]["tokens_per_second"]))
    command = [str(python), "-c", "import importlib.metadata as m; print(m.version('vllm'))"]
    version = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {
        "tokens_per_second": figures_by_way[fastest]["tokens_per_second"],
        "settings": {
            "vllm": version, "way": fastest, "dtype": "bfloat16", "prompts": prompts, "samples": SAMPLES,
            "new_tokens": NEW_TOKENS, "at_once": AT_ONCE, "temperature": 1.0, "head_dim": 64,
        },
        "ways": figures_by_way,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", type=Path, default=Path(".venv-servers/bin/python"), help="interpreter with vLLM")
    parser.add_argument("--ways", nargs="+", choices=("in_process", "server"), default=["in_process", "server"])
    parser.add_argument("--quick", action="store_true", help="16 prompts")
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    parser.add_argument("--role", nargs=3, metavar=("ROLE", "SPEC", "FIGURES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        role, spec_file, figures_file = options.role
        spec = json.loads(Path(spec_file).read_text(encoding="utf-8"))
        figures = measure_in_process(spec) if role == "in_process" else measure_server(spec)
        Path(figures_file).write_text(json.dumps(figures), encoding="utf-8")
        return
    figures = measure(options.python.absolute(), 16 if options.quick else PROMPTS, options.ways)
    if not options.json:
        for way, of_way in figures["ways"].items():
            print(f"{way:12} {of_way['tokens_per_second']:8.0f} tokens/s, {of_way['cpu_seconds']:.1f} s of CPU")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
