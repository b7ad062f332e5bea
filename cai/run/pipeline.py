"""Runs a recipe: each stage in order, reused where nothing that it depends on has changed.

A stage runs in this process where the profile has a single CPU process, and in child processes otherwise
(`cai.run.launch`). Whether it is reused, run, continued or reopened is decided in `cai.run.plan`; what its function is
given is put together in `cai.run.stage_run`; `cai.storage.run_folder` describes what lies on disk.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cai.contracts.context import OpenEngine
from cai.contracts.profile import Profile
from cai.report.summary import Summary, summary_of
from cai.run.launch import begin_importing, launch
from cai.run.model_checks import check_models
from cai.run.outputs import outputs_of
from cai.run.plan import Options, Planner, Step, selected_stages
from cai.run.prompt_checks import check_prompts
from cai.run.recipe import Recipe
from cai.run.stage_process import Spec
from cai.run.stage_run import StageRun, now, prepare
from cai.storage import run_folder, stopping
from cai.storage.files import read_json, remove_folder, write_json
from cai.storage.journal import Journal, reopen
from cai.storage.refusals import refused_output
from cai.storage.stage_folders import OTHER_SETTINGS
from cai.text.errors import CaiError, OutOfMemory
from cai.text.progress import Display, StageLine, recorded
from cai.training.micro_batch import halve_micro_batch


def run_recipe(recipe: Recipe, profile: Profile, run: Path, options: Options, display: Display) -> Summary:
    """Runs the stages that are not reused. Returns the run's summary, which is written after every stage that ran.

    Raises BadInput, before anything runs, for a recipe that does not fit the profile, the models or the prompts;
    StageFailed where a stage could not finish; KeyboardInterrupt when stopped.
    """
    configs = selected_stages(recipe, options, profile)
    check_models(recipe, profile, configs, run.parent)
    prepare(profile)
    if profile.fork and not (run / run_folder.SUMMARY).exists():
        begin_importing()  # a run with a summary may reuse every stage, and then needs no imports
    title = f"{recipe.path.resolve()} with profile {profile.name!r}, process {os.getpid()}"
    with run_folder.locked(run), stopping.on_sigterm(), display, recorded(display, run / run_folder.LOG, title):
        planner = Planner(recipe, run, profile.offline, options)
        notes = check_prompts(recipe, planner.fingerprints.prompts)
        for note in [*recipe.notes, *planner.fingerprints.notes, *notes]:
            display.note(note)
        _record_run(recipe, profile, run, display)
        done: dict[str, run_folder.Finished] = {}
        reused: list[Step] = []
        _current(planner, done)  # its record is there too after a kill in the first stage
        for config in configs:
            step = planner.step(config, done)
            if step.done:
                reused.append(step)
                done[config.id] = step.done
            else:
                _say_reused(display, reused)
                done[config.id] = run_stage(StageRun(planner, step, done, profile, options.report_to), display)
            run_folder.set_latest(run, config.id, done[config.id].folder)
            if step.done is None or config is configs[-1]:
                summary = summary_of(recipe.name, run, _current(planner, done))
                write_json(run / run_folder.SUMMARY, summary)
            stopping.raise_if_deferred()
        _say_reused(display, reused)
    return summary


def _record_run(recipe: Recipe, profile: Profile, run: Path, display: Display) -> None:
    """Writes run.json. Tells the user if another recipe of the same name has run in the folder."""
    before = (read_json(run / run_folder.RUN) or {}).get("recipe")
    if before not in {None, str(recipe.path.resolve())}:
        display.note(f"{run}: {before} ran here before under the same name, {recipe.name}; the two share the folder")
    write_json(
        run / run_folder.RUN,
        {
            "recipe": str(recipe.path.resolve()),
            "name": recipe.name,
            "overrides": list(recipe.overrides),
            "profile": profile.name,
            "stages": list(recipe.stages),
            OTHER_SETTINGS: {},
        },
    )


def run_stage(stage: StageRun, display: Display, open_engine: OpenEngine | None = None) -> run_folder.Finished:
    """Runs one stage, from its start or from what an interrupted run left, and marks it as done.

    With `open_engine` it runs in this process, with engines that are there already.
    """
    folder, step = stage.folder, stage.step
    if step.removes:
        display.note(f"{step.id} runs again: {step.reason}")
        remove_folder(folder)
    elif step.reopens:
        reopen(folder)
        (folder / run_folder.DONE).unlink()
    folder.mkdir(parents=True, exist_ok=True)
    facts = stage.facts()
    write_json(folder / run_folder.STAGE, facts)
    line = display.begin_stage(step.id)
    journal = Journal(folder, line, in_flight=stage.profile.items_in_flight)
    start_time = time.monotonic()
    try:
        with stopping.at_resume_point(folder) if stage.trains else contextlib.nullcontext():
            figures = _work(stage, line, journal, open_engine)
    except CaiError as error:
        raise _named(error, step.id) from error
    except Exception as error:
        if (refused := refused_output(error, folder)) is None:
            raise
        raise _named(refused, step.id) from error
    failures = run_folder.n_failures(folder)
    write_json(
        folder / run_folder.STAGE,
        {
            **facts,
            "ended": now(),
            "seconds": round(time.monotonic() - start_time, 2),
            "tokens": line.tokens if stage.trains else journal.tokens,  # feedback's line counts this process's alone
            "failures": failures,
            "figures": figures,
        },
    )
    finished = run_folder.mark_done(folder, outputs_of(folder, figures, stage.profile.offline))
    journal.discard()
    display.end_stage(line, failures)
    return finished


def _work(stage: StageRun, line: StageLine, journal: Journal, open_engine: OpenEngine | None) -> dict[str, Any]:
    """The stage's figures. A training stage that runs out of memory continues with a smaller micro-batch."""
    while True:
        try:
            if stage.profile.inline or open_engine is not None:
                return stage.work(line, journal, open_engine)
            return launch(_spec(stage), stage.profile, line, stage.config)
        except OutOfMemory as error:
            smaller = halve_micro_batch(stage.folder) if stage.trains else None
            if smaller is None:
                raise
            checkpointing = " and gradient checkpointing" if smaller.checkpointing else ""
            line.note(f"{error}; going on with a micro-batch of {smaller.size}{checkpointing}")
        gc.collect()  # the error held the trainer's frames, and a trainer and its model refer to each other


