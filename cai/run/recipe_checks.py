"""What is refused in a recipe before anything runs: names that nothing answers to, files that are not there.

Every refusal is one sentence with the position, what was found, what was expected and the nearest known name.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cai.constitution import Constitution, load_constitution
from cai.contracts.references import (
    MODEL_KINDS,
    FileReference,
    ModelReference,
    OutputKind,
    PrincipleReference,
    PromptSetReference,
    Reference,
    StageReference,
    TagReference,
    nested_models,
    references,
)
from cai.contracts.stage_config import StageConfig, WrongVoteUnits
from cai.document import Document, Problems, error_at
from cai.document.shipped import find_beside
from cai.prompt_sets import MICRO, PairSet, read_prompt_set
from cai.run.recipe_document import OWN, SELF, RecipeDocument
from cai.run.recipe_names import inputs_of
from cai.storage.rows import HELD_OUT, TOPIC
from cai.templates import template_set_names
from cai.text.errors import BadInput, did_you_mean
from cai.text.formatting import Key
from cai.training.rl.reward_functions import check_function


def check(
    document: Document, written: RecipeDocument, configs: Sequence[StageConfig | None], problems: Problems
) -> Constitution | None:
    """Checks every name of a recipe, and adds those that are wrong to `problems`; the constitution that it names.

    `configs` has None for stages that are wrong themselves; names that refer to what is wrong are not refused.
    """
    by_id = _by_id(document, configs)
    stages = [(("stages", index), config) for index, config in enumerate(configs) if config is not None]
    has_all_ids = len(by_id) == len(configs)
    for stage, config in stages:
        with problems.collect():
            try:
                _check_id(document, stage, config, configs, written)
            except BadInput:
                by_id[config.id], has_all_ids = None, False
                raise
    for stage, config in stages:
        for name in references(config):
            is_stage = isinstance(name.target, StageReference | ModelReference)
            if is_stage and name.name not in by_id and not has_all_ids:
                continue  # it may be the stage whose id is refused
            with problems.collect():
                _check_reference(document, _place(document, stage, name), name, config, by_id, written)
        with problems.collect():
            _check_vote_units(document, stage, config, by_id)
    if written.judge != SELF:
        with problems.collect():
            _check_model_name(document, ("judge",), written.judge, by_id, ("policy",))
    if written.templates not in (sets := ["auto", *template_set_names()]):
        message = f"found {written.templates!r}, expected one of {', '.join(sets)}"
        problems.add(error_at(document, ("templates",), message + did_you_mean(written.templates, sets)))
    files = [
        (("prompts", set_name, *name.keys), name)
        for set_name, prompt_set in written.prompts.items()
        for name in references(prompt_set, FileReference)
    ]
    unreadable = Problems()
    for place, name in files:
        with unreadable.collect():
            _check_file(document, place, name)
    problems.extend(unreadable)
    has_all_prompts = not unreadable and list(written.prompts) == _prompt_set_names(document)
    constitution = None
    with problems.collect():
        constitution = _constitution(document, written, stages)
    for stage, config in stages:
        for name in references(config):
            place = _place(document, stage, name)
            if isinstance(name.target, PrincipleReference) and constitution is not None:
                with problems.collect():
                    _check_principle(document, place, name, constitution)
            if isinstance(name.target, TagReference) and has_all_prompts:
                with problems.collect():
                    _check_tag(document, place, name.name, written, [config for _, config in stages])
    return constitution


def _by_id(document: Document, configs: Sequence[StageConfig | None]) -> dict[str, StageConfig | None]:
    """The stages by id, without ids that are none; None for stages that are wrong themselves."""
    ids = (document.node(("stages", index, "id")).value for index in range(len(configs)))
    by_id = {id_: config for id_, config in zip(ids, configs, strict=True) if isinstance(id_, str)}
    return {id_: config for id_, config in by_id.items() if re.fullmatch(r"[\w-]+", id_)}


def _prompt_set_names(document: Document) -> list[str] | None:
    """The names of the recipe's prompt sets, of those that are wrong too; None where `prompts` itself is wrong."""
    prompts = document.value.get("prompts", {})
    if not isinstance(prompts, dict) or _may_be_misspelt(document, "prompts"):
        return None
    return list(prompts)


def _may_be_misspelt(document: Document, key: str) -> bool:
    """Whether the recipe lacks `key` and has an unknown one, which may stand for it."""
    return key not in document.value and not document.value.keys() <= RecipeDocument.model_fields.keys()


