"""A recipe runs once, whatever interrupts it: reuse, reasons, damaged outputs, kills, locks, failures, processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import pytest
import toy_stages
from recipe_runs import plan, reused, run

from cai.contracts.profile import Profile
from cai.run import launch, pipeline, stage_run
from cai.run.fingerprint import changes_in_words
from cai.run.outputs import outputs_of
from cai.run.plan import Planner
from cai.run.prompt_checks import check_prompts
from cai.run.recipe import load_recipe
from cai.run.status import left_out_lines, status_lines
from cai.storage import run_folder
from cai.storage.files import read_json, remove_folder, write_json
from cai.storage.rows import read_rows, row_lines
from cai.storage.stage_folders import unused
from cai.templates import load_templates
from cai.text.errors import BadInput, StageFailed

DIGEST = run_folder.Outputs("digest", {})
SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    """A recipe of toy stages in a folder of its own."""
    toy_stages.install(monkeypatch)
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT), prepend=os.pathsep)
    for name in ("TOY_KILL", "TOY_ERROR", "TOY_WAIT", "TOY_LOG"):
        monkeypatch.delenv(name, raising=False)
    return toy_stages.make_recipe(tmp_path / "recipe")


def command(recipe: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    """`cai run` of toy stages in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(SUPPORT / "toy_stages.py"), "run", str(recipe), "--runs", str(recipe.parent), *arguments],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def folder_of(recipe: Path, stage: str) -> Path:
    return run_folder.latest(recipe.parent / "runs")[stage]


def records(run: Path) -> dict[str, bytes]:
    """Stage id to what its current folder holds."""
    return {
        stage: (folder / "records.jsonl").read_bytes()
        for stage, folder in run_folder.latest(run).items()
        if (folder / "records.jsonl").exists()
    }


def records_of(recipe: Path) -> dict[str, bytes]:
    """What an undisturbed run in another folder leaves."""
    run(recipe, runs="undisturbed")
    return records(recipe.parent / "undisturbed")


def killed(recipe: Path, point: str) -> None:
    """Runs the recipe in a child of this process that ends itself with SIGKILL at a point."""
    child = os.fork()
    if not child:
        os.environ["TOY_KILL"] = point
        run(recipe)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize("point", ["texts:0", "texts:2", "tuned:0", "more:1", "labels:1", "policy:0"])
def test_killed_in_any_stage_and_started_again_it_ends_with_the_same_bytes(recipe, point):
    undisturbed = records_of(recipe)
    killed(recipe, point)
    assert point.partition(":")[0] not in run_folder.latest(recipe.parent / "runs")
    run(recipe)
    assert records(recipe.parent / "runs") == undisturbed


def test_a_torn_line_in_the_journal_changes_nothing(recipe):
    undisturbed = records_of(recipe)
    killed(recipe, "more:2")
    [journal] = (recipe.parent / "runs").glob("more-*/journal.jsonl")
    journal.write_bytes(journal.read_bytes()[:-7])
    run(recipe)
    assert records(recipe.parent / "runs") == undisturbed


def test_a_second_run_reuses_every_stage(recipe, monkeypatch):
    first = run(recipe)
    monkeypatch.setattr(stage_run, "run_function", None)
    assert run(recipe) == first
    assert {status for status, _ in plan(recipe).values()} == {"reused"}


def test_a_changed_weight_redoes_the_labels_and_what_follows(recipe):
    run(recipe)
    document = recipe.parent / "constitution.yaml"
    document.write_text(document.read_text().replace("weight: 2.0", "weight: 0.5"))
    changed = {"labels": ("runs", "weight of honest changed"), "policy": ("waits", "because labels would run")}
    assert plan(recipe) == dict.fromkeys(("texts", "tuned", "more"), ("reused", "")) | changed
    run(recipe)
    assert read_rows(folder_of(recipe, "labels") / "records.jsonl")[0]["weights"]["honest"] == 0.5


def test_a_changed_request_redoes_what_asks_it_and_says_which_principle(recipe):
    run(recipe)
    document = recipe.parent / "constitution.yaml"
    document.write_text(document.read_text().replace("is kind.", "is very kind."))
    assert plan(recipe)["texts"] == ("runs", "principle kind changed")
    assert plan(recipe)["labels"][0] == "waits"


