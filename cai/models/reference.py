"""Which model a name means, and what identifies its weights.

A model is a folder in Hugging Face's layout, what a stage of a run trained last (RUN/STAGE), or a hub id that the local
cache holds. An adapter's folder counts as a model: its base is loaded first and the adapter is merged into it. Only
`fetch` uses the network. Importing this module does not import torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cai.contracts.model import SERVED, Model
from cai.storage import run_folder
from cai.storage.files import user_cache
from cai.storage.rows import stable_id
from cai.storage.stage_folders import stale_note
from cai.text.errors import BadInput, did_you_mean
from cai.text.formatting import shorten

MICRO = Path(__file__).parent.parent / "micro_model" / "weights"
"""The embedded model."""

FACTS = "cai.json"
ADAPTER = "adapter_config.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_IDENTIFYING = ("config.json", "generation_config.json", ADAPTER, "chat_template.jinja", "special_tokens_map.json",
                "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt")  # fmt: skip
RUNS = Path("runs")
"""The folder that runs lie in where a command names no other."""
_BIG = 64_000_000
"""Bytes from which a file's digest is cached on disk."""


def resolve(
    name: str, *, templates: str = "auto", chat_template: str | None = None, folder: Path, runs: Path = RUNS
) -> Model:
    """The model that `name` means: `micro`, `served:NAME`, a path relative to `folder` or the working directory,
    RUN/STAGE of a run in the folder `runs`, or a hub id.

    `templates` "auto" is the set that is recorded with the model, else with its base, else `default`. `chat_template`
    is a file's name or Jinja text. Raises BadInput for a path without a usable model. A hub id is not looked up here
    but by `fetch` and `identity`.
    """
    if name == "micro":
        if not (MICRO / "config.json").is_file():
            raise BadInput(f"the embedded model is missing at {MICRO}: run `cai micro pretrain` to make it")
        path = str(MICRO)
    elif name.startswith(SERVED):
        if not name.removeprefix(SERVED).strip():
            expected = "a model's name at the server behind it, as in served:llama-3.3-70b"
            raise BadInput(f"found {name!r}, expected {expected}")
        path = name
    else:
        try:
            path = _resolve_path(name, folder, runs)
        except OSError as error:  # such as a name that is too long for a file, or a folder that may not be read
            raise BadInput(f"model {shorten(name, 80)!r} cannot be looked for: {error.strerror}") from None
    text = None if chat_template is None else _read_template(chat_template, folder)
    return Model(name, path, _find_recorded_templates(path) if templates == "auto" else templates, text)


def fetch(model: Model, *, offline: bool = True) -> Path:
    """The model's folder; of a hub id the cached snapshot, downloaded first where `offline` is False."""
    if model.served:
        served = f"model {model.name!r} exists only at a server"
        raise BadInput(f"{served}, and its files are needed here: name a folder or a hub id")
    folder = Path(model.path)
    if folder.is_absolute():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        snapshot = snapshot_download(model.path, allow_patterns=patterns, local_files_only=offline)
    except LocalEntryNotFoundError:
        absent = f"model {model.name!r} is neither a folder here nor in the Hugging Face cache"
        if not offline:
            unreachable = "the hub cannot be reached, or HF_HUB_OFFLINE is set"
            raise BadInput(f"{absent}, and could not be downloaded: {unreachable}") from None
        remedy = "give the path of a folder, or download it with `--online` (`offline: false` in the profile)"
        raise BadInput(f"{absent}: {remedy}") from None
    except (HfHubHTTPError, OSError) as error:
        raise BadInput(f"model {model.name!r} could not be downloaded: {str(error).splitlines()[0]}") from None
    _check_folder(Path(snapshot), model.name)
    return Path(snapshot)


def download(model: Model) -> None:
    """Puts a hub id's files, and those of an adapter's base, into the local cache; does nothing for served models."""
    if model.served:
        return
    if base := base_of(model, fetch(model, offline=False)):
        download(base)


