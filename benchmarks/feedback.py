"""Measures how long the feedback stages of the recipe quickstart take: all that is sampled, revised and judged.

    python benchmarks/feedback.py            recipes/quickstart.yaml
    python benchmarks/feedback.py --quick    the same with 16 prompts of each set

Ours are the stages of a run, journal and figures included. Plain gets the same items through the functions of plain.py:
the same prompts, the responses that ours revised, the pairs that ours judged, under the same principles in both orders.
SL-CAI and the policy are trained once, by ours, and not timed; plain samples from the same checkpoints. Responses are
sampled anew, so that the two sides generate somewhat different numbers of tokens.

Ours runs in two processes of one thread each (with `--on cpu` in one), plain in one process with all cores. Everything
runs on the CPU; imports do not count, loading models does. Batch sizes of plain are the fastest of several on a part of
the items. Each stage runs once; choose.py and generate.py repeat what the stages consist of. The last line is one JSON
object; times are in seconds.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import plain
from benchmarks.quickstart import PACKAGES, add_profile_option, recipe_file, sum_parts
from benchmarks.support import measurement
from cai.contracts.engine import Question, Request, Sampling
from cai.contracts.profile import Profile, load_profile
from cai.engines import open_engine
from cai.models.reference import MICRO, resolve
from cai.run.pipeline import run_recipe
from cai.run.plan import Options
from cai.run.recipe import load_recipe
from cai.storage import run_folder
from cai.storage.journal import RECORDS
from cai.storage.rows import Message, read_rows
from cai.text.progress import PlainDisplay

STAGES = ("responses", "revisions", "candidates", "votes", "comparison")
WRITE = (32, 64, 128, 256)
JUDGE = (8, 16, 32, 64)
"""Batch sizes of plain; all are tried."""


class Plain:
    """The plain side: a method for each stage, on the items of our run. Models are loaded on first use."""

    def __init__(self, recipe: plain.Recipe, run: Path) -> None:
        self.recipe = recipe
        self.run = run
        self.write, self.judge = plain.WRITE, plain.JUDGE
        self._lms: dict[str, plain.Lm] = {}

    def lm(self, name: str) -> plain.Lm:
        """The embedded model if the name is `base`, else the model that the stage of this name trained."""
        if name not in self._lms:
            folder = MICRO if name == "base" else run_folder.latest(self.run)[name] / run_folder.MODEL
            self._lms[name] = plain.load(folder)
        return self._lms[name]

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """The records of a stage of our run, or of its parts."""
        latest = run_folder.latest(self.run)
        files = [folder / RECORDS for id, folder in latest.items() if id == stage or id.startswith(f"{stage}.")]
        return [row for file in files if file.exists() for row in read_rows(file)]

    def tune(self, clock: measurement.Clock) -> None:
        """Finds the fastest batch sizes on some of the responses and votes."""
        settings = plain.settings_of(self.recipe.stages["responses"])
        requests = plain.prompts_of(self.recipe, "responses")[: max(WRITE)]
        sizes = [size for size in WRITE if size <= len(requests)] or [len(requests)]
        self.write = clock.fastest(sizes, lambda size: plain.sample(self.lm("base"), requests, settings, batch=size))
        pairs = self.pairs("votes")[:16]
        principles = self.recipe.principles
        self.judge = clock.fastest(JUDGE, lambda size: plain.judge(self.lm("base"), pairs, principles, batch=size))
        self._lms.clear()

    def sample(self, stage: str, model: str) -> list[plain.Response]:
        """Responses of a model to a stage's prompts."""
        settings = self.recipe.stages[stage]
        prompts, sampling = plain.prompts_of(self.recipe, stage), plain.settings_of(settings)
        return plain.sample(self.lm(model), prompts, sampling, n=settings.get("n", 1), batch=self.write)

    def pairs(self, stage: str) -> list[plain.Pair]:
        """The pairs of different texts that ours judged."""
        return [
            plain.Pair(row["prompt"], row["tags"], row["a"]["text"], row["b"]["text"])
            for row in self.rows(stage)
            if "votes" in row and row["a"]["text"] != row["b"]["text"]
        ]

    def responses(self) -> object:
        return self.sample("responses", "base")

    def revisions(self) -> object:
        stage = self.recipe.stages["revisions"]
        revised = [
            plain.Response(row["prompt"], row["tags"], row["response"], True)
            for row in self.rows("responses")
            if set(stage["only"]) & set(row["tags"])
        ]
        settings, rounds = plain.settings_of(stage), stage["rounds"]
        return plain.revise(self.lm("base"), revised, self.recipe.principles, settings, rounds=rounds, batch=self.write)

    def candidates(self) -> object:
        return self.sample("candidates", "sl-cai")

    def votes(self) -> object:
        return plain.judge(self.lm("base"), self.pairs("votes"), self.recipe.principles, batch=self.judge)

    def comparison(self) -> object:
        for model in ("base", "sl-cai", "policy"):
            self.sample("comparison", model)
        return plain.judge(self.lm("base"), self.pairs("comparison"), self.recipe.principles, batch=self.judge)


