"""The errors that a user can act on, and the exit code of each.

Every other exception is a bug of this package and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CaiError(Exception):
    """One sentence for the user: the place, what was found, what was expected, what to do."""

    exit_code = 3


class BadInput(CaiError):
    """A document, a prompt file or a command line is wrong; nothing was started."""

    exit_code = 2


class TooLong(BadInput):
    """A conversation has more tokens than the model's context holds."""


class StageFailed(CaiError):
    """A stage could not finish; its results so far stay on disk."""

    exit_code = 3


class OutOfMemory(StageFailed):
    """A stage had too little memory; with less at once it can go on."""


class GateFailed(CaiError):
    """A check failed at which the recipe stops the run."""

    exit_code = 1


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a run as Ctrl-C does, with a different exit code."""


def nearest_name(name: str, valid_names: Iterable[str]) -> str | None:
    """The valid name closest to `name`; None where none is close."""
    return next(iter(difflib.get_close_matches(name, list(valid_names), n=1, cutoff=0.6)), None)


def did_you_mean(name: str, valid_names: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the valid name closest to `name`, or an empty string where none is close."""
    nearest = nearest_name(name, valid_names)
    return "" if nearest is None else f"; did you mean {nearest!r}?"


def first_line(error: Exception) -> str:
    """The first line of an error's text, or the name of its class where it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
