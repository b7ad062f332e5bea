"""Served models in recipes: where they may stand, how they are identified, and that a profile changes no result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_server import Behaviour, ServedModel, Server, serving

from cai.cli import main
from cai.contracts.profile import Profile, load_profile
from cai.models import loading, reference
from cai.run.pipeline import run_recipe
from cai.run.plan import Options, plan_recipe
from cai.run.recipe import load_recipe
from cai.storage import run_folder
from cai.storage.rows import read_rows
from cai.text.errors import BadInput
from cai.text.progress import PlainDisplay

RECIPE = """
name: trial
model: micro
judge: JUDGE
constitution: micro
templates: micro
prompts:
  red_team: {source: micro, split: train, tags: [red_team], limit: 1}
stages:
  - {id: responses, kind: sample, prompts: red_team, n: 2, max_new_tokens: 6}
  - {id: votes, kind: judge, from: responses, principles: 2, cut_off: keep}
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    micro = ServedModel(reference.resolve("micro", folder=Path()))
    with serving(micro, Behaviour(names=("micro", "critic"))) as server:
        yield server


def recipe(folder: Path, judge: str = "model", text: str = RECIPE) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text.replace("JUDGE", judge), encoding="utf-8")
    return path


def profile(server: Server, **settings: object) -> Profile:
    return Profile.model_validate({"device": "cpu", "dtype": "float32", "server": {"url": server.url}, **settings})


def votes(path: Path, on: Profile, run: str = "runs") -> list[dict]:
    run_recipe(load_recipe(path), on, path.parent / run, Options(), PlainDisplay())
    return read_rows(run_folder.latest(path.parent / run)["votes"] / "records.jsonl")


def log_odds(rows: list[dict]) -> list[float]:
    return [vote["log_odds"] for row in rows for vote in row["votes"]]


def test_a_served_judge_votes_as_it_does_here_and_is_known_by_its_name(tmp_path, server) -> None:
    local = votes(recipe(tmp_path), profile(server), "here")
    with pytest.warns(UserWarning, match="the tokenizer of model 'served:critic' is not here"):
        served = votes(recipe(tmp_path, "served:critic"), profile(server), "there")
    assert log_odds(served) == pytest.approx(log_odds(local), abs=1e-3)
    assert log_odds(local)
    assert {row["judge"] for row in served} == {"served:critic"}
    stage = json.loads((run_folder.latest(tmp_path / "there")["votes"] / "stage.json").read_text(encoding="utf-8"))
    assert stage["parts"]["model.served:critic"] == "served:critic"
    assert stage["config"]["judge"] == "served:critic"


def test_the_engine_is_where_and_not_what(tmp_path, server) -> None:
    path = recipe(tmp_path)
    run_recipe(load_recipe(path), profile(server, engine="server"), tmp_path / "runs", Options(), PlainDisplay())
    assert {body["model"] for _, body in server.requests} >= {"micro"}
    steps = plan_recipe(load_recipe(path), profile(server), tmp_path / "runs", Options())
    assert {step.status for step in steps} == {"reused"}


def test_training_a_model_that_only_a_server_has_is_refused_before_anything_runs(tmp_path) -> None:
    text = RECIPE + "  - {id: sl, kind: sft, model: 'served:big', from: responses}\n"
    with pytest.raises(BadInput, match=r"recipe.yaml:\d+:\d+: .*sft trains 'served:big', which only a server has"):
        load_recipe(recipe(tmp_path, text=text))
    text = RECIPE.replace("model: micro", "model: served:big") + "  - {id: sl, kind: sft, from: responses}\n"
    with pytest.raises(BadInput, match="sft trains 'served:big'"):
        load_recipe(recipe(tmp_path, text=text))


def test_a_served_model_has_no_files_and_says_so(tmp_path) -> None:
    model = reference.resolve("served:org/big:free", folder=tmp_path)
    assert (model.templates, reference.identity(model)) == ("default", "served:org/big:free")
    for load in (reference.fetch, loading.load_tokenizer, loading.load_causal_lm):
        with pytest.raises(BadInput, match="'served:org/big:free' exists only at a server"):
            load(model)
    with pytest.raises(BadInput, match="found 'served:', expected a model's name"):
        reference.resolve("served:", folder=tmp_path)


def test_a_dry_run_says_where_models_answer(tmp_path) -> None:
    path = recipe(tmp_path, "served:critic")

    def dry_run_output(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["run", str(path), "--runs", str(tmp_path), "--dry-run", *arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    assert "micro          here, engine local" in dry_run_output()
    assert "served:critic  at http://127.0.0.1:8000/v1 as 'critic'" in dry_run_output()
    models = json.loads(dry_run_output("--json", "--on", "server"))["models"]
    assert models["micro"] == "at http://127.0.0.1:8000/v1 as 'micro'"


@pytest.mark.parametrize(("line", "reason"), [
    ("url: https://me:secret@example.com/v1", "expected a key in `api_key_env` alone"),
    ("url: https://example.com/v1?key=secret", "expected a key in `api_key_env` alone"),
    ("url: localhost:8000", "expected an address such as http://127.0.0.1:8000/v1"),
    ("api_key_env: sk-secret-0123", "found no name of an environment variable"),
    ("concurrency: 0", "a number of at least 1"),
    ("retrys: 3", "did you mean 'retries'?"),
])  # fmt: skip
def test_a_wrong_server_is_refused_and_a_secret_in_it_not_repeated(tmp_path, line, reason) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"server:\n  {line}\n", encoding="utf-8")
    with pytest.raises(BadInput) as refused:
        load_profile(str(path))
    assert reason in str(refused.value)
    assert "secret" not in str(refused.value)
