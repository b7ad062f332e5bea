"""The progress of a run's stages: items, tokens a second, time left.

On a terminal each stage has a line with a moving bar; elsewhere it prints one plain line when it ends. Everything goes
to stderr, so that stdout stays with results.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from cai.text.formatting import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import ProgressColumn, TaskID

COUNTS = ("total", "unit", "finished", "finished_before", "tokens")
"""The attributes of a line that another process reports."""
REPORT_SECONDS = 0.2
"""Shortest time between two reports to another process."""


class Progress(Protocol):
    """Where a stage reports its progress while it works."""

    def start(self, total: int, unit: str, finished: int = 0) -> None:
        """The stage has `total` items, of which earlier processes have finished `finished`."""

    def advance(self, items: int = 1, tokens: int = 0) -> None:
        """That many more items and tokens are finished."""

    def note(self, text: str) -> None:
        """Shows a sentence that the user should read."""


class StageLine:
    """Counts the progress of one stage and prints its notes; the base of lines that also show the counts."""

    def __init__(self, stage_id: str) -> None:
        self.stage_id = stage_id
        self.total = self.finished = self.finished_before = self.tokens = 0
        self.unit = ""
        self.start_time = time.monotonic()

    def start(self, total: int, unit: str, finished: int = 0) -> None:
        self.total, self.unit, self.finished, self.finished_before = total, unit, finished, finished
        self.update()

    def advance(self, items: int = 1, tokens: int = 0) -> None:
        self.finished += items
        self.tokens += tokens
        self.update()

    def note(self, text: str) -> None:
        print(printable(f"{self.stage_id}: {text}"), file=sys.stderr, flush=True)

    def update(self) -> None:
        """Called whenever a count has changed."""

    @property
    def seconds(self) -> float:
        """Since the stage began in this process."""
        return time.monotonic() - self.start_time

    @property
    def speed(self) -> str:
        """`1,830 tokens/s`; empty where the stage counts no tokens."""
        return f"{self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s" if self.tokens else ""

    def summary(self, failures: int) -> str:
        """`640 responses, 12.3 s, 1,830 tokens/s, 2 failed`."""
        before = f" ({self.finished_before:,} from before)" if self.finished_before else ""
        items = f"{self.finished:,} {self.unit}{before}" if self.unit else ""
        failed = f"{failures:,} failed" if failures else ""
        return ", ".join(filter(None, (items, duration(self.seconds), self.speed, failed)))


class PlainDisplay:
    """Prints one line when a stage ends."""

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file or sys.stderr

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def begin_stage(self, stage_id: str) -> StageLine:
        return StageLine(stage_id)

    def end_stage(self, line: StageLine, failures: int) -> None:
        self.note(f"{line.stage_id}: {line.summary(failures)}")

    def note(self, text: str) -> None:
        print(printable(text), file=self.file, flush=True)


class RichDisplay:
    """Shows a line with a bar for each stage, which stays when the stage has ended."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

        columns: list[ProgressColumn] = [
            SpinnerColumn(finished_text="[green]✓"), TextColumn("{task.fields[stage]}", markup=False),
            BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[words]}", markup=False),
        ]  # fmt: skip
        self.console = Console(stderr=True)
        self.bars: Bars = Progress(*columns, console=self.console)

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    def begin_stage(self, stage_id: str) -> StageLine:
        return _RichLine(stage_id, self.bars, self.bars.add_task("", total=None, stage=stage_id, words=""))

    def end_stage(self, line: StageLine, failures: int) -> None:
        assert isinstance(line, _RichLine)
        total = max(line.total, 1)
        self.bars.update(line.task, total=total, completed=total, words=line.summary(failures), refresh=True)

    def note(self, text: str) -> None:
        self.console.print(printable(text), markup=False, highlight=False)


Display = PlainDisplay | RichDisplay


class _RichLine(StageLine):
    def __init__(self, stage_id: str, bars: Bars, task: TaskID) -> None:
        super().__init__(stage_id)
        self.bars, self.task = bars, task

    def note(self, text: str) -> None:
        self.bars.console.print(printable(f"{self.stage_id}: {text}"), markup=False, highlight=False)

    def update(self) -> None:
        words = [self.unit, self.speed]
        if (finished_here := self.finished - self.finished_before) > 0 and self.total > self.finished:
            words.append(f"{duration(self.seconds / finished_here * (self.total - self.finished))} left")
        self.bars.update(self.task, total=self.total, completed=self.finished, words="  ".join(filter(None, words)))


class FileLine(StageLine):
    """Reports to another process through a file, one JSON object a line, at most every `REPORT_SECONDS`."""

    def __init__(self, stage_id: str, path: Path) -> None:
        super().__init__(stage_id)
        self.path = path
        self.report_time = 0.0

    def note(self, text: str) -> None:
        self._write({"note": text})

    def update(self) -> None:
        is_first_or_last = self.finished in (0, self.finished_before, self.total)
        if is_first_or_last or time.monotonic() - self.report_time > REPORT_SECONDS:
            self.report_time = time.monotonic()
            self._write({name: getattr(self, name) for name in COUNTS})

    def _write(self, event: dict[str, object]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


def relay(event: dict[str, object], line: StageLine) -> None:
    """Shows an event on `line` that a `FileLine` in another process has written."""
    if "note" in event:
        line.note(str(event["note"]))
        return
    for name in COUNTS:
        setattr(line, name, event[name])
    line.update()


def open_display() -> Display:
    """The display that fits stderr."""
    return RichDisplay() if sys.stderr.isatty() else PlainDisplay()


def duration(seconds: float) -> str:
    """`3.2 s`, `2 min 05 s`, `1 h 04 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"
