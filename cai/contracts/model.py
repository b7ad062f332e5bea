"""A model as a recipe names it. How it is found, loaded and saved is in `cai.models`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """One model as a recipe names it. `path` is an absolute folder or a hub id; `chat_template` is Jinja text."""

    name: str
    path: str
    templates: str = "default"
    chat_template: str | None = None

    @property
    def served(self) -> bool:
        """Whether the model is known by its name at a server alone: no weights, no tokenizer."""
        return self.path.startswith(SERVED)


SERVED = "served:"
"""Begins the name of a model that a server has and this machine has not."""
