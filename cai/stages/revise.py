"""Critique and revision (Bai et al. 2022, arXiv 2212.08073, section 3): a model says what is wrong with a response by
one principle and rewrites it, several rounds in a row, each from where the last one stopped.

One principle a round is drawn by the item's own seed, none twice while there are enough. Weights play no part, not even
0: they say what a vote counts in `prefer`, and changing them must never ask a model again.

Critics and revisers fail in ways that look like text. They refuse ("I can't critique this"), they hand back what they
were given, and they talk about the revision before writing it. Each is recorded as a round's outcome and counted, and
none is passed on as a revision: a row's `response` is its last usable revision, or equals `original` where there is
none.

What cannot be told from text: "I'm sorry, I can't help with that" is a good revision of a harmful answer and also what
a model says that refuses to rewrite at all. It counts as a revision, and the number of revisions that decline is
reported; only a refusal that names the task ("I can't rewrite this response") is one. `only` chooses whose answers are
rewritten.

Left out: few-shot examples of critiques (they belong into a template set), and choosing the best of several revisions.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from cai.constitution import Constitution, Principle
from cai.contracts.context import Context
from cai.contracts.engine import Completion, Engine, Request, Sampling
from cai.contracts.stage_config import Names, OutputKind, WritingConfig
from cai.engines.retry import generate_all
from cai.feedback.revisions import declares_no_change, refuses_to_criticise, refuses_to_revise, same_text, unwrapped
from cai.maths.behaviours import refusal
from cai.storage.journal import RECORDS
from cai.storage.rows import TOPIC, Failure, Message, Revision, Round, Sample, read_rows, stable_id, stable_seed
from cai.templates import TemplateSet
from cai.text.errors import BadInput, StageFailed, nearest


class Config(WritingConfig):
    gives: ClassVar[OutputKind] = "texts"
    takes: ClassVar[tuple[OutputKind, ...]] = ("texts",)
    revision: ClassVar[int] = 2
    template_names: ClassVar[tuple[str, ...]] = ("critique", "revise")
    principle_fields: ClassVar[tuple[str, ...]] = ("critique", "revise")

    kind: Literal["revise"] = "revise"
    from_: Names = Field(alias="from", min_length=1, description="Stages whose responses are revised.")
    only: Names = Field([], description="Tags of the prompts whose responses are revised. Empty = all.")
    principles: Names = Field([], description="Ids or tags of the principles to draw from. Empty = all that apply.")
    rounds: int = Field(1, ge=1, description="Critiques and revisions in a row.")
    model: str | None = Field(None, description="Model or stage that criticises and rewrites; absent = the recipe's.")


@dataclass
class Item:
    """One response on its way through the rounds."""

    row: Sample
    principles: list[Principle]
    """One for each round."""
    seed: int
    response: str
    """Where the next round starts."""
    written: Completion | None = None
    """The completion that `response` was taken from, once there is one."""
    rounds: list[Round] = field(default_factory=list)
    failure: Failure | None = None

    @property
    def id(self) -> str:
        return self.row["id"]


class Critic(NamedTuple):
    """Who criticises and rewrites, and how."""

    engine: Engine
    templates: TemplateSet
    sampling: Sampling
    retries: int


def run(config: Config, context: Context) -> dict[str, Any]:
    """Writes one Revision for each response selected."""
    if context.constitution is None:
        raise BadInput("`revise` needs a constitution, and the recipe names none")
    responses: list[Sample] = context.rows(config.from_)
    wanted = select(responses, config.only)
    principles = among(context.constitution, config.principles)
    plan = [row for row in wanted if applicable(principles, row)]
    if not plan:
        raise StageFailed(f"no principle applies to any of {len(wanted)} responses")
    reviser = context.model(config.model).name
    with context.engine(config.model) as engine:
        for batch in context.journal.batches(plan, size=config.journal_batch, unit="responses"):
            items = [start(row, config.rounds, principles, context) for row in batch.items]
            retries = config.attempts(batch)
            critic = Critic(engine, context.templates(config.model), config.sampling, retries)
            for number in range(config.rounds):
                one_round(items, number, critic)
            rows = [to_row(item, context.stage_id, reviser) for item in items if item.failure is None]
            context.journal.append(batch, rows, [item.failure for item in items if item.failure is not None])
    _, failed = context.journal.finish()
    figures = {
        "failed": len(failed),
        "not_selected": len(responses) - len(wanted),
        "without_principle": len(wanted) - len(plan),
    }
    return {"revisions": {context.stage_id: figures | counted(read_rows(context.folder / RECORDS))}}


def select(responses: list[Sample], only: list[str]) -> list[Sample]:
    """The responses whose prompt carries one of the tags; all without tags. Raises BadInput for a tag that none has."""
    known = sorted({tag for row in responses for tag in row["tags"] if not tag.startswith(TOPIC)})
    for tag in only:
        if not any(tag in row["tags"] for row in responses):
            raise BadInput(
                f"`only` names {tag!r}, which no prompt of these responses has as a tag, expected one of "
                f"{', '.join(known)}{nearest(tag, known)}"
            )
    return [row for row in responses if not only or not set(only).isdisjoint(row["tags"])]


def among(constitution: Constitution, names: list[str]) -> list[Principle]:
    """The principles with one of these ids or tags; all without names. Raises BadInput for a name that is neither."""
    known = {name: None for each in constitution.principles for name in (each.id, *each.tags)}
    for name in names:
        if name not in known:
            raise BadInput(
                f"`principles` names {name!r}, which is no id or tag in {constitution.name!r}, expected one of "
                f"{', '.join(known)}{nearest(name, known)}"
            )
    return [each for each in constitution.principles if not names or not set(names).isdisjoint((each.id, *each.tags))]


def applicable(principles: list[Principle], row: Sample) -> list[Principle]:
    """The principles that are for the row's prompt."""
    return [principle for principle in principles if principle.applies(row["tags"])]


