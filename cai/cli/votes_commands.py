"""`cai votes`: figures about principles and judges from the votes of finished runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cai.cli.options import JSON, RUNS
from cai.text.errors import BadInput

if TYPE_CHECKING:
    from cai.feedback.truth import TruthKind


@click.group()
def votes() -> None:
    """Figures about principles and judges from the votes of finished runs: no model is asked."""


EXAMPLE_PAIRS = click.option(
    "--examples", "n_examples", type=click.IntRange(min=0), default=3, show_default=True, help="Pairs to read."
)


@votes.command("explain")
@click.argument("run")
@EXAMPLE_PAIRS
@RUNS
@JSON
def votes_explain(run: str, n_examples: int, runs_folder: Path, as_json: bool) -> None:
    """Show how often each principle decides, which others it agrees with, and which labels turn without it.

    RUN is a run's name or folder, or RUN/STAGE where several stages of it turn votes into preferences.

    \b
    cai votes explain quickstart
    cai votes explain quickstart --examples 10 --json
    """
    from cai.feedback.explain import explain, explanation_lines
    from cai.feedback.labelled_votes import load_labelled_votes

    explanation = explain(load_labelled_votes(run, runs_folder), n_examples)
    click.echo(json.dumps(explanation) if as_json else "\n".join(explanation_lines(explanation)))


@votes.command("diff")
@click.argument("first")
@click.argument("second")
@EXAMPLE_PAIRS
@RUNS
@JSON
def votes_diff(first: str, second: str, n_examples: int, runs_folder: Path, as_json: bool) -> None:
    """Compare two judges, or two wordings of principles, on the pairs that two runs have in common.

    \b
    cai votes diff quickstart my-run
    cai votes diff my-run/by-micro my-run/by-another
    """
    from cai.feedback.explain import compare_votes, difference_lines
    from cai.feedback.labelled_votes import load_labelled_votes

    differences = compare_votes(
        load_labelled_votes(first, runs_folder), load_labelled_votes(second, runs_folder), n_examples
    )
    click.echo(json.dumps(differences) if as_json else "\n".join(difference_lines(differences)))


@votes.command("calibrate")
@click.argument("run")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw it too: a file .svg or .png.")
@click.option(
    "--truth",
    type=click.Choice(["human", "oracle"]),
    help="What labels are measured against: people's choice, or the world's oracle. Absent: whichever there is.",
)
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
    from cai.feedback.labelled_votes import load_labelled_votes

    if picture is not None and picture.suffix not in {".svg", ".png"}:
        raise BadInput(f"--picture: found {picture.name!r}, expected a file .svg or .png")
    calibration = calibrate_labels(load_labelled_votes(run, runs_folder), truth)
    if picture is not None:
        from cai.report.pictures import draw_reliability

        draw_reliability(calibration, picture)
    click.echo(json.dumps(calibration) if as_json else "\n".join(calibration_lines(calibration)))
