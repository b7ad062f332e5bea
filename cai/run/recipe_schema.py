"""The JSON Schema of a recipe, for editors: each stage by its own keys."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from cai.document.json_schema import editor_schema
from cai.run.recipe_document import RecipeDocument, StageEntry
from cai.stages import STAGES, config_class


def recipe_schema() -> dict[str, Any]:
    """The schema; `recipes/schema.json` is this. What a kind of stage reads is listed under its kind."""
    configs = {kind: config_class(kind) for kind in STAGES}
    models: list[tuple[type[BaseModel], Any]] = [(RecipeDocument, "validation")]
    models += [(config, "validation") for config in configs.values()]
    refs, definitions = models_json_schema(models)
    recipe = dict(definitions["$defs"].pop(refs[RecipeDocument, "validation"]["$ref"].rpartition("/")[2]))
    by_kind = [
        {"if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]}, "then": refs[config, "validation"]}
        for kind, config in configs.items()
    ]
    kinds = {"enum": list(configs), "description": "Which stage it is."}
    stage = {"type": "object", "required": ["id", "kind"], "properties": {"kind": kinds}, "allOf": by_kind}
    stages = {**recipe["properties"]["stages"], "items": stage}
    del definitions["$defs"][StageEntry.__name__]  # `items` above says the same by kind
    recipe["properties"] = {**recipe["properties"], "stages": stages}
    return editor_schema({**recipe, **definitions})
