"""Names in the code say what they hold, and words that docs/glossary.md replaced do not come back.

Checked are the names that the code itself binds: variables, parameters, attributes, functions, classes and modules.
Strings, dictionary keys, comments and names of other libraries are not.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("cai", "benchmarks", "studies", "tests")

VAGUE_NAMES = {"each", "found", "some", "there", "given", "one", "said", "what", "room", "rooms"}
"""With underscores around them and in any case, but not as part of a longer name."""
REPLACED_WORDS = {
    "attending": "patched attention", "ballot": "vote column", "ballots": "vote columns", "disarmed": "escaped",
    "few_sizes": "pad to multiple", "holdout": "held out", "lent": "patched attention", "mass": "option probability",
    "own_session": "what the session is for", "parted": "partitioned, or escaped", "quiet": "what is kept quiet",
    "shelf": "length bucket", "shelves": "length buckets", "sooner": "what is compared", "thoughts": "rationales",
    "unmarked": "escaped",
}  # fmt: skip
"""Words, alone or as part of a longer name, and what to say instead."""
REPLACED_CONFIG_FIELDS = {"asks": "template_names", "requests": "principle_fields"}


def bound_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of everything that the module gives a name to."""
    for node in ast.walk(tree):
        match node:
            case (
                ast.Name(id=str(name), ctx=ast.Store())
                | ast.Attribute(attr=str(name), ctx=ast.Store())
                | ast.arg(arg=str(name))
                | ast.alias(asname=str(name))
                | ast.FunctionDef(name=str(name))
                | ast.AsyncFunctionDef(name=str(name))
                | ast.ClassDef(name=str(name))
                | ast.ExceptHandler(name=str(name))
                | ast.MatchAs(name=str(name))
                | ast.MatchStar(name=str(name))
                | ast.MatchMapping(rest=str(name))
            ):
                yield node.lineno, name


def config_fields(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of the attributes of classes called `...Config`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            for statement in node.body:
                if isinstance(statement, ast.Assign | ast.AnnAssign):
                    yield from bound_names(ast.Module([statement], []))
                elif isinstance(statement, ast.FunctionDef):
                    yield statement.lineno, statement.name


def snake_case(name: str) -> str:
    """`_PartedWeights` as `_parted_weights_`: every word stands between underscores."""
    return "_".join(["", *re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", name), ""]).lower()


def complaints(source: str, module: str = "") -> list[str]:
    """`line: name: complaint` for the names in the source of a module, and for the name of the module."""
    tree = ast.parse(source)
    complaints = []
    for line, name in [(1, module), *bound_names(tree)]:
        if name.strip("_").lower() in VAGUE_NAMES:
            complaints.append(f"{line}: {name}: does not say what it holds")
        for word, replacement in REPLACED_WORDS.items():
            if f"_{word}_" in snake_case(name):
                complaints.append(f"{line}: {name}: for {word!r} say: {replacement}")
    for line, name in config_fields(tree):
        if name in REPLACED_CONFIG_FIELDS:
            complaints.append(f"{line}: {name}: in a config is called {REPLACED_CONFIG_FIELDS[name]}")
    return complaints


@pytest.mark.parametrize("folder", FOLDERS)
def test_names_say_what_they_hold(folder):
    assert not [
        f"{path.relative_to(ROOT)}:{complaint}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for complaint in complaints(path.read_text(encoding="utf-8"), path.stem)
    ]


@pytest.mark.parametrize(
    "source",
    [
        "found = 1", "found: int = 1", "first, *found = row", "for found in rows: pass", "[1 for found in rows]",
        "if found := row: pass", "self.found = row", "class Rows:\n    found: int", "def rows(found): pass",
        "def rows(*, found=1): pass", "def rows(*found): pass", "lambda found: 1", "def found(): pass",
        "class _Found: pass", "with rows as found: pass", "import rows as found",
        "try:\n    pass\nexcept ValueError as found:\n    pass", "match row:\n    case [found]: pass",
        "match row:\n    case {**found}: pass", "def _parted_weights(): pass", "class PartedWeights: pass",
        "length_shelf = 1", "FEW_SIZES = 1", "class SampleConfig:\n    asks = ()",
        "class SampleConfig:\n    requests: ClassVar[tuple[str, ...]] = ()",
    ],
)  # fmt: skip
def test_a_vague_or_replaced_name_is_reported_once(source):
    assert len(complaints(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "row = {'found': 1}", "row['found'] = 1", "dict(found=1)", "'found'", "from hypothesis import given",
        "given(row)", "row = library.found", "founds = 1", "not_found = test_that_makes_room_for_one = 1",
        "departed = massive = massachusetts = bedroom = 1", "too_few = sizes = 1", "requests = 1",
        "def rows(requests): pass", "class Rows:\n    asks = ()",
        "class SampleConfig:\n    def check(self):\n        requests = 1",
    ],
)  # fmt: skip
def test_names_of_other_libraries_and_words_that_look_alike_are_not_reported(source):
    assert complaints(source) == []
