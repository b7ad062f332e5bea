"""`cai constitution`: check, show and test a document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cai.cli.options import JSON, PROFILE
from cai.text.errors import BadInput

if TYPE_CHECKING:
    pass


@click.group()
def constitution() -> None:
    """Check and show constitutions."""


@constitution.command("check")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--strict", is_flag=True, help="Name what is weak too: no examples, no criterion, twice the same.")
@JSON
def constitution_check(files: tuple[str, ...], strict: bool, as_json: bool) -> None:
    """Load each document with what it extends. Exit code 2 if one is wrong; every wrong one is named.

    With --strict, exit code 1 if none is wrong and one is weak.
    """
    from cai.constitution import load_constitution
    from cai.constitution.weaknesses import weaknesses
    from cai.templates.constitution_text import summary, summary_line

    facts: list[dict[str, object]] = []
    errors: list[dict[str, str]] = []
    weak: list[str] = []
    for file in files:
        try:
            document = load_constitution(file)
        except BadInput as error:
            errors.append({"path": file, "message": str(error)})
            click.echo(str(error), err=True)
            continue
        facts.append(summary(document))
        found = list(weaknesses(document)) if strict else []
        weak += found
        if not as_json:
            click.echo("\n".join([summary_line(document), *found]))
    if as_json:
        click.echo(json.dumps({"documents": facts, "errors": errors} | ({"weak": weak} if strict else {})))
    if errors or weak:
        raise SystemExit(BadInput.exit_code if errors else 1)


@constitution.command("show")
@click.argument("file")
@click.option("--prompt", is_flag=True, help="Show what a critic, a reviser and a judge are asked.")
@click.option("--principle", metavar="ID", help="Only this principle.")
@click.option("--templates", default="default", show_default=True, metavar="SET", help="Template set for --prompt.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def constitution_show(file: str, prompt: bool, principle: str | None, templates: str, as_json: bool) -> None:
    """Show the compiled document: extended documents merged, traits and absent requests derived.

    FILE is a path, or the name of a shipped constitution such as `harmlessness`.
    """
    from dataclasses import replace

    from cai.constitution import load_constitution
    from cai.templates.constitution_text import asked, asked_lines, document_lines

    document = load_constitution(file)
    if principle is not None:
        document = replace(document, principles=(document.principle(principle),))
    if prompt:
        from cai.templates import load_templates

        chosen = load_templates(templates)
        if as_json:
            click.echo(json.dumps({each.id: asked(each, chosen) for each in document.principles}))
        else:
            click.echo("\n".join(line for each in document.principles for line in asked_lines(each, chosen)).rstrip())
    elif as_json:
        click.echo(json.dumps(document.plain()))
    else:
        click.echo("\n".join(document_lines(document)))


@constitution.command("test")
@click.argument("file")
@click.option("--model", default="micro", show_default=True, metavar="MODEL", help="Who judges: a folder or a hub id.")
@click.option("--templates", default="auto", show_default=True, metavar="SET", help="Template set; auto = the model's.")
@click.option("--examples", metavar="FILE", help="Take the examples of this constitution instead, by principle.")
@click.option("--min-accuracy", type=click.FloatRange(0, 1), metavar="SHARE", help="Exit code 1 below this.")
@PROFILE
@JSON
def constitution_test(
    file: str,
    model: str,
    templates: str,
    examples: str | None,
    min_accuracy: float | None,
    on: str | None,
    as_json: bool,
) -> None:
    """Put every example to a judge under its principle, in both orders; name those that it sees the other way.

    \b
    cai constitution test constitutions/micro.yaml --min-accuracy 0.95
    cai constitution test mine.yaml --model my-model --examples colleague.yaml --json
    """
    from cai.constitution import load_constitution
    from cai.contracts.profile import load_profile
    from cai.run.pipeline import prepare

    document = load_constitution(file)
    profile = load_profile(on)
    from cai.feedback import principle_tests

    if examples is not None:
        document = principle_tests.with_examples_of(document, load_constitution(examples))
    prepare(profile)
    from cai.engines import open_engine
    from cai.models import reference
    from cai.templates import load_templates

    judge = reference.resolve(model, templates=templates, folder=Path.cwd())
    with open_engine(judge, profile) as engine:
        outcomes = principle_tests.run_examples(document, engine, load_templates(judge.templates))
    figures = principle_tests.figures(outcomes)
    if as_json:
        click.echo(json.dumps({"constitution": document.name, "model": judge.name} | figures))
    else:
        click.echo("\n".join(principle_tests.lines(outcomes)))
    if min_accuracy is not None and figures["accuracy"] < min_accuracy:
        raise SystemExit(1)


@constitution.command("schema")
@click.option("--write", type=click.Path(dir_okay=False, path_type=Path), help="Write it to this file instead.")
def constitution_schema(write: Path | None) -> None:
    """Print the JSON Schema of a constitution, which editors check and complete documents with."""
    from cai.constitution import json_schema

    text = json.dumps(json_schema(), indent=2, ensure_ascii=False)
    if write is None:
        click.echo(text)
    else:
        write.write_text(text + "\n", encoding="utf-8")
