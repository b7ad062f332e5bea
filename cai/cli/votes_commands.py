"""`cai votes`: what principles and judges do, by the votes of finished runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cai.cli.options import JSON, RUNS
from cai.text.errors import BadInput

if TYPE_CHECKING:
    from cai.feedback.truth import Kind


@click.group()
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
