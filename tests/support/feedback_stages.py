"""Runs a feedback stage as the pipeline would, on a real model or on an engine whose answers a test writes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from training_stages import Steps

from cai.constitution import Constitution, load_constitution
from cai.contracts.context import Context
from cai.contracts.engine import Choice, Completion, Question, Request
from cai.contracts.model import Model
from cai.contracts.profile import Profile
from cai.contracts.references import failures_read
from cai.engines import open_engine
from cai.stages import config_class, run_function
from cai.storage.journal import FAILURES, RECORDS, Journal
from cai.storage.rows import Failure, Message, Prompt, read_rows, row_lines, stable_id

CPU = Profile(device="cpu", dtype="float32", micro_batch=4)
PRINCIPLES = """
name: trial
principles:
  - {id: calm, text: The assistant stays calm., weight: 2.0}
  - {id: short, text: The assistant is brief., weight: 0.5}
  - {id: safe, text: The assistant helps with no crime., applies_to: [red_team]}
"""
EXAMPLES = """
name: trial
principles:
  - id: calm
    text: The assistant stays calm.
    examples:
      - {prompt: Wake up., better: GOOD gladly, worse: no}
      - {prompt: Look here., better: GOOD of course, worse: no}
  - id: short
    text: The assistant is brief.
    examples: [{prompt: Say it., better: GOOD it, worse: no}]
  - {id: bare, text: The assistant has no example here.}
"""


@dataclass
class Script:
    """Stands for a model at the engine's edge: a test says what it writes and what it prefers."""

    writes: Callable[[Request], str | Completion | Failure] = lambda request: "a text"
    prefers: Callable[[Question], tuple[float, float] | Failure] = lambda question: (0.0, 1.0)
    """(log-odds of the first option, probability of both together)."""
    rates: Callable[[Question], Sequence[float]] = lambda question: [1 / len(question.options)] * len(question.options)
    """The probability of each option, where there are more than two."""
    requests: list[Request] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion | Failure]:
        for request in requests:
            self.requests.append(request)
            written = self.writes(request)
            if not isinstance(written, str):
                yield written
            else:
                ids = list(range(len(written.split()) + 1))
                yield Completion(request.id, written, ids, [-1.0] * len(ids), "stop", [0])

    def choose(self, questions: Sequence[Question]) -> Iterator[Choice | Failure]:
        for question in reversed(questions):  # an engine may answer in any order
            self.questions.append(question)
            if len(question.options) > 2:
                p = self.rates(question)
                yield Choice(question.id, tuple(math.log(probability) for probability in p), sum(p))
            elif isinstance(answer := self.prefers(question), Failure):
                yield answer
            else:
                odds, option_probability = answer
                first = 1 / (1 + math.exp(-odds))
                log_probs = (math.log(option_probability * first), math.log(option_probability * (1 - first)))
                yield Choice(question.id, log_probs, option_probability)


@dataclass(frozen=True)
class Stage(Context):
    """A context that opens the script where there is one, and the local engine elsewhere."""

    script: Script | None = None

    def engine(self, name: str | None) -> Any:
        return self.script or super().engine(name)


@dataclass(frozen=True)
class Outcome:
    """What a stage left behind."""

    rows: list[Any]
    failures: list[Any]
    figures: dict[str, Any]
    folder: Path
    left_out: list[str]
    """What the stage has told the user about its input."""

    @property
    def bytes(self) -> bytes:
        return (self.folder / RECORDS).read_bytes()


def constitution(folder: Path, text: str = PRINCIPLES) -> Constitution:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stable_id(text)}.yaml"
    path.write_text(text, encoding="utf-8")
    return load_constitution(path)


def prompt(text: str, *tags: str) -> Prompt:
    messages: list[Message] = [{"role": "user", "content": text}]
    return {"id": stable_id(text), "messages": messages, "tags": list(tags), "source": "test"}


def sample(text: str, response: str, *tags: str, number: int = 0) -> dict[str, Any]:
    prompt_row = prompt(text, *tags)
    return {
        "id": stable_id(text, response, number), "prompt_id": prompt_row["id"], "prompt": prompt_row["messages"],
        "tags": prompt_row["tags"], "response": response, "finish_reason": "stop", "n_tokens": 3, "model": "writer",
        "seed": number,
    }  # fmt: skip


