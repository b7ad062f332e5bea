"""The errors that a user can do something about, and the exit code of each.

Everything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CaiError(Exception):
    """One sentence for the user: where, what was found, what was expected, what to do."""

    exit_code = 3


class BadInput(CaiError):
    """A document, a prompt file or a command line is wrong; nothing was started."""

    exit_code = 2


class StageFailed(CaiError):
    """A stage could not finish; what it had computed stays on disk."""

    exit_code = 3


class GateFailed(CaiError):
    """A check did not hold, and the recipe says that the run stops then."""

    exit_code = 1


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a run like Ctrl-C does, with an exit code of its own."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name most like `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""
