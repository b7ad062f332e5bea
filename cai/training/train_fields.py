"""What may stand under `train:`: the fields of the library's own config class, read from its source.

Importing trl takes seconds and a recipe is checked in milliseconds, so the class and those it inherits from are read as
text: names, annotations and, where an annotation is an enumeration, its values. A test compares the result with
`dataclasses.fields` of the imported classes. Fields that say *where* belong to the profile, others to `cai` itself;
both are refused with a pointer. Values are checked where the annotation is plain enough to decide.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from cai.document import Document, fail
from cai.text.errors import nearest
from cai.text.formatting import Key, describe

PROFILE = "belongs to the profile, which says where a recipe runs (--on)"
STAGE = "is set by the stage itself"
WHERE = {
    "per_device_train_batch_size": "is derived from the stage's batch_size and the profile's micro_batch",
    "per_device_eval_batch_size": "is the profile's micro_batch (--on)",
    "gradient_accumulation_steps": "is derived from the stage's batch_size and the profile's micro_batch",
    "gradient_checkpointing": "is the profile's gradient_checkpointing (--on)",
    "bf16": "is the profile's dtype (--on)",
    "fp16": "is the profile's dtype (--on)",
    "use_cpu": "is the profile's device (--on)",
    "no_cuda": "is the profile's device (--on)",
    "deepspeed": "belongs to the profile's accelerate file (--on)",
    "fsdp": "belongs to the profile's accelerate file (--on)",
    "fsdp_config": "belongs to the profile's accelerate file (--on)",
    **dict.fromkeys(
        (
            "tf32",
            "bf16_full_eval",
            "fp16_full_eval",
            "gradient_checkpointing_kwargs",
            "activation_checkpointing",
            "activation_checkpointing_kwargs",
            "activation_offloading",
            "torch_compile",
            "torch_compile_backend",
            "torch_compile_mode",
            "auto_find_batch_size",
            "local_rank",
            "accelerator_config",
            "parallelism_config",
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_multiprocessing_context",
            "dataset_num_proc",
            "eval_accumulation_steps",
            "eval_use_gather_object",
            "torch_empty_cache_steps",
            "use_liger_kernel",
            "liger_kernel_config",
            "precompute_ref_batch_size",
            "skip_memory_metrics",
            "save_on_each_node",
            "log_on_each_node",
        ),
        PROFILE,
    ),
}
"""Fields that say where a recipe runs, and what decides them instead."""

OWNED = {
    "output_dir": "is the stage's folder",
    "report_to": "is said on the command line (--report-to)",
    "seed": "is the recipe's seed",
    "data_seed": "is the recipe's seed",
    "max_length": "stands in the stage itself, not under train",
    **dict.fromkeys(("run_name", "project"), "is the name of the recipe and the stage"),
    **dict.fromkeys(("pad_token", "eos_token", "chat_template_path"), "is the model's own; see chat_template:"),
    **dict.fromkeys(
        (
            "truncation_mode",
            "model_init_kwargs",
            "dataset_text_field",
            "dataset_kwargs",
            "remove_unused_columns",
            "label_names",
            "length_column_name",
            "completion_only_loss",
            "assistant_only_loss",
            "do_train",
            "do_eval",
            "do_predict",
            "resume_from_checkpoint",
            "ignore_data_skip",
            "disable_tqdm",
            "log_level",
            "log_level_replica",
            "load_best_model_at_end",
            "save_only_model",
            "debug",
            "enable_jit_checkpoint",
            "restore_callback_states_from_checkpoint",
            "full_determinism",
        ),
        STAGE,
    ),
}
"""Fields that `cai` sets, and from what."""

_REFUSED = {
    "trust_remote_code": "is never on: code that comes with a model is not run",
    **dict.fromkeys(
        ("push_to_hub", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        "is left out: a run publishes nothing",
    ),
}


@dataclass(frozen=True)
class Field:
    """One field of a config class. `types` and `values` are None where the annotation does not decide."""

    types: tuple[type, ...] | None
    values: tuple[str, ...] | None = None


def check_train(document: Document, keys: tuple[Key, ...], train_class: str, owned: tuple[str, ...] = ()) -> None:
    """Refuses what the mapping at `keys` may not hold. `owned` are fields that this kind of stage sets itself."""
    known = fields(train_class)
    refused = WHERE | OWNED | _REFUSED | dict.fromkeys(owned, STAGE)
    name = train_class.rpartition(":")[2]
    for key, value in _mapping(document, keys).items():
        at = (*keys, key)
        if key in refused or key.startswith(("ddp_", "hub_")):
            raise fail(document, at, f"{key} {refused.get(key, PROFILE)}", key=True)
        if key not in known:
            allowed = [each for each in known if each not in refused]
            raise fail(document, at, f"unknown key, expected a field of {name}{nearest(key, allowed)}", key=True)
        _check_value(document, at, value, known[key], name)
        if key == "save_total_limit" and value is not None and value < 2:  # type: ignore[operator]
            raise fail(
                document,
                at,
                f"found {value}, expected at least 2: the last whole checkpoint is removed before "
                "the next one is whole otherwise",
            )


@functools.cache
def fields(train_class: str) -> dict[str, Field]:
    """Every field of `module:Class` by name, inherited ones included, as the installed source says."""
    module, _, name = train_class.partition(":")
    return _class_fields(module, name)


def _mapping(document: Document, keys: tuple[Key, ...]) -> dict[str, object]:
    around = document.node(keys[:-1])
    value = around.children[keys[-1]].value if keys[-1] in around.children else None
    return dict(value) if isinstance(value, dict) else {}


def _check_value(document: Document, at: tuple[Key, ...], value: object, field: Field, name: str) -> None:
    if field.types is None:
        return
    # bool is an int to Python and a whole number is a float to everybody.
    fits = type(value) in field.types or (type(value) is int and float in field.types)
    if not fits:
        words = " or ".join(_WORDS[each] for each in field.types)
        raise fail(document, at, f"found {describe(value)}, expected {words}, as in {name}")
    if field.values is not None and isinstance(value, str) and value not in field.values:
        raise fail(
            document, at, f"found {value!r}, expected one of {', '.join(field.values)}" + nearest(value, field.values)
        )


_WORDS = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "nothing",
    dict: "a mapping",
    list: "a list",
}
_TYPES = {"str": str, "bool": bool, "int": int, "float": float, "dict": dict, "list": list, "Dict": dict, "List": list}


def _class_fields(module: str, name: str) -> dict[str, Field]:
    module, tree = _find(module, name)
    definition = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    found: dict[str, Field] = {}
    for base in reversed(definition.bases):
        if isinstance(base, ast.Name) and base.id != "object":
            found |= _class_fields(_origin(module, tree, base.id), base.id)
    for node in definition.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if "ClassVar" not in ast.dump(node.annotation):
            found[node.target.id] = _field(module, tree, node.annotation)
    return found


def _field(module: str, tree: ast.Module, annotation: ast.expr) -> Field:
    types: list[type] = []
    values: tuple[str, ...] | None = None
    for part in _union(annotation):
        if isinstance(part, ast.Constant) and part.value is None:
            types.append(type(None))
            continue
        name = part.value if isinstance(part, ast.Subscript) else part
        if not isinstance(name, ast.Name):
            return Field(None)
        if name.id in _TYPES:
            types.append(_TYPES[name.id])
        elif name.id == "Literal" and isinstance(part, ast.Subscript):
            written = part.slice.elts if isinstance(part.slice, ast.Tuple) else [part.slice]
            values = tuple(str(each.value) for each in written if isinstance(each, ast.Constant))
            types.append(str)
        elif enumeration := _enumeration(module, tree, name.id):
            values = enumeration
            types.append(str)
        else:
            return Field(None)
    return Field(tuple(dict.fromkeys(types)), values)


def _union(annotation: ast.expr) -> list[ast.expr]:
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return _union(annotation.left) + _union(annotation.right)
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name):
        if annotation.value.id == "Optional":
            return [*_union(annotation.slice), ast.Constant(None)]
        if annotation.value.id == "Union" and isinstance(annotation.slice, ast.Tuple):
            return [part for each in annotation.slice.elts for part in _union(each)]
    return [annotation]


def _enumeration(module: str, tree: ast.Module, name: str) -> tuple[str, ...] | None:
    """The values of an enumeration of texts; None for anything else."""
    try:
        _, tree = _find(_origin(module, tree, name), name)
    except LookupError:
        return None
    definition = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    if not any("Enum" in ast.dump(base) for base in definition.bases):
        return None
    values = [node.value for node in definition.body if isinstance(node, ast.Assign)]
    texts = [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    return tuple(texts) if len(texts) == len(values) else None


def _find(module: str, name: str) -> tuple[str, ast.Module]:
    """The module that defines the class `name`, starting from one that may only import it."""
    for _ in range(8):
        tree = _parse(module)
        if any(isinstance(node, ast.ClassDef) and node.name == name for node in tree.body):
            return module, tree
        module = _origin(module, tree, name)
    raise LookupError(f"{name} is not defined in {module}")


def _origin(module: str, tree: ast.Module, name: str) -> str:
    """The module from which `name` comes into `module`: itself where it is defined there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module
        if isinstance(node, ast.ImportFrom) and any((each.asname or each.name) == name for each in node.names):
            if not node.level:
                return node.module or ""
            package = module.split(".") if _file(module).name == "__init__.py" else module.split(".")[:-1]
            return ".".join(package[: len(package) - node.level + 1] + ([node.module] if node.module else []))
    raise LookupError(f"{name} is neither defined nor imported in {module}")


@functools.cache
def _parse(module: str) -> ast.Module:
    path = _file(module)
    if not path.is_file():
        raise LookupError(f"{module} has no source")
    return ast.parse(path.read_text(encoding="utf-8"))


def _file(module: str) -> Path:
    """Where a module's source lies, without importing it or a package around it."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        raise LookupError(f"{top} is not installed")
    path = Path(spec.origin).parent.joinpath(*rest)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
