"""What the names in a recipe mean: defaults, `model` and `self`, parts of composite stages, order, models on disk.

Names are found by `cai.contracts.references`, whatever the keys are called that hold them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cai.contracts.model import SERVED, Model
from cai.contracts.references import ModelReference, PromptSetReference, StageReference, Target, references, renamed
from cai.contracts.stage_config import CompositeConfig, StageConfig
from cai.document import Document, Problems, error_at
from cai.models import model_files, reference
from cai.models.model_files import Role
from cai.run.recipe_document import OWN, SELF, RecipeDocument
from cai.stages import config_class
from cai.text.errors import BadInput
from cai.text.formatting import Key, describe, dotted

GATE = "gate"
"""Id of the stage that `gate:` stands for."""


class Resolved(NamedTuple):
    """The stages of a recipe, their names resolved, in the order in which they run."""

    stages: dict[str, StageConfig]
    composites: dict[str, list[str]]
    models: dict[str, Model]
    places: dict[str, str]
    """Where the recipe names each of the models, as an error message begins."""


def inputs_of(config: StageConfig) -> list[str]:
    """The stages whose rows a stage reads, in the order named."""
    return [name for _, _, name in references(config, StageReference)]


def prompt_sets_of(config: StageConfig) -> list[str]:
    """The prompt sets that a stage reads."""
    return [name for _, _, name in references(config, PromptSetReference)]


def models_of(config: StageConfig) -> list[str]:
    """Every model, or stage that trains one, that a stage names, each once."""
    return list(dict.fromkeys(name for _, _, name in references(config, ModelReference)))


def needs(config: StageConfig, stage_ids: Mapping[str, object] | set[str]) -> list[str]:
    """Every stage that must be done before this one."""
    models = [name for name in models_of(config) if name in stage_ids]
    return list(dict.fromkeys([*inputs_of(config), *models]))


def resolve(document: Document, written: RecipeDocument, configs: Sequence[StageConfig], runs: Path) -> Resolved:
    """Resolves every name. `configs` are the stages as they are written, their names checked; `runs` is the folder in
    which RUN/STAGE is looked up.

    Raises BadInput for stages that wait for each other, for a `self` that stands for two models, and for models that do
    not exist or cannot do what they are named for.
    """
    positions: dict[str, tuple[Key, ...]] = {config.id: ("stages", index) for index, config in enumerate(configs)}
    composites: dict[str, list[str]] = {}
    expanded: list[StageConfig] = []
    for config in configs:
        config = _with_recipe_models(config, written)
        parts = _parts(config)
        if isinstance(config, CompositeConfig):
            composites[config.id] = [part.id for part in parts]
            positions |= {part.id: positions[config.id] for part in parts}
        expanded += [_with_recipe_models(part, written) for part in parts]
    stages: dict[str, StageConfig] = {}
    for config in _in_order(document, positions, expanded):
        stages[config.id] = _with_writer(document, positions[config.id], config, stages, written)
    stages = _with_gate(document, written, stages)
    places: dict[tuple[tuple[Key, ...], str], tuple[Key, ...]] = {
        (positions[config.id], name): (*positions[config.id], *keys)
        for config in configs
        for keys, _, name in references(config, ModelReference)
    }
    models, model_places = _models(document, written, positions, places, stages, runs)
    return Resolved(stages, composites, models, model_places)


def _with_recipe_models(config: StageConfig, written: RecipeDocument) -> StageConfig:
    """The config with the recipe's model and judge where a name is absent, and with `model` and `self` resolved, but
    for a `self` that stands for whoever wrote the responses."""

    def filled(_: tuple[Key, ...], target: Target, name: str | None) -> str | None:
        if not isinstance(target, ModelReference):
            return name
        if name is None and target.absent is not None:
            name = written.model if target.absent == "model" else written.judge
        return written.model if name == OWN else name

    config = renamed(config, filled)
    starts = [name for _, target, name in references(config, ModelReference) if target.trained]
    meanings = {
        "model": written.model,
        "judge": written.judge if written.judge != SELF else next(iter(starts), SELF),
        "writer": SELF,
        None: SELF,
    }

    def without_self(_: tuple[Key, ...], target: Target, name: str | None) -> str | None:
        return meanings[target.self_is] if isinstance(target, ModelReference) and name == SELF else name

    return renamed(config, without_self)


def _parts(config: StageConfig) -> list[StageConfig]:
    """The stages that a composite consists of; the stage itself where it is none."""
    if not isinstance(config, CompositeConfig):
        return [config]
    return [config_class(part["kind"]).model_validate(part) for part in config.parts()]


def _in_order(
    document: Document, positions: Mapping[str, tuple[Key, ...]], configs: Sequence[StageConfig]
) -> list[StageConfig]:
    """The stages so that each comes after all it needs, otherwise as written. Raises BadInput for a circle."""
    by_id = {config.id: config for config in configs}
    ordered: dict[str, StageConfig] = {}

    def visit(config: StageConfig, path: tuple[str, ...]) -> None:
        if config.id in ordered:
            return
        if config.id in path:
            circle = " -> ".join([*path[path.index(config.id) :], config.id])
            raise error_at(document, positions[config.id], f"stages wait for each other in a circle: {circle}")
        for name in needs(config, by_id):
            visit(by_id[name], (*path, config.id))
        ordered[config.id] = config

    for config in configs:
        visit(config, ())
    return list(ordered.values())


def _with_writer(
    document: Document,
    position: tuple[Key, ...],
    config: StageConfig,
    earlier: Mapping[str, StageConfig],
    written: RecipeDocument,
) -> StageConfig:
    """The config with `self` replaced by the model that wrote the texts it reads; the recipe's where none did."""
    if all(name != SELF for _, _, name in references(config, ModelReference)):
        return config
    writers = list(dict.fromkeys(writer for stage_id in inputs_of(config) for writer in _writers(earlier, stage_id)))
    if len(writers) > 1:
        raise error_at(
            document,
            position,
            f"judge: self means whoever wrote the responses, but here these are "
            f"{' and '.join(writers)}; name one as `judge:`",
        )
    writer = writers[0] if writers else written.model
    return renamed(
        config, lambda _, target, name: writer if isinstance(target, ModelReference) and name == SELF else name
    )


