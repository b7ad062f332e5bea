"""The recipe: one YAML file that says what is done, checked as a whole before anything runs.

Reading a recipe resolves every name in it: which stage feeds which, which model a stage uses, who judges, and in which
order the stages run. All of it is checked here, without torch, so that a mistake in the last stage is found before the
first one starts. Left out: what has already run and what that left behind (`cai.run.plan`).
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from cai.constitution import Constitution, load_constitution
from cai.contracts.model import SERVED, Model
from cai.contracts.stage_config import Bars, OutputKind, StageConfig
from cai.contracts.training_config import Reward, RewardedConfig, TrainingConfig
from cai.document import Document, fail, load_document, validate
from cai.document.overrides import override_value
from cai.document.shipped import find
from cai.models.reference import head, resolve
from cai.prompt_sets.prompt_files import MICRO, PromptSet, read_prompt_set
from cai.stages import STAGES, config_class
from cai.storage.rows import HELD_OUT, TOPIC
from cai.templates import template_sets
from cai.text.errors import BadInput, nearest
from cai.text.formatting import Key, describe
from cai.training.rl.reward_functions import check_function
from cai.training.train_fields import check_train

SELF = "self"
"""As a judge: whoever wrote the responses."""
OWN = "model"
"""Among the models of a stage: the recipe's `model:`."""
GATE = "gate"
"""Id of the stage that `gate:` stands for."""
MODELS: tuple[OutputKind, ...] = ("policy", "reward")
"""What a stage may give that is a model."""

Slug = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=60)]


class StageEntry(BaseModel):
    """What every stage has; the rest is checked by the stage's own config class."""

    model_config = ConfigDict(extra="allow")

    id: Slug = Field(description="Name of the stage.")
    kind: str = Field(description="Which stage it is.")


class RecipeDocument(BaseModel):
    """A recipe as it is written."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: Slug = Field(description="Name of the recipe; its runs lie in a folder called so.")
    seed: int = Field(0, ge=0, description="What all randomness is derived from.")
    model: str = Field(
        description="A Hugging Face id, a path, `micro`, or `served:NAME` for one that only a server has: where stages "
        "start that name no model."
    )
    judge: str = Field(
        SELF,
        description="Who judges: `self` = whoever wrote the responses, `model` = the recipe's, a model, or a stage.",
    )
    constitution: str | None = Field(None, description="A file, relative to the recipe, or a shipped name.")
    templates: str = Field("auto", description="Template set; auto = the one recorded with the model, else `default`.")
    chat_template: str | None = Field(None, description="Chat template, a file or Jinja text, for models without one.")
    gate: Bars | None = Field(
        None, description="What the judge must reach on the constitution's examples before anything is built on it."
    )
    prompts: dict[str, PromptSet] = Field(default_factory=dict, description="Prompt sets by name.")
    stages: list[StageEntry] = Field(min_length=1, description="The stages, in the order of the method.")


@dataclass(frozen=True)
class Recipe:
    """A checked recipe, its names resolved. `stages` are in the order in which they run."""

    name: str
    seed: int
    model: str
    judge: str
    constitution: Constitution | None
    templates: str
    chat_template: str | None
    prompts: Mapping[str, PromptSet]
    stages: Mapping[str, StageConfig]
    models: Mapping[str, Model]
    """Every model that is not a stage of this recipe, by the name the recipe gives it."""
    path: Path
    overrides: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """What paths in the recipe are relative to."""
        return self.path.parent


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, or the shipped one of that name, with `a.b.c=value` overrides applied.

    Raises BadInput with `file:line:column`, or the override, and one sentence for the first thing that is wrong.
    """
    path = find(str(name), "recipes", "recipe")
    document = load_document(path)
    for override in overrides:
        document = override_value(document, override)
    return read_recipe(document, tuple(overrides))


