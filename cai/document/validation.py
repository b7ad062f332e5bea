"""Turns pydantic's errors about a document into sentences, one for each problem, with its position.

A missing key is not reported beside an unknown key of the same mapping, which most likely is the missing one misspelt.
Where a value may be of several types, the sentence is about those that the author can have meant.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping
from types import UnionType

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cai.document.building import Plain
from cai.document.problems import WrongDocument, problems_of
from cai.document.reading import Document, error_at
from cai.text.errors import did_you_mean
from cai.text.formatting import Key, describe, shorten

_EXPECTED = {
    "string_type": "text",
    "path_type": "the path of a file",
    "finite_number": "a finite number",
    "none_required": "nothing",
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type", "mapping_type"), "a mapping"),
}
_LISTS = ("list_type", "tuple_type")
_CHOICES = ("literal_error", "enum")
_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("of at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("of at most", "le"),
}
_HINTS: dict[tuple[str, type], str] = {
    **dict.fromkeys((("bool_type", str), ("bool_parsing", str)), "; in YAML only true and false are read as such"),
    **dict.fromkeys((("string_type", type_) for type_ in (bool, int, float)), "; put it in quotes if it is text"),
    ("string_type", dict): "; text that contains ': ' is put in quotes or stands below '>-'",
}

Model = typing.TypeVar("Model", bound=BaseModel)


def validate(
    document: Document, model: type[Model], at: tuple[Key, ...] = (), elsewhere: Mapping[str, str] | None = None
) -> Model:
    """The part of the document at the keys `at` as a `model`. Raises WrongDocument with every problem in it.

    `elsewhere` says of keys that stand in another place, or have another name, where that is: `stands under train`.
    """
    value: Plain = document.value
    for depth, key in enumerate(at):
        if key not in document.node(at[:depth]).children:
            raise error_at(document, at[:depth], f"found no {key!r}")
        value = document.node(at[: depth + 1]).value
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _explain(document, model, at, error, elsewhere or {}) from None


def _explain(
    document: Document,
    model: type[BaseModel],
    at: tuple[Key, ...],
    error: ValidationError,
    elsewhere: Mapping[str, str],
) -> WrongDocument:
    """The error to raise for pydantic's `error` about the part of `document` at `at`, which is no `model`."""
    problems: dict[tuple[Key, ...], list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        problems.setdefault(_keys_in_document(document, at, details), []).append(details)
    # Every branch of a union complains; the author meant the branch with the deepest problem.
    deepest = {
        keys: errors
        for keys, errors in problems.items()
        if _is_missing(errors) or not any(keys == deeper[: len(keys)] and keys != deeper for deeper in problems)
    }
    unknown = {keys[:-1] for keys, errors in deepest.items() if errors[0]["type"] == "extra_forbidden"}
    plausible = {keys: errors for keys, errors in deepest.items() if not (_is_missing(errors) and keys in unknown)}
    problems = plausible or problems
    sentences = (
        error_at(
            document, keys, _sentence(model, keys[len(at) :], problems[keys], elsewhere),
            key=problems[keys][0]["type"] == "extra_forbidden",
        )
        for keys in sorted(problems, key=document.key_position)
    )  # fmt: skip
    return WrongDocument(problem for sentence in sentences for problem in problems_of(sentence))


def _is_missing(errors: list[ErrorDetails]) -> bool:
    return errors[0]["type"] == "missing"


def _keys_in_document(document: Document, at: tuple[Key, ...], error: ErrorDetails) -> tuple[Key, ...]:
    """The keys that lead to a problem: pydantic's location without the names of union branches."""
    keys = at
    for step in error["loc"]:
        if step in document.node(keys).children:
            keys = (*keys, step)
    return keys


def _sentence(
    model: type[BaseModel], keys: tuple[Key, ...], errors: list[ErrorDetails], elsewhere: Mapping[str, str]
) -> str:
    errors = _of_branch_meant(errors)
    first = errors[0]
    kind, value, context = first["type"], first["input"], first.get("ctx", {})
    if kind == "extra_forbidden":
        is_elsewhere = len(keys) == 1 and keys[0] in elsewhere
        return f"{keys[0]} {elsewhere[str(keys[0])]}" if is_elsewhere else _unknown_key(model, keys)
    if kind == "missing":
        absent = " and no ".join(repr(str(error["loc"][-1])) for error in errors)
        return f"found no {absent}, expected in every {_noun(keys)}"
    if kind == "value_error":
        return str(context.get("error", first["msg"]))
    if kind == "union_tag_not_found":
        return f"found no {context.get('discriminator', 'kind')}, expected it to say what this is"
    if kind == "union_tag_invalid" or (kind in _CHOICES and len(errors) == 1):
        tag = str(context.get("tag", value))
        names = _choices(first)
        shown = describe(tag) if kind == "union_tag_invalid" else describe(value)
        return f"found {shown}, expected one of {', '.join(names)}{did_you_mean(tag, names)}"
    expected = _alternatives(list(dict.fromkeys(words for error in errors for words in _expected_of_branch(error))))
    hint = _list_hint(model, keys, value) if any(error["type"] in _LISTS for error in errors) else ""
    choices = [name for error in errors if error["type"] in _CHOICES for name in _choices(error)]
    if isinstance(value, str):
        hint = did_you_mean(value, choices) or hint
    return f"found {describe(value)}, expected {expected}{hint or _HINTS.get((kind, type(value)), '')}"


def _of_branch_meant(errors: list[ErrorDetails]) -> list[ErrorDetails]:
    """Of the errors of several branches of a union, those of the branches that take a value of this kind, if any."""
    value = errors[0]["input"]
    if isinstance(value, str) or len(errors) == 1:
        return errors
    return [error for error in errors if error["type"] not in {*_EXPECTED, *_CHOICES}] or errors


def _unknown_key(model: type[BaseModel], keys: tuple[Key, ...]) -> str:
    """The sentence about a key that no field of the mapping around it has."""
    models = _models_at(model, keys[:-1])
    names = sorted({field.alias or name for model_type in models for name, field in model_type.model_fields.items()})
    choices = f"one of {', '.join(names)}" if names else "no key"
    return f"unknown key, expected {choices}{did_you_mean(str(keys[-1]), names)}"


def _choices(error: ErrorDetails) -> list[str]:
    """The names of which a value had to be one."""
    context = error.get("ctx", {})
    expected = str(context.get("expected") or context.get("expected_tags"))
    return [name.strip("' ") for name in expected.replace(" or ", ", ").split(", ")]


def _expected_of_branch(error: ErrorDetails) -> list[str]:
    """What one branch of a union takes, in plain words."""
    return _choices(error) if error["type"] in _CHOICES else [_expected(error)]


def _alternatives(names: list[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _list_hint(model: type[BaseModel], keys: tuple[Key, ...], value: object) -> str:
    """How a list of texts is written, where `value` is one of its texts alone."""
    item_types = [member for type_ in _types_of(model, (*keys, 0)) for member in _members(type_)]
    if not (isinstance(value, str) and str in item_types and re.fullmatch(r"\w[\w .,/-]{0,60}", value)):
        return ""
    return f"; write `{keys[-1]}: [{value}]`" if isinstance(keys[-1], str) else f"; write `[{value}]`"


def _expected(error: ErrorDetails) -> str:
    """The kind of value that pydantic wanted, in plain words."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind in _BOUNDS:
        word, name = _BOUNDS[kind]
        return f"a number {word} {context[name]}"
    if kind == "string_pattern_mismatch":
        return f"text that matches {context['pattern']}"
    if kind == "string_too_short":
        return "text" if context["min_length"] == 1 else f"at least {context['min_length']} characters"
    if kind == "string_too_long":
        return f"at most {context['max_length']} characters"
    if kind == "too_short":
        return f"at least {context['min_length']} {'item' if context['min_length'] == 1 else 'items'}"
    if kind == "too_long":
        return f"at most {context['max_length']} items"
    if kind == "value_error":
        return str(context.get("error", error["msg"]))
    message = error["msg"].removeprefix("Input should be ").removeprefix("Value should be ")
    return shorten(message[:1].lower() + message[1:], 200)


def _noun(keys: tuple[Key, ...]) -> str:
    """What messages call the mapping at `keys`: `item of 'principles'`, `'examples'`, `document`."""
    names = [key for key in keys if isinstance(key, str)]
    if not names:
        return "document"
    return f"item of '{names[-1]}'" if isinstance(keys[-1], int) else f"'{names[-1]}'"


def _types_of(model: type[BaseModel], keys: tuple[Key, ...]) -> list[object]:
    """The types that the value at `keys` may have."""
    types: list[object] = [model]
    for key in keys:
        types = [inner for outer in types for member in _members(outer) for inner in _types_at(member, key)]
    return types


def _models_at(model: type[BaseModel], keys: tuple[Key, ...]) -> list[type[BaseModel]]:
    """The models that the mapping at `keys` may be."""
    return [member for type_ in _types_of(model, keys) for member in _members(type_) if _is_model(member)]


def _is_model(type_: object) -> typing.TypeGuard[type[BaseModel]]:
    return isinstance(type_, type) and issubclass(type_, BaseModel)


def _members(type_: object) -> Iterator[object]:
    """The members of a union, of unions within it, and the types that annotations wrap."""
    origin = typing.get_origin(type_)
    if origin is typing.Annotated:
        yield from _members(typing.get_args(type_)[0])
    elif origin in (typing.Union, UnionType):
        for member in typing.get_args(type_):
            yield from _members(member)
    else:
        yield type_


def _types_at(type_: object, key: Key) -> Iterator[object]:
    """The types that the value at `key` of a value of this type may have."""
    if _is_model(type_):
        for name, field in type_.model_fields.items():
            if key == (field.alias or name):
                yield field.annotation
    elif typing.get_origin(type_) is dict:
        yield typing.get_args(type_)[1]
    elif typing.get_origin(type_) in (list, tuple) and isinstance(key, int):
        yield typing.get_args(type_)[0]
