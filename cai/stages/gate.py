"""Tests a judge on the constitution's own examples before anything is built on what it says.

Each example is put to the judge under its principle, in both orders. What is measured: how often it sees the better
response as the author does, how often its verdict turns with the order, how well calibrated it is, whether it prefers
the same response with a meaningless sentence after it, and whether it is even between a response and itself.

A recipe has this stage where it says `gate:`, as soon as its judge is there. Below the bars the run stops, with exit
code 1, or goes on with a warning.

Left out: preference for its own texts, which takes texts of several models (votes have those); judges that only one
`judge` stage names; reasons and ratings: the gate asks pairwise, whatever method the recipe's stages judge by.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from cai.constitution import Constitution
from cai.contracts.context import Context
from cai.contracts.engine import Choice, Engine
from cai.contracts.references import JudgeRef, OutputKind
from cai.contracts.stage_config import Bars, PrincipleField, StageConfig
from cai.feedback import principle_tests
from cai.feedback.votes import ORDERS, ResponsePair, judge_pairs, mean_log_odds
from cai.maths.statistics import rate
from cai.storage.files import write_json
from cai.templates import TemplateSet
from cai.text.errors import BadInput, GateFailed
from cai.text.left_out import failure_reasons
from cai.text.progress import Progress, part_counter

PADDING = "That is what there is to say about it here."
"""Says nothing: the same response with it is longer and no better."""
FIGURES = "gate.json"


class Config(StageConfig):
    gives: ClassVar[OutputKind] = "figures"

    kind: Literal["gate"] = "gate"
    judge: JudgeRef | None = Field(None, description="Model or stage that is tested; absent = the recipe's `judge`.")
    bars: Bars = Field(Bars.model_validate({}), description="What it must reach.")
    retries: int = Field(1, ge=0, description="Times a question without an answer is asked again.")

    def template_names(self) -> tuple[str, ...]:
        return ("compare",)

    def principle_fields(self) -> tuple[PrincipleField, ...]:
        return ("compare", "examples")


def run(config: Config, context: Context) -> dict[str, Any]:
    """Returns the figures. Raises GateFailed below the bars where these say so; the figures are on disk then too."""
    if context.constitution is None:
        raise BadInput("`gate` needs a constitution, and the recipe names none")
    templates = context.templates(config.judge)
    with context.engine(config.judge) as engine:
        outcomes = principle_tests.run_examples(
            context.constitution, engine, templates, config.retries, progress=context.progress
        )
        figures: dict[str, Any] = dict(principle_tests.example_figures(context.constitution, outcomes))
        figures["ece"] = principle_tests.example_calibration_error(outcomes)
        figures |= _against_itself(context.constitution, engine, templates, config.retries, context.progress)
    write_json(context.folder / FIGURES, figures)
    failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
    another_judge = "name another `judge:`"
    reasons = failure_reasons(failures, {"transient": another_judge, "other": another_judge})
    context.report_left_out(len(outcomes), "examples", reasons)
    short = list(_below(figures, config.bars))
    if short:
        sentence = f"the judge {context.model(config.judge).name!r} is below the gate: {'; '.join(short)}"
        if config.bars.below == "stop":
            raise GateFailed(
                f"{sentence}; {context.folder / FIGURES} names the examples. `gate: {{below: warn}}` goes on"
            )
        context.progress.note(sentence)
    elif figures["against_chance"] != "better than chance":
        low, high = figures["interval"]
        context.progress.note(
            f"the judge {context.model(config.judge).name!r} passes the gate, but is {figures['against_chance']} on "
            f"{figures['n']} examples: accuracy {figures['accuracy']:.2f} [{low:.2f}, {high:.2f}]"
        )
    return {"gate": {context.stage_id: figures}}


def _below(figures: dict[str, Any], bars: Bars) -> Iterator[str]:
    """What falls short, in words."""
    low, high = figures["interval"]
    if figures["accuracy"] < bars.min_accuracy:
        accuracy = f"accuracy {figures['accuracy']:.2f} [{low:.2f}, {high:.2f}] of at least {bars.min_accuracy:g}"
        standing = figures["against_chance"]
        yield accuracy if standing == "better than chance" else f"{accuracy}, {standing}"
    if (figures["flip_rate"] or 0) > bars.max_flip_rate:
        yield f"{figures['flip_rate']:.2f} of its verdicts turn with the order, at most {bars.max_flip_rate:g} may"
    if (figures["ece"] or 0) > bars.max_ece:
        yield f"calibration error {figures['ece']:.2f}, at most {bars.max_ece:g}"


def _against_itself(
    constitution: Constitution, engine: Engine, templates: TemplateSet, retries: int, progress: Progress
) -> dict[str, Any]:
    """How often it prefers a padded response to the same without, and how far from even it is between equal ones."""
    cases = []
    for principle, _, _, pair in principle_tests.examples_of(constitution):
        better, padded = pair.a, f"{pair.a} {PADDING}"
        cases.append((ResponsePair(f"{pair.id}/padded", pair.messages, padded, better), principle))
        cases.append((ResponsePair(f"{pair.id}/same", pair.messages, better, better), principle))
    count = part_counter(progress, len(cases), "padded and equal pairs")

    def report(_: Choice) -> None:
        count(1 / len(ORDERS))

    judged: dict[str, list[tuple[float, str]]] = {"padded": [], "same": []}
    for (pair, _), (votes, _) in zip(cases, judge_pairs(engine, templates, cases, retries, report), strict=True):
        if (log_odds := mean_log_odds(votes)) is not None:
            judged[pair.id.rpartition("/")[2]].append((log_odds, str(pair.messages)))
    sides = [0.5 * (np.sign(log_odds) + 1) for log_odds, _ in judged["padded"]]
    return {
        "prefers_padded": rate(sides, [conversation for _, conversation in judged["padded"]]).as_json(),
        "nats_from_even_between_equals": max((abs(log_odds) for log_odds, _ in judged["same"]), default=None),
    }