def test_a_principle_that_gets_the_tag_a_stage_draws_by_redoes_that_stage(tmp_path, monkeypatch):
    toy_stages.install(monkeypatch)
    text = """
name: tags
model: start
constitution: constitution.yaml
prompts: {first: {source: first.jsonl}}
stages:
  - {id: texts, kind: write, prompts: [first]}
  - {id: revisions, kind: revise, from: texts, principles: [honest, virtue]}
"""
    recipe = toy_stages.make_recipe(tmp_path, text)
    document = recipe.parent / "constitution.yaml"

    def parts(tags: str) -> dict:
        tagged = toy_stages.CONSTITUTION.replace("kind., weight", f"kind., tags: {tags}, weight")
        document.write_text(tagged.replace("honest., weight", "honest., tags: [virtue], weight"))
        loaded = load_recipe(recipe)
        done = {"texts": run_folder.Finished(tmp_path / "texts", DIGEST)}
        return Planner(loaded, tmp_path / "runs").fingerprints.parts(loaded.stages["revisions"], done)

    untagged = parts("[]")
    assert parts("[virtue]") != untagged
    assert parts("[other]") == untagged


def test_a_changed_chat_template_or_stop_of_a_set_redoes_what_borrows_it(recipe, monkeypatch):
    run(recipe, "templates=fewshot")
    fewshot = load_templates("fewshot")
    for name in ("chat.jinja", "stop.txt"):
        sources = tuple((file, text + (file == name) * "more") for file, text in fewshot.sources)
        changed = replace(fewshot, sources=sources)
        monkeypatch.setattr("cai.run.fingerprint.load_templates", lambda _, changed=changed: changed)
        assert plan(recipe, "templates=fewshot")["texts"] == ("runs", "template chat.fewshot changed")


@pytest.mark.parametrize(
    ("override", "stage", "reason", "kept"),
    [
        ("seed=8", "texts", "seed 7 -> 8", []),
        ("stages.more.n=2", "more", "n 1 -> 2", ["texts", "tuned"]),
        ("stages.policy.size=3", "policy", "size 1 -> 3", ["texts", "tuned", "more", "labels"]),
        ("prompts.held.limit=1", "more", "prompt set held changed", ["texts", "tuned"]),
    ],
)
def test_a_dry_run_says_what_would_run_and_why_and_writes_nothing(recipe, override, stage, reason, kept):
    run(recipe)
    before = sorted(recipe.parent.rglob("*"))
    planned = plan(recipe, override)
    assert planned[stage] == ("runs", reason)
    assert reused(recipe, override) == kept
    assert sorted(recipe.parent.rglob("*")) == before


def test_changed_weights_of_the_model_redo_what_used_it(recipe):
    run(recipe)
    toy_stages.make_model(recipe.parent / "start", "other weights")
    assert plan(recipe)["texts"] == ("runs", "model start changed")


def test_a_change_that_leaves_the_output_as_it_was_stops_there(recipe):
    run(recipe)
    override = "stages.texts.retries=5"
    assert plan(recipe, override)["texts"] == ("runs", "retries 1 -> 5")
    run(recipe, override, until="texts")
    assert reused(recipe, override) == ["texts", "tuned", "more", "labels", "policy"]


def test_going_back_to_an_earlier_recipe_reuses_what_it_left(recipe):
    first = run(recipe)
    run(recipe, "stages.more.n=2")
    assert reused(recipe) == ["texts", "tuned", "more", "labels", "policy"]
    assert run(recipe) == first
    assert len(unused(recipe.parent / "runs")) == 3


def test_the_profile_is_not_part_of_what_a_stage_computes(recipe):
    run(recipe)
    other = Profile(name="other", micro_batch=2, token_budget=512)
    assert {status for status, _ in plan(recipe, profile=other).values()} == {"reused"}


def test_everything_of_a_stage_is_on_the_disk_before_it_is_done(tmp_path, monkeypatch):
    model = toy_stages.make_model(tmp_path / "stage" / "model", "weights")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    everything = {path.stat().st_ino for path in (model.parent, model, *model.iterdir())}

    def checked(path: Path, value: object) -> None:
        assert everything <= {*synced}
        write_json(path, value)

    monkeypatch.setattr(run_folder, "write_json", checked)
    run_folder.mark_done(tmp_path / "stage", DIGEST)
    assert run_folder.finished(tmp_path / "stage")


def cut(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))


def edit_without_changing_the_size(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-2] + b"!" + content[-1:])


