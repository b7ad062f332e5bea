"""The progress of a run's stages: items, tokens a second, time left.

On a terminal each stage has a line with a moving bar. Elsewhere it prints a line when it starts, every `LINE_SECONDS`
while it works, from a thread of its own so that one long computation does not silence it, and a line when it ends. A
run's log gets these lines in both cases. Everything goes to stderr, so that stdout stays with results.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TextIO

from cai.text.errors import CaiError
from cai.text.formatting import printable
from cai.text.run_log import RunLog

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import ProgressColumn, TaskID

COUNTS = ("total", "unit", "finished", "finished_before", "begun", "tokens", "part")
"""The attributes of a line that another process reports."""
REPORT_SECONDS = 1.0
"""Shortest time between two reports to another process."""
LINE_SECONDS = 30.0
"""Time between two lines of a stage that works."""
_ROUNDING = 1e-6
"""Shares of an item that are added up to a whole item may miss it by this much."""


class Progress(Protocol):
    """Where a stage reports its progress while it works."""

    def start(self, total: int, unit: str, finished: int = 0) -> None:
        """The stage has `total` items, of which earlier processes have finished `finished`."""

    def advance(self, items: float = 1, tokens: int = 0, begun: float = 0.0) -> None:
        """That many more items, or shares of items, and tokens are finished.

        `begun` are shares of items that are being computed: no more than what is done of them.
        """

    def report_part(self, finished: int, total: int, unit: str) -> None:
        """Within the item that is being computed, `finished` of `total` parts are; forgotten with the next items."""

    def note(self, text: str) -> None:
        """Shows a sentence that the user should read."""


def _to_stderr(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


class StageLine:
    """Counts the progress of one stage; its notes go to `say`, warnings of other processes to `record`."""

    def __init__(
        self, stage_id: str, say: Callable[[str], None] = _to_stderr, record: Callable[[str], None] | None = None
    ) -> None:
        self.stage_id = stage_id
        self.total = self.finished_before = self.tokens = 0
        self.finished = self.begun = 0.0
        self.unit = self.part = ""
        self.start_time = time.monotonic()
        self._say, self._record = say, record

    def start(self, total: int, unit: str, finished: int = 0) -> None:
        self.total, self.unit, self.finished, self.finished_before = total, unit, finished, finished
        self.part = ""
        self.update()

    def advance(self, items: float = 1, tokens: int = 0, begun: float = 0.0) -> None:
        self.finished += items
        self.begun += begun
        self.tokens += tokens
        if items:
            self.part = ""
        self.update()

    def report_part(self, finished: int, total: int, unit: str) -> None:
        self.part = f"{finished:,} of {total:,} {unit}"
        self.update()

    def note(self, text: str) -> None:
        self._say(f"{self.stage_id}: {text}")

    def record_warning(self, text: str) -> None:
        """Records a warning, which Python shows by itself."""
        if self._record:
            self._record(f"{self.stage_id}: warning: {text}")

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

    @property
    def time_left(self) -> str:
        """`2 min 05 s left`, at the speed of this process so far; empty where that is unknown.

        Of many items that are computed at once few may be finished, so that what is begun tells more at first.
        """
        done_here = max(self.finished - self.finished_before, self.begun)
        to_do = self.total - self.finished_before - done_here
        if done_here < _ROUNDING or to_do < _ROUNDING:
            return ""
        return f"{duration(self.seconds / done_here * to_do)} left"

    @property
    def n_finished(self) -> int:
        """Whole items that are finished."""
        return int(self.finished + _ROUNDING)

    @property
    def counts(self) -> str:
        """`120 of 640 responses (19 %), 1,830 tokens/s, 30.0 s so far, 2 min 05 s left`."""
        items = ""
        if self.total:
            share = int(100 * self.finished / self.total + _ROUNDING)
            items = f"{self.n_finished:,} of {self.total:,} {self.unit} ({share} %)"
        words = (items, self.part, self.speed, f"{duration(self.seconds)} so far", self.time_left)
        return ", ".join(filter(None, words))

    def summary(self, failures: int) -> str:
        """`640 responses, 12.3 s, 1,830 tokens/s, 2 failed`."""
        before = f" ({self.finished_before:,} from before)" if self.finished_before else ""
        items = f"{self.n_finished:,} {self.unit}{before}" if self.unit else ""
        failed = f"{failures:,} failed" if failures else ""
        return ", ".join(filter(None, (items, duration(self.seconds), self.speed, failed)))


class Display:
    """Shows the stages of a run; the base of displays that differ in how they show a line."""

    log: RunLog | None = None
    """Gets every line too."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stage_ended = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stage_ended.set()

    def begin_stage(self, stage_id: str) -> StageLine:
        """The line of a stage that starts; from now on the stage's progress is shown."""
        line = self.new_line(stage_id)
        self.show_progress(f"{stage_id}: started")
        self._stage_ended.set()
        self._stage_ended = threading.Event()
        threading.Thread(target=self._repeat, args=(line, self._stage_ended), daemon=True).start()
        return line

    def end_stage(self, line: StageLine, failures: int) -> None:
        """The stage is done."""
        self._stage_ended.set()
        self.show_progress(f"{line.stage_id}: {line.summary(failures)}")

    def note(self, text: str) -> None:
        """Shows a sentence that the user should read."""
        with self._lock:
            self.show(printable(text))
        self.record(text)

    def record(self, text: str) -> None:
        """Writes a line to the log alone."""
        if self.log is not None:
            with self._lock:
                self.log.write(text)

    def new_line(self, stage_id: str) -> StageLine:
        """Counts the progress of a stage."""
        return StageLine(stage_id, self.note, self.record)

    def show(self, text: str) -> None:
        """Shows a line."""
        raise NotImplementedError

    def show_progress(self, text: str) -> None:
        """A stage starts, works or is done."""
        self.note(text)

    def _repeat(self, line: StageLine, ended: threading.Event) -> None:
        while not ended.wait(LINE_SECONDS):
            self.show_progress(f"{line.stage_id}: {line.counts}")


