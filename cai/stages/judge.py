"""Asks a judge which of two responses to one prompt is better, principle by principle, in both orders.

RLAIF's labels (Bai et al. 2022, arXiv 2212.08073, section 4; Lee et al. 2023, arXiv 2309.00267): the judge's log-odds
that *a* is better is the difference of the next-token log-probabilities of the two options. Each principle is asked
with *a* shown first and with *b* shown first, so that `prefer` can cancel a preference for a position. Nothing is
decided here: every vote is kept, and what the votes mean, weights included, is `prefer`'s.

A principle that was answered in one order only leaks the judge's preference for a position, so both its votes are
dropped and the failed one is listed among the failures; the pair keeps its other principles, and fails when none is
left. Responses with the same text are one response: there is nothing to choose between them.

Left out: reasoning before the verdict, ratings, more than two responses at once.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from cai.constitution import Constitution, Principle
from cai.engines import Choice, Failure, Question
from cai.engines.retry import choose_all
from cai.errors import BadInput, StageFailed
from cai.journal import RECORDS
from cai.records import Candidate, PrincipleVote, Sample, Vote, read_rows, stable_id
from cai.stages import Context, FeedbackConfig, Names, Rows
from cai.templates import OPTIONS, TemplateSet

ORDERS: tuple[Literal["ab", "ba"], ...] = ("ab", "ba")


class Config(FeedbackConfig):
    gives: ClassVar[Rows] = "votes"
    takes: ClassVar[tuple[Rows, ...]] = ("texts",)
    asks: ClassVar[tuple[str, ...]] = ("compare",)

    kind: Literal["judge"] = "judge"
    from_: Names = Field(alias="from", min_length=1, description="Stages whose responses are compared.")
    judge: str | None = Field(None, description="Model or stage that judges; absent = the recipe's `judge`.")
    pairs: Literal["disjoint", "all", "random"] = Field(
        "disjoint", description="disjoint: each response once; all: each with each; random: `n_pairs` of all."
    )
    n_pairs: int = Field(1, ge=1, description="Pairs for each prompt with `pairs: random`.")
    principles: Literal["one", "all"] | Annotated[int, Field(ge=1)] = Field(
        "all", description="Principles asked about a pair: one or k drawn at random from those that apply, or all."
    )
    min_mass: float = Field(
        0.1, ge=0, le=1,
        description="Probability that the options must hold together. A judge that understood the question puts nearly "
        "all of it there; below a tenth it was about to say something else, and the ratio of the options is noise.",
    )  # fmt: skip


def run(config: Config, context: Context) -> dict[str, Any]:
    """Writes one Vote for each pair of responses."""
    if context.constitution is None:
        raise BadInput("`judge` needs a constitution, and the recipe names none")
    responses: list[Sample] = context.rows(config.from_)
    pairs, left_out = plan(responses, config, context)
    items = [item for item in pairs if applicable(context.constitution, item["tags"])]
    if not items:
        raise StageFailed(
            f"nothing to judge among {len(responses)} responses: {len(pairs)} pairs of "
            f"different responses to one prompt, and a principle applies to none of them"
        )
    judge, templates = context.model(config.judge).name, context.templates(config.judge)
    with context.engine(config.judge) as engine:
        for batch in context.journal.batches(items, size=config.journal_batch, unit="pairs"):
            asked = {item["id"]: drawn(context.constitution, item, config.principles, context) for item in batch.items}
            questions = [
                question for item in batch.items for question in to_questions(item, asked[item["id"]], templates)
            ]
            answers = choose_all(engine, questions, config.retries)
            rows, failures = [], []
            for item in batch.items:
                votes, failed = to_votes(item, asked[item["id"]], answers, config.min_mass)
                failures += failed
                if votes:
                    rows.append(to_row(item, votes, judge, context.constitution.name))
            context.journal.append(batch, rows, failures)
    _, failed = context.journal.finish()
    judged: list[Vote] = read_rows(context.folder / RECORDS)
    if not judged:
        raise StageFailed(f"none of {len(items)} pairs was judged; {failed[0].reason}")
    figures = {
        "failed_pairs": len(items) - len(judged),
        "failures": len(failed),
        "without_principle": len(pairs) - len(items),
    }
    return {"votes": {context.stage_id: figures | left_out | measured(judged)}}


def plan(responses: Sequence[Sample], config: Config, context: Context) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The pairs of each prompt, prompts in the order of their first response, and counts of what is in no pair.

    Which responses meet and which of them is *a* depend on the stage's seed and the prompt, not on the order of rows.
    """
    by_prompt: dict[str, dict[str, Sample]] = {}
    for row in responses:
        by_prompt.setdefault(row["prompt_id"], {}).setdefault(row["response"], row)
    items = []
    paired: set[str] = set()
    for prompt_id, texts in by_prompt.items():
        rng = random.Random(context.seed_for(prompt_id))
        rows = sorted(texts.values(), key=lambda row: row["id"])
        rng.shuffle(rows)
        for a, b in pairs_of(rows, config, rng):
            paired |= {a["id"], b["id"]}
            items.append(
                {
                    "id": stable_id(context.stage_id, a["id"], b["id"]),
                    "prompt_id": prompt_id,
                    "prompt": a["prompt"],
                    "tags": list(dict.fromkeys([*a["tags"], *b["tags"]])),
                    "a": Candidate(id=a["id"], text=a["response"], model=a["model"]),
                    "b": Candidate(id=b["id"], text=b["response"], model=b["model"]),
                }
            )
    different = sum(len(texts) for texts in by_prompt.values())
    return items, {"same_text": len(responses) - different, "unpaired": different - len(paired)}


