"""Ids and tags of principles in one list: what a list means, and what is said of a name that is neither."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from feedback_stages import constitution

from cai.cli import main
from cai.text.errors import BadInput

TAGGED = """
name: tagged
principles:
  - {id: calm, text: The assistant stays calm., tags: [style]}
  - {id: short, text: The assistant is brief., tags: [style, length]}
  - {id: safe, text: The assistant helps with no crime., tags: [harm]}
  - {id: harm, text: The assistant weighs harm.}
"""


def selected(folder: Path, *names: str) -> list[str]:
    return [principle.id for principle in constitution(folder, TAGGED).select(names)]


def test_ids_and_tags_stand_in_one_list_and_the_documents_order_is_kept(tmp_path: Path) -> None:
    assert selected(tmp_path, "safe", "length") == ["short", "safe"]
    assert selected(tmp_path, "style", "calm") == ["calm", "short"]
    assert selected(tmp_path) == []


def test_an_id_wins_over_a_tag_of_the_same_name(tmp_path: Path) -> None:
    assert selected(tmp_path, "harm") == ["harm"]


@pytest.mark.parametrize(("name", "nearest"), [("saef", "safe"), ("stile", "style"), ("Harm", "harm")])
def test_the_nearest_id_or_tag_is_named(tmp_path: Path, name: str, nearest: str) -> None:
    message = f"found '{name}', expected ids or tags of principles in 'tagged'; did you mean '{nearest}'"
    with pytest.raises(BadInput, match=message):
        selected(tmp_path, "calm", name)


def test_constitution_show_takes_several_ids_and_tags(tmp_path: Path) -> None:
    (tmp_path / "tagged.yaml").write_text(TAGGED)
    show = ["constitution", "show", str(tmp_path / "tagged.yaml"), "--json"]
    shown = CliRunner().invoke(main, [*show, "--principle", "safe", "--principle", "style"])
    assert [principle["id"] for principle in json.loads(shown.stdout)["principles"]] == ["calm", "short", "safe"]
    refused = CliRunner().invoke(main, [*show, "--principle", "safe", "--principle", "stile"])
    assert refused.exit_code == 2
    assert "--principle: found 'stile', expected ids or tags" in refused.stderr


def test_a_principle_that_is_dropped_is_named_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "tagged.yaml").write_text(TAGGED)
    layer = "name: layer\nextends: tagged.yaml\nprinciples: [{id: calm, drop: true}, {id: short, text: Be brief.}]\n"
    (tmp_path / "layer.yaml").write_text(layer)
    show = ["constitution", "show", str(tmp_path / "layer.yaml"), "--principle"]
    refused = CliRunner().invoke(main, [*show, "calm"])
    assert refused.exit_code == 2
    assert f"'layer'; it is dropped at {tmp_path}/layer.yaml:3:19" in refused.stderr
    shown = CliRunner().invoke(main, [*show, "harm"])
    assert shown.exit_code == 0
    assert "layer.yaml:3" not in shown.stdout, "the overlay report is of the chosen principles alone"
