"""The figures of comparison.json and summary.json by name: typed dictionaries with the keys of the files.

Unless a figure says otherwise, shares lie in [0, 1], log-odds and losses are in nats, p-values are two-sided, and
intervals are 95 % intervals clustered by topic (`cai.maths.statistics`). Counts are of rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, Required, cast

from pydantic import Field
from typing_extensions import TypedDict  # pydantic needs this one below Python 3.12

from cai.feedback.principle_tests import ConstitutionFigures

if TYPE_CHECKING:
    from cai.feedback.explain import Explanation
    from cai.maths import statistics

Interval = Annotated[list[float], Field(min_length=2, max_length=2)]
"""[low, high]."""


class RateFigure(TypedDict):
    """A mean over responses, pairs or verdicts. Shares lie in [0, 1], amounts (words, hedges) do not."""

    value: float | None
    """None where `n` is 0."""
    n: int
    """Items that have a value."""
    topics: int
    """Topics that the items are about: the clusters of the interval."""
    interval: Interval
    missing: NotRequired[int]
    """Items that failed: in neither value nor interval. Absent where there are none."""
    bounds: NotRequired[Interval]
    """Least and greatest value, were all missing items 0 or all 1."""


class DifferenceFigure(TypedDict):
    """A rate of a checkpoint minus the same rate of the baseline, on the responses that both gave."""

    value: float | None
    n: int
    topics: int
    interval: Interval
    p_value: float
    verdict: Literal["higher", "lower", "not distinguishable"]
    """What the checkpoint's rate is, by `p_holm`."""
    p_holm: float
    """p-value adjusted for all differences of the prompt set together."""


class HeadToHead(RateFigure):
    """How often `a` won against `b` by the judge; a tie counts half."""

    a: str
    b: str
    wins: int
    ties: int
    losses: int
    p_value: float
    verdict: Literal["a better", "b better", "not distinguishable"]
    """By `p_holm`."""
    order_flips: RateFigure
    """Share of principles' verdicts that turned with the order in which the two responses were shown."""
    p_holm: float
    """p-value adjusted for all pairs of the prompt set together."""


class PairRate(RateFigure):
    """How often `a` won against `b`, without a test."""

    a: str
    b: str


class PrincipleWinRate(PairRate):
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
    differences: dict[str, dict[str, DifferenceFigure]]
    """Checkpoint, other than the baseline, to its rates less the baseline's."""
    head_to_head: list[HeadToHead]
    principles: list[PrincipleWinRate]
    tags: dict[str, TagFigures]
    explained: NotRequired[Explanation | None]
    """What each principle did to the verdicts; None where no verdict has votes."""


class FailureCount(TypedDict):
    planned: int
    missing: int


class FailureCounts(TypedDict):
    sample: FailureCount
    vote: FailureCount


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
    failed: FailureCounts
    reasons: list[str]
    """Why responses and verdicts failed."""
    sets: dict[str, PromptSetFigures]
    """Prompt set to its figures."""


# Figures of the stages, as `run` of each stage kind returns them for summary.json.


class SampleFigures(TypedDict):
    """Responses that a sample stage wrote."""

    prompts: int
    responses: int
    failed: int
    cut_off: int
    """Responses that reached the limit of tokens."""
    mean_tokens: float
    """Of a response."""


class DecliningCounts(TypedDict):
    originals: int
    revisions: int


class RevisionFigures(TypedDict):
    """Critiques and revisions of a revise stage."""

    failed: int
    not_selected: int
    """Responses whose prompt has none of the tags that are revised."""
    without_principle: int
    """Responses that no principle applies to."""
    responses: int
    usable: int
    """Responses that a revision replaced."""
    outcomes: dict[str, int]
    """Outcome of a round to the number of rounds."""
    principles: dict[str, dict[str, int]]
    """Principle to outcomes of its rounds."""
    declining: DecliningCounts
    """Texts that decline the request, before and after, among usable ones."""


class TruthCounts(TypedDict):
    all: int
    held_out: int


class FailedWithTruth(TypedDict):
    human: TruthCounts
    oracle: TruthCounts


class HumanPairCounts(TypedDict):
    """Pairs of a file of human preferences."""

    rows: int
    pairs: int
    left_out: dict[str, int]
    """Reason to the number of pairs."""


class VoteBounds(TypedDict, total=False):
    flip_rate: Interval


class VoteFigures(TypedDict):
    """Votes of a judge stage; by ratings, strengths are in points and what depends on an order is None."""

    failed_pairs: int
    failed_with_truth: FailedWithTruth
    """Failed pairs of which it is known, by people or the oracle, which response is better."""
    failures: int
    """Failed votes and pairs."""
    without_principle: int
    """Pairs that no principle applies to."""
    left_out: dict[str, int]
    """Responses that are in no pair, by reason."""
    same_text: int
    unpaired: int
    human: NotRequired[HumanPairCounts]
    pairs: int
    votes: int
    mean_option_probability: float
    flip_rate: float | None
    """Share of votes whose sign differs between the two orders."""
    position_bias: float | None
    """Log-odds that the response shown first gains, on average."""
    bounds: VoteBounds
    """Least and greatest flip rate, were none or all of the failed votes to flip."""
    mean_strength: float
    """Mean of a vote's absolute log-odds."""


