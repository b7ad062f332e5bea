"""Portions of a large model on a CPU are about a minute's work; all others are of the profile's size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from feedback_stages import Script, prompt, run_stage
from tiny_models import Tiny, random_model
from training_stages import Killed, Steps

from cai.contracts.model import Model
from cai.contracts.profile import Profile, load_profile
from cai.engines import portion_size
from cai.engines.portion_size import MIN_ITEMS, Work, count_stored_parameters, items_per_portion
from cai.models.reference import resolve

TWO_CORES = Profile(device="cpu", threads=2)
PROMPTS = {"numbers": [prompt(f"What is {number}?") for number in range(40)]}


def stored(folder: Path, n_parameters: int) -> Model:
    """A model's folder with the header of its weights alone."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    header = {"__metadata__": {}, "weight": {"shape": [n_parameters // 1000, 1000], "dtype": "BF16"}}
    encoded = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded)
    return resolve(str(folder), folder=folder)


def test_the_larger_the_model_the_smaller_its_portions(tmp_path: Path) -> None:
    sizes = [
        items_per_portion(TWO_CORES, [Work(stored(tmp_path / f"{millions}", millions * 10**6), sampled=256)])
        for millions in (135, 500, 8000)
    ]
    assert sizes == [39, MIN_ITEMS, MIN_ITEMS]
    model = resolve(str(tmp_path / "135"), folder=tmp_path)
    assert items_per_portion(TWO_CORES, [Work(model, read=256)]) == 156, "a prompt is read faster than text is sampled"
    both = [Work(model, read=128), Work(model, read=128)]
    assert items_per_portion(TWO_CORES, both) == 156, "the models of several rewards take their times one by one"
    assert items_per_portion(Profile(device="cpu", threads=8), [Work(model, sampled=256)]) == 156


def test_the_embedded_model_gpus_and_servers_keep_the_size_of_the_profile(tmp_path: Path) -> None:
    work = [Work(resolve("micro", folder=tmp_path), sampled=4096, read=4096)]
    assert items_per_portion(load_profile("cpu"), work) is None
    large = Work(stored(tmp_path / "large", 10**9), sampled=256)
    assert items_per_portion(Profile(device="cuda"), [large]) is None
    assert items_per_portion(Profile(device="cpu", engine="server"), [large]) is None
    assert items_per_portion(TWO_CORES, [Work(Model("judge", "served:judge"), sampled=256)]) is None
    (tmp_path / "large" / "model.safetensors").write_bytes(b"\xff" * 20)
    assert items_per_portion(TWO_CORES, [large]) is None, "loading the model says what is wrong with it"


def test_parameters_are_counted_from_the_headers_of_all_files_and_an_adapters_base(tmp_path: Path) -> None:
    lm = random_model("llama")
    lm.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    model = resolve(str(tmp_path / "model"), folder=tmp_path)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    n_parameters = sum(parameter.numel() for parameter in lm.parameters())
    assert count_stored_parameters(model) == n_parameters
    adapter = stored(tmp_path / "adapter", 5000)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": model.path}))
    assert count_stored_parameters(adapter) == 5000 + n_parameters


@pytest.fixture
def smallest_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is large."""
    monkeypatch.setattr(portion_size, "SMALL_MODEL", 1)
    monkeypatch.setattr(portion_size, "PORTION_SECONDS", 1e-9)


@pytest.mark.usefixtures("smallest_portions")
def test_a_stage_of_smaller_portions_that_is_killed_ends_with_the_bytes_of_an_undisturbed_one(
    tmp_path: Path, tiny: Tiny
) -> None:
    settings = {"prompts": ["numbers"], "sets": PROMPTS, "model": tiny("llama"), "max_new_tokens": 8, "n": 1}
    undisturbed, steps = run_stage("sample", tmp_path / "undisturbed", progress=Steps(), **settings), Steps()
    with pytest.raises(Killed):
        run_stage("sample", tmp_path / "killed", progress=Steps(die_at=20), **settings)
    journal = (tmp_path / "killed" / "sample" / "journal.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["positions"]) for line in journal[1:]] == [13], "40 items in three equal portions"
    resumed = run_stage("sample", tmp_path / "killed", progress=steps, **settings)
    assert resumed.bytes == undisturbed.bytes
    assert steps.notes == [
        "16 items a portion, where the profile allows 256: about a minute of work, which is what a kill loses"
    ]


@pytest.mark.usefixtures("smallest_portions")
def test_a_stated_size_is_kept(tmp_path: Path) -> None:
    steps = Steps()
    settings = {"prompts": ["numbers"], "sets": PROMPTS, "script": Script(), "progress": steps}
    run_stage("sample", tmp_path, journal_batch=64, model=Model("large", "nowhere"), **settings)
    assert steps.notes == []
    assert len((tmp_path / "sample" / "journal.jsonl").read_text().splitlines()) == 2
