"""`run.log` of a run: its lines of progress, warnings and errors, each with the time in UTC, those of all its runs."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from pathlib import Path

from cai.text.formatting import printable

MAX_BYTES = 2_000_000
"""Size from which the older half of a log is removed: lines every 30 seconds of the last three days are left."""


class RunLog:
    """Appends lines to a file of at most about `MAX_BYTES`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, text: str) -> None:
        """Appends one line. A disk that is full stops the stage where it writes results, not here."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        with contextlib.suppress(OSError):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{time} {printable(text)}\n")
            if self.path.stat().st_size > MAX_BYTES:
                self._remove_older_half()

    def _remove_older_half(self) -> None:
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        shorter = self.path.with_name(f"{self.path.name}.shorter")
        shorter.write_text("".join(lines[len(lines) // 2 :]), encoding="utf-8")
        shorter.replace(self.path)
