"""Commands that run recipes and look at runs: run, plan, status, show, clean, init, compare."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from cai.cli.options import (
    FOLDER,
    GPU_MEMORY,
    GPUS,
    HOST_MEMORY,
    JSON,
    MODEL_CONFIG,
    MODEL_HELP,
    NAME,
    ONLINE,
    PROFILE,
    RUNS,
    SET,
    VLLM_PYTHON,
    checked_name,
    chosen_profile,
    to_stderr,
)
from cai.cli.shell_completion import complete_recipe, complete_run, complete_stage
from cai.text.errors import BadInput, did_you_mean
from cai.text.formatting import printable

if TYPE_CHECKING:
    from cai.contracts.profile import Profile
    from cai.contracts.stage_config import StageConfig
    from cai.run.plan import Options
    from cai.run.recipe import Recipe

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "swanlab")


@click.command()
@click.argument("recipe", shell_complete=complete_recipe)
@SET
@NAME
@PROFILE
@ONLINE
@VLLM_PYTHON
@click.option("--until", metavar="STAGE", shell_complete=complete_stage, help="Stop after this stage.")
@click.option(
    "--from",
    "redo_from",
    metavar="STAGE",
    shell_complete=complete_stage,
    help="Run this stage and all that depends on it again.",
)
@click.option("--dry-run", is_flag=True, help="Say what would run, why, and what it takes; run nothing.")
@click.option("--retry-failures", is_flag=True, help="Ask again what failed in stages that are done.")
@click.option("--report-to", metavar="NAMES", help="Trackers of training, comma-separated: tensorboard,wandb,trackio.")
@GPUS
@GPU_MEMORY
@HOST_MEMORY
@RUNS
@JSON
def run(
    recipe: str, overrides: tuple[str, ...], name: str | None, on: str | None, online: bool, vllm_python: Path | None,
    until: str | None, redo_from: str | None, dry_run: bool, retry_failures: bool, report_to: str | None,
    gpus: int | None, gpu_memory: float | None, host_memory: float | None, runs_folder: Path, as_json: bool,
) -> None:  # fmt: skip
    """Run a recipe: a file, or the name of a shipped one. Stages whose inputs have not changed are reused.

    A dry run also says what each stage takes of memory and disk, as `cai plan` does, on this machine or on one that
    --gpus, --gpu-memory and --host-memory describe, and exits with 1 where one does not fit.

    \b
    cai run quickstart
    cai run quickstart --set stages.policy.train.beta=0.2 --dry-run
    cai run quickstart --name with-other-beta --set stages.policy.train.beta=0.2
    cai run my-project/recipes/quickstart.yaml --on 8gpu-zero3 --until preferences
    """
    from cai.run.plan import Options
    from cai.run.recipe import load_recipe

    options = Options(until, redo_from, retry_failures, _trackers(report_to))
    if name is not None:
        overrides = (*overrides, f"name={name}")
    profile = chosen_profile(on, online, vllm_python)
    other_machine = OtherMachine(gpus, gpu_memory, host_memory)
    if dry_run:
        _dry_run(load_recipe(recipe, overrides, runs_folder), profile, options, runs_folder, as_json, other_machine)
        return
    if other_machine != OtherMachine():
        raise BadInput("--gpus, --gpu-memory and --host-memory describe a machine for --dry-run; a run is on this one")
    _run(recipe, overrides, profile, options, runs_folder, as_json)


def _trackers(names: str | None) -> tuple[str, ...]:
    """The trackers that trainers report to. Raises BadInput for one that they do not know or that is not installed."""
    chosen = tuple(name.strip() for name in (names or "").split(",") if name.strip())
    for name in chosen:
        if name not in TRACKERS:
            raise BadInput(f"--report-to {name}: expected some of {', '.join(TRACKERS)}{did_you_mean(name, TRACKERS)}")
        if find_spec(name) is None:
            raise BadInput(f"--report-to {name}: the package {name} is not installed")
    return chosen


class OtherMachine(NamedTuple):
    """What options say of the machine that a sheet is for, in GB; None = as this one."""

    gpus: int | None = None
    gpu_memory: float | None = None
    host_memory: float | None = None


def _run(
    name: str | Path, overrides: tuple[str, ...], profile: Profile, options: Options, runs_folder: Path, as_json: bool
) -> None:
    from cai.run import pipeline, status
    from cai.run.memory_warning import memory_warnings
    from cai.run.recipe import load_recipe
    from cai.text import progress

    recipe = load_recipe(name, overrides, runs_folder)
    folder = runs_folder / recipe.name
    for warning in memory_warnings(recipe, profile, folder, options):
        to_stderr(warning)
    summary = pipeline.run_recipe(recipe, profile, folder, options, progress.open_display())
    if as_json:
        click.echo(json.dumps(summary))
        return
    if lines := status.figure_lines(summary):
        click.echo("\n".join(lines))
    _echo_comparison(summary)
    if lines := status.left_out_lines(summary):
        click.echo("\n".join([*lines, ""]))
    click.echo("\n".join(status.result_lines(folder, summary)))


def _dry_run(
    recipe: Recipe, profile: Profile, options: Options, runs_folder: Path, as_json: bool, other_machine: OtherMachine
) -> None:
    """Says what would run, why, and what it takes; the last only where this machine or the options have the GPUs."""
    from cai.contracts.machine import gpu_memory
    from cai.run import plan, status

    for note in recipe.notes:
        to_stderr(printable(note))
    steps = plan.plan_recipe(recipe, profile, runs_folder / recipe.name, options)
    facts: dict[str, Any] = {"stages": status.plan_json(steps), "models": status.engine_by_model(steps, profile)}
    if not as_json:
        click.echo("\n".join(status.plan_lines(steps, profile)) + "\n")
    to_run = [step.config for step in steps if step.status != "reused"]
    if profile.uses_gpu and other_machine.gpu_memory is None and not gpu_memory():
        no_gpu = "memory is not computed: this machine has no GPU; --gpu-memory 80 computes it for GPUs of 80 GB"
        click.echo(json.dumps({**facts, "memory": None}) if as_json else no_gpu)
        return
    _say_memory(recipe, profile, to_run, runs_folder, facts if as_json else None, other_machine)


def _say_memory(
    recipe: Recipe, profile: Profile, stages: Sequence[StageConfig], runs_folder: Path, facts: dict[str, Any] | None,
    other_machine: OtherMachine, config_file: Path | None = None,
) -> None:  # fmt: skip
    """Prints the memory sheet, as text or with `facts` as JSON. Exits with 1 where a stage does not fit."""
    from cai.run.stage_run import prepare

    prepare(profile)  # before anything imports torch
    from cai.run.memory_sheet import describe_machine, memory_sheet, sheet_json, sheet_lines

    machine = describe_machine(profile, runs_folder, *other_machine)
    sheets = memory_sheet(recipe, profile, machine, stages=stages, config_file=config_file)
    if facts is not None:
        click.echo(json.dumps({**facts, "memory": sheet_json(sheets)}))
    elif sheets:
        click.echo("\n".join(sheet_lines(sheets, machine)))
    if any(sheet.remedy for sheet in sheets):
        raise SystemExit(1)


@click.command()
@click.argument("recipe", shell_complete=complete_recipe)
@SET
@PROFILE
@ONLINE
@click.option("--until", metavar="STAGE", shell_complete=complete_stage, help="Plan up to this stage.")
@GPUS
@GPU_MEMORY
@HOST_MEMORY
@MODEL_CONFIG
@RUNS
@JSON
def plan(
    recipe: str, overrides: tuple[str, ...], on: str | None, online: bool, until: str | None, gpus: int | None,
    gpu_memory: float | None, host_memory: float | None, model_config: Path | None, runs_folder: Path, as_json: bool,
) -> None:  # fmt: skip
    """Say what each stage of a recipe takes: memory of each process by part, and disk. Runs nothing.

    Computed from the models' config.json alone, for this machine or for one that the options describe. Exits with 1
    where a stage does not fit, and says what to change. 1 GB = 10⁹ bytes.

    \b
    cai plan quickstart
    cai plan cai-dpo --set model=Qwen/Qwen3-8B --model-config config.json --on 8gpu-zero3 --gpu-memory 80
    """
    from cai.run.plan import Options, selected_stages
    from cai.run.recipe import load_recipe

    profile = chosen_profile(on, online)
    read_recipe = load_recipe(recipe, overrides, runs_folder)
    stages = selected_stages(read_recipe, Options(until), profile, on_this_machine=False)
    other_machine = OtherMachine(gpus, gpu_memory, host_memory)
    _say_memory(read_recipe, profile, stages, runs_folder, {} if as_json else None, other_machine, model_config)


def _echo_comparison(summary: Mapping[str, Any]) -> None:
    """The checkpoints that a run compared, as a table."""
    if not summary.get("checkpoints"):
        return
    from rich.console import Console

    from cai.report.terminal_table import comparison_tables

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print()
    console.print(comparison_tables(summary))


@click.command()
@click.argument("run", required=False, shell_complete=complete_run)
@RUNS
@JSON
def status(run: str | None, runs_folder: Path, as_json: bool) -> None:
    """Show what of a run is done: its name or folder; the newest where none is given.

    A stage is running (with its share done and the estimated time left), done, stale (made from outputs that have been
    replaced since, or with other settings), unfinished (interrupted) or not run.

    \b
    cai status quickstart
    """
    from cai.run import status
    from cai.storage.files import read_json
    from cai.storage.run_folder import SUMMARY, find_run

    folder = find_run(run, runs_folder)
    if as_json:
        click.echo(json.dumps(status.status_json(folder)))
        return
    summary = read_json(folder / SUMMARY) or {}
    click.echo("\n".join(status.status_lines(folder)))
    if line := status.outdated_summary_line(folder, summary):
        click.echo(f"\n{printable(line)}")
    if lines := status.figure_lines(summary):
        click.echo("\n".join(["", *lines]))
    _echo_comparison(summary)
    if lines := status.left_out_lines(summary):
        click.echo("\n".join(["", *lines]))


@click.command()
@click.argument("run", shell_complete=complete_run)
@click.argument("item", required=False)
@click.option("--random", "at_random", is_flag=True, help="Pick a prompt.")
@RUNS
@JSON
def show(run: str, item: str | None, at_random: bool, runs_folder: Path, as_json: bool) -> None:
    """Show everything about one item: prompt, responses, critiques, revisions, votes, preference.

    ITEM is the id of a prompt, response, pair or preference in records.jsonl, or its first characters.

    \b
    cai show quickstart 3f9a
    cai show quickstart --random
    """
    from cai.run.show import find_item_rows, item_lines
    from cai.storage.run_folder import find_run
    from cai.storage.stage_folders import stale_note

    if (item is None) != at_random:
        raise BadInput("cai show RUN ITEM shows an item, cai show RUN --random picks one; give one of the two")
    folder = find_run(run, runs_folder)
    rows_by_stage = find_item_rows(folder, item)
    if note := stale_note(folder, rows_by_stage):
        to_stderr(printable(note))
    click.echo(json.dumps(rows_by_stage) if as_json else "\n".join(item_lines(rows_by_stage)))


@click.command()
@click.argument("run", shell_complete=complete_run)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--unfinished", is_flag=True, help="Remove interrupted stages too, which the next run would go on with.")
@RUNS
def clean(run: str, yes: bool, unfinished: bool, runs_folder: Path) -> None:
    """Remove the stage folders of a run that no current stage stands on: results of earlier recipes, wordings that were
    tried, and interrupted stages that the next run would not go on with.

    \b
    cai clean quickstart
    """
    from cai.storage.files import remove_folder
    from cai.storage.run_folder import find_run, locked
    from cai.storage.stage_folders import interrupted, standing_stages, unused

    folder = find_run(run, runs_folder, begun=False)
    with locked(folder):
        old = unused(folder, unfinished)
        for path, size in old:
            click.echo(f"{size / 1e6:10,.1f} MB  {path}")
        if not old:
            click.echo(f"{folder}: nothing to remove")
        elif yes or click.confirm(f"Remove {len(old)} folders?"):
            for path, _ in old:
                remove_folder(path)
            click.echo(f"removed {len(old)} folders")
        if kept := interrupted(folder):
            click.echo(f"kept for the next run, unless --unfinished is given: {', '.join(kept)} (interrupted)")
        if not standing_stages(folder):
            click.echo(f"no stage of this run is done; `cai runs delete {folder.name}` removes it as a whole")


@click.command()
@click.argument("run", shell_complete=complete_run)
@click.argument("name", callback=checked_name)
@RUNS
def fork(run: str, name: str, runs_folder: Path) -> None:
    """Make a second run NAME of the finished stages of a run, to go on from there with another recipe or setting.

    Both share the files of these stages, so that a fork takes neither time nor disk, and either can be removed.

    \b
    cai fork quickstart other-beta
    cai run quickstart --name other-beta --set stages.policy.train.beta=0.2
    """
    from cai.storage.forking import fork
    from cai.storage.run_folder import find_run
    from cai.storage.stage_folders import run_command

    folder = find_run(run, runs_folder)
    stages = fork(folder, runs_folder / name)
    click.echo(f"{runs_folder / name}: {len(stages)} finished stages of {folder}; both read the same documents")
    click.echo(f"\nNext: {run_command(runs_folder / name)}")


@click.command()
@click.argument("folder", type=FOLDER)
def init(folder: Path) -> None:
    """Begin a project: a constitution, a recipe and prompts of your own to fill in, and copies of what ships.

    \b
    cai init my-project
    cai run my-project/recipes/quickstart.yaml
    cai run my-project/recipes/mine.yaml --dry-run
    """
    from cai.document.shipped import copy_starter

    for path in copy_starter(folder):
        click.echo(path)
    own = {name: folder / name / "mine.yaml" for name in ("constitutions", "recipes")}
    click.echo(
        f"\nNext: cai run {folder / 'recipes' / 'quickstart.yaml'}      the whole method on the embedded model\n"
        f"Then write your principles into {own['constitutions']}, your prompts into {folder / 'prompts'} and your "
        f"model into {own['recipes']}:\n"
        f"      cai constitution check --strict {own['constitutions']}\n"
        f"      cai recipe check {own['recipes']}\n"
        f"      cai run {own['recipes']} --dry-run"
    )


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="NAME=MODEL...")
@click.option("--prompts", required=True, metavar="SET", help="micro:SPLIT, or a file of prompts.")
@click.option(
    "--constitution", "document", metavar="FILE",
    help="What the judge goes by. [default: micro for micro:SPLIT, else harmlessness]",
)  # fmt: skip
@click.option("--judge", metavar="MODEL", help=f"Who judges: {MODEL_HELP}. [default: the first model]")
@click.option("--limit", type=click.IntRange(1), help="Take this many of the prompts.")
@click.option(
    "--columns", metavar="KEY=COLUMN,...",
    help="What the file of prompts calls its columns: prompt, messages, system, tags; as prompt=question,tags=topic.",
)  # fmt: skip
@NAME
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Change the recipe: --set stages.comparison.n=4; repeatable.",
)  # fmt: skip
@PROFILE
@ONLINE
@VLLM_PYTHON
@RUNS
@JSON
def compare(
    models: tuple[str, ...], prompts: str, document: str | None, judge: str | None, limit: int | None,
    columns: str | None, name: str | None, overrides: tuple[str, ...], on: str | None, online: bool,
    vllm_python: Path | None, runs_folder: Path, as_json: bool,
) -> None:  # fmt: skip
    """Compare checkpoints on prompts: rates with intervals, head to head by a judge, a page to read.

    A MODEL is a folder, a hub id, `micro`, or RUN/STAGE: what that stage trained last. The first is the baseline. The
    same command again reuses what it computed, also with more models, prompts or responses. Without --name, the run is
    called `compare-` and a hash of prompts and constitution.

    \b
    cai compare base=micro policy=quickstart/policy --prompts micro:test
    """
    from cai.models.reference import stale_model_notes
    from cai.run.comparison_recipe import comparison_recipe
    from cai.run.plan import Options

    profile = chosen_profile(on, online, vllm_python)
    recipe = comparison_recipe(
        models, prompts, document, judge, limit, columns, name, runs_folder,
        offline=profile.offline, weights=profile.engine != "server",
    )  # fmt: skip
    names = [model.partition("=")[2] for model in models]
    for note in stale_model_notes([*names, judge or ""], runs_folder):
        to_stderr(printable(note))
    _run(recipe, overrides, profile, Options(), runs_folder, as_json)
