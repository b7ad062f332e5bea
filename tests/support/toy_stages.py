"""Three small stages that need no model, so that what the pipeline does can be seen quickly and stopped anywhere.

`write` answers prompts, `weigh` labels texts by the principles' weights, `fit` leaves a model behind. In the
environment TOY_KILL=<stage>:<n> ends the process with SIGKILL when that stage is about to write its n-th batch,
TOY_ERROR=<stage>, or <stage>:<n>, lets it fail, and TOY_WAIT=<stage> makes it wait until somebody ends it: with both, a
process fails when another waits. TOY_LOG=<file> gets a line `<stage>:<n> <rank>` for every batch that is computed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cai.contracts.context import Context
from cai.contracts.stage_config import FeedbackConfig, Names, OutputKind, StageConfig
from cai.stages import STAGES
from cai.storage.rows import Failure
from cai.text.errors import StageFailed

if TYPE_CHECKING:
    import pytest

write = ModuleType("toy_write")
weigh = ModuleType("toy_weigh")
fit = ModuleType("toy_fit")
KINDS = {"write": "toy_write", "weigh": "toy_weigh", "fit": "toy_fit"}


def install(monkeypatch: pytest.MonkeyPatch | None = None) -> None:
    """Adds the kinds to the table of stages; for one test if `monkeypatch` is given, else for good."""
    sys.modules |= {"toy_write": write, "toy_weigh": weigh, "toy_fit": fit}
    for kind, module in KINDS.items():
        if monkeypatch:
            monkeypatch.setitem(STAGES, kind, module)
        else:
            STAGES[kind] = module


class WriteConfig(FeedbackConfig):
    gives: ClassVar[OutputKind] = "texts"
    template_names: ClassVar[tuple[str, ...]] = ("critique",)
    principle_fields: ClassVar[tuple[str, ...]] = ("critique",)
    kind: Literal["write"] = "write"
    prompts: Names
    model: str | None = None
    n: int = Field(1, ge=1)
    fail: list[str] = Field(default_factory=list)


class WeighConfig(FeedbackConfig):
    gives: ClassVar[OutputKind] = "preferences"
    takes: ClassVar[tuple[OutputKind, ...]] = ("texts",)
    uses_weights: ClassVar[bool] = True
    kind: Literal["weigh"] = "weigh"
    from_: Names = Field(alias="from")
    judge: str | None = None


class FitConfig(StageConfig):
    gives: ClassVar[OutputKind] = "policy"
    takes: ClassVar[tuple[OutputKind, ...]] = ("texts", "preferences")
    kind: Literal["fit"] = "fit"
    from_: Names = Field(alias="from")
    model: str | None = None
    size: int = 1


def _disturb(context: Context, n: int) -> None:
    if os.environ.get("TOY_KILL") == f"{context.stage_id}:{n}":
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("TOY_ERROR") in (context.stage_id, f"{context.stage_id}:{n}"):
        while "TOY_WAIT" in os.environ and not (context.folder / "waiting").exists():
            time.sleep(0.05)
        raise StageFailed("the pen broke")
    if os.environ.get("TOY_WAIT") == context.stage_id and n == 1:
        (context.folder / "waiting").write_text(str(os.getpid()))
        time.sleep(60)
    if log := os.environ.get("TOY_LOG"):
        with open(log, "a") as file:
            file.write(f"{context.stage_id}:{n} {os.environ.get('RANK', '0')}\n")


def run_write(config: WriteConfig, context: Context) -> dict[str, Any]:
    items = [
        {"id": f"{prompt['id']}/{k}", "prompt": prompt}
        for prompt in context.prompts(config.prompts)
        for k in range(config.n)
    ]
    for batch in context.journal.batches(items, size=config.journal_batch, unit="texts"):
        _disturb(context, batch.number)
        failures = [
            Failure(item["id"], "no ink")
            for item in batch.items
            if item["prompt"]["messages"][0]["content"] in config.fail and batch.attempt == 0
        ]
        failed = {failure.id for failure in failures}
        rows = [
            {
                "id": item["id"],
                "prompt_id": item["prompt"]["id"],
                "tags": item["prompt"]["tags"],
                "n_tokens": 3,
                "seed": context.seed_for(item["id"]),
                "model": context.model(config.model).name,
            }
            for item in batch.items
            if item["id"] not in failed
        ]
        context.journal.append(batch, rows, failures)
    rows_and_failures = context.journal.finish()
    return {"texts": {context.stage_id: rows_and_failures.n_rows}}


def run_weigh(config: WeighConfig, context: Context) -> dict[str, Any]:
    assert context.constitution is not None
    weights = {each.id: each.weight for each in context.constitution.principles}
    items = [{"id": row["id"], "row": row} for row in context.rows(config.from_)]
    for batch in context.journal.batches(items, size=config.journal_batch):
        _disturb(context, batch.number)
        rows = [{**item["row"], "weights": weights, "judge": config.judge} for item in batch.items]
        context.journal.append(batch, rows, [])
    context.journal.finish()
    return {"labels": {"n": len(items)}}


def run_fit(config: FitConfig, context: Context) -> dict[str, Any]:
    rows = context.rows(config.from_)
    make_model(context.folder / "model", f"{config.size} {len(rows)} {context.model(config.model).name}")
    _disturb(context, 0)
    return {"fit": {"rows": len(rows)}}


def make_model(folder: Path, weights: str) -> Path:
    """A folder that counts as a model: nothing here loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "model.safetensors").write_text(weights)
    return folder


write.Config, write.run = WriteConfig, run_write  # type: ignore[attr-defined]
weigh.Config, weigh.run = WeighConfig, run_weigh  # type: ignore[attr-defined]
fit.Config, fit.run = FitConfig, run_fit  # type: ignore[attr-defined]

CONSTITUTION = """
name: tiny
principles:
  - {id: kind, text: The assistant is kind., weight: 1.0}
  - {id: honest, text: The assistant is honest., weight: 2.0}
"""

RECIPE = """
name: toy
seed: 7
model: start
constitution: constitution.yaml
prompts:
  first: {source: first.jsonl}
  held: {source: held.jsonl, hold_out: true}
stages:
  - {id: texts, kind: write, prompts: [first], n: 3, journal_batch: 4}
  - {id: tuned, kind: fit, from: texts}
  - {id: more, kind: write, model: tuned, prompts: [first, held], journal_batch: 2}
  - {id: labels, kind: weigh, from: more, journal_batch: 3}
  - {id: policy, kind: fit, model: tuned, from: labels}
"""


def make_recipe(folder: Path, recipe: str = RECIPE) -> Path:
    """A folder with a recipe of toy stages and all that it names; the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / "start", "weights")
    (folder / "constitution.yaml").write_text(CONSTITUTION)
    for name, questions in (("first", ["why?", "how?", "when?", "who?"]), ("held", ["where?", "what?"])):
        lines = [json.dumps({"prompt": question}) + "\n" for question in questions]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    path = folder / "recipe.yaml"
    path.write_text(recipe)
    return path


if __name__ == "__main__":
    from cai.cli import main

    install()
    main()
