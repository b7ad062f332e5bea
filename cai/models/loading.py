"""Loads models and tokenizers, from safetensors alone and without code from their folders.

Every tokenizer gets a pad token other than eos: a trainer masks padding, so with pad = eos a model never learns to
stop. The pad token is one that the tokenizer already reserves; where it has none, one is added and the embeddings grow.

Left out: remote code, pickled weights.
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
from cai.models.model_files import tokenizer_folder
from cai.models.reference import ADAPTER, base_of, fetch, read_json_object

_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|vision_pad|>", "<|fim_pad|>")
ADDED_PAD = "<|pad|>"


@contextlib.contextmanager
def unpartitioned() -> Iterator[None]:
    """Models loaded or called within the block are whole in every process, even while ZeRO-3 partitions trained ones.

    A frozen model, such as a reference or a reward model, has no optimizer state to share. Partitioned, it would have
    its layers gathered at every forward pass, and all processes would have to make the same passes.
    """
    from transformers.integrations import deepspeed

    # transformers 5.23 keeps its DeepSpeed config in a module variable, and has no public way to read it. By it
    # transformers decides whether to partition, and TRL's language-model head (1.16) whether to gather its weight.
    active = deepspeed._hf_deepspeed_config_weak_ref
    config = None if active is None else active()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer with a pad token other than eos and the chat template that the model is used with."""
    from transformers import AutoTokenizer

    from cai.templates import load_templates

    source = tokenizer_folder(model)
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    chat_template = model.chat_template or None
    if chat_template is None and not tokenizer.chat_template:
        chat_template = load_templates(model.templates).chat_template
    if chat_template is not None:
        starts_with_bos = tokenizer.bos_token_id in tokenizer("a")["input_ids"][:1]
        if starts_with_bos and "bos_token" not in chat_template:  # a template that was not written for this model
            chat_template = "{{ bos_token }}" + chat_template
        tokenizer.chat_template = chat_template
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    if tokenizer.pad_token in (None, tokenizer.eos_token) or tokenizer.pad_token in template:
        tokenizer.add_special_tokens({"pad_token": _free_token(tokenizer, template) or ADDED_PAD})
    return tokenizer


def load_causal_lm(model: Model, dtype: str = "float32", device: str = "cpu", *, nf4: bool = False) -> PreTrainedModel:
    """The language model in evaluation mode, its adapters merged. `dtype` and `device` as in a profile.

    With `nf4`, matrices are quantised to 4 bits (`cai.models.quantised`), after the merge of adapters.
    """
    from transformers import AutoModelForCausalLM

    folder = fetch(model)
    if (base := base_of(model, folder)) is None:
        loaded = _from_pretrained(AutoModelForCausalLM, folder, model, dtype, device, nf4=nf4)
    else:
        loaded = _merge_adapter(load_causal_lm(base, dtype, "cpu" if nf4 else device), folder, model)
        if nf4:
            loaded = _from_weights(type(loaded), loaded, dtype, device, nf4=True)
    _fit_to_tokenizer(loaded, load_tokenizer(model))
    return loaded.eval()


