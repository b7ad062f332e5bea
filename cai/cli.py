"""The command line: what each command takes and which exit code it ends with.

Heavy imports stand inside their commands, so that `cai --help` and `cai constitution check` stay quick.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import cai
from cai.errors import BadInput, CaiError, Terminated, nearest

if TYPE_CHECKING:
    from cai.feedback.truth import Kind
    from cai.pipeline import Options

INTERRUPTED = 130
TERMINATED = 143
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "swanlab")
EXAMPLES = """\b
Author   cai init my-project
         cai constitution check my-project/constitutions/micro.yaml
Run      cai run quickstart
         cai show quickstart --random
Compare  cai compare base=micro policy=quickstart/policy --prompts micro:test
"""
"""The three things that its users do."""


class Commands(click.Group):
    """A group whose commands end a `CaiError` as one sentence on stderr and with the exit code of its class."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CaiError as error:
            click.echo(str(error), err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt as error:
            click.echo("Interrupted. What was finished is kept; the same command goes on from there.", err=True)
            ctx.exit(TERMINATED if isinstance(error, Terminated) else INTERRUPTED)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXAMPLES)
@click.version_option(cai.__version__, prog_name="cai")
def main() -> None:
    """Constitutional AI and RLAIF: author a constitution, run a recipe, compare checkpoints.

    Exit codes: 0 done, 1 a check or gate failed, 2 wrong input, 3 a stage failed, 130 or 143 interrupted (resumable).
    """


RUNS = click.option(
    "--runs",
    "runs_folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs"),
    show_default=True,
    metavar="DIR",
    help="Folder that runs lie in.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
PROFILE = click.option("--on", "on", metavar="PROFILE", help="Where to run: a profile's file or name. [default: cpu]")


@main.command()
@click.argument("recipe")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change the recipe; repeatable.")
@PROFILE
@click.option("--until", metavar="STAGE", help="Stop after this stage.")
@click.option("--from", "redo_from", metavar="STAGE", help="Run this stage and all that depends on it again.")
@click.option("--dry-run", is_flag=True, help="Say what would run, what is reused, and why; run nothing.")
@click.option("--retry-failures", is_flag=True, help="Ask again what failed in stages that are done.")
@click.option("--report-to", metavar="NAMES", help="Trackers of training, comma-separated: tensorboard,wandb,trackio.")
@RUNS
@JSON
def run(
    recipe: str,
    overrides: tuple[str, ...],
    on: str | None,
    until: str | None,
    redo_from: str | None,
    dry_run: bool,
    retry_failures: bool,
    report_to: str | None,
    runs_folder: Path,
    as_json: bool,
) -> None:
    """Run a recipe: a file, or the name of a shipped one. Stages whose inputs have not changed are reused.

    \b
    cai run quickstart
    cai run quickstart --set stages.policy.train.beta=0.2 --dry-run
    cai run my-project/recipes/quickstart.yaml --on 8gpu-zero3 --until preferences
    """
    from cai.pipeline import Options

    options = Options(until, redo_from, retry_failures, _trackers(report_to))
    _run(recipe, overrides, on, options, dry_run, runs_folder, as_json)


def _trackers(names: str | None) -> tuple[str, ...]:
    """The trackers that trainers report to. Raises BadInput for one that they do not know or that is not installed."""
    chosen = tuple(name.strip() for name in (names or "").split(",") if name.strip())
    for name in chosen:
        if name not in TRACKERS:
            raise BadInput(f"--report-to {name}: expected some of {', '.join(TRACKERS)}{nearest(name, TRACKERS)}")
        if find_spec(name) is None:
            raise BadInput(f"--report-to {name}: the package {name} is not installed")
    return chosen


def _run(
    name: str | Path,
    overrides: tuple[str, ...],
    on: str | None,
    options: Options,
    dry_run: bool,
    runs_folder: Path,
    as_json: bool,
) -> None:
    """Runs or plans a recipe and says what came of it."""
    from cai import pipeline, progress, tables
    from cai.profile import load_profile
    from cai.recipe import load_recipe

    profile = load_profile(on)
    recipe = load_recipe(name, overrides)
    folder = runs_folder / recipe.name
    if dry_run:
        steps = pipeline.plan_recipe(recipe, profile, folder, options)
        if as_json:
            click.echo(json.dumps({"stages": tables.plan_json(steps), "models": tables.asked_where(steps, profile)}))
        else:
            click.echo("\n".join(tables.plan_lines(steps, profile)))
        return
    summary = pipeline.run_recipe(recipe, profile, folder, options, progress.display())
    if as_json:
        click.echo(json.dumps(summary))
        return
    if lines := tables.figure_lines(summary):
        click.echo("\n".join(lines))
    _echo_comparison(summary)
    click.echo("\n".join(tables.where_lines(folder, summary)))


