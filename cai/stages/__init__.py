"""The stages of the method, one file each, in the order in which a recipe usually runs them.

A stage file has a config class, which says *what* the stage does and is part of its fingerprint, and a function
`run(config, context) -> dict`, which does it and returns its figures for the run's `summary.json`. No stage imports
another; stages exchange rows. Stage files import torch, transformers and trl inside their functions, so that checking
a recipe needs none of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from cai.contracts.context import Context
from cai.contracts.stage_config import StageConfig

STAGES = {
    "gate": "cai.stages.gate",
    "sample": "cai.stages.sample",
    "revise": "cai.stages.revise",
    "sft": "cai.stages.sft",
    "judge": "cai.stages.judge",
    "prefer": "cai.stages.prefer",
    "reward": "cai.stages.reward",
    "ppo": "cai.stages.ppo",
    "dpo": "cai.stages.dpo",
    "rloo": "cai.stages.rloo",
    "best-of-n": "cai.stages.best_of_n",
    "compare": "cai.stages.compare",
    "comparison": "cai.stages.comparison",
}
"""Kind of stage to the module that defines it."""


def config_class(kind: str) -> type[StageConfig]:
    """The config class of a kind of stage; raises KeyError for an unknown kind."""
    return importlib.import_module(STAGES[kind]).Config  # type: ignore[no-any-return]


def run_function(kind: str) -> Callable[[Any, Context], dict[str, Any]]:
    """The function that does the work of a kind of stage."""
    return importlib.import_module(STAGES[kind]).run  # type: ignore[no-any-return]
