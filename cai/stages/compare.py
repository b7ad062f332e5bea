"""Compares checkpoints: each answers the same held-out prompts, and a judge reads every two answers head to head.

All checkpoints answer a prompt with the same seed, so that equal models give equal texts. Every pair of responses is
judged by every applicable principle in both orders (Zheng et al. 2023, arXiv 2306.05685, on position bias). What the
rows then say is in `cai.report.figures`, how it looks in the rest of `cai.report`. The plan is one journal: all
responses, one checkpoint after the other, then all verdicts; models are opened one at a time, in that order.

Left out: several judges, human annotation, and a checkpoint as its own judge: `judge: self` means the recipe's model
here, for all checkpoints alike. A judge that is related to one checkpoint may favour it; name another where that
matters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain, combinations, groupby
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from cai import report
from cai.constitution import Principle
from cai.contracts.context import Context
from cai.contracts.engine import Completion, Engine, Request
from cai.contracts.stage_config import Names, OutputKind, WritingConfig
from cai.engines.retry import choose_all, generate_all
from cai.feedback.explain import Evidence, Rule, explain
from cai.feedback.votes import ORDERS, ResponsePair, to_questions, to_votes
from cai.report.figures import ComparisonRows, Scale, figures
from cai.storage.journal import RECORDS, Batch
from cai.storage.rows import Failure, PrincipleVote, Prompt, read_rows, stable_id
from cai.text.errors import StageFailed

Item = dict[str, Any]


class Config(WritingConfig):
    gives: ClassVar[OutputKind] = "comparison"
    revision: ClassVar[int] = 2
    template_names: ClassVar[tuple[str, ...]] = ("compare",)
    principle_fields: ClassVar[tuple[str, ...]] = ("compare",)
    uses_weights: ClassVar[bool] = True

    kind: Literal["compare"] = "compare"
    models: dict[str, str] = Field(
        min_length=1, description="Models or stages, by the name they get in the figures; `model` = the recipe's."
    )
    prompts: Names = Field(min_length=1, description="Prompt sets; figures are given for each, the first one first.")
    n: int = Field(1, ge=1, description="Responses of each checkpoint to each prompt.")
    baseline: str | None = Field(None, description="What the others are compared to; absent = the first model.")
    pairs: Literal["all", "baseline"] = Field("all", description="Head to head: all pairs, or each with the baseline.")
    judged: int | None = Field(None, ge=1, description="Prompts of each set judged head to head; absent = all.")
    judge: str | None = Field(None, description="Model or stage that judges; absent = the recipe's judge.")
    principles: list[str] | Literal["all"] = Field("all", description="Ids of the principles that are asked about.")
    tie_below: float = Field(0.1, ge=0, description="Log-odds (nats) under which a comparison is a tie.")
    min_option_probability: float = Field(
        0.1, ge=0, le=1, description="Probability the options must hold; less is a failure."
    )
    examples: int = Field(12, ge=0, description="Prompts whose responses the page shows side by side.")

    @field_validator("models")
    @classmethod
    def _plain_names(cls, models: dict[str, str]) -> dict[str, str]:
        for name in models:
            if not name or len(name) > 40 or not name.isprintable():
                raise ValueError(f"found the name {name[:40]!r}, expected 1 to 40 printable characters")
        return models

    @model_validator(mode="after")
    def _baseline_is_compared(self) -> Self:
        if self.baseline is not None and self.baseline not in self.models:
            known = ", ".join(self.models)
            raise ValueError(f"found the baseline {self.baseline!r}, expected one of {known}")
        return self

    @property
    def names(self) -> list[str]:
        """The checkpoints, the baseline first."""
        first = self.baseline or next(iter(self.models))
        return [first, *(name for name in self.models if name != first)]


def run(config: Config, context: Context) -> dict[str, Any]:
    """Writes typed rows, samples then votes; comparison.json, page.html and figure.svg with what they say."""
    prompts = {prompt["id"]: prompt for prompt in context.prompts(config.prompts)}
    principles = _principles(config, context)
    samples = _planned_samples(config, prompts)
    votes = list(_planned_votes(config, _judged(config, context, prompts), principles, samples))
    plan = [*samples.values(), *votes]
    work = _Work(config, context, principles)
    with _OneEngine(context) as engines:
        for batch in context.journal.batches(
            plan, size=config.journal_batch, unit="responses and verdicts", builds_on=len(samples)
        ):
            context.journal.append(batch, *work.compute(batch, engines))
    _, failures = context.journal.finish()
    records = read_rows(context.folder / RECORDS)
    missing = [name for name in config.names if not any(row.get("checkpoint") == name for row in records)]
    if missing:
        why = failures[0].reason if failures else "there are no prompts"
        raise StageFailed(f"no response of {', '.join(missing)} came about: {why}")
    return _write_up(config, context, records, principles, failures, samples, votes)


def _principles(config: Config, context: Context) -> list[Principle]:
    """What is asked about; a weight of 0 switches a principle off."""
    assert context.constitution is not None
    if config.principles == "all":
        chosen = list(context.constitution.principles)
    else:
        chosen = [context.constitution.principle(each) for each in dict.fromkeys(config.principles)]
    return [each for each in chosen if each.weight > 0]


def _planned_samples(config: Config, prompts: Mapping[str, Prompt]) -> dict[tuple[str, str, int], Item]:
    """Every response, by (checkpoint, prompt id, number): one checkpoint after the other."""
    return {
        (name, prompt_id, number): {
            "id": stable_id("sample", name, prompt_id, number), "model": config.models[name], "checkpoint": name,
            "prompt": prompt, "number": number,
        }
        for name in config.names for prompt_id, prompt in prompts.items() for number in range(config.n)
    }  # fmt: skip


def _judged(config: Config, context: Context, prompts: Mapping[str, Prompt]) -> dict[str, Prompt]:
    """The prompts that a judge sees: all, or as many of each set as the config says, drawn by seed."""
    chosen: set[str] = set()
    for name in config.prompts:
        ids = [prompt["id"] for prompt in context.prompts([name])]
        chosen.update(sorted(ids, key=lambda prompt_id: context.seed_for("judged", prompt_id))[: config.judged])
    return {prompt_id: prompt for prompt_id, prompt in prompts.items() if prompt_id in chosen}


def _planned_votes(
    config: Config,
    prompts: Mapping[str, Prompt],
    principles: Sequence[Principle],
    samples: Mapping[tuple[str, str, int], Item],
) -> Iterator[Item]:
    """Every two responses to be judged, one prompt's together. Prompts that no principle is for are left out."""
    pairs = list(combinations(config.names, 2))
    if config.pairs == "baseline":
        pairs = [pair for pair in pairs if pair[0] == config.names[0]]
    for prompt_id, prompt in prompts.items():
        if not any(principle.applies(prompt["tags"]) for principle in principles):
            continue
        for b, a in pairs:
            for number in range(config.n):
                sides = {side: samples[name, prompt_id, number]["id"] for side, name in (("a", a), ("b", b))}
                item_id = stable_id("vote", a, b, prompt_id, number)
                yield {"id": item_id, "model": config.judge, "prompt": prompt, "number": number} | sides


