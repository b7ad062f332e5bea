"""Measures how long a judge takes for many questions that share prefixes.

    python benchmarks/choose.py            256 pairs, 16 principles, both orders: 8,192 questions of 190 tokens
    python benchmarks/choose.py --quick    2 pairs, and no figure about linear growth
    python benchmarks/choose.py --device cuda --model random-1b

The questions about one pair in one order share their first 170 tokens, the conversation and the responses; the last 20
tokens, the principle, differ. Ours is the local engine's scoring of token ids. Plain has one row a question, computes
logits of the last position only, and uses the batch size that is fastest on a part of the questions. `forward` prefills
the same unique tokens as plain rows of 170 + 16 x 20 tokens; it answers no question and shows how fast prefill is here.

All run in one process on the same weights, taking turns, and the fastest run of each counts. The log-odds of ours and
plain are then compared in float32. The last line is one JSON object; times are in seconds.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.plain import Lm, log_odds
from benchmarks.support import language_models, measurement
from cai.contracts.model import Model
from cai.engines.local.local_engine import LocalEngine
from cai.engines.local.scoring import PromptAndOptions, score

BATCHES = {"cpu": (4, 8, 16, 32, 64), "cuda": (64, 128, 256, 512)}
"""Questions in one batch of plain; all sizes are tried."""
FORWARD_BATCHES = {"cpu": (4, 8, 16, 32), "cuda": (16, 32, 64, 128)}
"""Rows in one batch of `forward`, which are longer."""
FIRST_ID = 100
"""Smaller ids may be special tokens."""


@dataclass(frozen=True)
class Shape:
    """Number of questions, and their lengths in tokens."""

    pairs: int
    principles: int = 16
    prefix: int = 170
    branch: int = 20

    @property
    def questions(self) -> int:
        """Questions: each pair under each principle in both orders."""
        return 2 * self.pairs * self.principles

    @property
    def tokens(self) -> int:
        """Tokens of all questions."""
        return self.questions * (self.prefix + self.branch)

    @property
    def unique(self) -> int:
        """Tokens of all questions, a shared prefix counted once."""
        return 2 * self.pairs * self.row

    @property
    def row(self) -> int:
        """Unique tokens about one pair in one order."""
        return self.prefix + self.principles * self.branch

    @property
    def bound(self) -> float:
        """Largest speed-up that computing shared tokens once can give."""
        return self.tokens / self.unique


def make_questions(shape: Shape, vocabulary: int) -> tuple[list[list[int]], list[list[int]]]:
    """Questions as token ids, and rows of the same unique tokens. Questions share whole prefixes and nothing else."""
    rng = random.Random(0)
    token_ids = range(FIRST_ID, vocabulary)
    firsts = rng.sample(token_ids, shape.principles)
    branches = [[first, *rng.choices(token_ids, k=shape.branch - 1)] for first in firsts]
    prefixes = [rng.choices(token_ids, k=shape.prefix) for _ in range(2 * shape.pairs)]
    questions = [prefix + branch for prefix in prefixes for branch in branches]
    return questions, [[*prefix, *(token for branch in branches for token in branch)] for prefix in prefixes]


def score_ours(engine: LocalEngine, questions: Sequence[list[int]], options: list[int]) -> list[float]:
    """Log-odds of each question's two options, by the engine."""
    pairs = [PromptAndOptions(question, options) for question in questions]
    scores = dict(engine._budget.run(pairs, lambda part, budget: score(engine.lm, part, budget)))
    return [scores[n][0] - scores[n][1] for n in range(len(questions))]


@torch.inference_mode()
def forward(lm: Lm, rows: Sequence[list[int]], shape: Shape, batch: int) -> None:
    """Prefills the rows and computes logits at the positions where questions would end."""
    ends = torch.arange(shape.prefix + shape.branch - 1, shape.row, shape.branch, device=lm.model.device)
    for first in range(0, len(rows), batch):
        ids = torch.tensor(rows[first : first + batch], device=lm.model.device)
        lm.model(input_ids=ids, logits_to_keep=ends, use_cache=False).logits.float().log_softmax(dim=-1)


