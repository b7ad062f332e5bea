"""A training stage that runs out of memory goes on with less at once, and ends with the same model."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from recipe_runs import CPU, run
from safetensors.torch import load_file

from cai.run import launch
from cai.text.errors import OutOfMemory, StageFailed
from cai.training.micro_batch import MemoryRecord, MicroBatch
from cai.training.trainers import SupervisedTrainer

RECIPE = """
name: little
model: micro
prompts: {helpful: {source: micro, split: train, tags: [helpful], limit: 16}}
stages:
  - {id: responses, kind: sample, prompts: [helpful], max_new_tokens: 48}
  - {id: tuned, kind: sft, from: responses, batch_size: 4, max_length: 256,
     train: {num_train_epochs: 2, learning_rate: 1.0e-3}}
"""
FLOAT32 = CPU.model_copy(update={"dtype": "float32"})


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "little.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def refuse_memory(monkeypatch: pytest.MonkeyPatch, largest: int, first_step: int = 0) -> list[int]:
    """Steps of more than `largest` rows run out of memory from the given step on; the rows of all that were tried."""
    tried: list[int] = []
    step = SupervisedTrainer.training_step

    def training_step(self, model, inputs, *arguments, **options):
        tried.append(len(inputs["input_ids"]))
        if tried[-1] > largest and len(tried) > first_step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(self, model, inputs, *arguments, **options)

    monkeypatch.setattr(SupervisedTrainer, "training_step", training_step)
    return tried


def stage_folder(recipe: Path, runs: str) -> Path:
    [folder] = (recipe.parent / runs).glob("tuned-*")
    return folder


def test_a_stage_that_runs_out_of_memory_halves_its_micro_batch_and_learns_the_same(recipe, monkeypatch, capsys):
    run(recipe, profile=FLOAT32, runs="free")
    tried = refuse_memory(monkeypatch, largest=1, first_step=3)
    run(recipe, profile=FLOAT32, runs="tight")
    assert tried[3:6] == [4, 2, 1]
    assert "stage 'tuned' ran out of memory; going on with a micro-batch of 2" in capsys.readouterr().err
    assert MemoryRecord.read(stage_folder(recipe, "tight")).micro_batch == MicroBatch(1, False)
    free, tight = (load_file(stage_folder(recipe, runs) / "model" / "model.safetensors") for runs in ("free", "tight"))
    for name, weight in free.items():
        torch.testing.assert_close(tight[name], weight, rtol=1e-3, atol=1e-5)


def test_a_stage_that_has_no_room_for_one_example_fails_with_a_sentence(recipe, monkeypatch):
    tried = refuse_memory(monkeypatch, largest=0)
    with pytest.raises(OutOfMemory, match=r"^stage 'tuned' ran out of memory"):
        run(recipe)
    assert tried == [4, 2, 1, 1]  # the last with recomputed activations


@pytest.mark.parametrize("kernel_counts", [True, False])
def test_a_process_that_the_system_killed_for_memory_is_called_that(tmp_path, monkeypatch, kernel_counts):
    (tmp_path / "log.txt").touch()
    error = launch._first_error(tmp_path, "policy", [None, -9], kernel_counts)
    assert isinstance(error, StageFailed)
    if kernel_counts:
        assert "stage 'policy', process 1, was killed by the system, which had no memory left" in str(error)
        assert isinstance(error, OutOfMemory)  # a training stage goes on with a smaller micro-batch
    else:
        assert "ended with signal 9" in str(error)


def test_the_kernels_count_of_kills_is_looked_at_around_a_launch(recipe, monkeypatch):
    counts = itertools.count(7)
    monkeypatch.setattr(launch, "killed_for_memory", lambda: next(counts))
    monkeypatch.setattr(launch, "_follow", lambda *_: [-9])
    own_process = CPU.model_copy(update={"device": "cuda"})
    with pytest.raises(StageFailed, match="was killed by the system"):
        run(recipe, profile=own_process)
