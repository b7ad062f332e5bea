"""Measures how many tokens a second a model generates: the local engine against transformers' `model.generate`.

    python benchmarks/generate.py            128 prompts, 4 samples of each, up to 64 new tokens
    python benchmarks/generate.py --quick    8 prompts, up to 16 new tokens
    python benchmarks/generate.py --device cuda --model random-1b
    python benchmarks/generate.py --processes 2    ours in two processes, which share the cores as with `fork: true`
    python benchmarks/generate.py --peer ENVIRONMENT/bin/python    also vLLM, in an environment that has it

Settings are equal: temperature 1, the whole distribution, the same end-of-turn tokens. Tokenising and decoding count in
both. Each side may use bfloat16 or float32, ours several token budgets, plain several batch sizes, and plain uses
`num_return_sequences`; the fastest settings of each side count. Tokens are counted up to the end of each response.
Plain and ours take turns; the peer is measured after them, in processes of its own.

Both sides must generate the same: greedy responses are compared in float32, id by id, and a chi-square test compares
the first tokens of 10,000 samples of one prompt with the exact distribution. The last line is one JSON object; `ours`
and `plain` are tokens a second.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
import torch

from benchmarks.plain import Lm, Text, generate_texts, rendered
from benchmarks.support import language_models, measurement
from cai.contracts.engine import Completion, Request, Sampling
from cai.contracts.model import Model
from cai.engines.local.local_engine import LocalEngine
from cai.micro.conversations import prompts
from cai.storage.rows import Message, stable_seed

BATCHES = {"cpu": (16, 32, 64, 128, 256, 512), "cuda": (128, 256, 512)}
"""Rows in one batch of plain; all sizes are tried, in the precision that is faster with `BATCH`."""
BATCH = 64
DTYPES = ("bfloat16", "float32")
BUDGETS: dict[str, tuple[int | None, ...]] = {"cpu": (None, 65_536), "cuda": (None,)}
"""Token budgets of ours; all are tried, in the precision that is faster with the first. None is the profile's."""
SAMPLES = 10_000
"""First tokens in the chi-square test."""
PEER = Path(__file__).parent / "support" / "vllm_peer.py"
MIN_EXPECTED = 5.0
"""Least expected count of a cell of the chi-square test; smaller cells are merged."""


class Sizes(NamedTuple):
    """How much is generated."""

    prompts: int
    samples: int
    max_new_tokens: int


def generate_ours(
    engine: LocalEngine, conversations: Sequence[Sequence[Message]], n: int, sampling: Sampling,
    numbers: Sequence[int] | None = None,
) -> list[Completion]:  # fmt: skip
    """`n` completions of each conversation, in order. Seeds depend on `numbers`, by default 0, 1, ..."""
    requests = [
        Request(f"{number}/{sample}", messages, stable_seed(number, sample), sampling)
        for number, messages in zip(numbers or range(len(conversations)), conversations, strict=True)
        for sample in range(n)
    ]
    completions_by_id = {completion.id: completion for completion in engine.generate(requests)}
    completions = [completions_by_id[request.id] for request in requests]
    assert all(isinstance(completion, Completion) for completion in completions), "a prompt does not fit"
    return completions  # type: ignore[return-value]


class Workers:
    """Processes that have the model and generate a share of the responses each."""

    def __init__(self, connections: Sequence[Connection]) -> None:
        self.connections = connections

    def generate(
        self, dtype: str, budget: int | None, conversations: Sequence[Sequence[Message]], n: int, sampling: Sampling
    ) -> list[Completion]:
        """`n` completions of each conversation, ordered by process."""
        for rank, connection in enumerate(self.connections):
            numbers = range(rank, len(conversations), len(self.connections))
            share = [conversations[number] for number in numbers]
            connection.send(((dtype, budget), share, n, sampling, list(numbers)))
        return [completion for connection in self.connections for completion in connection.recv()]