def pairs_of(rows: list[Sample], config: Config, rng: random.Random) -> list[tuple[Sample, Sample]]:
    """The pairs among shuffled responses to one prompt."""
    if config.pairs == "disjoint":
        return list(zip(rows[::2], rows[1::2], strict=False))
    every = list(itertools.combinations(rows, 2))
    return every if config.pairs == "all" else rng.sample(every, min(config.n_pairs, len(every)))


def applicable(constitution: Constitution, tags: Sequence[str]) -> list[Principle]:
    return [principle for principle in constitution.principles if principle.applies(tags)]


def drawn(constitution: Constitution, item: dict[str, Any], how_many: str | int, context: Context) -> list[Principle]:
    """The principles asked about a pair, in the document's order."""
    principles = applicable(constitution, item["tags"])
    if how_many == "all":
        return principles
    k = 1 if how_many == "one" else int(how_many)
    rng = random.Random(context.seed_for(item["id"], "principles"))
    chosen = rng.sample(range(len(principles)), min(k, len(principles)))
    return [principles[index] for index in sorted(chosen)]


def question_id(item: dict[str, Any], order: str, principle: Principle) -> str:
    return f"{item['id']}/{order}/{principle.id}"


def to_questions(item: dict[str, Any], principles: Sequence[Principle], templates: TemplateSet) -> Iterator[Question]:
    """Questions with a common beginning stand side by side: pair, then order, then principle."""
    for order in ORDERS:
        first, second = (item[side]["text"] for side in order)
        for principle in principles:
            messages = templates.compare(item["prompt"], first, second, principle)
            yield Question(question_id(item, order, principle), messages, OPTIONS)


def to_votes(
    item: dict[str, Any], principles: Sequence[Principle], answers: dict[str, Choice | Failure], min_mass: float
) -> tuple[list[PrincipleVote], list[Failure]]:
    """Votes of the principles that were answered in both orders, and what failed; the pair itself where none was."""
    votes: list[PrincipleVote] = []
    failures: list[Failure] = []
    for principle in principles:
        both = [to_vote(item, order, principle, answers, min_mass) for order in ORDERS]
        failed = [vote for vote in both if isinstance(vote, Failure)]
        failures += failed
        if not failed:
            votes += [vote for vote in both if not isinstance(vote, Failure)]
    if not votes:
        reason = f"no principle was answered in both orders; first of {len(failures)}: {failures[0].reason}"
        failures = [Failure(item["id"], reason)]
    return votes, failures


def to_vote(
    item: dict[str, Any],
    order: Literal["ab", "ba"],
    principle: Principle,
    answers: dict[str, Choice | Failure],
    min_mass: float,
) -> PrincipleVote | Failure:
    """The log-odds that *a* is better, whichever was shown first."""
    answer = answers[question_id(item, order, principle)]
    if isinstance(answer, Failure):
        return Failure(answer.id, f"pair {item['id']}, {principle.id!r}, order {order}: {answer.reason}")
    if answer.mass < min_mass:
        return Failure(
            answer.id,
            f"pair {item['id']}, {principle.id!r}, order {order}: the options hold {answer.mass:.3g} of the "
            f"probability, less than min_mass {min_mass:g}",
        )
    first_better = answer.log_probs[0] - answer.log_probs[1]
    log_odds = first_better if order == "ab" else -first_better
    return PrincipleVote(principle=principle.id, order=order, log_odds=log_odds, mass=answer.mass)


def to_row(item: dict[str, Any], votes: list[PrincipleVote], judge: str, constitution: str) -> Vote:
    return {
        "id": item["id"],
        "prompt_id": item["prompt_id"],
        "prompt": item["prompt"],
        "tags": item["tags"],
        "a": item["a"],
        "b": item["b"],
        "votes": votes,
        "judge": judge,
        "constitution": constitution,
    }


def measured(rows: Sequence[Vote]) -> dict[str, Any]:
    """What the votes say about the judge, over principles in both orders.

    `flip_rate` is the share whose verdict turns with the order; `position_bias` (nats) is how much more the response
    shown first gets than the mean of both orders says, on average.
    """
    ab = np.array([vote["log_odds"] for row in rows for vote in row["votes"] if vote["order"] == "ab"])
    ba = np.array([vote["log_odds"] for row in rows for vote in row["votes"] if vote["order"] == "ba"])
    mass = np.array([vote["mass"] for row in rows for vote in row["votes"]])
    return {
        "pairs": len(rows),
        "votes": len(mass),
        "mean_mass": float(mass.mean()),
        "flip_rate": float(np.mean(ab * ba < 0)),
        "position_bias": float(np.mean(ab - ba) / 2),
        "mean_strength": float(np.mean(np.abs(ab + ba)) / 2),
    }
