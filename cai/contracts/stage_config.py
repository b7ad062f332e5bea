"""What every stage says about itself: its config class.

A config is *what* a stage computes and part of its fingerprint; the stage's `run` function is *how*.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from cai.contracts.engine import Sampling
from cai.contracts.references import OutputKind
from cai.storage.rows import NATS
from cai.text.errors import BadInput

if TYPE_CHECKING:
    from cai.storage.journal import Portion

PrincipleField = Literal["critique", "revise", "compare", "examples", "weight"]
"""What of a principle a stage's output depends on; `weight` reaches no model."""


class WrongVoteUnits(BadInput):
    """Votes of units that a stage cannot read. `key` is the key of the stage's config that is wrong; None where it is
    the one that names the judges."""

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class StageConfig(BaseModel):
    """What every stage says about itself. A subclass adds its own keys, each default in this one place.

    What a key refers to is said by its type (`cai.contracts.references`). The recipe's model and judge stand in where a
    reference says so, and `self` is resolved, before a stage sees its config.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=())

    gives: ClassVar[OutputKind]
    revision: ClassVar[int] = 1
    """Raised when the stage's code changes what it computes: earlier outputs are then not reused."""
    item_choice: ClassVar[tuple[str, ...]] = ()
    """Parts of the fingerprint, or the first words of their names, that say which items there are and not what becomes
    of one. Where all others are unchanged, a stage takes over what an earlier folder of it holds of an item
    (`cai.contracts.earlier`). Empty: it takes over nothing."""
    train_class: ClassVar[str | None] = None
    """`module:Class` of the library's config that `train:` is checked against and handed to."""

    id: str = Field(description="Name of the stage in the recipe.")
    kind: str = Field(description="Which stage this is.")

    def vote_unit(self) -> str:
        """The unit of the votes that the stage gives, if it gives any."""
        return NATS

    def check_vote_units(self, units_by_stage: Mapping[str, Collection[str]]) -> None:
        """Raises WrongVoteUnits where the stage cannot read votes of these units; those of a stage without votes are
        empty."""
        if rating_stages := [stage for stage, units in units_by_stage.items() if {*units} - {NATS}]:
            points = sorted(set().union(*units_by_stage.values()) - {NATS})
            raise WrongVoteUnits(
                f"found votes in {' and in '.join(points)}, expected votes in {NATS}; set `method: pairwise` or "
                f"`method: reasoned` in stage {' and '.join(map(repr, rating_stages))}"
            )

    def most_responses(self, inputs: Sequence[int]) -> int | None:
        """The most responses that the stage gives to one prompt, `inputs` being those of the stages that it reads; None
        where it is not known."""
        return None

    def needs_pairs(self) -> bool:
        """Whether the stage fails where no prompt has two responses in the stages that it reads."""
        return False

    def template_names(self) -> tuple[str, ...]:
        """Templates that reach a model here."""
        return ()

    def principle_fields(self) -> tuple[PrincipleField, ...]:
        """What of the principles the output depends on."""
        return ()


class CompositeConfig(StageConfig):
    """A stage that is made of others: it is replaced by them before anything is planned."""

    def parts(self) -> list[Mapping[str, Any]]:
        """The stages as a recipe would write them, the last one under this stage's own id, the others under ids that
        `part_id` makes. Called when the recipe's model and judge stand in for absent names."""
        raise TypeError(f"{type(self).__name__} defines no parts")

    def part_id(self, *names: str) -> str:
        """An id of a part; a recipe's own ids have no dots."""
        return ".".join((self.id, *names))


class FeedbackConfig(StageConfig):
    """A stage whose work is a list of items, journaled a portion at a time.

    Each of the profile's processes runs the stage: the journal gives it its share, and lets rank 0 alone past `finish`.
    """

    journal_batch: int | None = Field(
        None,
        ge=1,
        description="Items that are computed and written together, as one portion; absent = as many as each process "
        "has, up to the profile's `items_in_flight`, or about a minute of work of a large model on a CPU.",
    )
    retries: int = Field(1, ge=0, description="Times a failed item is asked again within the stage.")

    def attempts(self, portion: Portion) -> int:
        """Retries for a portion. Reopened items repeat their earlier attempts, so that what had succeeded of an item
        that failed in part comes out as it was, up to rounding."""
        return (self.retries + 1) * (portion.attempt + 1) - 1


class WritingConfig(FeedbackConfig):
    """A stage in which a model writes texts."""

    max_new_tokens: int = Field(256, ge=1, description="Tokens at which a text is cut off.")
    temperature: float = Field(1.0, ge=0, description="0 always takes the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Samples from the likeliest tokens that hold this much; 1 = all.")
    top_k: int = Field(0, ge=0, description="Samples from this many of the likeliest tokens; 0 = all.")
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