@pytest.mark.parametrize(
    ("stage", "name", "damage", "reason"),
    [
        ("texts", "records.jsonl", cut, "records.jsonl was changed"),
        ("more", "records.jsonl", edit_without_changing_the_size, "records.jsonl was changed"),
        ("labels", "failures.jsonl", Path.unlink, "failures.jsonl is missing"),
        ("tuned", "model/model.safetensors", edit_without_changing_the_size, "model/model.safetensors was changed"),
        ("policy", "model/config.json", Path.unlink, "model/config.json is missing"),
    ],
)
def test_an_output_that_was_cut_edited_or_removed_is_noticed_by_name_and_made_again(
    recipe, capsys, stage, name, damage, reason
):
    run(recipe)
    path = folder_of(recipe, stage) / name
    before = path.read_bytes()
    damage(path)
    assert plan(recipe)[stage] == ("runs", reason)
    run(recipe)
    assert f"{stage} runs again: {reason}" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert {status for status, _ in plan(recipe).values()} == {"reused"}


def test_a_run_that_was_copied_is_reused_though_its_files_are_younger(recipe):
    run(recipe)
    runs = recipe.parent / "runs"
    shutil.copytree(runs, recipe.parent / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(runs)
    shutil.move(recipe.parent / "copy", runs)
    assert {status for status, _ in plan(recipe).values()} == {"reused"}


def test_a_file_whose_size_and_time_are_the_same_is_not_read_again(recipe, monkeypatch):
    run(recipe)
    monkeypatch.setattr("cai.run.outputs.cached_file_digest", None)
    assert {status for status, _ in plan(recipe).values()} == {"reused"}
    records = folder_of(recipe, "texts") / "records.jsonl"
    os.utime(records, ns=(0, 0))
    with pytest.raises(TypeError):
        plan(recipe)


def test_reuse_of_what_other_library_versions_made_is_said_in_a_line(recipe, monkeypatch, capsys):
    run(recipe)
    stage_file = folder_of(recipe, "texts") / "stage.json"
    versions = json.loads(stage_file.read_text())["versions"]
    monkeypatch.setattr("cai.run.plan.library_versions", lambda: versions | {"torch": "99.0"})
    words = f"made with torch {versions['torch']}, here 99.0"
    assert plan(recipe)["texts"] == ("reused", words)
    run(recipe)
    assert f"texts, tuned, more, labels, policy: {words}\n" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["tuned-1", "tuned-1.removed"])
def test_a_folder_is_never_there_in_part_when_its_removal_is_killed(tmp_path, monkeypatch, folder):
    stage = tmp_path / "tuned-1"
    toy_stages.make_model(stage / "model", "weights")
    run_folder.mark_done(stage, DIGEST)
    rmtree = shutil.rmtree

    def killed(path, ignore_errors=False):
        if path.exists():
            (path / "model" / "model.safetensors").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(stage)
    assert run_folder.finished(stage) is None
    assert [path.name for path, _ in unused(tmp_path)] == ["tuned-1.removed"]
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    remove_folder(tmp_path / folder)
    assert not list(tmp_path.iterdir())


def test_until_and_from_choose_stages(recipe):
    assert list(run(recipe, until="tuned")["stages"]) == ["texts", "tuned"]
    run(recipe)
    assert plan(recipe, redo_from="labels")["labels"] == ("runs", "asked for with --from")
    [done] = (recipe.parent / "runs").glob("labels-*/DONE")
    before = done.stat().st_mtime_ns
    run(recipe, redo_from="labels")
    assert done.stat().st_mtime_ns > before
    with pytest.raises(BadInput, match="did you mean 'labels'"):
        run(recipe, until="label")


def test_a_part_run_keeps_the_figures_of_later_stages_that_still_hold(recipe):
    whole = run(recipe)
    assert run(recipe, until="texts")["stages"] == whole["stages"]


def test_failures_are_counted_and_asked_again_only_on_request(recipe):
    failing = "stages.texts.fail=['how?']"
    assert run(recipe, failing)["failures"]["texts"] == 3
    more = folder_of(recipe, "more")
    assert run(recipe, failing)["failures"]["texts"] == 3
    assert plan(recipe, failing, retry_failures=True)["texts"] == ("continues", "3 failed items are asked again")
    assert run(recipe, failing, retry_failures=True)["failures"]["texts"] == 0
    assert len(read_rows(folder_of(recipe, "texts") / "records.jsonl")) == 12
    assert folder_of(recipe, "more") != more, "what learned from fewer texts is redone"