def measure_growth(
    engine: LocalEngine, vocabulary: int, options: list[int], clock: measurement.Clock
) -> dict[str, float]:
    """Seconds for 100 and for 1,000 pairs of small questions, and their ratio."""
    shapes = (Shape(pairs, principles=4, prefix=60, branch=10) for pairs in (100, 1000))
    few, many = (make_questions(shape, vocabulary)[0] for shape in shapes)
    ways = {"few": lambda: score_ours(engine, few, options), "many": lambda: score_ours(engine, many, options)}
    seconds = {name: run.seconds for name, run in clock.best(ways, 3).items()}
    return {
        "seconds_100_pairs": round(seconds["few"], 3), "seconds_1000_pairs": round(seconds["many"], 3),
        "ratio": round(seconds["many"] / seconds["few"], 2),
    }  # fmt: skip


def largest_difference(model: Model, device: str, shape: Shape) -> float:
    """Largest difference between the log-odds of ours and plain in float32, in nats."""
    engine = language_models.engine_of(model, device, "float32")
    lm = language_models.plain_of(engine)
    options = options_of(lm)
    questions, _ = make_questions(shape, len(lm.tokenizer))
    expected = log_odds(lm, questions, options, batch=32)
    return max(abs(a - b) for a, b in zip(score_ours(engine, questions, options), expected, strict=True))


def options_of(lm: Lm) -> list[int]:
    """Token ids of A and B."""
    return [lm.tokenizer.encode(option, add_special_tokens=False)[0] for option in "AB"]


def measure(
    model: Model, device: str, shape: Shape, repeats: int, clock: measurement.Clock, quick: bool
) -> dict[str, Any]:
    """The object of the last line."""
    engine = language_models.engine_of(model, device)
    lm = language_models.plain_of(engine)
    options = options_of(lm)
    questions, rows = make_questions(shape, len(lm.tokenizer))
    some_questions, some_rows = questions[: 4 * max(BATCHES[device])], rows[: 2 * max(FORWARD_BATCHES[device])]
    plain_batch = clock.fastest(BATCHES[device], lambda batch: log_odds(lm, some_questions, options, batch))
    forward_batch = clock.fastest(FORWARD_BATCHES[device], lambda batch: forward(lm, some_rows, shape, batch))
    score_ours(engine, some_questions, options)
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: score_ours(engine, questions, options),
        "plain": lambda: log_odds(lm, questions, options, plain_batch),
        "forward": lambda: forward(lm, rows, shape, forward_batch),
    }
    seconds = {name: run.seconds for name, run in clock.best(ways, repeats).items()}
    ratio, share = seconds["plain"] / seconds["ours"], seconds["forward"] / seconds["ours"]
    sizes = asdict(shape) | {"questions": shape.questions, "tokens": shape.tokens, "unique_tokens": shape.unique}
    return measurement.result(
        "choose", seconds["ours"], seconds["plain"], "seconds", sizes, ("torch", "transformers"),
        bound=round(shape.bound, 2),
        share_of_bound=round(ratio / shape.bound, 3),
        forward=round(seconds["forward"], 3),
        share_of_forward=round(share, 3),
        unique_tokens_per_second={side: round(shape.unique / seconds[side]) for side in ("ours", "forward")},
        log_odds_difference_float32=largest_difference(model, device, Shape(min(shape.pairs, 16))),
        linear=None if quick else measure_growth(engine, len(lm.tokenizer), options, clock),
        clock=clock.name, repeats=repeats, batch={"plain": plain_batch, "forward": forward_batch},
        model=model.name, dtype=str(lm.model.dtype).removeprefix("torch."), device=device,
    )  # fmt: skip


def main() -> None:
    parser = measurement.argument_parser(__doc__)
    parser.add_argument("--pairs", type=int, help="this many pairs")
    parser.add_argument("--repeats", type=int, help="runs of each, of which the fastest counts; 2, 1 with --quick")
    language_models.add_options(parser)
    arguments = parser.parse_args()
    clock = measurement.clock_of(parser, arguments)
    shape = Shape(arguments.pairs or (2 if arguments.quick else 256))
    repeats = arguments.repeats or (1 if arguments.quick else 2)
    with tempfile.TemporaryDirectory() as folder:
        model = language_models.model_of(arguments.model, Path(folder))
        figures = measure(model, arguments.device, shape, repeats, clock, arguments.quick)
    print(f"{shape.questions:,} questions, {shape.tokens:,} tokens, {shape.unique:,} unique")
    for name in ("ours", "plain", "forward"):
        print(f"{name:8} {figures[name]:8.2f} s")
    print(
        f"{figures['ratio']:.2f} times plain, {figures['share_of_bound']:.0%} of what sharing can give; "
        f"{figures['share_of_forward']:.0%} of a plain forward's tokens a second"
    )
    print(json.dumps(figures | {"model": arguments.model}))


if __name__ == "__main__":
    main()
