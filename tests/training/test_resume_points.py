"""Resume points by time: written when the profile's minutes have passed, on all ranks alike, without any effect on what
is learned."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import Tiny
from training_stages import CPU, Killed, Steps, outputs, rows_for, run_stage, sample, stage_context

from cai.contracts.profile import Profile
from cai.training.loop import CONTINUE, SAVE, STOP, StageCallback

ROWS = [sample(number) for number in range(32)]
AT_EVERY_STEP = CPU.model_copy(update={"resume_point_minutes": 0})


@pytest.mark.parametrize(("logging_steps", "resumes"), [(1, 3), (2, 2)])
def test_a_killed_stage_continues_from_a_resume_point_written_by_time_and_ends_with_the_same_bytes(
    tmp_path: Path, tiny: Tiny, logging_steps: int, resumes: int
) -> None:
    settings = {"batch_size": 4, "train": {"logging_steps": logging_steps, "save_steps": 100}}
    run_stage("sft", tmp_path / "undisturbed", ROWS, tiny("llama"), **settings)
    killed = tmp_path / "killed"
    with pytest.raises(Killed):
        run_stage("sft", killed, ROWS, tiny("llama"), profile=AT_EVERY_STEP, progress=Steps(4), **settings)
    steps = Steps()
    run_stage("sft", killed, ROWS, tiny("llama"), profile=AT_EVERY_STEP, progress=steps, **settings)
    assert steps.notes == [f"resuming from checkpoint-{resumes}"], "a step that is not logged writes none"
    assert outputs(killed) == outputs(tmp_path / "undisturbed")


def test_no_resume_point_is_written_before_the_minutes_have_passed(tmp_path: Path, tiny: Tiny) -> None:
    settings = {"batch_size": 4, "train": {"save_steps": 100}}
    with pytest.raises(Killed):
        run_stage("sft", tmp_path / "stage", ROWS, tiny("llama"), progress=Steps(4), **settings)
    assert not list((tmp_path / "stage").glob("checkpoints/checkpoint-*"))


@pytest.mark.parametrize("decision", [CONTINUE, SAVE, STOP])
def test_other_ranks_do_what_the_first_one_decides_whatever_their_own_clocks_say(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, decision: int
) -> None:
    def broadcast(tensor: torch.Tensor, src: int) -> None:
        assert src == 0
        tensor.fill_(decision)

    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    second_rank: Any = SimpleNamespace(is_main_process=False, num_processes=2, device=torch.device("cpu"))
    context = stage_context(tmp_path / "stage", {}, tiny("llama"), profile=AT_EVERY_STEP)
    callback = StageCallback(context, second_rank)
    state: Any = SimpleNamespace(global_step=3, max_steps=8, num_input_tokens_seen=0, is_world_process_zero=False)
    control = SimpleNamespace(should_log=True, should_save=False, should_training_stop=False)
    callback.on_step_end(None, state, control)
    assert (control.should_save, control.should_training_stop) == (decision != CONTINUE, decision == STOP)


def test_the_first_rank_decides_by_its_clock_and_the_file_of_a_request_to_stop(tmp_path: Path, tiny: Tiny) -> None:
    first_rank: Any = SimpleNamespace(is_main_process=True, num_processes=1, device=torch.device("cpu"))

    def decision(profile: Profile, is_logged: bool) -> int:
        context = stage_context(tmp_path / "stage", {}, tiny("llama"), profile=profile)
        (tmp_path / "stage").mkdir(exist_ok=True)
        return StageCallback(context, first_rank)._action(is_logged)

    assert decision(CPU, is_logged=True) == CONTINUE
    assert decision(AT_EVERY_STEP, is_logged=False) == CONTINUE
    assert decision(AT_EVERY_STEP, is_logged=True) == SAVE
    (tmp_path / "stage" / "stop").touch()
    assert decision(AT_EVERY_STEP, is_logged=False) == STOP


def test_resume_points_that_take_long_to_write_are_written_less_often(tmp_path: Path, tiny: Tiny) -> None:
    first_rank: Any = SimpleNamespace(is_main_process=True, num_processes=1, device=torch.device("cpu"))
    context = stage_context(tmp_path / "stage", {}, tiny("llama"), profile=Profile(device="cpu"))
    (tmp_path / "stage").mkdir(exist_ok=True)
    callback = StageCallback(context, first_rank)

    def decision(seconds_since_last: float, writing_seconds: float) -> int:
        callback.last_save, callback.writing_seconds = time.monotonic() - seconds_since_last, writing_seconds
        return callback._action(is_logged=True)

    assert decision(40, 0) == CONTINUE
    assert decision(46, 0) == decision(46, 2) == SAVE
    assert decision(46, 10) == decision(190, 10) == CONTINUE
    assert decision(201, 10) == SAVE


def test_the_time_that_a_stage_loads_counts_for_its_first_resume_point(tmp_path: Path, tiny: Tiny) -> None:
    first_rank: Any = SimpleNamespace(is_main_process=True, num_processes=1, device=torch.device("cpu"))
    context = stage_context(tmp_path / "stage", {}, tiny("llama"), profile=Profile(device="cpu"))
    (tmp_path / "stage").mkdir(exist_ok=True)
    facts = tmp_path / "stage" / "stage.json"
    facts.write_text("{}")
    for seconds, expected in ((40, CONTINUE), (46, SAVE)):
        os.utime(facts, (time.time() - seconds, time.time() - seconds))
        assert StageCallback(context, first_rank)._action(is_logged=True) == expected


def test_the_time_that_a_resume_point_takes_is_measured_without_step_and_evaluation(tmp_path: Path, tiny: Tiny) -> None:
    accelerator: Any = SimpleNamespace(
        is_main_process=True, num_processes=1, device=torch.device("cpu"), wait_for_everyone=lambda: None
    )
    context = stage_context(tmp_path / "stage", {}, tiny("llama"), profile=AT_EVERY_STEP)
    (tmp_path / "stage").mkdir(exist_ok=True)
    callback = StageCallback(context, accelerator)
    state: Any = SimpleNamespace(global_step=3, max_steps=8, num_input_tokens_seen=0, is_world_process_zero=False)
    control = SimpleNamespace(should_log=True, should_save=False, should_training_stop=False)
    callback.last_save = callback.writing_began = time.monotonic() - 3600
    callback.on_step_end(None, state, control)
    callback.on_save(None, state, control)
    assert 0 < callback.writing_seconds < 1800


def test_progress_moves_within_a_step_and_within_an_evaluation(tmp_path: Path, tiny: Tiny) -> None:
    steps = Steps()
    run_stage("dpo", tmp_path / "stage", rows_for("dpo"), tiny("llama"), progress=steps, batch_size=12)
    assert [part for part in steps.parts if part[2] == "micro-batches of step 2"] == [
        (1, 3, "micro-batches of step 2"), (2, 3, "micro-batches of step 2"),
    ]  # fmt: skip
    assert steps.parts[-1] == (3, 3, "held-out batches")
