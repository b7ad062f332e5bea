"""The commands in README.md, in the pages of docs/ and in the examples of `--help` texts.

In Markdown every line of an indented block is a command; fenced blocks hold documents, output and code, and a command
in one of them is an error. A line that ends with a backslash goes on in the next one.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import click

from cai.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

MENTION = re.compile(r"`((?:cai|make) [^`]+)`")


class Block(NamedTuple):
    """Commands that stand together and are run one after another; `source` is `file:line` or `cai ... --help`."""

    source: str
    commands: tuple[str, ...]


def without_comment(line: str) -> str:
    """A shell line without its comment, which a `#` at a word's beginning and outside of quotes starts."""
    return re.match(r"(?:'[^']*'|\"[^\"]*\"|(?<!\s)#|[^'\"#])*", line.strip())[0].strip()  # type: ignore[index]


def page_blocks(path: Path) -> Iterator[Block]:
    """The indented blocks of a page. Raises ValueError for a command in a fenced block."""
    commands: list[str] = []
    start, fenced, continued, after_blank = 0, False, False, True
    name = str(path.relative_to(ROOT))
    for number, line in enumerate([*path.read_text(encoding="utf-8").splitlines(), ""], start=1):
        if line.startswith("```"):
            fenced = not fenced
        elif fenced and re.match(r"\s*(\$ )?(cai|make) [a-z]", line):
            raise ValueError(f"{name}:{number}: a command in a fenced block is not run; indent the block instead")
        elif not fenced and line.startswith("    ") and (commands or after_blank):
            start = start if commands else number
            text = without_comment(line)
            if continued:
                commands[-1] = commands[-1].removesuffix("\\") + text
            elif text:
                commands.append(text)
            continued = text.endswith("\\")
        elif commands:
            yield Block(f"{name}:{start}", tuple(commands))
            commands = []
        after_blank = not line.strip()


def page_mentions(path: Path) -> Iterator[tuple[str, str]]:
    """`file:line` and text of the commands that a page names in its sentences and tables."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        for mention in MENTION.findall(line):
            yield f"{path.relative_to(ROOT)}:{number}", mention


def command_tree(group: click.Command = main, path: tuple[str, ...] = ("cai",)) -> Iterator[tuple[str, click.Command]]:
    """Path, such as `cai votes try`, and command, of all commands and groups."""
    yield " ".join(path), group
    if isinstance(group, click.Group):
        for name, command in group.commands.items():
            yield from command_tree(command, (*path, name))


def help_blocks() -> Iterator[Block]:
    r"""The blocks after `\b` in the help of each command and in the text below it."""
    for path, command in command_tree():
        for text in (command.help, command.epilog):
            for block in re.findall(r"\x08\n(.*?)(?:\n\s*\n|\Z)", text or "", flags=re.DOTALL):
                lines = (re.sub(r"^\s*(Author|Run|Compare)\s+", "", line) for line in block.splitlines())
                yield Block(f"{path} --help", tuple(filter(None, map(without_comment, lines))))


def resolved(words: list[str]) -> tuple[str, click.Command, list[str]]:
    """The path of the command that `words` begin with, the command, and the words that are left. Raises ValueError."""
    command: click.Command = main
    path = [words[0]]
    rest = words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        if rest[0] not in command.commands:
            if command.invoke_without_command:
                break
            raise ValueError(f"{' '.join(path)} has no command {rest[0]!r}")
        command = command.commands[rest[0]]
        path.append(rest.pop(0))
    return " ".join(path), command, rest


def option_names(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


def load_script(path: str) -> ModuleType:
    """A script of the repository that belongs to no package, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
