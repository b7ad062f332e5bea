"""Turns votes into labelled preferences, without a model (Bai et al. 2022, arXiv 2212.08073, section 4.1).

A pair's log-odds is the weighted mean of its principles', each averaged over both orders; the formulas are in
`cai.feedback.labels`. Weights come from the constitution at the time of this stage, so trying others asks no model
again. The label is the probability itself (soft), its side (hard), or the probability kept within bounds (clamp; the
paper's 40 to 60 %).

A pair in which every principle abstains has no label, and an even one has no side to be hard about: both are left out
and counted. Where a soft label is even, a hash of the responses says which is called chosen, never their position.

`temperature: fitted` makes the truth likeliest where it is known of judged pairs, by people or, where these labelled
few, by the embedded world's oracle, on the weighted sums of all principles (`cai.feedback.calibration`). Held-out
prompts take no part in the fit, since figures are measured on them.

People's labels (`pairs:`) stand beside the judge's, or, by `mix`, are a share of all, or those of some tags:
helpfulness from people, harmlessness from the constitution, as in the paper (`cai.feedback.mixing`).

Left out: learning how far each principle can be trusted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import IO, Annotated, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from cai.constitution import Constitution
from cai.contracts.context import Context
from cai.contracts.stage_config import Names, OutputKind, StageConfig
from cai.feedback import calibration, mixing
from cai.feedback.label_figures import figures, look
from cai.feedback.labels import Bools, Floats, aggregate, over_orders, probability
from cai.feedback.truth import Truth, truths
from cai.feedback.votes import read_votes
from cai.prompt_sets.prompt_files import HumanPairs, PairSet, load_human_pairs
from cai.storage.files import replacing
from cai.storage.journal import RECORDS
from cai.storage.rows import Preference, canonical_json, is_held_out, stable_id, topic_of
from cai.text.errors import BadInput, StageFailed

ENOUGH = 20
"""Prompts with pairs that people labelled which a temperature is fitted to, whatever else is known."""


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

    human_share: float | None = Field(None, gt=0, lt=1, description="Share of pairs that people labelled.")
    human_tags: tuple[str, ...] = Field(
        (), description="Tags of the pairs that take people's labels, and no others do."
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.human_share is None) == (not self.human_tags):
            raise ValueError("expected either human_share, such as 0.5, or human_tags, such as [helpful]")
        return self


class Config(StageConfig):
    gives: ClassVar[OutputKind] = "preferences"
    takes: ClassVar[tuple[OutputKind, ...]] = ("votes",)
    revision: ClassVar[int] = 3
    reads_files: ClassVar[tuple[str, ...]] = ("pairs",)
    uses_weights: ClassVar[bool] = True

    kind: Literal["prefer"] = "prefer"
    from_: Names = Field([], alias="from", description="Stages whose votes become labels.")
    pairs: PairSet | None = Field(None, description="Pairs that people labelled, such as {source: hh.jsonl.gz}.")
    mix: Mix | None = Field(None, description="Which labels are people's where there are `from:` and `pairs:`.")
    tag_weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        default_factory=dict,
        description="Factors for the weights of principles by their tags, such as {harm: 2, style: 0}.",
    )
    labels: Literal["soft", "hard"] | Clamp | None = Field(
        None,
        description="soft, hard, or {clamp: [0.4, 0.6]}; absent = soft, or, if all votes are reasoned, that clamp for "
        "them and soft for people's.",
    )
    temperature: Literal["sum_of_weights", "fitted"] | Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        "sum_of_weights",
        description="What the weighted sum of log-odds is divided by: the sum of weights, a number, or the number that "
        "is fitted to pairs whose truth is known, by people (`human:` of the judge stage) or the oracle of micro.",
    )
    abstain_below: float = Field(0.0, ge=0, description="Nats from even below which a principle has no say on a pair.")
    min_confidence: float = Field(
        0.5, ge=0.5, le=1, description="Pairs whose probability, before clamping, is nearer to even are left out."
    )

    @model_validator(mode="after")
    def _has_input(self) -> Self:
        if not self.from_ and self.pairs is None:
            raise ValueError("found neither `from:` nor `pairs:`, expected stages with votes or a file of human pairs")
        if self.mix and not (self.from_ and self.pairs):
            raise ValueError("found `mix:`, expected `from:` and `pairs:` beside it, which it mixes")
        return self


class Labelled(NamedTuple):
    """Preferences from votes, and what the figures say about how they came about."""

    rows: Iterator[Preference]
    """Read, labelled and let go one after the other."""
    n_rows: int
    left_out: dict[str, Any]
    principles: list[str]
    votes: Floats
    """Each principle's log-odds that *a* is better, (rows, principles)."""
    chosen_is_a: Bools
    """Which response became the chosen one, (rows,): known once a row has passed."""
    temperature: dict[str, Any] | None
    """What was fitted and what it is worth, where it was."""
    agreement: dict[str, Any] | None
    """How often the label is on people's side, where these labelled anything."""
    human_stays: Bools
    """Which of people's preferences are not left out by `mix`."""


