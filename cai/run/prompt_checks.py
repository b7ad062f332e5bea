"""Whether prompts that are held out are learned from, and whether every principle has a prompt that it applies to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from cai.contracts.references import MODEL_KINDS, nested_models
from cai.prompt_sets.prompt_rows import load_human_pairs
from cai.prompt_sets.prompt_set_config import PairSet
from cai.run.recipe import Recipe
from cai.run.recipe_names import inputs_of, prompt_sets_of
from cai.storage.rows import HELD_OUT, Prompt, canonical_json
from cai.text.errors import BadInput, did_you_mean
from cai.text.formatting import printable


def check_prompts(recipe: Recipe, prompts_of: Callable[[str], list[Prompt]]) -> list[str]:
    """Which sets are learned from and compared on, a sentence each. `prompts_of` reads a prompt set by its name.

    Raises BadInput for a conversation that is both learned from and held out.
    """
    compared = {part for parts in recipe.composites.values() for part in parts}
    learned, compared_on = set[str](), set[str]()
    for config in recipe.stages.values():
        is_compared = config.id in compared or config.gives == "comparison"
        (compared_on if is_compared else learned).update(prompt_sets_of(config))
    sources = {
        name: {
            canonical_json(prompt["messages"]): name not in learned or HELD_OUT in prompt["tags"]
            for prompt in prompts_of(name)
        }
        for name in recipe.prompts
        if name in learned | compared_on
    } | _human_prompts(recipe)
    where: dict[str, tuple[str, bool]] = {}
    clashes: Counter[tuple[str, str]] = Counter()
    for name, conversations in sources.items():
        for conversation, held_out in conversations.items():
            first, first_held_out = where.setdefault(conversation, (name, held_out))
            if held_out != first_held_out:
                clashes[(name, first) if held_out else (first, name)] += 1
    if clashes:
        (held_out_set, learned_set), count = clashes.most_common(1)[0]
        raise BadInput(
            f"{recipe.path}: {count} prompts of the held-out set {held_out_set!r} are in {learned_set!r} too, "
            "word for word; take them out of one, or say `hold_out:` in one place"
        )
    trained_on = _trained_on(recipe)
    prompts = [prompt for name in sorted(learned | compared_on) for prompt in prompts_of(name)]
    notes = list(_principles_without_prompts(recipe, prompts))
    for name in sources:
        count = sum(not held_out for held_out in sources[name].values())
        if count and name in compared_on and name in trained_on:
            notes.append(
                f"prompts {name}: {count:,} prompts are learned from and compared on too; `hold_out: "
                "true` keeps a set out of training"
            )
    return notes


def _principles_without_prompts(recipe: Recipe, prompts: Sequence[Prompt]) -> Iterator[str]:
    """A sentence about each principle that applies to no prompt of the recipe. Pairs of people may have any tags."""
    if recipe.constitution is None or any(
        True for config in recipe.stages.values() for _ in nested_models(config, PairSet)
    ):
        return
    tags = {tag for prompt in prompts for tag in prompt["tags"]}
    for principle in recipe.constitution.principles:
        if principle.applies_to is not None and tags.isdisjoint(principle.applies_to):
            hint = did_you_mean(principle.applies_to[0], tags)
            no_prompt = f"applies to no prompt of this recipe: none has the tag {' or '.join(principle.applies_to)}"
            yield printable(f"{principle.location}: {principle.id!r} {no_prompt}{hint}")


def _human_prompts(recipe: Recipe) -> dict[str, dict[str, bool]]:
    """Whether each conversation of the pairs that people labelled is held out, by the key that names the pairs."""
    return {
        ".".join(map(str, (config.id, *keys))): {
            canonical_json(row["prompt"]): HELD_OUT in row["tags"]
            for row in load_human_pairs(pairs, recipe.folder).preferences
        }
        for config in recipe.stages.values()
        for keys, pairs in nested_models(config, PairSet)
    }


def _trained_on(recipe: Recipe) -> set[str]:
    """The prompt sets whose rows reach a stage that trains a model."""
    reached: set[str] = set()
    for config in reversed(list(recipe.stages.values())):
        if config.gives in MODEL_KINDS or config.id in reached:
            reached.update([config.id, *inputs_of(config)])
    return {name for stage_id in reached for name in prompt_sets_of(recipe.stages[stage_id])}
