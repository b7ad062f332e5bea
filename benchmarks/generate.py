"""How many tokens a second a model writes: the local engine against transformers' `model.generate`.

    python benchmarks/generate.py            128 prompts, 4 samples of each, up to 64 new tokens
    python benchmarks/generate.py --quick    8 prompts, up to 16 new tokens
    python benchmarks/generate.py --device cuda --model random-1b
    python benchmarks/generate.py --processes 2    ours in two with a share of the cores each, as `fork: true` runs them
    python benchmarks/generate.py --peer ENVIRONMENT/bin/python    also vLLM, in an environment that has it

Settings are equal: temperature 1, the whole distribution, the same tokens that end a turn; tokenising and decoding
count in both. Each may use bfloat16 or float32, and plain several batch sizes, `num_return_sequences` as it should;
the fastest of each counts. Counted are the tokens drawn up to the end of each text. Plain and ours take turns; the peer
is measured after them, in processes of its own.

Speed is worth nothing if something else is written: greedy texts of both are compared in float32, id by id, and the
first tokens of 10,000 samples of one prompt are held against the exact distribution by a chi-square test. The last line
is one JSON object; `ours` and `plain` are tokens a second.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import _measure
import _models
import numpy as np
import scipy.stats
import torch
from plain import Lm, Text, rendered, write

from cai.contracts.engine import Completion, Request, Sampling
from cai.contracts.model import Model
from cai.engines.local.local_engine import LocalEngine
from cai.micro.conversations import prompts
from cai.storage.rows import Message, stable_seed

BATCHES = {"cpu": (16, 32, 64, 128, 256, 512), "cuda": (128, 256, 512)}
"""Rows that plain tries, in the precision that is faster with `BATCH`."""
BATCH = 64
DTYPES = ("bfloat16", "float32")
BUDGETS: dict[str, tuple[int | None, ...]] = {"cpu": (None, 65_536), "cuda": (None,)}
"""Tokens at once that ours tries, in the precision that is faster with the first; None = the profile's."""
DRAWS = 10_000
PEER = Path(__file__).with_name("_vllm_peer.py")
LEAST = 5.0
"""Expected count of a cell of the chi-square test; smaller ones are put together."""


class Sizes(NamedTuple):
    """How much is written."""

    prompts: int
    samples: int
    max_new_tokens: int


def ours(
    engine: LocalEngine,
    conversations: Sequence[Sequence[Message]],
    n: int,
    sampling: Sampling,
    numbers: Sequence[int] | None = None,
) -> list[Completion]:
    """`n` completions of each conversation, in order. `numbers` are the conversations' own; absent = from 0."""
    requests = [
        Request(f"{number}/{sample}", messages, stable_seed(number, sample), sampling)
        for number, messages in zip(numbers or range(len(conversations)), conversations, strict=True)
        for sample in range(n)
    ]
    found = {each.id: each for each in engine.generate(requests)}
    completions = [found[request.id] for request in requests]
    assert all(isinstance(each, Completion) for each in completions), "a prompt does not fit"
    return completions  # type: ignore[return-value]


class Workers:
    """Processes that hold the model and write a share of the responses each."""

    def __init__(self, ends: Sequence[Connection]) -> None:
        self.ends = ends

    def ours(
        self, dtype: str, budget: int | None, conversations: Sequence[Sequence[Message]], n: int, sampling: Sampling
    ) -> list[Completion]:
        """`n` completions of each conversation, one process's after the other's."""
        for rank, end in enumerate(self.ends):
            numbers = range(rank, len(conversations), len(self.ends))
            end.send(((dtype, budget), [conversations[number] for number in numbers], n, sampling, list(numbers)))
        return [each for end in self.ends for each in end.recv()]


