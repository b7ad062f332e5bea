"""The output and exit codes of `cai constitution check`, `show` and `schema`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cai.cli import main
from cai.document.shipped import shipped_folder

FOLDER = shipped_folder("constitutions")
ENTRY = "name: x\nprinciples:\n  - id: a\n    text: Be kind.\n"
BROKEN = {
    "syntax": ("name: x\nprinciples: [\n", ":3:1: did not find expected node content"),
    "tab": ("name: x\nprinciples:\n\t- id: a\n", ":3:1: found a tab in the indentation, expected spaces"),
    "duplicate-key": (ENTRY + "    text: Be calm.\n", ":5:5: found the key 'text' a second time"),
    "unknown-key": (ENTRY + "    wieght: 2\n", ":5:5: principles[0].wieght: unknown key, expected one of "
                    "applies_to, compare, critique, drop, examples, id, revise, tags, text, weight; did you mean "
                    "'weight'?"),
    "unknown-top": (ENTRY + "trait: []\n", ":5:1: trait: unknown key, expected one of description, extends, name, "
                    "principles, traits; did you mean 'traits'?"),
    "no-name": ("principles: [{id: a, text: T.}]\n", ":1:1: found no 'name', expected in every document"),
    "no-text": ("name: x\nprinciples: [{id: a}]\n", ":2:14: principles[0]: found no 'text'"),
    "blank-text": ("name: x\nprinciples: [{id: a, text: '  '}]\n", ":2:28: principles[0].text: found an empty text"),
    "null-request": ("name: x\nprinciples: [{id: a, text: T., revise: }]\n", "principles[0].revise: found nothing, "
                     "expected text"),
    "bad-id": ("name: x\nprinciples: [{id: No Crime, text: T.}]\n", ":2:19: principles[0].id: found the text "
               "'No Crime', expected up to 64 lower-case letters"),
    "number-id": ("name: x\nprinciples: [{id: 7, text: T.}]\n", ":2:19: principles[0].id: found the number 7, expected "
                  "text"),
    "same-id": (ENTRY + "traits: [{id: a, text: T.}]\n", ":5:15: traits[0].id: found the id 'a' a second time"),
    "negative-weight": (ENTRY + "    weight: -1\n", ":5:13: principles[0].weight: found the number -1, expected a "
                        "number of at least 0"),
    "infinite-weight": (ENTRY + "    weight: .inf\n", ":5:13: principles[0].weight: found the number inf, expected a "
                        "finite number"),
    "text-weight": (ENTRY + "    weight: heavy\n", ":5:13: principles[0].weight: found the text 'heavy', expected a "
                    "number"),
    "text-tags": (ENTRY + "    tags: harm\n", ":5:11: principles[0].tags: found the text 'harm', expected a list; "
                  "write `tags: [harm]`"),
    "no-tags": (ENTRY + "    applies_to: []\n", ":5:17: principles[0].applies_to: found an empty list, expected"),
    "half-example": (ENTRY + "    examples: [{prompt: P, better: B}]\n", ":5:16: principles[0].examples[0]: found no "
                     "'worse'"),
    "odd-example": (ENTRY + "    examples: [{prompt: [{role: usr, content: P}], better: B, worse: W}]\n",
                    "principles[0].examples[0].prompt[0].role: found the text 'usr', expected one of system, user, "
                    "assistant; did you mean 'user'?"),
    "wrong-end": (ENTRY + "    examples: [{prompt: [{role: system, content: P}], better: B, worse: W}]\n",
                  "found a prompt that ends with the system, expected the user"),
    "drop-unknown": (ENTRY + "  - {id: b, drop: true}\n", ":5:10: principles[1].id: found 'drop: true' for 'b'"),
    "drop-and-text": (ENTRY + "    drop: true\n", ":3:5: principles[0]: found 'drop: true' beside text"),
    "drop-yes": (ENTRY + "    drop: yes\n", ":5:11: principles[0].drop: found the text 'yes', expected true or false"),
    "empty": ("", ":1:1: found an empty document"),
    "nothing-in-it": ("name: x\n", ":1:1: found neither principles nor traits, expected at least one"),
    "list": ("- id: a\n", ":1:1: found a list of 1, expected a mapping"),
    "no-file": ("name: x\nextends: nobody.yaml\n", ":2:10: extends: found 'nobody.yaml', which is no file"),
    "control": ('name: x\nprinciples: [{id: a, text: "\\e[2J"}]\n', ":2:28: principles[0].text: found the control"),
    "bomb": ("a: &a [x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 8)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ), "with aliases expanded"),
    "same-responses": (ENTRY + "    examples: [{prompt: P, better: B, worse: ' B '}]\n", ":5:46: principles[0]."
                       "examples[0].worse: found the text of 'better' again, expected a response that falls short"),
    "shipped-base": ("name: x\nextends: harmlessness\n", "'harmlessness' is shipped, and is extended as a copy beside "
                     "this file: cp "),
    "recipe": ("# a recipe\nname: x\nmodel: micro\nstages: []\n", ":2:1: this is a recipe, expected a constitution; "
               "`cai run "),
    "profile": ("device: cpu\n", ":1:1: this is a profile, expected a constitution; `cai run RECIPE --on "),
    "tag": ("name: !!python/name:os.system x\n", ":1:7: found the tag '!!python/name:os.system'"),
}  # fmt: skip


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_constitution_is_one_sentence_with_its_place_and_exit_code_2(tmp_path: Path, name: str) -> None:
    text, message = BROKEN[name]
    file = tmp_path / f"{name}.yaml"
    file.write_text(text, encoding="utf-8")
    result = run("constitution", "check", file)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert re.match(rf"{re.escape(str(file))}:\d+:\d+: ", result.stderr)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert "\x1b" not in result.stderr


def test_check_reports_every_broken_file_and_every_good_one(tmp_path: Path) -> None:
    for name in ("tab", "unknown-key"):
        (tmp_path / f"{name}.yaml").write_text(BROKEN[name][0], encoding="utf-8")
    files = [tmp_path / "tab.yaml", FOLDER / "harmlessness.yaml", tmp_path / "unknown-key.yaml", tmp_path / "none.yaml"]
    result = run("constitution", "check", *files)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 3
    counts = "19 principles, 0 traits, 38 examples, 1 document"
    assert result.stdout == f"{FOLDER}/harmlessness.yaml: harmlessness: {counts}\n"
    facts = json.loads(run("constitution", "check", "--json", *files).stdout)
    assert [document["name"] for document in facts["documents"]] == ["harmlessness"]
    assert [error["path"] for error in facts["errors"]] == [str(files[0]), str(files[2]), str(files[3])]
    places = [(error["file"], error["line"], error["column"]) for error in facts["errors"]]
    assert places == [(str(files[0]), 3, 1), (str(files[2]), 5, 5), (str(files[3]), None, None)]
    assert facts["errors"][0]["message"] == "found a tab in the indentation, expected spaces"
    assert facts["errors"][2]["message"] == "no such file; did you mean 'unknown-key.yaml'?"
    assert run("constitution", "check", FOLDER / "harmlessness.yaml").exit_code == 0


def test_check_reports_every_problem_of_a_document_with_file_line_and_column(tmp_path: Path) -> None:
    wrong, base = tmp_path / "wrong.yaml", tmp_path / "base.yaml"
    wrong.write_text("nam: x\nextends: base.yaml\nprinciples:\n  - {id: a, text: A., tags: help, weight: -1}\n")
    base.write_text("name: base\nprinciples: [{id: b, text: ' '}]\n")
    result = run("constitution", "check", wrong)
    assert result.exit_code == 2
    assert [line.partition(" ")[0] for line in result.stderr.splitlines()] == [
        f"{wrong}:1:1:", f"{wrong}:4:29:", f"{wrong}:4:43:", f"{base}:2:28:",
    ]  # fmt: skip
    assert "write `tags: [help]`" in result.stderr
    errors = json.loads(run("constitution", "check", wrong, "--json").stdout)["errors"]
    lines = [f"{error['file']}:{error['line']}:{error['column']}: {error['message']}" for error in errors]
    assert lines == result.stderr.splitlines()
    assert {error["path"] for error in errors} == {str(wrong)}


LAYER = """name: layer
extends: base.yaml
principles:
  - {id: kind, text: Be kind., weight: 2}
  - {id: brief, drop: true}
  - {id: calm, text: Be calm.}
  - {id: open, text: Be frank.}