def check_pairs(document: Document, stages: Mapping[str, StageConfig]) -> None:
    """Refuses a stage that compares responses to one prompt where no prompt gets two. `stages` are resolved, in order.

    Prompts of different sets count as the same, since sets may overlap.
    """
    entries: Any = document.value["stages"]
    positions: dict[str, tuple[Key, ...]] = {entry["id"]: ("stages", index) for index, entry in enumerate(entries)}
    most_responses: dict[str, int | None] = {}
    for config in stages.values():
        names = inputs_of(config)
        counts = [count for name in names if (count := most_responses[name]) is not None]
        is_known = len(counts) == len(names)
        most_responses[config.id] = config.most_responses(counts) if is_known else None
        if is_known and config.needs_pairs() and sum(counts) < 2:
            place = positions.get(config.id, ("stages",))
            if len(names) == 1 and "n" in document.node(positions.get(names[0], ())).children:
                place = (*positions[names[0]], "n")
            raise error_at(
                document,
                place,
                f"stage {config.id!r} compares two responses to a prompt, and {' and '.join(map(repr, names))} gives "
                f"each prompt one, expected `n: 2` or more, or another stage in its `from`",
            )


def _place(document: Document, stage: tuple[Key, ...], name: Reference) -> tuple[Key, ...]:
    """Where a name stands in the document: a key that takes one or a list of names may hold one without a list."""
    keys: tuple[Key, ...] = stage
    for key in name.keys:
        if not isinstance(key, int) or isinstance(document.node(keys).value, list):
            keys = (*keys, key)
    return keys


def _check_id(
    document: Document,
    stage: tuple[Key, ...],
    config: StageConfig,
    configs: Sequence[StageConfig | None],
    written: RecipeDocument,
) -> None:
    """Refuses an id that another stage has, or that could be a model's name."""
    place = (*stage, "id")
    first = next(candidate for candidate in configs if candidate is not None and candidate.id == config.id)
    if first is not config:
        raise error_at(
            document,
            place,
            f"found the id {config.id!r} a second time, expected it once; stage {configs.index(first) + 1} has it "
            f"already",
        )
    folders = (document.path.parent, Path())
    is_model = any((folder / config.id / "config.json").is_file() for folder in folders)
    if config.id in {SELF, OWN, MICRO, written.model} or is_model:
        raise error_at(document, place, f"{config.id!r} is the name of a model too; call the stage something else")


def _check_reference(
    document: Document,
    place: tuple[Key, ...],
    name: Reference,
    config: StageConfig,
    by_id: Mapping[str, StageConfig | None],
    written: RecipeDocument,
) -> None:
    """Refuses a name of a stage, prompt set, file or model that nothing answers to. Principles and tags come later."""
    match name.target:
        case StageReference(takes=takes):
            if name.name not in by_id:
                raise error_at(
                    document,
                    place,
                    f"found {name.name!r}, expected a stage of this recipe" + did_you_mean(name.name, by_id),
                )
            stage = by_id[name.name]
            if stage is not None and stage.gives not in takes:
                raise error_at(
                    document,
                    place,
                    f"stage {name.name!r} gives {stage.gives}, but {config.kind} takes {' or '.join(takes)}",
                )
        case PromptSetReference():
            set_names = _prompt_set_names(document)
            if set_names is not None and name.name not in set_names:
                names = ", ".join(set_names) or "none is there"
                raise error_at(
                    document,
                    place,
                    f"found {name.name!r}, expected a prompt set of this recipe: {names}"
                    + did_you_mean(name.name, set_names),
                )
        case FileReference():
            _check_file(document, place, name)
        case ModelReference(gives=("reward",)) if name.name in {SELF, OWN}:
            raise error_at(document, place, f"found {name.name!r}, expected a `reward` stage or a reward model")
        case ModelReference(gives=gives):
            _check_model_name(document, place, name.name, by_id, gives)


def _check_vote_units(
    document: Document, stage: tuple[Key, ...], config: StageConfig, by_id: Mapping[str, StageConfig | None]
) -> None:
    """Refuses votes that a stage cannot read, or cannot read together."""
    read_stages = [(name, by_id.get(name.name)) for name in references(config, StageReference)]
    if any(stage is None for _, stage in read_stages):
        return  # its name, or the stage itself, is refused
    judges = [(name, stage) for name, stage in read_stages if stage is not None and stage.gives == "votes"]
    try:
        config.check_vote_units({name.name: {judge.vote_unit()} for name, judge in judges})
    except WrongVoteUnits as error:
        key = judges[0][0].keys[0] if error.key is None else error.key
        raise error_at(document, (*stage, key), str(error)) from None


