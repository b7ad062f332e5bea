"""Which earlier folders of a stage hold items that need not be computed again (`cai.contracts.earlier`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from cai.contracts.earlier import Earlier
from cai.contracts.stage_config import StageConfig
from cai.run.outputs import changed_outputs
from cai.storage import run_folder
from cai.storage.files import read_json


def earlier_results(run: Path, config: StageConfig, parts: Mapping[str, object], folder: Path) -> tuple[Earlier, ...]:
    """The folders that the stage takes items over from, the newest first.

    A stage that has begun in `folder` continues with the folders that it began with, so that it computes the same items
    in the same company wherever it was stopped.
    """
    if not config.item_choice:
        return ()
    if begun := read_json(folder / run_folder.STAGE):
        paths = [run / name for name in begun.get("earlier", ())]
        return tuple(_earlier(path) for path in paths if run_folder.finished(path))
    folders = [path for path in _folders_of(run, config.id) if path != folder]
    candidates = [
        _earlier(path) for path in folders if (done := run_folder.finished(path)) and not changed_outputs(done)
    ]
    fitting = [earlier for earlier in candidates if _reaches_items_alike(config, parts, earlier.parts)]
    return tuple(sorted(fitting, key=lambda earlier: -(earlier.folder / run_folder.DONE).stat().st_mtime_ns))


def _folders_of(run: Path, stage_id: str) -> Iterator[Path]:
    for parent in (run, run / run_folder.TRIED):
        yield from (path for path in sorted(parent.glob(f"{stage_id}-*")) if path.name.rpartition("-")[0] == stage_id)


def _earlier(folder: Path) -> Earlier:
    return Earlier(folder, (read_json(folder / run_folder.STAGE) or {}).get("parts", {}))


def _reaches_items_alike(config: StageConfig, parts: Mapping[str, object], before: Mapping[str, object]) -> bool:
    """Whether all parts of the fingerprint are equal but those that only say which items there are."""
    differing = {name for name in {*parts, *before} if parts.get(name) != before.get(name)}
    return all(
        any(name == choice or name.startswith(f"{choice}.") for choice in config.item_choice) for name in differing
    )
