"""What would run, what is reused, and why: a stage's fingerprint and what of it has changed.

A fingerprint covers what the stage computes from: its resolved config, the outputs of the stages that it reads, the
principles' requests and templates that reach a model in it, the rows of its prompt sets, the identity of its models,
the seed. It leaves out where it runs. Every part is kept by name in the stage's folder, so that a changed fingerprint
can say what has changed. Opening an engine, and torch, are left out here.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cai.contracts.model import Model
from cai.contracts.stage_config import StageConfig
from cai.models.reference import identity, resolve
from cai.prompt_sets.prompt_files import PairSet, load_human_pairs, read_prompt_set
from cai.run.recipe import MODELS, Recipe, inputs_of, models_of, needs, prompt_sets_of, rewards_of
from cai.storage import run_folder
from cai.storage.files import file_digest, read_json
from cai.storage.rows import HELD_OUT, Prompt, canonical_json, stable_id
from cai.templates import load_templates
from cai.text.errors import BadInput
from cai.training.rl.reward_functions import function_place

Parts = dict[str, Any]
"""What a fingerprint is made of, by name: `config.n`, `input.votes`, `weight.no-crime` ..."""


@dataclass(frozen=True)
class Step:
    """What is to be done about one stage. `folder` is None while a stage that it needs has yet to run."""

    config: StageConfig
    status: Literal["reused", "runs", "continues", "waits"]
    reason: str
    folder: Path | None = None
    parts: Parts = field(default_factory=dict)
    done: run_folder.Finished | None = None

    @property
    def id(self) -> str:
        """The stage's id."""
        return self.config.id


