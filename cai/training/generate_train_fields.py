"""Writes `train_fields.json`: which fields a `train:` block may have, from the installed libraries' config classes.

    python -m cai.training.generate_train_fields

Run it after an upgrade of transformers or TRL; `tests/training/test_train_fields.py` fails until then. Every class
inherits transformers' TrainingArguments, so the file lists those fields once, and for each class only what it adds or
declares differently: `fields` by their types (`unchecked` where a type is not plain) and the `values` of enumerations.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import json
import textwrap
import types
import typing
from collections import defaultdict
from typing import Any, Literal

from cai.training.train_fields import BASE_CLASS, DATA_FILE, TYPES, UNCHECKED

CONFIG_CLASSES = (
    "trl.trainer.sft_config:SFTConfig",
    "trl.trainer.reward_config:RewardConfig",
    "trl.trainer.dpo_config:DPOConfig",
    "trl.trainer.rloo_config:RLOOConfig",
    "cai.training.rl.ppo_config:PPOConfig",
)


def generate() -> str:
    """The text of `train_fields.json` for the installed libraries."""
    base_types = _field_types(BASE_CLASS)
    classes: dict[str, dict[str, dict[str, list[str]]]] = {}
    for train_class in (BASE_CLASS, *CONFIG_CLASSES):
        fields: dict[str, list[str]] = defaultdict(list)
        values: dict[str, list[str]] = {}
        for name, field_type in _field_types(train_class).items():
            if train_class == BASE_CLASS or base_types.get(name) != field_type:
                type_names, options = field_type
                fields[type_names].append(name)
                if options:
                    values[name] = list(options)
        classes[train_class] = {"fields": fields, "values": values}
    lines = json.dumps(classes, indent=1).replace("\n    ", " ").replace("\n   ]", " ]").splitlines()  # a list a line
    return "\n".join(textwrap.fill(line, 120, subsequent_indent="    ") for line in lines) + "\n"


def _field_types(train_class: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """(type names joined by `|`, values of an enumeration) of each field of a dataclass."""
    module, _, name = train_class.partition(":")
    config_class = getattr(importlib.import_module(module), name)
    hints = typing.get_type_hints(config_class)
    return {field.name: _describe_type(hints[field.name]) for field in dataclasses.fields(config_class) if field.init}


def _describe_type(type_hint: Any) -> tuple[str, tuple[str, ...]]:
    is_union = typing.get_origin(type_hint) in (typing.Union, types.UnionType)
    names_by_type = {plain_type: name for name, plain_type in TYPES.items()}
    type_names: list[str] = []
    values: list[str] = []
    for member in typing.get_args(type_hint) if is_union else [type_hint]:
        plain_type = typing.get_origin(member) or member
        if plain_type is Literal:
            type_names.append("str")
            values += map(str, typing.get_args(member))
        elif isinstance(plain_type, type) and issubclass(plain_type, enum.Enum):
            type_names.append("str")
            values += [str(option.value) for option in plain_type]
        elif plain_type in names_by_type:
            type_names.append(names_by_type[plain_type])
        else:
            return UNCHECKED, ()
    return "|".join(dict.fromkeys(type_names)), tuple(values)


if __name__ == "__main__":
    DATA_FILE.write_text(generate(), encoding="utf-8")