"""


@pytest.fixture
def layered(tmp_path: Path) -> Path:
    """A folder with `base.yaml`, `layer.yaml` on it, and `both.yaml`, which extends the layer and then its base."""
    principles = "".join(f"  - {{id: {id_}, text: Be {id_}.}}\n" for id_ in ("kind", "brief", "open"))
    (tmp_path / "base.yaml").write_text(f"name: base\nprinciples:\n{principles}")
    (tmp_path / "layer.yaml").write_text(LAYER)
    (tmp_path / "both.yaml").write_text("name: both\nextends: [layer.yaml, base.yaml]\n")
    return tmp_path


@pytest.mark.parametrize("name", ["layer.yaml", "both.yaml"])
def test_show_reports_what_is_new_replaced_reweighed_and_dropped_and_where(layered: Path, name: str) -> None:
    shown = run("constitution", "show", layered / name)
    assert shown.exit_code == 0
    report = shown.stdout.partition("\nmade of ")[2].replace(f"{layered}/", "").splitlines()
    assert report[0].startswith("base.yaml, layer.yaml")
    assert [re.split("  +", line.strip()) for line in report[1:]] == [
        ["reweighed", "kind", "layer.yaml:4:10", "weight 1 to 2; was base.yaml:3:10"],
        ["dropped", "brief", "layer.yaml:5:10", "was base.yaml:4:10"],
        ["new", "calm", "layer.yaml:6:10"],
        ["replaced", "open", "layer.yaml:7:10", "text; was base.yaml:5:10"],
    ]
    assert "Be brief." not in shown.stdout
    facts = json.loads(run("constitution", "show", layered / name, "--json").stdout)
    assert [(change["change"], change["id"]) for change in facts["overlay"]] == [
        ("reweighed", "kind"), ("dropped", "brief"), ("new", "calm"), ("replaced", "open"),
    ]  # fmt: skip
    assert facts["overlay"][0]["weight"] == {"from": 1.0, "to": 2.0}
    assert facts["documents"] == [str(layered / file) for file in dict.fromkeys(["base.yaml", "layer.yaml", name])]
    of_principle = run("constitution", "show", layered / name, "--principle", "kind").stdout
    assert "reweighed" in of_principle
    assert "dropped" not in of_principle
    assert "made of" not in run("constitution", "show", layered / "base.yaml").stdout


def test_diff_shows_principles_added_removed_and_changed_with_both_texts(layered: Path) -> None:
    result = run("constitution", "diff", layered / "base.yaml", layered / "layer.yaml")
    assert result.exit_code == 0
    lines = result.stdout.replace(f"{layered}/", "").splitlines()
    assert lines[:2] == ["- base.yaml: base", "+ layer.yaml: layer"]
    assert lines[-1] == "1 added, 1 removed, 2 changed, 0 the same"
    text = "\n".join(lines)
    assert "added  calm  layer.yaml:6:10\n  + Be calm." in text
    assert "removed  brief  base.yaml:4:10\n  - Be brief." in text
    assert "changed  kind  base.yaml:3:10  layer.yaml:4:10\n  weight\n  - 1\n  + 2\n" in text
    assert "changed  open  base.yaml:5:10  layer.yaml:7:10\n  text\n  - Be open.\n  + Be frank.\n" in text
    facts = json.loads(run("constitution", "diff", layered / "base.yaml", layered / "layer.yaml", "--json").stdout)
    assert facts["a"] == {"path": str(layered / "base.yaml"), "name": "base"}
    assert [principle["id"] for principle in facts["added"] + facts["removed"]] == ["calm", "brief"]
    assert {change["id"]: change["fields"] for change in facts["changed"]} == {
        "kind": {"weight": [1.0, 2.0]}, "open": {"text": ["Be open.", "Be frank."]},
    }  # fmt: skip


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_diff_has_the_exit_codes_of_git(layered: Path, options: list[str]) -> None:
    base, layer, both = layered / "base.yaml", layered / "layer.yaml", layered / "both.yaml"
    assert run("constitution", "diff", base, layer, "--exit-code", *options).exit_code == 1
    assert run("constitution", "diff", layer, both, "--exit-code", *options).exit_code == 0
    assert run("constitution", "diff", "harmlessness", layer, *options).exit_code == 0
    refused = run("constitution", "diff", layered / "no.yaml", layered / "none.yaml", *options)
    assert refused.exit_code == 2
    assert refused.stdout == ""
    assert re.findall(r"(\w+)\.yaml: no such file", refused.stderr) == ["no", "none"]


def test_diff_prints_every_kind_of_value_and_nothing_that_steers(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\nprinciples: [{id: x, text: T.}]\n")
    example = "{prompt: [{role: user, content: P}], better: B, worse: W}"
    text = f'"\\u202eU.\\nV.", tags: [t], applies_to: [help], examples: [{example}]'
    (tmp_path / "b.yaml").write_text(f"name: b\nprinciples: [{{id: x, text: {text}}}]\n")
    printed = run("constitution", "diff", tmp_path / "a.yaml", tmp_path / "b.yaml").stdout
    for line in ("  + �U. V.", "  - none", "  + t", "  - all prompts", "  + help", "  + P  better: B  worse: W"):
        assert line in printed.splitlines()


def test_show_prints_what_was_compiled() -> None:
    shown = run("constitution", "show", "assistant")
    assert shown.exit_code == 0
    assert "and a refusal is shorter than an answer" in shown.stdout
    text = run("constitution", "show", "assistant", "--principle", "curious", "--json").stdout
    (principle,) = json.loads(text)["principles"]
    assert (principle["id"], principle["trait"]) == ("curious", True)


def test_show_prompt_prints_the_words_that_models_get() -> None:
    arguments = ("constitution", "show", "harmlessness", "--prompt", "--principle", "no-sermon")
    requests = json.loads(run(*arguments, "--json").stdout)["no-sermon"]
    assert set(requests) == {"critic", "reviser", "judge"}
    text = run(*arguments).stdout
    for messages in requests.values():
        assert messages[-1]["content"] in text
    question = "Which response would a well-meaning user feel less accused and less lectured by, whatever it decides?"
    assert requests["judge"][-1]["content"].endswith(question)


def test_show_uses_a_placeholder_where_there_is_no_example_and_prints_nothing_that_steers(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text('name: x\nprinciples: [{id: a, text: "a [bold]\\u202Eb\\u2028c[/bold]"}]\n')
    for extra in ([], ["--prompt"], ["--prompt", "--templates", "fewshot"]):
        result = run("constitution", "show", tmp_path / "x.yaml", *extra)
        assert result.exit_code == 0
        assert "a [bold]�b�c[/bold]" in result.stdout
    assert "[what the user says]" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["harmlesness"], "did you mean 'harmlessness'?"),
        (
            ["harmlessness", "--principle", "no-sermons"],
            "found 'no-sermons', expected ids or tags of principles in 'harmlessness'; did you mean 'no-sermon'?",
        ),
        (["harmlessness", "--prompt", "--templates", "defualt"], "did you mean 'default'?"),
    ],
)
def test_show_names_the_nearest_thing(arguments: list[str], hint: str) -> None:
    result = run("constitution", "show", *arguments)
    assert result.exit_code == 2
    assert hint in result.stderr
    assert result.stderr.count("\n") == 1


def test_schema_prints_json() -> None:
    assert json.loads(run("constitution", "schema").stdout)["required"] == ["name"]
