"""How long the feedback stages of the recipe quickstart take: all that is written and all that is judged.

    python benchmarks/feedback.py            recipes/quickstart.yaml
    python benchmarks/feedback.py --quick    the same with 16 prompts of each set

Ours are the stages as a run has them, journal and figures included. Plain is given the same items by the functions of
`plain.py`: the same prompts, the responses that ours revised, the pairs that ours judged, by the same principles in
both orders. SL-CAI and the policy are trained once, by ours, and not counted; plain answers with the same checkpoints.
Texts are drawn anew, so the two write somewhat different numbers of tokens.

Ours runs in two processes of one thread each (`--on cpu`: in one), plain in one with all cores. All is on the CPU,
imports not counted, loading of models counted in both. Batch sizes of plain are the
fastest of several on a part. Each stage runs once: what it is made of is repeated in `choose.py` and `generate.py`. The
last line is one JSON object; times are in seconds.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import _measure
import plain
import torch
from quickstart import PACKAGES, add_options, recipe_file

from cai.contracts.engine import Question, Request, Sampling
from cai.contracts.profile import Profile, load_profile
from cai.engines import open_engine
from cai.models.reference import MICRO, resolve
from cai.run.pipeline import Options, run_recipe
from cai.run.recipe import load_recipe
from cai.storage import run_folder
from cai.storage.journal import RECORDS
from cai.storage.rows import Message, read_rows
from cai.text.progress import PlainDisplay

STAGES = ("responses", "revisions", "candidates", "votes", "comparison")
WRITE = (32, 64, 128, 256)
JUDGE = (8, 16, 32, 64)
"""Batch sizes that plain tries."""


class Plain:
    """The plain side: a function for each stage, given what ours had; models are loaded by whoever needs them first."""

    def __init__(self, recipe: plain.Recipe, run: Path) -> None:
        self.recipe = recipe
        self.run = run
        self.write, self.judge = plain.WRITE, plain.JUDGE
        self._lms: dict[str, plain.Lm] = {}

    def lm(self, name: str) -> plain.Lm:
        """The embedded model, as `base`, or what a stage trained."""
        if name not in self._lms:
            self._lms[name] = plain.load(
                MICRO if name == "base" else run_folder.latest(self.run)[name] / run_folder.MODEL
            )
        return self._lms[name]

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """What ours left."""
        return read_rows(run_folder.latest(self.run)[stage] / RECORDS)

    def tune(self, clock: _measure.Clock) -> None:
        """Finds the fastest batch sizes, on some of the responses and votes."""
        settings = plain.settings_of(self.recipe.stages["responses"])
        asked = plain.asked(self.recipe, "responses")[: max(WRITE)]
        sizes = [size for size in WRITE if size <= len(asked)] or [len(asked)]
        self.write = clock.fastest(sizes, lambda size: plain.sample(self.lm("base"), asked, settings, batch=size))
        pairs = self.pairs("votes")[:16]
        self.judge = clock.fastest(
            JUDGE, lambda size: plain.judge(self.lm("base"), pairs, self.recipe.principles, batch=size)
        )
        self._lms.clear()

    def sampled(self, stage: str, model: str) -> list[plain.Response]:
        """The responses to a stage's prompts."""
        settings = self.recipe.stages[stage]
        return plain.sample(
            self.lm(model),
            plain.asked(self.recipe, stage),
            plain.settings_of(settings),
            n=settings.get("n", 1),
            batch=self.write,
        )

    def pairs(self, stage: str) -> list[plain.Pair]:
        """The different pairs that ours judged."""
        return [
            plain.Pair(row["prompt"], row["tags"], row["a"]["text"], row["b"]["text"])
            for row in self.rows(stage)
            if "votes" in row and row["a"]["text"] != row["b"]["text"]
        ]

    def responses(self) -> object:
        return self.sampled("responses", "base")

    def revisions(self) -> object:
        stage = self.recipe.stages["revisions"]
        revised = [
            plain.Response(row["prompt"], row["tags"], row["response"], True)
            for row in self.rows("responses")
            if set(stage["only"]) & set(row["tags"])
        ]
        return plain.revise(
            self.lm("base"), revised, self.recipe.principles, plain.settings_of(stage), rounds=stage["rounds"],
            batch=self.write,
        )  # fmt: skip

    def candidates(self) -> object:
        return self.sampled("candidates", "sl-cai")

    def votes(self) -> object:
        return plain.judge(self.lm("base"), self.pairs("votes"), self.recipe.principles, batch=self.judge)

    def comparison(self) -> object:
        for model in ("base", "sl-cai", "policy"):
            self.sampled("comparison", model)
        return plain.judge(self.lm("base"), self.pairs("comparison"), self.recipe.principles, batch=self.judge)


