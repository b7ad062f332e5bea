"""SIGTERM: ends a feedback stage at once, since its journal keeps finished portions, and a training stage at a resume
point.

Schedulers end jobs by SIGTERM and leave them some time. Only the process of `cai run` handles the signal. While a model
trains, the handler creates a file, and the first of the stage's processes, on whichever machine, looks for that file
after every optimizer step. The stage's processes keep the default action of SIGTERM, which ends them even while they
wait for each other inside of a library.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

from cai.text.errors import Terminated

STOP = "stop"
"""File in the stage's folder: training ends at the next resume point."""


class _Signals:
    """The state of this process's signal handler."""

    received = False
    """Whether a SIGTERM has come."""
    stop_file: Path | None = None
    """The file to create at the first SIGTERM instead of ending the process."""


@contextlib.contextmanager
def on_sigterm() -> Iterator[None]:
    """Within the block SIGTERM raises Terminated, or does what `at_resume_point` says."""

    def stop(number: int, frame: object) -> None:
        is_first, _Signals.received = not _Signals.received, True
        if not is_first or _Signals.stop_file is None:
            raise Terminated
        _Signals.stop_file.touch()

    _Signals.received = False
    try:
        previous_handler = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: the caller handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


@contextlib.contextmanager
def at_resume_point(folder: Path) -> Iterator[None]:
    """Within the block the first SIGTERM asks the stage in `folder` to stop at a resume point; a second one ends it."""
    path = folder / STOP
    path.unlink(missing_ok=True)
    _Signals.stop_file = path
    try:
        yield
    finally:
        _Signals.stop_file = None
        path.unlink(missing_ok=True)


def requested(folder: Path) -> bool:
    """Whether one of the stage's processes was asked to stop the stage in `folder`."""
    return (folder / STOP).exists()


def raise_if_deferred() -> None:
    """Raises Terminated where a SIGTERM has come that did not end the process."""
    if _Signals.received:
        raise Terminated