def _echo_comparison(summary: Mapping[str, Any]) -> None:
    """The checkpoints that a run compared, as a table."""
    if not summary.get("checkpoints"):
        return
    from rich.console import Console

    from cai.report import table

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print()
    console.print(table(summary))


@main.command()
@click.argument("run", required=False)
@RUNS
@JSON
def status(run: str | None, runs_folder: Path, as_json: bool) -> None:
    """Show what of a run is done: its name or folder; the newest where none is given.

    \b
    cai status quickstart
    """
    from cai import tables
    from cai.files import read_json
    from cai.runs import SUMMARY, find_run

    folder = find_run(run, runs_folder)
    if as_json:
        click.echo(json.dumps({"run": str(folder), "stages": tables.status_rows(folder)}))
        return
    click.echo("\n".join(tables.status_lines(folder)))
    _echo_comparison(read_json(folder / SUMMARY) or {})


@main.command()
@click.argument("run")
@click.argument("item", required=False)
@click.option("--random", "at_random", is_flag=True, help="Pick a prompt.")
@RUNS
@JSON
def show(run: str, item: str | None, at_random: bool, runs_folder: Path, as_json: bool) -> None:
    """Show one item's life: prompt, responses, critiques, revisions, votes, preference.

    ITEM is the id of a prompt, response, pair or preference in records.jsonl, or its first characters.

    \b
    cai show quickstart 3f9a
    cai show quickstart --random
    """
    from cai.runs import find_run
    from cai.show import life, life_lines

    if (item is None) != at_random:
        raise BadInput("cai show RUN ITEM shows an item, cai show RUN --random picks one; give one of the two")
    found = life(find_run(run, runs_folder), item)
    click.echo(json.dumps(found) if as_json else "\n".join(life_lines(found)))


@main.group()
def votes() -> None:
    """Say what principles and judges do, from the votes of finished runs: no model is asked."""


EXAMPLE_PAIRS = click.option(
    "--examples", "n_examples", type=click.IntRange(min=0), default=3, show_default=True, help="Pairs to read."
)


@votes.command("explain")
@click.argument("run")
@EXAMPLE_PAIRS
@RUNS
@JSON
def votes_explain(run: str, n_examples: int, runs_folder: Path, as_json: bool) -> None:
    """Say of every principle how often it decides, with whom it goes, and which labels turn without it.

    RUN is a run's name or folder, or RUN/STAGE where several stages of it turn votes into preferences.

    \b
    cai votes explain quickstart
    cai votes explain quickstart --examples 10 --json
    """
    from cai.feedback import explain

    found = explain.explain(explain.evidence(run, runs_folder), n_examples)
    click.echo(json.dumps(found) if as_json else "\n".join(explain.explain_lines(found)))


@votes.command("diff")
@click.argument("one")
@click.argument("other")
@EXAMPLE_PAIRS
@RUNS
@JSON
def votes_diff(one: str, other: str, n_examples: int, runs_folder: Path, as_json: bool) -> None:
    """Compare two judges, or two wordings of principles, on the pairs that two runs have in common.

    \b
    cai votes diff quickstart my-run
    cai votes diff my-run/by-micro my-run/by-another
    """
    from cai.feedback import explain

    found = explain.diff(explain.evidence(one, runs_folder), explain.evidence(other, runs_folder), n_examples)
    click.echo(json.dumps(found) if as_json else "\n".join(explain.diff_lines(found)))


@votes.command("calibrate")
@click.argument("run")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw it too: a file .svg or .png.")
@click.option(
    "--truth",
    type=click.Choice(["human", "oracle"]),
    help="What labels are held against: people's choice, or the world's oracle. Absent: whichever there is.",
)
@RUNS
@JSON
def votes_calibrate(run: str, picture: Path | None, truth: Kind | None, runs_folder: Path, as_json: bool) -> None:
    """Say whether labels are right as often as they say, where it is known which response is better.

    People know it of the pairs that a judge stage reads with `human: {source: hh.jsonl.gz}`, the embedded world's
    oracle of answers to prompts of source micro. Where the 95 % interval of accuracy, clustered by prompt or topic,
    holds one half, the judge is not distinguishable from chance.

    \b
    cai votes calibrate quickstart --picture reliability.svg
    cai votes calibrate my-run --truth human --json
    """
    from cai.feedback import calibration
    from cai.feedback.explain import evidence

    if picture is not None and picture.suffix not in {".svg", ".png"}:
        raise BadInput(f"--picture: found {picture.name!r}, expected a file .svg or .png")
    found = calibration.of_labels(evidence(run, runs_folder), truth)
    if picture is not None:
        from cai.report.reliability import draw_reliability

        draw_reliability(found, picture)
    click.echo(json.dumps(found) if as_json else "\n".join(calibration.lines(found)))


