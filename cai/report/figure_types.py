"""The figures of comparison.json by name: typed dictionaries with the keys of the file.

Unless a figure says otherwise, shares lie in [0, 1], log-odds are in nats, p-values are two-sided, and intervals,
[low, high], are 95 % intervals clustered by topic (`cai.maths.statistics`). Counts are of rows.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from cai.feedback.explain import Explanation
from cai.maths.statistics import RateFigure, Verdict


class RateDifference(TypedDict):
    """A rate of a checkpoint minus the same rate of the baseline, on the responses that both gave."""

    value: float | None
    n: int
    topics: int
    interval: list[float]
    p_value: float
    verdict: Literal["higher", "lower", "not distinguishable"]
    """What the checkpoint's rate is, by `p_holm`."""
    p_holm: float
    """p-value adjusted for all differences of the prompt set together."""


class PairRate(RateFigure):
    """How often `a` won against `b` by the judge, without a test; a tie counts half."""

    a: str
    b: str


class HeadToHead(PairRate):
    """The same with a test."""

    wins: int
    ties: int
    losses: int
    p_value: float
    verdict: Verdict
    """By `p_holm`."""
    order_flips: RateFigure
    """Share of principles' verdicts that turned with the order in which the two responses were shown."""
    p_holm: float
    """p-value adjusted for all pairs of the prompt set together."""


class PrincipleRate(PairRate):
    """How often `a` won against `b` by one principle alone."""

    principle: str


class TagFigures(TypedDict):
    """Figures on the prompts that have one tag."""

    prompts: int
    refusal: dict[str, RateFigure]
    """Checkpoint to the share of its responses that refuse."""
    head_to_head: list[PairRate]


class PromptSetFigures(TypedDict):
    """Everything that is reported about one prompt set."""

    prompts: int
    topics: int
    responses: dict[str, int]
    """Checkpoint to the number of its responses that did not fail."""
    checkpoints: dict[str, dict[str, RateFigure]]
    """Checkpoint to its rates, by the names in `cai.report.figures.METRICS`."""
    behaviours: dict[str, dict[str, RateFigure]]
    """Checkpoint to what detectors find in its responses, by the names in `cai.maths.behaviours.DETECTORS`."""
    differences: dict[str, dict[str, RateDifference]]
    """Checkpoint, other than the baseline, to its rates less the baseline's."""
    head_to_head: list[HeadToHead]
    principles: list[PrincipleRate]
    tags: dict[str, TagFigures]
    explained: NotRequired[Explanation | None]
    """What each principle did to the verdicts; None where no verdict has votes."""


class Comparison(TypedDict):
    """comparison.json: what a compare stage measured, and how."""

    stage: str
    models: dict[str, str]
    """Checkpoint to its model, the baseline first."""
    judge: str
    constitution: str
    principles: dict[str, str]
    """Principle to its text, in the constitution's order."""
    tie_below: float
    """Log-odds (nats) up to which a comparison is a tie."""
    n: int
    """Responses of each checkpoint to each prompt."""
    sampling: dict[str, Any]
    """temperature, top_p, top_k, max_new_tokens."""
    seed: int
    failed: dict[str, dict[str, int]]
    """`sample` and `vote` to the numbers `planned` and `missing`."""
    reasons: list[str]
    """Why responses and verdicts failed."""
    sets: dict[str, PromptSetFigures]
    """Prompt set to its figures."""
