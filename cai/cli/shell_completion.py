"""What a shell completes: names of recipes, runs, stages, profiles, constitutions, principles and models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from cai.document.shipped import shipped_names
from cai.storage import run_folder
from cai.storage.files import read_json
from cai.text.errors import CaiError

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that makes a shell complete commands, options and names: of recipes, runs, stages, principles.

    \b
    eval "$(cai completion bash)"        # in ~/.bashrc; zsh alike in ~/.zshrc
    cai completion fish > ~/.config/fish/completions/cai.fish
    """
    shell_class = get_completion_class(shell)
    assert shell_class is not None, "click has these shells"
    click.echo(shell_class(context.find_root().command, {}, "cai", "_CAI_COMPLETE").source())


def complete_recipe(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Shipped recipes by name, and files."""
    return _names_or_files(shipped_names("recipes"), incomplete)


def complete_profile(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Shipped profiles by name, and files."""
    return _names_or_files(shipped_names("configs"), incomplete)


def complete_constitution(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Shipped constitutions by name, and files."""
    return _names_or_files(shipped_names("constitutions"), incomplete)


def complete_run(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of the runs in the folder of `--runs`."""
    return _items([path.name for path in _runs(context)], incomplete)


def complete_run_or_stage(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """RUN, and after a slash the stages of that run."""
    run, slash, _ = incomplete.partition("/")
    if not slash:
        return complete_run(context, parameter, incomplete)
    return _items([f"{run}/{stage}" for stage in run_folder.latest(_runs_folder(context) / run)], incomplete)


def complete_model(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """`micro`, the stages of runs that have trained a model, as RUN/STAGE, and folders."""
    from cai.models.reference import trained_models

    trained = trained_models(_runs_folder(context))
    return _items(["micro", *trained], incomplete) or [CompletionItem(incomplete, type="dir")]


def complete_stage(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Stages of the recipe that the command line names."""
    from cai.run.recipe import load_recipe

    with contextlib.suppress(CaiError, OSError, KeyError):
        recipe = load_recipe(_argument(context, "recipe"), runs=_runs_folder(context))
        return _items(dict.fromkeys([*recipe.composites, *recipe.stages]), incomplete)
    return []


def complete_principle(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Ids of the principles of the constitution, or of the run's, that the command line names."""
    from cai.constitution import load_constitution
    from cai.run.recipe import load_recipe

    with contextlib.suppress(CaiError, OSError, KeyError):
        if any(of_command.name == "run" for of_command in context.command.params):
            run = run_folder.find_run(_argument(context, "run").partition("/")[0], _runs_folder(context))
            facts = read_json(run / run_folder.RUN)
            constitution = load_recipe(facts["recipe"], facts["overrides"], run.parent).constitution
        else:
            constitution = load_constitution(_argument(context, "file"))
        if constitution is not None:
            return _items([principle.id for principle in constitution.principles], incomplete)
    return []


def _argument(context: click.Context, name: str) -> str:
    """The first argument on the command line, called `name`. Raises KeyError where there is none.

    After an option whose value is being completed, click leaves arguments unread.
    """
    value = context.params.get(name) or next(iter(context.args), None)
    if value is None:
        raise KeyError(name)
    return str(value)


def _runs_folder(context: click.Context) -> Path:
    return Path(context.params.get("runs_folder") or "runs")


def _runs(context: click.Context) -> list[Path]:
    return sorted(path.parent for path in _runs_folder(context).glob(f"*/{run_folder.RUN}"))


def _items(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _names_or_files(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return _items(names, incomplete) or [CompletionItem(incomplete, type="file")]
