"""These tests run what a GPU would run, on a CPU: `make test-gpu-paths`, or pytest with CAI_TEST_GPU_PATHS=1."""

from __future__ import annotations

import gpu_paths
import pytest


@pytest.fixture(scope="session", autouse=True)
def requires_gpu_paths() -> None:
    if not gpu_paths.is_on():
        pytest.skip(f"runs what a GPU would run: set {gpu_paths.VARIABLE}=1, as `make test-gpu-paths` does")
