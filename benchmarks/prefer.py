"""How long `prefer` takes to turn the votes of many pairs into preferences, and how much memory, on one core.

    python benchmarks/prefer.py            100,000 pairs, 16 principles, both orders: 3.2 million votes
    python benchmarks/prefer.py --quick    2,000 pairs

Ours is the whole stage: it reads the votes, writes the preferences to the disk and computes the figures. Plain is what
one would write first: `json.loads`, loops and `json.dumps`, row by row, and no figures. Each runs in a process of its
own, and the rows of both must be the same. The last line is one JSON object; times are in seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _measure

PRINCIPLES = 16
WEIGHTS = {f"principle-{n:02}": 0.5 + n / 10 for n in range(PRINCIPLES)}
WORDS = ["a", "is", "the", "what", "about", "response", "nevertheless"]
STAGE = "preferences"


def text(rng: random.Random, words: int) -> str:
    """Words, a line break and a quotation here and there: what a response is made of."""
    drawn = rng.choices(WORDS, k=words)
    return " ".join(drawn[: words // 2]) + '.\n"' + " ".join(drawn[words // 2 :]) + '."'


def rows(n: int) -> Iterator[dict[str, Any]]:
    """Votes as `judge` leaves them, on prompts of one to five turns and responses of about 60 words."""
    rng = random.Random(0)
    for number in range(n):
        turns = rng.choice((1, 1, 3, 5))
        prompt = [
            {"role": "assistant" if turn % 2 else "user", "content": text(rng, rng.randrange(8, 40))}
            for turn in range(turns)
        ]
        votes = [
            {
                "log_odds": rng.gauss(0.2, 1.5),
                "option_probability": 0.9 + rng.random() / 10,
                "order": order,
                "principle": id,
            }
            for order in ("ab", "ba")
            for id in WEIGHTS
        ]
        sides = {
            side: {"id": f"{number:014x}{side}{side}", "model": "writer", "text": text(rng, rng.randrange(20, 100))}
            for side in "ab"
        }
        yield {
            **sides, "constitution": "benchmark", "id": f"{number:016x}", "judge": "judge", "prompt": prompt,
            "prompt_id": f"{number // 2:016x}", "tags": ["red_team" if number % 2 else "helpful"], "votes": votes,
        }  # fmt: skip


def make(folder: Path, n: int) -> None:
    """The votes on the disk, and the constitution by whose principles they are."""
    from cai.storage.rows import row_lines

    (folder / "votes").mkdir()
    with (folder / "votes" / "records.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(row_lines(rows(n)))
    document = ["name: benchmark", "principles:"]
    document += [f"  - {{id: {id}, text: A principle., weight: {weight}}}" for id, weight in WEIGHTS.items()]
    (folder / "constitution.yaml").write_text("\n".join(document) + "\n")


def ours(folder: Path) -> None:
    """The stage, as a run calls it."""
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
        stage_id=STAGE, folder=output, seed=0, profile=load_profile("cpu"), progress=PlainDisplay().begin(STAGE),
        journal=Journal(output), constitution=load_constitution(folder / "constitution.yaml"),
        inputs={"votes": folder / "votes"}, prompt_sets={}, models={}, open_engine=open_engine,
    )  # fmt: skip
    run(Config.model_validate({"id": STAGE, "from": "votes"}), context)


def plain(folder: Path) -> None:
    """The same preferences, written the plain way."""
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
            for id, both in odds.items():
                total += WEIGHTS[id] * (both["ab"] + both["ba"]) / 2
                weight += WEIGHTS[id]
            mean = total / weight
            chosen, rejected = (row["a"], row["b"]) if mean > 0 else (row["b"], row["a"])
            id = hashlib.sha256(json.dumps([STAGE, row["id"]], separators=(",", ":")).encode()).hexdigest()[:16]
            preference = {
                "id": id,
                "pair_id": row["id"],
                "prompt_id": row["prompt_id"],
                "prompt": row["prompt"],
                "chosen": [{"role": "assistant", "content": chosen["text"]}],
                "rejected": [{"role": "assistant", "content": rejected["text"]}],
                "p_chosen": 1 / (1 + math.exp(-abs(mean))),
                "log_odds": abs(mean),
                "source": "ai",
                "tags": row["tags"],
                "judge": row["judge"],
                "constitution": row["constitution"],
            }
            written = json.dumps(preference, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
            file.write(written + "\n")


def measured(way: str, folder: Path) -> dict[str, Any]:
    """Seconds and peak memory of one way, on one core, in a process of its own."""
    command = [sys.executable, __file__, "--way", way, "--folder", str(folder)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_one(way: str, folder: Path) -> None:
    """What `measured` starts: imports are not timed, the first touch of everything else is."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import cai.stages.prefer  # noqa: F401

    began = time.perf_counter(), time.process_time()
    {"ours": ours, "plain": plain}[way](folder)
    seconds, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
    print(json.dumps({"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "peak_rss": _measure.peak_rss()}))


def check(folder: Path) -> int:
    """The number of rows, which both ways must have written alike, numbers to 12 digits."""
    n = 0
    with (folder / "ours" / "records.jsonl").open() as one, (folder / "plain" / "records.jsonl").open() as other:
        for n, (left, right) in enumerate(zip(one, other, strict=True), 1):
            a, b = json.loads(left), json.loads(right)
            for key in ("p_chosen", "log_odds"):
                assert math.isclose(a.pop(key), b.pop(key), rel_tol=1e-12, abs_tol=1e-12), (n, key)
            assert a == b, n
    return n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,000 pairs instead of 100,000")
    parser.add_argument("--pairs", type=int, help="this many pairs")
    parser.add_argument("--way", choices=["ours", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        run_one(given.way, given.folder)
        return
    n = given.pairs or (2_000 if given.quick else 100_000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, n)
        size = (folder / "votes" / "records.jsonl").stat().st_size
        found = {way: measured(way, folder) for way in ("ours", "plain")}
        same = check(folder)
    print(f"{n:,} pairs, {2 * PRINCIPLES * n:,} votes, {size / 1e6:,.0f} MB; the {same:,} rows of both are the same")
    for way, each in found.items():
        print(f"{way:6} {each['seconds']:6.2f} s, {(each['peak_rss'] or 0) / 1e6:6,.0f} MB at most")
    result = _measure.result(
        "prefer", found["ours"]["seconds"], found["plain"]["seconds"], "seconds",
        {"pairs": n, "principles": PRINCIPLES, "votes": 2 * PRINCIPLES * n, "bytes": size}, ("numpy", "pyarrow"),
        cpu_seconds={way: each["cpu_seconds"] for way, each in found.items()},
        peak_rss={way: each["peak_rss"] for way, each in found.items()},
    )  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
