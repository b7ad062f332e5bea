"""Asks a judge which of two responses to one prompt is better, principle by principle, in both orders.

RLAIF's labels (Bai et al. 2022, arXiv 2212.08073, section 4; Lee et al. 2023, arXiv 2309.00267): by `method`, the
judge's log-odds that *a* is better, at once or after a rationale, or the difference of two ratings, in points
(`cai.feedback.methods`). Each principle is asked with *a* shown first and with *b* shown first, so that `prefer` can
cancel a position bias. Every vote is kept; how votes become labels, weights included, is decided in `prefer`.

A principle that was answered in one order only would leak the judge's position bias, so both its votes are dropped and
the failed one is listed among the failures; the pair keeps its other principles, and fails when none is left. Responses
with the same text count as one response: there is nothing to choose between them.

Training on a pair puts the end of the turn after each response. A response that the model was cut off in would teach to
stop in mid-sentence, and an empty one to answer nothing, so neither is paired; both are counted.

Pairs that people labelled (`human:`) are judged like all others, to measure the judge against people. The judge does
not see their label: hashes decide which response is *a*, and the label only goes into the vote's row.

Left out: more than two responses at once.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from cai.constitution import Principle, applicable_principles
from cai.contracts.context import Context
from cai.contracts.engine import Sampling
from cai.contracts.references import JudgeRef, OneOrMore, OutputKind, PrincipleRef, PromptSetRef, TextsRef
from cai.contracts.stage_config import FeedbackConfig, PrincipleField
from cai.engines.portion_size import REQUEST_TOKENS, Work, limit_portions, mean_tokens
from cai.feedback.asked_votes import count_asked_votes, missing_votes
from cai.feedback.known_votes import all_votes, take_over
from cai.feedback.methods import (
    ANSWER_SAMPLING,
    PRINCIPLE_FIELDS,
    TEMPLATE_NAMES,
    Judge,
    Method,
    Verdicts,
)  # fmt: skip
from cai.feedback.pairs import PairKind, pair_against, pair_responses, pairs_of_people, select_responses
from cai.feedback.truth import count_failed_with_truth
from cai.feedback.votes import MIN_OPTION_PROBABILITY, ORDERS, ResponsePair
from cai.maths.statistics import worst_case
from cai.maths.vote_aggregation import mean_over_orders
from cai.prompt_sets import PairSet, load_human_pairs
from cai.storage.journal import RECORDS, Result
from cai.storage.rows import (
    Pair,
    PrincipleVote,
    Sample,
    Vote,
    read_rows,
    vote_unit,
)  # fmt: skip
from cai.text.errors import BadInput, StageFailed
from cai.text.left_out import LeftOut, failure_reasons


class Config(FeedbackConfig):
    gives: ClassVar[OutputKind] = "votes"
    revision: ClassVar[int] = 3
    item_choice: ClassVar[tuple[str, ...]] = (
        "input", "prompts", "file", "constitution", "principles", "principle", "config.from", "config.human",
        "config.pairs", "config.n_pairs", "config.cut_off", "config.prompts", "config.n_prompts", "config.principles",
        "config.journal_batch", "config.retries",
    )  # fmt: skip

    kind: Literal["judge"] = "judge"
    from_: OneOrMore[TextsRef] = Field([], alias="from", description="Stages whose responses are compared.")
    human: PairSet | None = Field(
        None,
        description="Pairs that people labelled, such as {source: hh.jsonl.gz, limit: 500}, to be judged too: "
        "`cai votes calibrate` then says how often the judge agrees with people.",
    )
    judge: JudgeRef | None = Field(None, description="Model or stage that judges; absent = the recipe's `judge`.")
    method: Method = Field(
        "pairwise",
        description="pairwise: which is better, at once; reasoned: after reasons; rating: each alone, on a scale.",
    )
    rationales: int = Field(1, ge=1, description="Reasons sampled for each question, with `method: reasoned`.")
    max_new_tokens: int = Field(256, ge=1, description="Tokens at which reasons are cut off and do not count.")
    temperature: float = Field(1.0, ge=0, description="At which reasons are sampled; 0 always takes the likeliest.")
    scale: Literal[7, 10] = Field(7, description="The highest rating, with `method: rating`; the lowest is 1.")
    verdicts: Verdicts = Field(
        "log-probabilities",
        description="What a `pairwise` answer is read from; text: answers drawn and counted, for servers that give no "
        "log-probabilities. Coarser, and several times the requests.",
    )
    draws: int = Field(4, ge=1, description="Answers drawn for each question, with `verdicts: text`.")
    pairs: PairKind = Field(
        "disjoint",
        description="disjoint: each response once; all: each with each; random: `n_pairs` of all; against: those of "
        "the first stage in `from` with those of each other stage that were sampled under the same seed.",
    )
    n_pairs: int = Field(1, ge=1, description="Pairs for each prompt with `pairs: random`.")
    cut_off: Literal["leave_out", "keep"] = Field(
        "leave_out", description="What becomes of responses that the model was cut off in; keep pairs them as if whole."
    )
    prompts: OneOrMore[PromptSetRef] = Field([], description="Sets whose prompts are judged; empty = all responses.")
    n_prompts: int | None = Field(None, ge=1, description="Prompts of each of these sets; absent = all.")
    principles: Literal["one", "all"] | Annotated[int, Field(ge=1)] | list[PrincipleRef] = Field(
        "all",
        description="Principles asked about a pair: one or k at random from those that apply, all that apply, or those "
        "of these ids and tags that do.",
    )
    min_option_probability: float = Field(
        MIN_OPTION_PROBABILITY, ge=0, le=1,
        description="Probability that the options must hold together. A judge that understood the question puts nearly "
        "all of it there; below a tenth it was about to say something else, and the ratio of the options is noise.",
    )  # fmt: skip

    @property
    def n_drawn(self) -> int | None:
        """Principles that are drawn at random for a pair; None = all that are chosen and apply."""
        if isinstance(self.principles, int):
            return self.principles
        return 1 if self.principles == "one" else None

    def needs_pairs(self) -> bool:
        return self.human is None and self.pairs != "against"

    def vote_unit(self) -> str:
        return vote_unit(self.method, self.scale)

    def template_names(self) -> tuple[str, ...]:
        return TEMPLATE_NAMES[self.method]

    def principle_fields(self) -> tuple[PrincipleField, ...]:
        return PRINCIPLE_FIELDS[self.method]

    @model_validator(mode="after")
    def _has_input(self) -> Self:
        if not self.from_ and self.human is None:
            raise ValueError("found neither `from:` nor `human:`, expected stages with responses or a file of pairs")
        return self

    @model_validator(mode="after")
    def _of_the_method(self) -> Self:
        for key, method in METHOD_OF_SETTING.items():
            if key in self.model_fields_set and method != self.method:
                raise ValueError(
                    f"found `{key}` with `method: {self.method}`, expected it with `method: {method}` alone"
                )
        if self.verdicts == "text" and self.method != "pairwise":
            raise ValueError(f"found `verdicts: text` with `method: {self.method}`, expected `method: pairwise`")
        if "draws" in self.model_fields_set and self.verdicts != "text":
            raise ValueError("found `draws` without `verdicts: text`, expected both")
        return self

    @model_validator(mode="after")
    def _of_the_pairs(self) -> Self:
        if self.pairs == "against" and "cut_off" in self.model_fields_set:
            raise ValueError("found `cut_off` with `pairs: against`, which pairs cut-off responses like all others")
        if self.n_prompts is not None and not self.prompts:
            raise ValueError("found `n_prompts` without `prompts`, expected both")
        if self.pairs != "random" and "n_pairs" in self.model_fields_set:
            raise ValueError(f"found `n_pairs` with `pairs: {self.pairs}`, expected it with `pairs: random` alone")
        return self


METHOD_OF_SETTING = dict.fromkeys(("rationales", "max_new_tokens", "temperature"), "reasoned") | {"scale": "rating"}
"""Settings that only one method has."""


def run(config: Config, context: Context) -> dict[str, Any]:
    """Writes one Vote for each pair of responses."""
    if context.constitution is None:
        raise BadInput("`judge` needs a constitution, and the recipe names none")
    planned, counts, n_responses = plan_pairs(config, context)
    selected = context.constitution.select(config.principles if isinstance(config.principles, list) else "all")
    principles = {item["id"]: sample_principles(selected, item, config.n_drawn, context) for item in planned}
    items = [item for item in planned if principles[item["id"]]]
    unprincipled = LeftOut(
        len(planned) - len(items), "without a principle that applies", "let a principle apply to their tags"
    )
    context.report_left_out(len(planned), "pairs", [unprincipled])
    if not items and config.pairs != "against":
        left_out = counts["left_out"]
        raise StageFailed(
            f"nothing to judge among {n_responses} responses: {left_out['cut_off']} cut off and "
            f"{left_out['empty']} empty left out, {len(planned)} pairs of different responses to one prompt among the "
            f"others and people's, and a principle applies to none of them"
        )
    judge_name = context.model(config.judge).name
    known_votes = take_over(items, principles, config.principle_fields()[0], context.earlier)
    n_asked = sum(len(principles[item["id"]]) for item in items)
    known = {
        item["id"]: Result(to_row(item, votes, judge_name, context.constitution.name, config))
        for item in items
        if (votes := all_votes(principles[item["id"]], known_votes.get(item["id"], {})))
    }
    if (n_known := sum(map(len, known_votes.values()))) and len(known) < len(items):
        context.progress.note(f"{n_known:,} of {n_asked:,} votes are unchanged and taken over")
    to_ask = {
        id: [principle for principle in pair_principles if principle.id not in known_votes.get(id, {})]
        for id, pair_principles in principles.items()
        if pair_principles and id not in known
    }
    limit = limit_portions(config, context, len(to_ask), work_of_pair(config, context, items, to_ask))
    with context.engine(config.judge) as engine:
        for portion in context.journal.portions(items, config.journal_batch, "pairs", known, limit):
            judge = Judge(
                engine,
                context.templates(config.judge),
                config.method,
                config.min_option_probability,
                config.attempts(portion),
                context.seed_for("reasons"),
                config.rationales,
                config.scale,
                config.draws if config.verdicts == "text" else None,
                Sampling(config.max_new_tokens, config.temperature),
                context.journal.report_answer,
                context.journal.report_tokens,
            )
            pairs = [
                ResponsePair(item["id"], item["prompt"], item["a"]["text"], item["b"]["text"]) for item in portion.items
            ]
            votes_by_pair = judge.votes(pairs, principles, known_votes)
            results = []
            for item in portion.items:
                votes, failures = votes_by_pair[item["id"]]
                row = to_row(item, votes, judge_name, context.constitution.name, config) if votes else None
                results.append(Result(row, failures))
            context.journal.append(portion, results)
    _, all_failures = context.journal.finish()
    judged: list[Vote] = read_rows(context.folder / RECORDS)
    if not judged and config.pairs != "against":
        raise StageFailed(f"none of {len(items)} pairs was judged; {all_failures[0].reason}")
    judged_ids = {row["id"] for row in judged}
    asked = {item["id"]: [principle.id for principle in principles[item["id"]]] for item in items}
    missing = list(missing_votes(all_failures, asked))
    figures = {
        "failed_pairs": len(items) - len(judged),
        "failed_with_truth": count_failed_with_truth([item for item in items if item["id"] not in judged_ids]),
        "failures": len(all_failures),
        "without_principle": len(planned) - len(items),
        "principles": count_asked_votes([principle.id for principle in selected], asked, missing),
    }
    context.report_left_out(n_asked, "votes", failure_reasons(vote.failure for vote in missing))
    return {"votes": {context.stage_id: figures | counts | vote_figures(judged, n_asked, config.method)}}


def plan_pairs(config: Config, context: Context) -> tuple[list[Pair], dict[str, Any], int]:
    """The pairs, whatever principles apply to them, counts of what is in none, and the number of responses read."""
    stages: list[list[Sample]] = [context.rows(stage_id) for stage_id in config.from_]
    if config.prompts:
        prompt_ids = context.chosen_prompts(config.prompts, config.n_prompts)
        stages = [[row for row in rows if row["prompt_id"] in prompt_ids] for rows in stages]
    responses = [row for rows in stages for row in rows]
    left_out = {"cut_off": 0, "empty": 0}
    if config.pairs == "against":
        pairs, counts = pair_against(stages, context.stage_id)
    else:
        complete, left_out = select_responses(responses, config.cut_off)
        pairs, counts = pair_responses(complete, config.pairs, config.n_pairs, context)
        report_unpaired(config, context, stages, left_out, counts)
    if config.human is not None:
        people = load_human_pairs(config.human, context.home)
        pairs += pairs_of_people(people.preferences, Path(config.human.source).name, context.stage_id)
        counts["human"] = {"rows": people.rows, "pairs": len(people.preferences), "left_out": people.left_out}
        context.report_left_out(people.n_wanted, "labelled pairs", people.unusable)
    return pairs, counts | {"left_out": left_out}, len(responses)


def work_of_pair(
    config: Config, context: Context, items: Sequence[Pair], to_ask: Mapping[str, Sequence[Principle]]
) -> Work:
    """What the judge does for an average pair among those `to_ask`; each order of a pair is read once for all of its
    principles."""
    shown = [(item["prompt"], (item["a"]["text"], item["b"]["text"])) for item in items if item["id"] in to_ask]
    n_shown = mean_tokens(shown)
    n_questions = len(ORDERS) * sum(map(len, to_ask.values())) / max(1, len(to_ask))
    n_read = len(ORDERS) * n_shown + n_questions * REQUEST_TOKENS
    n_sampled = 0.0
    if config.verdicts == "text":
        n_sampled = n_questions * config.draws * ANSWER_SAMPLING.max_new_tokens
    elif config.method == "reasoned":
        n_sampled = n_questions * config.rationales * config.max_new_tokens
        n_read += n_questions * config.rationales * (n_shown + config.max_new_tokens)
    return Work(context.model(config.judge), n_sampled, n_read)


def report_unpaired(
    config: Config, context: Context, stages: Sequence[Sequence[Sample]], left_out: Mapping[str, int],
    counts: Mapping[str, int],
) -> None:  # fmt: skip
    """Tells the user where many responses are in no pair, but for those that `pairs: random` does not ask for."""
    rows_by_stage = dict(zip(config.from_, stages, strict=True))
    reasons = [
        context.cut_off_reason(left_out["cut_off"], rows_by_stage, "set `cut_off: keep`"),
        LeftOut(left_out["empty"], "empty"),
        LeftOut(counts["same_text"], "with the text of another", "sample at a higher `temperature`"),
        LeftOut(0 if config.pairs == "random" else counts["unpaired"], "without another one to their prompt"),
    ]
    context.report_left_out(sum(map(len, stages)), "responses", reasons)


def sample_principles(
    principles: Sequence[Principle], item: Pair, n_drawn: int | None, context: Context
) -> list[Principle]:
    """Those of `principles` that are asked about a pair, in their order: `n_drawn` of those that apply, None = all."""
    applicable = applicable_principles(principles, item["tags"])
    if n_drawn is None:
        return applicable
    rng = random.Random(context.seed_for(item["id"], "principles"))
    indices = rng.sample(range(len(applicable)), min(n_drawn, len(applicable)))
    return [applicable[index] for index in sorted(indices)]


def to_row(item: Pair, votes: list[PrincipleVote], judge: str, constitution: str, config: Config) -> Vote:
    """The pair with its votes, and the method where it is not `pairwise`, with the scale of ratings."""
    row: Vote = {
        **item, "votes": votes, "judge": judge, "constitution": constitution, "method": config.method,
        "scale": config.scale,
    }  # fmt: skip
    if config.method == "pairwise":
        del row["method"]
    if config.method != "rating":
        del row["scale"]
    return row


def vote_figures(rows: Sequence[Vote], n_asked: int, method: Method) -> dict[str, Any]:
    """Figures of the votes, of `n_asked` (pair, principle) combinations that the judge was asked about.

    `flip_rate` is the share whose verdict changes with the order; its `bounds` are the shares if none or all of the
    failed ones did. `position_bias` is the mean log-odds (nats) that being shown first adds. Ratings have no order, so
    both are None, and their `mean_strength` is in points.
    """
    if not rows:
        return {"pairs": 0, "votes": 0}
    ab, ba = (
        np.array([vote["log_odds"] for row in rows for vote in row["votes"] if vote["order"] == order])
        for order in ORDERS
    )
    option_probabilities = np.array([vote["option_probability"] for row in rows for vote in row["votes"]])
    has_order = method != "rating"
    bounds = worst_case(float(np.sum(ab * ba < 0)), len(ab), n_asked - len(ab))
    return {
        "pairs": len(rows),
        "votes": len(option_probabilities),
        "mean_option_probability": float(option_probabilities.mean()),
        "flip_rate": float(np.mean(ab * ba < 0)) if has_order else None,
        "position_bias": float(np.mean(ab - ba) / 2) if has_order else None,
        "bounds": {"flip_rate": list(bounds)} if has_order else {},
        "mean_strength": float(np.mean(np.abs(mean_over_orders(ab, ba)))),
    }
