"""SIGTERM: at once where a journal keeps what is done, after a checkpoint where a model trains.

Schedulers end jobs by SIGTERM and leave some time. The process of `cai run` is the one that listens. While a model
trains it leaves a file, and the first of the stage's processes, wherever it runs, looks for that file after every
optimizer step. The processes themselves keep the default action, which ends them even where they wait for each other
inside of a library: so nothing stands in the way of whoever has to end them.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

from cai.text.errors import Terminated

STOP = "stop"
"""In the stage's folder: go no further than the next checkpoint."""


class _Signals:
    """What this process has been told, and where a request to stop goes that need not be met at once."""

    asked = False
    later: Path | None = None


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the block like Ctrl-C does, or as `after_step` says."""

    def stop(number: int, frame: object) -> None:
        at_once = _Signals.asked or _Signals.later is None
        _Signals.asked = True
        if at_once:
            raise Terminated
        assert _Signals.later is not None
        _Signals.later.touch()

    _Signals.asked = False
    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: whoever started it handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def after_step(folder: Path) -> Iterator[None]:
    """Within the block the first SIGTERM asks the stage in `folder` to stop at a checkpoint; another one ends it."""
    path = folder / STOP
    path.unlink(missing_ok=True)
    _Signals.later = path
    try:
        yield
    finally:
        _Signals.later = None
        path.unlink(missing_ok=True)


def requested(folder: Path) -> bool:
    """Whether the stage in `folder` is to stop, asked in any of its processes."""
    return (folder / STOP).exists()


def check() -> None:
    """Raises Terminated where a SIGTERM has come that was put off."""
    if _Signals.asked:
        raise Terminated