class TemperatureFigures(TypedDict):
    """A temperature that was fitted, and what it is worth on prompts that it was not fitted on."""

    truth: Literal["human", "oracle"]
    value: float
    at_bound: bool
    bounds: Interval
    pairs: int
    prompts: int
    measured_on: Literal["held_out", "cross_validation"]
    measured_pairs: int
    ece: float
    """Expected calibration error."""
    ece_after_temperature: float | None
    brier: float
    brier_after_temperature: float | None


class AgreementFigure(RateFigure):
    """How often the labels are on the side of people."""

    why: NotRequired[str]
    """Why there is no value."""


class ChosenAndRejected(TypedDict):
    chosen: float
    rejected: float


class PrincipleLabelFigures(TypedDict):
    """Votes of one principle, by the labels that they became part of."""

    pairs: int
    mean_strength: float
    agreement: float
    """Share of votes that favour the chosen response."""
    agreement_with_gold: NotRequired[float]
    """Share of votes that favour the response that the oracle scores higher; no accuracy."""


class LabelFigures(TypedDict):
    """Labels that a prefer stage made of votes and human preferences."""

    votes: int
    """Judged pairs."""
    abstained: int
    """Pairs on which every principle abstained."""
    dropped: int
    """Pairs nearer to even than `min_confidence`."""
    even: int
    """Pairs without a side, where labels are hard."""
    mixed_out_ai: NotRequired[int]
    mixed_out_human: NotRequired[int]
    """Pairs that `mix` left out."""
    human: NotRequired[HumanPairCounts]
    agreement_with_people: NotRequired[AgreementFigure]
    temperature: NotRequired[TemperatureFigures]
    pairs: int
    mean_confidence: float
    """Mean probability of the chosen response."""
    undecided: int
    """Pairs whose label is 1/2."""
    longer_wins: RateFigure | None
    """Share of pairs of different length, in words, whose longer response is chosen."""
    behaviours: dict[str, ChosenAndRejected]
    """Detector to its mean over chosen and over rejected responses."""
    principles: dict[str, PrincipleLabelFigures]
    accuracy: NotRequired[RateFigure]
    """Share of labels that the oracle agrees with; this and what follows only for prompts of the embedded world."""
    measured_on: NotRequired[Literal["held_out", "all"]]
    ties: NotRequired[int]
    unclear: NotRequired[int]
    acts: NotRequired[dict[str, dict[str, int]]]
    """Kind of request to `<act of chosen> over <act of rejected>` to the number of pairs."""


class RewardFigures(TypedDict):
    """A reward model on pairs that it did not learn from."""

    accuracy: RateFigure
    against: Literal["gold", "labels"]
    """What accuracy and calibration error are measured against."""
    ties: int
    ungraded: int
    label_accuracy: RateFigure
    chosen_score: float
    rejected_score: float
    margin: float
    """Mean difference of the two scores."""
    log_loss: float
    label_entropy: float
    """The least that log_loss could be."""
    calibration_error: float | None
    pairs: int
    examples: int
    held_out: int
    left_out: dict[str, int]


class FirstAndLast(TypedDict):
    """A metric at the first and the last step that was logged."""

    first: float | None
    last: float | None


class TrainingFigures(TypedDict):
    """A training stage. Which of the figures it has depends on its kind; `reward/<name>` is the score of one source."""

    steps: int
    loss: FirstAndLast
    examples: NotRequired[int]
    pairs: NotRequired[int]
    prompts: NotRequired[int]
    left_out: dict[str, int]
    """Reason to the number of rows that were not learned from."""
    tokens_learned: NotRequired[int]
    fitting_by_stage: NotRequired[dict[str, int]]
    """Stage to the number of its rows that can be learned from."""
    held_out: NotRequired[int | dict[str, float | None]]
    """Pairs that are not learned from; of dpo also its metrics on them."""
    drift: NotRequired[dict[str, float | None]]
    """Of dpo: nats a token that chosen responses gained, and share by which the policy prefers longer responses."""
    rollouts: NotRequired[int]
    failed_responses: NotRequired[int]
    reward: NotRequired[FirstAndLast]
    kl: NotRequired[FirstAndLast]
    """KL from the reference, in nats a response."""
    entropy: NotRequired[FirstAndLast]
    length: NotRequired[FirstAndLast]
    """Mean tokens of a response."""
    unfinished: NotRequired[FirstAndLast]
    """Share of responses that were cut off."""


class BestOfNFigures(TypedDict):
    """The responses with the highest rewards."""

    prompts: int
    without_principle: int
    responses: int
    left_out: dict[str, int]
    failed: int
    failed_prompts: int
    chosen: int
    mean_of: float
    """Responses that each was chosen from."""
    best_reward: float
    mean_reward: float
    kl_bound: float
    """The most that choosing can diverge from the model that sampled, in nats a response."""


class GateFigures(ConstitutionFigures):
    """A judge on the constitution's examples, and on responses that are equally good."""

    ece: float | None
    """Expected calibration error."""
    prefers_padded: RateFigure
    nats_from_even_between_equals: float | None


class CheckpointFigures(TypedDict, total=False):
    """A checkpoint's rates, those of `PromptSetFigures.checkpoints`, and its behaviours."""

    harmful_compliance: RateFigure
    helpfulness: RateFigure
    over_refusal: RateFigure
    well_formed: RateFigure
    unclear: RateFigure
    distinct: RateFigure
    finished: RateFigure
    behaviours: Required[dict[str, RateFigure]]


def rate_figure(estimate: statistics.Rate) -> RateFigure:
    """The JSON form of a rate."""
    return cast(RateFigure, estimate.as_json())
