"""Turns votes into labelled preferences, without a model (Bai et al. 2022, arXiv 2212.08073, section 4.1).

Each principle's log-odds are averaged over both orders. A pair's log-odds are the weighted sum over its principles,
divided by a temperature; by default that is the sum of the weights, which makes it a weighted mean. The formulas are in
`cai.maths.vote_aggregation`. Weights come from the constitution at the time of this stage, so that trying others asks
no model again. The label is the pair's probability (soft), its side (hard), or the probability kept within bounds
(clamp; 40 to 60 % in the paper). The stage writes the rule of the judge's labels beside its rows, for the commands that
explain or measure labels.

A principle abstains on a pair without a vote of it, or with one nearer to even than `abstain_below`. A pair on which
every principle abstains gets no label, and an even pair no hard label; both are left out and counted. With an even soft
label a hash of the two responses, never their position, decides which one is called chosen.

Where a judge rates, votes are points, which are no log-odds. They are divided by `points_per_nat`, stated or fitted,
before anything else: thresholds and labels are in nats on any scale, and rated pairs can stand beside compared ones.
Without it, or with two scales, such votes are refused.

`temperature: fitted` fits the labels to the truth where it is known, from people or from the embedded world's oracle
(`cai.feedback.judge_calibration`). Held-out prompts take no part in the fit, since figures are measured on them.

People's labels (`pairs:`) are added to the judge's. With `mix` they are a share of all labels, or those of some tags:
helpfulness from people, harmlessness from the constitution, as in the paper (`cai.feedback.mixing`).

Left out: learning how far each principle can be trusted.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from cai.constitution import Constitution
from cai.contracts.context import Context
from cai.contracts.references import OneOrMore, OutputKind, PrincipleTagRef, TagRef, VotesAndFailedRef
from cai.contracts.stage_config import PrincipleField, StageConfig, WrongVoteUnits
from cai.feedback import mixing
from cai.feedback.judge_calibration import FittedDivisor, fit_and_measure_divisor
from cai.feedback.label_figures import LabelStatistics
from cai.feedback.labelled_votes import LabelRule
from cai.feedback.stored_votes import StoredVotes, read_votes
from cai.feedback.truth import available_truths
from cai.maths.vote_aggregation import Floats, Ints, mean_over_orders, sigmoid
from cai.prompt_sets import HumanPairs, PairSet, load_human_pairs
from cai.storage.files import replacing
from cai.storage.journal import RECORDS
from cai.storage.rows import NATS, Preference, canonical_json, is_held_out, stable_id, topic_of
from cai.text.errors import BadInput, StageFailed
from cai.text.left_out import LeftOut

MIN_PROMPTS_TO_FIT = 20
"""Prompts from which one source of truth is enough to fit a temperature."""


class Clamp(BaseModel):
    """Soft labels kept within bounds, `clamp: [0.4, 0.6]`, that treat both responses alike."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    clamp: tuple[float, float] = Field(description="Lowest and highest label; they add up to 1.")

    @model_validator(mode="after")
    def _even_handed(self) -> Self:
        low, high = self.clamp
        if not (0 <= low < 0.5 < high <= 1) or abs(low + high - 1) > 1e-9:
            raise ValueError(f"found clamp {[low, high]}, expected bounds that add up to 1, such as [0.4, 0.6]")
        return self