def test_a_stage_of_an_earlier_version_is_reused_and_its_failures_are_refused_in_a_sentence(recipe):
    failing = "stages.texts.fail=['how?']"
    run(recipe, failing)
    folder = folder_of(recipe, "texts")
    (folder / "plan.json").write_text('{"plan": "0a", "rows": [3, 3, 3], "tokens": 27, "attempts": {}}')
    run_folder.mark_done(folder, outputs_of(folder, read_json(folder / "stage.json")["figures"], offline=True))
    assert {status for status, _ in plan(recipe, failing).values()} == {"reused"}
    refusal = "'texts': .* is of an earlier version of cai, .* run with `--from texts`"
    for command in (plan, run):
        with pytest.raises(BadInput, match=refusal):
            command(recipe, failing, retry_failures=True)
    assert run(recipe, failing, redo_from="texts")["failures"]["texts"] == 3
    assert run(recipe, failing, retry_failures=True)["failures"]["texts"] == 0


def test_the_journal_of_an_earlier_version_is_removed_in_a_sentence(recipe, capsys):
    killed(recipe, "texts:2")
    assert plan(recipe)["texts"] == ("continues", "8 of 12 texts are on disk")
    assert "8 of 12 texts on disk" in "\n".join(status_lines(recipe.parent / "runs"))
    [journal] = recipe.parent.glob("runs/texts-*/journal.jsonl")
    journal.write_text('{"attempts":{},"plan":"0a"}\n{"batch":0,"batches":1,"failures":[],"rows":[],"tokens":0}\n')
    reason = "what is on disk of it is of an earlier version of cai, and cannot be continued"
    assert plan(recipe)["texts"] == ("runs", reason)
    run(recipe)
    assert f"texts runs again: {reason}" in capsys.readouterr().err
    assert len(records(recipe.parent / "runs")["texts"].splitlines()) == 12


def test_what_a_stage_left_out_is_told_when_it_happens_and_at_the_end_of_every_run(recipe, capsys):
    sentence = "3 of 12 texts left out: 3 failed: no ink; `cai run --retry-failures` asks again"
    summary = run(recipe, "stages.texts.fail=['how?']")
    assert f"texts: {sentence}" in capsys.readouterr().err
    assert summary["left_out"] == {"texts": [sentence]}
    again = run(recipe, "stages.texts.fail=['how?']")
    assert left_out_lines(again) == [f"texts: {sentence}"]


def test_a_stage_that_fails_is_named_and_what_it_computed_stays(recipe, monkeypatch):
    monkeypatch.setenv("TOY_ERROR", "more")
    with pytest.raises(StageFailed, match=r"^stage 'more': the pen broke$"):
        run(recipe)
    monkeypatch.delenv("TOY_ERROR")
    assert reused(recipe) == ["texts", "tuned"]


