"""Adapters over a base of 4 bits a weight: the real thing on a CPU, where bitsandbytes is installed."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import Tiny
from training_stages import TRAINING_KINDS, record_trainers, train_briefly, trained
from transformers import AutoConfig, AutoModelForCausalLM

from cai.contracts.model import Model
from cai.models.loading import load_causal_lm, load_sequence_classifier, load_tokenizer
from cai.models.quantised import dequantise
from cai.models.reference import resolve
from cai.models.saving import save_model
from cai.training.rl.policy_sampler import merged_weights

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra `qlora`")
QLORA = {"lora": {"rank": 4, "base": "nf4"}}


@pytest.fixture(autouse=True)
def plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps bitsandbytes 0.50 from repacking weights at the first evaluation on a CPU, which changes their scales."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)


@pytest.fixture
def base(tiny: Tiny, tmp_path: Path) -> Model:
    """A tiny model 64 wide: on CPUs bitsandbytes 0.50 dequantises wrongly what is no multiple of that."""
    folder = Path(shutil.copytree(tiny("llama").path, tmp_path / "base"))
    config = AutoConfig.from_pretrained(folder)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return resolve("base", folder=tmp_path)


def dtypes(weights: Any) -> set[torch.dtype]:
    return {weight.dtype for weight in weights}


def adapted(base: Model, folder: Path) -> Model:
    """An adapter over `base` whose update is not zero, saved in `folder`."""
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    save_model(folder, get_peft_model(load_causal_lm(base), config), load_tokenizer(base), base, {})  # type: ignore[arg-type]
    return resolve(str(folder), folder=folder)


@pytest.mark.parametrize("kind", TRAINING_KINDS)
def test_a_stage_trains_a_float32_adapter_over_a_base_of_4_bits(
    kind: str, tmp_path: Path, base: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = adapted(base, tmp_path / "adapter")
    trainers = record_trainers(monkeypatch)
    losses = train_briefly(kind, tmp_path / "stage", start, **QLORA)
    (trainer,) = trainers
    parameters = dict(trainer.model.named_parameters())
    assert dtypes(weight for weight in parameters.values() if weight.requires_grad) == {torch.float32}
    assert losses[-1] != losses[0]
    quantised = [name for name, weight in parameters.items() if weight.dtype == torch.uint8]
    assert len(quantised) == 14, "all matrices of two layers"
    assert not any(word in name for name in quantised for word in ("embed", "head", "score"))
    folder = tmp_path / "stage" / "model"
    assert dtypes(load_file(folder / "adapter_model.safetensors").values()) == {torch.float32}
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == start.path
    load = load_sequence_classifier if kind == "reward" else load_causal_lm
    assert dtypes(load(trained(tmp_path / "stage"), "bfloat16").parameters()) == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_its_losses_are_near_those_over_a_base_of_16_bits(kind: str, tmp_path: Path, base: Model) -> None:
    losses = train_briefly(kind, tmp_path / "nf4", base, **QLORA)
    expected = train_briefly(kind, tmp_path / "bfloat16", base, lora={"rank": 4})
    assert losses == pytest.approx(expected, rel=0.1)
    assert losses != expected


def test_responses_are_sampled_from_the_matrices_that_the_policy_computes_with(base: Model) -> None:
    quantised = load_causal_lm(base, nf4=True).train()
    policy = get_peft_model(quantised, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    weights = dict(merged_weights(policy, lambda parameters: contextlib.nullcontext()))
    copy = load_causal_lm(base)
    original = copy.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    assert set(weights) >= {name for name, _ in copy.named_parameters()}
    copy.load_state_dict(weights, strict=False)
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(copy(ids).logits, policy(ids).logits, atol=1e-3, rtol=1e-4)
    error = dequantise(quantised.model.layers[0].mlp.up_proj.weight) - original
    assert 0.05 < error.norm() / original.norm() < 0.15, "NormalFloat4 in blocks of 64: 9 % of a normal matrix"
