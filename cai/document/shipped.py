"""Recipes, constitutions and profiles that ship with the package and are found by name from any folder.

In a checkout these folders are beside the package; in a wheel they are inside of it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cai.text.errors import BadInput, did_you_mean

STARTER = (
    "constitutions/schema.json",
    "recipes/quickstart.yaml",
    "recipes/schema.json",
    "configs/cpu.yaml",
    "configs/multi-node/2x8gpu-zero3.sbatch",
    "configs/schema.json",
)
"""What `cai init` copies beside the constitutions. The first line of a document tells editors where its schema is."""
_PACKAGE = Path(__file__).parent.parent
_OWN = Path(__file__).parent / "starter"
"""A constitution, prompts and a recipe to begin one's own with."""


def shipped_folder(folder: str) -> Path:
    """The folder `recipes`, `constitutions` or `configs` that belongs to this installation."""
    in_wheel = _PACKAGE / folder
    return in_wheel if in_wheel.is_dir() else _PACKAGE.parent / folder


def shipped_names(folder: str) -> list[str]:
    """Names, without suffix, of the YAML files in a shipped folder."""
    return sorted(path.stem for path in shipped_folder(folder).glob("*.yaml"))


def kind_hint(name: str, folder: str) -> str:
    """`; 'micro' is a constitution` where a shipped document of another folder than `folder` has this name, else ''."""
    kinds = {"recipes": "recipe", "constitutions": "constitution", "configs": "profile"}
    others = [kind for other, kind in kinds.items() if other != folder and name in shipped_names(other)]
    return f"; {name!r} is a {others[0]}" if others else ""


def copy_starter(folder: Path) -> list[Path]:
    """Copies the constitutions, a recipe, a profile and a Slurm script to `folder`, with their schemas, and writes a
    constitution and a recipe to begin one's own with; the new files.

    Raises BadInput, before anything is copied, where one of the files exists already.
    """
    constitutions = [f"constitutions/{name}.yaml" for name in shipped_names("constitutions")]
    sources = {}
    for name in (*constitutions, *STARTER):
        kind, _, file = name.partition("/")
        sources[folder / name] = shipped_folder(kind) / file
    sources |= {
        folder / path.relative_to(_OWN): path for path in sorted(_OWN.rglob("*")) if path.suffix in {".yaml", ".jsonl"}
    }
    if existing := [str(path) for path in sources if path.exists()]:
        raise BadInput(f"{existing[0]} is there already; give another folder")
    for path, source in sources.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
    return list(sources)


def find_beside(name: str | Path, home: Path, folder: str) -> Path | None:
    """The file that a document in `home` calls `name`: relative to `home`, else to the shipped folder; None if neither.

    So a copy of a shipped document, in any folder, still finds the shipped files that it names.
    """
    paths = (Path(os.path.normpath(start / name)) for start in (home, shipped_folder(folder)))
    return next((path for path in paths if path.is_file()), None)


def find_file(name: str, folder: str, kind: str) -> Path:
    """The file `name`, or the shipped one; messages call it a `kind`. Raises BadInput where there is neither."""
    path = Path(name)
    if path.is_file():
        return path
    names = shipped_names(folder)
    if path.name == name and path.stem in names and path.suffix in {"", ".yaml"}:
        return shipped_folder(folder) / f"{path.stem}.yaml"
    if path.suffix or path.name != name:
        raise BadInput(f"{name}: no such file" + did_you_mean(path.stem, names))
    hint = did_you_mean(name, names) or kind_hint(name, folder)
    raise BadInput(f"no {kind} {name!r}, expected a file or one of {', '.join(names)}{hint}")
