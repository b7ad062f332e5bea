"""What a stage's config refers to: field types that say so, and one walk over the fields.

A config names stages, models, prompt sets, principles, tags and files. Such a field has a type from this module, alone
or inside of a list, a mapping (as key or value), a union or another model:

    teacher: ModelRef
    rubric: FileRef
    from_: OneOrMore[TextsRef] = Field(alias="from")

The checks of a recipe, what a stage needs, fingerprints and the positions in error messages all come from `references`,
so that a new stage may call its keys whatever it likes.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from cai.text.formatting import Key

OutputKind = Literal["texts", "votes", "preferences", "policy", "reward", "comparison", "figures"]
"""What a stage leaves behind: rows of one type, a model that generates, one that scores, a comparison, or figures."""
MODEL_KINDS: tuple[OutputKind, ...] = ("policy", "reward")
"""What a stage may give that is a model."""


FailuresRead = Literal["ids", "reasons"]
"""What is read of the items that failed in a stage: which ones, or also why."""


@dataclass(frozen=True)
class StageReference:
    """A stage whose rows are read: one that gives one of `takes`."""

    takes: tuple[OutputKind, ...]
    failures: FailuresRead | None = None
    """What is read of the items that failed in it. Part of the fingerprint."""


@dataclass(frozen=True)
class ModelReference:
    """A model, or a stage that trains one. `model` is the recipe's model under any of these."""

    gives: tuple[OutputKind, ...] = MODEL_KINDS
    """What a stage named here may give. A single kind is also required of a model from outside of the recipe: one that
    writes, or one that scores."""
    absent: Literal["model", "judge"] | None = None
    """What of the recipe stands in where the key is absent."""
    self_is: Literal["writer", "judge", "model"] | None = None
    """What `self` means: whoever wrote the texts that are read, the recipe's judge, or the recipe's model."""
    writes: bool = False
    """Whether it writes the texts that the stage gives."""
    trained: bool = False
    """Whether training starts from it, so that its weights must be on this machine."""


@dataclass(frozen=True)
class PromptSetReference:
    """A prompt set of the recipe."""


@dataclass(frozen=True)
class PrincipleReference:
    """Principles of the constitution, by id or by a tag that they carry; an id wins over a tag of the same name."""

    tag_only: bool = False
    """Whether the name is a tag, never an id."""
    lists_tags: bool = False
    """Whether the fingerprint lists the named tags of each principle where no tag is named, too."""


@dataclass(frozen=True)
class TagReference:
    """A tag that prompts of the recipe carry."""


@dataclass(frozen=True)
class FileReference:
    """A file or folder, relative to the recipe, whose content is part of the fingerprint."""

    built_in: tuple[str, ...] = ()
    """Names that stand for no file."""
    function: bool = False
    """Whether the name is `file.py:function`."""


Target = StageReference | ModelReference | PromptSetReference | PrincipleReference | TagReference | FileReference

TextsRef = Annotated[str, StageReference(("texts",))]
TextsAndFailedRef = Annotated[str, StageReference(("texts",), failures="ids")]
TextsAndReasonsRef = Annotated[str, StageReference(("texts",), failures="reasons")]
VotesAndFailedRef = Annotated[str, StageReference(("votes",), failures="ids")]
VotesAndReasonsRef = Annotated[str, StageReference(("votes",), failures="reasons")]
PreferencesRef = Annotated[str, StageReference(("preferences",))]
ModelRef = Annotated[str, ModelReference()]
WriterRef = Annotated[str, ModelReference(gives=("policy",), absent="model", writes=True)]
StartRef = Annotated[str, ModelReference(gives=("policy",), absent="model", trained=True)]
RewardStartRef = Annotated[str, ModelReference(absent="model", trained=True)]
JudgeRef = Annotated[str, ModelReference(gives=("policy",), absent="judge", self_is="writer")]
CheckpointRef = Annotated[str, ModelReference(gives=("policy",))]
RewardModelRef = Annotated[str, ModelReference(gives=("reward",))]
RaterRef = Annotated[str, ModelReference(gives=("policy",), self_is="judge")]
PromptSetRef = Annotated[str, PromptSetReference()]
PrincipleRef = Annotated[str, PrincipleReference()]
PrincipleTagRef = Annotated[str, PrincipleReference(tag_only=True)]
TagRef = Annotated[str, TagReference()]
FileRef = Annotated[str, FileReference()]
RowsFileRef = Annotated[str, FileReference(built_in=("micro",))]
FunctionRef = Annotated[str, FileReference(function=True)]


