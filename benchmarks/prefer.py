"""Measures how long the stage `prefer` takes to make preferences of many votes on one core, and its peak memory.

    python benchmarks/prefer.py            100,000 pairs, 16 principles, both orders: 3.2 million votes
    python benchmarks/prefer.py --quick    2,000 pairs

Ours is the whole stage: it reads the votes, writes the preferences to disk and computes the figures. Plain is the
obvious program without figures: `json.loads`, loops and `json.dumps`, row by row. Each runs in a process of its own,
and both must write the same rows. The last line is one JSON object; times are in seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.support import measurement

PRINCIPLES = 16
WEIGHTS = {f"principle-{n:02}": 0.5 + n / 10 for n in range(PRINCIPLES)}
WORDS = ["a", "is", "the", "what", "about", "response", "nevertheless"]
STAGE = "preferences"


def text(rng: random.Random, words: int) -> str:
    """Random words with a line break and quotation marks, which JSON escapes."""
    sampled = rng.choices(WORDS, k=words)
    return " ".join(sampled[: words // 2]) + '.\n"' + " ".join(sampled[words // 2 :]) + '."'


def rows(n: int) -> Iterator[dict[str, Any]]:
    """Votes as `judge` writes them, on prompts of one to five messages and responses of about 60 words."""
    rng = random.Random(0)
    for number in range(n):
        turns = rng.choice((1, 1, 3, 5))
        roles = ["assistant" if turn % 2 else "user" for turn in range(turns)]
        prompt = [{"role": role, "content": text(rng, rng.randrange(8, 40))} for role in roles]
        votes = [
            {"log_odds": rng.gauss(0.2, 1.5), "option_probability": 0.9 + rng.random() / 10, "order": order,
             "principle": id}
            for order in ("ab", "ba") for id in WEIGHTS
        ]  # fmt: skip
        sides = {
            side: {"id": f"{number:014x}{side}{side}", "model": "writer", "text": text(rng, rng.randrange(20, 100))}
            for side in "ab"
        }
        yield {
            **sides, "constitution": "benchmark", "id": f"{number:016x}", "judge": "judge", "prompt": prompt,
            "prompt_id": f"{number // 2:016x}", "tags": ["red_team" if number % 2 else "helpful"], "votes": votes,
        }  # fmt: skip


def write_inputs(folder: Path, n: int) -> None:
    """Writes the votes, and the constitution that has their principles."""
    from cai.storage.rows import row_lines

    (folder / "votes").mkdir()
    with (folder / "votes" / "records.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(row_lines(rows(n)))
    document = ["name: benchmark", "principles:"]
    document += [f"  - {{id: {id}, text: A principle., weight: {weight}}}" for id, weight in WEIGHTS.items()]
    (folder / "constitution.yaml").write_text("\n".join(document) + "\n")


def prefer_ours(folder: Path) -> None:
    """The stage, called as a run calls it."""
    from cai.constitution import load_constitution
    from cai.contracts.context import Context
    from cai.contracts.profile import load_profile
    from cai.engines import open_engine
    from cai.stages.prefer import Config, run
    from cai.storage.journal import Journal
    from cai.text.progress import PlainDisplay

    output = folder / "ours"
    output.mkdir()
    context = Context(
        stage_id=STAGE, folder=output, seed=0, profile=load_profile("cpu"), progress=PlainDisplay().begin_stage(STAGE),
        journal=Journal(output), constitution=load_constitution(folder / "constitution.yaml"),
        inputs={"votes": folder / "votes"}, prompt_sets={}, models={}, open_engine=open_engine,
    )  # fmt: skip
    run(Config.model_validate({"id": STAGE, "from": "votes"}), context)


def prefer_plain(folder: Path) -> None:
    """The same preferences by a plain program."""
    output = folder / "plain"
    output.mkdir()
    with (
        (folder / "votes" / "records.jsonl").open(encoding="utf-8") as lines,
        (output / "records.jsonl").open("w", encoding="utf-8") as file,
    ):
        for line in lines:
            row = json.loads(line)
            odds: dict[str, dict[str, float]] = {}
            for vote in row["votes"]:
                odds.setdefault(vote["principle"], {})[vote["order"]] = vote["log_odds"]
            total = weight = 0.0
            for id, by_order in odds.items():
                total += WEIGHTS[id] * (by_order["ab"] + by_order["ba"]) / 2
                weight += WEIGHTS[id]
            mean = total / weight
            chosen, rejected = (row["a"], row["b"]) if mean > 0 else (row["b"], row["a"])
            id = hashlib.sha256(json.dumps([STAGE, row["id"]], separators=(",", ":")).encode()).hexdigest()[:16]
            preference = {
                "id": id, "pair_id": row["id"], "source": "ai", "log_odds": abs(mean),
                "p_chosen": 1 / (1 + math.exp(-abs(mean))),
                "chosen": [{"role": "assistant", "content": chosen["text"]}],
                "rejected": [{"role": "assistant", "content": rejected["text"]}],
                **{key: row[key] for key in ("prompt_id", "prompt", "tags", "judge", "constitution")},
            }  # fmt: skip
            text = json.dumps(preference, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
            file.write(text + "\n")


SIDES = {"ours": prefer_ours, "plain": prefer_plain}


def measure(side: str, folder: Path) -> dict[str, Any]:
    """Seconds and peak memory of one side, on one core, in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    return measurement.run_for_json(command, os.environ | {"OMP_NUM_THREADS": "1"})