@contextlib.contextmanager
def workers(model: Model, device: str, processes: int) -> Iterator[Workers]:
    """So many of them, as long as the block lasts, with a share of the cores each."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    pipes = [context.Pipe() for _ in range(processes)]
    started = [context.Process(target=_worker, args=(end, model, device, threads), daemon=True) for _, end in pipes]
    for process in started:
        process.start()
    for _, end in pipes:
        end.close()  # the process has its own; one that dies is an end of file here
    try:
        yield Workers([end for end, _ in pipes])
    finally:
        for process in started:
            process.terminate()
            process.join()


def _worker(end: Connection, model: Model, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    engine = functools.cache(functools.partial(_models.engine_of, model, device))
    while True:
        settings, *asked = end.recv()
        end.send(ours(engine(*settings), *asked))


def plain(lm: Lm, conversations: Sequence[Sequence[Message]], n: int, sampling: Sampling, batch: int) -> list[Text]:
    """The same by `model.generate`."""
    settings = {"max_new_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, "top_p": 1.0}
    return write(lm, conversations, settings, n=n, batch=batch)


def equal_greedy(engine: LocalEngine, conversations: Sequence[Sequence[Message]], max_new_tokens: int) -> int:
    """How many conversations ours and plain go on with the same ids, where the likeliest token is always taken."""
    sampling = Sampling(max_new_tokens, temperature=0)
    left = ours(engine, conversations, 1, sampling)
    right = plain(_models.plain_of(engine), conversations, 1, sampling, batch=32)
    return sum(one.token_ids == other.ids for one, other in zip(left, right, strict=True))


def first_tokens(engine: LocalEngine, messages: Sequence[Message]) -> dict[str, Any]:
    """Pearson's chi-square test of first tokens against the model's softmax, the pad token out of both."""
    drawn = ours(engine, [messages], DRAWS, Sampling(max_new_tokens=1))
    lm = _models.plain_of(engine)
    with torch.inference_mode():
        ids = torch.tensor(rendered(lm, [messages]), device=lm.model.device)
        logits = lm.model(ids).logits[0, -1].double()
        logits[lm.tokenizer.pad_token_id] = -torch.inf
    expected = DRAWS * logits.softmax(dim=-1).cpu().numpy()
    counts = Counter(each.token_ids[0] for each in drawn)
    observed = np.array([counts[token] for token in range(len(expected))], dtype=float)
    f_observed, f_expected = merged(observed, expected)
    statistic, p = scipy.stats.chisquare(f_observed, f_expected)
    return {"draws": DRAWS, "cells": len(f_expected), "chi_square": round(float(statistic), 3), "p": float(p)}


def merged(observed: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cells, the likeliest first, with at least `LEAST` expected in each: from some point on, all others are one."""
    order = np.argsort(-expected, kind="stable")
    observed, expected = observed[order], expected[order]
    tail = np.cumsum(expected[::-1])[::-1]  # expected in this cell and all after it
    alone = int(np.sum((expected >= LEAST) & (np.append(tail[1:], 0) >= LEAST)))
    starts = np.arange(alone + 1)
    return np.add.reduceat(observed, starts), np.add.reduceat(expected, starts)


