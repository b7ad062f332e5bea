"""Prompts and human pairs from files of other people; every row is accounted for."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from shared_data import SHARED_DATA

from cai.micro import conversations
from cai.prompt_sets import PairSet, PromptSet, load_human_pairs, read_prompt_set
from cai.storage.rows import HELD_OUT, Prompt, canonical_json
from cai.text.errors import BadInput

ROWS = [{"prompt": "Hi\nthere"}, {"prompt": '你好, "quoted"'}, {"prompt": "Hi\nthere"}, {"prompt": "Bye"}]


def jsonl(path: Path, rows: list[object]) -> Path:
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def load(folder: Path, **config: object) -> list[Prompt]:
    return read_prompt_set(PromptSet.model_validate(config), folder).prompts


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt["messages"][-1]["content"] for prompt in prompts]


def test_every_format_gives_the_same_prompts_and_takes_duplicates_once(tmp_path: Path) -> None:
    import datasets
    import pyarrow
    from pyarrow import parquet

    jsonl(tmp_path / "a.jsonl", ROWS)
    jsonl(tmp_path / "a.jsonl.gz", ROWS)
    for name in ("a.csv", "a.csv.gz"):
        open_file = gzip.open if name.endswith("gz") else open
        with open_file(tmp_path / name, "wt", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["prompt"], *([row["prompt"]] for row in ROWS)])
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "plain"))
    splits = datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)})
    splits.save_to_disk(str(tmp_path / "splits"))

    prompts = load(tmp_path, source="a.jsonl")
    assert texts(prompts) == ["Hi\nthere", '你好, "quoted"', "Bye"]
    prompt_set = read_prompt_set(PromptSet(source="a.jsonl"), tmp_path)
    assert (prompt_set.rows, prompt_set.duplicates) == (4, 1)
    for source in ("a.jsonl.gz", "a.csv", "a.csv.gz", "a.parquet", "plain"):
        assert [p["id"] for p in load(tmp_path, source=source)] == [p["id"] for p in prompts]
    assert texts(load(tmp_path, source="splits", split="test")) == texts(prompts)
    with pytest.raises(BadInput, match=r"splits: found no `split:`, expected one of test"):
        load(tmp_path, source="splits")


def test_columns_tags_and_messages_are_mapped(tmp_path: Path) -> None:
    speakers = (("human", "Hi"), ("gpt", "Hello"), ("human", "And now?"))
    turns = [{"from": role, "value": text} for role, text in speakers]
    jsonl(tmp_path / "a.jsonl", [{"conversation": turns, "labels": "x, y", "intro": "Be brief."}])
    columns = {"messages": "conversation", "tags": "labels", "system": "intro"}
    (prompt,) = load(tmp_path, source="a.jsonl", columns=columns, tags=["red_team"])
    assert [m["role"] for m in prompt["messages"]] == ["system", "user", "assistant", "user"]
    assert prompt["messages"][0]["content"] == "Be brief."
    assert prompt["tags"] == ["red_team", "x", "y"]
    assert prompt["source"] == "a.jsonl"


def test_limit_shuffle_and_held_out_share_depend_on_the_rows_alone(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [{"prompt": f"question {n}"} for n in range(400)])
    jsonl(tmp_path / "more.jsonl", [{"prompt": f"question {n}"} for n in range(-50, 400)])
    assert texts(load(tmp_path, source="a.jsonl", limit=2)) == ["question 0", "question 1"]
    shuffled = load(tmp_path, source="a.jsonl", limit=20, seed=1)
    assert texts(shuffled) == texts(load(tmp_path, source="a.jsonl", limit=20, seed=1))
    assert texts(shuffled) != texts(load(tmp_path, source="a.jsonl", limit=20))

    def held_out(source: str) -> set[str]:
        return {p["id"] for p in load(tmp_path, source=source, hold_out=0.25) if HELD_OUT in p["tags"]}

    assert 60 < len(held_out("a.jsonl")) < 140
    assert held_out("a.jsonl") <= held_out("more.jsonl")
    assert all(HELD_OUT in p["tags"] for p in load(tmp_path, source="a.jsonl", hold_out=True))
    with pytest.raises(ValidationError):
        PromptSet(source="a.jsonl", hold_out=1.5)


def test_micro_is_a_prompt_set(tmp_path: Path) -> None:
    assert load(tmp_path, source="micro", split="test", limit=5) == conversations.prompts("test", (), 5, 0)


@pytest.mark.parametrize("tags", [["rd_team"], ["helpful", "rd_team"]])
def test_a_tag_that_the_embedded_world_does_not_know_is_refused(tmp_path: Path, tags: list[str]) -> None:
    with pytest.raises(BadInput, match=r"'rd_team', expected one of red_team, .*; did you mean 'red_team'\?"):
        load(tmp_path, source="micro", tags=tags)
    prompts = load(tmp_path, source="micro", split="test", tags=["red_team"], limit=5, hold_out=True)
    assert all({"red_team", HELD_OUT} <= set(prompt["tags"]) for prompt in prompts)
    with pytest.raises(ValidationError, match="are for files"):
        PromptSet(source="micro", format="csv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "Hi"}\n{"prompt"\n', r"a\.jsonl:2: not a JSON object on one line"),
        ("a.jsonl", '{"prompt": "Hi"}\n\n[1]\n', r"a\.jsonl:3: found a list of 1, expected a JSON object"),
        ("a.jsonl", '{"promt": "Hi"}\n', r"the columns promt, expected 'prompt'; .* `columns: \{prompt: promt\}`"),
        ("a.jsonl", '{"q": "Hi"}\n', r"a\.jsonl:1: found the columns q, .* `columns: \{prompt: …\}`"),
        ("a.jsonl", '{"prompt": 3}\n', r"a\.jsonl:1: found the number 3 in 'prompt', expected a text or a list"),
        ("a.jsonl", '{"prompt": " "}\n', r"a\.jsonl:1: found an empty text in 'prompt'"),
        ("a.jsonl", '{"prompt": "\\ud800"}\n', r"a\.jsonl:1: found half of a surrogate pair"),
        ("a.jsonl", '{"messages": [{"role": "usr", "content": "Hi"}]}\n', r"message 1 .* did you mean 'user'\?"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "Hi"}]}\n', r"last message .* is no user's"),
        ("a.jsonl", "", r"a\.jsonl: found no rows, expected prompts"),
        ("a.csv", 'prompt,n\n"two\nlines",1\nHi\n', r"a\.csv:4: found 1 columns, expected 2 as in the first line"),
        ("a.csv", "prompt;tags\nHi, you;help\n",
         r"a\.csv:1: found ';' between the columns, expected ','; save it with ',' or as \.jsonl"),
        ("a.csv", "prompt\ttags\nHi\thelp\n", r"a\.csv:1: found '\\t' between .* or call it \.tsv"),
        ("a.tsv", "prompt,tags\nHi,help\n", r"a\.tsv:1: found ',' between .* or call it \.csv"),
        ("a.csv", "prompt\nHi, you\n", r"a\.csv:2: found 2 columns, .*; text with ',' in it stands in double quotes"),
        ("a.csv", 'prompt\n"open\n', r"a\.csv:2: not CSV: unexpected end of data"),
        ("a.parquet", "nothing", r"a\.parquet: not a Parquet file"),
        ("a.jsonl.gz", "nothing", r"a\.jsonl\.gz:1: not a whole gzip file"),
        ("a.txt", "Hi", r"a\.txt: cannot tell the format by the name"),
        ("b.jsonl", "", r"a\.jsonl: no such file or folder, .*; did you mean 'b\.jsonl'\?"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named_with_its_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=message) as error:
        load(tmp_path, source="a.jsonl" if name == "b.jsonl" else name)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "Hi"}\n{"prompt": "\xff"}\n')
    with pytest.raises(BadInput, match=r"a\.jsonl:[12]: not UTF-8 text"):
        load(tmp_path, source="a.jsonl")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
@pytest.mark.parametrize(("name", "text"), [("a.jsonl", '{"prompt": "Hi"}\n'), ("a.csv", "prompt\nHi\n")])
def test_a_file_in_utf_16_is_refused_with_the_command_that_converts_it(
    tmp_path: Path, name: str, text: str, encoding: str
) -> None:
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(BadInput, match=rf"{name}:1: found text in UTF-16, expected UTF-8; .* iconv -f UTF-16"):
        load(tmp_path, source=name)


START = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: How?\n\nAssistant:"


def test_transcripts_are_read_with_all_their_turns(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl.gz", [{"chosen": START + " Like this.", "rejected": START + " No."}])
    (prompt,) = load(tmp_path, source="a.jsonl.gz", tags=["red_team"])
    turns = [(message["role"], message["content"]) for message in prompt["messages"]]
    assert turns == [("user", "Hi"), ("assistant", "Hello."), ("user", "How?")]
    jsonl(tmp_path / "bad.jsonl", [{"chosen": START, "rejected": START}, {"chosen": "Human: Hi", "rejected": START}])
    with pytest.raises(BadInput, match=r"bad\.jsonl:2: the transcript in 'chosen' does not begin"):
        load(tmp_path, source="bad.jsonl", format="hh")


def test_human_pairs_are_preferences_and_what_is_no_pair_is_counted(tmp_path: Path) -> None:
    good = {"chosen": START + " Like this.", "rejected": START + " No."}
    rows = [
        good,
        good,
        {"chosen": START + " Same.", "rejected": START + " Same."},
        {"chosen": START + " Yes.", "rejected": "\n\nHuman: Hey\n\nAssistant: No."},
        {"chosen": START, "rejected": START + " No."},
        {"chosen": START + " A\n\nHuman: Thanks", "rejected": START + " No."},
    ]
    jsonl(tmp_path / "a.jsonl", rows)
    pairs = load_human_pairs(PairSet(source="a.jsonl", tags=["red_team"], hold_out=True), tmp_path)
    (preference,) = pairs.preferences
    assert pairs.rows == len(rows) == len(pairs.preferences) + sum(pairs.left_out.values())
    assert pairs.left_out == {
        "the same pair again": 1, "the same answer twice": 1, "different conversations": 1, "an empty answer": 1,
        "no answer at the end": 1,
    }  # fmt: skip
    assert preference["chosen"] == [{"role": "assistant", "content": "Like this."}]
    assert preference["rejected"] == [{"role": "assistant", "content": "No."}]
    assert preference["source"] == "human"
    assert preference["p_chosen"] == 1
    assert preference["tags"] == ["red_team", HELD_OUT]
    canonical_json(preference)
    assert load(tmp_path, source="a.jsonl")[0]["id"] == preference["prompt_id"]
    jsonl(tmp_path / "b.jsonl", [{"prompt": "Hi"}])
    with pytest.raises(BadInput, match="no hh-rlhf transcripts"):
        load_human_pairs(PairSet(source="b.jsonl"), tmp_path)


HH = SHARED_DATA / "hh_harmless_base.jsonl.gz"


@pytest.mark.skipif(not HH.is_file(), reason=f"no {HH}: set CAI_TEST_DATA to the folder with hh-rlhf's rows")
def test_every_row_of_the_real_transcripts_is_accounted_for() -> None:
    prompt_set = read_prompt_set(PromptSet(source=HH.name, tags=["red_team"]), HH.parent)
    assert prompt_set.rows == 1500 == len(prompt_set.prompts) + prompt_set.duplicates
    assert all(prompt["messages"][-1]["role"] == "user" for prompt in prompt_set.prompts)
    assert sum(len(prompt["messages"]) > 1 for prompt in prompt_set.prompts) > 1000
    pairs = load_human_pairs(PairSet(source=HH.name, hold_out=0.2), HH.parent)
    assert pairs.rows == 1500 == len(pairs.preferences) + sum(pairs.left_out.values())
    assert pairs.left_out["different conversations"] == 1
    assert len(pairs.preferences) > 1490
    held_out = sum(HELD_OUT in preference["tags"] for preference in pairs.preferences)
    assert 240 < held_out < 360
