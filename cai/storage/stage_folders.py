"""The stage folders of a run: which of them are stale, interrupted or left over.

A finished stage is stale where it was made from outputs that have been replaced: those of a stage that it read itself,
or of one that stands behind that stage. This follows from the digests that each stage.json holds of what the stage
read. It is also stale where a later run had other settings for it and ended before it; that run has recorded them.
Left out: a recipe or constitution that was edited and not run since (`cai run --dry-run` says what would run).
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai.document.shipped import shipped_folder, shipped_names
from cai.storage import run_folder
from cai.storage.files import REMOVED, read_json
from cai.storage.journal import failures_digest
from cai.storage.run_folder import Finished

_STAGE_FOLDER = re.compile(r"(?P<stage>.+)-[0-9a-f]{16}")
"""`<stage id>-<fingerprint>`."""


OTHER_SETTINGS = "other_settings"
"""Key of run.json: stage id to the `folder` of a finished stage whose settings are others in the recipe as it was run
last, and the `reason`."""


@dataclass(frozen=True)
class Staleness:
    """Why a finished stage is stale. The stages named are those that it read, itself or through others."""

    replaced: tuple[str, ...] = ()
    """Stages that have other outputs now."""
    missing: tuple[str, ...] = ()
    """Stages that are not done now."""
    with_other_settings: tuple[str, ...] = ()
    """Stages that were finished with other settings than those of the last run."""
    settings: str | None = None
    """What has changed in the stage's own settings since, in words."""

    @property
    def stages(self) -> list[str]:
        """All the stages that are named."""
        return [*self.replaced, *self.missing, *self.with_other_settings]

    def __str__(self) -> str:
        reasons = []
        if self.settings:
            reasons.append(f"made with other settings ({self.settings})")
        if self.replaced:
            reasons.append(f"made from earlier outputs of {_and(self.replaced)}")
        if self.missing:
            reasons.append(f"made from outputs of {_and(self.missing)} that are gone")
        if self.with_other_settings and not self.replaced and not self.missing:
            reasons.append(f"made from outputs of {_and(self.with_other_settings)}, which had other settings")
        return ", ".join(reasons)


def standing_stages(run: Path) -> dict[str, Finished]:
    """Stage id to the finished stage that stands for it now."""
    standing = {stage_id: run_folder.finished(folder) for stage_id, folder in run_folder.latest(run).items()}
    return {stage_id: stage for stage_id, stage in standing.items() if stage}


def stale_stages(run: Path) -> dict[str, Staleness]:
    """The finished stages of a run that are stale, by id."""
    standing = standing_stages(run)
    facts = {stage_id: stage.facts for stage_id, stage in standing.items()}
    replaced = {stage_id: _replaced_inputs(facts[stage_id], standing) for stage_id in standing}
    settings = {
        stage_id: record["reason"]
        for stage_id, record in (read_json(run / run_folder.RUN) or {}).get(OTHER_SETTINGS, {}).items()
        if stage_id in standing and standing[stage_id].folder.name == record["folder"]
    }
    stale = {}
    for stage_id in standing:
        read = _stages_behind(stage_id, facts)
        names = set().union(*(replaced[reader] for reader in [stage_id, *read]))
        staleness = Staleness(
            replaced=tuple(name for name in standing if name in names),
            missing=tuple(sorted(names - standing.keys())),
            with_other_settings=tuple(name for name in read if name in settings and name not in names),
            settings=settings.get(stage_id),
        )
        if staleness != Staleness():
            stale[stage_id] = staleness
    return stale


def stale_note(run: Path, stage_ids: Collection[str]) -> str | None:
    """A sentence about those of the stages that are stale, and what computes them again; None where none is."""
    stale = {stage_id: reason for stage_id, reason in stale_stages(run).items() if stage_id in stage_ids}
    if not stale:
        return None
    by_reason: dict[str, list[str]] = {}
    for stage_id, reason in stale.items():
        by_reason.setdefault(str(reason), []).append(stage_id)
    reasons = "; ".join(f"{_and(ids)}, {reason}" for reason, ids in by_reason.items())
    pronoun = "it" if len(stale) == 1 else "them"
    return f"stale in {run}: {reasons}; `{run_command(run)}` computes {pronoun} again"


def run_command(run: Path) -> str:
    """The command that runs the recipe of a run again, as it was run last."""
    facts = read_json(run / run_folder.RUN) or {}
    words = ["cai", "run", _recipe_name(facts.get("recipe", run.name))]
    for override in facts.get("overrides", []):
        key, _, name = override.partition("=")
        words += ["--name", name] if key == "name" else ["--set", override]
    if facts.get("profile") != "cpu" and facts.get("profile") in shipped_names("configs"):
        words += ["--on", facts["profile"]]
    if run.parent != Path("runs"):
        words += ["--runs", str(run.parent)]
    return shlex.join(words)