def _spec(stage: StageRun) -> Spec:
    """What child processes need to construct the same stage."""
    recipe = stage.planner.recipe
    return Spec(
        recipe=str(recipe.path),
        overrides=list(recipe.overrides),
        run=str(stage.planner.run),
        stage=stage.step.id,
        folder=str(stage.folder),
        profile=stage.profile.model_dump(mode="json"),
        report_to=list(stage.report_to),
        parent=os.getpid(),
    )


def _current(planner: Planner, done: Mapping[str, run_folder.Finished]) -> dict[str, run_folder.Finished]:
    """The finished stages for the summary: those of this run, and later stages that an earlier run finished and whose
    fingerprints are unchanged, so that `--until` does not drop them from the summary.

    Records in run.json which later stages were finished with other settings than those of this run.
    """
    current: dict[str, run_folder.Finished] = {}
    other_settings: dict[str, dict[str, str]] = {}
    latest = run_folder.latest(planner.run)
    for config in planner.recipe.stages.values():
        if config.id in done:
            current[config.id] = done[config.id]
            continue
        step = planner.step(config, current)
        if step.done:
            current[config.id] = step.done
        elif step.folder and config.id in latest and (changes := planner.changed_settings(config, step.parts)):
            other_settings[config.id] = {"folder": latest[config.id].name, "reason": changes}
    facts = read_json(planner.run / run_folder.RUN)
    if facts[OTHER_SETTINGS] != other_settings:
        write_json(planner.run / run_folder.RUN, {**facts, OTHER_SETTINGS: other_settings})
    return current


def _named(error: CaiError, stage: str) -> CaiError:
    """The error with the stage's name in front, unless its message begins with a stage's name."""
    message = str(error)
    return type(error)(message if message.startswith("stage ") else f"stage {stage!r}: {message}")


def _say_reused(display: Display, reused: list[Step]) -> None:
    """Tells the user which stages are reused, and which other library versions made them. Empties `reused`."""
    if not reused:
        return
    display.note(f"reused: {', '.join(step.id for step in reused)}")
    by_versions: dict[str, list[str]] = {}
    for step in reused:
        if step.reason:
            by_versions.setdefault(step.reason, []).append(step.id)
    for reason, stage_ids in by_versions.items():
        display.note(f"{', '.join(stage_ids)}: {reason}")
    reused.clear()
