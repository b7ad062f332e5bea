"""A package of cai imports only the packages below it, and nothing imports in a circle: pyproject.toml has the order.

`lint-imports` runs on the real tree and on copies of it with one bad import each, so that a contract that stops
checking is noticed. Imports inside functions and under TYPE_CHECKING count. What has to be quick imports no large
library.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest
import toy_stages

ROOT = Path(__file__).parents[1]

PLANTED_IMPORTS = {
    "upward": ("cai/maths/losses.py", "from cai.stages import STAGES", "cai.maths is not allowed to import cai.stages"),
    "upward in a function": (
        "cai/text/errors.py",
        "def late() -> None:\n    import cai.run.plan",
        "cai.text is not allowed to import cai.run",
    ),
    "upward for a type": (
        "cai/storage/rows.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from cai.models.chat import Chat",
        "cai.storage is not allowed to import cai.models",
    ),
    "modules in a circle": (
        "cai/storage/files.py",
        "def late() -> None:\n    import cai.storage.run_folder",
        "No cycles are allowed in cai.storage.",
    ),
    "packages in a circle": (
        "cai/training/metrics.py",
        "from cai.training.rl.rollouts import Rollouts",
        "No cycles are allowed in cai.training.",
    ),
    "package without a layer": ("cai/extra/__init__.py", "", "- cai.extra\n"),
}
"""By what is wrong: the file, the lines that it gets at its end, and what `lint-imports` prints."""

LARGE_LIBRARIES = {"torch", "transformers", "trl", "datasets", "numpy", "scipy", "jinja2", "matplotlib", "rich"}
CHECK = ["constitution", "check", "harmlessness", *map(str, sorted((ROOT / "constitutions").glob("*.yaml")))]
COMMAND = "from cai.cli import main; main({}, standalone_mode=False)"
QUICK_CODE = {
    "help": (COMMAND.format(["--help"]), LARGE_LIBRARIES),
    "help of a command": (COMMAND.format(["run", "--help"]), LARGE_LIBRARIES),
    "check of constitutions": (COMMAND.format(CHECK), LARGE_LIBRARIES),
    "check of a recipe": ("from cai.run.recipe import load_recipe; load_recipe('recipe.yaml')",
                          {"torch", "transformers", "trl", "datasets"}),
    "oracle": ("import cai.micro.oracle", {"torch", "jinja2"}),
    "prompts": ("import cai.prompt_sets, cai.models.reference", {"torch", "transformers", "datasets"}),
}  # fmt: skip
"""By what has to be quick: code, and the libraries that it does not import."""


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """`lint-imports` on the package and the pyproject.toml in `folder`, as `make lint` calls it."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def circular_imports(graph: grimp.ImportGraph) -> list[tuple[str, str]]:
    """The imports (importer, imported) after which the imported module imports the importer, directly or not."""
    return [
        (importer, imported)
        for importer in sorted(graph.modules)
        for imported in sorted(graph.find_modules_directly_imported_by(importer))
        if graph.chain_exists(importer=imported, imported=importer)
    ]


def test_the_package_keeps_its_layers():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(("file", "lines", "message"), PLANTED_IMPORTS.values(), ids=PLANTED_IMPORTS)
def test_a_bad_import_is_refused(tmp_path, file, lines, message):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for source in (ROOT / "cai").rglob("*.py"):
        copy = tmp_path / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copy)
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as module:
        module.write(f"\n{lines}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1
    assert message in result.stdout


def test_no_module_imports_itself_by_way_of_others():
    # The contract compares siblings; a package's __init__.py and a module in it are none.
    graph = grimp.build_graph("cai", cache_dir=None)
    assert circular_imports(graph) == []
    graph.add_import(importer="cai.document.building", imported="cai.document")
    assert ("cai.document.building", "cai.document") in circular_imports(graph)


@pytest.mark.parametrize(("code", "libraries"), QUICK_CODE.values(), ids=QUICK_CODE)
def test_what_has_to_be_quick_imports_no_large_library(tmp_path, code, libraries):
    toy_stages.make_recipe(tmp_path, toy_stages.GOOD)
    code += f"\nimport sys; print(sorted({libraries} & sys.modules.keys()))"
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-1] == "[]"