class Mix(BaseModel):
    """How many or which of the labels are people's: `mix: {human_tags: [helpful]}`, the others the constitution's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    human_share: float | None = Field(None, gt=0, lt=1, description="Share of all labels that are people's.")
    human_tags: tuple[TagRef, ...] = Field(
        (), description="Pairs with one of these tags have people's labels alone, all others the judge's."
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.human_share is None) == (not self.human_tags):
            raise ValueError("expected either human_share, such as 0.5, or human_tags, such as [helpful]")
        return self


class Config(StageConfig):
    gives: ClassVar[OutputKind] = "preferences"
    revision: ClassVar[int] = 3

    kind: Literal["prefer"] = "prefer"
    from_: OneOrMore[VotesAndFailedRef] = Field([], alias="from", description="Stages whose votes become labels.")
    pairs: PairSet | None = Field(None, description="Pairs that people labelled, such as {source: hh.jsonl.gz}.")
    mix: Mix | None = Field(None, description="Which labels are people's where there are `from:` and `pairs:`.")
    tag_weights: dict[PrincipleTagRef, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        default_factory=dict,
        description="Factors for the weights of principles by their tags, such as {harm: 2, style: 0}.",
    )
    labels: Literal["soft", "hard"] | Clamp | None = Field(
        None,
        description="soft, hard, or {clamp: [0.4, 0.6]}. Absent = soft; but where a judge wrote reasons before every "
        "vote, the judge's labels are clamped to 0.4 and 0.6.",
    )
    temperature: Literal["sum_of_weights", "fitted"] | Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        "sum_of_weights",
        description="What the weighted sum of log-odds is divided by: the sum of weights, a number, or the number that "
        "is fitted to pairs whose truth is known, by people (`human:` of the judge stage) or the oracle of micro.",
    )
    points_per_nat: Literal["fitted"] | Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None,
        description="Points that are worth one nat where judges rate (`method: rating`): a number, or the number that "
        "is fitted to pairs whose truth is known. Such judges need it, and all must use one scale.",
    )
    abstain_below: float = Field(0.0, ge=0, description="Nats from even below which a principle has no say on a pair.")
    min_confidence: float = Field(
        0.5, ge=0.5, le=1, description="Pairs whose probability, before clamping, is nearer to even are left out."
    )

    def principle_fields(self) -> tuple[PrincipleField, ...]:
        return ("weight",) if self.from_ else ()

    def check_vote_units(self, units_by_stage: Mapping[str, Collection[str]]) -> None:
        units = set().union(*units_by_stage.values())
        points = sorted(units - {NATS})
        units_in_words = f"found votes in {' and in '.join(sorted(units))}"
        if len(points) > 1:
            raise WrongVoteUnits(f"{units_in_words}, expected one scale of ratings; make a `prefer` stage for each")
        if points and self.points_per_nat is None:
            raise WrongVoteUnits(
                f"{units_in_words}, expected `points_per_nat`, the points that are worth one nat of log-odds: a "
                "number, or `fitted` where it is known of some pairs which response is better"
            )
        if self.points_per_nat is not None and units == {NATS}:
            raise WrongVoteUnits(
                "found `points_per_nat`, expected it with votes of judges that rate (`method: rating`)",
                key="points_per_nat",
            )

    @model_validator(mode="after")
    def _has_input(self) -> Self:
        if not self.from_ and self.pairs is None:
            raise ValueError("found neither `from:` nor `pairs:`, expected stages with votes or a file of human pairs")
        if self.mix and not (self.from_ and self.pairs):
            raise ValueError("found `mix:`, expected `from:` and `pairs:` beside it, which it mixes")
        if self.points_per_nat is not None and not self.from_:
            raise ValueError("found `points_per_nat`, expected `from:` beside it, with votes of judges that rate")
        return self


class Selection(NamedTuple):
    """The judged pairs and the human preferences that get a label."""

    pairs: Ints
    """Indices of the judged pairs."""
    human: list[Preference]
    counts: dict[str, int]
    """Pairs in all, and those without a label by reason."""
    agreement: Mapping[str, Any] | None
    """How often the judge agrees with people, where people labelled any pair."""


def run(config: Config, context: Context) -> dict[str, Any]:
    """Writes one Preference for each pair that gets a label: those from votes in their order, then people's."""
    people = HumanPairs([], 0, {}) if config.pairs is None else load_human_pairs(config.pairs, context.home)
    if config.mix and not people.preferences:
        raise StageFailed(f"`mix` found no pair that people labelled: {people.rows} rows, left out {people.left_out}")
    judge_folders = [context.inputs[stage_id] for stage_id in config.from_]
    votes = read_votes(folder / RECORDS for folder in judge_folders)
    config.check_vote_units(dict(zip(config.from_, votes.units_by_file, strict=True)))
    rule, fitted = label_rule(config, context.constitution, votes)
    rule.write(context.folder)
    log_odds_by_principle = mean_over_orders(*votes.log_odds_by_order(rule.points_per_nat))
    log_odds = rule.aggregate(log_odds_by_principle, votes.principles)
    pairs, human, counts, agreement = select(config.mix, rule, votes, log_odds, people.preferences)
    figures: dict[str, Any] = dict(counts)
    report_unlabelled(config, context, counts)
    if config.pairs is not None:
        figures["human"] = {"rows": people.rows, "pairs": len(people.preferences), "left_out": people.left_out}
        context.report_left_out(people.n_wanted, "labelled pairs", people.unusable)
    if not len(pairs) + len(human):
        raise StageFailed(f"none of the pairs gets a label: {_why_none(config, rule, counts)}")
    human = relabelled(human, with_labels(rule, config.labels or "soft"))
    n_pairs = votes.n_pairs + len(people.preferences)
    statistics = write_preferences(context, votes, pairs, log_odds, rule, human)
    n_labels = statistics.n_uneven
    context.progress.start(total=n_labels, unit=f"labels of {n_pairs:,} pairs", finished=0)
    context.progress.advance(n_labels)
    if agreement:
        figures["agreement_with_people"] = agreement
    for name, value in fitted.items():
        figures[name] = asdict(value)
        _note_bound(name, value, context)
    return {"labels": figures | statistics.figures(votes.principles, log_odds_by_principle[pairs], judge_folders)}


