"""What a model's files say before it is loaded: whether it writes or scores, and whether its files are whole.

Read from config.json, the tokenizer's files and the headers of safetensors, so that a model that cannot do what it is
named for is refused before anything runs. Importing this module does not import torch. Left out: whether the shapes of
the weights are those of the config.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from cai.contracts.model import Model
from cai.models.reference import ADAPTER, base_of, download, fetch, read_json_object, resolve, trained_models
from cai.text.errors import BadInput, did_you_mean

Role = Literal["language", "score"]
"""What a model is named for: to write and judge, with a vocabulary as its head, or to score, with one number."""
NOUNS: dict[Role, str] = {
    "language": "a language model, which writes",
    "score": "a sequence classifier, which gives a score",
}
_LANGUAGE_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "WithLMHead", "BertGenerationDecoder")
_TASK_TYPES: dict[str, Role] = {"CAUSAL_LM": "language", "SEQ_CLS": "score"}
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "vocab-*", "*.vocab", "*.tiktoken", "tekken.json", "*.spm")
"""Files that a tokenizer's vocabulary lies in, as patterns."""
_WEIGHTS, _INDEX, _ADAPTER_WEIGHTS = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
_MAX_ADAPTERS = 16
_MAX_HEADER = 100_000_000
"""Bytes; the safetensors library reads no longer header."""


def resolve_for(
    role: Role, name: str, *, folder: Path, runs: Path, templates: str = "auto", offline: bool = True,
    weights: bool = True,
) -> Model:  # fmt: skip
    """The model that a command names for `role`, found as `resolve` does and looked at as `check_model` does."""
    model = resolve(name, templates=templates, folder=folder, runs=runs)
    check_model(model, role, runs=runs, offline=offline, weights=weights)
    return model


def check_model(model: Model, role: Role | None, *, runs: Path, offline: bool = True, weights: bool = True) -> None:
    """Raises BadInput where the model is not to be had, cannot do what it is named for, or is not whole.

    Nothing is known of a model that a server has, and nothing is checked. Where `offline` is False, a hub id is
    downloaded first, and so is the base of an adapter. Without `weights` they are not looked at.
    """
    if model.served:
        return
    try:
        if not offline:
            download(model)
        fetch(model)
    except BadInput as error:
        raise BadInput(f"{error}{did_you_mean(model.name, ['micro', *trained_models(runs)])}") from None
    try:
        check_role(model, role)
        check_files(model, weights=weights)
    except OSError as error:
        raise BadInput(f"model {model.name!r}: {error.filename} cannot be read: {error.strerror}") from None


def check_role(model: Model, role: Role | None) -> None:
    """Raises BadInput where the model's config says that it cannot do what it is named for. Its weights are not read.

    Both roles are right where `role` is None, as for what a reward model starts from. A config without `architectures`,
    or an adapter's without `task_type`, says nothing, and nothing is refused.
    """
    folder = fetch(model)
    if (folder / ADAPTER).is_file():
        task_type = read_json_object(folder / ADAPTER).get("task_type")
        if task_type is not None:
            _require(model, role, [_TASK_TYPES.get(str(task_type))], f"an adapter of the type {task_type}")
        return
    config = read_json_object(folder / "config.json")
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        return
    roles = [_role_of(str(name)) for name in architectures]
    _require(model, role, roles, f"a {architectures[0]}")
    if role == "language" and config.get("is_encoder_decoder"):
        raise BadInput(f"model {model.name!r} has an encoder, expected {NOUNS[role]}: a decoder alone")
    labels = config.get("id2label")
    n_labels = len(labels) if isinstance(labels, dict) and labels else 2  # transformers' default
    if "score" in roles and n_labels != 1:
        raise BadInput(f"model {model.name!r} tells {n_labels} labels apart, expected a reward model: one score")


def _require(model: Model, role: Role | None, found_roles: list[Role | None], noun: str) -> None:
    """Raises BadInput where `role` is none of the model's; `noun` says what a model without a role is."""
    if role is not None and role not in found_roles:
        noun = next((NOUNS[found_role] for found_role in found_roles if found_role is not None), noun)
        raise BadInput(f"{model.name!r} is {noun}, expected {NOUNS[role]}")


