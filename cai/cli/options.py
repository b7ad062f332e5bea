"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from cai.contracts.profile import Profile

FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
SHARE = click.FloatRange(0, 1)
RUNS = click.option(
    "--runs", "runs_folder", type=FOLDER, default=Path("runs"), show_default=True, metavar="DIR",
    help="Folder that runs lie in.",
)  # fmt: skip
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
PROFILE = click.option("--on", "on", metavar="PROFILE", help="Where to run: a profile's file or name. [default: cpu]")
MODEL = click.option(
    "--model", default="micro", show_default=True, metavar="MODEL", help="Who judges: a folder or a hub id."
)
TEMPLATES = click.option(
    "--templates", default="auto", show_default=True, metavar="SET", help="Template set; auto = the model's."
)
SEED = click.option("--seed", default=0, show_default=True, type=click.IntRange(0))


def prepared_profile(on: str | None) -> Profile:
    """The profile of the option `--on`. Call this before anything imports torch, whose threads and devices it sets."""
    from cai.contracts.profile import load_profile
    from cai.run.stage_run import prepare

    profile = load_profile(on)
    prepare(profile)
    return profile


def to_stderr(text: str) -> None:
    """Prints progress on stderr, because stdout may be one JSON object."""
    click.echo(text, err=True)
