"""Writes a trained model: weights or adapter, tokenizer, model card and `cai.json`."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cai.contracts.model import Model
from cai.models.loading import silence_transformers
from cai.models.reference import ADAPTER, FACTS, read_json_object


def save_model(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, start: Model, facts: Mapping[str, object],
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """Writes what `resolve` and the loaders read: weights or an adapter, tokenizer with template, card, `cai.json`.

    `start` is the model that training started from; `facts` (stage, recipe, constitution …) go into `cai.json` and the
    card. `state_dict` holds the gathered weights where the model's own are partitioned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with silence_transformers():
        model.save_pretrained(folder, state_dict=state_dict)
    tokenizer.save_pretrained(folder)
    if (folder / ADAPTER).is_file():
        # An absolute path for PEFT's own loaders; `cai.json` has the relative one in case both folders move together.
        config = read_json_object(folder / ADAPTER)
        config["base_model_name_or_path"] = start.path
        (folder / ADAPTER).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    base = start.path
    if start.name == "micro":
        base = "micro"
    elif Path(start.path).is_absolute():
        base = os.path.relpath(start.path, folder.resolve())
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "peft")}
    written = {**facts, "base": base, "templates": start.templates, "versions": versions}
    (folder / FACTS).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(start, facts, adapter=(folder / ADAPTER).is_file()), encoding="utf-8")


def _card(start: Model, facts: Mapping[str, object], *, adapter: bool) -> str:
    rows = "".join(f"| {key} | {value} |\n" for key, value in facts.items() if isinstance(value, str | int | float))
    base = f"base_model: {start.path}\n" if not Path(start.path).is_absolute() else ""
    return (
        f"---\nlibrary_name: {'peft' if adapter else 'transformers'}\n{base}tags: [constitutional-ai, rlaif]\n---\n\n"
        f"# {facts.get('stage', 'checkpoint')}, trained from {start.name}\n\n"
        f"Made by `cai`, a Constitutional AI / RLAIF framework. What it was made with is in `{FACTS}`.\n\n"
        f"| | |\n|---|---|\n| started from | {start.name} |\n{rows}"
    )
