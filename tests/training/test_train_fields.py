"""`train_fields.json` says what the config classes of the locked libraries take."""

from __future__ import annotations

import dataclasses
import importlib

import pytest

from cai.stages import STAGES, config_class
from cai.training.generate_train_fields import CONFIG_CLASSES, generate
from cai.training.train_fields import DATA_FILE, OWNED, WHERE, fields


def test_the_field_file_is_current_and_covers_every_stage_that_trains() -> None:
    assert DATA_FILE.read_text(encoding="utf-8") == generate(), "run `python -m cai.training.generate_train_fields`"
    train_classes = {config_class(kind).train_class for kind in STAGES} - {None}
    assert train_classes <= set(CONFIG_CLASSES)


@pytest.mark.parametrize("train_class", CONFIG_CLASSES)
def test_every_init_field_of_the_class_is_listed_with_a_type_that_its_default_has(train_class: str) -> None:
    module, _, class_name = train_class.partition(":")
    config_class = getattr(importlib.import_module(module), class_name)
    declared_fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}
    listed_fields = fields(train_class)
    assert set(listed_fields) == set(declared_fields)
    for name, field in listed_fields.items():
        default = declared_fields[name].default
        if field.types is None or default is dataclasses.MISSING:
            continue
        has_type = type(default) in field.types or (type(default) is int and float in field.types)
        assert has_type or isinstance(default, str), f"{name}: {default!r} is none of {field.types}"


def test_refused_fields_are_fields_of_the_library() -> None:
    listed_fields = set().union(*(fields(train_class) for train_class in CONFIG_CLASSES))
    assert {*WHERE, *OWNED} - listed_fields <= {"no_cuda", "tf32", "fp16", "log_on_each_node"}
