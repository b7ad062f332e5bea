"""YAML documents: their values, the positions of these, and the sentences that refuse wrong documents."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from cai.document import (
    Document,
    Problem,
    Problems,
    WrongDocument,
    error_at,
    load_document,
    parse_document,
    validate,
)
from cai.text.errors import BadInput

HERE = Path("notes/x.yaml")


class Item(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: str
    weight: float = Field(1.0, strict=True, ge=0, allow_inf_nan=False)
    quick: bool = Field(False, strict=True)


class Root(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    extends: str | list[str] | None = None
    items: list[Item] = Field(default=[], min_length=1)


def outcome_of(load: Callable[[], Document]) -> Document | str:
    """The document, or the sentence that it is refused with."""
    try:
        return load()
    except BadInput as refused:
        return str(refused)


def refusal(text: str) -> str:
    """The one sentence that `text` is refused with."""
    with pytest.raises(BadInput) as refused:
        validate(parse_document(text, HERE), Root)
    return str(refused.value)


def test_scalars_follow_yaml_1_2() -> None:
    text = "on: no\nrate: 2e-4\nsmall: 2.0e-4\nflag: true\nday: 2024-01-01\nnone: ~\nquoted: 'true'\nhex: 0x10\n"
    assert parse_document(text, HERE).value == {
        "on": "no", "rate": 2e-4, "small": 2e-4, "flag": True, "day": "2024-01-01", "none": None, "quoted": "true",
        "hex": 16,
    }  # fmt: skip


def test_keys_and_values_have_positions() -> None:
    document = parse_document("name: x\nitems:\n  - id: a\n    weight: 2\n  - {id: b}\n", HERE)
    assert document.position(("items", 0, "weight")) == (4, 13)
    assert document.key_position(("items", 0, "weight")) == (4, 5)
    assert document.position(("items", 1)) == document.key_position(("items", 1)) == (5, 5)
    assert document.position(("items", 1, "missing", "deeper")) == (5, 5)
    assert str(error_at(document, ("items", 1, "id"), "is odd")) == "notes/x.yaml:5:10: items[1].id: is odd"


def test_an_alias_is_a_copy_that_stands_where_it_is_used() -> None:
    document = parse_document("a: &a {b: [1]}\nc: *a\n", HERE)
    assert document.value["c"] == {"b": [1]}
    assert document.value["c"] is not document.value["a"]
    assert document.position(("c",)) == (2, 4)


def test_a_value_set_from_elsewhere_is_reported_as_that() -> None:
    document = parse_document("name: x\nitems: [{id: a}]\n", HERE)
    changed = document.with_value(("items", 0, "weight"), -1, "--set items.a.weight=-1")
    assert document.value == {"name": "x", "items": [{"id": "a"}]}
    with pytest.raises(BadInput, match=r"^--set items\.a\.weight=-1: items\[0\]\.weight: found the number"):
        validate(changed, Root)
    assert changed.position(("items", 0, "id")) == (2, 14)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "1:1: found an empty document"),
        ("# nothing\n", "1:1: found an empty document"),
        ("- a\n", "1:1: found a list of 1, expected a mapping"),
        ("name:\n\tx: 1\n", "2:1: found a tab in the indentation, expected spaces"),
        ("name: a\n\tb\n", "2:1: found a tab in the indentation, expected spaces"),
        ("name: a: b\n", "1:8: found ': ' where no key can stand"),
        ("name: 'don't'\n", "1:12: found a line that does not fit"),
        ("name: [a\nitems: b\n",
         "2:6: did not find expected ',' or ']': expected YAML; what is wrong may begin at 1:7"),
        ("name: 'x\n", "found the end of the file, expected the quote to be closed"),
        ("name: a\nname: b\n", "2:1: found the key 'name' a second time, expected it once; it stands at 1:1 already"),
        ("name: a\n---\nname: b\n", "2:1: found a second document"),
        ("name: !!python/object:os.system a\n", "1:7: found the tag '!!python/object:os.system'"),
        ("1: a\n", "1:1: found the number 1 as a key, expected text"),
        ("? [a]\n: b\n", "1:3: found a list as a key"),
        ("<<: {name: a}\n", "1:1: found the merge key '<<'"),
        ("name: *nobody\n", "1:7: found an alias to an anchor that does not exist"),
        ("a: &a [*a]\n", "1:8: found the alias *a inside of what it stands for"),
        ("a: " + "[" * 100_000, "found more than 60 levels"),
        ("a: " + "{a: " * 100, "found more than 60 levels"),
        ("name: a\x1b[31m\n", "1:8: found the control character '\\x1b', expected text"),
        ("name: x\nitems:\n  - id: a\n    wieght: 1\n",
         "4:5: items[0].wieght: unknown key, expected one of id, quick, weight; did you mean 'weight'?"),
        ("nmae: x\n", "1:1: nmae: unknown key, expected one of extends, items, name; did you mean 'name'?"),
        ("items: [{id: a}]\n", "1:1: found no 'name', expected in every document"),
        ("name: x\nitems: [{weight: 1}]\n", "2:9: items[0]: found no 'id', expected in every item of 'items'"),
        ("name: x\nitems: []\n", "2:8: items: found an empty list, expected at least 1 item"),
        ("name: x\nitems: {id: a}\n", "2:8: items: found a mapping with id, expected a list"),
        ("name: x\nitems: [a]\n", "2:9: items[0]: found the text 'a', expected a mapping"),
        ("name: x\nitems: [{id: a, quick: yes}]\n",
         "2:24: items[0].quick: found the text 'yes', expected true or false;"),
        ("name: x\nitems: [{id: a, weight: .nan}]\n", "found the number nan, expected a finite number"),
        ("name: x\nitems: [{id: a, weight: '2'}]\n", "found the text '2', expected a number"),
        ("name: 3\n", "1:7: name: found the number 3, expected text; put it in quotes"),
        ("name: x\nextends: 3\n", "2:10: extends: found the number 3, expected text or a list"),
        ("name: x\nextends: [a, 3]\n", "2:14: extends[1]: found the number 3, expected text"),
    ],
)  # fmt: skip
def test_a_wrong_document_is_refused_in_one_sentence(text: str, sentence: str) -> None:
    message = refusal(text)
    assert sentence in message
    assert re.match(r"notes/x\.yaml:\d+:\d+: ", message)
    assert "\n" not in message


class Choices(BaseModel):
    model_config = ConfigDict(extra="forbid")
    principles: Literal["one", "all"] | Annotated[int, Field(ge=1)] | list[str] = "all"
    chosen: Literal["all"] | Annotated[list[str], Field(min_length=1)] = "all"
    hold_out: bool | Annotated[float, Field(gt=0, lt=1)] = False
    tags: list[str] = []
    parts: list[Item] = []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("principles: harmles", "found the text 'harmles', expected one, all, a whole number or a list; write "
         "`principles: [harmles]`"),
        ("principles: alll", "expected one, all, a whole number or a list; did you mean 'all'?"),
        ("principles: 0", "found the number 0, expected a number of at least 1"),
        ("principles: [a, 3]", "principles[1]: found the number 3, expected text; put it in quotes if it is text"),
        ("principles: {a: b}", "found a mapping with a, expected one, all, a whole number or a list"),
        ("chosen: []", "found an empty list, expected at least 1 item"),
        ("chosen: harmless", "found the text 'harmless', expected all or a list; write `chosen: [harmless]`"),
        ("hold_out: 2.5", "found the number 2.5, expected a number below 1.0"),
        ("hold_out: half", "found the text 'half', expected true or false or a number; in YAML only true and false are "
         "read as such"),
        ("tags: help", "found the text 'help', expected a list; write `tags: [help]`"),
        ("tags: help, harm", "write `tags: [help, harm]`"),
        ("tags: 'a: b'", "found the text 'a: b', expected a list"),
        ("parts: help", "found the text 'help', expected a list"),
    ],
)  # fmt: skip
def test_a_value_of_several_types_is_refused_by_what_its_author_meant(text: str, sentence: str) -> None:
    with pytest.raises(WrongDocument) as refused:
        validate(parse_document(text, HERE), Choices)
    (problem,) = refused.value.problems
    assert problem.message.endswith(sentence)


def test_all_problems_of_a_document_are_reported_in_its_order_each_with_its_place() -> None:
    text = "items:\n  - {id: 3, weight: -1}\n  - {wieght: 1, id: b}\nname: 3\nextend: x\n"
    with pytest.raises(WrongDocument) as refused:
        validate(parse_document(text, HERE), Root)
    places = [(problem.file, problem.line, problem.column) for problem in refused.value.problems]
    assert places == [("notes/x.yaml", *place) for place in ((2, 10), (2, 21), (3, 6), (4, 7), (5, 1))]
    lines = str(refused.value).splitlines()
    assert (
        lines[0] == "notes/x.yaml:2:10: items[0].id: found the number 3, expected text; put it in quotes if it is text"
    )
    assert [line.partition(" ")[0] for line in lines] == [
        f"notes/x.yaml:{line}:{column}:" for _, line, column in places
    ]


def test_collected_problems_are_raised_once_each_in_the_order_of_files_and_lines() -> None:
    problems = Problems()
    problems.raise_if_any()
    for problem in (Problem("b", "y", 1, 1), Problem("c", "x", 2, 1), Problem("a", "x", 1, 1), Problem("c", "x", 2, 1)):
        with problems.collect():
            raise WrongDocument([problem])
    with problems.collect():
        raise BadInput("no file")
    with pytest.raises(WrongDocument) as refused:
        problems.raise_if_any()
    assert str(refused.value).splitlines() == ["y:1:1: b", "x:1:1: a", "x:2:1: c", "no file"]


def test_anchors_that_explode_are_refused_before_they_do() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    assert "with aliases expanded" in refusal("\n".join(lines))
    deep = ["a0: &a0 [[[[[[[[[[x]]]]]]]]]]"] + [f"a{n}: &a{n} [[[[[[[[[[*a{n - 1}]]]]]]]]]]" for n in range(1, 30)]
    assert "found more than 60 levels" in refusal("\n".join(deep))
    wide = ["a0: &a0 " + "x" * 100_000, "b: [" + ", ".join(["*a0"] * 200) + "]"]
    assert "with aliases expanded" in refusal("\n".join(wide))


def test_a_file_that_is_no_document_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kindness.yaml").write_text("name: x\n")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    (tmp_path / "large.yaml").write_bytes(b"name: " + b"x" * 5_000_000)
    (tmp_path / "mark.yaml").write_bytes(b"\xef\xbb\xbfname: x\r\n")
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        (tmp_path / f"{encoding}.yaml").write_bytes("name: x\n".encode(encoding))
        with pytest.raises(BadInput, match=r":1:1: found text in UTF-16, expected UTF-8; save it as UTF-8, or: iconv "):
            load_document(tmp_path / f"{encoding}.yaml")
    messages = {}
    for name in ("kindnes.yaml", "latin.yaml", "large.yaml", "", "nowhere/x.yaml", "a\0b"):
        with pytest.raises(BadInput) as refused:
            load_document(tmp_path / name)
        messages[name] = str(refused.value).removeprefix(str(tmp_path))
    assert messages["kindnes.yaml"].endswith("no such file; did you mean 'kindness.yaml'?")
    assert messages["latin.yaml"] == "/latin.yaml:1:10: found bytes that are not UTF-8, expected a text file in UTF-8"
    assert messages["large.yaml"].startswith("/large.yaml:1:1: found a file of more than 5,000,000 bytes")
    assert messages[""] == ": found a folder, expected a YAML file"
    assert load_document(tmp_path / "mark.yaml").value == {"name": "x"}


def test_messages_carry_nothing_that_steers_a_terminal() -> None:
    message = refusal('"\\e[2J\\u202e": 1\n')
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e]", message)
    assert len(refusal('name: {"' + "x" * 10_000 + '": 1}')) < 400


PIECES = ["a", ": ", "- ", "\n", "  ", "\t", "&a ", "*a", "[", "]", "{", "}", "'", '"', "|", ">", "#", "? ", "\u2028",
          "!!str ", "!x ", "---\n", "...\n", "%YAML 1.2\n", "<<", "1e5", "~", "\r\n"]  # fmt: skip


@settings(max_examples=300, deadline=None)
@example("? ;")
@example("a:\n-")
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=40).map("".join)))
def test_any_text_is_a_document_or_is_refused_with_a_position(text: str) -> None:
    outcome = outcome_of(lambda: parse_document(text, HERE))
    if isinstance(outcome, str):
        assert re.match(r"notes/x\.yaml:\d+:\d+: [^\x00-\x1f]+\Z", outcome)
    else:
        lines = len(re.split("[\r\n\x85\u2028\u2029]", text))
        assert all(1 <= outcome.position((key,))[0] <= lines for key in outcome.value)


@settings(max_examples=100, deadline=None)
@given(st.binary())
def test_any_bytes_are_a_document_or_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "bytes.yaml"
    file.write_bytes(data)
    outcome = outcome_of(lambda: load_document(file))
    assert isinstance(outcome, Document) or "\n" not in outcome
