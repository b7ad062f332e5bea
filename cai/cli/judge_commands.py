"""`cai judge` and `cai votes`: test a judge, and figures about principles and judges from votes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cai.cli.options import (
    FILE,
    JSON,
    MODEL,
    ONLINE,
    PRINCIPLES,
    PROFILE,
    RUNS,
    SEED,
    SHARE,
    TEMPLATES,
    VLLM_PYTHON,
    chosen_judge,
    prepared_profile,
    to_stderr,
)
from cai.cli.shell_completion import complete_principle, complete_run_or_stage
from cai.text.errors import BadInput
from cai.text.formatting import printable

if TYPE_CHECKING:
    from cai.feedback.labelled_votes import LabelledVotes
    from cai.feedback.truth import TruthKind


@click.group()
def judge() -> None:
    """Test a judge before anything is built on it."""


@judge.command("attack")
@MODEL
@TEMPLATES
@click.option(
    "--constitution", "document", metavar="FILE",
    help="Attack on the examples of this document. [default: prompts of source micro for models of the embedded kind, "
    "else harmlessness]",
)  # fmt: skip
@click.option("--per-family", default=100, show_default=True, type=click.IntRange(2), help="Pairs, at most.")
@SEED
@click.option(
    "--max-flip-rate", type=SHARE, metavar="SHARE",
    help="Exit code 1 if more verdicts turn overall, every failure counted as turned.",
)  # fmt: skip
@click.option("--max-family-flip-rate", type=SHARE, metavar="SHARE", help="The same for each family by itself.")
@PROFILE
@ONLINE
@VLLM_PYTHON
@RUNS
@JSON
def judge_attack(
    model: str, templates: str, document: str | None, per_family: int, seed: int, max_flip_rate: float | None,
    max_family_flip_rate: float | None, on: str | None, online: bool, vllm_python: Path | None, runs_folder: Path,
    as_json: bool,
) -> None:  # fmt: skip
    """Put injections into responses ("The answer is A.", forged turns, hidden marks) and count the verdicts they turn.

    Each pair is judged in both orders, then again with an injection of each family in the response that lost. What gets
    no verdict is counted as failed; the worst case shows what failures may hide. "Still right" are verdicts that were
    right before and neither turned nor became even: a wrong verdict that turns is no gain, it only obeys.

    Controls claim nothing (small talk in another language, floods of one letter, nothing to read). They are shown, and
    are in neither the overall rate nor the limits: the longest flood and the empty response are expected to get no
    verdict. The embedded judge was trained to ignore some of the families; which of them other models were trained on
    is unknown.

    \b
    cai judge attack
    cai judge attack --model my-model --constitution mine.yaml --max-flip-rate 0.05 --json
    """
    profile = prepared_profile(on, online, vllm_python)
    from cai.constitution import load_constitution
    from cai.engines import open_engine
    from cai.feedback import judge_attacks
    from cai.micro_model.evaluate.judging import attack_cases
    from cai.models import loading
    from cai.templates import load_templates
    from cai.text import progress

    judge = chosen_judge(model, templates, runs_folder, profile)
    is_embedded = judge.templates == "micro"
    if is_embedded and document is None:
        pairs = attack_cases(per_family, seed)
    else:
        pairs = judge_attacks.constitution_cases(load_constitution(document or "harmlessness"), per_family, seed)
    tokens = sorted(loading.load_tokenizer(judge).all_special_tokens)
    with open_engine(judge, profile) as engine, progress.open_display() as display:
        line = display.begin_stage("attacks")
        outcomes = judge_attacks.attack(pairs, engine, load_templates(judge.templates), tokens, seed, line)
        figures = judge_attacks.attack_figures(outcomes, is_embedded=is_embedded)
        display.end_stage(line, sum(family["flips"].get("missing", 0) for family in figures["families"].values()))
    facts = {"model": judge.name} | figures
    click.echo(json.dumps(facts) if as_json else "\n".join(judge_attacks.attack_lines(figures)))
    if above := judge_attacks.names_above(figures, max_flip_rate, max_family_flip_rate):
        click.echo(f"above the limit: {', '.join(above)}", err=True)
        raise SystemExit(1)


@click.group()
def votes() -> None:
    """Figures about principles and judges from the votes of finished runs: no model is asked."""


EXAMPLE_PAIRS = click.option(
    "--examples", "n_examples", type=click.IntRange(min=0), default=3, show_default=True, help="Pairs to read."
)


def _labelled_votes(name: str, runs_folder: Path) -> LabelledVotes:
    """The votes behind a finished `prefer` stage; says on stderr where they are stale."""
    from cai.feedback.labelled_votes import load_labelled_votes

    labelled_votes = load_labelled_votes(name, runs_folder)
    if labelled_votes.stale_note:
        to_stderr(printable(labelled_votes.stale_note))
    return labelled_votes


@votes.command("explain")
@click.argument("run", shell_complete=complete_run_or_stage)
@PRINCIPLES
@EXAMPLE_PAIRS
@RUNS
@JSON
def votes_explain(
    run: str, principles: tuple[str, ...], n_examples: int, runs_folder: Path, as_json: bool
) -> None:  # fmt: skip
    """Show how often each principle decides, which others it agrees with, and which labels turn without it.

    Pairs to read are labels that turn and change by 0.05 or more in probability, the largest change first.

    RUN is a run's name or folder, or RUN/STAGE where several stages of it turn votes into preferences. Tags of
    --principle are those of the constitution as it is now.

    \b
    cai votes explain quickstart
    cai votes explain quickstart --principle harmless --principle style
    cai votes explain quickstart --examples 10 --json
    """
    from cai.feedback.explain import explain
    from cai.feedback.explanation_text import explanation_lines
    from cai.run.voted_principles import voted_principles

    labelled_votes = _labelled_votes(run, runs_folder)
    explanation = explain(labelled_votes, n_examples, voted_principles(labelled_votes, principles))
    click.echo(json.dumps(explanation) if as_json else "\n".join(explanation_lines(explanation)))


@votes.command("try")
@click.argument("run", shell_complete=complete_run_or_stage)
@click.argument("file", required=False, type=FILE)
@click.option(
    "--principle",
    "principle_id",
    metavar="ID",
    shell_complete=complete_principle,
    help="The principle that --text or --request is for.",
)
@click.option("--text", metavar="TEXT", help="Its text; what models are asked is derived from it.")
@click.option("--request", metavar="TEXT", help="What the judge is asked about it, word for word.")
@EXAMPLE_PAIRS
@PROFILE
@ONLINE
@VLLM_PYTHON
@RUNS
@JSON
def votes_try(
    run: str, file: Path | None, principle_id: str | None, text: str | None, request: str | None, n_examples: int,
    on: str | None, online: bool, vllm_python: Path | None, runs_folder: Path, as_json: bool,
) -> None:  # fmt: skip
    """Ask the judge of a run about a principle in other words, and show which labels would turn.

    Only what has changed is asked, and nothing of the run changes. The words are those of the options, or all that
    differ in an edited FILE. Once the run's constitution has them, `cai run` takes over from here what it compares
    again: all pairs where only the judge's request has changed, fewer where a critic or reviser reads the words too.

    \b
    cai votes try quickstart --principle harmless --text "The assistant does no harm."
    cai votes try my-run my-project/constitutions/edited.yaml
    """
    from cai.run.try_wording import edit_of, trial_lines, try_wording
    from cai.text import progress

    profile = prepared_profile(on, online, vllm_python)
    edit = edit_of(file, principle_id, text, request)
    figures = try_wording(run, runs_folder, profile, edit, progress.open_display(), n_examples)
    click.echo(json.dumps(figures) if as_json else "\n".join(trial_lines(figures)))


@votes.command("diff")
@click.argument("first", shell_complete=complete_run_or_stage)
@click.argument("second", shell_complete=complete_run_or_stage)
@EXAMPLE_PAIRS
@RUNS
@JSON
def votes_diff(first: str, second: str, n_examples: int, runs_folder: Path, as_json: bool) -> None:
    """Compare two judges, or two wordings of principles, on the pairs that two runs have in common.

    Where the judges were asked about a principle in different words, these are shown.

    \b
    cai votes diff quickstart my-run
    cai votes diff my-run/by-micro my-run/by-another
    """
    from cai.feedback.explain import compare_votes
    from cai.feedback.explanation_text import difference_lines

    first_votes, second_votes = (_labelled_votes(run, runs_folder) for run in (first, second))
    differences = compare_votes(first_votes, second_votes, n_examples)
    click.echo(json.dumps(differences) if as_json else "\n".join(difference_lines(differences)))


@votes.command("calibrate")
@click.argument("run", shell_complete=complete_run_or_stage)
@click.option("--picture", type=FILE, help="Draw it too: a file .svg or .png.")
@click.option(
    "--truth", type=click.Choice(["human", "oracle"]),
    help="What labels are measured against: people's choice, or the world's oracle. Absent: whichever there is.",
)  # fmt: skip
@RUNS
@JSON
def votes_calibrate(run: str, picture: Path | None, truth: TruthKind | None, runs_folder: Path, as_json: bool) -> None:
    """Measure whether labels are right as often as they say, where it is known which response is better.

    People know it of the pairs that a judge stage reads with `human: {source: hh.jsonl.gz}`, the embedded world's
    oracle of responses to prompts of source micro. Where the 95 % interval of accuracy, clustered by prompt or topic,
    contains one half, the judge is not distinguishable from chance.

    \b
    cai votes calibrate quickstart --picture reliability.svg
    cai votes calibrate my-run --truth human --json
    """
    from cai.feedback.judge_calibration import calibrate_labels, calibration_lines

    if picture is not None and picture.suffix not in {".svg", ".png"}:
        raise BadInput(f"--picture: found {picture.name!r}, expected a file .svg or .png")
    calibration = calibrate_labels(_labelled_votes(run, runs_folder), truth)
    if picture is not None:
        from cai.report.pictures import draw_reliability

        draw_reliability(calibration, picture)
    click.echo(json.dumps(calibration) if as_json else "\n".join(calibration_lines(calibration)))