def _writers(stages: Mapping[str, StageConfig], stage_id: str) -> list[str]:
    """The models that wrote the texts of a stage, or those of the stages it reads."""
    config = stages[stage_id]
    if writers := [name for _, target, name in references(config, ModelReference) if target.writes]:
        return writers
    return [writer for name in inputs_of(config) for writer in _writers(stages, name)]


def _with_gate(document: Document, written: RecipeDocument, stages: dict[str, StageConfig]) -> dict[str, StageConfig]:
    """The stages with the recipe's gate among them: first, or right after the stage that trains its judge."""
    if written.gate is None:
        return stages
    if written.constitution is None or written.judge == SELF:
        expected = "a `constitution:` with examples" if written.constitution is None else "a `judge:` that has a name"
        raise error_at(document, ("gate",), f"found a gate, expected {expected} beside it")
    if GATE in stages:
        raise error_at(document, ("gate",), f"found a gate and a stage {GATE!r}, expected one of them")
    gate = config_class("gate").model_validate(
        {"id": GATE, "kind": "gate", "judge": written.judge, "bars": written.gate}
    )
    ordered: dict[str, StageConfig] = {} if written.judge in stages else {GATE: gate}
    for stage_id, config in stages.items():
        ordered[stage_id] = config
        if stage_id == written.judge:
            ordered[GATE] = gate
    return ordered


