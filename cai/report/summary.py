"""summary.json: the figures of all stages of a run that are done, merged by key.

`summary.schema.json` beside this module defines the file: every stage's figures with their meanings and units. Tests
hold it against what every kind of stage reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cai.maths.statistics import RateFigure
from cai.report.figure_types import HeadToHead, PromptSetFigures
from cai.storage.files import read_json
from cai.storage.run_folder import RUN, Finished
from cai.storage.stage_folders import stale_stages

Summary = dict[str, Any]


def summary_of(recipe_name: str, run: Path, finished_stages: Mapping[str, Finished]) -> Summary:
    """The summary of the stages, by id, that are done. Where two have figures of one name, the later stage's stand.

    Stages of the recipe that are stale have no figures in it and are named with the reason.
    """
    summary: Summary = {"recipe": recipe_name, "run": str(run), "stages": {}, "seconds": {}, "failures": {}}
    for stage_id, stage in finished_stages.items():
        facts = stage.facts
        _merge(summary, facts.get("figures", {}))
        summary["stages"][stage_id] = stage.folder.name
        summary["seconds"][stage_id] = facts.get("seconds")
        summary["failures"][stage_id] = facts.get("failures", 0)
    recipe_stages = (read_json(run / RUN) or {"stages": []})["stages"]
    if stale := {id: str(reason) for id, reason in stale_stages(run).items() if id in recipe_stages}:
        summary["stale"] = stale
    return summary


def _merge(summary: dict[str, Any], figures: Mapping[str, Any]) -> None:
    """Puts the figures into the summary; nested mappings are merged, everything else is replaced."""
    for name, figure in figures.items():
        if isinstance(figure, Mapping):
            present = summary.get(name)
            summary[name] = dict(present) if isinstance(present, Mapping) else {}
            _merge(summary[name], figure)
        else:
            summary[name] = figure


class ComparedSet(NamedTuple):
    """A comparison's figures on one prompt set, as a summary has them."""

    prompt_set: str
    """Empty for the first prompt set, which a summary does not name."""
    rates: dict[str, dict[str, RateFigure]]
    """Checkpoint to its rates, in the order of `cai.report.figures.METRICS`."""
    head_to_head: list[HeadToHead]


def comparison_summary(figures_by_set: Mapping[str, PromptSetFigures]) -> dict[str, Any]:
    """A comparison's part of the summary, from its figures by prompt set."""
    summary: dict[str, Any] = {}
    for index, (prompt_set, figures) in enumerate(figures_by_set.items()):
        suffix = f"_{prompt_set}" if index else ""
        summary[f"checkpoints{suffix}"] = {
            checkpoint: rates | {"behaviours": figures["behaviours"][checkpoint]}
            for checkpoint, rates in figures["checkpoints"].items()
        }
        summary[f"head_to_head{suffix}"] = figures["head_to_head"]
    return summary


def compared_sets(summary: Mapping[str, Any]) -> list[ComparedSet]:
    """The opposite of `comparison_summary`: the comparison's figures on each prompt set; empty without a comparison."""
    compared = []
    for key, checkpoints in summary.items():
        if key == "checkpoints" or key.startswith("checkpoints_"):
            suffix = key.removeprefix("checkpoints")
            rates = {
                checkpoint: {name: rate for name, rate in figures.items() if name != "behaviours"}
                for checkpoint, figures in checkpoints.items()
            }
            compared.append(ComparedSet(suffix.removeprefix("_"), rates, summary.get(f"head_to_head{suffix}", [])))
    return compared
