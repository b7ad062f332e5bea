"""Pairs that a judge failed on although their truth could have been known; they widen the bounds of accuracies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from cai.feedback.truth import TruthKind, is_of_embedded_world
from cai.storage import run_folder
from cai.storage.files import read_json
from cai.storage.rows import is_held_out

MeasuredOn = Literal["held_out", "all"]
"""Prompts that figures are measured on."""


class PairCounts(TypedDict):
    """Pairs of all prompts, and of held-out ones."""

    all: int
    held_out: int


FailedWithTruth = dict[TruthKind, PairCounts]


def count_failed_with_truth(failed_pairs: Sequence[Mapping[str, Any]]) -> FailedWithTruth:
    """Counts of the failed pairs by the kind of truth that could have been known; a judge stage's figures hold them."""
    pairs_by_kind: dict[TruthKind, list[Mapping[str, Any]]] = {
        "human": [pair for pair in failed_pairs if "human" in pair],
        "oracle": [pair for pair in failed_pairs if is_of_embedded_world(pair["tags"])],
    }
    return {
        kind: {"all": len(pairs), "held_out": sum(is_held_out(pair) for pair in pairs)}
        for kind, pairs in pairs_by_kind.items()
    }


def n_failed_pairs(judge_folders: Iterable[Path], kind: TruthKind, measured_on: MeasuredOn) -> int:
    """Pairs of finished judge stages without a vote whose truth of that kind could have been known."""
    return sum(
        failed[kind][measured_on] for folder in judge_folders for failed in _read_failed_with_truth(folder)
    )  # fmt: skip


def _read_failed_with_truth(folder: Path) -> list[FailedWithTruth]:
    """What `count_failed_with_truth` gave for the stage in `folder`; empty without a stage's file."""
    stage = read_json(folder / run_folder.STAGE) or {}
    return [figures["failed_with_truth"] for figures in stage.get("figures", {}).get("votes", {}).values()]
