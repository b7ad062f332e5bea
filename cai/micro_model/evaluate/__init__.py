"""Measures a model of the small world: how it answers, judges, criticises, rates and revises what it never saw.

Tier 1, split `test`: topics whose parts the corpus knows and whose combination it does not have. Tier 2, `test_tier2`:
verbs that the corpus knows from statements alone. Every rate has an interval clustered by topic, and a response that
the oracle cannot read counts against the model. An outsider brings prompts and wordings in files.

Left out: figures on splits `train` and `validation`; what depends on them is chosen in `pretrain`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cai.contracts.engine import Engine
from cai.contracts.model import Model
from cai.contracts.profile import Profile, load_profile
from cai.engines import open_engine
from cai.micro_model.evaluate.answering import answers, recognition, user
from cai.micro_model.evaluate.asking import Figures
from cai.micro_model.evaluate.evaluation_prompts import Row, own_words, prompts_of, read_prompts
from cai.micro_model.evaluate.judging import by_template, judge, judged, judgements, reasoner
from cai.micro_model.evaluate.reviewing import critic, rater, reviser
from cai.models.reference import MICRO

TIERS = {"test": 1, "test_tier2": 2}


def evaluate(
    model: Path | None = None,
    *,
    per_class: int = 80,
    seed: int = 0,
    prompts: Path | None = None,
    constitution: Path | None = None,
    profile: Profile | None = None,
    log: Callable[[str], None] = print,
) -> Figures:
    """Every figure on up to `per_class` topics of each class: tier 1 at the top, tier 2 under `tier2`.

    `model` is a checkpoint's folder, by default the one in the package. With `prompts` (see `read_prompts`) the same
    figures on an outsider's prompts stand under `prompts`, and with `constitution` the judge's in its words under
    `principles`. A rate is {"value", "n", "topics", "interval"}. Raises BadInput for files that do not fit the world.
    """
    folder = (model or MICRO).resolve()
    own = own_words(constitution) if constitution else None
    outside = read_prompts(prompts) if prompts else []
    figures: Figures = {"model": folder.name, "topics_a_class": per_class, "seed": seed}
    with open_engine(Model(folder.name, str(folder), "micro"), profile or load_profile()) as engine:
        for split, tier in TIERS.items():
            rows = prompts_of(split, per_class, seed)
            log(f"tier {tier}: {len(rows)} prompts")
            found = measure(engine, rows, seed, log)
            figures |= found if tier == 1 else {f"tier{tier}": found}
        if outside:
            log(f"{prompts}: {len(outside)} prompts")
            figures["prompts"] = measure(engine, outside, seed, log)
        if own is not None:
            log(f"{constitution}: the judge in its words")
            rows = outside or prompts_of("test", per_class, seed)
            figures["principles"] = judged(judgements(engine, rows, seed, own, only=tuple(own.own or ())))
    return figures


def measure(engine: Engine, rows: Sequence[Row], seed: int, log: Callable[[str], None]) -> Figures:
    """Everything about one set of prompts."""
    figures: Figures = {"prompts": len(rows)}
    for name, part in (
        ("answers", answers), ("recognition", recognition), ("judge", judge), ("wordings", by_template),
        ("critic", critic), ("reviser", reviser), ("rater", rater), ("reasoning", reasoner), ("user", user),
    ):  # fmt: skip
        log(f"  {name}")
        figures |= part(engine, rows, seed)
    return figures