class _Work:
    """What a batch is computed with, and the samples that verdicts are about."""

    def __init__(self, config: Config, context: Context, principles: Sequence[Principle]) -> None:
        self.config = config
        self.context = context
        self.principles = principles
        self.templates = context.templates(config.judge)
        self.samples: dict[str, dict[str, Any]] = {}

    def compute(self, batch: Batch, engines: _OneEngine) -> tuple[list[dict[str, Any]], list[Failure]]:
        """One batch: it may hold the last responses of one checkpoint, the first of the next, and verdicts."""
        rows: list[dict[str, Any]] = []
        failures: list[Failure] = []
        attempts = self.config.attempts(batch)
        for (model, sampled), group in groupby(batch.items, key=lambda item: (item["model"], "checkpoint" in item)):
            work = self.sample if sampled else self.judge
            if not sampled and not self.samples:  # now that all of them are on the disk or in this batch
                there = chain(self.context.journal.rows(), rows)
                self.samples = {row["id"]: row for row in there if row["row"] == "sample"}
            new, failed = work(list(group), engines.open(model), attempts)
            rows += new
            failures += failed
        return rows, failures

    def sample(
        self, items: Sequence[Item], engine: Engine, attempts: int
    ) -> tuple[list[dict[str, Any]], list[Failure]]:
        """The responses. Their seeds do not depend on the checkpoint: two differ by their models, not by the draw."""
        requests = []
        for item in items:
            seed = self.context.seed_for(item["prompt"]["id"], item["number"])
            requests.append(Request(item["id"], item["prompt"]["messages"], seed, self.config.sampling))
        results = generate_all(engine, requests, attempts)
        rows, failures = [], []
        for item, request in zip(items, requests, strict=True):
            result = results[item["id"]]
            if isinstance(result, Failure):
                reason = f"{item['checkpoint']}, prompt {item['prompt']['id']}: {result.reason}"
                failures.append(Failure(item["id"], reason))
            else:
                rows.append(_sample_row(item, result, request.seed, self.context.model(item["model"]).name))
        return rows, failures

    def judge(self, items: Sequence[Item], engine: Engine, attempts: int) -> tuple[list[dict[str, Any]], list[Failure]]:
        """The verdicts. Nobody is asked about two equal texts; where a response is missing, so is the verdict."""
        pairs = {item["id"]: self._pair(item) for item in items}
        asked = {
            item["id"]: [each for each in self.principles if each.applies(item["prompt"]["tags"])] for item in items
        }
        different = [pair for pair in pairs.values() if pair is not None and pair.a != pair.b]
        questions = [each for pair in different for each in to_questions(pair, asked[pair.id], self.templates)]
        answers = choose_all(engine, questions, attempts)
        rows: list[dict[str, Any]] = []
        failures: list[Failure] = []
        for item in items:
            pair = pairs[item["id"]]
            if pair is None:
                failures.append(Failure(item["id"], f"prompt {item['prompt']['id']}: a response to compare is missing"))
            elif pair.a == pair.b:
                rows.append(self._vote_row(item, []))
            else:
                votes, failed = to_votes(pair, asked[pair.id], answers, self.config.min_option_probability)
                failures += failed
                rows += [self._vote_row(item, votes)] if votes else []
        return rows, failures

    def _pair(self, item: Item) -> ResponsePair | None:
        """The two responses, or None where one failed."""
        if item["a"] not in self.samples or item["b"] not in self.samples:
            return None
        a, b = (self.samples[item[side]]["response"] for side in "ab")
        return ResponsePair(item["id"], item["prompt"]["messages"], a, b)

    def _vote_row(self, item: Item, votes: list[PrincipleVote]) -> dict[str, Any]:
        """A Vote whose candidates' `model` is the checkpoint's name."""
        assert self.context.constitution is not None
        sides = {}
        for side in "ab":
            sample = self.samples[item[side]]
            sides[side] = {"id": item[side], "text": sample["response"], "model": sample["checkpoint"]}
        return {
            "row": "vote", "number": item["number"], "id": item["id"], "prompt_id": item["prompt"]["id"],
            "prompt": item["prompt"]["messages"], "tags": item["prompt"]["tags"], "votes": votes,
            "judge": self.context.model(self.config.judge).name, "constitution": self.context.constitution.name,
        } | sides  # fmt: skip