@contextlib.contextmanager
def workers(model: Model, device: str, processes: int) -> Iterator[Workers]:
    """That many processes, which share the cores and end with the block."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    pipes = [context.Pipe() for _ in range(processes)]
    settings = (model, device, threads)
    worker_processes = [context.Process(target=_run_worker, args=(pipe[1], *settings), daemon=True) for pipe in pipes]
    for process in worker_processes:
        process.start()
    for _, theirs in pipes:
        theirs.close()  # so that the death of the process is an end of file here
    try:
        yield Workers([ours for ours, _ in pipes])
    finally:
        for process in worker_processes:
            process.terminate()
            process.join()


def _run_worker(connection: Connection, model: Model, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    engine = functools.cache(functools.partial(language_models.engine_of, model, device))
    while True:
        settings, *arguments = connection.recv()
        connection.send(generate_ours(engine(*settings), *arguments))


def generate_plain(
    lm: Lm, conversations: Sequence[Sequence[Message]], n: int, sampling: Sampling, batch: int
) -> list[Text]:
    """The same by `model.generate`."""
    settings = {"max_new_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, "top_p": 1.0}
    return generate_texts(lm, conversations, settings, n=n, batch=batch)


def count_equal_greedy(engine: LocalEngine, conversations: Sequence[Sequence[Message]], max_new_tokens: int) -> int:
    """Number of conversations to which ours and plain generate the same ids at temperature 0."""
    sampling = Sampling(max_new_tokens, temperature=0)
    completions = generate_ours(engine, conversations, 1, sampling)
    texts = generate_plain(language_models.plain_of(engine), conversations, 1, sampling, batch=32)
    return sum(completion.token_ids == text.ids for completion, text in zip(completions, texts, strict=True))


def compare_first_tokens(engine: LocalEngine, messages: Sequence[Message]) -> dict[str, Any]:
    """Pearson's chi-square test of first tokens against the model's softmax, without the pad token in either."""
    completions = generate_ours(engine, [messages], SAMPLES, Sampling(max_new_tokens=1))
    lm = language_models.plain_of(engine)
    with torch.inference_mode():
        ids = torch.tensor(rendered(lm, [messages]), device=lm.model.device)
        logits = lm.model(ids).logits[0, -1].double()
        logits[lm.tokenizer.pad_token_id] = -torch.inf
    expected = SAMPLES * logits.softmax(dim=-1).cpu().numpy()
    counts = Counter(completion.token_ids[0] for completion in completions)
    observed = np.array([counts[token] for token in range(len(expected))], dtype=float)
    observed_cells, expected_cells = merge_cells(observed, expected)
    statistic, p = scipy.stats.chisquare(observed_cells, expected_cells)
    return {"draws": SAMPLES, "cells": len(expected_cells), "chi_square": round(float(statistic), 3), "p": float(p)}


def merge_cells(observed: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cells by falling expected count, the last of them merged so that each has `MIN_EXPECTED` at least."""
    order = np.argsort(-expected, kind="stable")
    observed, expected = observed[order], expected[order]
    tail = np.cumsum(expected[::-1])[::-1]  # expected in this cell and all later ones
    n_unmerged = int(np.sum((expected >= MIN_EXPECTED) & (np.append(tail[1:], 0) >= MIN_EXPECTED)))
    starts = np.arange(n_unmerged + 1)
    return np.add.reduceat(observed, starts), np.add.reduceat(expected, starts)


