"""How long the whole recipe quickstart takes: sample, revise, SL-CAI, sample, judge, reward model, DPO, compare.

    python benchmarks/quickstart.py            recipes/quickstart.yaml
    python benchmarks/quickstart.py --quick    the same with 16 prompts of each set

Ours is `cai run --on cpu-2-cores` in a fresh folder (`--on cpu`: all stages in one process), plain is `plain.py` with
the same prompts, number of samples, questions and epochs, in one process with all cores. Both on the CPU, imports
included, once, one after the other. What ours does beyond is in its seconds: journal, digests, intervals, the page.
The last line is one JSON object; times are in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import _measure
import yaml

from cai.storage.files import read_json

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
PROFILE = "cpu-2-cores"
PROMPTS = 16
"""Of each set, with --quick."""
ON_THE_CPU = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
PACKAGES = ("torch", "transformers", "trl", "accelerate")


def recipe_file(folder: Path, quick: bool, without: Collection[str] = ()) -> Path:
    """The recipe in `folder`, with few prompts where `quick`, without some of its stages."""
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    recipe["constitution"] = str((RECIPE.parent / recipe["constitution"]).resolve())
    recipe["stages"] = [stage for stage in recipe["stages"] if stage["id"] not in without]
    if quick:
        for wanted in recipe["prompts"].values():
            wanted["limit"] = PROMPTS
    path = folder / RECIPE.name
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def ours(recipe: Path, folder: Path, profile: str) -> dict[str, float]:
    """Seconds of each stage."""
    command = [sys.executable, "-c", "from cai.cli import main; main()", "run", str(recipe), "--runs", str(folder)]
    command += ["--on", profile]
    subprocess.run(command, stdout=sys.stderr, env=ON_THE_CPU, check=True)
    run = folder / "quickstart"
    latest = read_json(run / "latest.json") or {}
    return {stage: (read_json(run / name / "stage.json") or {})["seconds"] for stage, name in latest.items()}


def plain(recipe: Path) -> dict[str, float]:
    """Seconds of each stage."""
    command = [sys.executable, str(Path(__file__).with_name("plain.py")), str(recipe)]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=ON_THE_CPU, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found["seconds"]  # type: ignore[no-any-return]


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this benchmark and that of its feedback stages have beside the common options."""
    parser.add_argument("--on", metavar="PROFILE", default=PROFILE, help=f"of our side; {PROFILE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _measure.add_options(parser)
    add_options(parser)
    given = parser.parse_args()
    clock = _measure.clock_of(parser, given)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = recipe_file(folder, given.quick)
        our_run = clock.timed(lambda: ours(recipe, folder / "runs", given.on))
        plain_run = clock.timed(lambda: plain(recipe))
    wall_seconds = {
        stage: {"ours": our_run.returned[stage], "plain": plain_run.returned[stage]} for stage in plain_run.returned
    }
    for stage, each in wall_seconds.items():
        print(f"{stage:12} {each['ours']:8.1f} s, plain {each['plain']:8.1f} s")
    print(f"{'all':12} {our_run.seconds:8.1f} s, plain {plain_run.seconds:8.1f} s, imports included ({clock.name})")
    sizes = {"prompts_of_each_set": PROMPTS if given.quick else None, "stages": len(wall_seconds)}
    result = _measure.result(
        "quickstart",
        our_run.seconds,
        plain_run.seconds,
        "seconds",
        sizes,
        PACKAGES,
        clock=clock.name,
        profile=given.on,
        stages_wall_seconds=wall_seconds,
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