def _sample_row(item: Item, completion: Completion, seed: int, model: str) -> dict[str, Any]:
    """A Sample that also says whose it is."""
    row: dict[str, Any] = {
        "row": "sample", "checkpoint": item["checkpoint"], "number": item["number"], "id": item["id"],
        "prompt_id": item["prompt"]["id"], "prompt": item["prompt"]["messages"], "tags": item["prompt"]["tags"],
        "response": completion.text, "finish_reason": completion.finish_reason,
        "n_tokens": completion.n_tokens, "model": model, "seed": seed,
    }  # fmt: skip
    return row if completion.reasoning is None else row | {"reasoning": completion.reasoning}


def _write_up(
    config: Config,
    context: Context,
    records: Sequence[dict[str, Any]],
    principles: Sequence[Principle],
    failures: Sequence[Failure],
    samples: Mapping[tuple[str, str, int], Item],
    votes: Sequence[Item],
) -> dict[str, Any]:
    """The figures of each prompt set to comparison.json, the page and the picture; those of the run are returned."""
    scale = Scale({each.id: each for each in principles}, config.tie_below)
    models = {name: context.model(config.models[name]).name for name in config.names}
    there = {row["id"] for row in records}
    owner = {item["id"]: key[0] for key, item in samples.items()}
    lost_samples = [key for key, item in samples.items() if item["id"] not in there]
    lost_votes = [
        ((owner[item["a"]], owner[item["b"]]), item["prompt"]["id"], item["number"])
        for item in votes
        if item["id"] not in there
    ]
    rows = {name: _rows(records, lost_samples, lost_votes, context.prompts([name])) for name in config.prompts}
    sets = {
        name: figures(each, config.names, scale) | {"explained": explained(name, each, scale, models)}
        for name, each in rows.items()
    }
    assert context.constitution is not None
    comparison = {
        "stage": config.id,
        "models": models,
        "judge": context.model(config.judge).name,
        "constitution": context.constitution.name,
        "principles": {each.id: each.text for each in principles},
        "tie_below": config.tie_below,
        "n": config.n,
        "sampling": {key: getattr(config, key) for key in ("temperature", "top_p", "top_k", "max_new_tokens")},
        "seed": context.seed,
        "failed": {
            "sample": {"planned": len(samples), "missing": len(lost_samples)},
            "vote": {"planned": len(votes), "missing": len(lost_votes)},
        },
        "reasons": [each.reason for each in failures],
        "sets": sets,
    }
    text = json.dumps(comparison, indent=2, ensure_ascii=False, allow_nan=False)
    (context.folder / "comparison.json").write_text(text + "\n", encoding="utf-8")
    shown = report.examples(rows[config.prompts[0]], config.names, scale, config.examples, context.seed_for("examples"))
    (context.folder / "page.html").write_text(report.page(comparison, shown), encoding="utf-8")
    summary: dict[str, Any] = {}
    for index, (name, part) in enumerate(sets.items()):
        suffix = f"_{name}" if index else ""
        summary[f"checkpoints{suffix}"] = {
            each: rates | {"behaviours": part["behaviours"][each]} for each, rates in part["checkpoints"].items()
        }
        summary[f"head_to_head{suffix}"] = part["head_to_head"]
    report.draw(summary, context.folder / "figure.svg")
    return summary


