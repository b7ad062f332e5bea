"""What other words of a principle would do to a run's labels: its judge is asked what has changed, and nothing else.

The judge stages of the run are computed under the changed constitution into `RUN/tried/`, from where a later run takes
the votes over (`cai.run.earlier`); the run itself stays as it is. Labels before and after follow from the same rule, a
fitted temperature included.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cai import engines
from cai.constitution import Constitution, Principle, load_constitution, with_text
from cai.contracts.engine import Engine
from cai.contracts.profile import Profile
from cai.contracts.stage_config import PrincipleField
from cai.feedback.explain import compare_votes, example_text_lines, explain
from cai.feedback.explanation_text import wording_lines
from cai.feedback.labelled_votes import LabelledVotes, find_prefer_stage, labelled_votes
from cai.feedback.principle_tests import example_figures, run_examples
from cai.run.earlier import earlier_results
from cai.run.fingerprint import Parts
from cai.run.pipeline import run_stage
from cai.run.plan import Planner, Step
from cai.run.recipe import Recipe, load_recipe
from cai.run.recipe_names import inputs_of, needs
from cai.run.stage_run import StageRun
from cai.stages.judge import Config as JudgeConfig
from cai.stages.prefer import Config as PreferConfig
from cai.stages.prefer import principle_weights
from cai.storage import run_folder
from cai.storage.files import read_json
from cai.storage.rows import stable_id
from cai.storage.stage_folders import run_command
from cai.templates import TemplateSet, load_templates
from cai.text.errors import BadInput
from cai.text.formatting import printable, shorten
from cai.text.progress import Display
from cai.text.tables import rate_text, table

Edit = Callable[[Constitution, PrincipleField], Constitution]
"""Changes words of a constitution, given the principle field that the judge is asked with."""


@dataclass(frozen=True)
class Labelling:
    """The stages of a run that make labels: what is done, the judges, and the stage that turns votes into labels."""

    planner: Planner
    done: Mapping[str, run_folder.Finished]
    judges: Sequence[JudgeConfig]
    prefer: PreferConfig

    @property
    def constitution(self) -> Constitution:
        constitution = self.planner.recipe.constitution
        assert constitution is not None, "its judges have asked by one"
        return constitution

    def votes(self, judge_folders: Sequence[Path], constitution: Constitution) -> LabelledVotes:
        """The votes of these folders under the run's own rule of labels."""
        votes = labelled_votes(self.planner.run.name, judge_folders, self.done[self.prefer.id].folder)
        weights = principle_weights(votes.principles, constitution, self.prefer.tag_weights)
        return replace(votes, rule=replace(votes.rule, weights=weights))


def try_wording(
    name: str, runs_folder: Path, profile: Profile, edit: Edit, display: Display, n_examples: int = 3
) -> dict[str, Any]:
    """Figures of a run's labels, by the words that it was made with and by those that `edit` puts in their place.

    `name` is RUN, or RUN/STAGE where several stages of it make labels. Raises BadInput where the run is not what its
    recipe makes now, or where the judge would be asked nothing else.
    """
    run, stage_id = find_prefer_stage(name, runs_folder)
    with run_folder.locked(run), display:
        labelling = _labelling(run, stage_id, profile)
        field = labelling.judges[0].principle_fields()[0]
        changed = edit(labelling.constitution, field)
        reworded = _reworded(labelling.constitution, changed, field)
        start_time = time.monotonic()
        folders, outcomes = _ask(labelling, changed, reworded, profile, display)
        computed_before = _computed_before(labelling, changed)
    before = labelling.votes([labelling.done[judge.id].folder for judge in labelling.judges], labelling.constitution)
    after = labelling.votes(folders, changed)
    differences = compare_votes(before, after, n_examples)
    say_before, say_after = (
        {id: influence["share_of_say"] for id, influence in explain(votes, 0)["principles"].items()}
        for votes in (before, after)
    )
    labels, changed_labels = before.labels(), after.labels()
    return {
        "run": str(run),
        "seconds": round(time.monotonic() - start_time, 2),
        "principles": {
            id: {
                "before": getattr(_by_id(labelling.constitution).get(id), field, None),
                "after": getattr(_by_id(changed)[id], field),
                "location": _by_id(changed)[id].location,
            }
            for id in reworded
        },
        "examples": outcomes,
        "computed_before_the_judge": computed_before,
        "removed": [id for id in _by_id(labelling.constitution) if id not in _by_id(changed)],
        "asked_with": field,
        "labels": {
            "pairs": len(labels),
            "turned": int((labels * changed_labels < 0).sum()),
            "lost": int(((labels != 0) & (changed_labels == 0)).sum()),
            "gained": int(((labels == 0) & (changed_labels != 0)).sum()),
        },
        "share_of_say": {id: [say_before.get(id), say_after.get(id)] for id in {**say_before, **say_after}},
        "votes": differences["principles"],
        "turned_pairs": differences["examples"],
    }