class Planner:
    """Fingerprints the stages of one recipe against what lies in the folder of its run."""

    def __init__(self, recipe: Recipe, run: Path, offline: bool = True) -> None:
        self.recipe = recipe
        self.run = run
        self.offline = offline
        self.notes: list[str] = []
        """What the user should know about the prompts."""
        self._latest = run_folder.latest(run)
        self._prompts: dict[str, list[Prompt]] = {}
        self._prompt_digests: dict[str, str] = {}
        self._identities: dict[str, str] = {}

    def prompts(self, name: str) -> list[Prompt]:
        """The prompts of a set, read once."""
        if name not in self._prompts:
            read = read_prompt_set(self.recipe.prompts[name], self.recipe.folder)
            self._prompts[name] = read.prompts
            self._prompt_digests[name] = stable_id(read.prompts)
            if read.duplicates:
                self.notes.append(
                    f"prompts {name}: {read.duplicates:,} of {read.rows:,} rows are there more than once "
                    "and were taken once"
                )
        return self._prompts[name]

    def step(self, config: StageConfig, done: Mapping[str, run_folder.Finished]) -> Step:
        """What is to be done about a stage, given the stages that are done."""
        waiting = [name for name in needs(config, set(self.recipe.stages)) if name not in done]
        if waiting:
            return Step(config, "waits", f"because {' and '.join(waiting)} would run")
        parts = self.parts(config, done)
        folder = self.run / f"{config.id}-{stable_id(parts)}"
        if found := run_folder.finished(folder):
            return Step(config, "reused", "", folder, parts, found)
        if batches := run_folder.n_batches(folder):
            return Step(config, "continues", f"{batches} batches are on disk", folder, parts)
        if (folder / run_folder.STAGE).exists():
            return Step(config, "runs", "it did not come to its end", folder, parts)
        return Step(config, "runs", self._why(config, parts), folder, parts)

    def model(self, name: str, done: Mapping[str, run_folder.Finished]) -> Model:
        """The model that a name means: a finished stage's, called by the stage's id, or one from outside."""
        if name not in done:
            return self.recipe.models[name]
        found = resolve(
            str(done[name].model.resolve()),
            templates=self.recipe.templates,
            chat_template=self.recipe.chat_template,
            folder=self.recipe.folder,
        )
        return dataclasses.replace(found, name=name)

    def parts(self, config: StageConfig, done: Mapping[str, run_folder.Finished]) -> Parts:
        """Everything that the stage's output depends on, by name. All that it needs must be done."""
        parts: Parts = {"revision": config.revision, "seed": self.recipe.seed}
        parts |= _flat("config", config.model_dump(mode="json", by_alias=True))
        parts |= {f"input.{name}": done[name].digest for name in inputs_of(config)}
        for name in prompt_sets_of(config):
            self.prompts(name)
            parts[f"prompts.{name}"] = self._prompt_digests[name]
        for key in config.reads_files:
            if (given := getattr(config, key)) is not None:
                parts[f"file.{key}"] = _content_digest(self.recipe.folder / Path(given.source).expanduser())
        for reward in rewards_of(config):
            if reward.function is not None:
                path, _ = function_place(reward.function, self.recipe.folder)
                parts[f"file.{reward.called}"] = _content_digest(path)
        for name in dict.fromkeys(models_of(config).values()):
            model = self.model(name, done)
            parts[f"model.{name}"] = done[name].digest if name in done else self._identity(model)
            templates = load_templates(model.templates)
            parts |= {f"template.{ask}.{templates.name}": templates.digest(ask) for ask in config.template_names}
            if templates.chat_template is not None:  # lent, with what ends a turn, to a model that has none
                parts[f"template.chat.{templates.name}"] = stable_id(templates.chat_template, templates.stop)
            if model.chat_template is not None:
                parts["chat template"] = stable_id(model.chat_template)
        return parts | self._constitution_parts(config)

    def check_prompts(self) -> None:
        """Refuses a conversation that is both learned from and held out, and says in which sets it is.

        Notes the sets that are learned from and compared on."""
        used: dict[str, set[str]] = {}
        for config in self.recipe.stages.values():
            for name in prompt_sets_of(config):
                used.setdefault(name, set()).add(config.gives)
        sources = {
            name: {
                canonical_json(each["messages"]): gives == {"comparison"} or HELD_OUT in each["tags"]
                for each in self.prompts(name)
            }
            for name, gives in used.items()
        } | self._human_prompts()
        where: dict[str, tuple[str, bool]] = {}
        clashes: Counter[tuple[str, str]] = Counter()
        for name, conversations in sources.items():
            for conversation, held_out in conversations.items():
                other, other_held_out = where.setdefault(conversation, (name, held_out))
                if held_out != other_held_out:
                    clashes[(name, other) if held_out else (other, name)] += 1
        if clashes:
            (held, learned), count = clashes.most_common(1)[0]
            raise BadInput(
                f"{self.recipe.path}: {count} prompts of the held-out set {held!r} are in {learned!r} too, "
                "word for word; take them out of one, or say `hold_out:` in one place"
            )
        trained_on = self._trained_on()
        for name, gives in used.items():
            count = sum(not held_out for held_out in sources[name].values())
            if count and "comparison" in gives and name in trained_on:
                self.notes.append(
                    f"prompts {name}: {count:,} prompts are learned from and compared on too; `hold_out: "
                    "true` keeps a set out of training"
                )

    def _human_prompts(self) -> dict[str, dict[str, bool]]:
        """Whether each conversation of the pairs that people labelled is held out, by the key that names the pairs."""
        return {
            f"{config.id}.{key}": {
                canonical_json(row["prompt"]): HELD_OUT in row["tags"]
                for row in load_human_pairs(pairs, self.recipe.folder).preferences
            }
            for config in self.recipe.stages.values()
            for key in config.reads_files
            if isinstance(pairs := getattr(config, key), PairSet)
        }

    def _trained_on(self) -> set[str]:
        """The prompt sets whose rows reach a stage that trains a model."""
        reached: set[str] = set()
        for config in reversed(list(self.recipe.stages.values())):
            if config.gives in MODELS or config.id in reached:
                reached.update([config.id, *inputs_of(config)])
        return {name for id in reached for name in prompt_sets_of(self.recipe.stages[id])}

    def _constitution_parts(self, config: StageConfig) -> Parts:
        constitution = self.recipe.constitution
        if constitution is None or not (config.principle_fields or config.uses_weights):
            return {}
        parts: Parts = {"constitution": constitution.name, "principles": [each.id for each in constitution.principles]}
        named = getattr(config, "principles", None)
        for principle in constitution.principles:
            if isinstance(named, list):
                parts[f"principle.{principle.id}.named"] = [tag for tag in principle.tags if tag in named]
            for ask in config.principle_fields:
                parts[f"principle.{principle.id}.{ask}"] = getattr(principle, ask)
            if config.principle_fields:
                parts[f"principle.{principle.id}.applies_to"] = principle.applies_to and list(principle.applies_to)
            if config.uses_examples:
                parts[f"principle.{principle.id}.examples"] = stable_id(
                    [[each.messages, each.better, each.worse] for each in principle.examples]
                )
            if config.uses_weights:
                parts[f"weight.{principle.id}"] = principle.weighted(getattr(config, "tag_weights", {}))
        return parts

    def _identity(self, model: Model) -> str:
        if model.path not in self._identities:
            self._identities[model.path] = identity(model, offline=self.offline)
        return self._identities[model.path]

    def _why(self, config: StageConfig, parts: Parts) -> str:
        """What differs from the stage's latest folder, in words."""
        folder = self._latest.get(config.id)
        before = (read_json(folder / run_folder.STAGE) or {}).get("parts") if folder else None
        if before is None:
            return "it has not run yet"
        changed = {name for name in {*before, *parts} if before.get(name) != parts.get(name)}
        return "; ".join(_in_words(changed, before, parts)) or "it was removed"


