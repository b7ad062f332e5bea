"""Says before a run begins which stages do not fit into this machine's memory.

The sheet (`cai.run.memory_sheet`) needs torch, which the process of `cai run` does without. So it is computed in a
process of its own, `python -m cai.run.memory_warning FILE`, which reads JSON from stdin and writes its answer into the
file. A sheet is an estimate: what `cai plan` exits with 1 for is only said here.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cai.contracts.model import Model
from cai.contracts.profile import Profile
from cai.run.plan import Options, plan_recipe
from cai.run.recipe import Recipe, load_recipe
from cai.storage.files import write_json

TIMEOUT_SECONDS = 120.0
"""After which the run begins without the sheet."""
SMALL = 100_000_000
"""Bytes of weights with which a model trains within a few gigabytes; its runs do not wait for a sheet."""


def memory_warnings(recipe: Recipe, profile: Profile, run: Path, options: Options) -> list[str]:
    """A sentence for each stage that would run and does not fit; none for models so small that they fit anywhere."""
    if all(_is_small(model) for model in recipe.models.values()):
        return []
    stages = [step.id for step in plan_recipe(recipe, profile, run, options) if step.status != "reused"]
    if not stages:
        return []
    facts = {
        "recipe": str(recipe.path),
        "overrides": list(recipe.overrides),
        "profile": profile.model_dump(mode="json"),
        "runs": str(run.parent),
        "stages": stages,
    }
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "sheet.json"
        command = [sys.executable, "-m", "cai.run.memory_warning", str(answer)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, input=json.dumps(facts), capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        if not answer.exists():
            return ["what the stages take in memory could not be computed; `cai plan` says why"]
        return [f"{stage['stage']} may not fit: it {stage['remedy']}" for stage in json.loads(answer.read_text())]


def _is_small(model: Model) -> bool:
    """Whether the model is at a server, or a folder here whose weights are few."""
    if model.served:
        return True
    folder = Path(model.path)
    return folder.is_absolute() and sum(file.stat().st_size for file in folder.glob("*.safetensors")) < SMALL


def main(answer: Path) -> None:
    """Reads what `memory_warnings` gives, and writes the sheets of the stages that do not fit."""
    from cai.run.memory_sheet import describe_machine, memory_sheet, sheet_json
    from cai.run.stage_run import prepare

    facts: dict[str, Any] = json.load(sys.stdin)
    profile = Profile.model_validate(facts["profile"])
    prepare(profile)
    recipe = load_recipe(facts["recipe"], facts["overrides"], Path(facts["runs"]))
    machine = describe_machine(profile, Path(facts["runs"]), None, None, None)
    sheets = memory_sheet(recipe, profile, machine, stages=[recipe.stages[stage_id] for stage_id in facts["stages"]])
    write_json(answer, [stage for stage in sheet_json(sheets) if not stage["fits"]])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
