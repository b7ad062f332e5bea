"""Fingerprints: everything that a stage's output depends on, by name, and what of it has changed, in words.

A fingerprint covers the resolved config, the outputs of the stages that are read, their failures where a stage reads
those too, what of the principles and templates reaches a model, the rows of prompt sets, the files that are named, the
identity of the models, and the seed. It leaves out where the stage runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cai.contracts.model import Model
from cai.contracts.references import FileReference, PrincipleReference, StageReference, references
from cai.contracts.stage_config import StageConfig
from cai.models.reference import identity, resolve
from cai.prompt_sets.prompt_rows import read_prompt_set
from cai.run.recipe import Recipe
from cai.run.recipe_names import inputs_of, models_of, prompt_sets_of
from cai.storage.files import file_digest
from cai.storage.journal import failures_digest
from cai.storage.rows import Prompt, stable_id
from cai.storage.run_folder import Finished
from cai.templates import load_templates
from cai.training.rl.reward_functions import function_place

Parts = dict[str, Any]
"""What a fingerprint is made of, by name: `config.n`, `input.votes`, `weight.no-crime` ..."""


class Fingerprints:
    """The fingerprints of one recipe's stages. Prompt sets and models are read once."""

    def __init__(self, recipe: Recipe, offline: bool = True) -> None:
        self.recipe = recipe
        self.offline = offline
        self.notes: list[str] = []
        """What the user should know about the prompts."""
        self._prompts: dict[str, list[Prompt]] = {}
        self._prompt_digests: dict[str, str] = {}
        self._identities: dict[str, str] = {}

    def prompts(self, name: str) -> list[Prompt]:
        """The prompts of a set, read once."""
        if name not in self._prompts:
            rows = read_prompt_set(self.recipe.prompts[name], self.recipe.folder)
            self._prompts[name] = rows.prompts
            self._prompt_digests[name] = stable_id(rows.prompts)
            if rows.duplicates:
                self.notes.append(
                    f"prompts {name}: {rows.duplicates:,} of {rows.rows:,} rows are there more than once "
                    "and were taken once"
                )
            if rows.column_like_tags is not None:
                self.notes.append(
                    f"prompts {name}: found no column 'tags', and {rows.column_like_tags!r} is not read; say "
                    f"`columns: {{tags: {rows.column_like_tags}}}` if it holds tags"
                )
        return self._prompts[name]

    def model(self, name: str, done: Mapping[str, Finished]) -> Model:
        """The model that a name means: a finished stage's, called by the stage's id, or one from outside."""
        if name not in done:
            return self.recipe.models[name]
        model = resolve(
            str(done[name].model.resolve()),
            templates=self.recipe.templates,
            chat_template=self.recipe.chat_template,
            folder=self.recipe.folder,
        )
        return dataclasses.replace(model, name=name)

    def parts(self, config: StageConfig, done: Mapping[str, Finished]) -> Parts:
        """Everything that the stage's output depends on, by name. All that it needs must be done."""
        parts: Parts = {"revision": config.revision, "seed": self.recipe.seed}
        parts |= _flat("config", config.model_dump(mode="json", by_alias=True))
        parts |= {f"input.{name}": done[name].digest for name in inputs_of(config)}
        parts |= {
            f"failures.{name}": failures_digest(done[name].folder, with_reasons=target.failures == "reasons")
            for _, target, name in references(config, StageReference)
            if target.failures
        }
        for name in prompt_sets_of(config):
            self.prompts(name)
            parts[f"prompts.{name}"] = self._prompt_digests[name]
        for _, target, name in references(config, FileReference):
            parts[f"file.{name}"] = _path_digest(self._path_of(target, name))
        for name in models_of(config):
            model = self.model(name, done)
            parts[f"model.{name}"] = done[name].digest if name in done else self._identity(model)
            templates = load_templates(model.templates)
            parts |= {
                f"template.{template}.{templates.name}": templates.digest(template)
                for template in config.template_names()
            }
            if templates.chat_template is not None:  # for a model that has none of its own
                parts[f"template.chat.{templates.name}"] = stable_id(templates.chat_template, templates.stop)
            if model.chat_template is not None:
                parts["chat template"] = stable_id(model.chat_template)
        return parts | self._constitution_parts(config)

    def _constitution_parts(self, config: StageConfig) -> Parts:
        constitution, fields = self.recipe.constitution, config.principle_fields()
        if constitution is None or not fields:
            return {}
        parts: Parts = {
            "constitution": constitution.name,
            "principles": [principle.id for principle in constitution.principles],
        }
        ids = set(parts["principles"])
        named = references(config, PrincipleReference)
        tags = {name for _, target, name in named if target.tag_only or name not in ids}
        lists_tags = bool(tags) or any(target.lists_tags for _, target, _ in named)
        for principle in constitution.principles:
            for name in fields:
                part = f"weight.{principle.id}" if name == "weight" else f"principle.{principle.id}.{name}"
                parts[part] = _plain(getattr(principle, name))
            if set(fields) - {"weight"}:
                parts[f"principle.{principle.id}.applies_to"] = principle.applies_to and list(principle.applies_to)
            if lists_tags:
                parts[f"principle.{principle.id}.tags"] = [tag for tag in principle.tags if tag in tags]
        return parts

    def _path_of(self, target: FileReference, name: str) -> Path:
        if target.function:
            return function_place(name, self.recipe.folder)[0]
        return self.recipe.folder / Path(name).expanduser()

    def _identity(self, model: Model) -> str:
        if model.path not in self._identities:
            self._identities[model.path] = identity(model, offline=self.offline)
        return self._identities[model.path]