def edit_of(file: Path | None, principle_id: str | None, text: str | None, request: str | None) -> Edit:
    """The change that a user asks for: an edited document, or a principle's text or request to the judge.

    Raises BadInput for anything but one of these.
    """
    if file is not None and principle_id is None and text is None and request is None:
        document = load_constitution(file)
        return lambda _, __: document
    if file is not None or principle_id is None or (text is None) == (request is None):
        raise BadInput("expected an edited FILE, or --principle ID with either --text or --request")

    def edit(constitution: Constitution, field: PrincipleField) -> Constitution:
        principle = constitution.principle(str(principle_id))
        changed = with_text(principle, text) if text is not None else with_request(principle, field, request or "")
        principles = tuple(changed if other is principle else other for other in constitution.principles)
        return replace(constitution, principles=principles)

    return edit


def with_request(principle: Principle, field: PrincipleField, request: str) -> Principle:
    """The principle with other words of the field that a judge is asked with."""
    return replace(principle, critique=request) if field == "critique" else replace(principle, compare=request)


def _computed_before(labelling: Labelling, changed: Constitution) -> list[str]:
    """The stages before the judge that a run with the changed constitution computes again, so that its pairs change."""
    planner = labelling.planner.under(changed)
    done: dict[str, run_folder.Finished] = {}
    behind = _needed(planner.recipe, [judge.id for judge in labelling.judges])
    for config in planner.recipe.stages.values():
        if config.id in behind and (step := planner.step(config, done)).done:
            done[config.id] = step.done
    return [id for id in planner.recipe.stages if id in behind and id not in done]


def _needed(recipe: Recipe, stage_ids: Sequence[str]) -> set[str]:
    """The stages that these ones read, themselves or through others."""
    behind: set[str] = set()
    to_visit = list(stage_ids)
    while to_visit:
        for name in needs(recipe.stages[to_visit.pop()], set(recipe.stages)):
            if name not in behind:
                behind.add(name)
                to_visit.append(name)
    return behind


def _labelling(run: Path, stage_id: str, profile: Profile) -> Labelling:
    """The recipe of a run and its stages up to the labels. Raises BadInput where one is not done as the recipe says."""
    recorded = read_json(run / run_folder.RUN)
    recipe = load_recipe(recorded["recipe"], recorded["overrides"], run.parent)
    planner = Planner(recipe, run, profile.offline)
    done: dict[str, run_folder.Finished] = {}
    for config in recipe.stages.values():
        step = planner.step(config, done)
        if step.done:
            done[config.id] = step.done
        if config.id == stage_id:
            break
    prefer = recipe.stages.get(stage_id)
    if stage_id not in done or not isinstance(prefer, PreferConfig):
        raise BadInput(
            f"{run}: the labels of stage {stage_id!r} are not those that its recipe makes; run `{run_command(run)}`"
        )
    judges = [config for id in inputs_of(prefer) if isinstance(config := recipe.stages[id], JudgeConfig)]
    if not judges:
        raise BadInput(f"{run}: stage {stage_id!r} has labels of people alone, which no wording changes")
    return Labelling(planner, done, judges, prefer)


def _by_id(constitution: Constitution) -> dict[str, Principle]:
    return {principle.id: principle for principle in constitution.principles}


def _reworded(before: Constitution, after: Constitution, field: str) -> list[str]:
    """Ids of the principles that a judge would be asked about in other words, or that it was not asked about."""
    words = {principle.id: getattr(principle, field) for principle in before.principles}
    reworded = [principle.id for principle in after.principles if getattr(principle, field) != words.get(principle.id)]
    if not reworded:
        reason = _why_unchanged(before, after, field)
        raise BadInput(printable(f"{after.path}: the judge is asked the same about every principle{reason}"))
    return reworded


def _why_unchanged(before: Constitution, after: Constitution, field: str) -> str:
    """What differs between documents although a judge is asked the same, and what to do about it."""
    earlier = _by_id(before)
    for principle in after.principles:
        if principle.text != earlier[principle.id].text:
            written = f"`text` of {principle.id!r} differs, but its `{field}` is written out and is what is asked"
            return f": {written}; change that, or remove it, and it is derived from the text"
        if principle.weight != earlier[principle.id].weight:
            return "; weights need no judge: `cai run --until` the stage of the labels makes new ones in a second"
    return ", expected other words"


