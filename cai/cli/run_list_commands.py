"""`cai runs`: lists the runs of a folder, and deletes them."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cai.cli.options import FOLDER, JSON, RUNS
from cai.cli.shell_completion import complete_run
from cai.text.formatting import printable


@click.group(invoke_without_command=True)
@RUNS
@JSON
@click.pass_context
def runs(context: click.Context, runs_folder: Path, as_json: bool) -> None:
    """List runs, comparisons among them: recipe, state, stages done, disk, when they were last worked on.

    \b
    cai runs
    cai runs delete quickstart
    """
    from cai.run.run_list import list_runs, run_lines

    context.obj = runs_folder
    if context.invoked_subcommand is not None:
        return
    listed_runs = list_runs(runs_folder)
    if as_json:
        click.echo(json.dumps({"runs": listed_runs}))
    elif listed_runs:
        click.echo("\n".join(run_lines(listed_runs)))
    else:
        click.echo(f"{runs_folder}: no runs here; `cai run quickstart` starts one")


@runs.command()
@click.argument("name", shell_complete=complete_run)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--runs", "runs_folder", type=FOLDER, metavar="DIR", help="Folder that runs lie in. [default: runs]")
@click.pass_obj
def delete(parents_folder: Path, name: str, yes: bool, runs_folder: Path | None) -> None:
    """Remove a run with all its stages: a run's name or folder. Refused while a process works on it.

    \b
    cai runs delete quickstart
    cai runs delete compare-3f9a2b1c --yes
    """
    from cai.run.run_list import delete_run, find_run_to_delete
    from cai.storage.stage_folders import disk_bytes, standing_stages

    folder = find_run_to_delete(name, runs_folder or parents_folder)
    size, n_done = disk_bytes(folder) / 1e6, len(standing_stages(folder))
    question = printable(f"Remove {folder} ({n_done} stages done, {size:,.1f} MB)?")
    if yes or click.confirm(question):
        delete_run(folder)
        click.echo(printable(f"removed {folder}, {size:,.1f} MB"))
