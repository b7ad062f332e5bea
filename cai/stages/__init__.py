"""The stages of the method, one file each, in the order in which a recipe usually runs them.

A stage file has a config class, which says *what* the stage does and is part of its fingerprint, and a function
`run(config, context) -> dict`, which does it and returns its figures for the run's `summary.json`. No stage imports
another; they meet in the rows they write and read. Stage files import torch, transformers and trl inside their
functions, so that checking a recipe needs none of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from cai.engines import Sampling
from cai.records import HELD_OUT, Prompt, read_rows, stable_seed
from cai.rl.watch import Limits

if TYPE_CHECKING:
    from cai.checkpoint import Model
    from cai.constitution import Constitution
    from cai.engines import Engine
    from cai.journal import Batch, Journal
    from cai.profile import Profile
    from cai.templates import TemplateSet

STAGES = {
    "gate": "cai.stages.gate",
    "sample": "cai.stages.sample",
    "revise": "cai.stages.revise",
    "sft": "cai.stages.sft",
    "judge": "cai.stages.judge",
    "prefer": "cai.stages.prefer",
    "reward": "cai.stages.reward",
    "ppo": "cai.stages.ppo",
    "dpo": "cai.stages.dpo",
    "rloo": "cai.stages.rloo",
    "best-of-n": "cai.stages.best_of_n",
    "compare": "cai.stages.compare",
}
"""Kind of stage to the module that defines it."""

Rows = Literal["texts", "votes", "preferences", "policy", "reward", "comparison", "figures"]
"""What a stage leaves behind: rows of one type, a model that generates, one that scores, a comparison, or figures."""


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_as_list)]
"""One name or several."""


class StageConfig(BaseModel):
    """What every stage says about itself. A subclass adds its own keys, each default in this one place."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=())

    gives: ClassVar[Rows]
    takes: ClassVar[tuple[Rows, ...]] = ()
    """Row types that `from:` may name."""
    revision: ClassVar[int] = 1
    """Raised when the stage's code changes what it computes: earlier outputs are then not reused."""
    asks: ClassVar[tuple[str, ...]] = ()
    """Templates that reach a model here."""
    requests: ClassVar[tuple[str, ...]] = ()
    """What principles say that reaches a model: `critique`, `revise`, `compare`."""
    reads_files: ClassVar[tuple[str, ...]] = ()
    """Keys with a `source:` outside of the run, a path relative to the recipe: what lies there is part of the input."""
    uses_weights: ClassVar[bool] = False
    """Whether principles' weights matter here."""
    uses_examples: ClassVar[bool] = False
    """Whether principles' examples do."""
    names_models: ClassVar[tuple[str, ...]] = ("model", "models", "judge")
    """Keys whose values, or values' values, name models or stages that train one. The recipe's model and judge stand in
    where `model` or `judge` is absent, and `judge: self` is resolved, before a stage sees its config."""
    train_class: ClassVar[str | None] = None
    """`module:Class` of the library's config that `train:` is checked against and handed to."""

    id: str = Field(description="Name of the stage in the recipe.")
    kind: str = Field(description="Which stage this is.")


class FeedbackConfig(StageConfig):
    """A stage whose work is a list of items, journaled a batch at a time.

    Each of the profile's processes runs the stage: the journal gives it its share, and lets rank 0 alone past `finish`.
    """

    journal_batch: int = Field(256, ge=1, description="Items that are computed and written together.")
    retries: int = Field(1, ge=0, description="Times a failed item is asked again within the stage.")

    def attempts(self, batch: Batch) -> int:
        """Retries for a batch. A reopened one repeats the attempts made before, so that what had succeeded comes out
        as it was."""
        return (self.retries + 1) * (batch.attempt + 1) - 1


class WritingConfig(FeedbackConfig):
    """A stage in which a model writes texts."""

    max_new_tokens: int = Field(256, ge=1, description="Tokens at which a text is cut off.")
    temperature: float = Field(1.0, ge=0, description="0 always takes the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draws from the likeliest tokens that hold this much; 1 = all.")
    top_k: int = Field(0, ge=0, description="Draws from this many of the likeliest tokens; 0 = all.")
    stop: tuple[str, ...] = Field((), description="Strings that end a text, besides the model's own end of turn.")

    @property
    def sampling(self) -> Sampling:
        """The fields above as an engine takes them."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p, self.top_k, self.stop)


class Bars(BaseModel):
    """What a judge must reach, `gate: {min_accuracy: 0.8}`, and what becomes of the run below."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_accuracy: float = Field(0.75, ge=0, le=1, description="Share of examples judged as their author does.")
    max_flip_rate: float = Field(0.3, ge=0, le=1, description="Share of verdicts that turn with the order.")
    max_ece: float = Field(0.3, ge=0, le=0.5, description="Expected calibration error on the examples.")
    below: Literal["stop", "warn"] = Field("stop", description="stop the run, or warn and go on.")


