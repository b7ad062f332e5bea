"""Runs and plans a recipe file on the CPU, with its runs in the folder `runs` beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cai.contracts.profile import Profile, load_profile
from cai.run.pipeline import run_recipe
from cai.run.plan import Options, plan_recipe
from cai.run.recipe import load_recipe
from cai.text.progress import PlainDisplay

CPU = load_profile("cpu")


def run(recipe: Path, *overrides: str, profile: Profile = CPU, runs: str = "runs", **options: Any) -> dict[str, Any]:
    """The summary of the run. `options` are those of `Options`."""
    loaded = load_recipe(recipe, overrides)
    return run_recipe(loaded, profile, recipe.parent / runs, Options(**options), PlainDisplay())


def plan(recipe: Path, *overrides: str, profile: Profile = CPU, **options: Any) -> dict[str, tuple[str, str]]:
    """(status, reason) of every stage, if the recipe ran."""
    steps = plan_recipe(load_recipe(recipe, overrides), profile, recipe.parent / "runs", Options(**options))
    return {step.id: (step.status, step.reason) for step in steps}


def reused(recipe: Path, *overrides: str, **options: Any) -> list[str]:
    """The stages that would not run again."""
    return [stage for stage, (status, _) in plan(recipe, *overrides, **options).items() if status == "reused"]