def check_files(model: Model, *, weights: bool = True) -> None:
    """Raises BadInput where a file of the model, or of the base of an adapter, is missing, broken or cut off.

    Without `weights` they are not looked at, for a model that answers at a server.
    """
    _check_tokenizer(model, tokenizer_folder(model))
    for part, folder in _adapters_and_base(model):
        is_adapter = (folder / ADAPTER).is_file()
        if not is_adapter:
            _check_config(part, folder)
        if weights:
            _check_weights(part, folder, _ADAPTER_WEIGHTS if is_adapter else _WEIGHTS)


def tokenizer_folder(model: Model) -> Path:
    """The folder of the model's tokenizer, its own or that of an adapter's base. Raises BadInput where none has one."""
    for _, folder in _adapters_and_base(model):
        if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
            return folder
    raise BadInput(f"model {model.name!r} has no tokenizer in {fetch(model)}, expected tokenizer.json")


def _adapters_and_base(model: Model) -> Iterator[tuple[Model, Path]]:
    """The model and its folder; of an adapter also those of its base, which may be an adapter too."""
    part: Model | None = model
    for _ in range(_MAX_ADAPTERS):
        if part is None:
            return
        folder = fetch(part)
        yield part, folder
        part = base_of(part, folder)
    raise BadInput(f"model {model.name!r} is an adapter of more than {_MAX_ADAPTERS} others, or of itself")


def _role_of(architecture: str) -> Role | None:
    if architecture.endswith("ForSequenceClassification"):
        return "score"
    return "language" if any(head in architecture for head in _LANGUAGE_HEADS) else None


def _check_config(model: Model, folder: Path) -> None:
    file = folder / "config.json"
    model_type = read_json_object(file).get("model_type")
    if not isinstance(model_type, str):
        raise BadInput(f"model {model.name!r}: {file} has no `model_type`, expected the config of a model")
    if _is_known_type(model_type) is False:
        unknown = f"this version of transformers does not know the type {model_type!r} in config.json"
        raise BadInput(f"model {model.name!r}: {unknown}")


@functools.cache
def _is_known_type(model_type: str) -> bool | None:
    """Whether the installed transformers knows a type of models; None where its table is not where it is expected.

    The table is read as text, because importing it (transformers 5.0) imports torch, which takes seconds.
    """
    spec = importlib.util.find_spec("transformers")
    for place in (spec.submodule_search_locations if spec is not None else None) or []:
        files = [Path(place) / "models" / "auto" / name for name in ("auto_mappings.py", "configuration_auto.py")]
        if all(file.is_file() for file in files):
            return any(f'"{model_type}"' in file.read_text(encoding="utf-8") for file in files)
    return None


def _check_tokenizer(model: Model, folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        read_json_object(folder / name)
    if not any(next(folder.glob(pattern), None) for pattern in _VOCABULARIES):
        absent = f"{folder} has a tokenizer_config.json and no vocabulary beside it"
        raise BadInput(f"model {model.name!r}: {absent}, expected tokenizer.json")


def _check_weights(model: Model, folder: Path, name: str) -> None:
    files = [folder / name]
    if name == _WEIGHTS and not files[0].is_file():
        shards = read_json_object(folder / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise BadInput(f"model {model.name!r}: {folder} has no {_WEIGHTS} and no {_INDEX}, expected one of them")
        files = [folder / str(shard) for shard in dict.fromkeys(shards.values())]
    for file in files:
        if not file.is_file():
            raise BadInput(f"model {model.name!r}: {file} is missing; copy or download the model again")
        _check_safetensors(model, file)


def _check_safetensors(model: Model, file: Path) -> None:
    """Raises BadInput where the file has not as many bytes as its header says.

    The layout: 8 bytes with the length of the header, the header in JSON, and the tensors.
    """
    n_bytes = file.stat().st_size
    with file.open("rb") as content:
        n_header = int.from_bytes(content.read(8), "little")
        header = content.read(min(n_header, n_bytes, _MAX_HEADER))
    again = "copy or download the model again"
    if n_bytes < 8 or not header.startswith(b"{"):
        raise BadInput(f"model {model.name!r}: {file} is no safetensors file; {again}")
    try:
        tensors = {name: tensor for name, tensor in json.loads(header).items() if name != "__metadata__"}
        expected = 8 + n_header + max((int(tensor["data_offsets"][1]) for tensor in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        broken = "ends within its header" if n_bytes < 8 + n_header else "has a header that cannot be read"
        raise BadInput(f"model {model.name!r}: {file} {broken}; {again}") from None
    if n_bytes != expected:
        size = f"found {n_bytes:,} bytes, expected {expected:,}, as its header says"
        raise BadInput(f"model {model.name!r}: {file} is not whole: {size}; {again}")
