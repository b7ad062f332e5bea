"""The recipe of `cai compare`: one stage over models that are there already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from cai.document import parse_document
from cai.models.model_files import resolve_for
from cai.run.recipe import read_recipe
from cai.run.recipe_document import OWN, SELF
from cai.storage.files import replacing
from cai.storage.rows import stable_id
from cai.text.errors import BadInput
from cai.text.formatting import printable


def comparison_recipe(
    models: Sequence[str],
    prompts: str,
    constitution: str | None,
    judge: str | None,
    limit: int | None,
    columns: str | None,
    run_name: str | None,
    runs_folder: Path,
    *,
    offline: bool = True,
    weights: bool = True,
) -> Path:
    """Writes the recipe into the folder of its run; its path. Without a `run_name`, the run is named by prompts and
    constitution.

    `models` are NAME=MODEL; `prompts` is micro:SPLIT or a file with `columns` KEY=COLUMN,.... Raises BadInput for
    anything else, and for a model that cannot write or judge, before anything is written. Hub ids are downloaded first
    where `offline` is False; without `weights` they are not looked at.
    """

    def checked_model(name: str, argument: str) -> str:
        """The model that `argument` of the command line names, called so that a recipe in any folder can name it."""
        if name in {SELF, OWN}:
            return name
        try:
            model = resolve_for("language", name, folder=Path.cwd(), runs=runs_folder, offline=offline, weights=weights)
        except BadInput as error:
            raise BadInput(printable(f"{argument}: {error}")) from None
        return name if name == "micro" else model.path

    named: dict[str, str] = {}
    for text in models:
        name, equals, model = text.partition("=")
        if not equals or not name or not model:
            raise BadInput(f"found {text!r}, expected NAME=MODEL as in base=micro")
        if name in named:
            raise BadInput(f"found the name {name!r} a second time, expected each once")
        named[name] = checked_model(model, text)
    source, colon, split = prompts.partition(":")
    prompt_set: dict[str, object]
    if source == "micro" and colon:
        prompt_set = {"source": "micro", "split": split}
    elif Path(prompts).exists():
        prompt_set = {"source": str(Path(prompts).resolve())}
    else:
        raise BadInput(f"--prompts {prompts}: no such file, and not micro:SPLIT as in micro:test")
    if limit is not None:
        prompt_set["limit"] = limit
    if columns is not None:
        prompt_set["columns"] = _columns(columns)
    first = next(iter(named.values()))
    recipe = {
        "model": first,
        "judge": checked_model(judge, f"--judge {judge}") if judge else first,
        "constitution": _absolute(constitution or ("micro" if source == "micro" else "harmlessness")),
        "prompts": {"prompts": prompt_set},
        "stages": [{"id": "comparison", "kind": "compare", "models": named, "prompts": "prompts"}],
    }
    # Not of the models or the judge: another one of these uses the responses and votes that are there.
    name = run_name or f"compare-{stable_id(prompt_set, recipe['constitution'])[:8]}"
    path = runs_folder / name / "recipe.yaml"
    text = yaml.safe_dump({"name": name, **recipe}, sort_keys=False, allow_unicode=True)
    read_recipe(parse_document(text, path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())
    return path


def _columns(text: str) -> dict[str, str]:
    """The columns of `--columns prompt=question,tags=topic`."""
    columns: dict[str, str] = {}
    for entry in text.split(","):
        key, equals, column = (part.strip() for part in entry.partition("="))
        if not equals or not key or not column:
            raise BadInput(f"--columns: found {entry!r}, expected KEY=COLUMN as in prompt=question")
        columns[key] = column
    return columns


def _absolute(name: str) -> str:
    """A path that holds from any folder; a name that is none is left as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name