def ours(path: Path, folder: Path, profile: Profile, clock: _measure.Clock) -> dict[str, float]:
    """Runs the recipe; seconds of each stage."""
    recipe = load_recipe(path)
    seconds = {}
    for stage in recipe.stages:
        run = functools.partial(run_recipe, recipe, profile, folder, Options(until=stage), PlainDisplay())
        seconds[stage] = clock.timed(run).seconds
    return seconds


def warm(folder: Path, profile: Profile) -> None:
    """What only a first run pays: imports, here and where processes are forked, and an engine's first answers."""
    import matplotlib.pyplot  # noqa: F401
    import scipy.stats  # noqa: F401
    import trl  # noqa: F401

    import cai.stages.compare
    import cai.training.trainers  # noqa: F401

    with open_engine(resolve("micro", folder=folder), load_profile("cpu")) as engine:
        messages: list[Message] = [{"role": "user", "content": "Hello."}]
        list(engine.generate([Request("first", messages, seed=0, sampling=Sampling(4))]))
        list(engine.choose([Question("first", messages)]))
    few = folder / "few"
    few.mkdir()
    recipe = load_recipe(recipe_file(few, quick=True))
    run_recipe(recipe, profile, few / "run", Options(until="responses"), PlainDisplay())


def questions(rows: Sequence[Mapping[str, Any]]) -> int:
    """How many were put to the judge."""
    return sum(len(row.get("votes", ())) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _measure.add_options(parser)
    add_options(parser)
    given = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    clock = _measure.clock_of(parser, given)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = recipe_file(folder, given.quick, without={"reward"})
        plain.quiet()
        profile = load_profile(given.on)
        warm(folder, profile)
        our_seconds = ours(path, folder / "run", profile, clock)
        torch.manual_seed(0)
        other = Plain(plain.read(path), folder / "run")
        other.tune(clock)
        ways: dict[str, Callable[[], object]] = {stage: getattr(other, stage) for stage in STAGES}
        plain_seconds = {stage: clock.timed(way).seconds for stage, way in ways.items()}
        sizes = {
            "responses": len(other.rows("responses")), "revisions": len(other.rows("revisions")),
            "candidates": len(other.rows("candidates")), "questions": questions(other.rows("votes")),
            "comparison_responses": 3 * len(plain.asked(other.recipe, "comparison")),
            "comparison_questions": questions(other.rows("comparison")),
        }  # fmt: skip
    stages = {
        stage: {
            "ours": round(our_seconds[stage], 2), "plain": round(plain_seconds[stage], 2),
            "ratio": round(plain_seconds[stage] / our_seconds[stage], 2),
        }
        for stage in STAGES
    }  # fmt: skip
    for stage, each in stages.items():
        print(f"{stage:12} {each['ours']:8.1f} s, plain {each['plain']:8.1f} s: {each['ratio']:.2f} times")
    result = _measure.result(
        "feedback", sum(our_seconds[stage] for stage in STAGES), sum(plain_seconds.values()), "seconds", sizes,
        PACKAGES, clock=clock.name, profile=given.on, stages=stages, batch={"write": other.write, "judge": other.judge},
    )  # fmt: skip
    print(f"{'all':12} {result['ours']:8.1f} s, plain {result['plain']:8.1f} s: {result['ratio']:.2f} times")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
