"""Critique and revision (Bai et al. 2022, arXiv 2212.08073, section 3): a model says what is wrong with a response by
one principle and rewrites it, for several rounds, each of which starts from the last usable revision.

The item's own seed samples one principle for each round, none twice while there are enough. Weights play no part, not
even 0: they say what a vote counts in `prefer`, and changing them must never ask a model again.

Critics and revisers fail in ways that look like text. They refuse ("I can't critique this"), they repeat the response,
and they talk about the revision before writing it. Each is recorded as a round's outcome and counted, and none is
passed on as a revision: a row's `response` is its last usable revision, or equals `original` where there is none.

"I'm sorry, I can't help with that" is a good revision of a harmful answer, and also what a model says that refuses to
rewrite at all. Text alone cannot tell these apart, so it counts as a revision, and the figures count the revisions that
decline. Only a refusal that names the task ("I can't rewrite this response") counts as one. `only` selects the prompts
whose responses are rewritten.

Left out: few-shot examples of critiques (they belong into a template set), and choosing the best of several revisions.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from cai.constitution import Principle, applicable_principles
from cai.contracts.context import Context
from cai.contracts.engine import Completion, Engine, Request, Sampling
from cai.contracts.references import OneOrMore, OutputKind, PrincipleReference, TagRef, TextsRef, WriterRef
from cai.contracts.stage_config import PrincipleField, WritingConfig
from cai.engines.portion_size import REQUEST_TOKENS, Work, limit_portions, mean_tokens
from cai.engines.retry import generate_all
from cai.feedback.revisions import declares_no_change, refuses_to_criticise, refuses_to_revise, same_text, unwrapped
from cai.maths.behaviours import refusal
from cai.storage.journal import RECORDS, Result
from cai.storage.rows import TOPIC, Failure, Message, Revision, Round, Sample, read_rows, stable_id, stable_seed
from cai.templates import TemplateSet
from cai.text.errors import BadInput, StageFailed, did_you_mean
from cai.text.left_out import LeftOut, failure_reasons


class Config(WritingConfig):
    gives: ClassVar[OutputKind] = "texts"
    revision: ClassVar[int] = 2
    item_choice: ClassVar[tuple[str, ...]] = (
        "input", "constitution", "principles", "principle", "config.from", "config.only", "config.principles",
        "config.journal_batch", "config.retries",
    )  # fmt: skip

    kind: Literal["revise"] = "revise"
    from_: OneOrMore[TextsRef] = Field(alias="from", min_length=1, description="Stages whose responses are revised.")
    only: OneOrMore[TagRef] = Field([], description="Tags of the prompts whose responses are revised. Empty = all.")
    # `lists_tags` keeps the fingerprints of earlier versions, which listed tags beside ids alone as well.
    principles: OneOrMore[Annotated[str, PrincipleReference(lists_tags=True)]] = Field(
        [], description="Ids or tags of the principles to draw from. Empty = all that apply."
    )
    rounds: int = Field(1, ge=1, description="Critiques and revisions in a row.")
    model: WriterRef | None = Field(
        None, description="Model or stage that criticises and rewrites; absent = the recipe's."
    )

    def most_responses(self, inputs: Sequence[int]) -> int:
        return sum(inputs)

    def template_names(self) -> tuple[str, ...]:
        return ("critique", "revise")

    def principle_fields(self) -> tuple[PrincipleField, ...]:
        return ("critique", "revise")


@dataclass
class Item:
    """One response on its way through the rounds."""

    row: Sample
    principles: list[Principle]
    """One for each round."""
    seed: int
    response: str
    """The response or revision that the next round starts from."""
    completion: Completion | None = None
    """The completion that `response` was taken from; None before the first usable revision."""
    rounds: list[Round] = field(default_factory=list)
    failure: Failure | None = None

    @property
    def id(self) -> str:
        return self.row["id"]

    @property
    def prompt(self) -> list[Message]:
        return self.row["prompt"]


class Reviser(NamedTuple):
    """The model that criticises and rewrites."""

    engine: Engine
    templates: TemplateSet
    sampling: Sampling
    retries: int
    on_completion: Callable[[Completion], None] | None = None
    """Called with each critique and revision as it comes in."""
    on_tokens: Callable[[int], None] | None = None


def run(config: Config, context: Context) -> dict[str, Any]:
    """Writes one Revision for each response selected."""
    if context.constitution is None:
        raise BadInput("`revise` needs a constitution, and the recipe names none")
    responses: list[Sample] = context.rows(config.from_)
    selected = select_responses(responses, config.only)
    principles = list(context.constitution.select(config.principles or "all"))
    to_revise = [row for row in selected if applicable_principles(principles, row["tags"])]
    if not to_revise:
        raise StageFailed(f"no principle applies to any of {len(selected)} responses")
    model_name = context.model(config.model).name
    known = take_over(to_revise, config, principles, context)
    n_shown = mean_tokens([(row["prompt"], (row["response"],)) for row in to_revise]) + REQUEST_TOKENS
    # A critique reads conversation and response, a revision the critique too.
    n_sampled, n_read = 2 * config.max_new_tokens, 2 * n_shown + config.max_new_tokens
    work = Work(context.model(config.model), config.rounds * n_sampled, config.rounds * n_read)
    limit = limit_portions(config, context, len(to_revise) - len(known), work)
    with context.engine(config.model) as engine:
        for portion in context.journal.portions(to_revise, config.journal_batch, "responses", known, limit):
            items = [start(row, config.rounds, principles, context) for row in portion.items]
            reviser = Reviser(
                engine,
                context.templates(config.model),
                config.sampling,
                config.attempts(portion),
                lambda _: context.journal.report_answer(1 / (2 * config.rounds)),
                lambda n_tokens: context.journal.report_tokens(n_tokens, config.rounds * n_sampled),
            )
            for round_index in range(config.rounds):
                revise_once(items, round_index, reviser)
            results = [
                Result(to_row(item, context.stage_id, model_name))
                if item.failure is None
                else Result(failures=[item.failure])
                for item in items
            ]
            context.journal.append(portion, results)
    _, failures = context.journal.finish()
    unprincipled = LeftOut(
        len(selected) - len(to_revise), "without a principle that applies", "let a principle apply to their tags"
    )
    reasons = [unprincipled, *failure_reasons(failures)]
    context.report_left_out(len(selected), "responses", reasons)
    figures = {
        "failed": len(failures),
        "not_selected": len(responses) - len(selected),
        "without_principle": len(selected) - len(to_revise),
        **outcome_figures(read_rows(context.folder / RECORDS)),
    }
    return {"revisions": {context.stage_id: figures}}


def take_over(
    to_revise: list[Sample], config: Config, principles: list[Principle], context: Context
) -> dict[str, Result]:
    """The revisions that earlier folders of the stage hold, by the response's id: of the same response to the same
    prompt, by the same principles in the same words."""
    row_by_id = {stable_id(context.stage_id, row["id"]): row for row in to_revise}
    known: dict[str, Result] = {}
    for earlier in context.earlier:
        for revision in earlier.rows():
            row = row_by_id.get(revision["id"])
            if row is None or row["id"] in known:
                continue
            sampled = start(row, config.rounds, principles, context).principles
            if (
                (revision["prompt"], revision["original"]) == (row["prompt"], row["response"])
                and [round_["principle"] for round_ in revision["rounds"]] == [principle.id for principle in sampled]
                and all(earlier.is_unchanged(principle, config.principle_fields()) for principle in sampled)
            ):
                known[row["id"]] = Result({**revision, "prompt_id": row["prompt_id"], "tags": row["tags"]})
    return known


def select_responses(responses: list[Sample], tags: list[str]) -> list[Sample]:
    """The responses to prompts with one of the tags; all if `tags` is empty. Raises BadInput for an unknown tag."""
    known_tags = sorted({tag for row in responses for tag in row["tags"] if not tag.startswith(TOPIC)})
    for tag in tags:
        if not any(tag in row["tags"] for row in responses):
            raise BadInput(
                f"`only` names {tag!r}, which no prompt of these responses has as a tag, expected one of "
                f"{', '.join(known_tags)}{did_you_mean(tag, known_tags)}"
            )
    return [row for row in responses if not tags or not set(tags).isdisjoint(row["tags"])]


def start(row: Sample, n_rounds: int, principles: list[Principle], context: Context) -> Item:
    """The item of a response before its first round, with its principles sampled."""
    applicable = applicable_principles(principles, row["tags"])
    sampled = sample_principles(applicable, n_rounds, context.seed_for(row["id"], "principles"))
    return Item(row, sampled, context.seed_for(row["id"]), row["response"])


def sample_principles(principles: list[Principle], n_rounds: int, seed: int) -> list[Principle]:
    """A principle for each round: all of them in one random order, then in another, until there are enough."""
    rng = random.Random(seed)
    sampled: list[Principle] = []
    while len(sampled) < n_rounds:
        sampled += rng.sample(principles, len(principles))
    return sampled[:n_rounds]


def revise_once(items: list[Item], round_index: int, reviser: Reviser) -> None:
    """Asks for a critique of every item that has not failed, then for a revision after each usable critique."""
    active = {item.id: item for item in items if item.failure is None}
    critique_messages = {
        id: reviser.templates.critique(item.prompt, item.response, item.principles[round_index])
        for id, item in active.items()
    }
    critiques = generate(active, critique_messages, "critique", round_index, reviser)
    revision_messages = {}
    for id, critique in critiques.items():
        item, principle = active[id], active[id].principles[round_index]
        if refuses_to_criticise(critique.text):
            item.rounds.append(Round(principle=principle.id, critique=critique.text, revision="", outcome="refused"))
        else:
            revision_messages[id] = reviser.templates.revise(item.prompt, item.response, critique.text, principle)
    revisions = generate(active, revision_messages, "revise", round_index, reviser)
    for id, revision in revisions.items():
        record_round(active[id], round_index, critiques[id].text, revision)


def generate(
    items: dict[str, Item],
    messages_by_id: dict[str, list[Message]],
    step: Literal["critique", "revise"],
    round_index: int,
    reviser: Reviser,
) -> dict[str, Completion]:
    """The completions by item id. An item whose request fails has failed for good, with the round in its reason."""
    requests = [
        Request(id, messages, stable_seed(items[id].seed, round_index, step), reviser.sampling)
        for id, messages in messages_by_id.items()
    ]
    completions: dict[str, Completion] = {}
    results = generate_all(
        reviser.engine, requests, reviser.retries, on_completion=reviser.on_completion, on_tokens=reviser.on_tokens
    )
    for id, completion in results.items():
        if isinstance(completion, Failure):
            principle = items[id].principles[round_index].id
            items[id].failure = completion.at(f"response {id}, round {round_index + 1}, {step} by {principle!r}")
        else:
            completions[id] = completion
    return completions


def record_round(item: Item, round_index: int, critique: str, completion: Completion) -> None:
    """Records a round and its outcome; a usable revision is where the next round starts."""
    revision, is_stripped = unwrapped(completion.text, item.response)
    outcome: Literal["revised", "unchanged", "refused", "preamble-stripped"]
    request = item.prompt[-1]["content"]
    if not revision or refuses_to_revise(revision, request):
        outcome = "refused"
    elif same_text(revision, item.response) or declares_no_change(revision, request):
        outcome = "unchanged"
    else:
        outcome = "preamble-stripped" if is_stripped else "revised"
        item.response, item.completion = revision, completion
    # Without a usable revision the completion is recorded unchanged, so that a person can see why.
    recorded = revision if outcome in ("revised", "preamble-stripped") else completion.text
    principle = item.principles[round_index].id
    item.rounds.append(Round(principle=principle, critique=critique, revision=recorded, outcome=outcome))


def to_row(item: Item, stage_id: str, model_name: str) -> Revision:
    """The response with its rounds. Fields about the text are those of the completion that the response is from."""
    row: Revision = {
        **item.row,
        "id": stable_id(stage_id, item.id),
        "response": item.response,
        "original": item.row["response"],
        "rounds": item.rounds,
        "seed": item.seed,
    }
    if item.completion is None or item.response == row["original"]:
        return row
    row["model"] = model_name
    row["finish_reason"] = item.completion.finish_reason
    row["n_tokens"] = item.completion.n_tokens
    row.pop("reasoning", None)
    if item.completion.reasoning is not None:
        row["reasoning"] = item.completion.reasoning
    return row


def outcome_figures(rows: list[Revision]) -> dict[str, Any]:
    """Outcomes of all rounds and by principle, and texts that decline the user's request before and after."""
    outcomes: Counter[str] = Counter()
    outcomes_by_principle: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for round_ in row["rounds"]:
            outcome: str = round_["outcome"]
            if outcome == "refused":
                outcome = "refused_by_critic" if refuses_to_criticise(round_["critique"]) else "refused_by_reviser"
            outcomes[outcome] += 1
            outcomes_by_principle[round_["principle"]][outcome] += 1
    usable = [row for row in rows if row["response"] != row["original"]]
    return {
        "responses": len(rows),
        "usable": len(usable),
        "outcomes": dict(sorted(outcomes.items())),
        "principles": {id: dict(sorted(counts.items())) for id, counts in sorted(outcomes_by_principle.items())},
        "declining": {
            "originals": sum(refusal(row["original"]) for row in usable),
            "revisions": sum(refusal(row["response"]) for row in usable),
        },
    }
