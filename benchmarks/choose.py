"""How long a judge takes over many questions that begin alike.

    python benchmarks/choose.py            256 pairs, 16 principles, both orders: 8,192 questions of 190 tokens
    python benchmarks/choose.py --quick    2 pairs, and no figure about linear growth
    python benchmarks/choose.py --device cuda --model random-1b

The questions about one pair in one order share their first 170 tokens, the conversation and the responses; the last 20,
the principle, are their own. Ours is the local engine's scoring of token ids. Plain is one row a question, the last
position's logits alone, at the batch size that is fastest on a part. `forward` reads the same unique tokens as plain
rows of 170 + 16 x 20 tokens, which answers nothing: it is how fast the model reads tokens here.

All run in one process on the same weights, taking turns, and the quickest run of each counts. The log-odds of ours and
plain are then compared in float32. The last line is one JSON object; times are in seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _measure
import _models
import torch
from plain import Lm, log_odds

from cai.contracts.model import Model
from cai.engines.local.local_engine import LocalEngine

BATCHES = {"cpu": (4, 8, 16, 32, 64), "cuda": (64, 128, 256, 512)}
"""Questions that plain reads at once: all of these are tried."""
FORWARD_BATCHES = {"cpu": (4, 8, 16, 32), "cuda": (16, 32, 64, 128)}
"""Rows of `forward`, which are longer."""
FIRST_ID = 100
"""Ids below may be control tokens."""


@dataclass(frozen=True)
class Shape:
    """How many questions of what form."""

    pairs: int
    principles: int = 16
    prefix: int = 170
    branch: int = 20

    @property
    def questions(self) -> int:
        """Each pair under each principle in both orders."""
        return 2 * self.pairs * self.principles

    @property
    def tokens(self) -> int:
        """In all questions, each read whole."""
        return self.questions * (self.prefix + self.branch)

    @property
    def unique(self) -> int:
        """Where what is shared counts once."""
        return 2 * self.pairs * self.row

    @property
    def row(self) -> int:
        """The unique tokens about one pair in one order."""
        return self.prefix + self.principles * self.branch

    @property
    def bound(self) -> float:
        """How many times faster reading shared tokens once can be."""
        return self.tokens / self.unique


def made(shape: Shape, vocabulary: int) -> tuple[list[list[int]], list[list[int]]]:
    """The questions as token ids, and rows of the same unique tokens. Nothing but whole prefixes is shared."""
    rng = random.Random(0)
    known = range(FIRST_ID, vocabulary)
    firsts = rng.sample(known, shape.principles)
    branches = [[first, *rng.choices(known, k=shape.branch - 1)] for first in firsts]
    prefixes = [rng.choices(known, k=shape.prefix) for _ in range(2 * shape.pairs)]
    questions = [prefix + branch for prefix in prefixes for branch in branches]
    return questions, [[*prefix, *(token for branch in branches for token in branch)] for prefix in prefixes]


def ours(engine: LocalEngine, questions: Sequence[list[int]], options: list[int]) -> list[float]:
    """The log-odds of each question's options, by the engine."""
    scores = dict(engine._scores([(question, options) for question in questions]))
    return [scores[n][0] - scores[n][1] for n in range(len(questions))]


@torch.inference_mode()
def forward(lm: Lm, rows: Sequence[list[int]], shape: Shape, batch: int) -> None:
    """Reads the rows, with logits where a question would end."""
    ends = torch.arange(shape.prefix + shape.branch - 1, shape.row, shape.branch, device=lm.model.device)
    for first in range(0, len(rows), batch):
        ids = torch.tensor(rows[first : first + batch], device=lm.model.device)
        lm.model(input_ids=ids, logits_to_keep=ends, use_cache=False).logits.float().log_softmax(dim=-1)


def linear(engine: LocalEngine, vocabulary: int, options: list[int], clock: _measure.Clock) -> dict[str, float]:
    """Seconds for 100 and for 1,000 pairs of small questions, and their ratio."""
    few, many = (made(Shape(pairs, principles=4, prefix=60, branch=10), vocabulary)[0] for pairs in (100, 1000))
    found = clock.best({"few": lambda: ours(engine, few, options), "many": lambda: ours(engine, many, options)}, 3)
    seconds = {name: run.seconds for name, run in found.items()}
    return {
        "seconds_100_pairs": round(seconds["few"], 3), "seconds_1000_pairs": round(seconds["many"], 3),
        "ratio": round(seconds["many"] / seconds["few"], 2),
    }  # fmt: skip


