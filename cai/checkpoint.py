"""Models on disk: which one a name means, what identifies its weights, how it is loaded and saved.

A model is a folder in Hugging Face's layout, or a hub id that the local cache holds. An adapter's folder counts as a
model: its base is loaded first and the adapter is merged into it. Only safetensors are read, no code from a folder is
run, and the network is used by `fetch` alone. Importing this module does not import torch.

Every tokenizer leaves here with a pad token that is not the end of a text: a trainer masks padding, so with pad = eos a
model never learns to stop. A token that the tokenizer already reserves is used; else one is added and the embeddings
grow.

Left out: quantised loading, remote code, pickled weights.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cai.errors import BadInput
from cai.profile import SERVED
from cai.records import stable_id

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MICRO = Path(__file__).parent / "micro" / "weights"
"""The embedded model."""

FACTS = "cai.json"
ADAPTER = "adapter_config.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_IDENTIFYING = ("config.json", "generation_config.json", ADAPTER, "chat_template.jinja", "special_tokens_map.json",
                "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt")  # fmt: skip
_BIG = 64_000_000
"""Bytes from which a file's digest is remembered on disk."""
_PADS = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|vision_pad|>", "<|fim_pad|>")
ADDED_PAD = "<|pad|>"


@dataclass(frozen=True)
class Model:
    """One model as a recipe names it. `path` is an absolute folder or a hub id; `chat_template` is Jinja text."""

    name: str
    path: str
    templates: str = "default"
    chat_template: str | None = None

    @property
    def served(self) -> bool:
        """Whether the model is known by its name at a server alone: no weights, no tokenizer."""
        return self.path.startswith(SERVED)


def resolve(name: str, *, templates: str = "auto", chat_template: str | None = None, folder: Path) -> Model:
    """The model that `name` means: `micro`, `served:NAME`, a path relative to `folder` or the working directory, or a
    hub id.

    `templates` "auto" takes the set that is recorded with the model, else with its base, else `default`.
    `chat_template` is a file's name or Jinja text. Raises BadInput for a path without a usable model. A hub id is not
    looked up here; `fetch` and `identity` do.
    """
    if name == "micro":
        if not (MICRO / "config.json").is_file():
            raise BadInput(f"the embedded model is missing at {MICRO}: run `cai micro pretrain` to make it")
        path = str(MICRO)
    elif name.startswith(SERVED):
        if not name.removeprefix(SERVED).strip():
            raise BadInput(
                f"found {name!r}, expected a model's name at the server behind it, as in served:llama-3.3-70b"
            )
        path = name
    else:
        path = _path_of(name, folder)
    text = None if chat_template is None else _template_text(chat_template, folder)
    return Model(name, path, _recorded_templates(path) if templates == "auto" else templates, text)


