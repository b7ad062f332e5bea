"""`cai recipe` and `cai profile`: check these documents, and print their schemas for editors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from cai.cli.options import FILE, JSON, RUNS, SET
from cai.cli.shell_completion import complete_profile, complete_recipe
from cai.document import problems_of
from cai.text.errors import BadInput
from cai.text.formatting import printable

WRITE = click.option("--write", type=FILE, help="Write it to this file instead.")


@click.group()
def recipe() -> None:
    """Check recipes."""


@recipe.command("check")
@click.argument("files", nargs=-1, required=True, metavar="RECIPE...", shell_complete=complete_recipe)
@SET
@RUNS
@JSON
def recipe_check(files: tuple[str, ...], overrides: tuple[str, ...], runs_folder: Path, as_json: bool) -> None:
    """Read each recipe with all that it names: stages, prompts, constitution, models, trainers' settings.

    Runs nothing and writes nothing. Exit code 2 if one is wrong; every wrong one is named.

    \b
    cai recipe check my-project/recipes/*.yaml
    """

    def check(file: str) -> dict[str, Any]:
        from cai.run.fingerprint import Fingerprints
        from cai.run.prompt_checks import check_prompts
        from cai.run.recipe import load_recipe

        checked = load_recipe(file, overrides, runs_folder)
        fingerprints = Fingerprints(checked)
        notes = [*checked.notes, *check_prompts(checked, fingerprints.prompts), *fingerprints.notes]
        return {"name": checked.name, "path": str(checked.path), "stages": list(checked.stages), "notes": notes}

    def lines(facts: dict[str, Any]) -> list[str]:
        return [f"{facts['path']}: {len(facts['stages'])} stages", *facts["notes"]]

    _check_all(files, check, lines, as_json)


@recipe.command("schema")
@WRITE
def recipe_schema(write: Path | None) -> None:
    """Print the JSON Schema of a recipe, which editors check and complete documents with."""
    from cai.run.recipe_schema import recipe_schema

    print_schema(recipe_schema(), write)


@click.group()
def profile() -> None:
    """Check profiles, which say where a recipe runs."""


@profile.command("check")
@click.argument("files", nargs=-1, required=True, metavar="PROFILE...", shell_complete=complete_profile)
@JSON
def profile_check(files: tuple[str, ...], as_json: bool) -> None:
    """Read each profile with the files that it names. Exit code 2 if one is wrong; every wrong one is named.

    \b
    cai profile check my-project/configs/*.yaml
    """

    def check(file: str) -> dict[str, Any]:
        from cai.contracts.profile import load_profile

        loaded = load_profile(file)
        return {"name": loaded.name, "path": file, "device": loaded.device, "processes": loaded.processes}

    def lines(facts: dict[str, Any]) -> list[str]:
        return [f"{facts['path']}: device {facts['device']}, processes {facts['processes']}"]

    _check_all(files, check, lines, as_json)


@profile.command("schema")
@WRITE
def profile_schema(write: Path | None) -> None:
    """Print the JSON Schema of a profile, which editors check and complete documents with."""
    from cai.contracts.profile import profile_schema

    print_schema(profile_schema(), write)


def print_schema(schema: dict[str, Any], write: Path | None) -> None:
    """Prints a JSON Schema, or writes it to a file."""
    text = json.dumps(schema, indent=2, ensure_ascii=False)
    if write is None:
        click.echo(text)
    else:
        write.write_text(text + "\n", encoding="utf-8")


def problem_facts(error: BadInput, path: str) -> list[dict[str, object]]:
    """The problems that were found in a document, for a program; line and column count from 1."""
    return [
        {
            "path": path,
            "file": problem.file or path,
            "line": problem.line,
            "column": problem.column,
            "message": printable(problem.message),
        }
        for problem in problems_of(error)
    ]


def _check_all(
    files: Iterable[str], check: Callable[[str], dict[str, Any]], lines: Callable[[dict[str, Any]], Iterable[str]],
    as_json: bool,
) -> None:  # fmt: skip
    """Checks each file, and names every wrong one on stderr. Exits with 2 where there is one."""
    documents: list[dict[str, Any]] = []
    errors: list[dict[str, object]] = []
    for file in files:
        try:
            facts = check(file)
        except BadInput as error:
            errors += problem_facts(error, file)
            click.echo(str(error), err=True)
            continue
        documents.append(facts)
        if not as_json:
            click.echo("\n".join(lines(facts)))
    if as_json:
        click.echo(json.dumps({"documents": documents, "errors": errors}))
    if errors:
        raise SystemExit(BadInput.exit_code)