def read_recipe(document: Document, overrides: tuple[str, ...] = ()) -> Recipe:
    """The recipe in a document that was read already."""
    written = validate(document, RecipeDocument)
    if written.judge == OWN:
        written = written.model_copy(update={"judge": written.model})
    configs = _stage_configs(document)
    for index, config in enumerate(configs):
        _check_names(document, index, config, configs, written)
    if written.judge != SELF:
        _check_model_name(document, ("judge",), written.judge, {config.id: config for config in configs})
    if written.templates not in (sets := ["auto", *template_sets()]):
        raise fail(
            document,
            ("templates",),
            f"found {written.templates!r}, expected one of {', '.join(sets)}" + nearest(written.templates, sets),
        )
    for name, prompt_set in written.prompts.items():
        _check_source(document, ("prompts", name, "source"), prompt_set.source)
    constitution = _constitution(document, written, configs)
    _check_picks(document, written, configs, constitution)
    configs = [_with_defaults(config, written) for config in configs]
    ordered = _in_order(document, configs)
    stages: dict[str, StageConfig] = {}
    for config in ordered:
        stages[config.id] = _with_judge(document, configs.index(config), config, stages, written)
    stages = _gated(document, written, stages)
    return Recipe(
        name=written.name,
        seed=written.seed,
        model=written.model,
        judge=written.judge,
        constitution=constitution,
        templates=written.templates,
        chat_template=written.chat_template,
        prompts=written.prompts,
        stages=stages,
        models=_resolved_models(document, written, configs, stages),
        path=document.path,
        overrides=overrides,
    )


def inputs_of(config: StageConfig) -> list[str]:
    """The stages whose rows a stage reads, in the order named."""
    return _as_list(getattr(config, "from_", None))


def prompt_sets_of(config: StageConfig) -> list[str]:
    """The prompt sets that a stage reads."""
    return _as_list(getattr(config, "prompts", None))


def models_of(config: StageConfig) -> dict[tuple[Key, ...], str]:
    """Every model or stage that a stage names as a model, by where in its config it is named."""
    named = _named_models(config)
    for index, reward in enumerate(rewards_of(config)):
        named |= {("rewards", index, *keys): name for keys, name in _named_models(reward).items()}
    return named


def _named_models(config: StageConfig | Reward) -> dict[tuple[Key, ...], str]:
    named: dict[tuple[Key, ...], str] = {}
    for field in type(config).names_models:
        value = getattr(config, field, None)
        if isinstance(value, Mapping):
            named |= {(field, key): name for key, name in value.items()}
        elif isinstance(value, str):
            named[(field,)] = value
    return named


def rewards_of(config: StageConfig) -> tuple[Reward, ...]:
    """The sources of reward that a stage scores responses by."""
    return config.rewards if isinstance(config, RewardedConfig) else ()


def needs(config: StageConfig, stages: Mapping[str, Any] | set[str]) -> list[str]:
    """Every stage that must be done before this one."""
    names = [*inputs_of(config), *(name for name in models_of(config).values() if name in stages)]
    return list(dict.fromkeys(names))


