"""Fixtures that all tests share: tiny models, built once a session on first use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import models
import pytest

from cai.checkpoint import Model, resolve


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    """`tiny("llama")` is that tiny model, of models.FAMILIES or `lora`. Keywords go to `cai.checkpoint.resolve`."""
    home: Path = tmp_path_factory.mktemp("models")

    def model(family: str, **options: str) -> Model:
        if not (home / family).exists():
            models.build(family, home / family)
        return resolve(str(home / family), folder=home, **options)

    return model
