"""Runs one training stage on a test's rows as the pipeline would, and can kill it in the middle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cai.contracts.context import Context
from cai.contracts.model import Model
from cai.contracts.profile import Profile
from cai.contracts.references import failures_read
from cai.engines import open_engine
from cai.models.reference import resolve
from cai.models.reward_model import RewardModel
from cai.stages import config_class, run_function
from cai.storage.journal import Journal
from cai.storage.rows import row_lines, stable_id

CPU = Profile(device="cpu", dtype="float32", micro_batch=4)
BFLOAT16 = CPU.model_copy(update={"dtype": "bfloat16"})
TRAINING_KINDS = ["sft", "reward", "dpo", "ppo", "rloo"]
WORDS = ("alpha", "beta", "gamma", "delta", "lock", "sea", "poem", "Paris", "France", "door", "fish", "wave")

BREVITY = """
def brevity(prompts, responses):
    return [-len(response) / 20 for response in responses]
"""
"""A module of the user's own with a reward, `rewards.py:brevity`."""


class Killed(BaseException):
    """Stands for SIGKILL: of the stage's code, only `finally` blocks run after it."""


class Steps:
    """A progress display that counts steps, and raises Killed at step `die_at`."""

    def __init__(self, die_at: int | None = None) -> None:
        self.total, self.tokens, self.die_at = 0, 0, die_at
        self.n_finished = 0.0
        self.notes: list[str] = []
        self.parts: list[tuple[int, int, str]] = []
        """What was reported within items: (finished, total, unit)."""

    def start(self, total: int, unit: str, finished: int = 0) -> None:
        self.total, self.n_finished = total, finished

    def advance(self, items: float = 1, tokens: int = 0, begun: float = 0.0) -> None:
        self.n_finished += items
        self.tokens += tokens
        if self.n_finished == self.die_at:
            raise Killed

    def report_part(self, finished: int, total: int, unit: str) -> None:
        self.parts.append((finished, total, unit))

    def note(self, text: str) -> None:
        self.notes.append(text)


def stage_context(
    folder: Path, rows: Mapping[str, Sequence[Any]] | None, model: Model, *, profile: Profile = CPU,
    progress: Any = None,
) -> Context:  # fmt: skip
    """The context of the stage in `folder`. `rows` are those of each stage that it reads.

    None is the stage `rows`, whose rows `write_inputs` has written.
    """
    names = ["rows"] if rows is None else list(rows)
    if rows is not None:
        write_inputs(folder, rows)
    return Context(
        stage_id="stage", folder=folder, seed=0, profile=profile, progress=progress or Steps(), journal=Journal(folder),
        constitution=None, inputs={name: folder.parent / f"{folder.name}-{name}" for name in names},
        prompt_sets={}, models={"": model}, open_engine=open_engine,
    )  # fmt: skip


def write_inputs(folder: Path, rows: Mapping[str, Sequence[Any]]) -> None:
    """Writes the rows of each input stage where the stage in `folder` reads them."""
    for name, stage_rows in rows.items():
        path = folder.parent / f"{folder.name}-{name}"
        path.mkdir(parents=True, exist_ok=True)
        (path / "records.jsonl").write_text("".join(row_lines(stage_rows)), encoding="utf-8")
    folder.mkdir(exist_ok=True)


def run_stage(
    kind: str, folder: Path, rows: Sequence[Any] | Mapping[str, Sequence[Any]] | None, model: Model, *,
    profile: Profile = CPU, progress: Any = None, **config: Any,
) -> dict[str, Any]:  # fmt: skip
    """The figures of a training stage that runs in `folder`. `rows` are those of one stage, or as for its context."""
    stages = rows if isinstance(rows, Mapping) or rows is None else {"rows": rows}
    context = stage_context(folder, stages, model, profile=profile, progress=progress)
    settings = {"id": "stage", "kind": kind, "from": list(context.inputs), "batch_size": 8, **config}
    stage_config = config_class(kind).model_validate(settings)
    return run_function(kind)(stage_config, replace(context, failures_read=failures_read(stage_config)))


def reinforce(
    kind: str, folder: Path, prompts: Sequence[Any], model: Model, rewards: Sequence[Any], *, profile: Profile = CPU,
    progress: Any = None, named: Mapping[str, Model] | None = None, **config: Any,
) -> dict[str, Any]:  # fmt: skip
    """The figures of a stage that trains on its own responses to `prompts`; functions lie in `folder`'s parent.

    `named` are the models that rewards name.
    """
    context = stage_context(folder, {}, model, profile=profile, progress=progress)
    context = replace(
        context, prompt_sets={"prompts": list(prompts)}, home=folder.parent, models={**context.models, **(named or {})}
    )
    settings = {"id": "stage", "kind": kind, "prompts": "prompts", "rewards": list(rewards), "batch_size": 8,
                "max_new_tokens": 8, **config}  # fmt: skip
    stage_config = config_class(kind).model_validate(settings)
    return run_function(kind)(stage_config, replace(context, failures_read=failures_read(stage_config)))


