"""Fixtures that all tests share: tiny models, built once a session on first use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch

from cai.contracts.model import Model
from cai.models.reference import resolve

# Tests share two cores, and threads that wait for each other there take several times as long.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    """`tiny("llama")` is that tiny model, of tiny_models.FAMILIES or `lora`. Keywords go to `resolve`."""
    home: Path = tmp_path_factory.mktemp("models")

    def model(family: str, **options: str) -> Model:
        if not (home / family).exists():
            tiny_models.build(family, home / family)
        return resolve(str(home / family), folder=home, **options)

    return model


@pytest.fixture(params=[False, True], ids=["any-size", "few-sizes"])
def pad_to_multiple(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether sizes are rounded up as in bfloat16 on a CPU, also in float32, where results can be compared closely."""
    monkeypatch.setattr("cai.attention.cpu_sizes.prefers_padded_sizes", lambda *_: request.param)
    return bool(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file whose one test takes longest is not begun last, when nobody is left to work beside it."""
    items.sort(key=lambda item: item.path.name != "test_whole_path.py")
