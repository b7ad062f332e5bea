"""What the names in a recipe mean: defaults, `model` and `self`, parts of composite stages, order, models on disk.

Names are found by `cai.contracts.references`, whatever the keys are called that hold them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cai.contracts.model import SERVED, Model
from cai.contracts.references import ModelReference, PromptSetReference, StageReference, Target, references, renamed
from cai.contracts.stage_config import CompositeConfig, StageConfig
from cai.document import Document, Problems, error_at
from cai.models import reference
from cai.run.recipe_document import OWN, SELF, RecipeDocument
from cai.stages import config_class
from cai.text.errors import BadInput
from cai.text.formatting import Key, describe

GATE = "gate"
"""Id of the stage that `gate:` stands for."""


class Resolved(NamedTuple):
    """The stages of a recipe, their names resolved, in the order in which they run."""

    stages: dict[str, StageConfig]
    composites: dict[str, list[str]]
    models: dict[str, Model]


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


def resolve(document: Document, written: RecipeDocument, configs: Sequence[StageConfig]) -> Resolved:
    """Resolves every name. `configs` are the stages as they are written, their names checked.

    Raises BadInput for stages that wait for each other, for a `self` that stands for two models, and for models that do
    not exist or cannot do what they are named for.
    """
    positions = {config.id: ("stages", index) for index, config in enumerate(configs)}
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
    return Resolved(stages, composites, _models(document, written, positions, stages))


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
    stages: Mapping[str, StageConfig],
) -> dict[str, Model]:
    """Every model that is no stage, found or refused where it is named."""
    if written.model in stages:
        message = f"found {describe(written.model)}, a stage of this recipe, expected a model"
        raise error_at(document, ("model",), message)
    places: dict[str, tuple[Key, ...]] = {written.model: ("model",)}
    if written.judge not in stages and written.judge != SELF:
        places.setdefault(written.judge, ("judge",))
    models: dict[str, Model] = {}
    problems = Problems()
    for stage_id, config in stages.items():
        for keys, target, name in references(config, ModelReference):
            if name in stages:
                continue
            place = (*positions.get(stage_id, ("gate",)), *keys)
            with problems.collect():
                _check_served(document, positions.get(stage_id, ("gate",)), place, config, target, name)
            places.setdefault(name, place)
    for name, place in places.items():
        with problems.collect():
            models[name] = _model(document, written, place, name)
    for stage_id, config in stages.items():
        for keys, target, name in references(config, ModelReference):
            if name in models:
                with problems.collect():
                    _check_head(document, (*positions.get(stage_id, ("gate",)), *keys), target, models[name])
    problems.raise_if_any()
    return models


def _model(document: Document, written: RecipeDocument, place: tuple[Key, ...], name: str) -> Model:
    """The model that a name at `place` means."""
    try:
        return reference.resolve(
            name, templates=written.templates, chat_template=written.chat_template, folder=document.path.parent
        )
    except BadInput as error:
        raise error_at(document, place, str(error)) from None


def check_models(
    document: Document, written: RecipeDocument, configs: Sequence[StageConfig | None], problems: Problems
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
                _model(document, written, place, name)


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


def _check_head(document: Document, place: tuple[Key, ...], target: ModelReference, model: Model) -> None:
    """Refuses a language model as a reward model and the other way round, where the model's folder says what it is."""
    if len(target.gives) > 1:
        return
    expected = "score" if target.gives == ("reward",) else "language"
    nouns = {"score": "a sequence classifier, which gives a score", "language": "a language model, which writes"}
    if (head := reference.head(model)) is not None and head != expected:
        raise error_at(document, place, f"{model.name!r} is {nouns[head]}, expected {nouns[expected]}")
