"""Loading a constitution: the compiled principles, and the folder that `extends` cannot leave."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from cai.constitution import load_constitution
from cai.document.shipped import shipped_folder
from cai.text.errors import BadInput

BASE = "name: base\nprinciples:\n  - {id: kind, text: Be kind., weight: 2}\n  - {id: brief, text: Be brief.}\n"


def write(folder: Path, **documents: str) -> Path:
    """Writes `name.yaml` for each keyword, `__` in a name standing for a folder; returns the folder."""
    for name, text in documents.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def refusal(path: Path) -> str:
    with pytest.raises(BadInput) as refused:
        load_constitution(path)
    return str(refused.value)


def test_absent_principle_fields_are_derived_from_the_text(tmp_path: Path) -> None:
    principles = "principles:\n  - {id: a, text: 'Uses {braces}.', compare: Which?}\n"
    write(tmp_path, x=f"name: x\n{principles}traits:\n  - {{id: b, text: I like to learn.}}\n")
    principle, trait = load_constitution(tmp_path / "x.yaml").principles
    assert principle.compare == "Which?"
    assert "Uses {braces}." in principle.critique
    assert "Uses {braces}." in principle.revise
    assert len({trait.critique, trait.revise, trait.compare}) == 3
    assert all("I like to learn." in field for field in (trait.critique, trait.revise, trait.compare))
    assert (principle.trait, trait.trait, trait.tags) == (False, True, ("trait",))


def test_a_principle_knows_where_it_stands_and_to_which_prompts_it_applies(tmp_path: Path) -> None:
    added = "  - {id: calm, text: Be calm., applies_to: [red_team, hard]}\n"
    write(tmp_path, base=BASE, x=f"name: x\nextends: base.yaml\nprinciples:\n{added}")
    kind, _, calm = load_constitution(tmp_path / "x.yaml").principles
    assert kind.location == f"{tmp_path}/base.yaml:3:10"
    assert calm.location == f"{tmp_path}/x.yaml:4:10"
    assert kind.applies([])
    assert kind.applies(["red_team"])
    assert calm.applies(["helpful", "hard"])
    assert not calm.applies(["helpful"])
    assert not calm.applies([])


def test_a_document_is_never_suggested_as_what_it_extends(tmp_path: Path) -> None:
    write(tmp_path, mine="name: x\nextends: mime.yaml\n")
    assert "did you mean" not in refusal(tmp_path / "mine.yaml")
    write(tmp_path, mime2=BASE)
    assert "did you mean 'mime2.yaml'" in refusal(tmp_path / "mine.yaml")


def test_a_prompt_may_be_a_conversation(tmp_path: Path) -> None:
    turns = "[{role: user, content: 2+2}, {role: assistant, content: '4'}, {role: user, content: Sure}]"
    case = f"{{prompt: {turns}, better: Y, worse: N}}"
    write(tmp_path, x=f"name: x\nprinciples:\n- {{id: a, text: T., examples: [{case}]}}\n")
    (example,) = load_constitution(tmp_path / "x.yaml").principles[0].examples
    assert example.prompt == "Sure"
    assert [message["role"] for message in example.conversation] == ["user", "assistant", "user"]


def test_the_same_id_replaces_in_place_and_drop_removes(tmp_path: Path) -> None:
    write(
        tmp_path,
        base=BASE,
        x="name: x\nextends: base.yaml\nprinciples:\n  - {id: new, text: Be new.}\n"
        "  - {id: kind, text: Be kinder.}\n  - {id: brief, drop: true}\n",
    )
    loaded = load_constitution(tmp_path / "x.yaml")
    principles = [(principle.id, principle.text, principle.weight) for principle in loaded.principles]
    assert principles == [("kind", "Be kinder.", 1.0), ("new", "Be new.", 1.0)]
    assert [path.name for path in loaded.documents] == ["base.yaml", "x.yaml"]


def test_later_documents_of_a_list_replace_earlier_ones_and_a_shared_base_is_read_once(tmp_path: Path) -> None:
    write(
        tmp_path,
        base=BASE,
        first="name: first\nextends: base.yaml\nprinciples: [{id: kind, text: First.}]\n",
        sub__second="name: second\nextends: ../base.yaml\nprinciples: [{id: brief, text: Second.}]\n",
        x="name: x\nextends: [first.yaml, sub/second.yaml]\n",
    )
    loaded = load_constitution(tmp_path / "x.yaml")
    texts = {principle.id: principle.text for principle in loaded.principles}
    assert list(texts.items()) == [("kind", "First."), ("brief", "Second.")], "second leaves what first changed"
    assert [path.name for path in loaded.documents] == ["base.yaml", "first.yaml", "second.yaml", "x.yaml"]


@pytest.mark.parametrize("extends", ["[layer.yaml, base.yaml]", "[base.yaml, layer.yaml]", "[layer.yaml, layer.yaml]"])
def test_a_base_named_beside_its_layer_brings_nothing_back(tmp_path: Path, extends: str) -> None:
    write(
        tmp_path,
        base=BASE,
        layer="name: layer\nextends: base.yaml\nprinciples: [{id: brief, drop: true}, {id: kind, text: Kinder.}]\n",
        x=f"name: x\nextends: {extends}\n",
    )
    loaded = load_constitution(tmp_path / "x.yaml")
    assert [(principle.id, principle.text) for principle in loaded.principles] == [("kind", "Kinder.")]
    assert [path.name for path in loaded.documents] == ["base.yaml", "layer.yaml", "x.yaml"]
    assert [(change.kind, change.id) for change in loaded.changes] == [("dropped", "brief"), ("replaced", "kind")]


def test_what_one_layer_drops_another_layer_of_the_same_base_may_drop_too_and_may_write_anew(tmp_path: Path) -> None:
    dropped = "extends: base.yaml\nprinciples: [{id: brief, drop: true}]\n"
    write(
        tmp_path,
        base=BASE,
        first=f"name: first\n{dropped}",
        second=f"name: second\n{dropped}",
        third="name: third\nextends: base.yaml\nprinciples: [{id: brief, text: Briefer.}]\n",
        both="name: both\nextends: [first.yaml, second.yaml]\n",
        anew="name: anew\nextends: [first.yaml, third.yaml]\n",
    )
    assert [principle.id for principle in load_constitution(tmp_path / "both.yaml").principles] == ["kind"]
    assert [principle.text for principle in load_constitution(tmp_path / "anew.yaml").principles][-1] == "Briefer."
    with pytest.raises(BadInput, match=rf"no principle 'brief', it is dropped at {tmp_path}/first\.yaml:3:19"):
        load_constitution(tmp_path / "both.yaml").principle("brief")


def test_documents_keep_the_order_of_every_list_and_orders_that_contradict_each_other_are_refused(
    tmp_path: Path,
) -> None:
    leaf = "name: leaf\nprinciples: [{id: %s, text: T.}]\n"
    write(tmp_path, **{name: leaf % name for name in "abcd"})
    write(
        tmp_path,
        p="name: p\nextends: c.yaml\n",
        q="name: q\nextends: [d.yaml, c.yaml]\n",
        x="name: x\nextends: [p.yaml, q.yaml]\n",
        first="name: first\nextends: [a.yaml, b.yaml]\n",
        second="name: second\nextends: [b.yaml, a.yaml]\n",
        y="name: y\nextends: [first.yaml, second.yaml]\n",
    )
    documents = [path.stem for path in load_constitution(tmp_path / "x.yaml").documents]
    assert documents == ["d", "c", "p", "q", "x"], "c comes after d, as in q, though p is listed first"
    message = (
        "extends: found a.yaml and b.yaml in orders that contradict each other, expected one order in every `extends`"
    )
    assert refusal(tmp_path / "y.yaml") == f"{tmp_path}/y.yaml:2:10: {message}"


def test_changes_name_what_documents_do_to_those_before_them_and_where(tmp_path: Path) -> None:
    principles = (
        "  - {id: kind, text: Be kind., weight: 1}\n  - {id: calm, text: Be calm., compare: Which?}\n"
        "  - {id: open, text: Be frank., weight: 0.5}\n  - {id: same, text: The same.}\n  - {id: brief, drop: true}\n"
        "  - {id: new, text: Be new.}\n"
    )
    write(
        tmp_path,
        base=BASE + "  - {id: calm, text: Be calm.}\n  - {id: open, text: Be open.}\n  - {id: same, text: The same.}\n",
        x=f"name: x\nextends: base.yaml\nprinciples:\n{principles}",
    )
    changes = [change.plain() for change in load_constitution(tmp_path / "x.yaml").changes]
    shown = [(change["change"], change["id"], change.get("fields"), change.get("weight")) for change in changes]
    assert shown == [
        ("reweighed", "kind", ["weight"], {"from": 2.0, "to": 1.0}),
        ("replaced", "calm", ["compare"], None),
        ("replaced", "open", ["text", "weight"], {"from": 1.0, "to": 0.5}),
        ("repeated", "same", None, None),
        ("dropped", "brief", None, None),
        ("new", "new", None, None),
    ]
    places = [(change["location"], change.get("before")) for change in changes]
    assert places[0] == (f"{tmp_path}/x.yaml:4:10", f"{tmp_path}/base.yaml:3:10")
    assert places[-1] == (f"{tmp_path}/x.yaml:9:10", None)
    assert load_constitution(tmp_path / "base.yaml").changes == ()


def test_all_problems_of_a_document_and_of_those_that_it_extends_are_reported_at_once(tmp_path: Path) -> None:
    write(
        tmp_path,
        base="name: base\nprinciples: [{id: kind, text: Be kind., weight: heavy}]\n",
        other="name: [\n",
        x="name: No\nextends: [base.yaml, other.yaml, nobody.yaml, base.yaml]\nprinciples:\n"
        "  - {id: a, text: A., tag: [x]}\n  - {id: a, text: 3}\n  - {id: c, drop: true}\n",
    )
    lines = refusal(tmp_path / "x.yaml").replace(f"{tmp_path}/", "").splitlines()
    places = [line.partition(" ")[0] for line in lines]
    assert places == [
        "x.yaml:1:7:", "x.yaml:2:34:", "x.yaml:4:23:", "x.yaml:5:10:", "x.yaml:5:19:", "base.yaml:2:49:",
        "other.yaml:2:1:",
    ]  # fmt: skip
    assert "found the id 'a' a second time" in lines[3]
    write(
        tmp_path,
        base=BASE,
        x="name: x\nextends: base.yaml\nprinciples:\n  - {id: c, drop: true}\n  - {id: d, txt: D.}\n",
    )
    lines = refusal(tmp_path / "x.yaml").splitlines()
    assert len(lines) == 2, "the ids of the base are known, so the dropped one is checked beside the misspelt key"
    assert "found 'drop: true' for 'c'" in lines[0]


def test_documents_that_are_wrong_are_read_once_each(tmp_path: Path) -> None:
    write(tmp_path, d0="name: 3\n")
    for n in range(1, 40):
        write(tmp_path, **{f"d{n}": f"name: x\nextends: [d{n - 1}.yaml, d{n - 1}.yaml]\n"})
    assert refusal(tmp_path / "d39.yaml").count("\n") == 0


def test_many_documents_that_extend_each_other_twice_are_each_compiled_once(tmp_path: Path) -> None:
    write(tmp_path, d0=BASE)
    for n in range(1, 40):
        write(tmp_path, **{f"d{n}": f"name: x\nextends: [d{n - 1}.yaml, d{n - 1}.yaml]\n"})
    assert len(load_constitution(tmp_path / "d39.yaml").principles) == 2
    for n in range(40, 70):
        write(tmp_path, **{f"d{n}": f"name: x\nextends: d{n - 1}.yaml\n"})
    assert "d20.yaml:2:11: extends[0]: found a chain of more than 50 documents" in refusal(tmp_path / "d69.yaml")


def test_extends_cannot_leave_the_folder_of_the_named_document(tmp_path: Path) -> None:
    write(tmp_path, secret="password: hunter2\n", inside__base=BASE, inside__sub__x="name: x\nextends: ../base.yaml\n")
    inside = tmp_path / "inside"
    (inside / "link.yaml").symlink_to(tmp_path / "secret.yaml")
    (inside / "linked").symlink_to(tmp_path)
    (inside / "round.yaml").symlink_to(inside / "round.yaml")
    (inside / "folder.yaml").mkdir()
    source = shipped_folder("constitutions") / "harmlessness.yaml"
    shipped = f"'harmlessness' is shipped, and is extended as a copy beside this file: cp {source} {inside}"
    for name, message in {
        "../secret.yaml": "lies outside of the folder of",
        "sub/../../secret.yaml": "lies outside of the folder of",
        "link.yaml": "lies outside of the folder of",
        "linked/secret.yaml": "lies outside of the folder of",
        str(inside / "base.yaml"): "found the absolute path",
        "/dev/zero.yaml": "found the absolute path",
        "round.yaml": "cannot be read",
        "folder.yaml": "is no file",
        "bse.yaml": "is no file; did you mean 'base.yaml'?",
        "x" * 300 + ".yaml": "inside/x.yaml:2:10: extends: found",
        "~/base.yaml": "is no file",
        "base": "expected the relative path of a .yaml file; did you mean 'base.yaml'?",
        '"a\\0b.yaml"': "expected the relative path of a .yaml file",
        "basis": "expected the relative path of a .yaml file; did you mean 'base.yaml'?",
        "harmlessness": f"expected the relative path of a .yaml file; {shipped}",
        "harmlesness.yaml": f"'harmlesness.yaml', which is no file; {shipped}",
    }.items():
        write(inside, x=f"name: x\nextends: {name}\n")
        refused = refusal(inside / "x.yaml")
        assert message in refused
        assert "hunter2" not in refused
        assert re.match(rf"{inside}/x\.yaml:2:10: extends: ", refused)
    # The named document sets the boundary, also for documents that it extends.
    write(inside, x="name: x\nextends: sub/x.yaml\n")
    assert len(load_constitution(inside / "x.yaml").principles) == 2
    assert "lies outside of the folder of" in refusal(inside / "sub" / "x.yaml")


def test_a_document_that_is_itself_a_link_extends_what_lies_beside_the_link(tmp_path: Path) -> None:
    write(tmp_path, store__x="name: x\nextends: base.yaml\n", here__base=BASE)
    (tmp_path / "here" / "x.yaml").symlink_to(tmp_path / "store" / "x.yaml")
    assert len(load_constitution(tmp_path / "here" / "x.yaml").principles) == 2


def test_circles_are_refused_with_the_chain(tmp_path: Path) -> None:
    write(tmp_path, a="name: a\nextends: b.yaml\n", b="name: b\nextends: [c.yaml]\n", c="name: c\nextends: b.yaml\n")
    circle = "found a circle of documents, b.yaml -> c.yaml -> b.yaml, expected it to end"
    assert refusal(tmp_path / "a.yaml") == f"{tmp_path}/c.yaml:2:10: extends: {circle}"


def test_a_shipped_constitution_is_found_by_name() -> None:
    assert load_constitution("harmlessness").name == "harmlessness"
    with pytest.raises(BadInput, match=r"no shipped constitution; did you mean 'harmlessness'\?"):
        load_constitution("harmlesness")
    with pytest.raises(BadInput, match="no shipped constitution; 'quickstart' is a recipe"):
        load_constitution("quickstart")


def test_an_entry_with_a_weight_alone_reweighs_the_inherited_principle(tmp_path: Path) -> None:
    write(tmp_path, base=BASE, x="name: x\nextends: base.yaml\nprinciples: [{id: kind, weight: 0.5}]\n")
    before, after = (load_constitution(tmp_path / f"{name}.yaml") for name in ("base", "x"))
    first = before.principles[0]
    assert after.principles == (replace(first, weight=0.5), *before.principles[1:])
    assert [(change.kind, change.id, change.weights) for change in after.changes] == [("reweighed", "kind", (2, 0.5))]
    write(tmp_path, x="name: x\nextends: base.yaml\nprinciples: [{id: knid, weight: 0.5}]\n")
    assert "found `weight` alone for 'knid', expected `text` too" in refusal(tmp_path / "x.yaml")
    write(tmp_path, x="name: x\nprinciples: [{id: kind, weight: 0.5}]\n")
    assert "found `weight` alone for 'kind', expected `text` too" in refusal(tmp_path / "x.yaml")


def test_a_document_that_drops_every_principle_is_called_that(tmp_path: Path) -> None:
    entries = "{id: kind, drop: true}, {id: brief, drop: true}"
    write(tmp_path, base=BASE, x=f"name: x\nextends: base.yaml\nprinciples: [{entries}]\n")
    assert "found that every principle is dropped, expected at least one" in refusal(tmp_path / "x.yaml")


def test_a_weight_for_a_principle_that_another_layer_dropped_is_reported(tmp_path: Path) -> None:
    write(
        tmp_path, base=BASE, a="name: a\nextends: base.yaml\nprinciples: [{id: kind, drop: true}]\n",
        b="name: b\nextends: base.yaml\nprinciples: [{id: kind, weight: 0.5}]\n",
        x="name: x\nextends: [a.yaml, b.yaml]\n",
    )  # fmt: skip
    constitution = load_constitution(tmp_path / "x.yaml")
    assert [principle.id for principle in constitution.principles] == ["brief"]
    assert [(change.kind, change.id) for change in constitution.changes] == [
        ("dropped", "kind"), ("without effect", "kind"),
    ]  # fmt: skip