def identity(model: Model, *, offline: bool = True) -> str:
    """Identifies the model's weights, tokenizer and chat template: a digest, or `id@revision`.

    A served model is identified by its name; whether the server still means the same weights by it is unknown.
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
        parts += [f"{path.name}:{cached_file_digest(path)}" for path in files]
    if base := base_of(model, folder):
        parts.append(identity(base, offline=offline))
    return parts[1] if len(parts) == 2 and not parts[0] and "@" in parts[1] else stable_id(*parts)


def base_of(model: Model, folder: Path | None = None) -> Model | None:
    """The model that this one is an adapter of, None if it has weights of its own. Raises BadInput if it is missing."""
    folder = folder or fetch(model)
    if not (folder / ADAPTER).is_file():
        return None
    name = str(read_json_object(folder / ADAPTER).get("base_model_name_or_path") or "")
    recorded_base = str(read_json_object(folder / FACTS).get("base") or "")
    candidates = ([folder / name, Path(name)] if name else []) + ([folder / recorded_base] if recorded_base else [])
    for path in candidates:
        if (path / "config.json").is_file() or ((path / ADAPTER).is_file() and not path.samefile(folder)):
            return Model(name, str(path.resolve()), model.templates, model.chat_template)
    if recorded_base == "micro" and MICRO.is_dir():
        return Model("micro", str(MICRO), model.templates, model.chat_template)
    if _HUB_ID.fullmatch(name):
        return Model(name, name, model.templates, model.chat_template)
    raise BadInput(f"model {model.name!r}: the base of the adapter in {folder} is not at {name!r}")


def read_model_json(model: Model, name: str) -> dict[str, Any]:
    """The object in the JSON file `name` of the model's folder, or of its base's; empty where neither has one."""
    folder = fetch(model)
    base = None if (folder / name).is_file() else base_of(model, folder)
    return read_json_object(folder / name) if base is None else read_model_json(base, name)


def find_config(model: Model, *, offline: bool = True) -> dict[str, Any] | None:
    """The object in a model's config.json, or its base's; None where it is not to be had. Weights are not needed."""
    if Path(model.path).is_absolute():
        return read_model_json(model, "config.json") or None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return read_json_object(Path(hf_hub_download(model.path, "config.json", local_files_only=offline)))
    except (EntryNotFoundError, HfHubHTTPError, OSError):
        return None


def trained_models(runs: Path) -> list[str]:
    """RUN/STAGE of every model that stages of the runs in the folder `runs` trained last."""
    names: list[str] = []
    for run in sorted(path.parent for path in runs.glob(f"*/{run_folder.LATEST}")):
        names += [f"{run.name}/{stage}" for stage in _models_of_run(run)]
    return names


def _models_of_run(run: Path) -> dict[str, Path]:
    """The folder of the model that each stage of a run trained last, by the stage's id."""
    models = {stage: folder / run_folder.MODEL for stage, folder in run_folder.latest(run).items()}
    return {stage: folder for stage, folder in models.items() if folder.is_dir()}


def find_run_stage(name: str, runs: Path) -> tuple[Path, str] | None:
    """The run's folder and the stage that RUN/STAGE means, RUN a name in `runs` or a path; None for other names."""
    run_name, _, stage = name.rpartition("/")
    for run in (runs / run_name, Path(run_name)) if run_name else ():
        if (run / run_folder.LATEST).is_file() or (run / run_folder.RUN).is_file():
            return run, stage
    return None


def stale_model_notes(names: Iterable[str], runs: Path) -> list[str]:
    """A sentence about each run of which RUN/STAGE among the models' names is stale, and what computes it again."""
    stages_by_run: dict[Path, list[str]] = {}
    for name in names:
        if stage_place := find_run_stage(name, runs):
            run, stage = stage_place
            stages_by_run.setdefault(run, []).append(stage)
    notes = [stale_note(run, stages) for run, stages in stages_by_run.items()]
    return [note for note in notes if note]


