"""Principles of a run's votes by id or tag; tags are those of the constitution of its recipe as it is now."""

from __future__ import annotations

from collections.abc import Sequence

from cai.constitution.selection import selected_ids
from cai.feedback.asked_votes import read_asked_votes
from cai.feedback.labelled_votes import LabelledVotes
from cai.run.recipe import load_recipe
from cai.storage import run_folder
from cai.storage.files import read_json
from cai.text.errors import BadInput


def voted_principles(votes: LabelledVotes, names: Sequence[str]) -> list[str] | None:
    """Ids of the principles that a judge was asked about and that one of `names` means; None without names.

    The recipe is read where a name is no id. Raises BadInput for a name that is neither an id nor a tag.
    """
    if not names:
        return None
    ids = {*votes.principles, *read_asked_votes(votes.judge_folders)}
    tags_by_id: dict[str, Sequence[str]] = dict.fromkeys(sorted(ids), ())
    recipe_error = ""
    if not tags_by_id.keys() >= set(names):
        run = votes.judge_folders[0].parent
        facts = read_json(run / run_folder.RUN) or {}
        try:
            constitution = load_recipe(facts["recipe"], facts["overrides"], run.parent).constitution
            principles = () if constitution is None else constitution.principles
            tags_by_id |= {principle.id: principle.tags for principle in principles if principle.id in tags_by_id}
        except (KeyError, BadInput) as error:
            recipe_error = f"; tags are unknown, since the recipe cannot be read: {error}"
    try:
        return selected_ids(names, tags_by_id, votes.name)
    except BadInput as error:
        raise BadInput(f"--principle: {error}{recipe_error}") from None
