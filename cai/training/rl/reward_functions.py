"""Reward functions of the user's own: `file.py:name`, the file relative to the recipe.

A recipe is checked without running the file: it is parsed, and the name is looked up among its top-level definitions.
The file is executed when the first responses are scored; it is the user's own code, on the user's machine.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cai.storage.rows import Message
from cai.text.errors import BadInput, StageFailed, did_you_mean

RewardFunction = Callable[[list[list[Message]], list[str]], Sequence[float]]
"""Called with conversations and the response to each; returns a number for each."""


def function_place(written: str, folder: Path) -> tuple[Path, str]:
    """(file, name) of `file.py:name`. Raises BadInput for what is not written so."""
    file, _, name = written.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise BadInput(f"found {written!r}, expected `file.py:name`, the file relative to the recipe")
    return folder / Path(file).expanduser(), name


def check_function(written: str, folder: Path) -> None:
    """Raises BadInput for a file that is not there or not Python, and for a name that it does not define."""
    path, name = function_place(written, folder)
    if not path.is_file():
        names = [file_path.name for file_path in path.parent.glob("*.py")] if path.parent.is_dir() else []
        file = written.rpartition(":")[0]
        raise BadInput(f"no such file {file!r}, relative to the recipe{did_you_mean(path.name, names)}")
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise BadInput(f"{path.name}{line} is not Python: {reason}") from None
    defined_names = list(_defined_names(tree.body))
    if name not in defined_names and "*" not in defined_names:
        raise BadInput(f"{path.name} defines no {name!r}, expected a function{did_you_mean(name, defined_names)}")


def load_function(written: str, folder: Path) -> RewardFunction:
    """Executes the file and returns the function. Raises StageFailed where that goes wrong."""
    path, name = function_place(written, folder)
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise StageFailed(f"reward function {written!r}: no such file {path}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        function = getattr(module, name)
    except Exception as error:
        raise StageFailed(f"reward function {written!r}: {_where(error, path)}") from error
    if not callable(function):
        raise StageFailed(f"reward function {written!r}: found {type(function).__name__}, expected a function")
    return function  # type: ignore[no-any-return]


def call_function(
    function: RewardFunction, written: str, folder: Path, prompts: list[list[Message]], responses: list[str]
) -> list[float | str]:
    """A number for each response, or the reason why it has none: a missing or infinite value is no score.

    Raises StageFailed where the function raises, or returns something else than as many values as it was given.
    """
    try:
        returned = list(function(prompts, responses))
    except Exception as error:
        path, _ = function_place(written, folder)
        raise StageFailed(f"reward function {written!r}: {_where(error, path)}") from error
    if len(returned) != len(responses):
        expected = f"expected one for each of the {len(responses)} responses"
        raise StageFailed(f"reward function {written!r}: found {len(returned)} values, {expected}")
    return [_score(value) for value in returned]


def _score(value: Any) -> float | str:
    try:
        number = float("nothing" if isinstance(value, str) else value)  # text is refused, even if it spells a number
    except (TypeError, ValueError):
        return f"it returned {type(value).__name__}, expected a number"
    return number if math.isfinite(number) else f"it returned {number}, expected a finite number"


def _where(error: Exception, path: Path) -> str:
    """The error, with the line of the user's file that raised it or called what raised it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    line = f"{path.name}:{frames[-1].lineno}: " if frames else ""
    return f"{line}{type(error).__name__}: {error}"


def _defined_names(body: Sequence[ast.stmt]) -> Iterator[str]:
    """Names that statements at the top level of a file may define."""
    for statement in body:
        match statement:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                yield from (alias.asname or alias.name.partition(".")[0] for alias in names)
            case ast.Assign(targets=targets):
                yield from (node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.If(body=first, orelse=second):
                yield from _defined_names([*first, *second])
            case ast.Try(body=first, handlers=handlers, orelse=second, finalbody=last):
                caught = [node for handler in handlers for node in handler.body]
                yield from _defined_names([*first, *second, *last, *caught])
