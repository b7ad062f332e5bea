"""What training takes, counted on fake models against real ones, and the micro-batch that follows from it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import random_model
from training_stages import CPU, Steps, preference, run_stage, sample

from cai.attention.token_trees import compute_shared_tokens_once
from cai.contracts.profile import Profile
from cai.contracts.training_config import LoRA
from cai.models.footprint import LiveBytes, kv_bytes_of
from cai.stages.dpo import Config as DPOConfig
from cai.stages.ppo import Config as PPOConfig
from cai.stages.sft import Config as SFTConfig
from cai.storage.files import read_json
from cai.text.errors import OutOfMemory
from cai.training import loop, stage_training
from cai.training.activations import StepSetting, step_footprint
from cai.training.memory import MicroBatch, TrainedStage, choose_micro_batch
from cai.training.micro_batch import FILE, MemoryRecord, halve_micro_batch

FLOAT32 = StepSetting("score", torch.float32, torch.float32, checkpointing=False, on_cpu=True)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def real_peak(model, rows: int, length: int, *, bfloat16: bool, tree: bool) -> int:
    """Bytes that a real forward and backward pass holds, gradients apart."""
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    ids = torch.arange(rows * length).reshape(rows, length) % 60 + 3  # no two rows begin alike
    bodies = [model.base_model] if tree else []
    with (
        compute_shared_tokens_once(bodies), LiveBytes(model) as live,
        torch.autocast("cpu", torch.bfloat16, enabled=bfloat16),
    ):  # fmt: skip
        states = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        model.score(states.last_hidden_state).float().sum().backward()
    return live.peak


@pytest.mark.parametrize(
    ("architecture", "bfloat16", "tree", "checkpointing"),
    [
        ("llama", False, True, False),
        ("llama", True, True, False),
        ("llama", True, False, True),
        ("gpt_neox", True, False, False),
        ("gemma3_text", True, False, False),
    ],
)
def test_a_fake_step_holds_what_a_real_one_holds(architecture, bfloat16, tree, checkpointing):
    shape = {"num_labels": 1, "num_key_value_heads": 4}
    model = random_model(architecture, "AutoModelForSequenceClassification", **shape).train()
    compute = torch.bfloat16 if bfloat16 else torch.float32
    setting = replace(FLOAT32, compute=compute, checkpointing=checkpointing, on_cpu=tree)
    counted = step_footprint(model.config, setting, 4, 32)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert counted.activation_bytes == pytest.approx(real_peak(model, 4, 32, bfloat16=bfloat16, tree=tree), rel=0.1)
    assert counted.n_trained == model.num_parameters()


@pytest.mark.parametrize(("architecture", "n_layers"), [("llama", 8), ("gemma3_text", 24), ("qwen3_next", 16)])
def test_layers_that_repeat_are_counted_from_a_few_of_them(architecture, n_layers, tmp_path, monkeypatch):
    config = random_model(architecture, num_hidden_layers=n_layers, num_key_value_heads=4).config
    config.vocab_size = 4096  # so that the gradient of the embeddings is larger than the activations of one layer
    setting = replace(FLOAT32, compute=torch.bfloat16, weights=torch.bfloat16, on_cpu=False)
    from_few = step_footprint(config, setting, 2, 16).activation_bytes
    monkeypatch.setattr("cai.training.activations.of_all_layers", lambda config, _, measure: measure(config).peak)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    assert from_few == pytest.approx(step_footprint(config, setting, 2, 16).activation_bytes, rel=0.03)


def test_a_mixture_of_experts_is_counted_too():
    model = random_model("mixtral", "AutoModelForSequenceClassification", num_labels=1, num_key_value_heads=4).train()
    counted = step_footprint(model.config, replace(FLOAT32, on_cpu=False), 4, 32).activation_bytes
    assert 0.9 < counted / real_peak(model, 4, 32, bfloat16=False, tree=False) < 2


def test_an_adapter_trains_little_over_a_frozen_base_of_half_the_size():
    config = random_model("llama").config
    full = step_footprint(config, FLOAT32, 2, 16)
    adapted = step_footprint(config, replace(FLOAT32, compute=torch.bfloat16, lora=LoRA(rank=2)), 2, 16)
    assert adapted.n_frozen == full.n_trained
    assert 0 < adapted.n_trained < full.n_trained / 2


def sized(kind: str = "sft", available: int = 10**12, profile: Profile | None = None, **fields) -> TrainedStage:
    """A stage that trains a tiny Llama on rows of 32 tokens."""
    settings = {"id": "stage", "from": ["rows"], "batch_size": 32, **fields}
    config = {"sft": SFTConfig, "dpo": DPOConfig}[kind].model_validate(settings)
    profile = profile or Profile(device="cpu", micro_batch=8)
    configs = {"": random_model("llama").config}
    return TrainedStage(config, configs, profile, True, torch.float32, 32, available)


def test_parts_are_those_of_adam_in_float32():
    memory = sized().memory(MicroBatch(8, False)).device
    n = random_model("llama").num_parameters()
    assert (memory["weights"], memory["gradients"], memory["optimizer"]) == (4 * n, 4 * n, 8 * n)
    assert "reference" not in memory
    assert sized("dpo").memory(MicroBatch(8, False)).device["reference"] == 4 * n
    assert "reference" not in sized("dpo", lora={}).memory(MicroBatch(8, False)).device


def test_a_sampling_policy_holds_the_tokens_of_its_rollout_at_most():
    config = PPOConfig.model_validate({"id": "stage", "prompts": "p", "rewards": [{"model": "score"}],
                                       "batch_size": 32, "rollout_size": 64})  # fmt: skip
    stage = replace(sized(), config=config)
    a_token = kv_bytes_of(random_model("llama").config, torch.float32)
    assert stage.memory(MicroBatch(8, False)).device["KV cache"] == 64 * 32 * a_token
    in_two = replace(stage, profile=stage.profile.model_copy(update={"processes": 2}))
    assert in_two.memory(MicroBatch(8, False)).device["KV cache"] == 32 * 32 * a_token
    little = replace(stage, profile=stage.profile.model_copy(update={"token_budget": 1024}))
    assert little.memory(MicroBatch(8, False)).device["KV cache"] == 1024 * a_token


def test_zero_splits_the_state_over_the_processes(tmp_path):
    accelerate = tmp_path / "zero3.yaml"
    accelerate.write_text("deepspeed_config: {zero_stage: 3, offload_optimizer_device: cpu}\n", encoding="utf-8")
    profile = Profile(device="cuda", processes=8, accelerate=accelerate)
    memory = replace(sized(profile=profile), on_cpu=False, compute=torch.bfloat16).memory(MicroBatch(4, True))
    n = random_model("llama").num_parameters()
    assert memory.device["weights"] == memory.device["gradients"] == 2 * n // 8
    assert memory.host == {"optimizer": (12 + 4) * n // 8}  # with gradients in float32
    assert "optimizer" not in memory.device
    reference = replace(sized("dpo", profile=profile), on_cpu=False).memory(MicroBatch(4, True)).device["reference"]
    assert reference == 4 * n // 8


def test_an_adapter_that_zero_3_partitions_is_whole_while_it_loads(tmp_path):
    accelerate = tmp_path / "zero3.yaml"
    accelerate.write_text("deepspeed_config: {zero_stage: 3}\n", encoding="utf-8")
    stage = sized(profile=Profile(device="cuda", processes=8, accelerate=accelerate))
    assert stage.memory(MicroBatch(4, True)).while_loading == 0
    n = random_model("llama").num_parameters()
    assert replace(stage, from_adapter=True).memory(MicroBatch(4, True)).while_loading > 4 * n


def test_the_largest_micro_batch_that_fits_is_taken_and_recomputing_comes_last():
    asked = MicroBatch(8, False)
    needed = {size: sized().memory(MicroBatch(size, False)).peak for size in (8, 4, 1)}
    assert choose_micro_batch(sized(), asked) == asked
    assert choose_micro_batch(sized(available=needed[8] - 1), asked) == MicroBatch(4, False)
    assert choose_micro_batch(sized(available=needed[4] - 1), asked) == MicroBatch(2, False)
    assert choose_micro_batch(sized(available=needed[1] - 1), asked).checkpointing
    assert choose_micro_batch(sized(available=0), asked) == MicroBatch(1, True)


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_stage_with_little_memory_learns_the_same_in_smaller_micro_batches(kind, tmp_path, tiny, monkeypatch):
    make_row = sample if kind == "sft" else preference
    rows = [make_row(n) for n in range(8)]
    run_stage(kind, tmp_path / "free", rows, tiny("llama"))
    monkeypatch.setattr(stage_training, "available_memory", lambda *_: 0)
    steps = Steps()
    run_stage(kind, tmp_path / "tight", rows, tiny("llama"), progress=steps)
    assert any("a micro-batch of 1 and gradient checkpointing, where the profile allows 4" in n for n in steps.notes)
    assert MemoryRecord.read(tmp_path / "tight").micro_batch == MicroBatch(1, True)
    free, tight = weights(tmp_path / "free"), weights(tmp_path / "tight")
    for name, weight in free.items():
        torch.testing.assert_close(tight[name], weight, rtol=1e-4, atol=1e-6)


def test_a_stage_records_what_was_planned_and_what_it_took(tmp_path, tiny):
    run_stage("sft", tmp_path / "stage", [sample(n) for n in range(8)], tiny("llama"))
    record = MemoryRecord.read(tmp_path / "stage")
    assert record.planned_peak == sum(record.planned.values())
    assert record.measured_peak > record.planned["weights"]


def test_a_stage_that_continues_keeps_the_micro_batch_that_it_began_with(tmp_path, tiny, monkeypatch):
    folder = tmp_path / "stage"
    folder.mkdir()
    asked = MicroBatch(CPU.micro_batch, False)
    MemoryRecord(asked, 8, MicroBatch(2, False), 9).write(folder)
    run_stage("sft", folder, [sample(n) for n in range(8)], tiny("llama"))
    assert MemoryRecord.read(folder).micro_batch == MicroBatch(2, False)
    run_stage("sft", folder, [sample(n) for n in range(8)], tiny("llama"), profile=replace_micro_batch(1))
    assert MemoryRecord.read(folder).micro_batch == MicroBatch(1, False)


def replace_micro_batch(size: int) -> Profile:
    return CPU.model_copy(update={"micro_batch": size})


def test_halving_ends_at_one_example_with_recomputed_activations(tmp_path):
    MemoryRecord(MicroBatch(4, False), 12, MicroBatch(4, False), 9).write(tmp_path)
    batches = list(
        itertools.takewhile(lambda batch: batch is not None, (halve_micro_batch(tmp_path) for _ in range(9)))
    )
    assert batches == [MicroBatch(2, False), MicroBatch(1, False), MicroBatch(1, True)]
    assert halve_micro_batch(tmp_path / "no such stage") is None


def test_a_smaller_micro_batch_still_divides_what_a_process_computes(tmp_path):
    MemoryRecord(MicroBatch(5, False), 15, MicroBatch(5, False), 9).write(tmp_path)
    assert halve_micro_batch(tmp_path) == MicroBatch(1, False)


def test_memory_that_a_device_refuses_is_an_error_of_its_own():
    with pytest.raises(OutOfMemory, match="stage 'sl-cai' ran out of memory"), loop.out_of_memory_as_error("sl-cai"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    with pytest.raises(RuntimeError, match="another"), loop.out_of_memory_as_error("sl-cai"):
        raise RuntimeError("another")


def test_a_model_whose_sizes_cannot_be_computed_trains_as_the_profile_says(tmp_path, tiny, monkeypatch):
    def fails(*_):
        raise RuntimeError("no fake kernel")

    monkeypatch.setattr(stage_training, "choose_micro_batch", fails)
    steps = Steps()
    run_stage("sft", tmp_path / "stage", [sample(n) for n in range(4)], tiny("llama"), progress=steps)
    assert "could not be computed (no fake kernel): micro-batch as the profile says" in steps.notes[0]
    assert json.loads((tmp_path / "stage" / FILE).read_text())["planned_peak"] is None
    assert read_json(tmp_path / "stage" / FILE)["micro_batch"]["size"] == CPU.micro_batch
