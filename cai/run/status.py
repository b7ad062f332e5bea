"""A run as text and as JSON: what would run, what has run, its figures, where its results lie."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

from cai.contracts.stage_config import FeedbackConfig
from cai.run.recipe_names import models_of
from cai.run.stage_progress import stage_progress
from cai.storage import run_folder
from cai.storage.files import read_json
from cai.storage.stage_folders import (
    Staleness,
    began,
    newest_unfinished,
    run_command,
    stale_note,
    stale_stages,
    standing_stages,
)
from cai.text.formatting import printable
from cai.text.progress import duration
from cai.text.tables import accuracy_text, aligned_lines, is_rate, rate_text, table

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


_ACCURACIES = frozenset({"accuracy", "label_accuracy", "agreement_with_people"})
"""Rates of labels and of the reward model that are one half by chance."""


def figure_lines(summary: Mapping[str, Any]) -> list[str]:
    """The gate's accuracy, rates of labels and reward model, and how far policies went from their references."""
    rows = [
        [f"{stage_id} accuracy", accuracy_text({"value": figures["accuracy"], "interval": figures["interval"]})]
        for stage_id, figures in summary.get("gate", {}).items()
    ]
    rows += [
        [f"{section} {name}".replace("_", " "), accuracy_text(figure) if name in _ACCURACIES else rate_text(figure)]
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


def outdated_summary_line(run: Path, summary: Mapping[str, Any]) -> str | None:
    """A sentence where figures of the summary are of stages that are stale, or that other folders stand for now."""
    standing, stale = standing_stages(run), stale_stages(run)
    outdated = [
        stage_id
        for stage_id, name in summary.get("stages", {}).items()
        if stage_id in stale or stage_id not in standing or standing[stage_id].folder.name != name
    ]
    return f"figures below are of earlier outputs of {', '.join(outdated)}" if outdated else None


def result_lines(run: Path, summary: Mapping[str, Any]) -> list[str]:
    """Where the run's results lie: summary, pages, models."""
    rows = [["figures", str(run / run_folder.SUMMARY)]]
    for stage_id, name in summary["stages"].items():
        folder = run / name
        rows += [["page", str(page)] for page in sorted(folder.glob("*.html"))]
        if (folder / run_folder.MODEL).is_dir():
            rows.append([f"model {stage_id}", str(folder / run_folder.MODEL)])
    note = stale_note(run, read_json(run / run_folder.RUN)["stages"])
    return [*aligned_lines(rows), *([printable(note)] if note else [])]


class StageStatus(TypedDict):
    """One stage of a run. Done and stale stages have an end, seconds and failures; others items, once they are counted.

    running: a live process computes it. unfinished: it was interrupted. stale: it was made from outputs that have been
    replaced, or with other settings than those of the last run.
    """

    stage: str
    status: Literal["done", "stale", "running", "unfinished", "not run"]
    folder: str | None
    ended: NotRequired[str]
    seconds: NotRequired[float]
    failures: NotRequired[int]
    """Items without a result."""
    reason: NotRequired[str]
    """Why the stage is stale, in words."""
    replaced: NotRequired[list[str]]
    """Of a stale stage: the stages that it read, itself or through others, with other outputs or settings now."""
    on_disk: NotRequired[int]
    """Items that an interruption leaves; of a stage that trains the steps in its resume point."""
    finished: NotRequired[int]
    """Items, or steps of training, that are finished; of an unfinished stage only those on disk."""
    n_items: NotRequired[int]
    unit: NotRequired[str]
    """What the stage's items are, such as responses."""
    share: NotRequired[float]
    """Of a running stage: finished items of all."""
    running_seconds: NotRequired[float]
    """Since the stage began in the process that computes it."""
    seconds_left: NotRequired[float | None]
    """Of a running stage: estimated from its speed so far; None before anything is finished."""


def stage_statuses(run: Path, holder: run_folder.LockHolder | None = None) -> list[StageStatus]:
    """The status of every stage of a run, on which the process `holder` works."""
    standing, stale = standing_stages(run), stale_stages(run)
    unfinished = newest_unfinished(run)
    current = max(unfinished.values(), key=began, default=None)
    if holder is None or (current is not None and began(current) < holder.since):
        current = None  # the process has not begun with a stage yet, or is between two
    return [
        _stage_status(stage_id, standing.get(stage_id), unfinished.get(stage_id), current, stale.get(stage_id))
        for stage_id in read_json(run / run_folder.RUN)["stages"]
    ]


def _stage_status(
    stage_id: str,
    done: run_folder.Finished | None,
    unfinished: Path | None,
    current: Path | None,
    staleness: Staleness | None,
) -> StageStatus:
    """The status of one stage, from its finished folder and its newest unfinished one; `current` is being computed."""
    if unfinished is not None and (done is None or began(unfinished) > began(done.folder)):
        return _unfinished_status(stage_id, unfinished, is_running=unfinished == current)
    if done is None:
        return {"stage": stage_id, "status": "not run", "folder": None}
    facts = done.facts
    status: StageStatus = {
        "stage": stage_id,
        "status": "stale" if staleness else "done",
        "folder": done.folder.name,
        "ended": facts["ended"],
        "seconds": facts["seconds"],
        "failures": facts["failures"],
    }
    if staleness:
        status |= {"reason": str(staleness), "replaced": staleness.stages}
    return status


def _unfinished_status(stage_id: str, folder: Path, *, is_running: bool) -> StageStatus:
    status: StageStatus = {
        "stage": stage_id, "status": "running" if is_running else "unfinished", "folder": folder.name
    }  # fmt: skip
    if is_running:
        status["running_seconds"] = round(max(time.time() - began(folder), 0.0), 1)
    if progress := stage_progress(folder):
        finished = progress.finished if is_running else progress.kept
        status |= {
            "on_disk": progress.kept, "finished": finished, "n_items": progress.total, "unit": progress.unit
        }  # fmt: skip
        if is_running:
            status |= {"share": progress.share, "seconds_left": progress.seconds_left()}
    return status


def status_json(run: Path) -> dict[str, object]:
    """The status of a run for a program; `process` is the id of the process that works on it, if one does."""
    holder = run_folder.lock_holder(run)
    return {"run": str(run), "process": holder and holder.process, "stages": stage_statuses(run, holder)}


def status_lines(run: Path) -> list[str]:
    """The status of every stage as a table, who works on the run, and what computes stale stages again."""
    holder = run_folder.lock_holder(run)
    statuses = stage_statuses(run, holder)
    rows = [[stage["stage"], stage["status"], _details(stage), stage["folder"] or ""] for stage in statuses]
    working = f": {process_in_words(holder)} is working on it" if holder else ""
    lines = [f"{run}{working}", "", *table(["stage", "", "", "folder"], rows)]
    if any(stage["status"] == "stale" for stage in statuses) and not holder:
        lines += ["", f"`{run_command(run)}` computes stale stages again"]
    return lines


def process_in_words(holder: run_folder.LockHolder) -> str:
    """`process 4711`."""
    return "a process" if holder.process is None else f"process {holder.process}"


def _details(stage: StageStatus) -> str:
    """What the table says of a stage beside its state."""
    if stage["status"] == "stale":
        return stage["reason"]
    if stage["status"] == "done":
        failed = f", {stage['failures']:,} failed" if stage["failures"] else ""
        return duration(stage["seconds"]) + failed
    if stage["status"] == "running":
        if "share" not in stage:
            return f"began {duration(stage['running_seconds'])} ago"
        seconds = stage["seconds_left"]
        left = "" if seconds is None else f", about {duration(seconds)} left"
        return f"{stage['finished']:,} of {stage['n_items']:,} {stage['unit']}, {stage['share']:.0%}{left}"
    if "on_disk" in stage:
        return f"{stage['on_disk']:,} of {stage['n_items']:,} {stage['unit']} on disk"
    return ""
