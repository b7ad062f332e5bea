"""`cai constitution`: check, show, compare and test documents."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cai.cli.document_commands import WRITE, print_schema, problem_facts
from cai.cli.options import (
    JSON,
    MODEL,
    ONLINE,
    PRINCIPLES,
    PROFILE,
    RUNS,
    SHARE,
    TEMPLATES,
    VLLM_PYTHON,
    chosen_judge,
    prepared_profile,
    with_principles,
)
from cai.cli.shell_completion import complete_constitution
from cai.text.errors import BadInput


@click.group()
def constitution() -> None:
    """Check, show, compare and test constitutions."""


@constitution.command("check")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", shell_complete=complete_constitution)
@click.option(
    "--strict",
    is_flag=True,
    help="Name weaknesses too: no examples or contradicting ones, questions without a criterion or answered by yes or "
    "no, principles that read the same, tags that no prompt has or that differ in case.",
)
@click.option(
    "--tags", metavar="TAG,...", help="With --strict: tags of your prompts, beside those of the embedded world."
)
@click.option("--recipe", metavar="FILE", help="With --strict: the tags of this recipe's prompts are known.")
@JSON
def constitution_check(
    files: tuple[str, ...], strict: bool, tags: str | None, recipe: str | None, as_json: bool
) -> None:
    """Load each document with those that it extends. Exit code 2 if one is wrong; every problem in each is named.

    With --strict, exit code 1 if none is wrong and one is weak.
    """
    from cai.constitution import load_constitution
    from cai.constitution.weaknesses import weaknesses
    from cai.templates.constitution_text import summary, summary_line

    if not strict and (tags is not None or recipe is not None):
        raise BadInput("found --tags or --recipe without --strict, expected them together")
    prompt_tags = [tag.strip() for tag in (tags or "").split(",") if tag.strip()]
    if recipe is not None:
        from cai.run.recipe import read_prompt_tags

        prompt_tags += read_prompt_tags(recipe)
    summaries: list[dict[str, object]] = []
    errors: list[dict[str, object]] = []
    weak: list[str] = []
    for file in files:
        try:
            document = load_constitution(file)
        except BadInput as error:
            errors += problem_facts(error, file)
            click.echo(str(error), err=True)
            continue
        summaries.append(summary(document))
        sentences = list(weaknesses(document, prompt_tags)) if strict else []
        weak += sentences
        if not as_json:
            click.echo("\n".join([summary_line(document), *sentences]))
    if as_json:
        click.echo(json.dumps({"documents": summaries, "errors": errors} | ({"weak": weak} if strict else {})))
    if errors or weak:
        raise SystemExit(BadInput.exit_code if errors else 1)


@constitution.command("show")
@click.argument("file", shell_complete=complete_constitution)
@click.option("--prompt", is_flag=True, help="Show the requests to critic, reviser and judge.")
@PRINCIPLES
@click.option("--templates", default="default", show_default=True, metavar="SET", help="Template set for --prompt.")
@JSON
def constitution_show(file: str, prompt: bool, principles: tuple[str, ...], templates: str, as_json: bool) -> None:
    """Show the compiled document: extended documents merged, traits and absent principle fields derived.

    Where it extends others, an overlay report follows: which principles are new, replaced, reweighed and dropped, and
    by which file and line.

    FILE is a path, or the name of a shipped constitution such as `harmlessness`.
    """
    from cai.constitution import load_constitution
    from cai.templates.changes_text import change_lines
    from cai.templates.constitution_text import document_lines, example_requests, request_lines

    document = with_principles(load_constitution(file), principles)
    if prompt:
        from cai.templates import load_templates

        template_set = load_templates(templates)
        if as_json:
            requests = {principle.id: example_requests(principle, template_set) for principle in document.principles}
            click.echo(json.dumps(requests))
        else:
            lines = (line for principle in document.principles for line in request_lines(principle, template_set))
            click.echo("\n".join(lines).rstrip())
    elif as_json:
        layers = {
            "documents": list(map(str, document.documents)),
            "overlay": [change.plain() for change in document.changes],
        }
        click.echo(json.dumps(document.plain() | layers))
    else:
        click.echo("\n".join([*document_lines(document), "", *change_lines(document)]).rstrip())


@constitution.command("diff")
@click.argument("first", metavar="A", shell_complete=complete_constitution)
@click.argument("second", metavar="B", shell_complete=complete_constitution)
@click.option("--exit-code", is_flag=True, help="Exit code 1 if they differ, as with `git diff --exit-code`.")
@JSON
def constitution_diff(first: str, second: str, exit_code: bool, as_json: bool) -> None:
    """Show which principles B adds, removes and changes, compared with A: fields with both texts, weights with both.

    A and B are paths or names of shipped constitutions; what they extend is merged before they are compared.
    """
    from cai.constitution import Constitution, load_constitution
    from cai.constitution.differences import differences
    from cai.document import Problems
    from cai.templates.changes_text import difference_lines

    documents: list[Constitution] = []
    problems = Problems()
    for name in (first, second):
        with problems.collect():
            documents.append(load_constitution(name))
    problems.raise_if_any()
    before, after = documents
    differing = differences(before, after)
    if as_json:
        names = {
            side: {"path": str(document.path), "name": document.name}
            for side, document in zip("ab", documents, strict=True)
        }
        click.echo(json.dumps(names | differing.plain()))
    else:
        click.echo("\n".join(difference_lines(before, after, differing)))
    if exit_code and any(differing):
        raise SystemExit(1)


@constitution.command("test")
@click.argument("file", shell_complete=complete_constitution)
@MODEL
@TEMPLATES
@PRINCIPLES
@click.option("--examples", metavar="FILE", help="Take the examples of this constitution instead, by principle.")
@click.option("--min-accuracy", type=SHARE, metavar="SHARE", help="Exit code 1 below this.")
@PROFILE
@ONLINE
@VLLM_PYTHON
@RUNS
@JSON
def constitution_test(
    file: str, model: str, templates: str, principles: tuple[str, ...], examples: str | None,
    min_accuracy: float | None, on: str | None, online: bool, vllm_python: Path | None, runs_folder: Path,
    as_json: bool,
) -> None:  # fmt: skip
    """Put every example to a judge under its principle, in both orders; name those that it decides the other way.

    A judge whose 95 % interval of accuracy contains one half is not distinguishable from chance, and called that.

    \b
    cai constitution test constitutions/micro.yaml --min-accuracy 0.95
    cai constitution test mine.yaml --model my-model --examples colleague.yaml --json
    cai constitution test mine.yaml --model quickstart/policy
    """
    from cai.constitution import load_constitution

    document = load_constitution(file)
    profile = prepared_profile(on, online, vllm_python)
    from cai.engines import open_engine
    from cai.feedback import principle_tests
    from cai.templates import load_templates
    from cai.text import progress

    if examples is not None:
        document = principle_tests.with_examples_of(document, load_constitution(examples))
    document = with_principles(document, principles)
    judge = chosen_judge(model, templates, runs_folder, profile)
    template_set = load_templates(judge.templates)
    with open_engine(judge, profile) as engine, progress.open_display() as display:
        line = display.begin_stage("examples")
        outcomes = principle_tests.run_examples(document, engine, template_set, progress=line)
        display.end_stage(line, sum(outcome.failure is not None for outcome in outcomes))
    figures = principle_tests.example_figures(document, outcomes)
    if as_json:
        click.echo(json.dumps({"constitution": document.name, "model": judge.name} | figures))
    else:
        click.echo("\n".join(principle_tests.example_lines(figures, outcomes)))
    if min_accuracy is not None and (figures["accuracy"] or 0.0) < min_accuracy:
        raise SystemExit(1)


@constitution.command("schema")
@WRITE
def constitution_schema(write: Path | None) -> None:
    """Print the JSON Schema of a constitution, which editors check and complete documents with."""
    from cai.constitution import json_schema

    print_schema(json_schema(), write)
