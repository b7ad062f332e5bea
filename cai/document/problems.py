"""What is wrong in documents: problems with their positions, collected so that all of them are reported at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from cai.text.errors import BadInput
from cai.text.formatting import printable


class Problem(NamedTuple):
    """One thing that is wrong in a document."""

    message: str
    """What was found and what was expected, without the place."""
    file: str = ""
    line: int | None = None
    column: int | None = None
    """Line and column count from 1; None where the problem has no place in a file."""
    source: str = ""
    """Instead of a file, the option that set the value: `--set stages.policy.beta=2`."""

    def __str__(self) -> str:
        place = self.source or ":".join(str(part) for part in (self.file, self.line, self.column) if part)
        return printable(f"{place}: {self.message}" if place else self.message)


class WrongDocument(BadInput):
    """All problems of a document and of those that it refers to, a line each."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


class Problems:
    """Collects what several checks refuse, so that the user reads all of it at once."""

    def __init__(self) -> None:
        self._problems: list[Problem] = []

    def __bool__(self) -> bool:
        return bool(self._problems)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keeps what the block refuses with BadInput; the program goes on after the block."""
        try:
            yield
        except BadInput as error:
            self.add(error)

    def extend(self, problems: Problems) -> None:
        """Takes over what another collection holds."""
        self._problems += problems._problems

    def add(self, error: BadInput) -> None:
        """Keeps the problems that an error reports."""
        self._problems += problems_of(error)

    def raise_if_any(self) -> None:
        """Raises WrongDocument, in the order of the files and of their lines, where anything was collected."""
        if self._problems:
            files = list(dict.fromkeys(problem.file for problem in self._problems))
            in_order = sorted(
                dict.fromkeys(self._problems),
                key=lambda problem: (files.index(problem.file), problem.line or 0, problem.column or 0),
            )
            raise WrongDocument(in_order)


def problems_of(error: BadInput) -> tuple[Problem, ...]:
    """The problems that an error reports: several for a document, else its one sentence."""
    return error.problems if isinstance(error, WrongDocument) else (Problem(str(error)),)