def run(config: Config, context: Context) -> dict[str, Any]:
    """Writes one Preference for each pair that gets a label: those from votes in their order, then the human ones."""
    people = HumanPairs([], 0, {}) if config.pairs is None else load_human_pairs(config.pairs, context.home)
    ours = from_votes(config, context, people.preferences)
    human = relabelled(itertools.compress(people.preferences, ours.human_stays), config.labels or "soft")
    found: dict[str, Any] = dict(ours.left_out)
    if config.pairs is not None:
        found["human"] = {"rows": people.rows, "pairs": len(people.preferences), "left_out": people.left_out}
    n = ours.n_rows + len(human)
    if not n:
        raise StageFailed(f"none of the pairs gets a label: {found}")
    with replacing(context.folder / RECORDS) as file:
        seen = look(written(itertools.chain(ours.rows, human), file), n)
    towards_chosen = np.where(ours.chosen_is_a, 1.0, -1.0)[:, None] * ours.votes
    no_votes = np.full((len(human), len(ours.principles)), np.nan)
    if ours.agreement:
        found["agreement_with_people"] = ours.agreement
    if ours.temperature:
        found["temperature"] = ours.temperature
        if ours.temperature["at_bound"]:
            low, high = ours.temperature["bounds"]
            at_low = ours.temperature["value"] < (low + high) / 2
            right = "always right" if at_low else "right no more often than by chance"
            context.progress.note(
                f"the fitted temperature ran into its bound, {ours.temperature['value']:.3g}: by what is known of "
                f"{ours.temperature['pairs']:,} pairs the judge is {right}"
            )
    votes = np.concatenate([towards_chosen, no_votes])
    stages = [context.inputs[name] for name in config.from_]
    return {"labels": {**found, **figures(seen, ours.principles, votes, stages)}}


def written(rows: Iterable[Preference], file: IO[bytes]) -> Iterator[Preference]:
    """The rows, each of them in the file by the time that the next is asked for."""
    for row in rows:
        file.write((canonical_json(row) + "\n").encode())
        yield row


def from_votes(config: Config, context: Context, human: Sequence[Preference]) -> Labelled:
    """The preferences that the votes of the input stages amount to."""
    found = read_votes(context.inputs[name] / RECORDS for name in config.from_)
    votes = over_orders(found.vote_columns, len(found.unparsed_rows), len(found.principles))
    weights = weights_of(found.principles, context.constitution, config.tag_weights)
    fitted = None
    if config.temperature == "fitted":
        fitted = fit(list(found.rows()), votes, weights, config.abstain_below)
    number = config.temperature if isinstance(config.temperature, float) else None
    log_odds = aggregate(
        votes, weights, temperature=fitted["value"] if fitted else number, abstain_below=config.abstain_below
    )
    kept, left_out = choose(log_odds, config)
    agreement, human_stays = None, np.ones(len(human), dtype=bool)
    if human or not np.isnan(found.human).all():
        judged = list(found.rows())
        topics = [topic_of(row["tags"], row["prompt_id"]) for row in judged]
        agreement = mixing.agreement(log_odds, mixing.people_say(judged, human), topics)
        if config.mix:
            ai_stays, human_stays = mixed(config.mix, [judged[i] for i in kept.tolist()], human)
            left_out |= {"mixed_out_ai": int((~ai_stays).sum()), "mixed_out_human": int((~human_stays).sum())}
            kept = kept[ai_stays]
    strength = np.abs(log_odds[kept])
    p_chosen = labels(strength, config.labels or usual_labels(found.methods))
    chosen_is_a = np.zeros(len(kept), dtype=bool)

    def rows() -> Iterator[Preference]:
        labelled = np.zeros(len(found.unparsed_rows), dtype=bool)
        labelled[kept] = True
        kept_rows = itertools.compress(found.rows(), labelled.tolist())
        values = zip(log_odds[kept].tolist(), p_chosen.tolist(), strength.tolist(), strict=True)
        for place, (row, (towards_a, p, odds)) in enumerate(zip(kept_rows, values, strict=True)):
            a_is_chosen = chosen_is_a[place] = prefers_a(row, towards_a)
            yield to_row(row, a_is_chosen, p, odds, context.stage_id)

    counts = {"votes": len(found.unparsed_rows), **left_out}
    return Labelled(
        rows(), len(kept), counts, found.principles, votes[kept], chosen_is_a, fitted, agreement, human_stays
    )


