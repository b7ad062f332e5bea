"""Turns what pydantic found wrong with a document into one sentence with a position.

Of several problems the first in the document is reported, and how many others there are. A missing key is not reported
beside an unknown one of the same mapping, which is most likely that key misspelt.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from types import UnionType

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cai.document import Document, fail
from cai.text.errors import BadInput, nearest
from cai.text.formatting import Key, describe, shorten

_EXPECTED = {
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "mapping_type": "a mapping",
    "none_required": "nothing",
}
_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("of at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("of at most", "le"),
}
_HINTS = {
    ("bool_type", str): "; in YAML only true and false are read as such",
    ("bool_parsing", str): "; in YAML only true and false are read as such",
    ("string_type", bool): "; put it in quotes if it is text",
    ("string_type", int): "; put it in quotes if it is text",
    ("string_type", float): "; put it in quotes if it is text",
    ("string_type", dict): "; text that contains ': ' is put in quotes or stands below '>-'",
}


def explain(document: Document, model: type[BaseModel], at: tuple[Key, ...], error: ValidationError) -> BadInput:
    """The error to raise for what `model` says of the part of `document` at `at`."""
    found: dict[tuple[Key, ...], list[ErrorDetails]] = {}
    for each in error.errors(include_url=False):
        keys = _place(document, at, each)
        found.setdefault(keys, []).append(each)
    # Every branch of a union complains; the branch that came furthest is the one that was meant.
    deepest = {
        keys: each
        for keys, each in found.items()
        if not any(other[: len(keys)] == keys and len(other) > len(keys) for other in found) or _is_missing(each)
    }
    unknown = {keys[:-1] for keys, each in deepest.items() if each[0]["type"] == "extra_forbidden"}
    problems = {keys: each for keys, each in deepest.items() if not (_is_missing(each) and keys in unknown)} or found
    keys = min(problems, key=document.key_position)
    sentence = _sentence(model, keys[len(at) :], problems[keys])
    others = len(problems) - 1
    if others:
        sentence += f" ({others} more {'problem' if others == 1 else 'problems'} after this one)"
    return fail(document, keys, sentence, key=problems[keys][0]["type"] == "extra_forbidden")


def _is_missing(errors: list[ErrorDetails]) -> bool:
    return errors[0]["type"] == "missing"


def _place(document: Document, at: tuple[Key, ...], error: ErrorDetails) -> tuple[Key, ...]:
    """Where in the document an error stands: its location without the names of union branches."""
    keys = at
    for step in error["loc"]:
        if step in document.node(keys).children:
            keys = (*keys, step)
    return keys


def _sentence(model: type[BaseModel], keys: tuple[Key, ...], errors: list[ErrorDetails]) -> str:
    first = errors[0]
    kind, value, context = first["type"], first["input"], first.get("ctx", {})
    if kind == "extra_forbidden":
        known = sorted(known_keys(model, keys[:-1]))
        choices = f"one of {', '.join(known)}" if known else "no key"
        return f"unknown key, expected {choices}{nearest(str(keys[-1]), known)}"
    if kind == "missing":
        absent = " and no ".join(repr(str(each["loc"][-1])) for each in errors)
        return f"found no {absent}, expected in every {_noun(keys)}"
    if kind == "value_error":
        return str(context.get("error", first["msg"]))
    if kind in ("literal_error", "enum", "union_tag_invalid"):
        expected = str(context.get("expected") or context.get("expected_tags"))
        names = [name.strip("' ") for name in expected.replace(" or ", ", ").split(", ")]
        tag = str(context.get("tag", value))
        shown = describe(tag) if kind == "union_tag_invalid" else describe(value)
        return f"found {shown}, expected one of {', '.join(names)}{nearest(tag, names)}"
    if kind == "union_tag_not_found":
        return f"found no {context.get('discriminator', 'kind')}, expected it to say what this is"
    expected = " or ".join(dict.fromkeys(_expected(each) for each in errors))
    return f"found {describe(value)}, expected {expected}{_HINTS.get((kind, type(value)), '')}"


def _expected(error: ErrorDetails) -> str:
    """What would have been right, in plain words."""
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
    """What the mapping at `keys` is: `item of principles`, `examples`, `document`."""
    names = [key for key in keys if isinstance(key, str)]
    if not names:
        return "document"
    return f"item of '{names[-1]}'" if isinstance(keys[-1], int) else f"'{names[-1]}'"


def known_keys(model: type[BaseModel], keys: tuple[Key, ...]) -> set[str]:
    """The keys that the mapping at `keys` may have, in any of the forms that its place allows."""
    forms: list[object] = [model]
    for key in keys:
        forms = [inner for form in forms for each in _alternatives(form) for inner in _inside(each, key)]
    models = [each for form in forms for each in _alternatives(form) if _is_model(each)]
    return {field.alias or name for each in models for name, field in each.model_fields.items()}


def _is_model(form: object) -> typing.TypeGuard[type[BaseModel]]:
    return isinstance(form, type) and issubclass(form, BaseModel)


def _alternatives(form: object) -> Iterator[object]:
    """The members of a union, of unions within it, and what annotations wrap."""
    origin = typing.get_origin(form)
    if origin is typing.Annotated:
        yield from _alternatives(typing.get_args(form)[0])
    elif origin in (typing.Union, UnionType):
        for member in typing.get_args(form):
            yield from _alternatives(member)
    else:
        yield form


def _inside(form: object, key: Key) -> Iterator[object]:
    """What stands at `key` within a value of this form."""
    if _is_model(form):
        for name, field in form.model_fields.items():
            if key == (field.alias or name):
                yield field.annotation
    elif typing.get_origin(form) is dict:
        yield typing.get_args(form)[1]
    elif typing.get_origin(form) in (list, tuple) and isinstance(key, int):
        yield typing.get_args(form)[0]