def run_ours(path: Path, folder: Path, profile: Profile, clock: measurement.Clock) -> dict[str, float]:
    """Runs the recipe; seconds of each stage."""
    recipe = load_recipe(path)
    seconds = {}
    for stage in recipe.stages:
        run = functools.partial(run_recipe, recipe, profile, folder, Options(until=stage), PlainDisplay())
        seconds[stage] = clock.timed(run).seconds
    return sum_parts(seconds)


def warm(folder: Path, profile: Profile) -> None:
    """Does what only a first run needs: imports, which forked processes then share, and an engine's first answers."""
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
    parser = measurement.argument_parser(__doc__)
    add_profile_option(parser)
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    clock = measurement.clock_of(parser, arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = recipe_file(folder, arguments.quick, without={"reward"})
        plain.silence_libraries()
        profile = load_profile(arguments.on)
        warm(folder, profile)
        our_seconds = run_ours(path, folder / "run", profile, clock)
        torch.manual_seed(0)
        plain_side = Plain(plain.read_recipe(path), folder / "run")
        plain_side.tune(clock)
        plain_stages: dict[str, Callable[[], object]] = {stage: getattr(plain_side, stage) for stage in STAGES}
        plain_seconds = {stage: clock.timed(run).seconds for stage, run in plain_stages.items()}
        sizes = {
            "responses": len(plain_side.rows("responses")), "revisions": len(plain_side.rows("revisions")),
            "candidates": len(plain_side.rows("candidates")), "questions": questions(plain_side.rows("votes")),
            "comparison_responses": 3 * len(plain.prompts_of(plain_side.recipe, "comparison")),
            "comparison_questions": questions(plain_side.rows("comparison")),
        }  # fmt: skip
    stages = {
        stage: {
            "ours": round(our_seconds[stage], 2), "plain": round(plain_seconds[stage], 2),
            "ratio": round(plain_seconds[stage] / our_seconds[stage], 2),
        }
        for stage in STAGES
    }  # fmt: skip
    for stage, of_stage in stages.items():
        print(f"{stage:12} {of_stage['ours']:8.1f} s, plain {of_stage['plain']:8.1f} s: {of_stage['ratio']:.2f} times")
    result = measurement.result(
        "feedback", sum(our_seconds[stage] for stage in STAGES), sum(plain_seconds.values()), "seconds", sizes,
        PACKAGES, clock=clock.name, profile=arguments.on, stages=stages,
        batch={"write": plain_side.write, "judge": plain_side.judge},
    )  # fmt: skip
    print(f"{'all':12} {result['ours']:8.1f} s, plain {result['plain']:8.1f} s: {result['ratio']:.2f} times")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