def difference(model: Model, device: str, shape: Shape) -> float:
    """The largest difference between the log-odds of ours and plain in float32, in nats."""
    engine = _models.engine_of(model, device, "float32")
    lm = _models.plain_of(engine)
    options = options_of(lm)
    questions, _ = made(shape, len(lm.tokenizer))
    expected = log_odds(lm, questions, options, batch=32)
    return max(abs(a - b) for a, b in zip(ours(engine, questions, options), expected, strict=True))


def options_of(lm: Lm) -> list[int]:
    """The ids of A and B."""
    return [lm.tokenizer.encode(option, add_special_tokens=False)[0] for option in "AB"]


def measured(
    model: Model, device: str, shape: Shape, repeats: int, clock: _measure.Clock, quick: bool
) -> dict[str, Any]:
    """All figures, the last line's."""
    engine = _models.engine_of(model, device)
    lm = _models.plain_of(engine)
    options = options_of(lm)
    questions, rows = made(shape, len(lm.tokenizer))
    part, some = questions[: 4 * max(BATCHES[device])], rows[: 2 * max(FORWARD_BATCHES[device])]
    plain_batch = clock.fastest(BATCHES[device], lambda batch: log_odds(lm, part, options, batch))
    forward_batch = clock.fastest(FORWARD_BATCHES[device], lambda batch: forward(lm, some, shape, batch))
    ours(engine, part, options)
    found = clock.best(
        {
            "ours": lambda: ours(engine, questions, options),
            "plain": lambda: log_odds(lm, questions, options, plain_batch),
            "forward": lambda: forward(lm, rows, shape, forward_batch),
        },
        repeats,
    )
    seconds = {name: run.seconds for name, run in found.items()}
    ratio, share = seconds["plain"] / seconds["ours"], seconds["forward"] / seconds["ours"]
    sizes = asdict(shape) | {
        "questions": shape.questions, "tokens": shape.tokens, "unique_tokens": shape.unique,
    }  # fmt: skip
    return _measure.result(
        "choose", seconds["ours"], seconds["plain"], "seconds", sizes, ("torch", "transformers"),
        bound=round(shape.bound, 2),
        share_of_bound=round(ratio / shape.bound, 3),
        forward=round(seconds["forward"], 3),
        share_of_forward=round(share, 3),
        unique_tokens_per_second={
            "ours": round(shape.unique / seconds["ours"]), "forward": round(shape.unique / seconds["forward"]),
        },
        log_odds_difference_float32=difference(model, device, Shape(min(shape.pairs, 16))),
        linear=None if quick else linear(engine, len(lm.tokenizer), options, clock),
        clock=clock.name, repeats=repeats, batch={"plain": plain_batch, "forward": forward_batch},
        model=model.name, dtype=str(lm.model.dtype).removeprefix("torch."), device=device,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, help="this many pairs")
    parser.add_argument("--repeats", type=int, help="runs of each way, of which the quickest counts; 2, 1 with --quick")
    _measure.add_options(parser)
    _models.add_options(parser)
    given = parser.parse_args()
    clock = _measure.clock_of(parser, given)
    shape = Shape(given.pairs or (2 if given.quick else 256))
    repeats = given.repeats or (1 if given.quick else 2)
    with tempfile.TemporaryDirectory() as folder:
        model = _models.model_of(given.model, Path(folder))
        found = measured(model, given.device, shape, repeats, clock, given.quick)
    print(f"{shape.questions:,} questions, {shape.tokens:,} tokens, {shape.unique:,} unique")
    for name in ("ours", "plain", "forward"):
        print(f"{name:8} {found[name]:8.2f} s")
    print(
        f"{found['ratio']:.2f} times plain, {found['share_of_bound']:.0%} of what sharing can give; "
        f"{found['share_of_forward']:.0%} of a plain forward's tokens a second"
    )
    print(json.dumps(found | {"model": given.model}))


if __name__ == "__main__":
    main()