def label_rule(
    config: Config, constitution: Constitution | None, votes: StoredVotes
) -> tuple[LabelRule, dict[str, FittedDivisor]]:
    """The rule of these labels, and what was fitted for it by name: `points_per_nat`, then `temperature`."""
    rule = LabelRule(
        weights=principle_weights(votes.principles, constitution, config.tag_weights),
        temperature=config.temperature if isinstance(config.temperature, float) else None,
        points_per_nat=config.points_per_nat if isinstance(config.points_per_nat, float) else None,
        abstain_below=config.abstain_below,
        min_confidence=config.min_confidence,
        methods=tuple(sorted(votes.methods)),
    )
    # A judge that reasons is overconfident, and the paper found a clamp to 40 to 60 % best for it.
    default_labels: Literal["soft"] | Clamp = Clamp(clamp=(0.4, 0.6)) if votes.methods == {"reasoned"} else "soft"
    rule = with_labels(rule, config.labels or default_labels)
    fitted: dict[str, FittedDivisor] = {}
    if config.points_per_nat == "fitted":
        fitted["points_per_nat"] = scale = fit_points_per_nat(votes, rule)
        rule = replace(rule, points_per_nat=scale.value, is_points_per_nat_fitted=True)
    if config.temperature == "fitted":
        log_odds = mean_over_orders(*votes.log_odds_by_order(rule.points_per_nat))
        fitted["temperature"] = temperature = fit_temperature(
            list(votes.parsed_rows()), log_odds, votes.principles, rule
        )
        rule = replace(rule, temperature=temperature.value, is_temperature_fitted=True)
    return rule, fitted


def principle_weights(
    principles: Sequence[str], constitution: Constitution | None, tag_weights: Mapping[str, float]
) -> dict[str, float]:
    """The weight of each principle that voted, from the constitution and the factors of its tags.

    Raises BadInput for a principle that the constitution does not have.
    """
    if not principles:
        return {}
    if constitution is None:
        raise BadInput("`prefer` needs the constitution whose principles voted, and the recipe names none")
    return {id: constitution.principle(id).weighted(tag_weights) for id in principles}


def with_labels(rule: LabelRule, labels: Literal["soft", "hard"] | Clamp) -> LabelRule:
    """The rule with another kind of label."""
    if isinstance(labels, Clamp):
        return replace(rule, labels="clamp", clamp=labels.clamp)
    return replace(rule, labels=labels, clamp=None)


def fit_points_per_nat(votes: StoredVotes, rule: LabelRule) -> FittedDivisor:
    """The points that are worth one nat: the divisor of the rated pairs' points that makes the truth likeliest.

    Every principle counts, since what is nearer to even than `abstain_below` nats follows from this number. The errors
    without it are those of points taken for nats.
    """
    points = mean_over_orders(*votes.log_odds_by_order(1.0))
    points = np.where(votes.is_rated[:, None], points, np.nan)
    means = replace(rule, abstain_below=0.0).aggregate(points, votes.principles)
    return fit_divisor("points_per_nat", list(votes.parsed_rows()), means, means)


def fit_temperature(
    rows: Sequence[Mapping[str, Any]], log_odds: Floats, principles: Sequence[str], rule: LabelRule
) -> FittedDivisor:
    """The divisor of summed log-odds, (pairs, principles) before, that makes the truth likeliest."""
    sums = replace(rule, temperature=1.0).aggregate(log_odds, principles)
    return fit_divisor("temperature", rows, sums, rule.aggregate(log_odds, principles))


