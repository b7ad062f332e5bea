"""What weights are loaded, merged and frozen in, and where."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import Tiny, random_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from cai.attention.token_trees import compute_shared_tokens_once
from cai.models import loading
from cai.models.autocast_weights import convert_as_autocast
from cai.models.loading import load_causal_lm, load_sequence_classifier
from cai.models.reference import base_of, fetch, read_json_object


def test_an_adapter_is_added_in_float32_and_rounded_once_to_the_precision_that_is_asked_for(tiny: Tiny) -> None:
    folder, base = fetch(tiny("lora")), base_of(tiny("lora"))
    assert base is not None
    config, adapter = read_json_object(folder / "adapter_config.json"), load_file(folder / "adapter_model.safetensors")
    merged, plain = load_causal_lm(tiny("lora"), "bfloat16"), load_causal_lm(base, "bfloat16").state_dict()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    n_adapted = 0
    for name, weight in merged.state_dict().items():
        expected, prefix = plain[name], f"base_model.model.{name.removesuffix('.weight')}"
        if (factor := adapter.get(f"{prefix}.lora_A.weight")) is not None:
            update = adapter[f"{prefix}.lora_B.weight"] @ factor * config["lora_alpha"] / config["r"]
            expected, n_adapted = (expected.float() + update).bfloat16(), n_adapted + 1
        assert torch.equal(weight, expected), name
    assert n_adapted > 0


@pytest.mark.parametrize(
    ("load", "family"),
    [(load_causal_lm, "lora"), (load_sequence_classifier, "llama"), (load_sequence_classifier, "lora")],
)
def test_rotary_frequencies_stay_float32_in_a_bfloat16_model(load: Any, family: str, tiny: Tiny) -> None:
    model, plain = load(tiny(family), "bfloat16"), load_causal_lm(tiny("llama"))
    buffers = dict(model.named_buffers())
    assert buffers
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffers[name], buffer), name


def test_weights_are_read_to_their_device_and_an_adapter_is_merged_in_place(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    from_pretrained = AutoModelForCausalLM.from_pretrained
    spy = lambda *args, **options: (calls.append(options), from_pretrained(*args, **options))[1]  # noqa: E731
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    load_causal_lm(tiny("lora"), "bfloat16")
    (options,) = calls
    assert (options["device_map"], options["dtype"]) == ({"": torch.device("cpu")}, torch.bfloat16)


def test_a_classifier_takes_over_the_weights_of_a_language_model_without_a_copy(tiny: Tiny) -> None:
    language_model = load_causal_lm(tiny("lora"))
    classifier = loading._under_new_score(language_model, "float32", "cpu", nf4=False)
    taken = dict(classifier.base_model.named_parameters())
    for name, weight in language_model.base_model.named_parameters():
        assert taken[name].data_ptr() == weight.data_ptr(), name
    assert classifier.score.weight.std() > 0


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "falcon", "phi3", "opt", "mixtral", "lfm2"]
)
def test_weights_converted_as_autocast_does_give_the_same_bits(architecture: str) -> None:
    model = random_model(architecture, num_key_value_heads=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)  # also norms, whose weights begin as ones
    frozen = copy.deepcopy(model)
    convert_as_autocast(frozen, torch.bfloat16)
    assert torch.equal(log_probs(frozen), log_probs(model))
    assert not torch.equal(log_probs(copy.deepcopy(model).bfloat16()), log_probs(model))
    products = [module.weight for module in frozen.modules() if isinstance(module, nn.Linear)]
    embeddings = frozen.get_input_embeddings().weight
    assert {weight.dtype for weight in products if weight is not embeddings} <= {torch.bfloat16}
    assert embeddings.dtype == torch.float32


def log_probs(model: Any) -> Tensor:
    """Of two rows as a trainer on a CPU computes them: under autocast, shared tokens once where the model can."""
    ids = torch.arange(3, 27).view(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), compute_shared_tokens_once([model]):
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits.float().log_softmax(dim=-1)[mask.bool()]