def fetch(model: Model, *, offline: bool = True) -> Path:
    """The model's folder; of a hub id the cached snapshot, downloaded first where `offline` is False."""
    if model.served:
        raise BadInput(
            f"model {model.name!r} is known by its name at a server alone, and its files are needed here: name a "
            f"folder or a hub id"
        )
    folder = Path(model.path)
    if folder.is_absolute():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        snapshot = snapshot_download(model.path, allow_patterns=patterns, local_files_only=offline)
    except LocalEntryNotFoundError:
        raise BadInput(
            f"model {model.name!r} is neither a folder here nor in the Hugging Face cache: give the path of a folder, "
            f"or set `offline: false` in the profile to download it"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise BadInput(f"model {model.name!r} could not be downloaded: {str(error).splitlines()[0]}") from None
    _check_folder(Path(snapshot), model.name)
    return Path(snapshot)


def identity(model: Model, *, offline: bool = True) -> str:
    """What tells this model's weights, tokenizer and chat template from any other's: a digest, or `id@revision`.

    Of a model that only a server has it is the name: whether the server still means the same by it cannot be told.
    """
    if model.served:
        return model.path
    folder = fetch(model, offline=offline)
    parts: list[str] = [model.chat_template or ""]
    if not Path(model.path).is_absolute():
        parts.append(f"{model.path}@{folder.name}")
    else:
        files = [path for path in sorted(folder.iterdir()) if path.suffix == ".safetensors" or path.suffix == ".model"
                 or path.name.startswith("tokenizer") or path.name in _IDENTIFYING]  # fmt: skip
        parts += [f"{path.name}:{_file_digest(path)}" for path in files]
    if base := _base_of(model, folder):
        parts.append(identity(base, offline=offline))
    return parts[1] if len(parts) == 2 and not parts[0] and "@" in parts[1] else stable_id(*parts)


def base_of(model: Model) -> Model | None:
    """What the model is an adapter of; None for a whole model."""
    return _base_of(model, fetch(model))


def settings(model: Model, name: str) -> dict[str, Any]:
    """The object in the JSON file `name` of the model's folder, or of its base's; empty where neither has one."""
    folder = fetch(model)
    base = None if (folder / name).is_file() else _base_of(model, folder)
    return _json(folder / name) if base is None else settings(base, name)


def head(model: Model) -> Literal["language", "score"] | None:
    """What a model on this machine has above its last layer: a vocabulary or a score. None where it does not say."""
    folder = Path(model.path)
    kinds = {"CAUSAL_LM": "language", "SEQ_CLS": "score"}
    if (folder / ADAPTER).is_file():
        return kinds.get(str(_json(folder / ADAPTER).get("task_type")))  # type: ignore[return-value]
    for name in _json(folder / "config.json").get("architectures") or []:
        if str(name).endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
            return "language"
        if str(name).endswith("ForSequenceClassification"):
            return "score"
    return None


@contextlib.contextmanager
def whole() -> Iterator[None]:
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


def save_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    start: Model,
    facts: Mapping[str, object],
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes what `resolve` and the loaders read: weights or an adapter, tokenizer with template, card, `cai.json`.

    `start` is the model that training began from; `facts` (stage, recipe, constitution …) go to `cai.json` and the
    card.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _quietly():
        model.save_pretrained(folder, state_dict=state_dict)
    tokenizer.save_pretrained(folder)
    if (folder / ADAPTER).is_file():
        # Absolute for PEFT's own loaders; `cai.json` has the way there should both folders move together.
        config = _json(folder / ADAPTER)
        config["base_model_name_or_path"] = start.path
        (folder / ADAPTER).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    base = start.path
    if start.name == "micro":
        base = "micro"
    elif Path(start.path).is_absolute():
        base = os.path.relpath(start.path, folder.resolve())
    packages = ("torch", "transformers", "trl", "peft")
    written = {
        **facts,
        "base": base,
        "templates": start.templates,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    (folder / FACTS).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(start, facts, adapter=(folder / ADAPTER).is_file()), encoding="utf-8")


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


def _path_of(name: str, folder: Path) -> str:
    given = Path(name).expanduser()
    for path in (folder / given, Path.cwd() / given):
        if path.is_dir():
            _check_folder(path, name)
            return str(path.resolve())
        if path.is_file():
            raise BadInput(f"model {name!r} is a file, expected a folder with config.json and safetensors")
    if _HUB_ID.fullmatch(name) is None:
        raise BadInput(f"model {name!r}: no such folder, neither in {folder} nor in the working directory")
    return name


def _check_folder(folder: Path, name: str) -> None:
    if not (folder / "config.json").is_file() and not (folder / ADAPTER).is_file():
        raise BadInput(f"model {name!r}: {folder} has no config.json, expected a model folder in Hugging Face's layout")
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise BadInput(
            f"model {name!r}: {folder} has pickled weights only, which can run code when loaded: convert them to "
            f"safetensors first"
        )
    raise BadInput(f"model {name!r}: {folder} has no weights, expected .safetensors files")


def _template_text(given: str, folder: Path) -> str:
    if "{{" in given or "{%" in given:
        return given
    for path in (folder / given, Path.cwd() / given):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise BadInput(f"chat_template {given!r} is neither a file nor a Jinja template")


def _set_template(model: Model) -> str | None:
    from cai.templates import load_templates

    return load_templates(model.templates).chat_template


def _recorded_templates(path: str) -> str:
    folder: Path | None = Path(path)
    for _ in range(8):  # adapters upon adapters end somewhere
        if folder is None or not folder.is_dir():
            break
        if recorded := _json(folder / FACTS).get("templates"):
            return str(recorded)
        base = _base_of(Model(path, path), folder)
        folder = Path(base.path) if base is not None else None
    return "default"


def _base_of(model: Model, folder: Path) -> Model | None:
    """What an adapter's folder is an adapter of, or None for a folder with a whole model."""
    if not (folder / ADAPTER).is_file():
        return None
    name = str(_json(folder / ADAPTER).get("base_model_name_or_path") or "")
    moved = str(_json(folder / FACTS).get("base") or "")
    places = ([folder / name, Path(name)] if name else []) + ([folder / moved] if moved else [])
    for place in places:
        if (place / "config.json").is_file() or ((place / ADAPTER).is_file() and not place.samefile(folder)):
            return Model(name, str(place.resolve()), model.templates, model.chat_template)
    if moved == "micro" and MICRO.is_dir():
        return Model("micro", str(MICRO), model.templates, model.chat_template)
    if _HUB_ID.fullmatch(name):
        return Model(name, name, model.templates, model.chat_template)
    raise BadInput(f"model {model.name!r}: the base of the adapter in {folder} is not at {name!r}")


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


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is none."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: expected an object, found {type(value).__name__}")
    return value


def _file_digest(path: Path) -> str:
    state = path.stat()
    return _digest_at(str(path.resolve()), state.st_size, state.st_mtime_ns)


@functools.cache
def _digest_at(path: str, size: int, mtime: int) -> str:
    """SHA-256 of a file; of a big one remembered between processes, as hashing 100 GB takes minutes."""
    if size < _BIG:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cai" / "digests"
    note = home / stable_id(path, size, mtime)
    if note.is_file():
        return note.read_text(encoding="utf-8")
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    home.mkdir(parents=True, exist_ok=True)
    partial = note.with_name(f"{note.name}.{os.getpid()}")
    partial.write_text(digest, encoding="utf-8")
    partial.replace(note)
    return digest


def _card(start: Model, facts: Mapping[str, object], *, adapter: bool) -> str:
    rows = "".join(f"| {key} | {value} |\n" for key, value in facts.items() if isinstance(value, str | int | float))
    base = f"base_model: {start.path}\n" if not Path(start.path).is_absolute() else ""
    return (
        f"---\nlibrary_name: {'peft' if adapter else 'transformers'}\n{base}tags: [constitutional-ai, rlaif]\n---\n\n"
        f"# {facts.get('stage', 'checkpoint')}, trained from {start.name}\n\n"
        f"Made by `cai`, a Constitutional AI / RLAIF framework. What it was made with is in `{FACTS}`.\n\n"
        f"| | |\n|---|---|\n| started from | {start.name} |\n{rows}"
    )
