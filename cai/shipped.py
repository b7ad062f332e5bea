"""What ships with the package and is found by name from any folder: recipes, constitutions and profiles.

In a checkout these folders lie beside the package; in a wheel they lie inside of it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from cai.errors import BadInput

STARTER = ("constitutions/micro.yaml", "recipes/quickstart.yaml", "configs/cpu.yaml")
_PACKAGE = Path(__file__).parent


def shipped(folder: str) -> Path:
    """The folder `recipes`, `constitutions` or `configs` that belongs to this installation."""
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


def shipped_names(folder: str) -> list[str]:
    """Names, without suffix, of the YAML files in a shipped folder."""
    return sorted(path.stem for path in shipped(folder).glob("*.yaml"))


def copy_starter(folder: Path) -> list[Path]:
    """Copies a constitution, a recipe and a profile that work together; the new files. Nothing is overwritten."""
    sources = {folder / name: shipped(name.partition("/")[0]) / name.partition("/")[2] for name in STARTER}
    if there := [str(path) for path in sources if path.exists()]:
        raise BadInput(f"{there[0]} is there already; give another folder")
    for path, source in sources.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
    return list(sources)
