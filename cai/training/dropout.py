"""Dropout is off where log-probabilities or scores are compared, so that equal weights give equal numbers.

TRL 1.16 does that for the module `nn.Dropout` alone. Other models pass a probability to a function: OPT, BioGPT and
XGLM keep it as an attribute of their modules, Falcon and Persimmon read it from their config at each forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from cai.attention.token_trees import dropout_attributes

_CONFIGURED = "_configured_dropout"
"""Attribute of a model: (config, field, probability) of each field of its configs that was set to zero."""


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to zero: in the modules of a model, of its adapter, and in their configs.

    A config is saved with its model: `configured_dropout` restores it for as long as that takes.
    """
    configs: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        for name in dropout_attributes(module):
            setattr(module, name, 0.0)
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig):
            configs[id(config)] = config
    fields = [
        (config, name, value)
        for config in configs.values()
        for name, value in vars(config).items()
        if "drop" in name and isinstance(value, float) and value > 0
    ]
    for config, name, _ in fields:
        setattr(config, name, 0.0)
    setattr(model, _CONFIGURED, [*_configured(model), *fields])


@contextlib.contextmanager
def configured_dropout(model: nn.Module) -> Iterator[None]:
    """Within the block, in which a model is saved, its configs have the probabilities that they were loaded with."""
    for config, name, value in _configured(model):
        setattr(config, name, value)
    try:
        yield
    finally:
        for config, name, _ in _configured(model):
            setattr(config, name, 0.0)


def _configured(model: Any) -> list[tuple[PreTrainedConfig, str, float]]:
    """Empty where dropout is as configured."""
    return getattr(model, _CONFIGURED, [])
