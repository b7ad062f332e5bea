"""Whether the models that a recipe names can do what they are named for, before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cai.contracts.profile import Profile
from cai.contracts.references import ModelReference, references
from cai.contracts.stage_config import StageConfig
from cai.models.model_files import check_model
from cai.run.recipe import Recipe
from cai.run.recipe_names import role_of
from cai.text.errors import BadInput


def check_models(recipe: Recipe, profile: Profile, stages: Iterable[StageConfig], runs: Path) -> None:
    """Raises BadInput, with the place in the recipe, for a model that one of the stages cannot use.

    That is one that is not on this machine, that does not write or score as the stage expects, or whose files are
    broken. Hub ids are downloaded first where the profile says so. Models that stages of the recipe train, and those
    that a server has, are not looked at. `runs` is the folder whose models a misspelt name is compared with.
    """
    checks = dict.fromkeys(
        (name, role_of(target), target.trained or role_of(target) == "score" or profile.engine != "server")
        for config in stages
        for _, target, name in references(config, ModelReference)
        if name in recipe.models
    )
    for name, role, loads_weights in checks:
        try:
            check_model(recipe.models[name], role, runs=runs, offline=profile.offline, weights=loads_weights)
        except BadInput as error:
            raise BadInput(f"{recipe.places[name]}: {error}") from None
