"""Samples responses: `n` for each prompt, from one model, as the first step of both halves of Constitutional AI
(Bai et al. 2022, arXiv 2212.08073).

Left out: best-of-n, system prompts that change from sample to sample, and reuse of a sample by another stage. Text that
was cut off at `max_new_tokens` is kept with `finish_reason: length`; the stage that trains on it decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, ClassVar, Literal, TypedDict

from pydantic import Field

from cai.contracts.context import Context
from cai.contracts.engine import Completion, Request
from cai.contracts.references import OneOrMore, OutputKind, PromptSetRef, WriterRef
from cai.contracts.stage_config import WritingConfig
from cai.engines.portion_size import Work, limit_portions, mean_tokens
from cai.engines.retry import generate_all
from cai.storage.journal import RECORDS, Result
from cai.storage.rows import Failure, Prompt, Sample, read_rows, stable_id, stable_seed
from cai.text.errors import StageFailed
from cai.text.left_out import failure_reasons


class Config(WritingConfig):
    gives: ClassVar[OutputKind] = "texts"
    revision: ClassVar[int] = 2
    item_choice: ClassVar[tuple[str, ...]] = (
        "prompts", "config.prompts", "config.n", "config.journal_batch", "config.retries",
    )  # fmt: skip

    kind: Literal["sample"] = "sample"
    model: WriterRef | None = Field(None, description="Model or stage that responds; absent = the recipe's model.")
    prompts: OneOrMore[PromptSetRef] = Field(min_length=1, description="Prompt sets that are responded to.")
    n: int = Field(1, ge=1, description="Responses for each prompt.")
    seeds: str | None = Field(
        None, description="Stages with the same word here sample under the same seeds; absent = seeds of its own."
    )

    def most_responses(self, inputs: Sequence[int]) -> int:
        return self.n


class Item(TypedDict):
    """One response to be sampled."""

    id: str
    prompt: Prompt
    number: int
    """Of the response among those to its prompt, from 0."""


def run(config: Config, context: Context) -> dict[str, Any]:
    """Writes one Sample for each response. A prompt that does not fit, or fails otherwise, is a named failure."""
    prompts = context.prompts(config.prompts)
    items: list[Item] = [
        {"id": stable_id(context.stage_id, prompt["id"], number), "prompt": prompt, "number": number}
        for prompt in prompts
        for number in range(config.n)
    ]
    model_name = context.model(config.model).name
    known = take_over(items, config, context)
    n_read = mean_tokens([(prompt["messages"], ()) for prompt in prompts])
    work = Work(context.model(config.model), config.max_new_tokens, n_read)
    limit = limit_portions(config, context, len(items) - len(known), work)
    with context.engine(config.model) as engine:
        for portion in context.journal.portions(items, config.journal_batch, "responses", known, limit):
            requests = [
                Request(item["id"], item["prompt"]["messages"], item_seed(item, config, context), config.sampling)
                for item in portion.items
            ]
            completions = generate_all(
                engine,
                requests,
                config.attempts(portion),
                on_completion=lambda _: context.journal.report_answer(),
                on_tokens=lambda n_tokens: context.journal.report_tokens(n_tokens, config.max_new_tokens),
            )
            results = []
            for item, request in zip(portion.items, requests, strict=True):
                completion = completions[item["id"]]
                if isinstance(completion, Failure):
                    failure = completion.at(f"prompt {item['prompt']['id']}")
                    results.append(Result(failures=[failure]))
                else:
                    results.append(Result(to_row(item["prompt"], completion, request.seed, model_name)))
            context.journal.append(portion, results)
    _, all_failures = context.journal.finish()
    responses: list[Sample] = read_rows(context.folder / RECORDS)
    if not responses:
        raise StageFailed(f"none of {len(items)} responses came about; {all_failures[0].reason}")
    context.report_left_out(len(items), "responses", failure_reasons(all_failures))
    figures = {
        "prompts": len(prompts),
        "responses": len(responses),
        "failed": len(all_failures),
        "cut_off": sum(row["finish_reason"] == "length" for row in responses),
        "mean_tokens": fmean(row["n_tokens"] for row in responses),
    }
    return {"samples": {context.stage_id: figures}}


def take_over(items: list[Item], config: Config, context: Context) -> dict[str, Result]:
    """The responses that earlier folders of the stage hold, by the item's id: same prompt, same seed."""
    item_by_key = {(item["prompt"]["id"], item_seed(item, config, context)): item for item in items}
    known: dict[str, Result] = {}
    for row in (row for earlier in context.earlier for row in earlier.rows()):
        item = item_by_key.get((row["prompt_id"], row["seed"]))
        if item is not None and item["id"] not in known and row["prompt"] == item["prompt"]["messages"]:
            known[item["id"]] = Result({**row, "id": item["id"], "tags": item["prompt"]["tags"]})
    return known


def item_seed(item: Item, config: Config, context: Context) -> int:
    """The seed of a response: of this stage alone, or shared by all stages with the same `seeds`."""
    if config.seeds is None:
        return context.seed_for(item["id"])
    return stable_seed(context.seed, config.seeds, item["prompt"]["id"], item["number"])


def to_row(prompt: Prompt, completion: Completion, seed: int, model_name: str) -> Sample:
    """The response. `seed` is the item's; seeds of further attempts are derived from it."""
    row: Sample = {
        "id": completion.id,
        "prompt_id": prompt["id"],
        "prompt": prompt["messages"],
        "tags": prompt["tags"],
        "response": completion.text,
        "finish_reason": completion.finish_reason,
        "n_tokens": completion.n_tokens,
        "model": model_name,
        "seed": seed,
    }
    if completion.reasoning is not None:
        row["reasoning"] = completion.reasoning
    return row