def peer(python: str) -> dict[str, Any]:
    """What vLLM reaches, by the script beside this one, in an environment of its own."""
    done = subprocess.run([sys.executable, PEER, "--python", python, "--json"], stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(
    model: Model,
    device: str,
    sizes: Sizes,
    repeats: int,
    clock: _measure.Clock,
    vllm: str | None,
    several: Workers | None,
) -> dict[str, Any]:
    """All figures, the last line's."""
    conversations = [prompt["messages"] for prompt in prompts("train", limit=sizes.prompts)]
    n, sampling = sizes.samples, Sampling(sizes.max_new_tokens)
    engine = functools.cache(functools.partial(_models.engine_of, model, device))
    lms = {dtype: _models.plain_of(engine(dtype, None)) for dtype in DTYPES}
    torch.manual_seed(0)

    def write_ours(dtype: str, budget: int | None = None) -> list[Completion]:
        if several is not None:
            return several.ours(dtype, budget, conversations, n, sampling)
        return ours(engine(dtype, budget), conversations, n, sampling)

    batches = [size for size in BATCHES[device] if size <= sizes.prompts * n] or [sizes.prompts * n]
    dtype = clock.fastest(DTYPES, write_ours)
    write_ours(dtype, BUDGETS[device][-1])  # loads
    budget = clock.fastest(BUDGETS[device], lambda each: write_ours(dtype, each))
    plain_dtype = clock.fastest(DTYPES, lambda each: plain(lms[each], conversations, n, sampling, BATCH))
    batch = clock.fastest(batches, lambda size: plain(lms[plain_dtype], conversations, n, sampling, size))
    ways = {
        "ours": lambda: write_ours(dtype, budget),
        "plain": lambda: plain(lms[plain_dtype], conversations, n, sampling, batch),
    }
    runs = clock.best(ways, repeats)
    n_tokens = {
        "ours": sum(len(each.token_ids) for each in runs["ours"].returned),
        "plain": sum(len(each.ids) for each in runs["plain"].returned),
    }
    speed = {name: n_tokens[name] / run.seconds for name, run in runs.items()}
    other: dict[str, Any] = {"measured": False}
    if vllm:
        found = peer(vllm)
        ratios = {way: round(speed["ours"] / one["tokens_per_second"], 2) for way, one in found["ways"].items()}
        other = {"measured": True, **found, "ratios": ratios}
    equal = equal_greedy(engine("float32", None), conversations, sizes.max_new_tokens)
    return _measure.result(
        "generate", speed["ours"], speed["plain"], "tokens/s", sizes._asdict(), ("torch", "transformers"),
        tokens=n_tokens,
        peer=other,
        greedy={"equal": equal, "of": len(conversations), "dtype": "float32"},
        first_token=first_tokens(engine("float32", None), conversations[0]),
        processes={"ours": 1 if several is None else len(several.ends), "plain": 1},
        clock=clock.name, repeats=repeats, dtype={"ours": dtype, "plain": plain_dtype}, batch={"plain": batch},
        token_budget=budget or engine(dtype, None).profile.token_budget,
        model=model.name, device=device,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, help="runs of each way, of which the quickest counts; 3, 1 with --quick")
    parser.add_argument("--peer", metavar="PYTHON", help="interpreter of an environment with vLLM, to measure it too")
    parser.add_argument("--processes", type=int, default=1, help="in which ours runs; plain has one. Default 1")
    _measure.add_options(parser)
    _models.add_options(parser)
    given = parser.parse_args()
    clock = _measure.clock_of(parser, given)
    if given.peer and not (PEER.is_file() and Path(given.peer).is_file()):
        parser.error(f"--peer: found not both of the interpreter {given.peer} and the script {PEER}")
    if given.processes > 1 and (given.cpu_seconds or given.device != "cpu"):
        parser.error(f"--processes: found {given.processes} with another device or clock than the CPU's and the wall's")
    sizes = Sizes(8, 2, 16) if given.quick else Sizes(128, 4, 64)
    repeats = given.repeats or (1 if given.quick else 3)
    with tempfile.TemporaryDirectory() as folder:
        model = _models.model_of(given.model, Path(folder))
        with workers(model, given.device, given.processes) if given.processes > 1 else contextlib.nullcontext() as some:
            found = measured(model, given.device, sizes, repeats, clock, given.peer, some)
    for name in ("ours", "plain"):
        print(f"{name:6} {found[name]:8,.0f} tokens/s, {found['tokens'][name]:,} tokens")
    if found["peer"]["measured"]:
        for way, one in found["peer"]["ways"].items():
            words = f"vLLM   {one['tokens_per_second']:8,.0f} tokens/s, {way.replace('_', ' ')}; ours is"
            print(f"{words} {found['peer']['ratios'][way]:.2f} times as fast")
    else:
        print("vLLM was not measured: --peer does")
    print(f"{found['ratio']:.2f} times plain")
    print(
        f"greedy ids equal for {found['greedy']['equal']} of {found['greedy']['of']} prompts; first tokens: "
        f"p = {found['first_token']['p']:.3f}"
    )
    print(json.dumps(found | {"model": given.model}))


if __name__ == "__main__":
    main()
