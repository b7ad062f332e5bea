"""A run as text and as JSON: what would run, what has run, its figures, where its results lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai.contracts.stage_config import FeedbackConfig
from cai.run.recipe import models_of
from cai.storage import run_folder
from cai.storage.files import read_json
from cai.text.progress import duration

if TYPE_CHECKING:
    from cai.contracts.profile import Profile
    from cai.run.plan import Step

from cai.text.tables import is_rate, rate_text, table

_STATUS = {"reused": "reused", "runs": "would run", "continues": "would go on", "waits": "would run"}


def plan_lines(steps: Sequence[Step], profile: Profile) -> list[str]:
    """What a dry run says about each stage, the sum of it, and where models answer."""
    rows = [[step.id, step.config.kind, _STATUS[step.status], step.reason] for step in steps]
    n = sum(step.status == "reused" for step in steps)
    where = table(["model", "answers"], [list(item) for item in asked_where(steps, profile).items()])
    return [*table(["stage", "kind", "", "why"], rows), "", f"{n} reused, {len(steps) - n} would run", "", *where]


def asked_where(steps: Sequence[Step], profile: Profile) -> dict[str, str]:
    """Where each model answers that writes or judges in these stages, in words."""
    asking = [step.config for step in steps if isinstance(step.config, FeedbackConfig)]
    return {name: profile.where(name) for config in asking for name in models_of(config).values()}


def plan_json(steps: Sequence[Step]) -> list[dict[str, object]]:
    """The same for a program."""
    return [
        {
            "stage": step.id,
            "kind": step.config.kind,
            "status": step.status,
            "reason": step.reason,
            "folder": step.folder and str(step.folder),
        }
        for step in steps
    ]


def figure_lines(summary: Mapping[str, Any]) -> list[str]:
    """Rates of the labels and of the reward model, and how far policies went from their references."""
    rows = [
        [f"{part} {figure}".replace("_", " "), rate_text(value)]
        for part in ("labels", "reward")
        for figure, value in summary.get(part, {}).items()
        if is_rate(value)
    ]
    rows += [
        [f"{stage} KL", f"{figures['kl']['last']:.2f} nats a response from where it started"]
        for stage, figures in summary.get("training", {}).items()
        if (figures.get("kl") or {}).get("last") is not None
    ]
    return table(["", ""], rows)[1:] if rows else []


def where_lines(run: Path, summary: Mapping[str, Any]) -> list[str]:
    """Where the run's results lie: summary, pages, models."""
    rows = [["figures", str(run / run_folder.SUMMARY)]]
    for stage, name in summary["stages"].items():
        folder = run / name
        rows += [["page", str(page)] for page in sorted(folder.glob("*.html"))]
        if (folder / run_folder.MODEL).is_dir():
            rows.append([f"model {stage}", str(folder / run_folder.MODEL)])
    return table(["", ""], rows)[1:]


def status_rows(run: Path) -> list[dict[str, Any]]:
    """Every stage of a run: done or how far, since when, how long, what failed."""
    facts = read_json(run / run_folder.RUN)
    latest = run_folder.latest(run)
    rows = []
    for stage in facts["stages"]:
        folder = latest.get(stage)
        unfinished = [each for each in run.glob(f"{stage}-*") if _is_unfinished(each, stage)]
        newest = max(unfinished, key=lambda each: (each / run_folder.STAGE).stat().st_mtime, default=None)
        row: dict[str, Any] = {"stage": stage, "status": "not run", "folder": None}
        if folder is not None and run_folder.finished(folder):
            known = read_json(folder / run_folder.STAGE)
            row = {
                "stage": stage,
                "status": "done",
                "folder": folder.name,
                "ended": known["ended"],
                "seconds": known["seconds"],
                "failures": known["failures"],
            }
        if newest is not None and (row["folder"] is None or _younger(newest, run / row["folder"])):
            row = {
                "stage": stage,
                "status": "unfinished",
                "folder": newest.name,
                "batches": run_folder.n_batches(newest),
            }
        rows.append(row)
    return rows


def status_lines(run: Path) -> list[str]:
    """`status_rows` as a table."""
    cells = []
    for row in status_rows(run):
        words = ""
        if row["status"] == "done":
            words = duration(row["seconds"]) + (f", {row['failures']:,} failed" if row["failures"] else "")
        elif row["status"] == "unfinished":
            words = f"{row['batches']:,} batches on disk"
        cells.append([row["stage"], row["status"], words, row["folder"] or ""])
    return [str(run), "", *table(["stage", "", "", "folder"], cells)]


def _is_unfinished(folder: Path, stage: str) -> bool:
    return (
        folder.name.rpartition("-")[0] == stage
        and (folder / run_folder.STAGE).exists()
        and run_folder.finished(folder) is None
    )


def _younger(folder: Path, than: Path) -> bool:
    return (folder / run_folder.STAGE).stat().st_mtime > (than / run_folder.STAGE).stat().st_mtime
