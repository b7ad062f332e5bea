"""What a comparison of checkpoints says: figures, a page and a picture, from responses and votes of other stages.

No model is asked here. A verdict on two equal texts is a tie without a question; where a response or every vote on a
pair is missing, the verdict is missing too, and counted. What the rows say is computed in `cai.report.figures`, how it
looks in the rest of `cai.report`. A recipe has this stage where it says `kind: compare`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from cai.constitution import Principle, applicable_principles
from cai.contracts.context import Context
from cai.contracts.references import (
    CheckpointRef,
    JudgeRef,
    OneOrMore,
    OutputKind,
    PrincipleRef,
    PromptSetRef,
    TextsAndReasonsRef,
    VotesAndReasonsRef,
)  # fmt: skip
from cai.contracts.stage_config import PrincipleField, StageConfig
from cai.feedback.explain import Explanation, explain
from cai.feedback.labelled_votes import LabelledVotes, LabelRule
from cai.feedback.votes import ORDERS
from cai.report.figure_types import Comparison
from cai.report.figures import ComparisonRows, SampleKey, VerdictKey, VerdictRule, prompt_set_figures
from cai.report.page import choose_examples, render_page
from cai.report.pictures import draw_rates
from cai.report.summary import comparison_summary
from cai.storage.rows import Prompt, stable_id, vote_unit
from cai.text.errors import StageFailed
from cai.text.left_out import RETRY, LeftOut


class Config(StageConfig):
    gives: ClassVar[OutputKind] = "comparison"

    kind: Literal["comparison"] = "comparison"
    responses: dict[str, TextsAndReasonsRef] = Field(
        min_length=1, description="`sample` stage of each checkpoint by its name in the figures, the baseline first."
    )
    votes: OneOrMore[VotesAndReasonsRef] = Field([], description="`judge` stages with `pairs: against`.")
    models: dict[str, CheckpointRef] = Field(description="What answered, by checkpoint.")
    judge: JudgeRef | None = Field(None, description="What judged.")
    prompts: OneOrMore[PromptSetRef] = Field(min_length=1, description="Prompt sets; figures are given for each.")
    n: int = Field(1, ge=1, description="Responses of each checkpoint to each prompt.")
    pairs: Literal["all", "baseline"] = Field("all", description="Which pairs of checkpoints were judged.")
    judged: int | None = Field(None, ge=1, description="Prompts of each set that were judged; absent = all.")
    principles: list[PrincipleRef] | Literal["all"] = Field("all", description="Principles whose votes count.")
    tie_below: float = Field(0.1, ge=0, description="Log-odds (nats) under which a comparison is a tie.")
    examples: int = Field(12, ge=0, description="Prompts whose responses the page shows side by side.")
    sampling: dict[str, float] = Field({}, description="How responses were sampled, for the page.")

    def principle_fields(self) -> tuple[PrincipleField, ...]:
        return ("weight",)


def run(config: Config, context: Context) -> dict[str, Any]:
    """Writes comparison.json, page.html and figure.svg. Raises StageFailed where a checkpoint gave no response."""
    prompts = {prompt["id"]: prompt for prompt in context.prompts(config.prompts)}
    principles = _principles(config, context)
    sample_keys = [(name, prompt_id, k) for name in config.responses for prompt_id in prompts for k in range(config.n)]
    rows_by_id = {name: {row["id"]: row for row in context.rows(stage)} for name, stage in config.responses.items()}
    samples = {
        (name, prompt_id, number): row
        for name, prompt_id, number in sample_keys
        if (row := rows_by_id[name].get(stable_id(config.responses[name], prompt_id, number)))
    }
    votes = _votes(context, config, principles)
    verdict_keys = list(_verdict_keys(config, context, prompts, principles))
    verdicts = {key: row for key in verdict_keys if (row := _verdict(key, samples, votes, prompts[key[1]])) is not None}
    failures = [failure.at(name) for name, stage in config.responses.items() for failure in context.failures(stage)]
    failures += [failure for stage in config.votes for failure in context.failures(stage)]
    reasons = [failure.reason for failure in failures]
    if silent := [name for name in config.responses if not any(key[0] == name for key in samples)]:
        reason = reasons[0] if reasons else "there are no prompts"
        raise StageFailed(f"no response of {', '.join(silent)} came about: {reason}")
    failed_samples = [key for key in sample_keys if key not in samples]
    failed_votes = [key for key in verdict_keys if key not in verdicts]
    remedy = RETRY if any(failure.kind == "transient" for failure in failures) else ""
    missing = LeftOut(len(failed_votes), "without a vote, or without one of the responses", remedy)
    context.report_left_out(len(verdict_keys), "verdicts", [missing])
    rows = ComparisonRows(prompts, samples, verdicts, failed_samples, failed_votes)
    return _write_up(config, context, rows, principles, reasons)


def _principles(config: Config, context: Context) -> dict[str, Principle]:
    """The principles whose votes count, by id; a weight of 0 switches one off."""
    assert context.constitution is not None
    selected = context.constitution.select(config.principles)
    return {principle.id: principle for principle in selected if principle.weight > 0}


def _verdict_keys(
    config: Config, context: Context, prompts: Mapping[str, Prompt], principles: Mapping[str, Principle]
) -> Iterator[VerdictKey]:
    """Every two responses that were to be compared, those to one prompt together."""
    pairs = list(itertools.combinations(config.responses, 2))
    if config.pairs == "baseline":
        pairs = [pair for pair in pairs if pair[0] == next(iter(config.responses))]
    judged = context.chosen_prompts(config.prompts, config.judged)
    for prompt_id, prompt in prompts.items():
        if prompt_id in judged and applicable_principles(principles.values(), prompt["tags"]):
            yield from (((a, b), prompt_id, number) for b, a in pairs for number in range(config.n))


def _votes(
    context: Context, config: Config, principles: Mapping[str, Principle]
) -> dict[frozenset[str], dict[str, Any]]:
    """The votes of the principles that count, by the ids of the two responses; without those that none are left of."""
    votes: dict[frozenset[str], dict[str, Any]] = {}
    rows_by_stage = {stage: context.rows(stage) for stage in config.votes}
    config.check_vote_units(
        {
            stage: {vote_unit(row.get("method"), row.get("scale")) for row in rows}
            for stage, rows in rows_by_stage.items()
        }
    )
    for row in itertools.chain(*rows_by_stage.values()):
        counted = [vote for vote in row["votes"] if vote["principle"] in principles]
        if counted:
            votes[frozenset((row["a"]["id"], row["b"]["id"]))] = {**row, "votes": counted}
    return votes


def _verdict(
    key: VerdictKey,
    samples: Mapping[SampleKey, Mapping[str, Any]],
    votes: Mapping[frozenset[str], dict[str, Any]],
    prompt: Prompt,
) -> dict[str, Any] | None:
    """The votes on two responses, whose `model` is the checkpoint's name: none of equal texts; None where it failed."""
    (a_name, b_name), prompt_id, number = key
    a, b = (samples.get((name, prompt_id, number)) for name in (a_name, b_name))
    if a is None or b is None:
        return None
    fields = {
        "prompt_id": prompt_id,
        "prompt": prompt["messages"],
        "a": {"id": a["id"], "text": a["response"], "model": a_name},
        "b": {"id": b["id"], "text": b["response"], "model": b_name},
    }
    if a["response"] == b["response"]:
        return {"votes": [], "tags": prompt["tags"], **fields}
    row = votes.get(frozenset((a["id"], b["id"])))
    return None if row is None else {**row, **fields}