def measure(
    model: Model, device: str, sizes: Sizes, repeats: int, clock: measurement.Clock, python: str | None,
    worker_processes: Workers | None,
) -> dict[str, Any]:  # fmt: skip
    """The object of the last line. `python` is the interpreter of vLLM's environment, if that is measured."""
    conversations = [prompt["messages"] for prompt in prompts("train", limit=sizes.prompts)]
    n, sampling = sizes.samples, Sampling(sizes.max_new_tokens)
    engine = functools.cache(functools.partial(language_models.engine_of, model, device))
    lms = {dtype: language_models.plain_of(engine(dtype, None)) for dtype in DTYPES}
    torch.manual_seed(0)

    def run_ours(dtype: str, budget: int | None = None) -> list[Completion]:
        if worker_processes is not None:
            return worker_processes.generate(dtype, budget, conversations, n, sampling)
        return generate_ours(engine(dtype, budget), conversations, n, sampling)

    def run_plain(dtype: str, batch: int) -> list[Text]:
        return generate_plain(lms[dtype], conversations, n, sampling, batch)

    batches = [size for size in BATCHES[device] if size <= sizes.prompts * n] or [sizes.prompts * n]
    dtype = clock.fastest(DTYPES, run_ours)
    run_ours(dtype, BUDGETS[device][-1])  # loads the model
    budget = clock.fastest(BUDGETS[device], functools.partial(run_ours, dtype))
    plain_dtype = clock.fastest(DTYPES, functools.partial(run_plain, batch=BATCH))
    batch = clock.fastest(batches, functools.partial(run_plain, plain_dtype))
    sides = {"ours": lambda: run_ours(dtype, budget), "plain": lambda: run_plain(plain_dtype, batch)}
    runs = clock.best(sides, repeats)
    n_tokens = {
        "ours": sum(len(completion.token_ids) for completion in runs["ours"].returned),
        "plain": sum(len(text.ids) for text in runs["plain"].returned),
    }
    speed = {name: n_tokens[name] / run.seconds for name, run in runs.items()}
    peer: dict[str, Any] = {"measured": False}
    if python:
        peer = {"measured": True, **measurement.run_for_json([sys.executable, PEER, "--python", python, "--json"])}
        speed_by_way = {way: of_way["tokens_per_second"] for way, of_way in peer["ways"].items()}
        peer["ratios"] = {way: round(speed["ours"] / of_peer, 2) for way, of_peer in speed_by_way.items()}
    equal = count_equal_greedy(engine("float32", None), conversations, sizes.max_new_tokens)
    return measurement.result(
        "generate", speed["ours"], speed["plain"], "tokens/s", sizes._asdict(), ("torch", "transformers"),
        tokens=n_tokens,
        peer=peer,
        greedy={"equal": equal, "of": len(conversations), "dtype": "float32"},
        first_token=compare_first_tokens(engine("float32", None), conversations[0]),
        processes={"ours": 1 if worker_processes is None else len(worker_processes.connections), "plain": 1},
        clock=clock.name, repeats=repeats, dtype={"ours": dtype, "plain": plain_dtype}, batch={"plain": batch},
        token_budget=budget or engine(dtype, None).profile.token_budget,
        model=model.name, device=device,
    )  # fmt: skip


def main() -> None:
    parser = measurement.argument_parser(__doc__)
    parser.add_argument("--repeats", type=int, help="runs of each side, of which the fastest counts; 3, 1 with --quick")
    parser.add_argument("--peer", metavar="PYTHON", help="interpreter of an environment with vLLM, to measure it too")
    parser.add_argument("--processes", type=int, default=1, help="processes of ours; plain has one. Default 1")
    language_models.add_options(parser)
    arguments = parser.parse_args()
    clock = measurement.clock_of(parser, arguments)
    if arguments.peer and not (PEER.is_file() and Path(arguments.peer).is_file()):
        parser.error(f"--peer: found not both of the interpreter {arguments.peer} and the script {PEER}")
    if arguments.processes > 1 and (arguments.cpu_seconds or arguments.device != "cpu"):
        combination = f"found {arguments.processes} with another device or clock than the CPU's and the wall's"
        parser.error(f"--processes: {combination}")
    sizes = Sizes(8, 2, 16) if arguments.quick else Sizes(128, 4, 64)
    repeats = arguments.repeats or (1 if arguments.quick else 3)
    with tempfile.TemporaryDirectory() as folder:
        model = language_models.model_of(arguments.model, Path(folder))
        processes = arguments.processes
        with workers(model, arguments.device, processes) if processes > 1 else contextlib.nullcontext() as started:
            figures = measure(model, arguments.device, sizes, repeats, clock, arguments.peer, started)
    for name in ("ours", "plain"):
        print(f"{name:6} {figures[name]:8,.0f} tokens/s, {figures['tokens'][name]:,} tokens")
    if figures["peer"]["measured"]:
        for way, of_way in figures["peer"]["ways"].items():
            speed = f"vLLM   {of_way['tokens_per_second']:8,.0f} tokens/s, {way.replace('_', ' ')}"
            print(f"{speed}; ours is {figures['peer']['ratios'][way]:.2f} times as fast")
    else:
        print("vLLM was not measured: --peer does")
    print(f"{figures['ratio']:.2f} times plain")
    print(
        f"greedy ids equal for {figures['greedy']['equal']} of {figures['greedy']['of']} prompts; first tokens: "
        f"p = {figures['first_token']['p']:.3f}"
    )
    print(json.dumps(figures | {"model": arguments.model}))


if __name__ == "__main__":
    main()
