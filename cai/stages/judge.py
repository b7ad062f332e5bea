"""Asks a judge which of two responses to one prompt is better, principle by principle, in both orders.

RLAIF's labels (Bai et al. 2022, arXiv 2212.08073, section 4; Lee et al. 2023, arXiv 2309.00267): by `method`, the
judge's log-odds that *a* is better at once or after reasons, or the difference of two ratings (`cai.feedback.methods`).
Each principle is asked with *a* shown first and with *b* shown first, so that `prefer` can cancel a preference for a
position. Nothing is decided here: every vote is kept, and what the votes mean, weights included, is `prefer`'s.

A principle that was answered in one order only would leak the judge's preference for a position, so both its votes are
dropped and the failed one is listed among the failures; the pair keeps its other principles, and fails when none is
left. Responses with the same text are one response: there is nothing to choose between them.

A pair teaches its responses as whole ones: whoever trains on it puts the end of the turn after each. What the model was
cut off in would teach to stop in mid-sentence, and an empty response to say nothing, so neither meets another response;
both are counted.

Pairs that people labelled (`human:`) are judged like all others, so that a judge can be held against people. The judge
is not told: which response is *a* is decided by hashes, and the label goes past it into the vote's row.

Left out: more than two responses at once.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from cai.constitution import Constitution, Principle
from cai.contracts.context import Context
from cai.contracts.engine import Sampling
from cai.contracts.stage_config import FeedbackConfig, Names, OutputKind
from cai.feedback.methods import PRINCIPLE_FIELDS, TEMPLATE_NAMES, Judge, Method, Verdicts
from cai.feedback.votes import MIN_OPTION_PROBABILITY, ResponsePair, empty
from cai.maths.statistics import worst_case
from cai.prompt_sets.prompt_files import PairSet, load_human_pairs
from cai.storage.journal import RECORDS
from cai.storage.rows import HELD_OUT, TOPIC, Candidate, Preference, PrincipleVote, Sample, Vote, read_rows, stable_id
from cai.text.errors import BadInput, StageFailed


class Config(FeedbackConfig):
    gives: ClassVar[OutputKind] = "votes"
    takes: ClassVar[tuple[OutputKind, ...]] = ("texts",)
    revision: ClassVar[int] = 2
    reads_files: ClassVar[tuple[str, ...]] = ("human",)

    kind: Literal["judge"] = "judge"
    from_: Names = Field([], alias="from", description="Stages whose responses are compared.")
    human: PairSet | None = Field(
        None,
        description="Pairs that people labelled, such as {source: hh.jsonl.gz, limit: 500}, to be judged too: "
        "`cai votes calibrate` then says how often the judge agrees with people.",
    )
    judge: str | None = Field(None, description="Model or stage that judges; absent = the recipe's `judge`.")
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
    pairs: Literal["disjoint", "all", "random"] = Field(
        "disjoint", description="disjoint: each response once; all: each with each; random: `n_pairs` of all."
    )
    n_pairs: int = Field(1, ge=1, description="Pairs for each prompt with `pairs: random`.")
    cut_off: Literal["leave_out", "keep"] = Field(
        "leave_out", description="What becomes of responses that the model was cut off in; keep pairs them as if whole."
    )
    principles: Literal["one", "all"] | Annotated[int, Field(ge=1)] = Field(
        "all", description="Principles asked about a pair: one or k drawn at random from those that apply, or all."
    )
    min_option_probability: float = Field(
        MIN_OPTION_PROBABILITY, ge=0, le=1,
        description="Probability that the options must hold together. A judge that understood the question puts nearly "
        "all of it there; below a tenth it was about to say something else, and the ratio of the options is noise.",
    )  # fmt: skip

    @property
    def template_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Templates of the method."""
        return TEMPLATE_NAMES[self.method]

    @property
    def principle_fields(self) -> tuple[str, ...]:  # type: ignore[override]
        """What principles say to a judge by this method."""
        return PRINCIPLE_FIELDS[self.method]

    @model_validator(mode="after")
    def _has_input(self) -> Self:
        if not self.from_ and self.human is None:
            raise ValueError("found neither `from:` nor `human:`, expected stages with responses or a file of pairs")
        return self

    @model_validator(mode="after")
    def _of_the_method(self) -> Self:
        for key, method in METHOD_OF.items():
            if key in self.model_fields_set and method != self.method:
                raise ValueError(
                    f"found `{key}` with `method: {self.method}`, expected it with `method: {method}` alone"
                )
        if self.verdicts == "text" and self.method != "pairwise":
            raise ValueError(f"found `verdicts: text` with `method: {self.method}`, expected `method: pairwise`")
        if "draws" in self.model_fields_set and self.verdicts != "text":
            raise ValueError("found `draws` without `verdicts: text`, expected both")
        return self


METHOD_OF = {"rationales": "reasoned", "max_new_tokens": "reasoned", "temperature": "reasoned", "scale": "rating"}
"""Settings that only one method has."""


