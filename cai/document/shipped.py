"""What ships with the package and is found by name from any folder: recipes, constitutions and profiles.

In a checkout these folders lie beside the package; in a wheel they lie inside of it.
"""

from __future__ import annotations

from pathlib import Path

from cai.text.errors import BadInput, nearest

STARTER = ("recipes/quickstart.yaml", "configs/cpu.yaml")
SCHEMA = "constitution/schema.json"
_PACKAGE = Path(__file__).parent.parent


def shipped(folder: str) -> Path:
    """The folder `recipes`, `constitutions` or `configs` that belongs to this installation."""
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


def shipped_names(folder: str) -> list[str]:
    """Names, without suffix, of the YAML files in a shipped folder."""
    return sorted(path.stem for path in shipped(folder).glob("*.yaml"))


def copy_starter(folder: Path) -> list[Path]:
    """Copies the constitutions with their schema, a recipe and a profile; the new files. Nothing is overwritten."""
    constitutions = [f"constitutions/{name}.yaml" for name in shipped_names("constitutions")]
    sources = {
        folder / name: shipped(name.partition("/")[0]) / name.partition("/")[2] for name in (*constitutions, *STARTER)
    }
    sources[folder / "constitutions" / "schema.json"] = _PACKAGE / SCHEMA
    if there := [str(path) for path in sources if path.exists()]:
        raise BadInput(f"{there[0]} is there already; give another folder")
    for path, source in sources.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        # The first line of a constitution tells editors where its schema lies, which is beside the copies.
        text = source.read_text(encoding="utf-8")
        path.write_text(text.replace(f"$schema=../cai/{SCHEMA}", "$schema=schema.json", 1), encoding="utf-8")
    return list(sources)


def find(name: str, folder: str, what: str) -> Path:
    """The file `name`, or the shipped one that is called so. Raises BadInput, naming the shipped ones, for neither."""
    path = Path(name)
    if path.is_file():
        return path
    known = shipped_names(folder)
    if path.name == name and path.stem in known and path.suffix in {"", ".yaml"}:
        return shipped(folder) / f"{path.stem}.yaml"
    if path.suffix or path.name != name:
        raise BadInput(f"{name}: no such file" + nearest(path.stem, known))
    raise BadInput(f"no {what} {name!r}, expected a file or one of {', '.join(known)}" + nearest(name, known))
