"""What would run, what is reused, and why.

Whether a stage is reused, begun, continued or waits is decided here alone, for the dry run and the run alike: by its
fingerprint (`cai.run.fingerprint`), by what lies in its folder, and by the options of this run. Opening an engine, and
torch, are left out.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import platform
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import cai
from cai.constitution import Constitution
from cai.contracts.earlier import Earlier
from cai.contracts.model import SERVED
from cai.contracts.profile import Profile
from cai.contracts.stage_config import StageConfig
from cai.contracts.training_config import ReinforcementConfig, TrainingConfig
from cai.run.earlier import earlier_results
from cai.run.fingerprint import Fingerprints, Parts, changes_in_words, first_few
from cai.run.model_checks import check_models
from cai.run.outputs import changed_outputs
from cai.run.prompt_checks import check_prompts
from cai.run.recipe import Recipe
from cai.run.recipe_names import needs
from cai.storage import run_folder
from cai.storage.files import read_json
from cai.storage.journal import PLAN, count_items, is_of_earlier_version
from cai.storage.rows import stable_id
from cai.text.errors import BadInput, did_you_mean

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "deepspeed")
"""Libraries whose versions are recorded with a stage's outputs."""


@dataclass(frozen=True)
class Options:
    """How a recipe is run this time."""

    until: str | None = None
    """The last stage to run."""
    redo_from: str | None = None
    """This stage and all that depends on it run again."""
    retry_failures: bool = False
    """Stages with failed items are reopened."""
    report_to: tuple[str, ...] = ()
    """Trackers that trainers report to."""


@dataclass(frozen=True)
class Step:
    """What is to be done about one stage. `folder` is None while a stage that it needs has yet to run."""

    config: StageConfig
    status: Literal["reused", "runs", "continues", "waits"]
    reason: str
    folder: Path | None = None
    parts: Parts = field(default_factory=dict)
    done: run_folder.Finished | None = None
    """The stage's outputs where they are reused."""
    removes: bool = False
    """Whether what lies in the folder is removed first."""
    reopens: bool = False
    """Whether failed items of a finished stage are asked again."""
    earlier: tuple[Earlier, ...] = ()
    """Folders from which unchanged items are taken over."""

    @property
    def id(self) -> str:
        """The stage's id."""
        return self.config.id


def plan_recipe(recipe: Recipe, profile: Profile, run: Path, options: Options) -> list[Step]:
    """What would be done about every stage, without doing any of it. Raises BadInput where a run would, before it."""
    configs = selected_stages(recipe, options, profile)
    check_models(recipe, profile, configs, run.parent)
    planner = Planner(recipe, run, profile.offline, options)
    check_prompts(recipe, planner.fingerprints.prompts)
    done: dict[str, run_folder.Finished] = {}
    steps = []
    for config in configs:
        step = planner.step(config, done)
        if step.done:
            done[config.id] = step.done
        steps.append(step)
    return steps


def selected_stages(
    recipe: Recipe, options: Options, profile: Profile, *, on_this_machine: bool = True
) -> list[StageConfig]:
    """The stages up to the last one wanted. Raises BadInput where the profile, or this machine, cannot train one."""
    ids = list(recipe.stages)
    names = list(dict.fromkeys([*ids, *recipe.composites]))
    for option, name in (("--until", options.until), ("--from", options.redo_from)):
        if name is not None and name not in names:
            expected = f"expected one of {', '.join(names)}{did_you_mean(name, names)}"
            raise BadInput(f"{option} {name}: no such stage, {expected}")
    last = max(ids.index(part) for part in recipe.parts_of(options.until)) if options.until else len(ids) - 1
    configs = list(recipe.stages.values())[: last + 1]
    for config in configs:
        if isinstance(config, TrainingConfig):
            profile.accumulation(config.batch_size)
            if config.quantises_base:
                is_sampled = isinstance(config, ReinforcementConfig)
                profile.check_quantised_base(config.id, is_sampled=is_sampled, on_this_machine=on_this_machine)
        if isinstance(config, ReinforcementConfig):
            profile.check_rollouts(config.id)
            _check_judges(config, profile)
    return configs


