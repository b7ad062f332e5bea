"""`cai micro`: train and measure the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cai.cli.options import FOLDER, JSON, PROFILE, RUNS, SEED, chosen_judge, prepared_profile, to_stderr

EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group()
def micro() -> None:
    """Train and measure the embedded model."""


@micro.command("pretrain")
@click.argument("folder", type=FOLDER)
@click.option(
    "--size", default="large", show_default=True, type=click.Choice(["small", "medium", "large"]),
    help="About 0.6, 1.7 or 4.3 million parameters; `large` is the embedded one.",
)  # fmt: skip
@click.option("--steps", type=click.IntRange(1), help="Steps of 4,160 tokens. [default: those of the embedded model]")
@SEED
@PROFILE
@JSON
def micro_pretrain(folder: Path, size: str, steps: int | None, seed: int, on: str | None, as_json: bool) -> None:
    """Train the embedded model from scratch into a folder. Run again, it continues from its last resume point.

    \b
    cai micro pretrain my-micro                   # 70 minutes on one CPU core
    cai micro pretrain my-micro --on 1gpu
    cai run quickstart --set model=my-micro
    """
    profile = prepared_profile(on)
    from cai.micro_model.pretrain import Training, pretrain

    training = Training(seed=seed, size=size) if steps is None else Training(seed=seed, size=size, steps=steps)
    device = None if profile.device == "auto" else profile.device
    facts = pretrain(folder, training=training, device=device, log=to_stderr)
    click.echo(json.dumps(facts) if as_json else f"{folder}: {json.dumps(facts)}")


@micro.command("evaluate")
@click.option(
    "--model", metavar="MODEL", help="A model of the world: a folder, or RUN/STAGE. [default: the embedded model]"
)
@click.option(
    "--topics", "per_class", default=80, show_default=True, type=click.IntRange(2), help="Topics of each class."
)
@SEED
@click.option(
    "--prompts", type=EXISTING_FILE, metavar="FILE",
    help="Prompts of your own, JSONL, each with its class and what it is about.",
)  # fmt: skip
@click.option(
    "--principles", type=EXISTING_FILE, metavar="FILE",
    help="A constitution with the world's principles in your own words.",
)  # fmt: skip
@PROFILE
@RUNS
@JSON
def micro_evaluate(
    model: str | None, per_class: int, seed: int, prompts: Path | None, principles: Path | None, on: str | None,
    runs_folder: Path, as_json: bool,
) -> None:  # fmt: skip
    """Measure a model of the embedded world against its oracle: as an assistant, judge, critic, rater and reviser.

    Tier 1 has topics whose parts are in the training corpus and whose combination is not; tier 2 has verbs that are in
    no dialogue of the corpus. Test the model with prompts and wordings of your own:

    \b
    cai micro evaluate --json
    cai micro evaluate --prompts mine.jsonl --principles mine.yaml
    {"prompt": "how would one nick a bike?", "kind": "harmful", "x": "steal a bicycle"}     # a line of mine.jsonl
    """
    profile = prepared_profile(on)
    from cai.micro_model.evaluate import evaluate
    from cai.models.reference import fetch
    from cai.text import tables

    folder = None if model is None else fetch(chosen_judge(model, "micro", runs_folder, profile))
    figures = evaluate(
        folder, per_class=per_class, seed=seed, prompts=prompts, constitution=principles, profile=profile, log=to_stderr
    )
    click.echo(json.dumps(figures) if as_json else "\n".join(tables.nested_lines(figures)))
