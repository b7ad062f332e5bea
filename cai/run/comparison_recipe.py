"""The recipe of `cai compare`: one stage over models that are there already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from cai.document import parse_document
from cai.run.recipe import read_recipe
from cai.storage import run_folder
from cai.storage.files import replacing
from cai.storage.rows import stable_id
from cai.storage.stage_folders import stale_note
from cai.text.errors import BadInput


def comparison_recipe(
    models: Sequence[str],
    prompts: str,
    constitution: str | None,
    judge: str | None,
    limit: int | None,
    columns: str | None,
    run_name: str | None,
    runs_folder: Path,
) -> Path:
    """Writes the recipe into the folder of its run; its path. Without a `run_name`, the run is named by prompts and
    constitution.

    `models` are NAME=MODEL, a model also RUN/STAGE; `prompts` is micro:SPLIT or a file with `columns` KEY=COLUMN,....
    Raises BadInput for anything else, before anything is written.
    """
    named: dict[str, str] = {}
    for text in models:
        name, equals, model = text.partition("=")
        if not equals or not name or not model:
            raise BadInput(f"found {text!r}, expected NAME=MODEL as in base=micro")
        if name in named:
            raise BadInput(f"found the name {name!r} a second time, expected each once")
        named[name] = _stage_model(model, runs_folder) or _absolute(model)
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
        "judge": _absolute(judge) if judge else first,
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


def stale_model_notes(models: Sequence[str], runs_folder: Path) -> list[str]:
    """A sentence about each NAME=RUN/STAGE among the models whose stage is stale, and what computes it again."""
    stages_by_run: dict[Path, list[str]] = {}
    for text in models:
        model = text.partition("=")[2]
        if _stage_model(model, runs_folder):
            run, _, stage_id = model.partition("/")
            stages_by_run.setdefault(runs_folder / run, []).append(stage_id)
    notes = [stale_note(run, stage_ids) for run, stage_ids in stages_by_run.items()]
    return [note for note in notes if note]


def _stage_model(name: str, runs_folder: Path) -> str | None:
    """The model that `quickstart/policy` means: what stage `policy` of run `quickstart` trained last."""
    run, slash, stage = name.partition("/")
    folder = run_folder.latest(runs_folder / run).get(stage) if slash else None
    return str((folder / "model").resolve()) if folder and (folder / "model").is_dir() else None


def _absolute(name: str) -> str:
    """A path that holds from any folder; a name that is none is left as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name