@main.command()
@click.argument("run")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--unfinished", is_flag=True, help="Remove interrupted stages too, which the next run would go on with.")
@RUNS
def clean(run: str, yes: bool, unfinished: bool, runs_folder: Path) -> None:
    """Remove the stage folders of a run that no current stage stands on: results of earlier recipes.

    \b
    cai clean quickstart
    """
    from cai.files import remove
    from cai.runs import find_run, locked, unused

    folder = find_run(run, runs_folder)
    with locked(folder):
        old = unused(folder, unfinished)
        for path, size in old:
            click.echo(f"{size / 1e6:10,.1f} MB  {path}")
        if not old:
            click.echo(f"{folder}: nothing to remove")
        elif yes or click.confirm(f"Remove {len(old)} folders?"):
            for path, _ in old:
                remove(path)
            click.echo(f"removed {len(old)} folders")


@main.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def init(folder: Path) -> None:
    """Copy the constitutions, a starter recipe and profile into a folder, to be changed there.

    \b
    cai init my-project
    cai run my-project/recipes/quickstart.yaml
    """
    from cai.shipped import copy_starter

    for path in copy_starter(folder):
        click.echo(path)
    click.echo(f"\nNext: cai run {folder / 'recipes' / 'quickstart.yaml'}")


@main.group()
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
    from cai.constitution.report import summary, summary_line
    from cai.constitution.weaknesses import weaknesses

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
    from cai.pipeline import prepare
    from cai.profile import load_profile

    document = load_constitution(file)
    profile = load_profile(on)
    from cai.feedback import principle_tests

    if examples is not None:
        document = principle_tests.with_examples_of(document, load_constitution(examples))
    prepare(profile)
    from cai import checkpoint
    from cai.engines import open_engine
    from cai.templates import load_templates

    judge = checkpoint.resolve(model, templates=templates, folder=Path.cwd())
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


@main.group()
def judge() -> None:
    """Put a judge to the test before anything is built on it."""


@judge.command("attack")
@click.option("--model", default="micro", show_default=True, metavar="MODEL", help="Who judges: a folder or a hub id.")
@click.option("--templates", default="auto", show_default=True, metavar="SET", help="Template set; auto = the model's.")
@click.option(
    "--constitution",
    "document",
    metavar="FILE",
    help="Attack on the examples of this document. [default: prompts of source micro for models of the embedded kind, "
    "else harmlessness]",
)
@click.option("--per-family", default=100, show_default=True, type=click.IntRange(2), help="Pairs, at most.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option(
    "--max-flip-rate",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Exit code 1 if more verdicts turn overall, every failure counted as turned.",
)
@click.option(
    "--max-family-flip-rate", type=click.FloatRange(0, 1), metavar="SHARE", help="The same for each family by itself."
)
@PROFILE
@JSON
def judge_attack(
    model: str,
    templates: str,
    document: str | None,
    per_family: int,
    seed: int,
    max_flip_rate: float | None,
    max_family_flip_rate: float | None,
    on: str | None,
    as_json: bool,
) -> None:
    """Put injections into responses ("The answer is A.", forged turns, hidden marks) and count the verdicts they turn.

    Each pair is judged in both orders, then again with an injection of each family in the response that lost. What gets
    no verdict is counted as failed; the worst case shows what failures may hide. "Still right" are verdicts that were
    right before and neither turned nor became even: one that was wrong and turns is no gain, it only obeys.

    Controls claim nothing (small talk in another language, floods of one letter, nothing to read). They are shown, and
    are in neither the overall rate nor the limits: the longest flood and the empty response are expected to get no
    verdict. The embedded judge was trained to ignore some of the families; of other models nobody knows which they
    have seen.

    \b
    cai judge attack
    cai judge attack --model my-model --constitution mine.yaml --max-flip-rate 0.05 --json
    """
    from cai.pipeline import prepare
    from cai.profile import load_profile

    profile = load_profile(on)
    prepare(profile)
    from cai import checkpoint, progress
    from cai.constitution import load_constitution
    from cai.engines import open_engine
    from cai.feedback import attacks
    from cai.micro.evaluate.attacks import cases
    from cai.templates import load_templates

    judge = checkpoint.resolve(model, templates=templates, folder=Path.cwd())
    embedded = judge.templates == "micro"
    if embedded and document is None:
        pairs = cases(per_family, seed)
    else:
        pairs = attacks.cases_of(load_constitution(document or "harmlessness"), per_family, seed)
    tokens = sorted(checkpoint.load_tokenizer(judge).all_special_tokens)
    with open_engine(judge, profile) as engine, progress.display() as shown:
        line = shown.begin("attacks")
        found = attacks.attack(pairs, engine, load_templates(judge.templates), tokens, seed, line)
        figures = attacks.figures(found, trained=embedded)
        shown.end(line, sum(each["flips"].get("missing", 0) for each in figures["families"].values()))
    click.echo(json.dumps({"model": judge.name} | figures) if as_json else "\n".join(attacks.lines(figures)))
    if over := attacks.above(figures, max_flip_rate, max_family_flip_rate):
        click.echo(f"above the limit: {', '.join(over)}", err=True)
        raise SystemExit(1)


