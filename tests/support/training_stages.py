"""Runs one training stage on rows that a test makes, as the pipeline would, and can die in the middle of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cai.contracts.context import Context
from cai.contracts.model import Model
from cai.contracts.profile import Profile
from cai.engines import open_engine
from cai.models.reference import resolve
from cai.stages import config_class, run_function
from cai.storage.journal import Journal
from cai.storage.rows import row_lines, stable_id

CPU = Profile(device="cpu", dtype="float32", micro_batch=4)
WORDS = ("alpha", "beta", "gamma", "delta", "lock", "sea", "poem", "Paris", "France", "door", "fish", "wave")


class Killed(BaseException):
    """Stands for SIGKILL: no code of the stage runs after it but what the interpreter insists on."""


class Steps:
    """A progress display that counts, and dies where it is told to."""

    def __init__(self, die_at: int | None = None) -> None:
        self.total, self.done, self.tokens, self.die_at = 0, 0, 0, die_at
        self.notes: list[str] = []

    def start(self, total: int, unit: str, done: int = 0) -> None:
        self.total, self.done = total, done

    def advance(self, items: int = 1, tokens: int = 0) -> None:
        self.done += items
        self.tokens += tokens
        if self.done == self.die_at:
            raise Killed

    def note(self, text: str) -> None:
        self.notes.append(text)


def stage_context(
    folder: Path, rows: Mapping[str, Sequence[Any]], model: Model, *, profile: Profile = CPU, progress: Any = None
) -> Context:
    """What the stage `folder.name` is given. `rows` are those of each stage that it reads."""
    write_inputs(folder, rows)
    return _context(folder, list(rows), model, profile, progress)


def write_inputs(folder: Path, rows: Mapping[str, Sequence[Any]]) -> None:
    """Puts the rows of each stage that the stage `folder.name` reads where it looks for them."""
    for name, each in rows.items():
        path = folder.parent / f"{folder.name}-{name}"
        path.mkdir(parents=True, exist_ok=True)
        (path / "records.jsonl").write_text("".join(row_lines(each)), encoding="utf-8")
    folder.mkdir(exist_ok=True)


def _context(folder: Path, stages: Sequence[str], model: Model, profile: Profile, progress: Any) -> Context:
    return Context(
        stage_id="stage", folder=folder, seed=0, profile=profile, progress=progress or Steps(), journal=Journal(folder),
        constitution=None, inputs={name: folder.parent / f"{folder.name}-{name}" for name in stages}, prompt_sets={},
        models={"": model}, open_engine=open_engine,
    )  # fmt: skip


def run_stage(
    kind: str, folder: Path, rows: Sequence[Any] | Mapping[str, Sequence[Any]], model: Model, *,
    profile: Profile = CPU, progress: Any = None, **config: Any,
) -> dict[str, Any]:  # fmt: skip
    """The figures of a training stage that runs in `folder`."""
    stages = rows if isinstance(rows, Mapping) else {"rows": rows}
    write_inputs(folder, stages)
    return run_on(kind, folder, list(stages), model, profile=profile, progress=progress, **config)


def run_on(
    kind: str, folder: Path, stages: Sequence[str], model: Model, *,
    profile: Profile = CPU, progress: Any = None, **config: Any,
) -> dict[str, Any]:  # fmt: skip
    """The same on rows that `write_inputs` has written."""
    settings = {"id": "stage", "kind": kind, "from": stages, "batch_size": 8, **config}
    context = _context(folder, stages, model, profile, progress)
    return run_function(kind)(config_class(kind).model_validate(settings), context)


def reinforce(
    kind: str, folder: Path, prompts: Sequence[Any], model: Model, rewards: Sequence[Any], *, profile: Profile = CPU,
    progress: Any = None, named: Mapping[str, Model] | None = None, **config: Any,
) -> dict[str, Any]:  # fmt: skip
    """The figures of a stage that trains on its own responses to `prompts`; functions lie in `folder`'s parent.

    `named` are the models that rewards name."""
    context = stage_context(folder, {}, model, profile=profile, progress=progress)
    context = replace(
        context, prompt_sets={"asked": list(prompts)}, home=folder.parent, models={**context.models, **(named or {})}
    )
    settings = {"id": "stage", "kind": kind, "prompts": "asked", "rewards": list(rewards), "batch_size": 8,
                "max_new_tokens": 8, **config}  # fmt: skip
    return run_function(kind)(config_class(kind).model_validate(settings), context)


def asked(number: int, *tags: str) -> dict[str, Any]:
    """A Prompt."""
    messages = ask(f"What is {WORDS[number % len(WORDS)]} {number}?")
    return {"id": stable_id("prompt", messages), "messages": messages, "tags": list(tags), "source": "test"}


def trained(folder: Path) -> Model:
    """The model that a stage left in `folder`."""
    return resolve(str(folder / "model"), folder=folder)


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def sample(number: int, response: str | None = None, **fields: Any) -> dict[str, Any]:
    """A Sample row. Rows of one number are about one prompt."""
    return {
        "id": stable_id("sample", number, response),
        "prompt_id": stable_id("prompt", number),
        "prompt": ask(f"What is {WORDS[number % len(WORDS)]} {number}?"),
        "tags": [],
        "response": f"It is {WORDS[(number * 5 + 3) % len(WORDS)]}." if response is None else response,
        "finish_reason": "stop",
        "n_tokens": 5,
        "model": "tiny",
        "seed": number,
        **fields,
    }


def preference(
    number: int, chosen: str | None = None, rejected: str | None = None, p: float = 1.0, **fields: Any
) -> dict[str, Any]:
    """A Preference row; without texts, the better response is the one that says yes."""
    return {
        "id": stable_id("preference", number),
        "pair_id": stable_id("pair", number),
        "prompt_id": stable_id("prompt", number),
        "prompt": ask(f"What is {WORDS[number % len(WORDS)]} {number}?"),
        "chosen": [{"role": "assistant", "content": chosen or _reply("yes", number)}],
        "rejected": [{"role": "assistant", "content": rejected or _reply("no", number + 1)}],
        "p_chosen": p,
        "log_odds": 0.0,
        "source": "ai",
        "tags": [],
        "judge": "tiny",
        "constitution": "none",
        **fields,
    }


def _reply(word: str, number: int) -> str:
    words = [WORDS[(number * 7 + 5 * place) % len(WORDS)] for place in range(1 + number % 4)]
    return " ".join([*words, word, WORDS[number * 3 % len(WORDS)]])
