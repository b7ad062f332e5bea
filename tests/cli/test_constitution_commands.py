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
    "text-tags": (ENTRY + "    tags: harm\n", ":5:11: principles[0].tags: found the text 'harm', expected a list"),
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
    assert run("constitution", "check", FOLDER / "harmlessness.yaml").exit_code == 0


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
        (["harmlessness", "--principle", "no-sermons"], "no principle 'no-sermons'; did you mean 'no-sermon'?"),
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
