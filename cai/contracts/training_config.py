"""Configs of the stages that train a model, and of those that score responses by rewards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from cai.contracts.references import (
    FunctionRef,
    OneOrMore,
    OutputKind,
    PrincipleRef,
    PromptSetRef,
    RaterRef,
    RewardModelRef,
    StartRef,
)
from cai.contracts.stage_config import PrincipleField, StageConfig


class Limits(BaseModel):
    """How far a policy may go from where it started, and how many rewards may fail, before the stage stops."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kl: float = Field(100.0, gt=0, description="KL of a response to the reference, in nats.")
    length: float = Field(3.0, gt=1, description="Mean length, as a multiple of the first rollout's.")
    unfinished: float = Field(0.4, gt=0, le=1, description="Rise of the share of responses that were cut off.")
    repetition: float = Field(0.3, gt=0, le=1, description="Rise of the share of repeated runs of four tokens.")
    failed: float = Field(
        0.2, ge=0, le=1,
        description="Share of a rollout's responses without a reward; the policy learns from the others alone.",
    )  # fmt: skip


class LoRA(BaseModel):
    """Trains a low-rank adapter instead of all weights (Hu et al. 2021, arXiv 2106.09685)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(16, ge=1, description="Rank of the update.")
    alpha: float = Field(32.0, gt=0, description="Scale: the update is multiplied by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: str | list[str] = Field("all-linear", description="Modules that get an adapter.")
    base: Literal["nf4"] | None = Field(
        None,
        description="Precision of the frozen base in training: `nf4` = 4 bits a weight (QLoRA, arXiv 2305.14314), on a "
        "GPU with bitsandbytes; absent = the profile's.",
    )


Copy = Literal["reference", "whole reference", "sampler"]
"""A frozen copy of the starting model: the reference, which ZeRO-3 partitions or which is whole in each process, or the
policy that samples, which is empty while it learns."""


class TrainingConfig(StageConfig):
    """A stage that trains a model with a trainer on transformers' own.

    `train` comes out complete: what the recipe says over the stage's own defaults, so that a stage's folder tells
    everything it was trained with and a changed default is another experiment.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}
    """Fields of `train_class` that differ from the library's defaults here."""
    owned: ClassVar[tuple[str, ...]] = ()
    """Fields of `train_class` that this stage sets itself: `cai.training.train_fields` refuses them under `train:`."""

    sequences_per_example: ClassVar[int] = 1
    """Rows of a forward pass that one example takes."""

    model: StartRef | None = Field(None, description="Starting model or stage; absent = the recipe's model.")
    batch_size: int = Field(32, ge=1, description="Examples a step over all devices; the profile splits it.")
    lora: LoRA | None = Field(None, description="Adapter to train; absent = all weights.")
    max_length: int = Field(1024, ge=8, description="Tokens; a longer example is left out and counted, never cut.")
    train: dict[str, Any] = Field(
        default_factory=dict, validate_default=True, description="Fields of the trainer's own config class."
    )

    @property
    def quantises_base(self) -> bool:
        """Whether the frozen base of the stage's adapter has 4 bits a weight."""
        return self.lora is not None and self.lora.base == "nf4"

    @field_validator("train")
    @classmethod
    def _complete(cls, train: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        defaults = {**TRAIN_DEFAULTS, **cls.defaults}
        if info.data.get("lora") is not None:
            defaults["learning_rate"] *= LORA_LEARNING_RATE
        return {**defaults, **train}

    @property
    def responses_at_once(self) -> int:
        """Responses that the policy samples before it learns from them, over all processes."""
        return 0

    def copies_of_start(self) -> tuple[Copy, ...]:
        """What the stage holds copies of its starting model for, in one process."""
        return ()


TRAIN_DEFAULTS = {"logging_steps": 1, "save_strategy": "steps", "save_steps": 0.25, "save_total_limit": 2}
"""For every training stage: each step is logged, so that a resumed run logs what an undisturbed one does."""

LORA_LEARNING_RATE = 10.0
"""An adapter's best learning rate over that of full training (Schulman et al. 2025, LoRA Without Regret)."""


class Reward(BaseModel):
    """One source of reward: a reward model, a judge that rates, or a function of the user's own."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: RewardModelRef | None = Field(None, description="A `reward` stage, or a sequence classifier with one score.")
    judge: RaterRef | None = Field(
        None,
        description="Who rates responses: `model` = the recipe's model, `self` = the recipe's judge, and where that is "
        "`self` too, the stage's starting model; or a model, or a stage.",
    )
    function: FunctionRef | None = Field(
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
    principles: Literal["all"] | Annotated[list[PrincipleRef], Field(min_length=1)] = Field(
        "all", description="Principles that a judge rates by: all, or those of these ids and tags."
    )
    scale: Literal[7, 10] = Field(7, description="A judge's highest rating; the lowest is 1.")

    @property
    def log_name(self) -> str:
        """What it is logged as."""
        if self.name is not None:
            return self.name
        if self.model is not None:
            return Path(self.model).name
        return "judge" if self.function is None else self.function.rpartition(":")[2]

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = [key for key in ("model", "judge", "function") if getattr(self, key) is not None]
        if len(sources) != 1:
            named = " and ".join(f"`{key}`" for key in sources) or "none"
            raise ValueError(f"found {named}, expected exactly one of `model`, `judge` and `function`")
        if self.judge is None and (judge_keys := {"principles", "scale"} & self.model_fields_set):
            raise ValueError(f"found `{min(judge_keys)}` with `{sources[0]}`, expected it with `judge` alone")
        return self


class RewardedConfig(StageConfig):
    """A stage that scores responses by one or several sources of reward, and takes their weighted sum."""

    rewards: tuple[Reward, ...] = Field(min_length=1, description="Sources of reward; what counts is their sum.")

    @field_validator("rewards")
    @classmethod
    def _names_once(cls, rewards: tuple[Reward, ...]) -> tuple[Reward, ...]:
        names = [reward.log_name for reward in rewards]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"found two rewards called {repeated[0]!r}, expected names that differ; say `name:`")
        return rewards

    @property
    def has_judge(self) -> bool:
        """Whether a judge rates responses."""
        return any(reward.judge is not None for reward in self.rewards)

    def template_names(self) -> tuple[str, ...]:
        return ("rate",) if self.has_judge else ()

    def principle_fields(self) -> tuple[PrincipleField, ...]:
        return ("critique", "weight") if self.has_judge else ()


class ReinforcementConfig(RewardedConfig, TrainingConfig):
    """A stage that trains a policy on its own responses to prompts, by what they are worth.

    Prompts that are held out are never responded to. Tokens are sampled from the whole distribution at `temperature`:
    with top-p or top-k the log-probabilities learned from would be those of another distribution. Dropout is off, that
    of `lora:` too: log-probabilities are compared with those at sampling time.
    """

    gives: ClassVar[OutputKind] = "policy"

    prompts: OneOrMore[PromptSetRef] = Field(min_length=1, description="Prompt sets that are responded to.")
    batch_size: int = Field(64, ge=1, description="Responses a step over all devices; the profile splits it.")
    max_new_tokens: int = Field(256, ge=1, description="Tokens at which a response is cut off.")
    temperature: float = Field(1.0, gt=0, description="At which responses are sampled and scored by the policy.")
    limits: Limits = Field(Limits.model_validate({}), description="How far the policy may go before the stage stops.")

    @property
    def responses_at_once(self) -> int:
        """Those of one step."""
        return self.batch_size