def vote_row(
    number: int, odds: Mapping[str, tuple[float, float]], *tags: str, a: str = "left", b: str = "right"
) -> Any:
    """A vote row: log-odds that `a` is better by principle, (a shown first, b shown first)."""
    return {
        "id": f"pair-{number}", "prompt_id": f"prompt-{number}", "tags": list(tags),
        "prompt": [{"role": "user", "content": f"Question {number}?"}],
        "a": {"id": f"a{number}", "text": f"{a} {number}", "model": "m"},
        "b": {"id": f"b{number}", "text": f"{b} {number}", "model": "m"},
        "votes": [
            {"principle": id, "order": order, "log_odds": by_order[index], "option_probability": 1.0}
            for index, order in enumerate(("ab", "ba")) for id, by_order in odds.items()
        ],
        "judge": "judge", "constitution": "trial",
    }  # fmt: skip


def human_pairs(folder: Path, pairs: Iterable[tuple[Sequence[str], Sequence[str]]], *tags: str) -> dict[str, Any]:
    """A file of (chosen, rejected), each the turns of a conversation, as a recipe names it."""
    folder.mkdir(exist_ok=True)
    with (folder / "people.jsonl").open("w", encoding="utf-8") as file:
        for pair in pairs:
            chosen, rejected = (
                "".join(f"\n\n{'Assistant' if n % 2 else 'Human'}: {turn}" for n, turn in enumerate(turns))
                for turns in pair
            )
            file.write(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")
    return {"source": "people.jsonl", "tags": list(tags)}


def swapped(row: dict[str, Any]) -> dict[str, Any]:
    """The same judgement with the responses called the other way round."""
    votes = [{**vote, "order": vote["order"][::-1], "log_odds": -vote["log_odds"]} for vote in row["votes"]]
    return {**row, "a": row["b"], "b": row["a"], "votes": votes}


def run_stage(
    kind: str,
    folder: Path,
    rows: Mapping[str, Sequence[Any]] | None = None,
    *,
    script: Script | None = None,
    model: Model | None = None,
    document: str | None = PRINCIPLES,
    sets: Mapping[str, list[Prompt]] | None = None,
    stage_id: str | None = None,
    named: Mapping[str, Model] | None = None,
    seed: int = 0,
    rank: int = 0,
    ranks: int = 1,
    progress: Steps | None = None,
    **config: Any,
) -> Outcome:
    """Runs a stage on the `rows` of the stages that it reads, by the constitution `document`.

    Its id is the kind where the test does not say. `named` are models by the names that the config gives them; `rank`
    of `ranks` works on its share alone.
    """
    folder = folder / (stage_id or kind)
    inputs = {}
    for name, input_rows in (rows or {}).items():
        inputs[name] = folder.parent / f"{folder.name}-reads-{name}"
        inputs[name].mkdir(parents=True, exist_ok=True)
        (inputs[name] / RECORDS).write_text("".join(row_lines(input_rows)), encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    config = {"id": stage_id or kind, **({"from": list(inputs)} if inputs else {}), **config}
    stage_config = config_class(kind).model_validate(config)
    context = Stage(
        stage_id=stage_id or kind, folder=folder, seed=seed, profile=CPU, progress=progress or Steps(),
        journal=Journal(folder, progress, rank, ranks),
        constitution=constitution(folder, document) if document else None, inputs=inputs, prompt_sets=sets or {},
        models={"": model or Model("scripted", "nowhere"), **(named or {})},
        script=script, home=folder.parent, open_engine=open_engine,
        failures_read=failures_read(stage_config),
    )  # fmt: skip
    figures = run_function(kind)(stage_config, context)
    failures = read_rows(folder / FAILURES) if (folder / FAILURES).exists() else []
    rows = read_rows(folder / RECORDS) if (folder / RECORDS).exists() else []
    return Outcome(rows, failures, figures, folder, context.left_out)