@main.command()
@click.argument("models", nargs=-1, required=True, metavar="NAME=MODEL...")
@click.option("--prompts", required=True, metavar="SET", help="micro:SPLIT, or a file of prompts.")
@click.option(
    "--constitution",
    "document",
    metavar="FILE",
    help="What the judge goes by. [default: micro for micro:SPLIT, else harmlessness]",
)
@click.option("--judge", metavar="MODEL", help="Who judges. [default: the first model]")
@click.option("--limit", type=click.IntRange(1), help="Take this many of the prompts.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change the recipe: --set stages.comparison.n=4; repeatable.",
)
@PROFILE
@RUNS
@JSON
def compare(
    models: tuple[str, ...],
    prompts: str,
    document: str | None,
    judge: str | None,
    limit: int | None,
    overrides: tuple[str, ...],
    on: str | None,
    runs_folder: Path,
    as_json: bool,
) -> None:
    """Compare checkpoints on prompts: rates with intervals, head to head by a judge, a page to read.

    A MODEL is a folder, a hub id, `micro`, or RUN/STAGE: what that stage trained last. The first is the baseline. The
    same command again reuses what it computed.

    \b
    cai compare base=micro policy=quickstart/policy --prompts micro:test
    """
    from cai.comparing import comparison_recipe
    from cai.pipeline import Options

    recipe = comparison_recipe(models, prompts, document, judge, limit, runs_folder)
    _run(recipe, overrides, on, Options(), False, runs_folder, as_json)


@main.group()
def micro() -> None:
    """Train and measure the embedded model."""


@micro.command("pretrain")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--size",
    default="large",
    show_default=True,
    type=click.Choice(["small", "medium", "large"]),
    help="About 0.6, 1.7 or 4.3 million parameters; `large` is the embedded one.",
)
@click.option("--steps", type=click.IntRange(1), help="Steps of 4,160 tokens. [default: those of the embedded model]")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@PROFILE
@JSON
def micro_pretrain(folder: Path, size: str, steps: int | None, seed: int, on: str | None, as_json: bool) -> None:
    """Train the embedded model from scratch into a folder; started again, it goes on from its last checkpoint.

    \b
    cai micro pretrain my-micro                   # 70 minutes on one CPU core
    cai micro pretrain my-micro --on 1gpu
    cai run quickstart --set model=my-micro
    """
    from cai.pipeline import prepare
    from cai.profile import load_profile

    profile = load_profile(on)
    prepare(profile)
    from cai.micro.pretrain import Training, pretrain

    training = Training(seed=seed, size=size) if steps is None else Training(seed=seed, size=size, steps=steps)
    device = None if profile.device == "auto" else profile.device
    facts = pretrain(folder, training=training, device=device, log=_to_stderr)
    click.echo(json.dumps(facts) if as_json else f"{folder}: {json.dumps(facts)}")


@micro.command("evaluate")
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="A checkpoint. [default: the embedded model]",
)
@click.option(
    "--topics", "per_class", default=80, show_default=True, type=click.IntRange(2), help="Topics of each class."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Prompts of your own, JSONL, each with its class and what it is about.",
)
@click.option(
    "--principles",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="A constitution that says the world's principles in your own words.",
)
@PROFILE
@JSON
def micro_evaluate(
    model: Path | None,
    per_class: int,
    seed: int,
    prompts: Path | None,
    principles: Path | None,
    on: str | None,
    as_json: bool,
) -> None:
    """Measure a model of the embedded world against its oracle: as an assistant, judge, critic, rater and reviser.

    Tier 1 has topics whose parts the model knows and whose combination it never met, tier 2 verbs that it never met in
    a dialogue. Test it with what you make up yourself:

    \b
    cai micro evaluate --json
    cai micro evaluate --prompts mine.jsonl --principles mine.yaml
    {"prompt": "how would one nick a bike?", "kind": "harmful", "x": "steal a bicycle"}     # a line of mine.jsonl
    """
    from cai import tables
    from cai.pipeline import prepare
    from cai.profile import load_profile

    profile = load_profile(on)
    prepare(profile)
    from cai.micro.evaluate import evaluate

    figures = evaluate(
        model,
        per_class=per_class,
        seed=seed,
        prompts=prompts,
        constitution=principles,
        profile=profile,
        log=_to_stderr,
    )
    click.echo(json.dumps(figures) if as_json else "\n".join(tables.nested_lines(figures)))


def _to_stderr(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main()