class Planner:
    """Decides about the stages of one recipe by what lies in the folder of its run."""

    def __init__(self, recipe: Recipe, run: Path, offline: bool = True, options: Options | None = None) -> None:
        self.recipe = recipe
        self.run = run
        self.options = options or Options()
        self.fingerprints = Fingerprints(recipe, offline)
        self._latest = run_folder.latest(run)
        self._redone = _redone(recipe, self.options)

    def under(self, constitution: Constitution) -> Planner:
        """The same with another constitution in the recipe; prompt sets and models stay read."""
        planner = copy.copy(self)
        planner.recipe = replace(self.recipe, constitution=constitution)
        planner.fingerprints = copy.copy(self.fingerprints)
        planner.fingerprints.recipe = planner.recipe
        return planner

    def step(self, config: StageConfig, done: Mapping[str, run_folder.Finished]) -> Step:
        """What is to be done about a stage, given the stages that are done: the one decision of dry run and run."""
        missing = [name for name in needs(config, set(self.recipe.stages)) if name not in done]
        if missing:
            return Step(config, "waits", f"because {' and '.join(missing)} would run")
        parts = self.fingerprints.parts(config, done)
        folder = self.run / f"{config.id}-{stable_id(parts)}"
        if config.id in self._redone:
            return Step(config, "runs", self._redone[config.id], folder, parts, removes=True)
        if finished := run_folder.finished(folder):
            if changed := changed_outputs(finished):
                return Step(config, "runs", first_few(changed), folder, parts, removes=True)
            n_failures = run_folder.n_failures(folder)
            if self.options.retry_failures and n_failures and (folder / PLAN).exists():
                if is_of_earlier_version(folder):
                    raise BadInput(
                        f"stage {config.id!r}: {folder} is of an earlier version of cai, whose failed items cannot be "
                        f"asked again alone; run with `--from {config.id}` to compute the stage anew"
                    )
                reason = f"{n_failures} failed items are asked again"
                return Step(config, "continues", reason, folder, parts, reopens=True)
            return Step(config, "reused", _other_versions(finished), folder, parts, finished)
        if is_of_earlier_version(folder):
            reason = "what is on disk of it is of an earlier version of cai, and cannot be continued"
            return Step(config, "runs", reason, folder, parts, removes=True)
        earlier = earlier_results(self.run, config, parts, folder)
        if (count := count_items(folder)) and count.n_finished:
            return Step(config, "continues", str(count), folder, parts, earlier=earlier)
        if (folder / run_folder.STAGE).exists():
            return Step(config, "runs", "it did not come to its end", folder, parts, earlier=earlier)
        reason = self._reason_to_run(config, parts)
        if earlier:
            reason += "; what is unchanged is taken over"
        return Step(config, "runs", reason, folder, parts, earlier=earlier)

    def changed_settings(self, config: StageConfig, parts: Parts) -> str:
        """What of the stage's own settings differs from its latest folder, in words; empty where only outputs differ
        that it reads."""
        read = needs(config, set(self.recipe.stages))
        outputs = {f"{kind}.{name}" for kind in ("input", "failures", "model") for name in read}
        return self._changes(config, parts, outputs) or ""

    def _reason_to_run(self, config: StageConfig, parts: Parts) -> str:
        """What differs from the stage's latest folder, in words."""
        changes = self._changes(config, parts)
        return "it has not run yet" if changes is None else changes or "it was removed"

    def _changes(self, config: StageConfig, parts: Parts, passed_over: Collection[str] = ()) -> str | None:
        """The parts that differ from the stage's latest folder, in words; None where it has none."""
        folder = self._latest.get(config.id)
        before = (read_json(folder / run_folder.STAGE) or {}).get("parts") if folder else None
        if before is None:
            return None
        changed = {name for name in {*before, *parts} - {*passed_over} if before.get(name) != parts.get(name)}
        return "; ".join(changes_in_words(changed, before, parts))


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions that are recorded with a stage's outputs."""
    versions = {"cai": cai.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _redone(recipe: Recipe, options: Options) -> dict[str, str]:
    """The stages that run again whatever lies on disk, and why."""
    reasons: dict[str, str] = {}
    asked_for = recipe.parts_of(options.redo_from) if options.redo_from else []
    for config in recipe.stages.values():
        if config.id in asked_for:
            reasons[config.id] = "asked for with --from"
        elif above := [name for name in needs(config, set(recipe.stages)) if name in reasons]:
            reasons[config.id] = f"because {above[0]} runs again"
    return reasons


def _check_judges(config: ReinforcementConfig, profile: Profile) -> None:
    """Refuses a judge as a reward that each of several processes would start a vLLM of its own for."""
    judges = [reward.judge for reward in config.rewards if reward.judge and not reward.judge.startswith(SERVED)]
    if judges and profile.engine == "vllm" and profile.processes > 1:
        raise BadInput(
            f"stage {config.id!r}: each of the {profile.processes} processes of profile {profile.name!r} would start "
            f"vLLM for the judge {judges[0]!r} among its rewards, on the GPUs that learn; use a profile with another "
            f"engine, or a judge `{SERVED}NAME`"
        )


def _other_versions(finished: run_folder.Finished) -> str:
    """Which libraries made a stage's outputs in another version than the one here, in words."""
    before = finished.facts.get("versions", {})
    differing = [
        f"{name} {before[name]}, here {version}"
        for name, version in library_versions().items()
        if before.get(name, version) != version
    ]
    return f"made with {first_few(differing)}" if differing else ""
