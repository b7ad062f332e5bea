"""Measures a model of the small world on held-out prompts: as assistant, judge, critic, rater and reviser.

Tier 1 is split `test`: topics whose parts the corpus has, but not their combination. Tier 2 is `test_tier2`: verbs that
the corpus has in statements alone. Every rate has an interval clustered by topic, and a response that the oracle cannot
read counts against the model. Users can supply prompts and wordings of their own in files.

Left out: figures on splits `train` and `validation`, which `pretrain` reports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cai.contracts.engine import Engine
from cai.contracts.model import Model
from cai.contracts.profile import Profile, load_profile
from cai.engines import open_engine
from cai.micro_model.evaluate.answering import measure_answers, measure_posing, measure_recognition
from cai.micro_model.evaluate.evaluation_prompts import EvaluationPrompt, read_prompts, read_wording, select_prompts
from cai.micro_model.evaluate.judging import (
    collect_judgements,
    judge_figures,
    measure_judge,
    measure_judge_after_rationales,
    measure_judge_by_template_wording,
)
from cai.micro_model.evaluate.model_calls import Figures
from cai.micro_model.evaluate.reviewing import measure_critic, measure_rater, measure_reviser
from cai.models.reference import MICRO

TIERS = {"test": 1, "test_tier2": 2}


def evaluate(
    model: Path | None = None, *, per_class: int = 80, seed: int = 0, prompts: Path | None = None,
    constitution: Path | None = None, profile: Profile | None = None, log: Callable[[str], None] = print,
) -> Figures:  # fmt: skip
    """Every figure on up to `per_class` topics of each class: tier 1 at the top, tier 2 under `tier2`.

    `model` is a checkpoint's folder, by default the one in the package. With `prompts` (see `read_prompts`) the same
    figures on the user's prompts are under `prompts`, and with `constitution` the judge's figures in its wording under
    `principles`. A rate is {"value", "n", "topics", "interval"}. Raises BadInput for files that do not fit the world.
    """
    folder = (model or MICRO).resolve()
    own_wording = read_wording(constitution) if constitution else None
    own_prompts = read_prompts(prompts) if prompts else []
    figures: Figures = {"model": folder.name, "topics_a_class": per_class, "seed": seed}
    with open_engine(Model(folder.name, str(folder), "micro"), profile or load_profile()) as engine:
        for split, tier in TIERS.items():
            selected = select_prompts(split, per_class, seed)
            log(f"tier {tier}: {len(selected)} prompts")
            of_tier = measure(engine, selected, seed, log)
            figures |= of_tier if tier == 1 else {f"tier{tier}": of_tier}
        if own_prompts:
            log(f"{prompts}: {len(own_prompts)} prompts")
            figures["prompts"] = measure(engine, own_prompts, seed, log)
        if own_wording is not None:
            log(f"{constitution}: the judge in its words")
            selected = own_prompts or select_prompts("test", per_class, seed)
            principles = tuple(own_wording.own or ())
            judgements = collect_judgements(engine, selected, seed, own_wording, principles=principles)
            figures["principles"] = judge_figures(judgements)
    return figures


def measure(engine: Engine, prompts: Sequence[EvaluationPrompt], seed: int, log: Callable[[str], None]) -> Figures:
    """All figures on one set of prompts."""
    figures: Figures = {"prompts": len(prompts)}
    for name, measure_part in (
        ("answers", measure_answers),
        ("recognition", measure_recognition),
        ("judge", measure_judge),
        ("wordings", measure_judge_by_template_wording),
        ("critic", measure_critic),
        ("reviser", measure_reviser),
        ("rater", measure_rater),
        ("reasoning", measure_judge_after_rationales),
        ("user", measure_posing),
    ):
        log(f"  {name}")
        figures |= measure_part(engine, prompts, seed)
    return figures
