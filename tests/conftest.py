"""Fixtures that all tests share: tiny models, built once a session on first use."""

from __future__ import annotations

import os
from collections.abc import Callable

import gpu_paths
import pytest
import tiny_models
import torch

from cai.contracts.model import Model
from cai.models.reference import resolve

gpu_paths.install()

# Test processes share two cores, where threads that wait for each other take several times as long.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    """`tiny("llama")` is the tiny model of that family: one of tiny_models.FAMILIES, or `lora`. Keywords go to
    `resolve`."""
    home = tmp_path_factory.mktemp("models")

    def model(family: str, **options: str) -> Model:
        if not (home / family).exists():
            tiny_models.build(family, home / family)
        return resolve(str(home / family), folder=home, **options)

    return model


@pytest.fixture(params=[False, True], ids=["any-size", "padded"])
def pads_sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether sizes are rounded up as in bfloat16 on a CPU, also in float32, where results can be compared closely."""
    monkeypatch.setattr("cai.attention.cpu_tuning.prefers_padded_sizes", lambda *_: request.param)
    return bool(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts with the slowest test file, so that no worker runs it alone at the end."""
    items.sort(key=lambda item: item.path.name != "test_whole_path.py")
