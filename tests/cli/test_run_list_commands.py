"""`cai runs`, `cai clean` and `cai status` on runs at work, interrupted ones, and what failed comparisons leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy_stages
from click.testing import CliRunner, Result
from recipe_runs import run

from cai.cli import main
from cai.run.stage_progress import StageProgress
from cai.storage import run_folder
from cai.storage.files import write_json
from cai.storage.journal import Journal
from cai.storage.journal import Result as ItemResult
from cai.storage.stage_folders import interrupted, standing_stages, unused
from cai.training.step_count import StepCount, record_resume_point

TOY = Path("runs/toy")
SUPPORT = Path(__file__).parents[1] / "support"
COMPARE = ["compare", "base=start", "new=start", "--prompts", "held.jsonl", "--constitution", "constitution.yaml"]


def cai(*arguments: str, answer: str | None = None) -> Result:
    return CliRunner().invoke(main, arguments, input=answer)


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    """A recipe of toy stages in the working directory."""
    monkeypatch.chdir(tmp_path)
    toy_stages.install(monkeypatch)
    return toy_stages.make_recipe(tmp_path)


def stage(stage_id: str) -> dict:
    return next(row for row in json.loads(cai("status", "--json").stdout)["stages"] if row["stage"] == stage_id)


def listed() -> dict[str, dict]:
    return {row["name"]: row for row in json.loads(cai("runs", "--json").stdout)["runs"]}


def unfinished_folder(stage_id: str, number: int = 15, **facts: object) -> Path:
    """The folder of a stage that began a minute ago and is not done."""
    folder = TOY / f"{stage_id}-{number:016x}"
    folder.mkdir(parents=True)
    began = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() - 60))
    write_json(folder / run_folder.STAGE, {"id": stage_id, "began": began, **facts})
    return folder


def write_half(folder: Path) -> None:
    """A journal with 3 of 6 texts in `folder`."""
    journal = Journal(folder)
    items = [{"id": str(number)} for number in range(6)]
    portion = next(journal.portions(items, size=3, unit="texts"))
    journal.append(portion, [ItemResult({"id": item["id"]}) for item in portion.items])


def test_a_run_at_work_is_running_with_its_process_and_is_neither_deleted_nor_cleaned(recipe):
    command = [sys.executable, str(SUPPORT / "toy_stages.py"), "run", "recipe.yaml"]
    path = os.pathsep.join([str(SUPPORT), *sys.path])
    child = subprocess.Popen(command, env={**os.environ, "TOY_WAIT": "more", "PYTHONPATH": path})
    try:
        end = time.monotonic() + 60
        while not list(TOY.glob("more-*/waiting")):
            assert time.monotonic() < end
            time.sleep(0.05)
        status = json.loads(cai("status", "--json").stdout)
        assert status["process"] == child.pid
        assert [row["status"] for row in status["stages"]] == ["done", "done", "running", "not run", "not run"]
        more = status["stages"][2]
        assert (more["finished"], more["n_items"], more["share"]) == (2, 6, pytest.approx(1 / 3))
        assert more["seconds_left"] > 0
        assert cai("status").stdout.startswith(f"runs/toy: process {child.pid} is working on it\n")
        assert "2 of 6 texts, 33%, about " in cai("status").stdout
        assert f"running, process {child.pid}" in cai("runs").stdout
        for command in ("runs delete toy --yes", "clean toy --yes"):
            refused = cai(*command.split())
            assert refused.exit_code == 2
            assert f"process {child.pid} is working on this run" in refused.stderr
    finally:
        child.kill()
        child.wait()
    assert json.loads(cai("status", "--json").stdout)["process"] is None
    assert (stage("more")["status"], stage("more")["on_disk"]) == ("unfinished", 2)
    assert "2 of 6 texts on disk" in cai("status").stdout


def test_items_of_earlier_processes_do_not_count_as_speed(recipe):
    run(recipe, until="tuned", runs="runs/toy")
    with run_folder.locked(TOY):
        write_half(unfinished_folder("more", finished_before=1))
        more = stage("more")
        assert more["status"] == "running"
        assert more["seconds_left"] == pytest.approx(90, rel=0.1), "2 of 3 items in a minute, 3 items to go"


def test_items_that_are_taken_over_do_not_count_as_speed(recipe):
    run(recipe, until="tuned", runs="runs/toy")
    with run_folder.locked(TOY):
        journal = Journal(unfinished_folder("more", finished_before=0))
        known = {str(number): ItemResult({"id": str(number)}) for number in range(3)}
        portion = next(journal.portions([{"id": str(number)} for number in range(6)], size=1, known=known))
        assert stage("more")["seconds_left"] is None
        journal.append(portion, [ItemResult({"id": "3"})])
        assert stage("more")["seconds_left"] == pytest.approx(120, rel=0.1), "an item in a minute, 2 items to go"


def test_training_counts_its_steps_while_it_runs_and_its_resume_point_afterwards(recipe):
    run(recipe, until="texts", runs="runs/toy")
    with run_folder.locked(TOY):
        folder = unfinished_folder("tuned")
        assert "share" not in stage("tuned")
        assert "began 0." in cai("status").stdout
        (folder / "metrics.jsonl").write_text('{"step":6}\n')
        StepCount(total=50, in_resume_point=4, began=time.time() - 1000).write(folder)
        assert " 4 of 50 steps, 8%  " in cai("status").stdout, "it has not begun to train again"
        os.utime(folder / run_folder.STAGE, (time.time() - 30,) * 2)
        os.utime(TOY / run_folder.LOCK, (time.time() - 40,) * 2)
        StepCount(total=50, finished_before=4, in_resume_point=4, began=time.time() - 20).write(folder)
        (folder / "metrics.jsonl").write_text('{"step":11}\n{"step":14}\n')
        record_resume_point(folder, 11)
        tuned = stage("tuned")
        assert (tuned["status"], tuned["finished"], tuned["on_disk"], tuned["n_items"]) == ("running", 14, 11, 50)
        assert tuned["seconds_left"] == pytest.approx(72, rel=0.1), "10 steps in 20 s, 36 to go"
        assert "14 of 50 steps, 28%, about 1 min 1" in cai("status").stdout
    assert stage("tuned")["status"] == "unfinished"
    assert "11 of 50 steps on disk" in cai("status").stdout


def test_a_folder_that_an_earlier_process_left_is_not_the_one_at_work(recipe):
    run(recipe, until="texts", runs="runs/toy")
    folder = unfinished_folder("tuned")
    os.utime(folder / run_folder.STAGE, (time.time() + 1 - 60,) * 2)
    with run_folder.locked(TOY):
        assert stage("tuned")["status"] == "unfinished"


def test_progress_without_anything_finished_has_no_time_left():
    assert StageProgress(4, 9, "texts", 4, 4, time.time()).seconds_left() is None


def test_runs_lists_name_recipe_state_stages_disk_and_time(recipe):
    assert "no runs here" in cai("runs").stdout
    run(recipe, until="tuned", runs="runs/toy")
    run(recipe, runs="runs/whole")
    run(recipe, runs="runs/old")
    run(recipe, "stages.texts.n=2", until="texts", runs="runs/old")
    rows = listed()
    assert {name: (row["state"], row["stages_done"], row["n_stages"]) for name, row in rows.items()} == {
        "old": ("stale", 1, 5), "whole": ("done", 5, 5), "toy": ("unfinished", 2, 5),
    }  # fmt: skip
    os.utime(TOY / run_folder.SUMMARY, (time.time(), time.time() + 60))
    assert next(iter(listed())) == "toy", "the run that was last worked on is first"
    assert {row["recipe"] for row in rows.values()} == {"recipe.yaml"}
    assert rows["toy"]["bytes"] == sum(path.stat().st_size for path in TOY.rglob("*") if path.is_file())
    header, _, *lines = cai("runs").stdout.splitlines()
    assert header.split("  ")[0] == "run"
    assert any(line.split()[:6] == ["toy", "recipe.yaml", "unfinished", "2", "of", "5"] for line in lines)


def test_runs_delete_asks_and_removes_the_whole_run(recipe):
    run(recipe, runs="runs/toy")
    declined = cai("runs", "delete", "toy", answer="n\n")
    assert "Remove runs/toy (5 stages done, 0.0 MB)?" in declined.stdout
    assert TOY.is_dir()
    assert cai("runs", "delete", "toy", answer="y\n").exit_code == 0
    assert not TOY.exists()
    missing = cai("runs", "delete", "toy", "--yes")
    assert missing.exit_code == 2
    assert "no run 'toy' in runs" in missing.stderr


def test_runs_delete_takes_the_folder_of_runs_before_and_after_its_name(recipe):
    for options in (["--runs", "other", "delete", "toy"], ["delete", "toy", "--runs", "other"]):
        run(recipe, runs="runs/toy", until="texts")
        run(recipe, runs="other/toy", until="texts")
        assert cai("runs", *options, "--yes").exit_code == 0
        assert TOY.is_dir()
        assert not Path("other/toy").exists()


def test_runs_delete_removes_a_linked_run_and_nothing_that_is_no_run(recipe):
    run(recipe, runs="elsewhere/toy", until="texts")
    TOY.parent.mkdir()
    TOY.symlink_to(Path("elsewhere/toy").resolve())
    assert listed()["toy"]["stages_done"] == 1
    assert cai("runs", "delete", "toy", "--yes").exit_code == 0
    assert not TOY.is_symlink()
    assert not Path("elsewhere/toy").exists()
    Path("project").mkdir()
    Path("project/.lock").touch()
    for name in ("project", ".", "..", "", "start"):
        assert cai("runs", "delete", name, "--yes").exit_code == 2
    assert Path("project/.lock").exists()


@pytest.mark.parametrize("options", [[], ["--name", "mine"]])
def test_a_comparison_that_was_refused_is_listed_and_deleted(recipe, options):
    refused = cai(*COMPARE, *options, "--set", "stages.comparison.prompts=nothing")
    assert refused.exit_code == 2
    [name] = listed()
    assert listed()[name]["state"] == "not begun"
    assert listed()[name]["recipe"] == "cai compare"
    assert f"`cai runs delete {name}` removes it" in cai("status", name).stderr
    assert f"`cai runs delete {name}` removes it as a whole" in cai("clean", name).stdout
    assert cai("runs", "delete", name, "--yes").exit_code == 0
    assert listed() == {}


def test_a_comparison_that_failed_leaves_what_clean_and_runs_see(recipe):
    failed = cai(*COMPARE)
    assert failed.exit_code != 0, "the toy model cannot be loaded"
    [name] = listed()
    assert listed()[name]["state"] == "unfinished"
    kept = cai("clean", name, "--yes").stdout
    assert "nothing to remove" in kept
    assert "kept for the next run, unless --unfinished is given: comparison.base (interrupted)" in kept
    assert "removes it as a whole" in kept
    assert "removed 1 folders" in cai("clean", name, "--yes", "--unfinished").stdout
    assert not list((Path("runs") / name).glob("comparison*"))


def test_clean_sees_unfinished_folders_that_no_run_goes_on_with(recipe):
    run(recipe, runs="runs/toy", until="texts")
    reads_current = {"texts": {"folder": "", "digest": standing_stages(TOY)["texts"].digest}}
    reads_earlier = {"texts": {"folder": "", "digest": "earlier"}}
    older, newest = (unfinished_folder("tuned", number, inputs=reads_current) for number in (1, 2))
    before_the_finished_one = unfinished_folder("texts", 3)
    on_earlier_texts = unfinished_folder("more", 4, inputs=reads_earlier)
    empty = TOY / f"labels-{5:016x}"
    empty.mkdir()
    tried = TOY / run_folder.TRIED / f"labels-{6:016x}"
    tried.mkdir(parents=True)
    now = time.time()
    os.utime(older / run_folder.STAGE, (now, now - 30))
    os.utime(before_the_finished_one / run_folder.STAGE, (now, now - 30))
    assert interrupted(TOY) == {"tuned": newest}
    assert {path for path, _ in unused(TOY)} == {older, before_the_finished_one, on_earlier_texts, empty, tried}
    assert {path for path, _ in unused(TOY, unfinished=True)} - {path for path, _ in unused(TOY)} == {newest}


def test_a_damaged_run_does_not_keep_the_others_from_the_list(recipe):
    run(recipe, runs="runs/toy", until="texts")
    Path("runs/broken").mkdir()
    Path("runs/broken/run.json").write_text("{")
    assert {name: row["state"] for name, row in listed().items()} == {"broken": "unreadable", "toy": "unfinished"}
    assert cai("runs", "delete", "broken", "--yes").exit_code == 0