def _check_model_name(
    document: Document,
    place: tuple[Key, ...],
    name: str,
    by_id: Mapping[str, StageConfig | None],
    gives: tuple[OutputKind, ...],
) -> None:
    """Refuses a stage that gives no such model, and what looks like a misspelt stage."""
    if name in by_id:
        stage = by_id[name]
        if stage is not None and stage.gives not in gives:
            models = [config.id for config in by_id.values() if config is not None and config.gives in gives]
            expected = "a stage that trains a model" if gives == MODEL_KINDS else f"a stage that gives {gives[0]}"
            raise error_at(
                document,
                place,
                f"stage {name!r} gives {stage.gives}, expected {expected}"
                + (f": {', '.join(models)}" if models else ""),
            )
    # An id on the hub may look like a stage's id, but so does a misspelt stage's id.
    elif (
        re.fullmatch(r"[\w.-]+", name)
        and name not in {SELF, OWN, MICRO}
        and (close := difflib.get_close_matches(name, by_id, n=1, cutoff=0.75))
    ):
        raise error_at(document, place, f"found {name!r}, expected a model or a stage; did you mean {close[0]!r}?")


def _check_file(document: Document, place: tuple[Key, ...], name: Reference) -> None:
    """Refuses a path, relative to the recipe, where nothing lies, and a function that its file does not define."""
    if name.target.function:
        try:
            check_function(name.name, document.path.parent)
        except BadInput as error:
            raise error_at(document, place, str(error)) from None
        return
    path = document.path.parent / Path(name.name).expanduser()
    if name.name not in name.target.built_in and not path.exists():
        neighbours = [neighbour.name for neighbour in path.parent.iterdir()] if path.parent.is_dir() else []
        raise error_at(
            document,
            place,
            f"no such file or folder {name.name!r}, relative to the recipe" + did_you_mean(path.name, neighbours),
        )


def _constitution(
    document: Document, written: RecipeDocument, stages: Sequence[tuple[tuple[Key, ...], StageConfig]]
) -> Constitution | None:
    if written.constitution is None:
        for stage, config in stages:
            is_absent = document.value.get("constitution") is None and not _may_be_misspelt(document, "constitution")
            if config.principle_fields() and is_absent:
                raise error_at(
                    document,
                    (*stage, "kind"),
                    f"{config.kind} asks about principles, but the recipe names no `constitution:`",
                )
        return None
    if (file := find_beside(written.constitution, document.path.parent, "recipes")) is not None:
        return load_constitution(file)
    path = Path(os.path.normpath(document.path.parent / written.constitution))
    if not path.exists() and Path(written.constitution).suffix:
        neighbours = [neighbour.name for neighbour in path.parent.iterdir()] if path.parent.is_dir() else []
        raise error_at(
            document,
            ("constitution",),
            f"no such file {written.constitution!r}, relative to the recipe" + did_you_mean(path.name, neighbours),
        )
    return load_constitution(path if path.exists() else written.constitution)


def _check_principle(document: Document, place: tuple[Key, ...], name: Reference, constitution: Constitution) -> None:
    """Refuses a principle, or a tag of principles, that the constitution does not have."""
    if name.target.tag_only:
        tags = sorted({tag for principle in constitution.principles for tag in principle.tags})
        if name.name not in tags:
            raise error_at(
                document,
                place,
                f"found {name.name!r}, expected a tag of principles in {constitution.name!r}: "
                f"{', '.join(tags) or 'none has any'}{did_you_mean(name.name, tags)}",
            )
        return
    try:
        constitution.select([name.name])
    except BadInput as error:
        raise error_at(document, place, str(error)) from None


def _check_tag(
    document: Document, place: tuple[Key, ...], tag: str, written: RecipeDocument, configs: Sequence[StageConfig]
) -> None:
    """Refuses a tag that no prompt of the recipe and no pair that people labelled carries."""
    tags = prompt_tags(written, configs, document.path.parent)
    if tag not in tags and not tag.startswith(TOPIC):
        raise error_at(
            document,
            place,
            f"found {tag!r}, a tag that no prompt of this recipe has, expected one of {', '.join(tags)}"
            + did_you_mean(tag, tags),
        )


def prompt_tags(written: RecipeDocument, configs: Sequence[StageConfig], folder: Path) -> list[str]:
    """The tags of the recipe's prompts, without topics, and of pairs that people labelled.

    Those of the embedded world are known without reading its prompts. Paths are relative to `folder`.
    """
    from cai.micro.conversations import TAGS

    tags: list[str] = []
    for prompt_set in written.prompts.values():
        if prompt_set.source == MICRO:
            tags += [*TAGS, *([HELD_OUT] if prompt_set.hold_out else [])]
        else:
            tags += [tag for prompt in read_prompt_set(prompt_set, folder).prompts for tag in prompt["tags"]]
    tags = [tag for tag in tags if not tag.startswith(TOPIC)]
    tags += [tag for config in configs for _, pairs in nested_models(config, PairSet) for tag in pairs.tags]
    return list(dict.fromkeys(tags))
