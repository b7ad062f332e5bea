"""The schema of a constitution: the document as its author writes it, before anything is merged or derived.

`constitutions/schema.json` is generated from it; editors show the descriptions.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)  # fmt: skip

from cai.document.json_schema import editor_schema
from cai.text.formatting import describe

MAX_TEXT = 20_000
_SLUG = re.compile(r"[a-z0-9]+([-_][a-z0-9]+)*\Z")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _slug(value: str) -> str:
    if not _SLUG.match(value) or len(value) > 64:
        slug = re.sub(r"[^a-z0-9_]+", "-", value.lower()).strip("-_")[:64]
        hint = f"; did you mean {slug!r}?" if _SLUG.match(slug) else ""
        expected = "up to 64 lower-case letters, digits and single '-' or '_' between them"
        raise ValueError(f"found {describe(value)}, expected {expected}{hint}")
    return value


def _text(value: str) -> str:
    if not value.strip():
        raise ValueError("found an empty text, expected something to say")
    if control := _CONTROL.search(value):
        raise ValueError(f"found the control character {control.group()!r}, expected text")
    if len(value) > MAX_TEXT:
        raise ValueError(f"found a text of {len(value):,} characters, expected at most {MAX_TEXT:,}")
    return value.strip()


def _tag(value: str) -> str:
    if not re.fullmatch(r"[^\s,]{1,64}", value) or _CONTROL.search(value):
        raise ValueError(f"found {describe(value)}, expected a tag of up to 64 characters without spaces and commas")
    return value


Slug = Annotated[str, AfterValidator(_slug), Field(json_schema_extra={"pattern": "^[a-z0-9]+([-_][a-z0-9]+)*$"})]
Tag = Annotated[str, AfterValidator(_tag), Field(json_schema_extra={"pattern": r"^[^\s,]+$"})]
Text = Annotated[str, AfterValidator(_text), Field(json_schema_extra={"pattern": r"\S"})]
Path = Annotated[str, Field(json_schema_extra={"pattern": r"\.ya?ml$"})]
"""Its suffix is checked where the files beside the document are known, to name the nearest."""


class Written(BaseModel):
    """A mapping in a document: unknown keys are errors, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Turn(Written):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"] = Field(description="Who speaks.")
    content: Text = Field(description="What is said.")


class ExampleEntry(Written):
    """An edge case: a prompt and two responses, one better by the principle. A judge of the principle must agree."""

    prompt: Text | Annotated[tuple[Turn, ...], Field(min_length=1)] = Field(
        description="What the user says, or a whole conversation as a list of {role, content} that ends with the user."
    )
    better: Text = Field(description="The response that lives up to the principle.")
    worse: Text = Field(description="The response that falls short of it. Best where the difference is not obvious.")

    @field_validator("worse")
    @classmethod
    def _differs(cls, worse: str, info: ValidationInfo) -> str:
        if worse == info.data.get("better"):
            raise ValueError("found the text of 'better' again, expected a response that falls short of it")
        return worse

    @model_validator(mode="after")
    def _ends_with_the_user(self) -> ExampleEntry:
        if not isinstance(self.prompt, str) and self.prompt[-1].role != "user":
            raise ValueError(f"found a prompt that ends with the {self.prompt[-1].role}, expected the user at its end")
        return self


_TEXT_OR_DROP: dict[str, Any] = {
    "if": {"properties": {"drop": {"const": True}}, "required": ["drop"]},
    "then": {"maxProperties": 2},
    "else": {"anyOf": [{"required": ["text"]}, {"required": ["weight"], "maxProperties": 2}]},
}


class Entry(Written):
    """What principles and traits have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=_TEXT_OR_DROP)

    id: Slug = Field(
        description="Name of the principle, unique in the document. It travels with every critique, vote, preference "
        "and metric. The same id as in an extended document replaces the principle there; with `weight` alone, its "
        "weight."
    )
    text: Text = Field("", description="The principle in one or two sentences, as a person reads it.")
    critique: Text = Field(
        "", description="The request put to a model that criticises a response. Derived from the text where absent."
    )
    revise: Text = Field(
        "", description="The request put to a model that rewrites a response. Derived from the text where absent."
    )
    compare: Text = Field(
        "", description="The question put to a judge of two responses: 'Which response ...?'. Derived where absent."
    )
    weight: float = Field(
        1.0,
        strict=True,
        ge=0,
        allow_inf_nan=False,
        description="How much the principle counts in a preference. 0: no say in labels and figures; critics and "
        "judges still see it, so that weights can change without asking again. `drop: true` removes it.",
    )
    tags: tuple[Tag, ...] = Field((), description="What figures are broken down by: harm, honesty, style.")
    applies_to: Annotated[tuple[Tag, ...], Field(min_length=1)] | None = Field(
        None, description="Tags of the prompts that the principle is for, such as red_team. Absent: all prompts."
    )
    examples: tuple[ExampleEntry, ...] = Field(
        (), description="Edge cases: unit tests of the principle. A judge of it must prefer the better response."
    )
    drop: bool = Field(False, strict=True, description="true removes an extended document's principle of this id.")

    @model_validator(mode="after")
    def _has_a_text_or_drops(self) -> Entry:
        if self.drop and (fields := sorted(self.model_fields_set - {"id", "drop"})):
            raise ValueError(f"found 'drop: true' beside {', '.join(fields)}, expected it with 'id' alone")
        if not self.drop and not self.reweighs and not self.text:
            raise ValueError(
                "found no 'text', expected the principle in a sentence or two; an entry replaces an inherited "
                "principle as a whole, and with `weight` alone changes its weight"
            )
        return self

    @property
    def reweighs(self) -> bool:
        """Whether the entry only gives another weight to the inherited principle of its id."""
        return self.model_fields_set == {"id", "weight"}


class PrincipleEntry(Entry):
    """A principle: what a good response does, or does not do."""


class TraitEntry(Entry):
    """A trait of the assistant's character, in the first person. It is compiled to a principle."""

    text: Text = Field("", description="The trait, as the assistant says it of itself: 'I enjoy ...'.")


class ConstitutionDocument(Written):
    """A constitution: what an assistant lives by, as principles and traits of character."""

    name: Slug = Field(description="Short name of the constitution, recorded with every vote.")
    description: Text = Field("", description="One sentence: what living by this document means.")
    extends: Path | Annotated[tuple[Path, ...], Field(min_length=1)] | None = Field(
        None,
        description="Documents to start from: a path relative to this file, or a list. Each is applied once, after "
        "those that it extends; in a list later ones replace earlier ones. They lie in the folder of the document "
        "that is loaded, or below it.",
    )
    principles: tuple[PrincipleEntry, ...] = Field((), description="The principles, in the order to show them in.")
    traits: tuple[TraitEntry, ...] = Field((), description="The assistant's character, in the first person.")


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a constitution, for editors; `constitutions/schema.json` is this."""
    return editor_schema(ConstitutionDocument.model_json_schema())