def explained(name: str, rows: ComparisonRows, scale: Scale, models: Mapping[str, str]) -> dict[str, Any] | None:
    """What each principle did to the verdicts on one prompt set, as `cai votes explain` says it of labels."""
    judged = [
        {**row, **{side: {**row[side], "model": models[row[side]["model"]]} for side in ("a", "b")}}
        for row in rows.votes.values()
        if row["votes"]
    ]
    if not judged:
        return None
    principles = list(scale.principles)
    by_order = {order: np.full((len(judged), len(principles)), np.nan) for order in ORDERS}
    for number, row in enumerate(judged):
        for vote in row["votes"]:
            by_order[vote["order"]][number, principles.index(vote["principle"])] = vote["log_odds"]
    rule = Rule(scale.weights, temperature=None, abstain_below=0.0, min_confidence=0.5, tie_below=scale.tie_below)
    return explain(Evidence(name, judged, principles, by_order["ab"], by_order["ba"], rule), n_examples=1)


def _rows(
    records: Sequence[dict[str, Any]],
    lost_samples: Sequence[tuple[str, str, int]],
    lost_votes: Sequence[tuple[tuple[str, str], str, int]],
    prompts: Sequence[Prompt],
) -> ComparisonRows:
    """The rows about these prompts, by what they are about, and those that failed."""
    known = {prompt["id"]: prompt for prompt in prompts}
    about = [row for row in records if row["prompt_id"] in known]
    return ComparisonRows(
        known,
        {(row["checkpoint"], row["prompt_id"], row["number"]): row for row in about if row["row"] == "sample"},
        {
            ((row["a"]["model"], row["b"]["model"]), row["prompt_id"], row["number"]): row
            for row in about
            if row["row"] == "vote"
        },
        [key for key in lost_samples if key[1] in known],
        [key for key in lost_votes if key[1] in known],
    )


class _OneEngine:
    """The engine of one model at a time: asking for another one's closes it first."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._stack = ExitStack()
        self._model: str | None = None
        self._engine: Engine | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def open(self, model: str | None) -> Engine:
        """The engine of the model that the recipe calls so."""
        if self._engine is None or model != self._model:
            self._stack.close()
            self._engine = self._stack.enter_context(self._context.engine(model))
            self._model = model
        return self._engine