def _content_digest(path: Path) -> str:
    """What lies at a path that a recipe names: a file, a folder's files, or nothing."""
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    return stable_id([(str(each.relative_to(path)), file_digest(each)) for each in files if each.is_file()])


def _flat(prefix: str, value: Mapping[str, Any]) -> Parts:
    parts: Parts = {}
    for key, each in value.items():
        name = f"{prefix}.{key}"
        if isinstance(each, Mapping) and each:
            parts |= _flat(name, each)
        else:
            parts[name] = each
    return parts


def _in_words(changed: set[str], before: Parts, parts: Parts) -> list[str]:
    """Each kind of change as a phrase, those most likely to be meant first."""
    groups: dict[str, list[str]] = {}
    for name in sorted(changed):
        kind, _, rest = name.partition(".")
        groups.setdefault(kind, []).append(rest)
    words = []
    if "revision" in groups:
        words.append("this version of cai computes it differently")
    if "seed" in groups:
        words.append(f"seed {before.get('seed')} -> {parts.get('seed')}")
    for key in groups.get("config", []):
        old, new = before.get(f"config.{key}"), parts.get(f"config.{key}")
        words.append(f"{key} {_short(old)} -> {_short(new)}")
    if "weight" in groups:
        words.append(f"weight of {_some(groups['weight'])} changed")
    if "principle" in groups:
        ids = dict.fromkeys(rest.rpartition(".")[0] for rest in groups["principle"])
        words.append(f"principle {_some(list(ids))} changed")
    elif "principles" in groups:
        words.append("principles came, went or moved")
    if "constitution" in groups:
        words.append("constitution has another name")
    nouns = {"input": "input", "model": "model", "prompts": "prompt set", "file": "file of", "template": "template"}
    for kind, noun in nouns.items():
        if kind in groups:
            words.append(f"{noun} {_some(groups[kind])} changed")
    if "chat template" in groups:
        words.append("chat template changed")
    return words


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _short(value: object) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 30 else text[:29] + "…"
