"""What ships with the package and is found by name from any folder: recipes, constitutions and profiles.

In a checkout these folders lie beside the package; in a wheel they lie inside of it.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def shipped(folder: str) -> Path:
    """The folder `recipes`, `constitutions` or `configs` that belongs to this installation."""
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


def shipped_names(folder: str) -> list[str]:
    """Names, without suffix, of the YAML files in a shipped folder."""
    return sorted(path.stem for path in shipped(folder).glob("*.yaml"))