def load_sequence_classifier(
    model: Model, dtype: str = "float32", device: str = "cpu", *, nf4: bool = False
) -> PreTrainedModel:
    """The model with one score as its output, in evaluation mode: a reward model, or a language model under a new head.

    A new head is initialised from torch's global generator, which the caller seeds. `nf4` as for `load_causal_lm`.
    """
    from transformers import AutoModelForSequenceClassification

    folder = fetch(model)
    tokenizer = load_tokenizer(model)
    if (base := base_of(model, folder)) is None:
        auto_class = AutoModelForSequenceClassification
        loaded = _from_pretrained(auto_class, folder, model, dtype, device, nf4=nf4, num_labels=1)
    elif read_json_object(folder / ADAPTER).get("task_type") == "SEQ_CLS":
        loaded = load_sequence_classifier(base, dtype, "cpu" if nf4 else device)
        _fit_to_tokenizer(loaded, tokenizer)
        loaded = _merge_adapter(loaded, folder, model)
        if nf4:
            loaded = _from_weights(type(loaded), loaded, dtype, device, nf4=True)
    else:
        loaded = _under_new_score(load_causal_lm(model, dtype, "cpu" if nf4 else device), dtype, device, nf4=nf4)
    _fit_to_tokenizer(loaded, tokenizer)
    return loaded.eval()


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts a model's weights, not its buffers: rotary frequencies in bfloat16 are wrong by radians at 1,000 tokens.

    Weights that ZeRO-3 has partitioned stay as they are: their precision is that of DeepSpeed's config, and a cast
    would change only what they say of themselves.
    """
    for parameter in model.parameters():
        if not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)


def pick_device(name: str = "auto") -> torch.device:
    """The torch device of a profile's `device`: auto is a GPU where there is one.

    Of several processes on this machine, each takes the GPU of its number (LOCAL_RANK) and makes it the current one.
    Raises BadInput where there is none for it.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("the profile says `device: cuda`, but torch finds no GPU here")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, n_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= n_gpus:
        raise BadInput(
            f"found {n_gpus} GPU{'s' * (n_gpus != 1)} here, expected one for each of the profile's `processes`: "
            f"this is process {local_rank} of them"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a profile's `dtype`: auto is bfloat16 where the hardware computes in it, else float32."""
    import torch

    if name not in ("auto", "float32", "bfloat16"):
        raise BadInput(f"unknown dtype {name!r}, expected auto, float32 or bfloat16")
    if name == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _merge_adapter(base: PreTrainedModel, folder: Path, model: Model) -> PreTrainedModel:
    """`base` with the adapter in `folder` merged into its weights, where they lie and in their own precision.

    An update is computed in float32 for one matrix at a time and rounded once, when it is added.
    """
    from peft import PeftModel

    if not any(folder.glob("*.safetensors")):
        raise BadInput(f"model {model.name!r}: the adapter in {folder} has no .safetensors file")
    _fit_to_tokenizer(base, load_tokenizer(model))
    dtype = base.dtype
    merged = PeftModel.from_pretrained(base, str(folder), torch_device=str(base.device)).merge_and_unload()
    cast_weights(merged, dtype)  # a head that was saved with the adapter
    return merged


def _under_new_score(language_model: PreTrainedModel, dtype: str, device: str, *, nf4: bool) -> PreTrainedModel:
    """A sequence classifier that takes over the weights of the language model's body and has a new head."""
    import torch
    from transformers import AutoModelForSequenceClassification

    language_model.config.num_labels = 1
    with torch.device("meta"):
        classifier_class = type(AutoModelForSequenceClassification.from_config(language_model.config))
    return _from_weights(classifier_class, language_model, dtype, device, nf4=nf4)


def _from_weights(
    model_class: type[PreTrainedModel], model: PreTrainedModel, dtype: str, device: str, *, nf4: bool
) -> PreTrainedModel:
    """A model of this class that takes over the weights of `model`, without a copy where they are on the device."""
    from cai.attention.rotary_rows import use_frequencies_of_each_row

    options = _placement(dtype, pick_device(device), nf4)
    with silence_transformers():
        loaded = model_class.from_pretrained(None, config=model.config, state_dict=model.state_dict(), **options)
    use_frequencies_of_each_row(loaded)
    return loaded


def _from_pretrained(
    auto_class: Any, folder: Path, model: Model, dtype: str, device: str, *, nf4: bool, **options: object
) -> PreTrainedModel:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from cai.attention.rotary_rows import use_frequencies_of_each_row

    model_type = read_json_object(folder / "config.json").get("model_type")
    if model_type not in CONFIG_MAPPING:
        unknown = f"this version of transformers does not know the type {model_type!r} in config.json"
        raise BadInput(f"model {model.name!r}: {unknown}")
    safely = {"use_safetensors": True, "local_files_only": True, "trust_remote_code": False}
    torch_device = pick_device(device)
    with silence_transformers():
        loaded = auto_class.from_pretrained(folder, **safely, **_placement(dtype, torch_device, nf4), **options)
    use_frequencies_of_each_row(loaded)
    return loaded if nf4 else loaded.to(torch_device)


def _placement(dtype: str, device: torch.device, nf4: bool) -> dict[str, Any]:
    """Options of `from_pretrained` that say where weights are read to, and as what."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    from cai.models.quantised import nf4_config

    torch_dtype = pick_dtype(dtype, device)
    options: dict[str, Any] = {"dtype": torch_dtype}
    if nf4:
        options["quantization_config"] = nf4_config(torch_dtype)
    if not is_deepspeed_zero3_enabled():  # which partitions weights while they are read
        options["device_map"] = {"": device}  # else they would all be read into the machine's memory first
    return options


@contextlib.contextmanager
def silence_transformers() -> Iterator[None]:
    """Within the block transformers shows no progress bars and no report on a head that is new on purpose."""
    from transformers.utils import logging

    verbosity, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_bars:
            logging.enable_progress_bar()


def _free_token(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """A special token that the tokenizer's texts do not use, for padding; None where there is none."""
    used = {tokenizer.eos_token, tokenizer.bos_token}
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    pads = [token for token in _PAD_TOKENS if token in special]
    reserved = [token for token in special if "reserved" in token or "unused" in token]
    spare = [token for token in ("<|endoftext|>", "<unk>", "[UNK]") if token in special]
    return next((token for token in pads + reserved + spare if token not in used and token not in template), None)


def _fit_to_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Grows the embeddings where a pad token was added, and sets the model's pad token."""
    n_rows = model.get_input_embeddings().num_embeddings  # the weight itself may be partitioned (ZeRO-3)
    if len(tokenizer) > n_rows:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8, mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:  # the mean of all rows: random new rows would differ from load to load
                with _gathered(layer.weight):
                    layer.weight.data[n_rows:] = layer.weight.data[:n_rows].mean(dim=0)
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def _gathered(weight: torch.Tensor) -> AbstractContextManager[object]:
    """Gathers a weight that ZeRO-3 has partitioned for the block, and partitions it again."""
    if not hasattr(weight, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight], modifier_rank=0)  # type: ignore[no-any-return]