def _as_list(value: str | Sequence[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _stage_configs(document: Document) -> list[StageConfig]:
    """Every stage as its own config class, `train:` checked against the library's."""
    configs: list[StageConfig] = []
    for index, entry in enumerate(document.value["stages"]):  # type: ignore[arg-type]
        keys = ("stages", index)
        kind = entry["kind"]  # type: ignore[index, call-overload]
        if kind not in STAGES:
            raise fail(
                document,
                (*keys, "kind"),
                f"found {kind!r}, expected one of {', '.join(STAGES)}" + nearest(str(kind), STAGES),
            )
        config = validate(document, config_class(kind), keys)
        if isinstance(config, TrainingConfig) and config.train_class:
            check_train(document, (*keys, "train"), config.train_class, config.owned)
        configs.append(config)
    return configs


def _check_names(
    document: Document, index: int, config: StageConfig, configs: Sequence[StageConfig], written: RecipeDocument
) -> None:
    """Refuses ids that are taken or could be a model, and names of stages, rows or prompt sets that do not fit."""
    keys = ("stages", index)
    by_id = {each.id: each for each in configs}
    if (first := [each.id for each in configs].index(config.id)) < index:
        raise fail(
            document,
            (*keys, "id"),
            f"found the id {config.id!r} a second time, expected it once; stage {first + 1} has it already",
        )
    if config.id in {SELF, OWN, MICRO, written.model} or _is_model_folder(config.id, document.path.parent):
        raise fail(document, (*keys, "id"), f"{config.id!r} is the name of a model too; call the stage something else")
    for at, name in _at(document, keys, "from", inputs_of(config)):
        if name not in by_id:
            raise fail(document, at, f"found {name!r}, expected a stage of this recipe{nearest(name, by_id)}")
        if by_id[name].gives not in config.takes:
            raise fail(
                document,
                at,
                f"stage {name!r} gives {by_id[name].gives}, but {config.kind} takes "
                f"{' or '.join(config.takes) or 'no rows'}",
            )
    for at, name in _at(document, keys, "prompts", prompt_sets_of(config)):
        if name not in written.prompts:
            known = ", ".join(written.prompts) or "none is there"
            raise fail(
                document,
                at,
                f"found {name!r}, expected a prompt set of this recipe: {known}" + nearest(name, written.prompts),
            )
    for key in config.reads_files:
        if (rows := getattr(config, key)) is not None:
            _check_source(document, (*keys, key, "source"), rows.source)
    for place, name in models_of(config).items():
        _check_model_name(document, (*keys, *place), name, by_id, _expected(place))
    for number, reward in enumerate(rewards_of(config)):
        at = (*keys, "rewards", number)
        if reward.model in {SELF, OWN}:
            raise fail(document, (*at, "model"), f"found {reward.model!r}, expected a `reward` stage or a reward model")
        if reward.function is not None:
            try:
                check_function(reward.function, document.path.parent)
            except BadInput as error:
                raise fail(document, (*at, "function"), str(error)) from None


def _expected(place: tuple[Key, ...]) -> tuple[OutputKind, ...]:
    """What a stage may give that is named as a model at `place` of another one's config."""
    if place[0] != "rewards":
        return MODELS
    return ("reward",) if place[-1] == "model" else ("policy",)


def _check_model_name(
    document: Document,
    at: tuple[Key, ...],
    name: str,
    by_id: Mapping[str, StageConfig],
    expected: tuple[OutputKind, ...] = MODELS,
) -> None:
    if name in by_id:
        if by_id[name].gives not in expected:
            models = [each.id for each in by_id.values() if each.gives in expected]
            what = "a stage that trains a model" if expected == MODELS else f"a stage that gives {expected[0]}"
            raise fail(
                document,
                at,
                f"stage {name!r} gives {by_id[name].gives}, expected {what}"
                + (f": {', '.join(models)}" if models else ""),
            )
    # An id on the hub may look like a stage's id, but so does a stage's id with a slip in it.
    elif (
        re.fullmatch(r"[\w.-]+", name)
        and name not in {SELF, OWN, MICRO}
        and (close := difflib.get_close_matches(name, by_id, n=1, cutoff=0.75))
    ):
        raise fail(document, at, f"found {name!r}, expected a model or a stage; did you mean {close[0]!r}?")


def _at(
    document: Document, keys: tuple[Key, ...], field: str, names: list[str]
) -> Iterator[tuple[tuple[Key, ...], str]]:
    """(position, name) of the names in a key that takes one or a list of them."""
    single = not isinstance(document.node((*keys, field)).value, list)
    for index, name in enumerate(names):
        yield ((*keys, field) if single else (*keys, field, index)), name


def _is_model_folder(name: str, folder: Path) -> bool:
    return any((base / name / "config.json").is_file() for base in (folder, Path()))


def _check_source(document: Document, keys: tuple[Key, ...], source: str) -> None:
    path = document.path.parent / Path(source).expanduser()
    if source != MICRO and not path.exists():
        names = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        raise fail(
            document, keys, f"no such file or folder {source!r}, relative to the recipe" + nearest(path.name, names)
        )


def _constitution(document: Document, written: RecipeDocument, configs: Sequence[StageConfig]) -> Constitution | None:
    if written.constitution is None:
        for index, config in enumerate(configs):
            if config.principle_fields or (config.uses_weights and inputs_of(config)):
                raise fail(
                    document,
                    ("stages", index, "kind"),
                    f"{config.kind} asks about principles, but the recipe names no `constitution:`",
                )
        return None
    path = Path(os.path.normpath(document.path.parent / written.constitution))
    if not path.exists() and Path(written.constitution).suffix:
        names = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        raise fail(
            document,
            ("constitution",),
            f"no such file {written.constitution!r}, relative to the recipe" + nearest(path.name, names),
        )
    return load_constitution(path if path.exists() else written.constitution)


def _check_picks(
    document: Document, written: RecipeDocument, configs: Sequence[StageConfig], constitution: Constitution | None
) -> None:
    """Refuses principles that the constitution does not have, and tags that no prompt of the recipe has."""
    for index, config in enumerate(configs):
        keys = ("stages", index)
        picks: dict[tuple[Key, ...], object] = {keys: getattr(config, "principles", None)}
        picks |= {(*keys, "rewards", number): each.principles for number, each in enumerate(rewards_of(config))}
        for around, principles in picks.items():
            if constitution is None or not isinstance(principles, list):
                continue
            ids = [each.id for each in constitution.principles]
            tagged = config.gives == "texts" and around == keys
            tags = [tag for each in constitution.principles for tag in each.tags] if tagged else []
            known = list(dict.fromkeys([*ids, *tags]))
            for at, name in _at(document, around, "principles", principles):
                if name not in known:
                    raise fail(
                        document,
                        at,
                        f"found {name!r}, expected {'ids or tags' if tags else 'ids'} of "
                        f"principles in {constitution.name!r}{nearest(name, known)}",
                    )
        if constitution is not None and (by_tag := getattr(config, "tag_weights", {})):
            known = sorted({tag for each in constitution.principles for tag in each.tags})
            for tag in by_tag:
                if tag not in known:
                    raise fail(
                        document,
                        (*keys, "tag_weights", tag),
                        f"found {tag!r}, expected a tag of principles in {constitution.name!r}: "
                        f"{', '.join(known) or 'none has any'}{nearest(tag, known)}",
                    )
        mix = getattr(config, "mix", None)
        picked = [
            *_at(document, keys, "only", getattr(config, "only", [])),
            *_at(document, (*keys, "mix"), "human_tags", list(mix.human_tags) if mix else []),
        ]
        for at, tag in picked:
            known = list(dict.fromkeys([*_tags(written, document.path.parent), *_tags_of_people(configs)]))
            if tag not in known and not tag.startswith(TOPIC):
                raise fail(
                    document,
                    at,
                    f"found {tag!r}, a tag that no prompt of this recipe has, expected one of "
                    f"{', '.join(known)}{nearest(tag, known)}",
                )


def _tags_of_people(configs: Sequence[StageConfig]) -> list[str]:
    """The tags of pairs that people labelled."""
    named = [getattr(config, key) for config in configs for key in config.reads_files]
    return [tag for pairs in named if pairs is not None for tag in pairs.tags]


def _tags(written: RecipeDocument, folder: Path) -> list[str]:
    """The tags that prompts of the recipe carry; those of the embedded world without reading its prompts."""
    from cai.micro.conversations import TAGS

    tags: list[str] = []
    for prompt_set in written.prompts.values():
        if prompt_set.source == MICRO:
            tags += [*TAGS, *([HELD_OUT] if prompt_set.hold_out else [])]
        else:
            tags += [tag for prompt in read_prompt_set(prompt_set, folder).prompts for tag in prompt["tags"]]
    return [tag for tag in dict.fromkeys(tags) if not tag.startswith(TOPIC)]


def _with_defaults(config: StageConfig, written: RecipeDocument) -> StageConfig:
    """The config with the recipe's model and judge where the stage names none, or `model` among its models, so that
    they are part of *what*."""
    fields = type(config).model_fields
    update: dict[str, Any] = {}
    if isinstance(models := getattr(config, "models", None), Mapping):
        update["models"] = {key: written.model if name == OWN else name for key, name in models.items()}
    if "model" in fields and getattr(config, "model", None) is None:
        update["model"] = written.model
    if "judge" in fields and ("judge" not in config.model_fields_set or getattr(config, "judge", None) is None):
        update["judge"] = written.judge
    config = config.model_copy(update=update)
    own = written.judge if written.judge != SELF else getattr(config, "model", SELF)
    return _with_raters(config, {OWN: written.model, SELF: own})


def _with_raters(config: StageConfig, means: Mapping[str, str]) -> StageConfig:
    """The config with the judges among its rewards called by the names that theirs stand for."""
    if not (rewards := rewards_of(config)):
        return config
    named = [each.model_copy(update={"judge": means.get(each.judge or "", each.judge)}) for each in rewards]
    return config.model_copy(update={"rewards": tuple(named)})


def _with_judge(
    document: Document, index: int, config: StageConfig, done: Mapping[str, StageConfig], written: RecipeDocument
) -> StageConfig:
    """The config with `judge: self` replaced by the model that wrote the responses; the recipe's where none did."""
    if SELF not in {getattr(config, "judge", None), *(each.judge for each in rewards_of(config))}:
        return config
    writers = list(dict.fromkeys(writer for name in inputs_of(config) for writer in _writers(done, name)))
    if len(writers) > 1:
        raise fail(
            document,
            ("stages", index),
            f"judge: self means whoever wrote the responses, but here these are "
            f"{' and '.join(writers)}; name one as `judge:`",
        )
    writer = writers[0] if writers else written.model
    if rewards_of(config):
        return _with_raters(config, {SELF: writer})
    return config.model_copy(update={"judge": writer})


def _writers(stages: Mapping[str, StageConfig], name: str) -> list[str]:
    """The models that wrote the texts of a stage, or those of the stages it reads."""
    config = stages[name]
    if config.gives == "texts" and (model := getattr(config, "model", None)):
        return [model]
    return [writer for each in inputs_of(config) for writer in _writers(stages, each)]


def _in_order(document: Document, configs: Sequence[StageConfig]) -> list[StageConfig]:
    """The stages so that each comes after all it needs, otherwise as written. Raises BadInput for a circle."""
    by_id = {config.id: config for config in configs}
    ordered: dict[str, StageConfig] = {}

    def visit(config: StageConfig, path: tuple[str, ...]) -> None:
        if config.id in ordered:
            return
        if config.id in path:
            circle = " -> ".join([*path[path.index(config.id) :], config.id])
            raise fail(document, ("stages", configs.index(config)), f"stages wait for each other in a circle: {circle}")
        for name in needs(config, by_id):
            visit(by_id[name], (*path, config.id))
        ordered[config.id] = config

    for config in configs:
        visit(config, ())
    return list(ordered.values())


def _gated(document: Document, written: RecipeDocument, stages: dict[str, StageConfig]) -> dict[str, StageConfig]:
    """The stages with the recipe's gate among them: first, or right after the stage that trains its judge."""
    if written.gate is None:
        return stages
    if written.constitution is None or written.judge == SELF:
        wanted = "a `constitution:` with examples" if written.constitution is None else "a `judge:` that has a name"
        raise fail(document, ("gate",), f"found a gate, expected {wanted} beside it")
    if GATE in stages:
        raise fail(document, ("gate",), f"found a gate and a stage {GATE!r}, expected one of them")
    given = {"id": GATE, "kind": "gate", "judge": written.judge, "bars": written.gate}
    gate = config_class("gate").model_validate(given)
    ordered: dict[str, StageConfig] = {} if written.judge in stages else {GATE: gate}
    for id, config in stages.items():
        ordered[id] = config
        if id == written.judge:
            ordered[GATE] = gate
    return ordered


def _resolved_models(
    document: Document, written: RecipeDocument, configs: Sequence[StageConfig], stages: Mapping[str, StageConfig]
) -> dict[str, Model]:
    """Every model that is no stage, found or refused where it is named."""
    named: dict[str, tuple[Key, ...]] = {written.model: ("model",)}
    if written.judge not in stages and written.judge != SELF:
        named.setdefault(written.judge, ("judge",))
    for index, config in enumerate(configs):
        for place, name in models_of(stages[config.id]).items():
            if name not in stages:
                named.setdefault(name, ("stages", index, *place))
                if name.startswith(SERVED) and place[0] == "rewards" and place[-1] == "model":
                    raise fail(
                        document,
                        ("stages", index, *place),
                        f"found {name!r}, which only a server has, expected a reward model whose weights are here",
                    )
                if isinstance(config, TrainingConfig) and name.startswith(SERVED) and place[0] != "rewards":
                    raise fail(
                        document,
                        ("stages", index),
                        f"{config.kind} trains {name!r}, which only a server has, expected a model whose weights are "
                        f"here: a folder or a hub id",
                    )
    if written.model in stages:
        raise fail(document, ("model",), f"found {describe(written.model)}, a stage of this recipe, expected a model")
    models = {}
    for name, keys in named.items():
        try:
            models[name] = resolve(
                name, templates=written.templates, chat_template=written.chat_template, folder=document.path.parent
            )
        except BadInput as error:
            raise fail(document, keys, str(error)) from None
    for index, config in enumerate(configs):
        for place, name in models_of(stages[config.id]).items():
            if name in models and place[0] == "rewards":
                _check_head(document, ("stages", index, *place), models[name])
    return models


def _check_head(document: Document, at: tuple[Key, ...], model: Model) -> None:
    """Refuses a language model as a reward model and the other way round, where the model's folder says what it is."""
    wanted = {"model": "score", "judge": "language"}[str(at[-1])]
    nouns = {"score": "a sequence classifier, which gives a score", "language": "a language model, which writes"}
    if (found := head(model)) is not None and found != wanted:
        raise fail(document, at, f"{model.name!r} is {nouns[found]}, expected {nouns[wanted]}")
