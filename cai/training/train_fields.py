"""What may stand under `train:`: the fields of the trainer's own config class.

A recipe is checked in milliseconds and importing TRL takes seconds, so `train_fields.json` lists each class's fields
with their types (`cai.training.generate_train_fields` writes it from the locked libraries). Fields that say *where* a
recipe runs belong to the profile, others are set by `cai`; both are refused with a pointer. A value is checked where
its field has a plain type.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from cai.document import Document, Problems, error_at
from cai.text.errors import did_you_mean
from cai.text.formatting import Key, describe

DATA_FILE = Path(__file__).with_name("train_fields.json")
BASE_CLASS = "transformers.training_args:TrainingArguments"
"""The class that every config class inherits from."""

PROFILE = "belongs to the profile, which says where a recipe runs (--on)"
STAGE = "is set by the stage itself"
WHERE = {
    "per_device_eval_batch_size": "is the profile's micro_batch (--on)",
    "gradient_checkpointing": "is the profile's gradient_checkpointing (--on)",
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"),
                    "is derived from the stage's batch_size and the profile's micro_batch"),
    **dict.fromkeys(("bf16", "fp16"), "is the profile's dtype (--on)"),
    **dict.fromkeys(("use_cpu", "no_cuda"), "is the profile's device (--on)"),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"), "belongs to the profile's accelerate file (--on)"),
    **dict.fromkeys(
        (
            "tf32", "bf16_full_eval", "fp16_full_eval", "gradient_checkpointing_kwargs", "activation_checkpointing",
            "activation_checkpointing_kwargs", "activation_offloading", "torch_compile", "torch_compile_backend",
            "torch_compile_mode", "auto_find_batch_size", "local_rank", "accelerator_config", "parallelism_config",
            "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
            "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataset_num_proc",
            "eval_accumulation_steps", "eval_use_gather_object", "torch_empty_cache_steps", "use_liger_kernel",
            "liger_kernel_config", "precompute_ref_batch_size", "skip_memory_metrics", "save_on_each_node",
            "log_on_each_node",
        ),
        PROFILE,
    ),
}  # fmt: skip
"""Fields that say where a recipe runs, and what decides them instead."""

OWNED = {
    "output_dir": "is the stage's folder",
    "report_to": "is set on the command line (--report-to)",
    "seed": "is the recipe's seed",
    "data_seed": "is the recipe's seed",
    "max_length": "stands in the stage itself, not under train",
    **dict.fromkeys(("run_name", "project"), "is the name of the recipe and the stage"),
    **dict.fromkeys(("pad_token", "eos_token", "chat_template_path"), "is the model's own; see chat_template:"),
    **dict.fromkeys(
        (
            "truncation_mode", "model_init_kwargs", "dataset_text_field", "dataset_kwargs", "remove_unused_columns",
            "label_names", "length_column_name", "completion_only_loss", "assistant_only_loss", "do_train", "do_eval",
            "do_predict", "resume_from_checkpoint", "ignore_data_skip", "disable_tqdm", "log_level",
            "log_level_replica", "load_best_model_at_end", "save_only_model", "debug", "enable_jit_checkpoint",
            "restore_callback_states_from_checkpoint", "full_determinism",
        ),
        STAGE,
    ),
}  # fmt: skip
"""Fields that `cai` sets, and from what."""

REFUSED = {
    "trust_remote_code": "is never on: code that comes with a model is not run",
    **dict.fromkeys(("push_to_hub", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
                    "is left out: a run publishes nothing"),
}  # fmt: skip

_MICRO_BATCH = "is the profile's micro_batch here (--on)"
_OF_REINFORCEMENT = {
    **dict.fromkeys(
        ("response_length", "max_completion_length", "max_response_length", "generate_max_len"),
        "is `max_new_tokens` of the stage here",
    ),
    **dict.fromkeys(("mini_batch_size", "ppo_mini_batch_size", "train_batch_size"),
                    "is `batch_size` of the stage here"),
    **dict.fromkeys(("stop_token", "stop_token_id"), "is the model's own end of turn here"),
    **dict.fromkeys(("reward_model", "reward_model_path", "reward_funcs"), "is named in `rewards` of the stage here"),
    **dict.fromkeys(("sft_model_path", "model_name_or_path", "actor_model_path"), "is `model` of the stage here"),
    **dict.fromkeys(
        (
            "local_rollout_forward_batch_size", "micro_rollout_batch_size", "micro_train_batch_size",
            "ppo_micro_batch_size", "forward_batch_size",
        ),
        _MICRO_BATCH,
    ),
}  # fmt: skip
ELSEWHERE = {
    "cai.training.rl.ppo_config:PPOConfig": {
        **_OF_REINFORCEMENT,
        **dict.fromkeys(("total_episodes", "num_episodes"), "is `rollouts` times `rollout_size` of the stage here"),
        **dict.fromkeys(("num_rollouts", "num_train_epochs", "max_steps", "steps"),
                        "is `rollouts` of the stage here"),
        **dict.fromkeys(("rollout_batch_size", "ppo_batch_size"), "is `rollout_size` of the stage here"),
        **dict.fromkeys(("num_mini_batches", "num_minibatches"),
                        "is `rollout_size` divided by `batch_size` of the stage here"),
        **dict.fromkeys(("init_kl_coef", "kl_coefficient", "kl_coeff", "beta"),
                        "is `kl_coef` under `train` here"),
        **dict.fromkeys(("target", "adap_kl_ctrl"), "is `kl_target` under `train` here"),
        "horizon": "is `kl_horizon` under `train` here",
        "target_kl": "is `limits: {kl: ...}` of the stage here",
        **dict.fromkeys(("ppo_epochs", "num_iterations", "n_epochs"), "is `num_ppo_epochs` under `train` here"),
        **dict.fromkeys(("eps_clip", "clip_ratio", "clip_range", "clip_coef", "epsilon"),
                        "is `cliprange` under `train` here"),
        **dict.fromkeys(("value_clip", "clip_range_vf", "clip_value"), "is `cliprange_value` under `train` here"),
        **dict.fromkeys(("value_coef", "value_loss_coef", "vf_loss_coef"), "is `vf_coef` under `train` here"),
        **dict.fromkeys(("gae_lambda", "lambd", "lmbda"), "is `lam` under `train` here"),
        **dict.fromkeys(("value_model", "value_model_path", "critic_model_path"), "is `critic` of the stage here"),
    },
    "trl.trainer.rloo_config:RLOOConfig": {
        **_OF_REINFORCEMENT,
        **dict.fromkeys(("num_generations", "rloo_k", "n_samples_per_prompt"), "is `n` of the stage here"),
        **dict.fromkeys(("total_episodes", "num_episodes"),
                        "is `max_steps` under `train` times `batch_size` of the stage here"),
        **dict.fromkeys(("kl_coef", "init_kl_coef", "kl_coefficient"), "is `beta` under `train` here"),
        **dict.fromkeys(("cliprange", "clip_range", "eps_clip"), "is `epsilon` under `train` here"),
        **dict.fromkeys(("num_ppo_epochs", "ppo_epochs"), "is `num_iterations` under `train` here"),
    },
}  # fmt: skip
"""What other implementations of PPO and RLOO call things (TRL in its versions, OpenRLHF, verl, trlX), and what says it
here, by config class."""


@dataclass(frozen=True)
class Range:
    """Which numbers a field may hold: from `least` on, or above it with `is_open`, and below `limit`."""

    least: float = 0.0
    is_open: bool = False
    limit: float = math.inf

    def __contains__(self, value: float) -> bool:
        return (value > self.least if self.is_open else value >= self.least) and value < self.limit

    def __str__(self) -> str:
        start = f"above {self.least:g}" if self.is_open else f"of at least {self.least:g}"
        return start if self.limit == math.inf else f"{start} and below {self.limit:g}"


POSITIVE = Range(is_open=True)
RANGES = {
    **dict.fromkeys(("num_train_epochs", "learning_rate", "adam_epsilon", "logging_steps", "save_steps"), POSITIVE),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "warmup_steps", "beta", "epsilon"), Range()),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), Range(limit=1.0)),
    "num_iterations": Range(1.0),
}
"""Numbers outside of which a field trains nothing, trains away from its goal, or ends the trainer with an error."""
RANGES_OF_CLASS = {"DPOConfig": {"beta": POSITIVE}}
"""Those of one config class: RLOO without `beta` has no KL penalty, and DPO without it no loss."""

TYPES: dict[str, type] = {
    "str": str, "bool": bool, "int": int, "float": float, "dict": dict, "list": list, "null": type(None),
}  # fmt: skip
TYPE_WORDS = {
    str: "text", bool: "true or false", int: "a whole number", float: "a number", type(None): "nothing",
    dict: "a mapping", list: "a list",
}  # fmt: skip
UNCHECKED = "unchecked"
"""In the file: a type that is not plain enough to check a value against."""


@dataclass(frozen=True)
class Field:
    """One field of a config class. `types` is None where its type is not plain, `values` where any text is allowed."""

    types: tuple[type, ...] | None
    values: tuple[str, ...] | None


@functools.cache
def fields(train_class: str) -> dict[str, Field]:
    """Every field of the config class `module:Class` by name, inherited ones included."""
    classes = json.loads(DATA_FILE.read_text(encoding="utf-8"))
    return {**_declared_fields(classes[BASE_CLASS]), **_declared_fields(classes[train_class])}


def _declared_fields(declared: dict[str, dict[str, list[str]]]) -> dict[str, Field]:
    return {
        name: Field(
            None if type_names == UNCHECKED else tuple(TYPES[type_name] for type_name in type_names.split("|")),
            tuple(declared["values"][name]) if name in declared["values"] else None,
        )
        for type_names, names in declared["fields"].items()
        for name in names
    }


def names_elsewhere(train_class: str, owned: tuple[str, ...] = ()) -> dict[str, str]:
    """What to say about keys of a stage itself that stand elsewhere: under `train:`, in the profile, or by our name."""
    under_train = dict.fromkeys(fields(train_class), "stands under `train:`")
    return under_train | WHERE | OWNED | REFUSED | dict.fromkeys(owned, STAGE) | ELSEWHERE.get(train_class, {})


def check_train(
    document: Document,
    keys: tuple[Key, ...],
    train_class: str,
    owned: tuple[str, ...] = (),
    stage_fields: Set[str] = frozenset(),
) -> None:
    """Raises BadInput for what the mapping at `keys` may not hold.

    `owned` are fields that this kind of stage sets, `stage_fields` are those of the stage itself.
    """
    of_stage = dict.fromkeys(stage_fields - fields(train_class).keys(), "stands in the stage itself, not under train")
    refused = WHERE | OWNED | REFUSED | dict.fromkeys(owned, STAGE) | of_stage | ELSEWHERE.get(train_class, {})
    node = document.node(keys[:-1]).children.get(keys[-1])
    problems = Problems()
    for key, value in node.value.items() if node is not None and isinstance(node.value, dict) else ():
        with problems.collect():
            _check_field(document, (*keys, key), value, train_class, refused)
    problems.raise_if_any()


def _check_field(
    document: Document, position: tuple[Key, ...], value: object, train_class: str, refused: Mapping[str, str]
) -> None:
    """Refuses a field that the recipe may not set, and a value of another type than the field's."""
    allowed_fields = fields(train_class)
    class_name = train_class.rpartition(":")[2]
    key = str(position[-1])
    if key in refused or key.startswith(("ddp_", "hub_")):
        raise error_at(document, position, f"{key} {refused.get(key, PROFILE)}", key=True)
    if key not in allowed_fields:
        suggestion = did_you_mean(key, [name for name in allowed_fields if name not in refused])
        raise error_at(document, position, f"unknown key, expected a field of {class_name}{suggestion}", key=True)
    _check_value(document, position, value, allowed_fields[key], class_name)
    if key == "save_total_limit" and value is not None and value < 2:  # type: ignore[operator]
        reason = "the last complete resume point is removed before the next one is complete otherwise"
        raise error_at(document, position, f"found {value}, expected at least 2: {reason}")


def _check_value(document: Document, position: tuple[Key, ...], value: object, field: Field, class_name: str) -> None:
    if field.types is None:
        return
    # Compared exactly, since bool is a subclass of int; a whole number is allowed where a float is.
    has_type = type(value) in field.types or (type(value) is int and float in field.types)
    if not has_type:
        expected = " or ".join(TYPE_WORDS[plain_type] for plain_type in field.types)
        raise error_at(document, position, f"found {describe(value)}, expected {expected}, as in {class_name}")
    name = str(position[-1])
    number_range = RANGES_OF_CLASS.get(class_name, {}).get(name) or RANGES.get(name)
    if number_range is not None and isinstance(value, int | float) and value not in number_range:
        raise error_at(document, position, f"found {value}, expected a number {number_range}")
    if name == "max_steps" and isinstance(value, int) and value < 1 and value != -1:
        expected = "a number of steps above 0, or -1 for as many as `num_train_epochs` takes"
        raise error_at(document, position, f"found {value}, expected {expected}")
    if field.values is not None and isinstance(value, str) and value not in field.values:
        suggestion = did_you_mean(value, field.values)
        raise error_at(document, position, f"found {value!r}, expected one of {', '.join(field.values)}{suggestion}")