def failures_read(config: BaseModel) -> dict[str, FailuresRead | None]:
    """What a config reads of the failures of each stage that it refers to: the most that any of its fields reads."""
    declared: dict[str, FailuresRead | None] = {}
    for _, target, name in references(config, StageReference):
        order: tuple[FailuresRead | None, ...] = (None, "ids", "reasons")
        declared[name] = max(declared.get(name), target.failures, key=order.index)
    return declared


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class _OneInTheSchema:
    """Lets the schema for editors take a single name too."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        several = handler(core)
        return {"anyOf": [several["items"], several]}


Item = TypeVar("Item")
OneOrMore = Annotated[list[Item], BeforeValidator(_as_list), _OneInTheSchema()]
"""One name or several."""

Config = TypeVar("Config", bound=BaseModel)


class Reference(NamedTuple):
    """One name in a config."""

    keys: tuple[Key, ...]
    """Where it stands in the config, in the words of the document."""
    target: Any
    """One of the classes of `Target`, which says what the name means."""
    name: str


def references(config: BaseModel, kind: type[Any] | None = None) -> list[Reference]:
    """Every name in a config, in the order of its fields; those of one class of `Target` where `kind` is given."""
    names: list[Reference] = []

    def collect(keys: tuple[Key, ...], target: Target, name: str | None) -> str | None:
        if name is not None and (kind is None or isinstance(target, kind)):
            names.append(Reference(keys, target, name))
        return name

    renamed(config, collect)
    return names


def renamed(config: Config, rename: Callable[[tuple[Key, ...], Target, str | None], str | None]) -> Config:
    """A copy of a config with each name replaced by `rename(keys, target, name)`; `name` is None for an absent one."""
    changes = {
        field: value
        for field, keys, info in _fields(config)
        if (value := _walk(getattr(config, field), info.annotation, info.metadata, keys, rename))
        is not getattr(config, field)
    }
    return config.model_copy(update=changes) if changes else config


def nested_models(config: BaseModel, kind: type[Config]) -> Iterator[tuple[tuple[Key, ...], Config]]:
    """Every value of a config that is a model of class `kind`, with where it stands."""
    for field, keys, _ in _fields(config):
        value = getattr(config, field)
        items: Iterable[tuple[Key | None, Any]] = [(None, value)]
        if isinstance(value, list | tuple):
            items = enumerate(value)
        elif isinstance(value, Mapping):
            items = value.items()
        for key, item in items:
            place = keys if key is None else (*keys, key)
            if isinstance(item, kind):
                yield place, item
            elif isinstance(item, BaseModel):
                yield from (((*place, *inner), model) for inner, model in nested_models(item, kind))


def _fields(config: BaseModel) -> Iterator[tuple[str, tuple[Key, ...], Any]]:
    for field, info in type(config).model_fields.items():
        yield field, (info.alias or field,), info


def _walk(
    value: Any,
    annotation: Any,
    metadata: Any,
    keys: tuple[Key, ...],
    rename: Callable[[tuple[Key, ...], Target, str | None], str | None],
) -> Any:
    """`value`, of the declared type `annotation` with `metadata`, with the names in it replaced; itself if none is."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _walk(value, arguments[0], [*metadata, *arguments[1:]], keys, rename)
    if isinstance(value, BaseModel):
        return renamed(value, lambda inner, target, name: rename((*keys, *inner), target, name))
    if origin in (Union, types.UnionType):
        if any(get_origin(option) is Literal and value in get_args(option) for option in arguments):
            return value
        for option in arguments:
            value = _walk(value, option, metadata, keys, rename)
        return value
    if annotation is str and isinstance(value, str | None):
        for target in metadata:
            if isinstance(target, Target):
                value = rename(keys, target, value)
        return value
    if isinstance(value, Mapping) and len(arguments) == 2:
        items = {
            _walk(key, arguments[0], (), (*keys, key), rename): _walk(item, arguments[1], (), (*keys, key), rename)
            for key, item in value.items()
        }
        return value if items == value else items
    if isinstance(value, list | tuple) and arguments and origin in (list, tuple):
        new = [_walk(item, arguments[0], (), (*keys, index), rename) for index, item in enumerate(value)]
        return value if new == list(value) else type(value)(new)
    return value