def recipe_in_words(run: Path) -> str | None:
    """The recipe of a run: its file, the name of a shipped one, or `cai compare`; None where the run did not begin."""
    if run_folder.is_comparison(run):
        return "cai compare"
    recipe = (read_json(run / run_folder.RUN) or {}).get("recipe")
    return recipe and _recipe_name(recipe)


def _recipe_name(path: str) -> str:
    """How `cai run` may be told the recipe in the file `path`: by its name where it is shipped."""
    if Path(path).parent == shipped_folder("recipes").resolve():
        return Path(path).stem
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path


def newest_unfinished(run: Path) -> dict[str, Path]:
    """Stage id to the folder, among those of the stage that are not done, that was begun or continued last."""
    newest: dict[str, Path] = {}
    for folder in _folders(run):
        if (folder / run_folder.STAGE).is_file() and run_folder.finished(folder) is None:
            stage_id = stage_of(folder)
            newest[stage_id] = max(newest.get(stage_id, folder), folder, key=began)
    return newest


def interrupted(run: Path) -> dict[str, Path]:
    """Stage id to the unfinished folder that the next run may continue.

    It is the newest one of the stage, newer than the folder that stands for the stage, and has read what stands now.
    """
    standing = standing_stages(run)
    return {
        stage_id: folder
        for stage_id, folder in newest_unfinished(run).items()
        if (stage_id not in standing or began(folder) > began(standing[stage_id].folder))
        and not standing.keys() & _replaced_inputs(read_json(folder / run_folder.STAGE), standing)
    }


def unused(run: Path, unfinished: bool = False) -> list[tuple[Path, int]]:
    """Stage folders that no current stage stands on, wordings that were tried among them, and their bytes; with
    `unfinished` also interrupted ones that the next run would continue."""
    kept = set(run_folder.latest(run).values())
    if not unfinished:
        kept |= set(interrupted(run).values())
    tried = _folders(run / run_folder.TRIED) if (run / run_folder.TRIED).is_dir() else []
    return [(folder, disk_bytes(folder)) for folder in [*_folders(run), *tried] if folder not in kept]


def stage_of(folder: Path) -> str:
    """The id of the stage that a folder belongs to."""
    return folder.name.rpartition("-")[0]


def began(folder: Path) -> float:
    """When a stage's folder was begun, continued or finished last: seconds since the epoch."""
    return (folder / run_folder.STAGE).stat().st_mtime


def disk_bytes(folder: Path) -> int:
    """Bytes of all files in a folder; a file with several names counts once, a link not at all."""
    return sum({state.st_ino: state.st_size for _, state in _files(folder)}.values())


def last_change(run: Path) -> float:
    """When a file of a run was last written, in seconds since the epoch.

    Its lock does not count, which `cai clean` takes too.
    """
    times = [state.st_mtime for path, state in _files(run) if path.name != run_folder.LOCK]
    return max(times, default=run.stat().st_mtime)


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The files below a folder, but for links, and for files that a run removes meanwhile."""
    for parent, _, names in os.walk(folder):
        for path in (Path(parent) / name for name in names):
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISREG((state := path.lstat()).st_mode):
                    yield path, state


def _folders(run: Path) -> list[Path]:
    """The stage folders of a run, and what a kill has left of a folder that was being removed."""
    return [
        path
        for path in sorted(run.iterdir())
        if path.is_dir()
        and ((path / run_folder.STAGE).exists() or path.name.endswith(REMOVED) or _STAGE_FOLDER.fullmatch(path.name))
    ]


def _stages_behind(stage_id: str, facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The stages, of those whose stage.json is in `facts`, that a stage has read, itself or through others."""
    behind: list[str] = []
    to_visit = [stage_id]
    while to_visit:  # no recursion: stages of two recipes in one folder may name each other in a circle
        for name in facts[to_visit.pop()].get("inputs", {}):
            if name in facts and name not in behind:
                behind.append(name)
                to_visit.append(name)
    return behind


def _replaced_inputs(facts: Mapping[str, Any], standing: Mapping[str, Finished]) -> set[str]:
    """The stages that a stage with this stage.json read, and whose outputs or failures are no longer those."""
    replaced = set()
    for stage_id, read in facts.get("inputs", {}).items():
        stage, failures = standing.get(stage_id), facts.get("parts", {}).get(f"failures.{stage_id}")
        if stage is None or stage.digest != read["digest"]:
            replaced.add(stage_id)
        elif failures is not None:
            digests = {failures_digest(stage.folder, with_reasons=with_reasons) for with_reasons in (False, True)}
            replaced |= {stage_id} if failures not in digests else set()
    return replaced


def _and(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
