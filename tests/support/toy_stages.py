"""Three small stages that need no model, so that what the pipeline does can be seen quickly and stopped anywhere.

`write` answers prompts, `weigh` labels texts by the principles' weights, `fit` leaves a model behind. Environment
variables disturb them:

    TOY_KILL=<stage>:<n>           the process ends by SIGKILL before that stage computes its n-th portion
    TOY_ERROR=<stage>[:<n>]        the stage fails at any portion, or at the n-th; with TOY_WAIT, once a process waits
    TOY_WAIT=<stage>               the stage waits at its portion 1 for a minute, or until it is ended
    TOY_LOG=<file>                 the file gets a line `<stage>:<n> <rank>` for every portion that is computed
"""

from __future__ import annotations

import json
import operator
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from cai.contracts.context import Context
from cai.contracts.references import (
    JudgeRef,
    OneOrMore,
    OutputKind,
    PromptSetRef,
    StageReference,
    StartRef,
    TextsRef,
    WriterRef,
)
from cai.contracts.stage_config import FeedbackConfig, PrincipleField, StageConfig
from cai.stages import STAGES
from cai.storage.journal import Result
from cai.storage.rows import Failure
from cai.text.errors import StageFailed
from cai.text.left_out import failure_reasons

if TYPE_CHECKING:
    import pytest


def add_stage(
    kind: str, config: type[StageConfig], run: Callable[[Any, Context], dict[str, Any]] | None = None,
    monkeypatch: pytest.MonkeyPatch | None = None,
) -> None:  # fmt: skip
    """Adds a kind of stage to the table of stages: for one test with its `monkeypatch`, else for good."""
    module = ModuleType(f"toy_{kind}")
    module.Config, module.run = config, run  # type: ignore[attr-defined]
    set_item: Any = monkeypatch.setitem if monkeypatch else operator.setitem
    set_item(sys.modules, module.__name__, module)
    set_item(STAGES, kind, module.__name__)


def install(monkeypatch: pytest.MonkeyPatch | None = None) -> None:
    """Adds `write`, `weigh` and `fit` as `add_stage` does."""
    add_stage("write", WriteConfig, run_write, monkeypatch)
    add_stage("weigh", WeighConfig, run_weigh, monkeypatch)
    add_stage("fit", FitConfig, run_fit, monkeypatch)


class WriteConfig(FeedbackConfig):
    gives: ClassVar[OutputKind] = "texts"
    kind: Literal["write"] = "write"
    prompts: OneOrMore[PromptSetRef]
    model: WriterRef | None = None
    n: int = Field(1, ge=1)
    fail: list[str] = Field(default_factory=list)

    def template_names(self) -> tuple[str, ...]:
        return ("critique",)

    def principle_fields(self) -> tuple[PrincipleField, ...]:
        return ("critique",)


class WeighConfig(FeedbackConfig):
    gives: ClassVar[OutputKind] = "preferences"
    kind: Literal["weigh"] = "weigh"
    from_: OneOrMore[TextsRef] = Field(alias="from")
    judge: JudgeRef | None = None

    def principle_fields(self) -> tuple[PrincipleField, ...]:
        return ("weight",)


class FitConfig(StageConfig):
    gives: ClassVar[OutputKind] = "policy"
    kind: Literal["fit"] = "fit"
    from_: OneOrMore[Annotated[str, StageReference(("texts", "preferences"))]] = Field(alias="from")
    model: StartRef | None = None
    size: int = 1


def _disturb(context: Context, n: int) -> None:
    """Does what the environment says about portion `n` of this stage."""
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
    prompts = context.prompts(config.prompts)
    items = [{"id": f"{prompt['id']}/{k}", "prompt": prompt} for prompt in prompts for k in range(config.n)]
    for portion in context.journal.portions(items, size=config.journal_batch, unit="texts"):
        _disturb(context, portion.number)
        results = []
        for item in portion.items:
            if item["prompt"]["messages"][0]["content"] in config.fail and portion.attempt == 0:
                results.append(Result(failures=[Failure(item["id"], "no ink", "transient")]))
                continue
            row = {
                "id": item["id"], "prompt_id": item["prompt"]["id"], "tags": item["prompt"]["tags"], "n_tokens": 3,
                "seed": context.seed_for(item["id"]), "model": context.model(config.model).name,
            }  # fmt: skip
            results.append(Result(row))
        context.journal.append(portion, results)
    finished = context.journal.finish()
    context.report_left_out(len(items), "texts", failure_reasons(finished.failures))
    return {"texts": {context.stage_id: finished.n_rows}}


def run_weigh(config: WeighConfig, context: Context) -> dict[str, Any]:
    assert context.constitution is not None
    weights = {principle.id: principle.weight for principle in context.constitution.principles}
    items = [{"id": row["id"], "row": row} for row in context.rows(config.from_)]
    for portion in context.journal.portions(items, size=config.journal_batch):
        _disturb(context, portion.number)
        results = [Result({**item["row"], "weights": weights, "judge": config.judge}) for item in portion.items]
        context.journal.append(portion, results)
    context.journal.finish()
    return {"labels": {"n": len(items)}}


def run_fit(config: FitConfig, context: Context) -> dict[str, Any]:
    rows = context.rows(config.from_)
    make_model(context.folder / "model", f"{config.size} {len(rows)} {context.model(config.model).name}")
    _disturb(context, 0)
    return {"fit": {"rows": len(rows)}}


def make_model(folder: Path, weights: str) -> Path:
    """A folder that counts as a model, with a file of no tensors that differs with `weights`: nothing here loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | dict.fromkeys(sizes, 2)))
    (folder / "tokenizer.json").write_text("{}")
    header = json.dumps({"__metadata__": {"weights": weights}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return folder


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

GOOD = """name: small
model: start
constitution: constitution.yaml
prompts:
  red_team: {source: first.jsonl}
  heldout: {source: held.jsonl, hold_out: true}
stages:
  - {id: responses, kind: sample, prompts: [red_team]}
  - {id: revisions, kind: revise, from: responses}
  - id: sl-cai
    kind: sft
    from: [revisions, responses]
    train: {learning_rate: 2.0e-4}
  - {id: candidates, kind: sample, model: sl-cai, prompts: [red_team], n: 2}
  - {id: votes, kind: judge, from: candidates}
  - {id: preferences, kind: prefer, from: votes}
  - {id: reward, kind: reward, model: sl-cai, from: preferences}
  - {id: policy, kind: dpo, model: sl-cai, from: preferences, train: {beta: 0.1}}
  - {id: comparison, kind: compare, models: {base: start, policy: policy}, prompts: heldout}
"""
"""A recipe of the package's own stages, to be checked and not run."""


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

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the tests in background
    install()
    main()
