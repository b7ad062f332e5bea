"""What a plan says that stages take, against published runs and machines of several sizes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cai.cli import main
from cai.contracts.profile import Profile, load_profile
from cai.run.memory_sheet import GB, Machine, StageSheet, memory_sheet
from cai.run.memory_warning import memory_warnings
from cai.run.plan import Options
from cai.run.recipe import load_recipe

LLAMA = {"model_type": "llama", "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "7b": {**LLAMA, "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096},
    "8b": {**LLAMA, "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192},
    "70b": {**LLAMA, "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 8192},
    "qwen3-8b": {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
                 "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                 "max_position_embeddings": 40960, "tie_word_embeddings": False},
}  # fmt: skip
"""Shapes of models, as their config.json gives them."""


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def sheets(
    folder: Path, shape: str, recipe: str, profile: Profile, *overrides: str, gpus: int = 8, gpu_memory: float = 80,
    names: Sequence[str] = ("responses", "votes", "sl-cai", "policy"),
) -> dict[str, StageSheet]:  # fmt: skip
    """The sheet of the named stages of a shipped recipe with a model of that shape."""
    config = folder / f"{shape}.json"
    config.write_text(json.dumps(SHAPES[shape]), encoding="utf-8")
    loaded = load_recipe(recipe, ["model=some/model", *overrides])
    here = Machine((int(gpu_memory * GB),) * gpus, 1000 * GB, None)
    stages = [loaded.stages[name] for name in names]
    return {sheet.stage: sheet for sheet in memory_sheet(loaded, profile, here, stages=stages, config_file=config)}


ONE_GPU = load_profile("1gpu").model_copy(update={"micro_batch": 1})


def test_a_7b_adapter_takes_what_llama_factory_publishes(tmp_path):
    """16 GB with LoRA in 16 bits, 120 GB in full with weights and states in float32 (hiyouga/LLaMA-Factory, README)."""
    short, only = "stages.sl-cai.max_length=512", ("sl-cai",)
    lora = sheets(tmp_path, "7b", "cai-dpo", ONE_GPU, "stages.sl-cai.lora={}", short, names=only)["sl-cai"]
    assert lora.memory.peak / GB == pytest.approx(16, rel=0.15)
    full = sheets(tmp_path, "7b", "cai-dpo", ONE_GPU, short, names=only)["sl-cai"]
    assert full.memory.peak / GB == pytest.approx(120, rel=0.15)
    assert "ZeRO-3" in full.remedy


def test_a_7b_base_of_4_bits_takes_what_llama_factory_publishes(tmp_path):
    """6 GB with QLoRA in 4 bits."""
    nf4 = ("stages.sl-cai.lora={base: nf4}", "stages.sl-cai.max_length=512")
    peak = sheets(tmp_path, "7b", "cai-dpo", ONE_GPU, *nf4, names=("sl-cai",))["sl-cai"].memory.peak
    assert peak / GB == pytest.approx(6, rel=0.15)


def test_ppo_of_an_8b_model_fits_eight_gpus_of_80_gb_as_openrlhf_runs_it(tmp_path):
    stages = ("responses", "votes", "sl-cai", "reward", "policy")
    eight = sheets(tmp_path, "8b", "cai-ppo", load_profile("8gpu-zero3"), names=stages)
    assert {name: sheet.remedy for name, sheet in eight.items() if sheet.remedy} == {}


@pytest.mark.parametrize(
    ("profile", "gpus", "gpu_memory", "fitting"),
    [("1gpu", 1, 24, {"responses", "votes"}), ("1gpu", 1, 80, {"responses", "votes"}),
     ("8gpu-zero3", 8, 80, {"responses", "votes", "sl-cai", "policy"})],
)  # fmt: skip
def test_qwen3_8b_in_full_trains_on_eight_gpus_and_answers_on_one(tmp_path, profile, gpus, gpu_memory, fitting):
    stages = sheets(tmp_path, "qwen3-8b", "cai-dpo", load_profile(profile), gpus=gpus, gpu_memory=gpu_memory)
    assert {name for name, sheet in stages.items() if sheet.remedy is None} == fitting


def test_an_adapter_of_qwen3_8b_trains_on_one_gpu_of_24_gb(tmp_path):
    profile = load_profile("1gpu")
    lora, only = "stages.sl-cai.lora={}", ("sl-cai",)
    adapter = sheets(tmp_path, "qwen3-8b", "cai-dpo", profile, lora, gpus=1, gpu_memory=24, names=only)["sl-cai"]
    assert adapter.remedy is None
    assert adapter.micro_batch.checkpointing


def test_a_70b_model_needs_a_split_engine(tmp_path):
    whole = sheets(tmp_path, "70b", "cai-dpo", load_profile("8gpu-zero3"), names=["responses"])
    assert "tensor_parallel" in whole["responses"].remedy
    split = sheets(tmp_path, "70b", "cai-dpo", load_profile("8gpu-vllm-tp"), names=["responses"])
    assert split["responses"].remedy is None


def test_a_plan_exits_with_1_and_names_the_stage_and_the_remedy(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SHAPES["qwen3-8b"]), encoding="utf-8")
    command = ["plan", "cai-dpo", "--set", "model=some/model", "--on", "1gpu", "--gpu-memory", "24",
               "--until", "sl-cai", "--host-memory", "64", "--model-config", str(config)]  # fmt: skip
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1, result.output
    assert "sl-cai takes" in result.output
    assert "train an adapter with `lora: {}`" in result.output
    as_json = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)["memory"]
    assert {stage["stage"]: stage["fits"] for stage in as_json}["sl-cai"] is False
    assert as_json[0]["peak"] == sum(as_json[0]["device"].values())


def test_the_embedded_model_fits_and_says_what_it_takes():
    result = CliRunner().invoke(main, ["plan", "quickstart", "--host-memory", "16"])
    assert result.exit_code == 0, result.output
    assert "DOES NOT FIT" not in result.output
    assert "memory of the machine" in result.output


def test_a_model_that_is_not_here_asks_for_its_config():
    command = ["plan", "quickstart", "--set", "model=some/model"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert "'some/model' is not on this machine: give its config.json with --model-config" in result.output


def test_a_profile_with_gpus_asks_for_their_memory_where_there_are_none(monkeypatch):
    monkeypatch.setattr("cai.contracts.machine.gpu_memory", lambda: ())
    result = CliRunner().invoke(main, ["plan", "quickstart", "--on", "1gpu"])
    assert result.exit_code == 2
    assert "--gpu-memory 80" in result.output


def test_a_run_that_does_not_fit_is_warned_of_before_it_begins(tmp_path, tiny, monkeypatch):
    recipe = load_recipe("quickstart", [f"model={tiny('llama').path}"])
    huge = load_profile("cpu").model_copy(update={"processes": 10**6, "fork": True})
    assert memory_warnings(recipe, huge, tmp_path / "run", Options()) == []  # small models are not waited for
    monkeypatch.setattr("cai.run.memory_warning.SMALL", 0)
    overrides = (f"stages.{name}.batch_size=1000000" for name in ("sl-cai", "reward", "policy"))
    recipe = load_recipe("quickstart", [f"model={tiny('llama').path}", *overrides])
    warnings = memory_warnings(recipe, huge, tmp_path / "run", Options(until="sl-cai"))
    assert [warning.partition(" may not fit: it takes ")[0] for warning in warnings] == [
        "responses",
        "revisions",
        "sl-cai",
    ]


def test_a_dry_run_for_gpus_that_are_not_here_says_how_to_compute_their_memory(monkeypatch):
    monkeypatch.setattr("cai.contracts.machine.gpu_memory", lambda: ())
    command = ["run", "quickstart", "--dry-run", "--on", "1gpu"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "--gpu-memory 80 computes it" in result.output
    assert json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)["memory"] is None
    described = CliRunner().invoke(main, [*command, "--json", "--gpu-memory", "80"])
    assert all(stage["fits"] for stage in json.loads(described.stdout)["memory"])
    assert CliRunner().invoke(main, ["run", "quickstart", "--gpu-memory", "80"]).exit_code == 2


def test_a_config_that_no_model_needs_is_refused(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SHAPES["7b"]), encoding="utf-8")
    result = CliRunner().invoke(main, ["plan", "quickstart", "--model-config", str(config)])
    assert result.exit_code == 2
    assert "every model of these stages is on this machine" in result.output


@pytest.mark.parametrize("train", ["{optim: sgd}", "{optim: adafactor}"])
def test_an_optimizer_without_two_moments_takes_less(tmp_path, train):
    adam, other = (
        sheets(tmp_path, "7b", "cai-dpo", ONE_GPU, *overrides, names=["sl-cai"])["sl-cai"]
        for overrides in ([], [f"stages.sl-cai.train={train}"])
    )
    assert other.memory.peak < adam.memory.peak
    assert other.disk == adam.disk
    assert other.disk_while_running < adam.disk_while_running


def test_offloading_moves_the_optimizers_state_into_the_machines_memory(tmp_path):
    on_gpu, offloaded = (
        sheets(tmp_path, "8b", "cai-dpo", load_profile(name), names=["sl-cai"])["sl-cai"]
        for name in ("8gpu-zero3", "8gpu-zero3-offload")
    )
    assert offloaded.memory.peak < on_gpu.memory.peak
    assert offloaded.host / GB == pytest.approx(8 * 3 + 18 * 8, rel=0.1)  # 18 bytes of 8 billion parameters


def test_vllm_beside_ppo_takes_its_share_of_each_gpu(tmp_path):
    profile = load_profile("vllm").model_copy(update={"micro_batch": 1})
    greedy = sheets(tmp_path, "8b", "cai-ppo", profile, "stages.policy.lora={}", gpus=1, names=["policy"])["policy"]
    assert "`vllm: {gpu_memory_utilization: " in greedy.remedy
    vllm = profile.vllm.model_copy(update={"gpu_memory_utilization": 0.3})
    modest = sheets(tmp_path, "8b", "cai-ppo", profile.model_copy(update={"vllm": vllm}), "stages.policy.lora={}",
                    gpus=1, names=["policy"])["policy"]  # fmt: skip
    assert modest.remedy is None
