"""What a run shows while it works: stage, items, tokens a second, time left.

On a terminal a line a stage that moves; where the output is no terminal one plain line when a stage ends. Everything
goes to stderr, so that stdout stays with results.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from cai.text.formatting import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import ProgressColumn, TaskID


class StageLine:
    """What one stage has told so far: the `Progress` that a stage is given."""

    def __init__(self, stage_id: str) -> None:
        self.stage_id = stage_id
        self.total = self.done = self.before = self.tokens = 0
        self.unit = ""
        self.began = time.monotonic()

    def start(self, total: int, unit: str, done: int = 0) -> None:
        """`total` items are to be done; `done` of them were before."""
        self.total, self.unit, self.done, self.before = total, unit, done, done
        self.changed()

    def advance(self, items: int = 1, tokens: int = 0) -> None:
        """So many more items, and tokens, are done."""
        self.done += items
        self.tokens += tokens
        self.changed()

    def note(self, text: str) -> None:
        """Something that the user should read."""
        print(printable(f"{self.stage_id}: {text}"), file=sys.stderr, flush=True)

    def changed(self) -> None:
        """Called after each of the above."""

    @property
    def seconds(self) -> float:
        """Since the stage began in this process."""
        return time.monotonic() - self.began

    @property
    def summary(self) -> str:
        """`640 responses, 12.3 s, 1,830 tokens/s`."""
        words = [f"{self.done:,} {self.unit}"] if self.unit else []
        if self.before:
            words[-1] += f" ({self.before:,} from before)"
        words.append(duration(self.seconds))
        if self.tokens:
            words.append(f"{self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s")
        return ", ".join(words)


class Display(Protocol):
    """Shows a run's stages one after the other."""

    def __enter__(self) -> Display: ...

    def __exit__(self, *exception: object) -> None: ...

    def begin(self, stage_id: str) -> StageLine: ...

    def end(self, line: StageLine, failures: int) -> None: ...

    def say(self, text: str) -> None: ...


class PlainDisplay:
    """One line when a stage ends."""

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file or sys.stderr

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def begin(self, stage_id: str) -> StageLine:
        return StageLine(stage_id)

    def end(self, line: StageLine, failures: int) -> None:
        self.say(f"{line.stage_id}: {line.summary}" + (f", {failures:,} failed" if failures else ""))

    def say(self, text: str) -> None:
        print(printable(text), file=self.file, flush=True)


class RichDisplay:
    """A line a stage with a bar, which stays when the stage has ended."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

        columns: list[ProgressColumn] = [
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.fields[stage]}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}", markup=False),
        ]
        self.console = Console(stderr=True)
        self.bars: Bars = Progress(*columns, console=self.console)

    def __enter__(self) -> RichDisplay:
        self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    def begin(self, stage_id: str) -> StageLine:
        return _RichLine(stage_id, self.bars, self.bars.add_task("", total=None, stage=stage_id, words=""))

    def end(self, line: StageLine, failures: int) -> None:
        assert isinstance(line, _RichLine)
        words = line.summary + (f", {failures:,} failed" if failures else "")
        total = max(line.total, 1)
        self.bars.update(line.task, total=total, completed=total, words=words, refresh=True)

    def say(self, text: str) -> None:
        self.console.print(printable(text), markup=False, highlight=False)


class _RichLine(StageLine):
    def __init__(self, stage_id: str, bars: Bars, task: TaskID) -> None:
        super().__init__(stage_id)
        self.bars, self.task = bars, task

    def note(self, text: str) -> None:
        self.bars.console.print(printable(f"{self.stage_id}: {text}"), markup=False, highlight=False)

    def changed(self) -> None:
        words = self.unit
        if self.tokens:
            words += f"  {self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s"
        if (new := self.done - self.before) > 0 and self.total > self.done:
            words += f"  {duration(self.seconds / new * (self.total - self.done))} left"
        self.bars.update(self.task, total=self.total, completed=self.done, words=words)


class FileLine(StageLine):
    """Tells another process through a file, a JSON object a line, at most a few times a second."""

    def __init__(self, stage_id: str, path: Path) -> None:
        super().__init__(stage_id)
        self.path = path
        self.told = 0.0

    def note(self, text: str) -> None:
        self._write({"note": text})

    def changed(self) -> None:
        if time.monotonic() - self.told > 0.2 or self.done in (0, self.before, self.total):
            self.told = time.monotonic()
            self._write(
                {
                    "total": self.total,
                    "unit": self.unit,
                    "done": self.done,
                    "before": self.before,
                    "tokens": self.tokens,
                }
            )

    def _write(self, event: dict[str, object]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


def relay(event: dict[str, object], line: StageLine) -> None:
    """Shows on `line` what a `FileLine` in another process wrote."""
    if "note" in event:
        line.note(str(event["note"]))
        return
    for name in ("total", "unit", "done", "before", "tokens"):
        setattr(line, name, event[name])
    line.changed()


def display() -> Display:
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


class Progress(Protocol):
    """What a stage tells while it works."""

    def start(self, total: int, unit: str, done: int = 0) -> None: ...

    def advance(self, items: int = 1, tokens: int = 0) -> None: ...

    def note(self, text: str) -> None: ...
