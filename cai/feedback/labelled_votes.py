"""The votes behind a finished stage's labels, with the rule that made the labels."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cai.feedback.label_rule import LabelRule
from cai.feedback.stored_votes import read_votes
from cai.maths.behaviours import n_words
from cai.maths.vote_aggregation import Floats, mean_over_orders, sigmoid
from cai.storage import run_folder
from cai.storage.files import read_json
from cai.storage.journal import RECORDS
from cai.storage.rows import topic_of
from cai.text.errors import BadInput, did_you_mean


@dataclass(frozen=True)
class LabelledVotes:
    """Votes on pairs. `ab` and `ba` are log-odds by order, (pairs, principles), NaN where a principle did not vote."""

    name: str
    """Name of the run, or RUN/STAGE."""
    rows: Sequence[Mapping[str, Any]]
    """Rows of the pairs; their `votes` are not read."""
    principles: Sequence[str]
    ab: Floats
    ba: Floats
    rule: LabelRule
    judge_folders: Sequence[Path] = ()
    """Folders of the stages that made the votes."""

    @functools.cached_property
    def log_odds(self) -> Floats:
        """Mean log-odds of both orders, (pairs, principles)."""
        return mean_over_orders(self.ab, self.ba)

    def labels(self, *, without: str | None = None) -> Floats:
        """Log-odds of each pair's label, (pairs,), 0 where it has none; `without` names a principle of weight 0."""
        log_odds = self.rule.aggregate(self.log_odds, self.principles, without=without)
        has_label = ~np.isnan(log_odds) & (np.abs(log_odds) > self.rule.tie_below)
        has_label &= sigmoid(np.abs(log_odds)) >= self.rule.min_confidence
        return np.where(has_label, log_odds, 0.0)

    @functools.cached_property
    def topics(self) -> list[str]:
        """Topic of each pair, by which intervals are clustered."""
        return [topic_of(row["tags"], row["prompt_id"]) for row in self.rows]

    @functools.cached_property
    def extra_words(self) -> Floats:
        """Number of words that *a* has more than *b*, (pairs,)."""
        return np.array([n_words(row["a"]["text"]) - n_words(row["b"]["text"]) for row in self.rows], dtype=float)


def load_labelled_votes(name: str, runs_folder: Path) -> LabelledVotes:
    """The votes behind a finished `prefer` stage, named RUN, or RUN/STAGE where the run has several.

    Raises BadInput where there is no such stage, or its labels come from human pairs alone.
    """
    run, stage_id = _find_prefer_stage(name, runs_folder)
    folder = run_folder.latest(run)[stage_id]
    judge_folders = [run / stage["folder"] for stage in read_json(folder / run_folder.STAGE)["inputs"].values()]
    if not judge_folders:
        raise BadInput(f"{name}: {stage_id} has labels of people alone, and no votes to explain")
    rule = LabelRule.read(folder)
    votes = read_votes(judge_folder / RECORDS for judge_folder in judge_folders)
    ab, ba = votes.log_odds_by_order()
    return LabelledVotes(name, list(votes.parsed_rows()), votes.principles, ab, ba, rule, judge_folders)


def _find_prefer_stage(name: str, runs_folder: Path) -> tuple[Path, str]:
    """The run's folder and the id of its finished `prefer` stage."""
    stage_id = None
    try:
        run = run_folder.find_run(name, runs_folder)
    except BadInput:
        run_name, _, stage_id = name.rpartition("/")
        if not run_name:
            raise
        run = run_folder.find_run(run_name, runs_folder)
    prefer_stages = [
        id
        for id, folder in run_folder.latest(run).items()
        if run_folder.finished(folder) and read_json(folder / run_folder.STAGE)["kind"] == "prefer"
    ]
    if stage_id is None and len(prefer_stages) == 1:
        return run, prefer_stages[0]
    if stage_id in prefer_stages:
        return run, stage_id
    expected = ", ".join(f"{run.name}/{id}" for id in prefer_stages) or "a run whose `prefer` stage is done"
    raise BadInput(f"found {name!r}, expected {expected}" + (did_you_mean(stage_id, prefer_stages) if stage_id else ""))