def fit_divisor(name: str, rows: Sequence[Mapping[str, Any]], sums: Floats, log_odds: Floats) -> FittedDivisor:
    """The divisor of `sums` that makes the known truth likeliest, and its errors on prompts that it was not fitted on.

    `sums` and the `log_odds` that are made without it are (pairs,). The truth comes from people if they labelled pairs
    of at least `MIN_PROMPTS_TO_FIT` prompts that are not held out, else from the oracle if it covers so many prompts,
    else from the source that covers more. Held-out pairs are passed on to be measured, not fitted. Raises StageFailed
    where there is no truth.
    """
    held_out = np.array([is_held_out(row) for row in rows], dtype=bool)
    truths = available_truths(rows).values()  # people's first
    usable = {truth.kind: truth.is_decided & ~held_out & ~np.isnan(sums) for truth in truths}
    n_prompts = {
        kind: len({rows[i]["prompt_id"] for i in np.flatnonzero(is_usable).tolist()})
        for kind, is_usable in usable.items()
    }
    truth = max(truths, key=lambda truth: min(n_prompts[truth.kind], MIN_PROMPTS_TO_FIT), default=None)
    if truth is None or not n_prompts[truth.kind]:
        raise StageFailed(
            f"`{name}: fitted` found no truth outside of held-out prompts, expected judged pairs that people "
            "labelled (`human:` of the judge stage) or prompts of source micro"
        )
    pairs = np.flatnonzero(truth.is_decided & ~np.isnan(sums))
    return fit_and_measure_divisor(
        truth.kind,
        sums[pairs],
        log_odds[pairs],
        truth.p_a_better[pairs],
        [topic_of(rows[i]["tags"], rows[i]["prompt_id"]) for i in pairs.tolist()],
        held_out[pairs],
    )


def _note_bound(name: str, fitted: FittedDivisor, context: Context) -> None:
    """Notes a fitted divisor at one of its bounds, where the judge is always right or right by chance."""
    if fitted.at_bound:
        accuracy = "always right" if fitted.value < sum(fitted.bounds) / 2 else "right no more often than by chance"
        context.progress.note(
            f"the fitted {name.replace('_', ' ')} ran into its bound, {fitted.value:.3g}: by what is known of "
            f"{fitted.pairs:,} pairs the judge is {accuracy}"
        )


def select(
    mix: Mix | None, rule: LabelRule, votes: StoredVotes, log_odds: Floats, human: list[Preference]
) -> Selection:
    """Which pairs get a label: not those that abstain, are too unsure or too even, nor those that `mix` leaves out."""
    abstained = np.isnan(log_odds)
    unsure = ~abstained & (sigmoid(np.abs(log_odds)) < rule.min_confidence)
    even = ~abstained & ~unsure & (log_odds == 0) & (rule.labels == "hard")
    pairs = np.flatnonzero(~(abstained | unsure | even))
    counts = {
        "votes": votes.n_pairs, "abstained": int(abstained.sum()), "dropped": int(unsure.sum()), "even": int(even.sum())
    }  # fmt: skip
    if not human and np.isnan(votes.human).all():
        return Selection(pairs, human, counts, None)
    rows = list(votes.parsed_rows())
    topics = [topic_of(row["tags"], row["prompt_id"]) for row in rows]
    agreement = mixing.agreement_with_people(log_odds, mixing.human_p_a_better(rows, human), topics)
    if mix:
        ai_pairs = [mixing.pair_of_vote(rows[i]) for i in pairs.tolist()]
        human_pairs = [mixing.pair_of_preference(preference) for preference in human]
        if mix.human_share is None:
            keep_ai, keep_human = mixing.keep_by_tag(ai_pairs, human_pairs, mix.human_tags)
        else:
            keep_ai, keep_human = mixing.keep_by_share(ai_pairs, human_pairs, mix.human_share)
        pairs, human = pairs[keep_ai], list(itertools.compress(human, keep_human))
        counts |= {"mixed_out_ai": int((~keep_ai).sum()), "mixed_out_human": int((~keep_human).sum())}
    return Selection(pairs, human, counts, agreement)


