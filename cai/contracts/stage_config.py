"""What every stage says about itself: its config class.

A config is *what* a stage computes and part of its fingerprint; the stage's `run` function is *how*.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from cai.contracts.engine import Sampling

if TYPE_CHECKING:
    from cai.storage.journal import Batch


OutputKind = Literal["texts", "votes", "preferences", "policy", "reward", "comparison", "figures"]
"""What a stage leaves behind: rows of one type, a model that generates, one that scores, a comparison, or figures."""


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_as_list)]
"""One name or several."""


class StageConfig(BaseModel):
    """What every stage says about itself. A subclass adds its own keys, each default in this one place."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=())

    gives: ClassVar[OutputKind]
    takes: ClassVar[tuple[OutputKind, ...]] = ()
    """Row types that `from:` may name."""
    revision: ClassVar[int] = 1
    """Raised when the stage's code changes what it computes: earlier outputs are then not reused."""
    template_names: ClassVar[tuple[str, ...]] = ()
    """Templates that reach a model here."""
    principle_fields: ClassVar[tuple[str, ...]] = ()
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
