"""Sizes of models from their configs, against the models themselves."""

from __future__ import annotations

import pytest
import torch
from tiny_models import RANDOM_SHAPE, random_model
from torch import nn

from cai.contracts.profile import Profile
from cai.models.autocast_weights import convert_as_autocast
from cai.models.footprint import (
    LiveBytes,
    count_weights,
    fake_tensors,
    kv_bytes_of,
    kv_bytes_per_token,
    kv_tokens,
    meta_model,
    model_bytes,
    pass_bytes_of,
    read_config,
    reference_bytes,
)
from cai.text.errors import BadInput


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox", "opt", "gemma3_text", "mixtral"])
def test_weights_are_counted_as_the_model_has_them(architecture):
    model = random_model(architecture)
    counts = count_weights(model.config, "language")
    assert counts.all == sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())
    assert model_bytes(model.config, "language", torch.bfloat16) == 2 * counts.all


def test_embeddings_and_an_untied_head_are_counted_apart():
    n = RANDOM_SHAPE["hidden_size"] * RANDOM_SHAPE["vocab_size"]
    tied, untied = (
        count_weights(random_model("llama", tie_word_embeddings=is_tied).config, "language")
        for is_tied in (True, False)
    )
    assert (tied.embeddings, tied.head) == (n, 0)
    assert (untied.embeddings, untied.head, untied.all) == (n, n, tied.all + n)
    assert untied.converted == tied.converted + n


def test_a_reference_keeps_in_float32_what_autocast_leaves():
    model = random_model("llama", tie_word_embeddings=True)
    convert_as_autocast(model, torch.bfloat16)
    n_bytes = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
    assert reference_bytes(model.config, torch.bfloat16) == n_bytes


@pytest.mark.parametrize(
    ("architecture", "n_bytes"),
    [
        ("llama", 2 * 2 * 32 * 4),  # keys and values, layers, width, float32
        ("mistral", 2 * 2 * 32 * 4),
        ("mamba", 0),  # a state does not grow
    ],
)
def test_the_kv_cache_is_measured_on_the_model_itself(architecture, n_bytes):
    assert kv_bytes_per_token(random_model(architecture, num_key_value_heads=4).eval()) == n_bytes


def test_grouped_heads_and_half_precision_make_the_kv_cache_smaller():
    config = random_model("llama", num_key_value_heads=1).config
    assert kv_bytes_of(config, torch.bfloat16) == 2 * 2 * (32 // 4) * 2


def test_a_forward_pass_of_more_tokens_holds_more():
    config = random_model("llama").config
    assert pass_bytes_of(config, torch.float32, 256) > 3 * pass_bytes_of(config, torch.float32, 64)


def test_a_forward_pass_of_many_layers_holds_what_one_of_a_few_holds(tmp_path, monkeypatch):
    config = random_model("llama", num_hidden_layers=12).config
    from_few = pass_bytes_of(config, torch.bfloat16, 128)
    monkeypatch.setattr("cai.models.footprint.of_all_layers", lambda config, _, measure: measure(config).peak)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    assert pass_bytes_of(config, torch.bfloat16, 128) == pytest.approx(from_few, rel=0.02)


def test_sizes_are_computed_once_and_then_read_from_the_cache_folder(monkeypatch):
    config = random_model("llama").config
    first = kv_bytes_of(config, torch.float32)
    monkeypatch.setattr("cai.models.footprint.meta_model", lambda *_: pytest.fail("was computed again"))
    assert kv_bytes_of(config, torch.float32) == first


def test_live_bytes_count_shared_storage_once_and_forget_what_is_freed():
    weight = nn.Linear(8, 8, bias=False)
    with LiveBytes(weight) as live:
        states = torch.zeros(4, 8)
        view = states.view(8, 4)
        assert live.n_bytes == 4 * 8 * 4
        weight.weight.t()  # a view of what is ignored
        assert live.n_bytes == 4 * 8 * 4
        del states, view
        assert (live.n_bytes, live.peak) == (0, 4 * 8 * 4)


def test_tied_weights_stay_tied_when_tensors_are_fake():
    model = meta_model(random_model("llama", tie_word_embeddings=True).config, "language", torch.float32)
    with fake_tensors(model):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert model.get_input_embeddings().weight.device.type == "cpu"


def test_an_engine_holds_the_tokens_that_memory_has_room_for():
    profile = Profile(token_budget=10_000)
    assert kv_tokens(profile, 1_000, free=10**9, on_cpu=True) == 10_000
    assert kv_tokens(profile, 1_000, free=8 * 10**6, on_cpu=True) == 2_000  # a quarter
    assert kv_tokens(profile, 1_000, free=8 * 10**6, on_cpu=False) == 7_200
    assert kv_tokens(profile, 1_000, free=-1, on_cpu=False) == 512


def test_a_type_that_transformers_does_not_know_is_refused_by_name():
    with pytest.raises(BadInput, match="'mine': found the type 'no_such_model'"):
        read_config({"model_type": "no_such_model"}, "mine")