def _why_none(config: Config, rule: LabelRule, counts: Mapping[str, int]) -> str:
    """Why no pair has a label, in words."""
    if rule.weights and not any(rule.weights.values()):
        return "every principle that voted has weight 0; give one of them a `weight`, or change `tag_weights`"
    reasons = {
        "abstained": f"on which every principle abstains (abstain_below {config.abstain_below:g})",
        "dropped": f"nearer to even than min_confidence {config.min_confidence:g}",
        "even": "exactly even",
        "mixed_out_ai": "left out by `mix`",
        "mixed_out_human": "labelled by people and left out by `mix`",
    }
    parts = [f"{counts[name]:,} {words}" for name, words in reasons.items() if counts.get(name)]
    return "; ".join([f"{counts['votes']:,} judged pairs", *parts])


def report_unlabelled(config: Config, context: Context, counts: Mapping[str, int]) -> None:
    """Tells the user where many judged pairs get no label, but for those that `mix` leaves to people."""
    unsure = f"nearer to even than min_confidence {config.min_confidence:g}"
    abstained = f"on which every principle is nearer to even than abstain_below {config.abstain_below:g} nats"
    reasons = [
        LeftOut(counts["abstained"], abstained, "lower `abstain_below`"),
        LeftOut(counts["dropped"], unsure, "lower `min_confidence`"),
        LeftOut(counts["even"], "exactly even", "set `labels: soft`"),
    ]
    context.report_left_out(counts["votes"], "pairs", reasons)


def write_preferences(
    context: Context, votes: StoredVotes, pairs: Ints, log_odds: Floats, rule: LabelRule, human: Sequence[Preference]
) -> LabelStatistics:
    """Writes the preferences of the judged `pairs`, then people's, and returns the numbers of all.

    Each row is parsed, labelled and written before the next one, so that memory does not grow with their number.
    """
    strength = np.abs(log_odds[pairs])
    labels = zip(log_odds[pairs].tolist(), rule.p_chosen(strength).tolist(), strength.tolist(), strict=True)
    has_label = np.zeros(votes.n_pairs, dtype=bool)
    has_label[pairs] = True
    rows = itertools.compress(votes.parsed_rows(), has_label.tolist())
    statistics = LabelStatistics(len(pairs) + len(human))
    with replacing(context.folder / RECORDS) as file:
        for row, (log_odds_of_a, p_chosen, chosen_log_odds) in zip(rows, labels, strict=True):
            a_is_chosen = prefers_a(row, log_odds_of_a)
            preference = to_preference(row, a_is_chosen, p_chosen, chosen_log_odds, context.stage_id)
            file.write((canonical_json(preference) + "\n").encode())
            statistics.add(preference, a_is_chosen)
        for preference in human:
            file.write((canonical_json(preference) + "\n").encode())
            statistics.add(preference)
    return statistics


def prefers_a(row: Mapping[str, Any], log_odds: float) -> bool:
    """Whether *a* is the chosen response; if the pair is even, a hash of the responses' ids and texts decides."""
    if log_odds != 0:
        return log_odds > 0
    a, b = row["a"], row["b"]
    return stable_id(a["id"], a["text"]) < stable_id(b["id"], b["text"])


def relabelled(preferences: Sequence[Preference], rule: LabelRule) -> list[Preference]:
    """Human preferences with the rule's kind of label."""
    labels = rule.p_chosen(np.array([preference["log_odds"] for preference in preferences], dtype=float)).tolist()
    return [{**preference, "p_chosen": label} for preference, label in zip(preferences, labels, strict=True)]


def to_preference(
    row: Mapping[str, Any], a_is_chosen: bool, p_chosen: float, log_odds: float, stage_id: str
) -> Preference:
    """The labelled pair; `log_odds` are those that the chosen response is better."""
    chosen, rejected = (row["a"], row["b"]) if a_is_chosen else (row["b"], row["a"])
    return {
        "id": stable_id(stage_id, row["id"]),
        "pair_id": row["id"],
        "prompt_id": row["prompt_id"],
        "prompt": row["prompt"],
        "chosen": [{"role": "assistant", "content": chosen["text"]}],
        "rejected": [{"role": "assistant", "content": rejected["text"]}],
        "p_chosen": p_chosen,
        "log_odds": log_odds,
        "source": "ai",
        "tags": row["tags"],
        "judge": row["judge"],
        "constitution": row["constitution"],
    }