class LoRA(BaseModel):
    """Trains a low-rank adapter instead of all weights (Hu et al. 2021, arXiv 2106.09685)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(16, ge=1, description="Rank of the update.")
    alpha: float = Field(32.0, gt=0, description="Scale: the update is multiplied by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: str | list[str] = Field("all-linear", description="Modules that get an adapter.")


class TrainingConfig(StageConfig):
    """A stage that trains a model with a trainer on transformers' own.

    `train` comes out complete: what the recipe says over the stage's own defaults, so that a stage's folder tells
    everything it was trained with and a changed default is another experiment.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}
    """Fields of `train_class` that differ from the library's defaults here."""
    owned: ClassVar[tuple[str, ...]] = ()
    """Fields of `train_class` that this stage sets itself: `cai.train_fields` refuses them under `train:`."""

    model: str | None = Field(None, description="Starting model or stage; absent = the recipe's model.")
    batch_size: int = Field(32, ge=1, description="Examples a step over all devices; the profile splits it.")
    lora: LoRA | None = Field(None, description="Adapter to train; absent = all weights.")
    max_length: int = Field(1024, ge=8, description="Tokens; a longer example is left out and counted, never cut.")
    train: dict[str, Any] = Field(
        default_factory=dict, validate_default=True, description="Fields of the trainer's own config class."
    )

    @field_validator("train")
    @classmethod
    def _complete(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        defaults = {**TRAIN_DEFAULTS, **cls.defaults}
        if info.data.get("lora") is not None:
            defaults["learning_rate"] *= LORA_LEARNING_RATE
        return {**defaults, **given}


class RowTrainingConfig(TrainingConfig):
    """A stage that learns from rows which other stages wrote."""

    from_: Names = Field(alias="from", min_length=1, description="Stages whose rows are learned from.")


TRAIN_DEFAULTS = {"logging_steps": 1, "save_strategy": "steps", "save_steps": 0.25, "save_total_limit": 2}
"""For every training stage: each step is logged, so that a resumed run logs what an undisturbed one does."""

LORA_LEARNING_RATE = 10.0
"""An adapter's best learning rate over that of full training (Schulman et al. 2025, LoRA Without Regret)."""


class Reward(BaseModel):
    """One source of reward: a reward model, a judge that rates, or a function of the user's own."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    names_models: ClassVar[tuple[str, ...]] = ("model", "judge")

    model: str | None = Field(None, description="A `reward` stage, or a sequence classifier with one score.")
    judge: str | None = Field(
        None,
        description="Who rates responses: `model` = the recipe's model, `self` = the recipe's judge, and where that is "
        "`self` too, the stage's starting model; or a model, or a stage.",
    )
    function: str | None = Field(
        None,
        description="`file.py:name`, the file relative to the recipe: called with prompts, each a list of messages, "
        "and responses, each a text; returns a number for each.",
    )
    weight: float = Field(1.0, allow_inf_nan=False, description="Factor in the sum of all sources.")
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="What it is logged as; absent = the model's name, `judge`, or the function's name.",
    )
    principles: Literal["all"] | Annotated[list[str], Field(min_length=1)] = Field(
        "all", description="Principles that a judge rates by: all, or some by id."
    )
    scale: Literal[7, 10] = Field(7, description="A judge's highest rating; the lowest is 1.")

    @property
    def called(self) -> str:
        """What it is logged as."""
        if self.name is not None:
            return self.name
        if self.model is not None:
            return Path(self.model).name
        return "judge" if self.function is None else self.function.rpartition(":")[2]

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in ("model", "judge", "function") if getattr(self, key) is not None]
        if len(given) != 1:
            found = " and ".join(f"`{key}`" for key in given) or "none"
            raise ValueError(f"found {found}, expected exactly one of `model`, `judge` and `function`")
        if self.judge is None and (stray := {"principles", "scale"} & self.model_fields_set):
            raise ValueError(f"found `{min(stray)}` with `{given[0]}`, expected it with `judge` alone")
        return self


class RewardedConfig(StageConfig):
    """A stage that scores responses by one or several sources of reward, and takes their weighted sum."""

    rewards: tuple[Reward, ...] = Field(min_length=1, description="Sources of reward; what counts is their sum.")

    @field_validator("rewards")
    @classmethod
    def _names_once(cls, rewards: tuple[Reward, ...]) -> tuple[Reward, ...]:
        names = [each.called for each in rewards]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"found two rewards called {twice[0]!r}, expected names that differ; say `name:`")
        return rewards

    @property
    def _rated(self) -> bool:
        return any(each.judge is not None for each in self.rewards)

    @property
    def asks(self) -> tuple[str, ...]:  # type: ignore[override]
        """Templates that a judge among the rewards is asked with."""
        return ("rate",) if self._rated else ()

    @property
    def requests(self) -> tuple[str, ...]:  # type: ignore[override]
        """What principles say to it."""
        return ("critique",) if self._rated else ()

    @property
    def uses_weights(self) -> bool:  # type: ignore[override]
        """Whether ratings are averaged over principles."""
        return self._rated


class ReinforcementConfig(RewardedConfig, TrainingConfig):
    """A stage that trains a policy on its own responses to prompts, by what they are worth.

    Prompts that are held out are never responded to. Tokens are drawn from the whole distribution at `temperature`:
    with top-p or top-k the log-probabilities learned from would be those of another distribution. Nothing drops out at
    random while the policy learns, a dropout under `lora:` neither: its log-probabilities are held against those at the
    draw.
    """

    gives: ClassVar[Rows] = "policy"

    prompts: Names = Field(min_length=1, description="Prompt sets that are responded to.")
    batch_size: int = Field(64, ge=1, description="Responses a step over all devices; the profile splits it.")
    max_new_tokens: int = Field(256, ge=1, description="Tokens at which a response is cut off.")
    temperature: float = Field(1.0, gt=0, description="At which responses are drawn and their probabilities taken.")
    limits: Limits = Field(Limits.model_validate({}), description="How far the policy may go before the stage stops.")


class Progress(Protocol):
    """What a stage tells while it works."""

    def start(self, total: int, unit: str, done: int = 0) -> None: ...

    def advance(self, items: int = 1, tokens: int = 0) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class Context:
    """What a stage is given to work with, all names of the recipe resolved."""

    stage_id: str
    folder: Path
    seed: int
    profile: Profile
    progress: Progress
    journal: Journal
    constitution: Constitution | None
    inputs: Mapping[str, Path]
    """Folder of each stage that this one reads."""
    prompt_sets: Mapping[str, list[Prompt]]
    models: Mapping[str, Model]
    """Every model this stage uses, by the name the config gives it; `""` is the recipe's own."""
    report_to: tuple[str, ...] = ()
    home: Path = Path()
    """The recipe's folder, from which relative paths start."""

    def rows(self, stages: str | Iterable[str]) -> list[Any]:
        """The records of one or several input stages, in the order named."""
        names = [stages] if isinstance(stages, str) else stages
        return [row for name in names for row in read_rows(self.inputs[name] / "records.jsonl")]

    def prompts(self, sets: Sequence[str]) -> list[Prompt]:
        """The prompts of the named sets, in order. One that is in several comes once, with the tags of all of them."""
        found: dict[str, Prompt] = {}
        for prompt in (prompt for name in sets for prompt in self.prompt_sets[name]):
            if earlier := found.get(prompt["id"]):
                prompt = {**earlier, "tags": list(dict.fromkeys([*earlier["tags"], *prompt["tags"]]))}
            found[prompt["id"]] = prompt
        return list(found.values())

    def model(self, name: str | None) -> Model:
        """The model of that name in the recipe; the recipe's own for None."""
        return self.models[name or ""]

    def templates(self, name: str | None) -> TemplateSet:
        """The template set that goes with a model."""
        from cai.templates import load_templates

        return load_templates(self.model(name).templates)

    def engine(self, name: str | None) -> AbstractContextManager[Engine]:
        """An engine for the model of that name; weights are loaded on first use."""
        from cai.engines import open_engine

        return open_engine(self.model(name), self.profile)

    def seed_for(self, *parts: object) -> int:
        """The seed of one item of this stage, independent of when and with what it is computed."""
        return stable_seed(self.seed, self.stage_id, *parts)


def is_held_out(row: Mapping[str, Any]) -> bool:
    """Whether the row's prompt is reserved for evaluation."""
    return HELD_OUT in row["tags"]


def config_class(kind: str) -> type[StageConfig]:
    """The config class of a kind of stage; raises KeyError for an unknown kind."""
    return importlib.import_module(STAGES[kind]).Config  # type: ignore[no-any-return]


def run_function(kind: str) -> Callable[[Any, Context], dict[str, Any]]:
    """The function that does the work of a kind of stage."""
    return importlib.import_module(STAGES[kind]).run  # type: ignore[no-any-return]