def _trained_model(name: str, runs: Path) -> Path | None:
    """The folder of the model that RUN/STAGE means; None where there is no such run.

    Raises BadInput where the run is there and no stage of that name has trained a model.
    """
    if (stage_place := find_run_stage(name, runs)) is None:
        return None
    run, stage = stage_place
    models = _models_of_run(run)
    if stage in models:
        return models[stage]
    stages = ", ".join(models) or "none yet"
    absent = f"no stage {stage!r} of the run {run} has trained a model, expected one of: {stages}"
    raise BadInput(f"model {name!r}: {absent}{did_you_mean(stage, models)}")


def _resolve_path(name: str, folder: Path, runs: Path) -> str:
    relative_path = Path(name).expanduser()
    for path in (folder / relative_path, Path.cwd() / relative_path):
        if path.is_dir():
            if (path / run_folder.LATEST).is_file():
                models = ", ".join(f"{name}/{stage}" for stage in _models_of_run(path)) or "it has none yet"
                raise BadInput(f"model {name!r} is a run, expected a model that one of its stages trained: {models}")
            _check_folder(path, name)
            return str(path.resolve())
        if path.is_file():
            raise BadInput(f"model {name!r} is a file, expected a folder with config.json and safetensors")
    if (trained := _trained_model(name, runs)) is not None:
        _check_folder(trained, name)
        return str(trained.resolve())
    if _HUB_ID.fullmatch(name) is None:
        absent = f"no such folder, neither in {folder} nor in the working directory"
        raise BadInput(f"model {name!r}: {absent}{did_you_mean(name, trained_models(runs))}")
    return name


def _check_folder(folder: Path, name: str) -> None:
    if not (folder / "config.json").is_file() and not (folder / ADAPTER).is_file():
        raise BadInput(f"model {name!r}: {folder} has no config.json, expected a model folder in Hugging Face's layout")
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        pickled = "pickled weights only, which can run code when loaded: convert them to safetensors first"
        raise BadInput(f"model {name!r}: {folder} has {pickled}")
    raise BadInput(f"model {name!r}: {folder} has no weights, expected .safetensors files")


def _read_template(chat_template: str, folder: Path) -> str:
    if "{{" in chat_template or "{%" in chat_template:
        return chat_template
    for path in (folder / chat_template, Path.cwd() / chat_template):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise BadInput(f"chat_template {chat_template!r} is neither a file nor a Jinja template")


def _find_recorded_templates(path: str) -> str:
    folder: Path | None = Path(path)
    for _ in range(8):  # bounds a chain of adapters that refers to itself
        if folder is None or not folder.is_dir():
            break
        if recorded := read_json_object(folder / FACTS).get("templates"):
            return str(recorded)
        base = base_of(Model(path, path), folder)
        folder = Path(base.path) if base is not None else None
    return "default"


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is none."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path}: not JSON: {error}") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: expected an object, found {type(value).__name__}")
    return value


def cached_file_digest(path: Path) -> str:
    state = path.stat()
    return _digest_at(str(path.resolve()), state.st_size, state.st_mtime_ns)


@functools.cache
def _digest_at(path: str, size: int, mtime: int) -> str:
    """SHA-256 of a file; for a big one cached on disk, since hashing 100 GB takes minutes."""
    if size < _BIG:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    cache = user_cache("digests")
    cached_digest = cache / stable_id(path, size, mtime)
    if cached_digest.is_file():
        return cached_digest.read_text(encoding="utf-8")
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    cache.mkdir(parents=True, exist_ok=True)
    partial = cached_digest.with_name(f"{cached_digest.name}.{os.getpid()}")
    partial.write_text(digest, encoding="utf-8")
    partial.replace(cached_digest)
    return digest
