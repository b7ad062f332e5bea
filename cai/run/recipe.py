"""The recipe: one YAML file that says what is done, checked as a whole before anything runs.

Reading a recipe resolves every name in it: which stage feeds which, which model a stage uses, who judges, and in which
order the stages run. All of it is checked here, without torch, so that a mistake in the last stage is found before the
first one starts. What names mean is in `cai.run.recipe_names`, what is refused in `cai.run.recipe_checks`. Left out:
what has already run and what that left behind (`cai.run.plan`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cai.constitution import Constitution
from cai.contracts.model import Model
from cai.contracts.stage_config import StageConfig
from cai.contracts.training_config import TrainingConfig
from cai.document import Document, Problems, check_kind, error_at, load_document, override_value, validate
from cai.document.shipped import find_file
from cai.models.reference import RUNS, stale_model_notes
from cai.prompt_sets import PromptSet
from cai.run import recipe_checks, recipe_names
from cai.run.recipe_document import OWN, RecipeDocument, readable_part
from cai.stages import STAGES, config_class
from cai.text.errors import did_you_mean
from cai.training.train_fields import check_train, names_elsewhere


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
    composites: Mapping[str, list[str]]
    """Ids of the stages that a composite stage of the recipe consists of, by its id."""
    models: Mapping[str, Model]
    """Every model that is not a stage of this recipe, by the name the recipe gives it."""
    places: Mapping[str, str]
    """Where each of these models is named, as an error message begins: `recipe.yaml:5:8: judge`."""
    path: Path
    overrides: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What the user should know before anything runs."""

    @property
    def folder(self) -> Path:
        """What paths in the recipe are relative to."""
        return self.path.parent

    def parts_of(self, stage_id: str) -> list[str]:
        """The stages that an id of the recipe stands for: those of a composite, else the stage itself."""
        return self.composites.get(stage_id, [stage_id])


def load_recipe(name: str | Path, overrides: Sequence[str] = (), runs: Path = RUNS) -> Recipe:
    """The recipe in a file, or the shipped one of that name, with `a.b.c=value` overrides applied.

    A model RUN/STAGE is one that a run in the folder `runs` trained.

    Raises BadInput with `file:line:column`, or the override, and a sentence for each thing that is wrong.
    """
    path = find_file(str(name), "recipes", "recipe")
    document = load_document(path)
    for override in overrides:
        document = override_value(document, override)
    return read_recipe(document, tuple(overrides), runs)


def read_recipe(document: Document, overrides: tuple[str, ...] = (), runs: Path = RUNS) -> Recipe:
    """The recipe in a document that was read already."""
    check_kind(document, "recipe")
    problems = Problems()
    written = readable_part(document)
    with problems.collect():
        written = validate(document, RecipeDocument)
    configs = _stage_configs(document, problems)
    # Where keys or values are wrong, the names in the others are checked all the same, to report everything at once.
    if written.judge == OWN:
        written = written.model_copy(update={"judge": written.model})
    constitution = recipe_checks.check(document, written, configs, problems)
    if problems:
        recipe_names.check_models(document, written, configs, runs, problems)
    problems.raise_if_any()
    resolved = recipe_names.resolve(document, written, [config for config in configs if config is not None], runs)
    recipe_checks.check_pairs(document, resolved.stages)
    return Recipe(
        name=written.name,
        seed=written.seed,
        model=written.model,
        judge=written.judge,
        constitution=constitution,
        templates=written.templates,
        chat_template=written.chat_template,
        prompts=written.prompts,
        stages=resolved.stages,
        composites=resolved.composites,
        models=resolved.models,
        places=resolved.places,
        path=document.path,
        overrides=overrides,
        notes=(*_constitution_notes(document, written, constitution), *stale_model_notes(resolved.models, runs)),
    )


def read_prompt_tags(name: str | Path) -> list[str]:
    """The tags of prompts of the recipe in a file, or of the shipped one of that name; its stages may be wrong.

    Raises BadInput where the recipe is wrong otherwise.
    """
    document = load_document(find_file(str(name), "recipes", "recipe"))
    check_kind(document, "recipe")
    written = validate(document, RecipeDocument)
    configs = [config for config in _stage_configs(document, Problems()) if config is not None]
    return recipe_checks.prompt_tags(written, configs, document.path.parent)


def _constitution_notes(
    document: Document, written: RecipeDocument, constitution: Constitution | None
) -> Iterator[str]:
    """Says that the shipped constitution stands in for a file beside the recipe, which its author may have edited."""
    if constitution is None or written.constitution is None:
        return
    is_path = Path(written.constitution).name != written.constitution or bool(Path(written.constitution).suffix)
    if is_path and not (document.path.parent / written.constitution).is_file():
        yield f"constitution: {constitution.path}, the shipped one; there is none beside {document.path}"


def _stage_configs(document: Document, problems: Problems) -> list[StageConfig | None]:
    """Every stage as its own config class, `train:` checked against the library's; None for those that are wrong."""
    configs: list[StageConfig | None] = []
    entries = document.value.get("stages")
    for index, entry in enumerate(entries if isinstance(entries, list) else ()):
        keys = ("stages", index)
        configs.append(None)
        if not isinstance(entry, dict) or not isinstance(kind := entry.get("kind"), str):
            continue  # `RecipeDocument` refuses it
        if kind not in STAGES:
            known = f"expected one of {', '.join(STAGES)}{did_you_mean(kind, STAGES)}"
            problems.add(error_at(document, (*keys, "kind"), f"found {kind!r}, {known}"))
            continue
        stage_class = config_class(kind)
        # A stand-in for an id that `RecipeDocument` refuses.
        with_id = document if isinstance(entry.get("id"), str) else document.with_value((*keys, "id"), "stage", "")
        elsewhere = {}
        if issubclass(stage_class, TrainingConfig) and (train_class := stage_class.train_class):
            elsewhere = names_elsewhere(train_class, stage_class.owned)
            stage_fields = stage_class.model_fields.keys()
            with problems.collect():
                check_train(document, (*keys, "train"), train_class, stage_class.owned, stage_fields)
        with problems.collect():
            configs[index] = validate(with_id, stage_class, keys, elsewhere)
    return configs
