"""Runs on a CPU what a GPU would run: tuning for CPUs off, and the settings of the shipped GPU profiles.

`CAI_TEST_GPU_PATHS=1` in the environment of pytest switches the tuning off in all tests of the run and in the processes
that they start with this folder's `gpu_paths_site` on PYTHONPATH. `make test-gpu-paths` runs the tests of
tests/gpu_paths that way, and those tests elsewhere whose results must not depend on the tuning.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

VARIABLE = "CAI_TEST_GPU_PATHS"
SITE = Path(__file__).parent / "gpu_paths_site"
"""A folder with a module that Python imports at its start."""
GPU_SETTINGS = {"dtype": "bfloat16", "gradient_checkpointing": True}
"""What the shipped profiles for GPUs set, and the profile `cpu` does not."""
_TUNING = "cai.attention.cpu_tuning"


def is_on() -> bool:
    return VARIABLE in os.environ


def install() -> None:
    """Switches tuning for CPUs off in this process, at once or when its module is imported; not without the variable.

    Off are the language-model head for CPUs, token trees, padded sizes, several length buckets, passes of limited size
    and attention in float32: training computes padded rows with TRL's head.
    """
    if not is_on():
        return
    if _TUNING in sys.modules:
        _switch_off(sys.modules[_TUNING])
    else:
        sys.meta_path.insert(0, _SwitchOffOnImport())


def _switch_off(cpu_tuning: Any) -> None:
    cpu_tuning.applies_to = lambda device: False


class _SwitchOffOnImport(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _TUNING:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_switch_off(module: Any) -> None:
            execute(module)
            _switch_off(module)

        spec.loader.exec_module = execute_and_switch_off  # type: ignore[method-assign]
        return spec
