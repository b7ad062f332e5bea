"""Samples responses: `n` for each prompt, from one model, as the first step of both halves of Constitutional AI
(Bai et al. 2022, arXiv 2212.08073).

Left out: best-of-n, system prompts that change from sample to sample, and reuse of a sample by another stage. Text that
the model cut off at `max_new_tokens` is kept with `finish_reason: length`; who trains on it decides.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any, ClassVar, Literal

from pydantic import Field

from cai.contracts.context import Context
from cai.contracts.engine import Completion, Request
from cai.contracts.stage_config import Names, OutputKind, WritingConfig
from cai.engines.retry import generate_all
from cai.storage.journal import RECORDS
from cai.storage.rows import Failure, Prompt, Sample, read_rows, stable_id
from cai.text.errors import StageFailed


class Config(WritingConfig):
    gives: ClassVar[OutputKind] = "texts"
    revision: ClassVar[int] = 2

    kind: Literal["sample"] = "sample"
    model: str | None = Field(None, description="Model or stage that responds; absent = the recipe's model.")
    prompts: Names = Field(min_length=1, description="Prompt sets that are responded to.")
    n: int = Field(1, ge=1, description="Responses for each prompt.")


def run(config: Config, context: Context) -> dict[str, Any]:
    """Writes one Sample for each response. A prompt that does not fit, or fails otherwise, is a failure by name."""
    prompts = context.prompts(config.prompts)
    items = [
        {"id": stable_id(context.stage_id, prompt["id"], number), "prompt": prompt}
        for prompt in prompts
        for number in range(config.n)
    ]
    model = context.model(config.model).name
    with context.engine(config.model) as engine:
        for batch in context.journal.batches(items, size=config.journal_batch, unit="responses"):
            requests = [
                Request(item["id"], item["prompt"]["messages"], context.seed_for(item["id"]), config.sampling)
                for item in batch.items
            ]
            results = generate_all(engine, requests, config.attempts(batch))
            rows, failures = [], []
            for item, request in zip(batch.items, requests, strict=True):
                result = results[item["id"]]
                if isinstance(result, Failure):
                    failures.append(Failure(item["id"], f"prompt {item['prompt']['id']}: {result.reason}"))
                else:
                    rows.append(to_row(item["prompt"], result, request.seed, model))
            context.journal.append(batch, rows, failures)
    _, failed = context.journal.finish()
    responses: list[Sample] = read_rows(context.folder / RECORDS)
    if not responses:
        raise StageFailed(f"none of {len(items)} responses came about; {failed[0].reason}")
    return {
        "samples": {
            context.stage_id: {
                "prompts": len(prompts),
                "responses": len(responses),
                "failed": len(failed),
                "cut_off": sum(row["finish_reason"] == "length" for row in responses),
                "mean_tokens": fmean(row["n_tokens"] for row in responses),
            }
        }
    }


def to_row(prompt: Prompt, completion: Completion, seed: int, model: str) -> Sample:
    """`seed` is the item's; a second attempt derives its own from it."""
    row: Sample = {
        "id": completion.id,
        "prompt_id": prompt["id"],
        "prompt": prompt["messages"],
        "tags": prompt["tags"],
        "response": completion.text,
        "finish_reason": completion.finish_reason,
        "n_tokens": completion.n_tokens,
        "model": model,
        "seed": seed,
    }
    if completion.reasoning is not None:
        row["reasoning"] = completion.reasoning
    return row