class PlainDisplay(Display):
    """Prints lines when a stage starts, while it works and when it ends."""

    def __init__(self, file: TextIO | None = None) -> None:
        super().__init__()
        self.file = file or sys.stderr

    def show(self, text: str) -> None:
        print(text, file=self.file, flush=True)


class RichDisplay(Display):
    """Shows a line with a bar for each stage, which stays when the stage has ended."""

    def __init__(self) -> None:
        super().__init__()
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
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self.bars.stop()

    def new_line(self, stage_id: str) -> StageLine:
        task = self.bars.add_task("", total=None, stage=stage_id, words="")
        return _RichLine(stage_id, self.note, self.record, self.bars, task)

    def end_stage(self, line: StageLine, failures: int) -> None:
        assert isinstance(line, _RichLine)
        super().end_stage(line, failures)
        total = max(line.total, 1)
        self.bars.update(line.task, total=total, completed=total, words=line.summary(failures), refresh=True)

    def show(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def show_progress(self, text: str) -> None:
        self.record(text)  # the bar shows it


class _RichLine(StageLine):
    def __init__(
        self, stage_id: str, say: Callable[[str], None], record: Callable[[str], None], bars: Bars, task: TaskID
    ) -> None:
        super().__init__(stage_id, say, record)
        self.bars, self.task = bars, task

    def update(self) -> None:
        words = filter(None, [self.unit, self.part, self.speed, self.time_left])
        self.bars.update(self.task, total=self.total, completed=self.n_finished, words="  ".join(words))


def part_counter(progress: Progress | None, total: int, unit: str) -> Callable[[float], None]:
    """What is called with parts of an item, or shares of them, that are finished, and reports how many that makes."""
    n_finished = 0.0

    def count(parts: float = 1.0) -> None:
        nonlocal n_finished
        n_finished += parts
        if progress:
            progress.report_part(min(int(n_finished + _ROUNDING), total), total, unit)

    return count


@contextlib.contextmanager
def recorded(display: Display, path: Path, title: str) -> Iterator[None]:
    """Within the block the log at `path` gets a title, what the display shows, warnings, and the error that ends it."""
    display.log = RunLog(path)
    display.record(title)
    try:
        with warnings_copied_to(lambda text: display.record(f"warning: {text}")):
            yield
        display.record("done")
    except KeyboardInterrupt:
        display.record("interrupted; the same command goes on from here")
        raise
    except Exception as error:
        display.record(f"error: {error}" if isinstance(error, CaiError) else f"error: {type(error).__name__}: {error}")
        raise
    finally:
        display.log = None


@contextlib.contextmanager
def warnings_copied_to(record: Callable[[str], None]) -> Iterator[None]:
    """Within the block the text of each warning that is shown goes to `record` too."""
    show_warning = warnings.showwarning

    def show_and_record(message: Warning | str, *place: Any, **options: Any) -> None:
        record(str(message))
        show_warning(message, *place, **options)

    warnings.showwarning = show_and_record
    try:
        yield
    finally:
        warnings.showwarning = show_warning


class FileLine(StageLine):
    """Reports to another process through a file, one JSON object a line, at most every `REPORT_SECONDS`."""

    def __init__(self, stage_id: str, path: Path) -> None:
        super().__init__(stage_id)
        self.path = path
        self.report_time = -REPORT_SECONDS

    def start(self, total: int, unit: str, finished: int = 0) -> None:
        self.report_time = -REPORT_SECONDS
        super().start(total, unit, finished)

    def note(self, text: str) -> None:
        self._write({"note": text})

    def record_warning(self, text: str) -> None:
        self._write({"warning": text})

    def update(self) -> None:
        is_last = self.n_finished == self.total and not self.part
        if is_last or time.monotonic() - self.report_time > REPORT_SECONDS:
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
    if "warning" in event:
        line.record_warning(str(event["warning"]))
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
