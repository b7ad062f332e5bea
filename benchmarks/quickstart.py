"""Measures how long the recipe quickstart takes: sample, revise, SL-CAI, sample, judge, reward model, DPO, compare.

    python benchmarks/quickstart.py            recipes/quickstart.yaml
    python benchmarks/quickstart.py --quick    the same with 16 prompts of each set

Ours is `cai run --on cpu-2-cores` in a new folder (with `--on cpu` all stages run in one process). Plain is plain.py
with the same prompts, number of samples, questions and epochs, in one process with all cores. Both run once on the CPU,
one after the other, and imports count. Ours also writes its journal, digests, intervals and page in its seconds. The
last line is one JSON object; times are in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

import yaml

from benchmarks.support import measurement
from cai.storage.files import read_json

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
PROFILE = "cpu-2-cores"
PROMPTS = 16
"""Prompts of each set with --quick."""
ON_THE_CPU = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
PACKAGES = ("torch", "transformers", "trl", "accelerate")


def recipe_file(folder: Path, quick: bool, without: Collection[str] = ()) -> Path:
    """Writes the recipe to `folder`, without some of its stages and if `quick` with few prompts; returns its path."""
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    recipe["constitution"] = str((RECIPE.parent / recipe["constitution"]).resolve())
    recipe["stages"] = [stage for stage in recipe["stages"] if stage["id"] not in without]
    if quick:
        for prompt_set in recipe["prompts"].values():
            prompt_set["limit"] = PROMPTS
    path = folder / RECIPE.name
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def run_ours(recipe: Path, folder: Path, profile: str) -> dict[str, float]:
    """Runs our side; seconds of each stage."""
    command = [sys.executable, "-c", "from cai.cli import main; main()", "run", str(recipe), "--runs", str(folder)]
    command += ["--on", profile]
    subprocess.run(command, stdout=sys.stderr, env=ON_THE_CPU, check=True)
    run = folder / "quickstart"
    latest = read_json(run / "latest.json") or {}
    return sum_parts({id: (read_json(run / name / "stage.json") or {})["seconds"] for id, name in latest.items()})


def sum_parts(seconds_by_id: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each stage of the recipe file: the parts of a stage have its id, a dot and a name of their own."""
    seconds: dict[str, float] = {}
    for id, part_seconds in seconds_by_id.items():
        stage = id.partition(".")[0]
        seconds[stage] = seconds.get(stage, 0.0) + part_seconds
    return seconds


def run_plain(recipe: Path) -> dict[str, float]:
    """Runs plain.py; seconds of each stage."""
    command = [sys.executable, str(Path(__file__).with_name("plain.py")), str(recipe)]
    seconds: dict[str, float] = measurement.run_for_json(command, ON_THE_CPU)["seconds"]
    return seconds


def add_profile_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option that this benchmark and feedback.py share."""
    parser.add_argument("--on", metavar="PROFILE", default=PROFILE, help=f"of our side; {PROFILE}")


def main() -> None:
    parser = measurement.argument_parser(__doc__)
    add_profile_option(parser)
    arguments = parser.parse_args()
    clock = measurement.clock_of(parser, arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = recipe_file(folder, arguments.quick)
        our_run = clock.timed(lambda: run_ours(recipe, folder / "runs", arguments.on))
        plain_run = clock.timed(lambda: run_plain(recipe))
    ours, plain = our_run.returned, plain_run.returned
    wall_seconds = {stage: {"ours": ours[stage], "plain": plain[stage]} for stage in plain}
    for stage, seconds in wall_seconds.items():
        print(f"{stage:12} {seconds['ours']:8.1f} s, plain {seconds['plain']:8.1f} s")
    print(f"{'all':12} {our_run.seconds:8.1f} s, plain {plain_run.seconds:8.1f} s, imports included ({clock.name})")
    sizes = {"prompts_of_each_set": PROMPTS if arguments.quick else None, "stages": len(wall_seconds)}
    result = measurement.result(
        "quickstart", our_run.seconds, plain_run.seconds, "seconds", sizes, PACKAGES, clock=clock.name,
        profile=arguments.on, stages_wall_seconds=wall_seconds,
    )  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