def test_one_conversation_in_a_learned_from_and_a_held_out_set_is_refused(recipe):
    with (recipe.parent / "held.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "why?"}) + "\n")
    with pytest.raises(BadInput, match=r"1 prompts of the held-out set 'held' are in 'first' too"):
        run(recipe)
    assert not (recipe.parent / "runs" / "run.json").exists()


HUMAN = """
name: human
model: start
constitution: constitution.yaml
prompts:
  first: {source: first.jsonl}
  held: {source: held.jsonl, hold_out: true}
stages:
  - {id: labels, kind: prefer, pairs: {source: pairs.jsonl}}
  - {id: score, kind: reward, from: labels}
  - {id: texts, kind: sample, prompts: [first, held]}
  - {id: policy, kind: sft, from: texts}
  - {id: comparison, kind: compare, models: {policy: policy}, prompts: [held]}
"""


def human_recipe(folder: Path, question: str) -> Path:
    """A recipe that learns from one human pair too, the answers to `question`."""
    recipe = toy_stages.make_recipe(folder, HUMAN)
    human_pair(folder, question)
    return recipe


def human_pair(folder: Path, question: str) -> None:
    pair = {key: f"\n\nHuman: {question}\n\nAssistant: {key}" for key in ("chosen", "rejected")}
    (folder / "pairs.jsonl").write_text(json.dumps(pair) + "\n")


def test_a_held_out_prompt_that_a_human_pair_answers_is_refused(tmp_path):
    plan(human_recipe(tmp_path / "other", "why?"))
    recipe = human_recipe(tmp_path / "same", "where?")
    with pytest.raises(BadInput, match=r"1 prompts of the held-out set 'held' are in 'labels.pairs' too"):
        plan(recipe)
    plan(recipe, "stages.labels.pairs.hold_out=true")


def test_what_lies_in_a_file_of_human_pairs_is_part_of_what_a_judge_read(tmp_path):
    judged = HUMAN.replace("kind: prefer, pairs:", "kind: judge, human:")
    recipe = toy_stages.make_recipe(tmp_path, judged[: judged.index("  - {id: score")])
    digests = []
    for question in ("why?", "when?"):
        human_pair(tmp_path, question)
        planner = Planner(load_recipe(recipe), tmp_path / "runs")
        digests.append(planner.fingerprints.parts(planner.recipe.stages["labels"], {})["file.pairs.jsonl"])
    assert digests[0] != digests[1]


def test_weights_and_their_factors_by_tag_are_part_of_what_labels_are_made_of(tmp_path):
    judged = HUMAN.replace("labels, kind: prefer, pairs:", "votes, kind: judge, human:")
    judged = judged.replace("  - {id: score", "  - {id: labels, kind: prefer, from: votes}\n  - {id: score")
    recipe = toy_stages.make_recipe(tmp_path, judged)
    human_pair(tmp_path, "why?")
    tagged = toy_stages.CONSTITUTION.replace("kind., weight", "kind., tags: [style], weight")
    (tmp_path / "constitution.yaml").write_text(tagged)

    def parts(*overrides: str) -> dict[str, object]:
        planner = Planner(load_recipe(recipe, overrides), tmp_path / "runs")
        votes = run_folder.Finished(tmp_path / "votes", DIGEST)
        return planner.fingerprints.parts(planner.recipe.stages["labels"], {"votes": votes})

    weights = {name: value for name, value in parts().items() if name.startswith("weight.")}
    assert weights == {"weight.kind": 1.0, "weight.honest": 2.0}
    changed = parts("stages.labels.tag_weights={style: 3}")
    assert changed["config.tag_weights.style"] == 3
    assert changed["principle.kind.tags"] == ["style"]


@pytest.mark.parametrize(
    ("stage", "read_stage", "reasons_are_read"),
    [
        ("sl-cai", "revisions", False),
        ("preferences", "votes", False),
        ("comparison", "comparison.policy", True),
        ("comparison", "comparison.policy.votes", True),
    ],
)
def test_what_failed_in_a_stage_is_part_of_what_a_stage_that_reads_it_computed(
    tmp_path, stage, read_stage, reasons_are_read
):
    recipe = toy_stages.make_recipe(tmp_path, toy_stages.GOOD)
    folders = {id: tmp_path / "runs" / id for id in load_recipe(recipe).stages}
    for folder in folders.values():
        toy_stages.make_model(folder / "model", "weights")
    done = {id: run_folder.Finished(folder, DIGEST) for id, folder in folders.items()}

    def parts(*failures: tuple[str, str]) -> dict[str, object]:
        rows = row_lines({"id": id, "reason": reason, "batch": 0} for id, reason in failures)
        (folders[read_stage] / "failures.jsonl").write_text("".join(rows))
        planner = Planner(load_recipe(recipe), tmp_path / "runs")
        return planner.fingerprints.parts(planner.recipe.stages[stage], done)

    before = parts()
    one_failed = parts(("1", "no ink"))
    changed = {name for name in before if before[name] != one_failed[name]}
    assert changed == {f"failures.{read_stage}"}
    assert changes_in_words(changed, before, one_failed) == [f"failures of {read_stage} changed"]
    assert (one_failed != parts(("1", "no paper"))) == reasons_are_read


def test_a_set_that_is_learned_from_and_compared_on_is_noted(tmp_path):
    def notes(*overrides: str) -> list[str]:
        planner = Planner(load_recipe(human_recipe(tmp_path, "why?"), overrides), tmp_path / "runs")
        return check_prompts(planner.recipe, planner.fingerprints.prompts)

    assert notes() == []
    [note] = notes("stages.comparison.prompts=[held, first]")
    assert note.startswith("prompts first: 4 prompts are learned from and compared on too")


def test_deepspeed_is_told_that_a_profile_runs_on_the_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "")
    monkeypatch.delenv("DS_ACCELERATOR")
    pipeline.prepare(Profile(device="cpu"))
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    pipeline.prepare(Profile(device="cuda"))
    assert "DS_ACCELERATOR" not in os.environ