def start(row: Sample, rounds: int, principles: list[Principle], context: Context) -> Item:
    """A response before its first round, its principles drawn."""
    drawn = draw(applicable(principles, row), rounds, context.seed_for(row["id"], "principles"))
    return Item(row, drawn, context.seed_for(row["id"]), row["response"])


def draw(principles: list[Principle], rounds: int, seed: int) -> list[Principle]:
    """A principle for each round: all of them in one random order, then in another, until there are enough."""
    rng = random.Random(seed)
    drawn: list[Principle] = []
    while len(drawn) < rounds:
        drawn += rng.sample(principles, len(principles))
    return drawn[:rounds]


def one_round(items: list[Item], number: int, critic: Critic) -> None:
    """Asks for a critique of every item still going, then for a revision where the critic gave one."""
    going = {item.id: item for item in items if item.failure is None}
    criticise = {
        item.id: critic.templates.critique(item.row["prompt"], item.response, item.principles[number])
        for item in going.values()
    }
    critiques = ask(going, criticise, "critique", number, critic)
    for id, critique in critiques.items():
        if refuses_to_criticise(critique.text):
            going[id].rounds.append(
                Round(principle=going[id].principles[number].id, critique=critique.text, revision="", outcome="refused")
            )
    rewrite = {
        id: critic.templates.revise(
            going[id].row["prompt"], going[id].response, critique.text, going[id].principles[number]
        )
        for id, critique in critiques.items()
        if not refuses_to_criticise(critique.text)
    }
    for id, revision in ask(going, rewrite, "revise", number, critic).items():
        conclude(going[id], number, critiques[id].text, revision)


def ask(
    items: dict[str, Item], messages: dict[str, list[Message]], what: str, number: int, critic: Critic
) -> dict[str, Completion]:
    """The completions by item. An item whose request fails has failed for good, and says in which round."""
    requests = [
        Request(id, asked, stable_seed(items[id].seed, number, what), critic.sampling) for id, asked in messages.items()
    ]
    completions: dict[str, Completion] = {}
    for id, result in generate_all(critic.engine, requests, critic.retries).items():
        if isinstance(result, Failure):
            principle = items[id].principles[number].id
            reason = f"response {id}, round {number + 1}, {what} by {principle!r}: {result.reason}"
            items[id].failure = Failure(id, reason)
        else:
            completions[id] = result
    return completions


def conclude(item: Item, number: int, critique: str, completion: Completion) -> None:
    """Records what became of one round; a usable revision is where the next round starts."""
    revision, stripped = unwrapped(completion.text, item.response)
    outcome: Literal["revised", "unchanged", "refused", "preamble-stripped"]
    request = item.row["prompt"][-1]["content"]
    if not revision or refuses_to_revise(revision, request):
        outcome = "refused"
    elif same_text(revision, item.response) or declares_no_change(revision, request):
        outcome = "unchanged"
    else:
        outcome = "preamble-stripped" if stripped else "revised"
        item.response, item.written = revision, completion
    # Kept as the model wrote it where nothing of it is used, so that a person can see why.
    shown = revision if outcome in ("revised", "preamble-stripped") else completion.text
    principle = item.principles[number].id
    item.rounds.append(Round(principle=principle, critique=critique, revision=shown, outcome=outcome))


def to_row(item: Item, stage_id: str, reviser: str) -> Revision:
    row: Revision = {
        **item.row,
        "id": stable_id(stage_id, item.id),
        "response": item.response,
        "original": item.row["response"],
        "rounds": item.rounds,
        "seed": item.seed,
    }
    if item.written is None or item.response == row["original"]:
        return row
    row["model"] = reviser
    row["finish_reason"] = item.written.finish_reason
    row["n_tokens"] = item.written.n_tokens
    row.pop("reasoning", None)
    if item.written.reasoning is not None:
        row["reasoning"] = item.written.reasoning
    return row


def counted(rows: list[Revision]) -> dict[str, Any]:
    """Outcomes in all and by principle, and how many texts decline the user's request before and after."""
    outcomes: Counter[str] = Counter()
    by_principle: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for done in row["rounds"]:
            outcome: str = done["outcome"]
            if outcome == "refused":
                outcome = "refused_by_critic" if refuses_to_criticise(done["critique"]) else "refused_by_reviser"
            outcomes[outcome] += 1
            by_principle[done["principle"]][outcome] += 1
    usable = [row for row in rows if row["response"] != row["original"]]
    return {
        "responses": len(rows),
        "usable": len(usable),
        "outcomes": dict(sorted(outcomes.items())),
        "principles": {id: dict(sorted(counts.items())) for id, counts in sorted(by_principle.items())},
        "declining": {
            "originals": sum(refusal(row["original"]) for row in usable),
            "revisions": sum(refusal(row["response"]) for row in usable),
        },
    }
