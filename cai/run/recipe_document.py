"""A recipe as it is written, before its names are resolved."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from cai.contracts.stage_config import Bars
from cai.document import Document
from cai.prompt_sets.prompt_set_config import MICRO, PromptSet

SELF = "self"
"""As a judge: whoever wrote the responses."""
OWN = "model"
"""Wherever a model is named: the recipe's `model:`."""

MAX_NAME = 60
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
Slug = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=MAX_NAME)]


class StageEntry(BaseModel):
    """What every stage has; the rest is checked by the stage's own config class."""

    model_config = ConfigDict(extra="allow")

    id: Slug = Field(description="Name of the stage.")
    kind: str = Field(description="Which stage it is.")


class RecipeDocument(BaseModel):
    """A recipe as it is written."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: Slug = Field(description="Name of the recipe; its runs lie in a folder called so.")
    seed: int = Field(0, ge=0, description="What all randomness is derived from.")
    model: str = Field(
        description="A Hugging Face id, a path, `micro`, RUN/STAGE for what a stage of a run trained last, or "
        "`served:NAME` for one that only a server has: where stages start that name no model."
    )
    judge: str = Field(
        SELF,
        description="Who judges: `self` = whoever wrote the responses, `model` = the recipe's, a model, or a stage.",
    )
    constitution: str | None = Field(None, description="A file, relative to the recipe, or a shipped name.")
    templates: str = Field("auto", description="Template set; auto = the one recorded with the model, else `default`.")
    chat_template: str | None = Field(None, description="Chat template, a file or Jinja text, for models without one.")
    gate: Bars | None = Field(
        None, description="What the judge must reach on the constitution's examples before anything is built on it."
    )
    prompts: dict[str, PromptSet] = Field(default_factory=dict, description="Prompt sets by name.")
    stages: list[StageEntry] = Field(min_length=1, description="The stages, in the order of the method.")


def readable_part(document: Document) -> RecipeDocument:
    """Of a wrong recipe the keys that names in it refer to, as far as they are right."""
    keys = ("model", "judge", "constitution", "templates")
    texts = {key: value for key in keys if isinstance(value := document.value.get(key), str)}
    prompt_sets: dict[str, PromptSet] = {}
    written = document.value.get("prompts")
    for name, prompt_set in written.items() if isinstance(written, dict) else ():
        with suppress(ValidationError):
            prompt_sets[name] = PromptSet.model_validate(prompt_set)
    stage = StageEntry(id="stage", kind="sample")
    return RecipeDocument.model_validate(
        {"name": "recipe", "model": MICRO, **texts, "prompts": prompt_sets, "stages": [stage]}
    )