def _write_up(
    config: Config,
    context: Context,
    rows: ComparisonRows,
    principles: Mapping[str, Principle],
    reasons: Sequence[str],
) -> dict[str, Any]:
    """The figures of each prompt set to comparison.json, the page and the picture; those of the run are returned."""
    assert context.constitution is not None
    rule = VerdictRule(principles, config.tie_below)
    names = list(config.responses)
    models = {name: context.model(config.models[name]).name for name in names}
    rows_by_set = {name: rows.of_prompts(context.prompts([name])) for name in config.prompts}
    sets = {
        name: prompt_set_figures(set_rows, names, rule) | {"explained": _explained(name, set_rows, rule, models)}
        for name, set_rows in rows_by_set.items()
    }
    comparison: Comparison = {
        "stage": config.id,
        "models": models,
        "judge": context.model(config.judge).name,
        "constitution": context.constitution.name,
        "principles": {principle.id: principle.text for principle in principles.values()},
        "tie_below": config.tie_below,
        "n": config.n,
        "sampling": config.sampling,
        "seed": context.seed,
        "failed": {
            "sample": {"planned": len(rows.samples) + len(rows.failed_samples), "missing": len(rows.failed_samples)},
            "vote": {"planned": len(rows.votes) + len(rows.failed_votes), "missing": len(rows.failed_votes)},
        },
        "reasons": list(reasons),
        "sets": sets,
    }
    text = json.dumps(comparison, indent=2, ensure_ascii=False, allow_nan=False)
    (context.folder / "comparison.json").write_text(text + "\n", encoding="utf-8")
    shown = choose_examples(rows_by_set[config.prompts[0]], names, rule, config.examples, context.seed_for("examples"))
    (context.folder / "page.html").write_text(render_page(comparison, shown), encoding="utf-8")
    summary = comparison_summary(sets)
    draw_rates(summary, context.folder / "figure.svg")
    return summary


def _explained(name: str, rows: ComparisonRows, rule: VerdictRule, models: Mapping[str, str]) -> Explanation | None:
    """What each principle did to the verdicts on one prompt set, as `cai votes explain` says it of labels."""
    judged = [
        {**row, **{side: {**row[side], "model": models[row[side]["model"]]} for side in ("a", "b")}}
        for row in rows.votes.values()
        if row["votes"]
    ]
    if not judged:
        return None
    principles = list(rule.principles)
    by_order = {order: np.full((len(judged), len(principles)), np.nan) for order in ORDERS}
    for index, row in enumerate(judged):
        for vote in row["votes"]:
            by_order[vote["order"]][index, principles.index(vote["principle"])] = vote["log_odds"]
    label_rule = LabelRule(rule.weights, tie_below=rule.tie_below)
    votes = LabelledVotes(name, judged, principles, by_order["ab"], by_order["ba"], label_rule)
    return explain(votes, n_examples=1)