def _ask(
    labelling: Labelling, changed: Constitution, reworded: Sequence[str], profile: Profile, display: Display
) -> tuple[list[Path], dict[str, Any]]:
    """The folders of the judge stages under the changed constitution, and what the examples of the reworded principles
    give, by principle, before and after."""
    planner = labelling.planner.under(changed)
    folders: list[Path] = []
    outcomes: dict[str, list[dict[str, int] | None]] = {}
    for config in labelling.judges:
        model = planner.fingerprints.model(config.judge or planner.recipe.judge, labelling.done)
        with engines.open_engine(model, profile) as engine:
            folders.append(_judge(labelling, planner, config, engine, profile, display))
            templates = load_templates(model.templates)
            if config.method == "pairwise" and not outcomes:
                for id in reworded:
                    outcomes[id] = [
                        _example_accuracy(constitution, id, engine, templates)
                        for constitution in (labelling.constitution, changed)
                    ]
    return folders, outcomes


def _example_accuracy(
    constitution: Constitution, id: str, engine: Engine, templates: TemplateSet
) -> dict[str, int] | None:
    """Examples of a principle that the judge decides as their author does; None without any."""
    principle = _by_id(constitution).get(id)
    if principle is None or not principle.examples:
        return None
    alone = replace(constitution, principles=(principle,))
    outcomes = run_examples(alone, engine, templates)
    figures = example_figures(alone, outcomes)
    return {"passed": sum(outcome.is_passed for outcome in outcomes), "n": figures["n"], "failed": figures["failed"]}


def _judge(
    labelling: Labelling, planner: Planner, config: JudgeConfig, engine: Engine, profile: Profile, display: Display
) -> Path:
    """The folder of a judge stage under the changed constitution, computed unless it is there."""
    parts: Parts = planner.fingerprints.parts(config, labelling.done)
    folder = planner.run / run_folder.TRIED / f"{config.id}-{stable_id(parts)}"
    if run_folder.finished(folder):
        return folder
    earlier = earlier_results(planner.run, config, parts, folder)
    step = Step(config, "runs", "", folder, parts, earlier=earlier)
    stage = StageRun(planner, step, labelling.done, profile)
    run_stage(stage, display, lambda model, profile: contextlib.nullcontext(engine))
    return folder


def trial_lines(figures: Mapping[str, Any]) -> list[str]:
    """The figures as text, with pairs to read."""
    lines: list[str] = []
    for id, words in figures["principles"].items():
        lines += wording_lines(id, words["before"] or "(no such principle)", words["after"])
        if id in figures["examples"]:
            before, after = (
                "no example" if passed is None else f"{passed['passed']} of {passed['n']}"
                for passed in figures["examples"][id]
            )
            lines.append(f"  its examples decided as their author does: {before} before, {after} after")
        else:
            lines.append("  its examples are not asked: they are for judges with `method: pairwise`")
    labels = figures["labels"]
    counts = f"{labels['turned']:,} on the other side, {labels['lost']:,} no longer there, {labels['gained']:,} new"
    lines += ["", f"labels of {labels['pairs']:,} pairs: {counts}", ""]
    without_pairs = [id for id in figures["principles"] if id not in figures["share_of_say"]]
    lines += [f"{id} applies to no pair of this run" for id in without_pairs]
    lines += [f"{id} is in the run, and not in the edited document" for id in figures["removed"]]
    rows = []
    for id, (before, after) in figures["share_of_say"].items():
        votes = figures["votes"].get(id)
        turned = rate_text(votes["turned"]) if votes else "-"
        share_before, share_after = ("-" if share is None else f"{100 * share:.1f} %" for share in (before, after))
        rows.append([shorten(id, 30), share_before, share_after, f"{votes['pairs']:,}" if votes else "-", turned])
    lines += table(["principle", "influence before", "after", "pairs", "decided votes that turn"], rows)
    lines += [
        "",
        "influence: share of all weighted log-odds, which labels are made of. Brackets: 95 %, clustered by topic.",
    ]
    for example in figures["turned_pairs"]:
        change = f"a is better with probability {example['p_a']:.2f}, after {example['p_a_in_the_other']:.2f}"
        lines += ["", f"pair {example['pair']}: {change}", *example_text_lines(example)]
    return [printable(line) for line in [*lines, "", *_take_over_lines(figures)]]


def _take_over_lines(figures: Mapping[str, Any]) -> list[str]:
    """How the words get into the run, and what that computes."""
    names = " and ".join(f"{id!r} ({words['location']})" for id, words in figures["principles"].items())
    lines = [f"Nothing of the run has changed. To take the words over, write them into {names}."]
    if stages := figures["computed_before_the_judge"]:
        lines += [
            f"`cai run` then computes {', '.join(stages)} again, which the words reach too, and compares other pairs.",
            f"Where `{figures['asked_with']}` alone has the new words, it computes none of these, and asks no question "
            "again.",
        ]
    else:
        lines.append("`cai run` then asks no question again.")
    return lines
