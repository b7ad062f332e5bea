"""`cai judge`: test a judge."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cai.cli.options import JSON, PROFILE


@click.group()
def judge() -> None:
    """Test a judge before anything is built on it."""


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
    right before and neither turned nor became even: a wrong verdict that turns is no gain, it only obeys.

    Controls claim nothing (small talk in another language, floods of one letter, nothing to read). They are shown, and
    are in neither the overall rate nor the limits: the longest flood and the empty response are expected to get no
    verdict. The embedded judge was trained to ignore some of the families; which of them other models were trained on
    is unknown.

    \b
    cai judge attack
    cai judge attack --model my-model --constitution mine.yaml --max-flip-rate 0.05 --json
    """
    from cai.contracts.profile import load_profile
    from cai.run.stage_run import prepare

    profile = load_profile(on)
    prepare(profile)
    from cai.constitution import load_constitution
    from cai.engines import open_engine
    from cai.feedback import judge_attacks
    from cai.micro_model.evaluate.attack_cases import cases
    from cai.models import loading, reference
    from cai.templates import load_templates
    from cai.text import progress

    judge = reference.resolve(model, templates=templates, folder=Path.cwd())
    is_embedded = judge.templates == "micro"
    if is_embedded and document is None:
        pairs = cases(per_family, seed)
    else:
        pairs = judge_attacks.constitution_cases(load_constitution(document or "harmlessness"), per_family, seed)
    tokens = sorted(loading.load_tokenizer(judge).all_special_tokens)
    with open_engine(judge, profile) as engine, progress.open_display() as display:
        line = display.begin_stage("attacks")
        outcomes = judge_attacks.attack(pairs, engine, load_templates(judge.templates), tokens, seed, line)
        figures = judge_attacks.attack_figures(outcomes, is_embedded=is_embedded)
        display.end_stage(line, sum(family["flips"].get("missing", 0) for family in figures["families"].values()))
    click.echo(
        json.dumps({"model": judge.name} | figures) if as_json else "\n".join(judge_attacks.attack_lines(figures))
    )
    if above := judge_attacks.names_above(figures, max_flip_rate, max_family_flip_rate):
        click.echo(f"above the limit: {', '.join(above)}", err=True)
        raise SystemExit(1)