def _models(
    document: Document,
    written: RecipeDocument,
    positions: Mapping[str, tuple[Key, ...]],
    places_in_stages: Mapping[tuple[tuple[Key, ...], str], tuple[Key, ...]],
    stages: Mapping[str, StageConfig],
    runs: Path,
) -> tuple[dict[str, Model], dict[str, str]]:
    """Every model that is no stage, found or refused where it is named; and that place by the model's name.

    `positions` are those of stages, `places_in_stages` those of the names that a stage of the document holds.
    """
    if written.model in stages:
        message = f"found {describe(written.model)}, a stage of this recipe, expected a model"
        raise error_at(document, ("model",), message)
    places: dict[str, tuple[Key, ...]] = {written.model: ("model",)}
    if written.judge not in stages and written.judge != SELF:
        places.setdefault(written.judge, ("judge",))
    problems = Problems()
    named: list[tuple[tuple[Key, ...], ModelReference, str]] = []
    for stage_id, config in stages.items():
        stage = positions.get(stage_id, ("gate",))
        for keys, target, name in references(config, ModelReference):
            if name in stages:
                continue
            place: tuple[Key, ...] = (*stage, *keys)
            if document.node(place).value != name:  # named by the recipe's own keys, or by those of a composite
                place = places_in_stages.get((stage, name)) or places.get(name) or place
            with problems.collect():
                _check_served(document, stage, place, config, target, name)
            places.setdefault(name, place)
            named.append((place, target, name))
    models: dict[str, Model] = {}
    for name, place in places.items():
        with problems.collect():
            models[name] = _model(document, written, place, name, runs)
    is_right = dict.fromkeys(models, True)
    for place, target, name in named:
        # A hub id is looked at before a run (`cai.run.model_checks`), which may download it.
        if is_right.get(name) and Path(models[name].path).is_absolute():
            is_right[name] = False  # a model that is wrong is reported once
            with problems.collect():
                _check_role(document, place, target, models[name])
                is_right[name] = True
    problems.raise_if_any()
    return models, {name: f"{document.location(place)}: {dotted(place)}" for name, place in places.items()}


def _check_role(document: Document, place: tuple[Key, ...], target: ModelReference, model: Model) -> None:
    """Refuses a model that cannot do what it is named for at `place`."""
    try:
        model_files.check_role(model, role_of(target))
    except BadInput as error:
        raise error_at(document, place, str(error)) from None


def role_of(target: ModelReference) -> Role | None:
    """What a model is named for; None where both a language model and a classifier will do."""
    if len(target.gives) > 1:
        return None
    return "score" if target.gives == ("reward",) else "language"


def _model(document: Document, written: RecipeDocument, place: tuple[Key, ...], name: str, runs: Path) -> Model:
    """The model that a name at `place` means."""
    templates, chat_template = written.templates, written.chat_template
    try:
        return reference.resolve(
            name, templates=templates, chat_template=chat_template, folder=document.path.parent, runs=runs
        )
    except BadInput as error:
        raise error_at(document, place, str(error)) from None


def check_models(
    document: Document,
    written: RecipeDocument,
    configs: Sequence[StageConfig | None],
    runs: Path,
    problems: Problems,
) -> None:
    """Adds models that do not exist to the `problems` of a recipe whose other names are not all right.

    `resolve` finds them, and defaults that do not exist, in a recipe whose names are right.
    """
    names: dict[str, tuple[Key, ...]] = {written.model: ("model",), written.judge: ("judge",)}
    for index, config in enumerate(configs):
        for keys, _, name in references(config, ModelReference) if config is not None else ():
            names.setdefault(name, ("stages", index, *keys))
    stages = document.value.get("stages")
    ids = [entry.get("id") for entry in stages if isinstance(entry, dict)] if isinstance(stages, list) else []
    for name, place in names.items():
        if name not in [SELF, OWN, *ids]:
            with problems.collect():
                _model(document, written, place, name, runs)


def _check_served(
    document: Document,
    stage: tuple[Key, ...],
    place: tuple[Key, ...],
    config: StageConfig,
    target: ModelReference,
    name: str,
) -> None:
    """Refuses a model that only a server has where its weights are needed here."""
    if not name.startswith(SERVED):
        return
    if target.gives == ("reward",):
        raise error_at(
            document,
            place,
            f"found {name!r}, which only a server has, expected a reward model whose weights are here",
        )
    if target.trained:
        raise error_at(
            document,
            stage,
            f"{config.kind} trains {name!r}, which only a server has, expected a model whose weights are here: a "
            f"folder or a hub id",
        )
