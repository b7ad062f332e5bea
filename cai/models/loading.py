"""Loads models and tokenizers, from safetensors alone and without code from their folders.

Every tokenizer leaves here with a pad token that is not the end of a text: a trainer masks padding, so with pad = eos a
model never learns to stop. A token that the tokenizer already reserves is used; else one is added and the embeddings
grow.

Left out: quantised loading, remote code, pickled weights.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai.text.errors import BadInput

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cai.contracts.model import Model
from cai.models.reference import ADAPTER, _base_of, _json, fetch

_PADS = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|vision_pad|>", "<|fim_pad|>")
ADDED_PAD = "<|pad|>"


@contextlib.contextmanager
def unpartitioned() -> Iterator[None]:
    """Models loaded within are whole in every process, also while transformers parts new ones over them (ZeRO-3).

    A copy that is only read, a reference or a reward model, has no optimizer state to share; parted, each of its
    layers would be sent around at every forward pass, and all processes would have to make the same ones.
    """
    from transformers.integrations import deepspeed

    active = deepspeed._hf_deepspeed_config_weak_ref
    config = None if active is None else active()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer, its pad token not eos, with the chat template that the model is used with."""
    from transformers import AutoTokenizer

    folder = fetch(model)
    home = folder
    while not (home / "tokenizer_config.json").is_file() and not (home / "tokenizer.json").is_file():
        base = _base_of(model, home)
        if base is None:
            raise BadInput(f"model {model.name!r} has no tokenizer in {folder}")
        home = fetch(base)
    tokenizer = AutoTokenizer.from_pretrained(home, local_files_only=True, trust_remote_code=False)
    given = model.chat_template or (None if tokenizer.chat_template else _set_template(model))
    if given is not None:
        begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        # A template from elsewhere: the model has seen every text begin with its bos.
        tokenizer.chat_template = ("{{ bos_token }}" if begins and "bos_token" not in given else "") + given
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    if tokenizer.pad_token in (None, tokenizer.eos_token) or tokenizer.pad_token in template:
        tokenizer.add_special_tokens({"pad_token": _free_token(tokenizer, template) or ADDED_PAD})
    return tokenizer


def load_causal_lm(model: Model, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """The language model in evaluation mode, its adapters merged. `dtype` and `device` as in a profile."""
    from transformers import AutoModelForCausalLM

    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    folder = fetch(model)
    if (folder / ADAPTER).is_file():
        loaded = _merged(_base_model(model, folder, load_causal_lm), folder, model).to(kind)
    else:
        loaded = _from_pretrained(AutoModelForCausalLM, folder, model, dtype=kind)
    _fit(loaded, load_tokenizer(model))
    return loaded.to(where).eval()


def load_sequence_classifier(model: Model, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """The model with one score as its output, in evaluation mode: a reward model, or a language model under a new head.

    A new head is drawn from torch's global generator, which the caller seeds.
    """
    from transformers import AutoModelForSequenceClassification

    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    folder = fetch(model)
    tokenizer = load_tokenizer(model)
    if not (folder / ADAPTER).is_file():
        loaded = _from_pretrained(AutoModelForSequenceClassification, folder, model, dtype=kind, num_labels=1)
    elif _json(folder / ADAPTER).get("task_type") == "SEQ_CLS":
        loaded = _base_model(model, folder, load_sequence_classifier)
        _fit(loaded, tokenizer)
        loaded = _merged(loaded, folder, model)
    else:
        body = load_causal_lm(model)
        body.config.num_labels = 1
        loaded = AutoModelForSequenceClassification.from_config(body.config)
        loaded.base_model.load_state_dict(body.base_model.state_dict())
    _fit(loaded, tokenizer)
    return loaded.to(device=where, dtype=kind).eval()


def pick_device(name: str = "auto") -> torch.device:
    """The torch device of a profile's `device`: auto takes a GPU where there is one.

    Of several processes on this machine, each takes the GPU of its number (LOCAL_RANK) and makes it the current one.
    Raises BadInput where there is none for it.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("the profile says `device: cuda`, but torch finds no GPU here")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    number, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= found:
        raise BadInput(
            f"found {found} GPU{'s' * (found != 1)} here, expected one for each of the profile's `processes`: "
            f"this is process {number} of them"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a profile's `dtype`: auto is bfloat16 where the hardware computes in it, else float32."""
    import torch

    if name not in ("auto", "float32", "bfloat16"):
        raise BadInput(f"unknown dtype {name!r}, expected auto, float32 or bfloat16")
    if name == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _set_template(model: Model) -> str | None:
    from cai.templates import load_templates

    return load_templates(model.templates).chat_template


def _base_model(model: Model, folder: Path, load: Any) -> PreTrainedModel:
    base = _base_of(model, folder)
    assert base is not None
    return load(base)


def _merged(base: PreTrainedModel, folder: Path, model: Model) -> PreTrainedModel:
    """`base`, in float32, with the adapter in `folder` added to its weights."""
    from peft import PeftModel

    if not any(folder.glob("*.safetensors")):
        raise BadInput(f"model {model.name!r}: the adapter in {folder} has no .safetensors file")
    _fit(base, load_tokenizer(model))
    return PeftModel.from_pretrained(base, str(folder)).merge_and_unload()


def _from_pretrained(loader: Any, folder: Path, model: Model, **options: object) -> PreTrainedModel:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = _json(folder / "config.json").get("model_type")
    if kind not in CONFIG_MAPPING:
        raise BadInput(
            f"model {model.name!r}: this version of transformers does not know the type {kind!r} in config.json"
        )
    with _quietly():
        return loader.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, trust_remote_code=False, **options
        )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' progress bars and its report on a head that is new by intention."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _free_token(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """A special token that stands for nothing in this tokenizer's texts, to be used as padding."""
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    known = [token for token in _PADS if token in special]
    reserved = [token for token in special if "reserved" in token or "unused" in token]
    spare = [token for token in ("<|endoftext|>", "<unk>", "[UNK]") if token in special]
    return next((token for token in known + reserved + spare if token not in taken and token not in template), None)


def _fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Grows the embeddings where a pad token was added, and tells the model its pad token."""
    rows = model.get_input_embeddings().num_embeddings  # the weight itself may lie parted over processes (ZeRO-3)
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8, mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:  # the mean: drawn rows would differ from load to load
                with _gathered(layer.weight):
                    layer.weight.data[rows:] = layer.weight.data[:rows].mean(dim=0)
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def _gathered(weight: torch.Tensor) -> AbstractContextManager[object]:
    """Makes a weight that ZeRO-3 has parted whole within the block, and parts it again."""
    if not hasattr(weight, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight], modifier_rank=0)  # type: ignore[no-any-return]
