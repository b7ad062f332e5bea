"""Options that several commands take."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cai.cli.shell_completion import complete_model, complete_principle, complete_profile
from cai.text.errors import BadInput

if TYPE_CHECKING:
    from cai.constitution import Constitution
    from cai.contracts.model import Model
    from cai.contracts.profile import Profile

FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
SHARE = click.FloatRange(0, 1)
RUNS = click.option(
    "--runs", "runs_folder", type=FOLDER, default=Path("runs"), show_default=True, metavar="DIR",
    help="Folder that runs lie in.",
)  # fmt: skip
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
PROFILE = click.option(
    "--on", "on", metavar="PROFILE", shell_complete=complete_profile,
    help="Where to run: a profile's file or name. [default: cpu]",
)  # fmt: skip
ONLINE = click.option("--online", is_flag=True, help="Download models that are not here; as `offline: false`.")
VLLM_PYTHON = click.option(
    "--vllm-python", type=FILE, metavar="FILE",
    help="Interpreter of an environment with vLLM, for a profile with `engine: vllm`.",
)  # fmt: skip


def checked_name(context: click.Context, parameter: click.Parameter, name: str | None) -> str | None:
    """A name that a run may have. Raises BadInput for any other."""
    from cai.run.recipe_document import MAX_NAME, NAME_PATTERN

    if name is not None and (not re.fullmatch(NAME_PATTERN, name) or len(name) > MAX_NAME):
        raise BadInput(f"found the name {name!r}, expected up to {MAX_NAME} letters, digits, - and _ as in my-run")
    return name


NAME = click.option("--name", metavar="NAME", callback=checked_name, help="Name of the run, whose folder is called so.")
MODEL_HELP = "a folder, a hub id, `micro`, or RUN/STAGE: what that stage trained last"
MODEL = click.option(
    "--model",
    default="micro",
    show_default=True,
    metavar="MODEL",
    shell_complete=complete_model,
    help=f"Who judges: {MODEL_HELP}.",
)
SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change the recipe; repeatable.")
GPUS = click.option("--gpus", type=click.IntRange(1), help="GPUs of one machine. [default: this one's]")
GPU_MEMORY = click.option(
    "--gpu-memory", type=click.FloatRange(0, min_open=True), metavar="GB", help="Of each GPU. [default: this machine's]"
)
HOST_MEMORY = click.option(
    "--host-memory", type=click.FloatRange(0, min_open=True), metavar="GB", help="[default: this machine's]"
)
MODEL_CONFIG = click.option(
    "--model-config", type=FILE, metavar="FILE", help="The config.json of models that are not on this machine."
)
TEMPLATES = click.option(
    "--templates", default="auto", show_default=True, metavar="SET", help="Template set; auto = the model's."
)
PRINCIPLES = click.option(
    "--principle", "principles", multiple=True, metavar="ID_OR_TAG", shell_complete=complete_principle,
    help="Only this principle, or those with this tag; repeatable. An id wins over a tag of the same name.",
)  # fmt: skip
SEED = click.option("--seed", default=0, show_default=True, type=click.IntRange(0))


def chosen_profile(on: str | None, online: bool = False, vllm_python: Path | None = None) -> Profile:
    """The profile of the option `--on`, changed as `--online` and `--vllm-python` say."""
    from cai.contracts.profile import load_profile

    profile = load_profile(on)
    if online:
        profile = profile.model_copy(update={"offline": False})
    if vllm_python is None:
        return profile
    if profile.engine != "vllm":
        raise BadInput(
            f"--vllm-python {vllm_python}: profile {profile.name!r} has `engine: {profile.engine}`, expected a profile "
            f"with `engine: vllm`, such as --on vllm"
        )
    if not vllm_python.is_file():
        raise BadInput(f"--vllm-python {vllm_python}: no such file")
    # Not resolved: a virtual environment's interpreter is a link, and finds its packages by where the link lies.
    vllm = profile.vllm.model_copy(update={"python": vllm_python.absolute()})
    return profile.model_copy(update={"vllm": vllm})


def prepared_profile(on: str | None, online: bool = False, vllm_python: Path | None = None) -> Profile:
    """`chosen_profile`, put into effect. Call this before anything imports torch, whose threads and devices it sets."""
    from cai.run.stage_run import prepare

    profile = chosen_profile(on, online, vllm_python)
    prepare(profile)
    return profile


def with_principles(constitution: Constitution, names: tuple[str, ...]) -> Constitution:
    """The constitution with the principles of the option `--principle` alone; with all where it is absent."""
    if not names:
        return constitution
    try:
        principles = constitution.select(names)
    except BadInput as error:
        raise BadInput(f"--principle: {error}") from None
    ids = {principle.id for principle in principles}
    changes = tuple(change for change in constitution.changes if change.id in ids)
    return replace(constitution, principles=principles, changes=changes)


def chosen_judge(name: str, templates: str, runs_folder: Path, profile: Profile) -> Model:
    """The model of the option `--model`, checked; downloaded first where the profile is not offline."""
    from cai.models.model_files import resolve_for
    from cai.models.reference import stale_model_notes
    from cai.text.formatting import printable

    try:
        model = resolve_for(
            "language", name, folder=Path.cwd(), runs=runs_folder, templates=templates, offline=profile.offline,
            weights=profile.engine != "server",
        )  # fmt: skip
    except BadInput as error:
        raise BadInput(printable(f"--model {name}: {error}")) from None
    for note in stale_model_notes([name], runs_folder):
        to_stderr(printable(note))
    return model


def to_stderr(text: str) -> None:
    """Prints progress on stderr, because stdout may be one JSON object."""
    click.echo(text, err=True)