def run(config: Config, context: Context) -> dict[str, Any]:
    """Writes one Vote for each pair of responses."""
    if context.constitution is None:
        raise BadInput("`judge` needs a constitution, and the recipe names none")
    responses: list[Sample] = context.rows(config.from_)
    whole, left_out = select(responses, config.cut_off)
    planned, counts = plan(whole, config, context)
    if config.human is not None:
        people = load_human_pairs(config.human, context.home)
        planned += labelled_by_people(people.preferences, Path(config.human.source).name, context.stage_id)
        counts["human"] = {"rows": people.rows, "pairs": len(people.preferences), "left_out": people.left_out}
    items = [item for item in planned if applicable(context.constitution, item["tags"])]
    if not items:
        raise StageFailed(
            f"nothing to judge among {len(responses)} responses: {left_out['cut_off']} cut off and "
            f"{left_out['empty']} empty left out, {len(planned)} pairs of different responses to one prompt among the "
            f"others and people's, and a principle applies to none of them"
        )
    name = context.model(config.judge).name
    with context.engine(config.judge) as engine:
        for batch in context.journal.batches(items, size=config.journal_batch, unit="pairs"):
            asked = {item["id"]: drawn(context.constitution, item, config.principles, context) for item in batch.items}
            pairs = [
                ResponsePair(item["id"], item["prompt"], item["a"]["text"], item["b"]["text"]) for item in batch.items
            ]
            judge = Judge(
                engine, context.templates(config.judge), config.method, config.min_option_probability,
                config.attempts(batch),
                context.seed_for("reasons"), config.rationales, config.scale,
                config.draws if config.verdicts == "text" else None,
                Sampling(config.max_new_tokens, config.temperature),
            )  # fmt: skip
            judged_pairs = judge.votes(pairs, asked)
            rows, failures = [], []
            for item, pair in zip(batch.items, pairs, strict=True):
                votes, failed = judged_pairs[pair.id]
                failures += failed
                if votes:
                    rows.append(to_row(item, votes, name, context.constitution.name, config.method))
            context.journal.append(batch, rows, failures)
    _, failed = context.journal.finish()
    judged: list[Vote] = read_rows(context.folder / RECORDS)
    if not judged:
        raise StageFailed(f"none of {len(items)} pairs was judged; {failed[0].reason}")
    there = {row["id"] for row in judged}
    figures = {
        "failed_pairs": len(items) - len(judged),
        "failed_with_truth": with_truth([item for item in items if item["id"] not in there]),
        "failures": len(failed),
        "without_principle": len(planned) - len(items),
        "left_out": left_out,
    }
    n_asked = sum(len(drawn(context.constitution, item, config.principles, context)) for item in items)
    return {"votes": {context.stage_id: figures | counts | measured(judged, n_asked, config.method)}}


def with_truth(items: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """How many of the pairs have a truth to be held against, by its kind: of all prompts, of held-out ones."""
    kinds = {
        "human": [item for item in items if "human" in item],
        "oracle": [item for item in items if any(tag.startswith(TOPIC) for tag in item["tags"])],
    }
    return {
        kind: {"all": len(some), "held_out": sum(HELD_OUT in item["tags"] for item in some)}
        for kind, some in kinds.items()
    }


def select(responses: Sequence[Sample], cut_off: str) -> tuple[list[Sample], dict[str, int]]:
    """The responses that may be in a pair, and counts of the others by what they are: cut_off, empty."""
    kept = []
    left_out: Counter[str] = Counter()
    for row in responses:
        if empty(row["response"]):
            left_out["empty"] += 1
        elif cut_off == "leave_out" and row["finish_reason"] == "length":
            left_out["cut_off"] += 1
        else:
            kept.append(row)
    return kept, {reason: left_out[reason] for reason in ("cut_off", "empty")}


def plan(responses: Sequence[Sample], config: Config, context: Context) -> tuple[list[dict[str, Any]], dict[str, Any]]:
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


def labelled_by_people(preferences: Sequence[Preference], source: str, stage_id: str) -> list[dict[str, Any]]:
    """Each pair once, the response with the lower id called *a*; `human` is the share of people's labels for it."""
    items: dict[str, dict[str, Any]] = {}
    labels: dict[str, list[float]] = {}
    for row in preferences:
        chosen, rejected = (
            Candidate(id=stable_id(row["prompt_id"], text), text=text, model=source)
            for text in (row["chosen"][-1]["content"], row["rejected"][-1]["content"])
        )
        a, b = sorted((chosen, rejected), key=lambda each: each["id"])
        labels.setdefault(row["pair_id"], []).append(float(a is chosen))
        items[row["pair_id"]] = {
            "id": stable_id(stage_id, a["id"], b["id"]),
            "prompt_id": row["prompt_id"],
            "prompt": row["prompt"],
            "tags": row["tags"],
            "a": a,
            "b": b,
        }
    return [{**item, "human": float(np.mean(labels[pair]))} for pair, item in items.items()]


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


def to_row(item: dict[str, Any], votes: list[PrincipleVote], judge: str, constitution: str, method: Method) -> Vote:
    row: Vote = {
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
    if "human" in item:
        row["human"] = item["human"]
    if method != "pairwise":
        row["method"] = method
    return row


def measured(rows: Sequence[Vote], n_asked: int, method: Method) -> dict[str, Any]:
    """What the votes say about the judge, over principles in both orders, of `n_asked` that were put to it.

    `flip_rate` is the share whose verdict turns with the order, its `bounds` what it is if none or all of the failed
    ones do; `position_bias` (nats) is how much more the response shown first gets than the mean of both orders says, on
    average. Ratings have no order, and so neither of them.
    """
    ab = np.array([vote["log_odds"] for row in rows for vote in row["votes"] if vote["order"] == "ab"])
    ba = np.array([vote["log_odds"] for row in rows for vote in row["votes"] if vote["order"] == "ba"])
    option_probability = np.array([vote["option_probability"] for row in rows for vote in row["votes"]])
    ordered = method != "rating"
    bounds = worst_case(float(np.sum(ab * ba < 0)), len(ab), n_asked - len(ab))
    return {
        "pairs": len(rows),
        "votes": len(option_probability),
        "mean_option_probability": float(option_probability.mean()),
        "flip_rate": float(np.mean(ab * ba < 0)) if ordered else None,
        "position_bias": float(np.mean(ab - ba) / 2) if ordered else None,
        "bounds": {"flip_rate": list(bounds)} if ordered else {},
        "mean_strength": float(np.mean(np.abs(ab + ba)) / 2),
    }