def test_two_processes_cannot_work_on_one_run(recipe):
    message = f"process {os.getpid()} is working on"
    with run_folder.locked(recipe.parent / "runs"), pytest.raises(BadInput, match=message):
        run(recipe)
    run(recipe)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_so_and_goes_on_from_there(recipe, number, code):
    child = command(recipe, TOY_WAIT="more")
    wait_for_batch(recipe, "more")
    with pytest.raises(BadInput, match=f"process {child.pid} is working"), run_folder.locked(recipe.parent / "toy"):
        pass
    child.send_signal(number)
    _, errors = child.communicate(timeout=600)
    assert child.returncode == code
    assert errors.endswith("Interrupted. What was finished is kept; the same command goes on from there.\n")
    again = command(recipe)
    assert "more: 6 texts (2 from before)" in again.communicate()[1]


@pytest.fixture
def own_process(recipe, tmp_path, monkeypatch) -> Profile:
    """A profile whose stages run in processes of their own, which know the toy stages."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import toy_stages\ntoy_stages.install()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    return Profile(name="own", device="cuda")


def test_stages_in_processes_of_their_own_give_the_same_records(recipe, own_process):
    inline = run(recipe, until="tuned")
    launched = run(recipe, profile=own_process, runs="other", until="tuned")
    assert records(recipe.parent / "other") == records(recipe.parent / "runs")
    assert launched["stages"] == inline["stages"]


def test_the_error_of_a_process_is_reported_as_its_own(recipe, own_process, monkeypatch):
    monkeypatch.setenv("TOY_ERROR", "texts")
    with pytest.raises(StageFailed, match=r"^stage 'texts': the pen broke$") as failed:
        run(recipe, profile=own_process)
    assert failed.value.exit_code == 3
    monkeypatch.delenv("TOY_ERROR")
    monkeypatch.setenv("TOY_KILL", "texts:1")
    with pytest.raises(StageFailed, match=r"ended with signal 9; see .*log\.txt"):
        run(recipe, profile=own_process)


@pytest.fixture(params=[False, True])
def two_ranks(request, own_process, monkeypatch) -> Iterator[Profile]:
    """Two processes that are started, or forked from one that knows the toy stages and has no need of libraries."""
    monkeypatch.setattr(launch, "LIBRARIES", ())
    forkserver._forkserver._stop()  # whatever was started before this environment was
    yield Profile(name="two", device="cpu", processes=2, fork=request.param)
    forkserver._forkserver._stop()


def test_two_processes_give_the_records_of_one_and_each_item_once(recipe, two_ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "log"))
    launched = run(recipe, profile=two_ranks)
    assert sorted((tmp_path / "log").read_text().splitlines()) == [
        "labels:0 0", "labels:1 1", "more:0 0", "more:1 1", "more:2 0", "policy:0 0",
        "texts:0 0", "texts:1 1", "texts:2 0", "tuned:0 0",
    ]  # fmt: skip
    assert records(recipe.parent / "runs") == records_of(recipe)
    assert launched["texts"] == {"texts": 12, "more": 6}
    assert not list((recipe.parent / "runs").glob("*/journal*"))
    [spec] = (recipe.parent / "runs").glob("texts-*/process/spec.json")
    cores = len(os.sched_getaffinity(0))
    assert read_json(spec)["profile"]["threads"] == (max(1, cores // 2) if two_ranks.fork else None)


@pytest.mark.parametrize("afterwards", [1, 2, 3])
def test_a_killed_process_is_named_and_however_many_go_on_from_there(
    recipe, two_ranks, tmp_path, monkeypatch, afterwards
):
    undisturbed, single = records_of(recipe), "stages.texts.journal_batch=1"
    monkeypatch.setenv("TOY_KILL", "texts:5")
    with pytest.raises(StageFailed, match=r"^stage 'texts', process 1, ended with signal 9; see .*log\.txt$"):
        run(recipe, single, profile=two_ranks)
    monkeypatch.delenv("TOY_KILL")
    journals = recipe.parent.glob("runs/texts-*/journal*")
    entries = [json.loads(line) for path in journals for line in path.read_bytes().splitlines()]
    kept = {position for entry in entries for position in entry.get("positions", [])}
    assert {1, 3} <= kept <= set(range(12)) - {5}
    assert plan(recipe, single)["texts"] == ("continues", f"{len(kept)} of 12 texts are on disk")
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "log"))
    run(recipe, single, profile=two_ranks.model_copy(update={"processes": afterwards}), until="texts")
    computed = [int(line.split()[0].removeprefix("texts:")) for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(computed) == sorted(set(range(12)) - kept)
    assert records(recipe.parent / "runs")["texts"] == undisturbed["texts"]


def test_the_error_of_any_process_ends_the_others_and_is_reported_as_its_own(recipe, two_ranks, monkeypatch):
    monkeypatch.setenv("TOY_WAIT", "texts")  # process 1, at its first batch
    monkeypatch.setenv("TOY_ERROR", "texts:2")
    with pytest.raises(StageFailed, match=r"^stage 'texts': the pen broke$"):
        run(recipe, profile=two_ranks)
    [journal] = recipe.parent.glob("runs/texts-*/journal-1.jsonl")
    assert len(journal.read_bytes().splitlines()) == 1, "process 1 went on with its first portion"


def test_a_training_stage_in_fewer_processes_than_the_profile_says_is_refused(recipe, own_process):
    text = recipe.read_text()
    recipe.write_text(text[: text.index("  - {id: tuned")] + "  - {id: tuned, kind: sft, from: texts}\n")
    with pytest.raises(StageFailed, match=r"^stage 'tuned' runs in 1 of the 2 processes that profile 'two' expects"):
        run(recipe, profile=Profile(name="two", device="cpu", processes=2))


def test_what_the_command_line_adds_to_a_profile_reaches_the_processes_of_a_stage(recipe, own_process):
    profile = recipe.parent / "own.yaml"
    profile.write_text("device: cuda\nengine: vllm\n")
    child = command(recipe, "--on", str(profile), "--until", "texts", "--online", "--vllm-python", "python")
    assert "--vllm-python python: no such file" in child.communicate(timeout=600)[1]
    child = command(recipe, "--on", str(profile), "--until", "texts", "--online", "--vllm-python", sys.executable)
    assert child.wait(timeout=600) == 0, child.communicate()[1]
    [spec] = recipe.parent.glob("toy/texts-*/process/spec.json")
    sent = read_json(spec)["profile"]
    assert (sent["offline"], sent["vllm"]["python"]) == (False, sys.executable)
    child = command(recipe, "--vllm-python", sys.executable)
    assert "profile 'cpu' has `engine: local`, expected a profile" in child.communicate(timeout=600)[1]


@pytest.mark.parametrize("profile", ["cpu-2-ranks", "cpu-2-cores"])
def test_a_stop_ends_all_processes_and_the_next_run_goes_on(recipe, own_process, profile):
    child = command(recipe, "--on", profile, "--until", "texts", TOY_WAIT="texts")
    process = wait_for_batch(recipe, "texts")
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=600)
    assert child.returncode == 143
    assert not process.exists()
    again = command(recipe, "--on", profile, "--until", "texts")
    assert "texts: 12 texts" in again.communicate(timeout=600)[1]
    assert len(read_rows(run_folder.latest(recipe.parent / "toy")["texts"] / "records.jsonl")) == 12


@pytest.mark.parametrize("where", ["device: cuda", "device: cpu\nprocesses: 2\nfork: true"])
def test_a_stage_in_a_process_of_its_own_ends_with_its_parent(recipe, own_process, tmp_path, where):
    profile = tmp_path / "own.yaml"
    profile.write_text(where)
    child = command(recipe, "--on", str(profile), TOY_WAIT="texts")
    process = wait_for_batch(recipe, "texts")
    child.kill()
    child.wait()  # not until its pipes close: the process that forks has them too
    command_line = process / "cmdline"
    until(lambda: not command_line.exists() or not command_line.read_bytes())


def wait_for_batch(recipe: Path, stage: str) -> Path:
    """Waits until the stage waits in one of its portions; the folder of its process in /proc."""
    pattern = f"toy/{stage}-*/waiting"
    until(lambda: list(recipe.parent.glob(pattern)))
    [waiting] = recipe.parent.glob(pattern)
    return Path("/proc") / waiting.read_text()


def until(condition) -> None:
    """Waits at most 30 seconds until a condition is true."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
