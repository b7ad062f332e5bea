"""Runs a recipe: each stage after what it needs, reused where nothing that it depends on has changed.

A stage works in a folder named by its fingerprint. What it writes counts once DONE lies beside it; until then the same
command goes on where it was stopped. Stages run in this process on a CPU with one process, and in processes of their
own otherwise. What is to be done is decided in `cai.run.plan`, and what lies on disk is described in
`cai.storage.run_folder`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import os
import platform
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cai import engines
from cai.contracts.context import Context
from cai.contracts.model import SERVED
from cai.contracts.profile import Profile
from cai.contracts.stage_config import StageConfig
from cai.contracts.training_config import ReinforcementConfig, TrainingConfig
from cai.run.launch import Spec, begin_importing, launch
from cai.run.outputs import output_digest
from cai.run.plan import Planner, Step
from cai.run.recipe import Recipe, inputs_of, models_of, needs, prompt_sets_of
from cai.stages import run_function
from cai.storage import run_folder, stopping
from cai.storage.files import read_json, remove, write_json
from cai.storage.journal import Journal, reopen
from cai.storage.rows import stable_seed
from cai.text.errors import BadInput, CaiError, StageFailed, nearest
from cai.text.progress import Display, StageLine

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "deepspeed")


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


def plan_recipe(recipe: Recipe, profile: Profile, run: Path, options: Options) -> list[Step]:
    """What would be done about every stage, without doing any of it."""
    planner = Planner(recipe, run, profile.offline)
    planner.check_prompts()
    again = _redone(recipe, options)
    done: dict[str, run_folder.Finished] = {}
    steps = []
    for config in _selected(recipe, options, profile):
        step = planner.step(config, done)
        if step.folder and config.id in again:
            step = replace(step, status="runs", reason=again[config.id], done=None)
        elif step.done and options.retry_failures and (failures := run_folder.n_failures(step.done.folder)):
            step = replace(step, status="continues", reason=f"{failures} failed items are asked again", done=None)
        if step.done:
            done[config.id] = step.done
        steps.append(step)
    return steps


def run_recipe(recipe: Recipe, profile: Profile, run: Path, options: Options, display: Display) -> dict[str, Any]:
    """Runs what has to run. Returns the run's summary, which is on disk after every stage.

    Raises BadInput before anything runs, StageFailed where a stage could not finish, KeyboardInterrupt when stopped.
    """
    configs = _selected(recipe, options, profile)
    again = _redone(recipe, options)
    prepare(profile)
    if profile.fork and not (run / run_folder.SUMMARY).exists():  # where one is, nothing may have to run
        begin_importing()
    with run_folder.locked(run), stopping.terminable(), display:
        planner = Planner(recipe, run, profile.offline)
        planner.check_prompts()
        for note in planner.notes:
            display.say(note)
        before = (read_json(run / run_folder.RUN) or {}).get("recipe")
        if before not in {None, str(recipe.path.resolve())}:
            display.say(f"{run}: {before} ran here before under the same name, {recipe.name}; the two share the folder")
        write_json(
            run / run_folder.RUN,
            {
                "recipe": str(recipe.path.resolve()),
                "name": recipe.name,
                "overrides": list(recipe.overrides),
                "profile": profile.name,
                "stages": [config.id for config in recipe.stages.values()],
            },
        )
        done: dict[str, run_folder.Finished] = {}
        reused: list[str] = []
        for config in configs:
            step = planner.step(config, done)
            assert step.folder is not None, "what it needs is done"
            folder = step.folder
            if config.id in again:
                remove(folder)
                step = replace(step, done=None)
            elif step.done and options.retry_failures and reopen(folder):
                (folder / run_folder.DONE).unlink()
                step = replace(step, done=None)
            if step.done:
                reused.append(config.id)
            else:
                _say_reused(display, reused)
            done[config.id] = step.done or _run(planner, step, profile, done, options.report_to, display)
            run_folder.set_latest(run, config.id, folder)
            if step.done is None or config is configs[-1]:
                summary = _summary(recipe, run, _current(planner, done))
                write_json(run / run_folder.SUMMARY, summary)
            stopping.check()
        _say_reused(display, reused)
    return summary


def run_stage_in_child(
    recipe: Recipe,
    profile: Profile,
    run: Path,
    stage: str,
    journal: Journal,
    line: StageLine,
    report_to: tuple[str, ...],
) -> dict[str, Any]:
    """One stage, in a process that `cai.run.launch` started, on the outputs that stand in latest.json.

    Raises ShareDone, of a feedback stage, on any rank but 0.
    """
    prepare(profile)
    planner = Planner(recipe, run, profile.offline)
    config = recipe.stages[stage]
    latest = run_folder.latest(run)
    done = {name: found for name in needs(config, set(recipe.stages)) if (found := run_folder.finished(latest[name]))}
    step = planner.step(config, done)
    if step.folder is None or step.folder.name != journal.folder.name:
        raise StageFailed(f"stage {stage!r}: the recipe, or what it reads, changed while it was running; run it again")
    return _work(planner, step, profile, done, report_to, line, journal)


def _selected(recipe: Recipe, options: Options, profile: Profile) -> list[StageConfig]:
    """The stages up to the last one wanted. Raises BadInput where the profile cannot train one."""
    ids = list(recipe.stages)
    for option, name in (("--until", options.until), ("--from", options.redo_from)):
        if name is not None and name not in ids:
            raise BadInput(f"{option} {name}: no such stage, expected one of {', '.join(ids)}{nearest(name, ids)}")
    last = ids.index(options.until) if options.until else len(ids) - 1
    configs = list(recipe.stages.values())[: last + 1]
    for config in configs:
        if isinstance(config, TrainingConfig):
            profile.accumulation(config.batch_size)
        if isinstance(config, ReinforcementConfig):
            profile.check_rollouts(config.id)
            _check_judges(config, profile)
    return configs


def _check_judges(config: ReinforcementConfig, profile: Profile) -> None:
    """Refuses a judge as a reward that each of several processes would start a vLLM of its own for."""
    judges = [each.judge for each in config.rewards if each.judge and not each.judge.startswith(SERVED)]
    if judges and profile.engine == "vllm" and profile.processes > 1:
        raise BadInput(
            f"stage {config.id!r}: each of the {profile.processes} processes of profile {profile.name!r} would start "
            f"vLLM for the judge {judges[0]!r} among its rewards, on the GPUs that learn; use a profile with another "
            f"engine, or a judge `{SERVED}NAME`"
        )


def _redone(recipe: Recipe, options: Options) -> dict[str, str]:
    """The stages that run again whatever lies on disk, and why."""
    again: dict[str, str] = {}
    for config in recipe.stages.values():
        if config.id == options.redo_from:
            again[config.id] = "asked for with --from"
        elif above := [name for name in needs(config, set(recipe.stages)) if name in again]:
            again[config.id] = f"because {above[0]} runs again"
    return again


def _run(
    planner: Planner,
    step: Step,
    profile: Profile,
    done: Mapping[str, run_folder.Finished],
    report_to: tuple[str, ...],
    display: Display,
) -> run_folder.Finished:
    """One stage from its start, or from where it was stopped, to its DONE."""
    folder = step.folder
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    facts = _facts(planner, step, profile, done)
    write_json(folder / run_folder.STAGE, facts)
    line = display.begin(step.id)
    journal = Journal(folder, line)
    began = time.monotonic()
    trains = isinstance(step.config, TrainingConfig)
    try:
        with stopping.after_step(folder) if trains else contextlib.nullcontext():
            if profile.inline:
                figures = _work(planner, step, profile, done, report_to, line, journal)
            else:
                spec = Spec(
                    str(planner.recipe.path),
                    list(planner.recipe.overrides),
                    str(planner.run),
                    step.id,
                    str(folder),
                    profile.model_dump(mode="json"),
                    list(report_to),
                    os.getpid(),
                )
                figures = launch(spec, profile, line, step.config)
    except CaiError as error:
        raise _named(error, step.id) from error
    failures = run_folder.n_failures(folder)
    write_json(
        folder / run_folder.STAGE,
        {
            **facts,
            "ended": _now(),
            "seconds": round(time.monotonic() - began, 2),
            "tokens": max(line.tokens, journal.tokens),
            "failures": failures,
            "figures": figures,
        },
    )
    finished = run_folder.mark_done(folder, output_digest(folder, figures, profile.offline))
    journal.discard()
    display.end(line, failures)
    return finished


def _work(
    planner: Planner,
    step: Step,
    profile: Profile,
    done: Mapping[str, run_folder.Finished],
    report_to: tuple[str, ...],
    line: StageLine,
    journal: Journal,
) -> dict[str, Any]:
    """Calls the stage, in this process, with the state that a fresh one has."""
    config, recipe = step.config, planner.recipe
    assert step.folder is not None
    context = Context(
        stage_id=config.id,
        folder=step.folder,
        seed=recipe.seed,
        profile=profile,
        progress=line,
        journal=journal,
        constitution=recipe.constitution,
        inputs={name: done[name].folder for name in inputs_of(config)},
        prompt_sets={name: planner.prompts(name) for name in prompt_sets_of(config)},
        models={
            "": recipe.models[recipe.model],
            **{name: planner.model(name, done) for name in models_of(config).values()},
        },
        open_engine=engines.open_engine,
        report_to=report_to,
        home=recipe.folder,
    )
    _reset_randomness(stable_seed(recipe.seed, config.id, "stage") % 2**32, isinstance(config, TrainingConfig))
    try:
        return run_function(config.kind)(config, context)
    finally:
        if isinstance(config, TrainingConfig):
            gc.collect()  # a trainer and its model hold each other; they go before the next stage loads its own


def _facts(planner: Planner, step: Step, profile: Profile, done: Mapping[str, run_folder.Finished]) -> dict[str, Any]:
    """What is known of a stage before it runs."""
    config = step.config
    return {
        "id": config.id,
        "kind": config.kind,
        "gives": config.gives,
        "config": config.model_dump(mode="json", by_alias=True),
        "seed": planner.recipe.seed,
        "inputs": {
            name: {"folder": done[name].folder.name, "digest": done[name].digest} for name in needs(config, done)
        },
        "parts": step.parts,
        "profile": profile.model_dump(mode="json"),
        "versions": _versions(),
        "host": {"machine": platform.machine(), "system": platform.platform(), "cores": os.cpu_count()},
        "began": _now(),
    }


def _current(planner: Planner, done: Mapping[str, run_folder.Finished]) -> dict[str, run_folder.Finished]:
    """The stages that are done, and later ones of an earlier run that still hold: a part run hides none of them."""
    current: dict[str, run_folder.Finished] = {}
    for config in planner.recipe.stages.values():
        if found := done.get(config.id) or planner.step(config, current).done:
            current[config.id] = found
    return current


def _summary(recipe: Recipe, run: Path, done: Mapping[str, run_folder.Finished]) -> dict[str, Any]:
    """The figures of all stages that are done, merged by key, with how long each took and what failed."""
    summary: dict[str, Any] = {"recipe": recipe.name, "run": str(run), "stages": {}, "seconds": {}, "failures": {}}
    for name, stage in done.items():
        facts = stage.facts
        run_folder.merged(summary, facts.get("figures", {}))
        summary["stages"][name] = stage.folder.name
        summary["seconds"][name] = facts.get("seconds")
        summary["failures"][name] = facts.get("failures", 0)
    return summary


def _named(error: CaiError, stage: str) -> CaiError:
    """The error with the stage's name in front, where it does not name it already."""
    message = str(error)
    return type(error)(message if stage in message else f"stage {stage!r}: {message}")


def _say_reused(display: Display, reused: list[str]) -> None:
    if reused:
        display.say(f"reused: {', '.join(reused)}")
        reused.clear()


def prepare(profile: Profile) -> None:
    """Sets what libraries read when they are first imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not profile.uses_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed, where installed, warns that it had to guess
    elif os.environ.get("DS_ACCELERATOR") == "cpu":  # an earlier run of this process, on the CPU
        del os.environ["DS_ACCELERATOR"]
    if profile.offline:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if profile.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(profile.threads)
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(profile.threads)


def _reset_randomness(seed: int, training: bool) -> None:
    """Every stage begins with the same global random state, whichever stages ran before it in this process."""
    random.seed(seed)
    if "numpy" in sys.modules or training:
        import numpy

        numpy.random.seed(seed)
    if "torch" in sys.modules or training:
        import torch

        torch.manual_seed(seed)


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("cai", *PACKAGES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
