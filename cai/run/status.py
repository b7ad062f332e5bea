"""A run as text and as JSON: what would run, what has run, its figures, where its results lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

from cai.contracts.stage_config import FeedbackConfig
from cai.run.recipe_names import models_of
from cai.storage import run_folder
from cai.storage.files import read_json
from cai.storage.journal import count_items
from cai.text.formatting import printable
from cai.text.progress import duration
from cai.text.tables import aligned_lines, is_rate, rate_text, table

if TYPE_CHECKING:
    from cai.contracts.profile import Profile
    from cai.run.plan import Step

_STATUS_TEXTS = {"reused": "reused", "runs": "would run", "continues": "would go on", "waits": "would run"}


def plan_lines(steps: Sequence[Step], profile: Profile) -> list[str]:
    """What a dry run says about each stage, the sum of it, and where models answer."""
    rows = [[step.id, step.config.kind, _STATUS_TEXTS[step.status], step.reason] for step in steps]
    n_reused = sum(step.status == "reused" for step in steps)
    return [
        *table(["stage", "kind", "", "why"], rows),
        "",
        f"{n_reused} reused, {len(steps) - n_reused} would run",
        "",
        *table(["model", "answers"], list(engine_by_model(steps, profile).items())),
    ]


def engine_by_model(steps: Sequence[Step], profile: Profile) -> dict[str, str]:
    """Each model that writes or judges in these stages to where it answers, in words."""
    configs = [step.config for step in steps if isinstance(step.config, FeedbackConfig)]
    return {name: profile.where(name) for config in configs for name in models_of(config)}


def plan_json(steps: Sequence[Step]) -> list[dict[str, object]]:
    """What a dry run says about each stage, for a program."""
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
        [f"{section} {name}".replace("_", " "), rate_text(figure)]
        for section in ("labels", "reward")
        for name, figure in summary.get(section, {}).items()
        if is_rate(figure)
    ]
    for stage_id, figures in summary.get("training", {}).items():
        kl = (figures.get("kl") or {}).get("last")
        if kl is not None:
            rows.append([f"{stage_id} KL", f"{kl:.2f} nats a response from where it started"])
    return aligned_lines(rows)


def left_out_lines(summary: Mapping[str, Any]) -> list[str]:
    """What each stage left out of its input where that was much, and what to change."""
    sentences_by_stage = summary.get("left_out", {})
    return [
        printable(f"{stage_id}: {sentence}")
        for stage_id, sentences in sentences_by_stage.items()
        for sentence in sentences
    ]


def result_lines(run: Path, summary: Mapping[str, Any]) -> list[str]:
    """Where the run's results lie: summary, pages, models."""
    rows = [["figures", str(run / run_folder.SUMMARY)]]
    for stage_id, name in summary["stages"].items():
        folder = run / name
        rows += [["page", str(page)] for page in sorted(folder.glob("*.html"))]
        if (folder / run_folder.MODEL).is_dir():
            rows.append([f"model {stage_id}", str(folder / run_folder.MODEL)])
    return aligned_lines(rows)


class StageStatus(TypedDict):
    """One stage of a run. Done stages have an end, seconds and failures, unfinished feedback stages have items."""

    stage: str
    status: Literal["done", "unfinished", "not run"]
    folder: str | None
    ended: NotRequired[str]
    seconds: NotRequired[float]
    failures: NotRequired[int]
    """Items without a result."""
    on_disk: NotRequired[int]
    """Items of a feedback stage that are on disk."""
    n_items: NotRequired[int]
    unit: NotRequired[str]
    """What the stage's items are, such as responses."""


def stage_statuses(run: Path) -> list[StageStatus]:
    """The status of every stage of a run."""
    latest = run_folder.latest(run)
    return [
        _stage_status(run, stage_id, latest.get(stage_id)) for stage_id in read_json(run / run_folder.RUN)["stages"]
    ]


def _stage_status(run: Path, stage_id: str, latest: Path | None) -> StageStatus:
    """The status of one stage; an unfinished folder counts where it was started after the one that is done."""
    unfinished = [folder for folder in run.glob(f"{stage_id}-*") if _is_unfinished(folder, stage_id)]
    newest = max(unfinished, key=_started_at, default=None)
    done = latest if latest is not None and run_folder.finished(latest) else None
    if newest is not None and (done is None or _started_at(newest) > _started_at(done)):
        status: StageStatus = {"stage": stage_id, "status": "unfinished", "folder": newest.name}
        if count := count_items(newest):
            status |= {"on_disk": count.n_finished, "n_items": count.n_items, "unit": count.unit}
        return status
    if done is None:
        return {"stage": stage_id, "status": "not run", "folder": None}
    facts = read_json(done / run_folder.STAGE)
    return {
        "stage": stage_id,
        "status": "done",
        "folder": done.name,
        "ended": facts["ended"],
        "seconds": facts["seconds"],
        "failures": facts["failures"],
    }


def status_lines(run: Path) -> list[str]:
    """The status of every stage as a table."""
    rows = []
    for stage in stage_statuses(run):
        details = ""
        if stage["status"] == "done":
            failed = f", {stage['failures']:,} failed" if stage["failures"] else ""
            details = duration(stage["seconds"]) + failed
        elif "on_disk" in stage:
            details = f"{stage['on_disk']:,} of {stage['n_items']:,} {stage['unit']} on disk"
        rows.append([stage["stage"], stage["status"], details, stage["folder"] or ""])
    return [str(run), "", *table(["stage", "", "", "folder"], rows)]


def _is_unfinished(folder: Path, stage_id: str) -> bool:
    return (
        folder.name.rpartition("-")[0] == stage_id
        and (folder / run_folder.STAGE).exists()
        and run_folder.finished(folder) is None
    )


def _started_at(folder: Path) -> float:
    """When the folder's stage.json was last written, in seconds."""
    return (folder / run_folder.STAGE).stat().st_mtime