def changes_in_words(changed: set[str], before: Parts, parts: Parts) -> list[str]:
    """Each kind of change as a phrase, those most likely to be meant first."""
    groups: dict[str, list[str]] = {}
    for name in sorted(changed):
        kind, _, rest = name.partition(".")
        groups.setdefault(kind, []).append(rest)
    phrases = []
    if "revision" in groups:
        phrases.append("this version of cai computes it differently")
    if "seed" in groups:
        phrases.append(f"seed {before.get('seed')} -> {parts.get('seed')}")
    for key in groups.get("config", []):
        old, new = before.get(f"config.{key}"), parts.get(f"config.{key}")
        phrases.append(f"{key} {_short(old)} -> {_short(new)}")
    if "weight" in groups:
        phrases.append(f"weight of {first_few(groups['weight'])} changed")
    if "principle" in groups:
        ids = dict.fromkeys(rest.rpartition(".")[0] for rest in groups["principle"])
        phrases.append(f"principle {first_few(list(ids))} changed")
    elif "principles" in groups:
        phrases.append("principles came, went or moved")
    if "constitution" in groups:
        phrases.append("constitution has another name")
    nouns = {
        "input": "input",
        "failures": "failures of",
        "model": "model",
        "prompts": "prompt set",
        "file": "file",
        "template": "template",
    }
    for kind, noun in nouns.items():
        if kind in groups:
            phrases.append(f"{noun} {first_few(groups[kind])} changed")
    if "chat template" in groups:
        phrases.append("chat template changed")
    return phrases


def first_few(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _path_digest(path: Path) -> str:
    """What lies at a path that a recipe names: a file, a folder's files, or nothing."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return stable_id([(str(file.relative_to(path)), file_digest(file)) for file in files if file.is_file()])


def _plain(value: object) -> object:
    """A principle's field as JSON holds it: examples by their digest."""
    if isinstance(value, tuple):
        return stable_id([[example.messages, example.better, example.worse] for example in value])
    return value


def _flat(prefix: str, mapping: Mapping[str, Any]) -> Parts:
    parts: Parts = {}
    for key, value in mapping.items():
        name = f"{prefix}.{key}"
        if isinstance(value, Mapping) and value:
            parts |= _flat(name, value)
        else:
            parts[name] = value
    return parts


def _short(value: object) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 30 else text[:29] + "…"
