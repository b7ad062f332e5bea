"""The command line: what each command takes and which exit code it ends with.

Heavy imports stand inside their commands, so that `cai --help` and `cai constitution check` stay quick.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

import cai
from cai.errors import BadInput, CaiError

INTERRUPTED = 130


class Commands(click.Group):
    """A group whose commands end a `CaiError` as one sentence on stderr and with the exit code of its class."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CaiError as error:
            click.echo(str(error), err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("Interrupted. What was finished is kept; the same command goes on from there.", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(cai.__version__, prog_name="cai")
def main() -> None:
    """Constitutional AI and RLAIF: author a constitution, run a recipe, compare checkpoints."""


@main.group()
def constitution() -> None:
    """Check and show constitutions."""


@constitution.command("check")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def constitution_check(files: tuple[str, ...], as_json: bool) -> None:
    """Load each document with what it extends. Exit code 2 if one is wrong; every wrong one is named."""
    from cai.constitution import load_constitution
    from cai.constitution.report import summary, summary_line

    facts: list[dict[str, object]] = []
    errors: list[dict[str, str]] = []
    for file in files:
        try:
            document = load_constitution(file)
        except BadInput as error:
            errors.append({"path": file, "message": str(error)})
            click.echo(str(error), err=True)
        else:
            facts.append(summary(document))
            if not as_json:
                click.echo(summary_line(document))
    if as_json:
        click.echo(json.dumps({"documents": facts, "errors": errors}))
    if errors:
        raise SystemExit(BadInput.exit_code)


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
    from cai.constitution.report import asked, asked_lines, document_lines

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


if __name__ == "__main__":
    main()