def mixed(mix: Mix, judged: Sequence[Mapping[str, Any]], human: Sequence[Preference]) -> tuple[Bools, Bools]:
    """Which of the judged pairs that have a label, and of people's, stay."""
    ours, theirs = [mixing.judged(row) for row in judged], [mixing.chosen_by_people(row) for row in human]
    if mix.human_share is None:
        return mixing.by_tag(ours, theirs, mix.human_tags)
    return mixing.by_share(ours, theirs, mix.human_share)


def fit(rows: Sequence[Mapping[str, Any]], votes: Floats, weights: Floats, abstain_below: float) -> dict[str, Any]:
    """The temperature that makes known truths likeliest, and what it is worth on prompts that it was not fitted on.

    By what people chose, where that is known of `ENOUGH` prompts outside of held-out ones, else by the oracle, where it
    is so of that, else by whichever knows more prompts. Raises StageFailed where neither knows any.
    """
    sums = aggregate(votes, weights, temperature=1.0, abstain_below=abstain_below)
    means = aggregate(votes, weights, abstain_below=abstain_below)
    held_out = np.array([is_held_out(row) for row in rows], dtype=bool)
    usable = ~held_out & ~np.isnan(sums)
    found: list[tuple[int, Truth]] = []
    for truth in truths(rows).values():
        if prompts := {rows[i]["prompt_id"] for i in np.flatnonzero(truth.decided & usable).tolist()}:
            found.append((min(len(prompts), ENOUGH), truth))
    if found:
        _, truth = max(found, key=lambda each: each[0])  # the first of equals
        known = np.flatnonzero(truth.decided & ~np.isnan(sums))
        clusters = [topic_of(rows[i]["tags"], rows[i]["prompt_id"]) for i in known.tolist()]
        return {"truth": truth.kind} | calibration.fitted(
            sums[known], means[known], truth.better[known], clusters, held_out[known]
        )
    raise StageFailed(
        "`temperature: fitted` found no truth outside of held-out prompts, expected judged pairs that people labelled "
        "(`human:` of the judge stage) or prompts of source micro"
    )


def weights_of(principles: Sequence[str], constitution: Constitution | None, by_tag: Mapping[str, float]) -> Floats:
    """The weight of each principle that voted, by the constitution and the factors of its tags.

    Raises BadInput for one that it does not know."""
    if not principles:
        return np.zeros(0)
    if constitution is None:
        raise BadInput("`prefer` needs the constitution whose principles voted, and the recipe names none")
    return np.array([constitution.principle(id).weighted(by_tag) for id in principles], dtype=float)


def choose(log_odds: Floats, config: Config) -> tuple[Any, dict[str, int]]:
    """Indices of the pairs that get a label, and how many do not, by reason."""
    abstained = np.isnan(log_odds)
    unsure = ~abstained & (probability(np.abs(log_odds)) < config.min_confidence)
    even = ~abstained & ~unsure & (log_odds == 0) & (config.labels == "hard")
    kept = np.flatnonzero(~(abstained | unsure | even))
    return kept, {"abstained": int(abstained.sum()), "dropped": int(unsure.sum()), "even": int(even.sum())}


def prefers_a(row: Mapping[str, Any], log_odds: float) -> bool:
    """Whether *a* is the chosen one; where nothing is better, the hash of a response's id and text decides."""
    if log_odds != 0:
        return log_odds > 0
    a, b = row["a"], row["b"]
    return stable_id(a["id"], a["text"]) < stable_id(b["id"], b["text"])


def usual_labels(methods: Set[str]) -> str | Clamp:
    """Soft; after reasons, which leave a judge all too sure, kept within 40 to 60 %, which the paper found best."""
    return Clamp(clamp=(0.4, 0.6)) if methods == {"reasoned"} else "soft"


def labels(strength: Floats, kind: str | Clamp) -> Floats:
    """p_chosen of pairs whose log-odds towards the chosen one is `strength`, at least 0."""
    if kind == "hard":
        return np.ones_like(strength)
    p = probability(strength)
    return np.minimum(p, kind.clamp[1]) if isinstance(kind, Clamp) else p


def relabelled(preferences: Iterable[Preference], kind: str | Clamp) -> list[Preference]:
    """Human preferences with their labels hardened or clamped like the others."""
    return [{**row, "p_chosen": float(labels(np.array([row["log_odds"]]), kind)[0])} for row in preferences]


def to_row(row: Mapping[str, Any], a_is_chosen: bool, p_chosen: float, log_odds: float, stage_id: str) -> Preference:
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