def run_side(side: str, folder: Path) -> None:
    """The process of `measure`. Imports are not timed; everything else that a first run needs is."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import cai.stages.prefer  # noqa: F401

    start, cpu_start = time.perf_counter(), time.process_time()
    SIDES[side](folder)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    print(json.dumps({"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "peak_rss": measurement.peak_rss()}))


def check(folder: Path) -> int:
    """Checks that both sides wrote the same rows, numbers to 12 digits; returns the number of rows."""
    n = 0
    with (
        (folder / "ours" / "records.jsonl").open(encoding="utf-8") as our_lines,
        (folder / "plain" / "records.jsonl").open(encoding="utf-8") as plain_lines,
    ):
        for n, (our_line, plain_line) in enumerate(zip(our_lines, plain_lines, strict=True), 1):
            ours, plain = json.loads(our_line), json.loads(plain_line)
            for key in ("p_chosen", "log_odds"):
                assert math.isclose(ours.pop(key), plain.pop(key), rel_tol=1e-12, abs_tol=1e-12), (n, key)
            assert ours == plain, n
    return n


def main() -> None:
    parser = measurement.argument_parser(__doc__, quick="2,000 pairs instead of 100,000", clock=False)
    parser.add_argument("--pairs", type=int, help="this many pairs")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments.side, arguments.folder)
        return
    n = arguments.pairs or (2_000 if arguments.quick else 100_000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, n)
        size = (folder / "votes" / "records.jsonl").stat().st_size
        figures = {side: measure(side, folder) for side in SIDES}
        n_rows = check(folder)
    print(f"{n:,} pairs, {2 * PRINCIPLES * n:,} votes, {size / 1e6:,.0f} MB; the {n_rows:,} rows of both are the same")
    for side, of_side in figures.items():
        print(f"{side:6} {of_side['seconds']:6.2f} s, {(of_side['peak_rss'] or 0) / 1e6:6,.0f} MB at most")
    result = measurement.result(
        "prefer", figures["ours"]["seconds"], figures["plain"]["seconds"], "seconds",
        {"pairs": n, "principles": PRINCIPLES, "votes": 2 * PRINCIPLES * n, "bytes": size}, ("numpy", "pyarrow"),
        cpu_seconds={side: of_side["cpu_seconds"] for side, of_side in figures.items()},
        peak_rss={side: of_side["peak_rss"] for side, of_side in figures.items()},
    )  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