def train_briefly(kind: str, folder: Path, model: Model, **settings: Any) -> list[float]:
    """Runs a training stage of any kind for a few steps, computed in bfloat16; the logged losses."""
    settings = {"train": {"learning_rate": 1e-3}, "profile": BFLOAT16, **settings}
    if kind in {"ppo", "rloo"}:
        settings |= {"rollouts": 2, "rollout_size": 8} if kind == "ppo" else {}
        (folder.parent / "rewards.py").write_text(BREVITY)
        reinforce(kind, folder, numbered_prompts(8), model, [{"function": "rewards.py:brevity"}], **settings)
    else:
        row = sample if kind == "sft" else preference
        run_stage(kind, folder, [row(number) for number in range(20)], model, **settings)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in metrics if "loss" in entry]


def prompt_row(number: int, *tags: str) -> dict[str, Any]:
    """A Prompt row."""
    messages = ask(_question(number))
    return {"id": stable_id("prompt", messages), "messages": messages, "tags": list(tags), "source": "test"}


def numbered_prompts(n: int, **fields: Any) -> list[Any]:
    """Prompt rows with the ids p0, p1 and so on."""
    return [{"id": f"p{k}", "messages": ask(f"What is {k}?"), "tags": [], "source": "test", **fields} for k in range(n)]


def trained(folder: Path) -> Model:
    """The model that a stage left in `folder`."""
    return resolve(str(folder / "model"), folder=folder)


def outputs(folder: Path) -> dict[str, bytes]:
    """The files of a training stage whose bytes are the same in every run."""
    names = ("model/model.safetensors", "model/adapter_model.safetensors", "metrics.jsonl", "evaluation.jsonl",
             "samples.jsonl")  # fmt: skip
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def record_batches(monkeypatch: Any, trainer_class: Any) -> list[tuple[Any, dict[str, Any]]]:
    """A list that fills with (trainer, a copy of the batch) at each call of the trainer's `compute_loss`.

    `batch["training"]` says whether the model learns from the batch or is evaluated on it.
    """
    batches: list[tuple[Any, dict[str, Any]]] = []
    compute_loss = trainer_class.compute_loss

    def spy(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        tensors = {name: value.clone() for name, value in inputs.items() if hasattr(value, "clone")}
        batches.append((self, {"training": model.training, **tensors}))
        return compute_loss(self, model, inputs, *args, **options)

    monkeypatch.setattr(trainer_class, "compute_loss", spy)
    return batches


def record_trainers(monkeypatch: Any) -> list[Any]:
    """A list that fills with the trainer of each stage."""
    from cai.training import loop

    trainers: list[Any] = []
    train_or_resume = loop.train_or_resume
    spy = lambda trainer, context: (trainers.append(trainer), train_or_resume(trainer, context))[1]  # noqa: E731
    monkeypatch.setattr(loop, "train_or_resume", spy)
    return trainers


def record_scored_ids(monkeypatch: Any) -> list[list[int]]:
    """A list that fills with the token ids that reward models score."""
    scored_ids: list[list[int]] = []
    scores = RewardModel.scores
    spy = lambda self, ids, *more: (scored_ids.extend(map(list, ids)), scores(self, ids, *more))[1]  # noqa: E731
    monkeypatch.setattr(RewardModel, "scores", spy)
    return scored_ids


def saved_classifier(model: Model, folder: Path, **options: int) -> Model:
    """The model with a new head, saved in `folder`."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from cai.models.loading import load_tokenizer

    torch.manual_seed(0)
    loaded = AutoModelForSequenceClassification.from_pretrained(model.path, **options)
    loaded.save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    return resolve(str(folder), folder=folder)


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def sample(number: int, response: str | None = None, **fields: Any) -> dict[str, Any]:
    """A Sample row. Rows of one number are about one prompt."""
    text = f"It is {WORDS[(number * 5 + 3) % len(WORDS)]}." if response is None else response
    return {
        "id": stable_id("sample", number, response), **_prompt_fields(number), "tags": [], "response": text,
        "finish_reason": "stop", "n_tokens": 5, "model": "tiny", "seed": number, **fields,
    }  # fmt: skip


def preference(
    number: int, chosen: str | None = None, rejected: str | None = None, p: float = 1.0, **fields: Any
) -> dict[str, Any]:
    """A Preference row; without texts, the better response is the one that says yes."""
    return {
        "id": stable_id("preference", number), "pair_id": stable_id("pair", number), **_prompt_fields(number),
        "chosen": [{"role": "assistant", "content": chosen or _reply("yes", number)}],
        "rejected": [{"role": "assistant", "content": rejected or _reply("no", number + 1)}],
        "p_chosen": p, "log_odds": 0.0, "source": "ai", "tags": [], "judge": "tiny", "constitution": "none", **fields,
    }  # fmt: skip


def rows_for(kind: str) -> list[dict[str, Any]]:
    """24 rows to learn from, three full steps; nine pairs are held out."""
    if kind == "sft":
        return [sample(number) for number in range(24)]
    held_out = [preference(number, p=0.8, tags=["held_out"]) for number in range(30, 39)]
    return [preference(number, p=0.6 + 0.4 * (number % 3) / 2) for number in range(24)] + held_out


def _prompt_fields(number: int) -> dict[str, Any]:
    return {"prompt_id": stable_id("prompt", number), "prompt": ask(_question(number))}


def _question(number: int) -> str:
    return f"What is {WORDS[number % len(WORDS)]} {number}?"


def _reply(word: str, number: int) -> str:
    first_words = [WORDS[(number * 7 + 5 * place) % len(WORDS)] for place in range(1 + number % 4)]
    return " ".join([*first_words, word, WORDS[number * 3 % len(WORDS)]])
