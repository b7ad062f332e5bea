"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path

import click

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


def to_stderr(text: str) -> None:
    """Prints progress on stderr, because stdout may be one JSON object."""
    click.echo(text, err=True)
