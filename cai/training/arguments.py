"""What a trainer is started with: its config, the starting model, an adapter, and libraries that report errors only."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import set_seed

from cai.attention.token_trees import dropouts
from cai.contracts.context import Context
from cai.contracts.training_config import LoRA, TrainingConfig
from cai.storage.rows import stable_seed
from cai.text.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from cai.contracts.model import Model

from cai.models import loading, reference

CHECKPOINTS = "checkpoints"
"""Folder of a training stage's checkpoints, in the stage's own."""


def arguments(config: TrainingConfig, context: Context, **more: Any) -> TrainingArguments:
    """The library's config: `train:` for what is learned, the profile for where, and what a stage needs for itself."""
    assert config.train_class is not None
    module, _, name = config.train_class.partition(":")
    profile = context.profile
    device = loading.pick_device(profile.device)
    micro_batch, accumulation = profile.accumulation(config.batch_size)
    seed = seed_of(context)
    where = {
        "per_device_train_batch_size": micro_batch,
        "per_device_eval_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_checkpointing": profile.gradient_checkpointing,
        "bf16": loading.pick_dtype(profile.dtype, device) == torch.bfloat16,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type != "cpu",
    }
    own = {
        "output_dir": str(context.folder / CHECKPOINTS),
        "run_name": context.stage_id,
        "report_to": list(context.report_to) or "none",
        "seed": seed,
        "data_seed": seed,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # it would log the mean of earlier losses in place of a NaN
        "include_num_input_tokens_seen": "non_padding",
    }
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # the accelerate file's, which would count for more than `bf16`
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if where["bf16"] else "no"
    args: TrainingArguments = getattr(importlib.import_module(module), name)(**{**config.train, **where, **own, **more})
    if args.n_gpu > 1:
        args._n_gpu = 1  # a process has one GPU; over all that it sees, Trainer would spread a batch with DataParallel
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        # Without it ZeRO-3 trains to the end and then has no whole model to save, whatever the accelerate file says.
        zero = args.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return args


def loaded(load: Callable[..., PreTrainedModel], start: Model, context: Context) -> PreTrainedModel:
    """The starting model in float32, all of it trainable. A new head or adapter is drawn from the stage's seed.

    To be called after `arguments`, from which transformers knows whether ZeRO-3 parts the model.
    """
    set_seed(seed_of(context))
    with contextlib.nullcontext() if reference.base_of(start) is None else loading.unpartitioned():
        model = load(start, device=context.profile.device)
    return model.requires_grad_(True)  # a merged adapter leaves its base frozen


def seed_of(context: Context) -> int:
    """The seed of everything that a training stage draws; numpy takes 32 bits."""
    return stable_seed(context.seed, context.stage_id) % 2**31


def adapter(lora: LoRA | None, task: str, model: PreTrainedModel, trained_whole: Sequence[str] = ()) -> Any:
    """peft's config for a stage's `lora:` on `model`; None where all weights are trained.

    Raises BadInput where it would reach the language-model head: log-probabilities are taken from the head's own
    weight, and what an adapter adds to that, or to embeddings tied to it, would be neither used nor trained.
    """
    if lora is None:
        return None
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=list(trained_whole) or None,
        task_type=task,
    )
    head = model.get_output_embeddings()
    if head is not None and lora.target_modules != "all-linear":  # which leaves it out
        for name, module in model.named_modules():
            if getattr(module, "weight", None) is head.weight and check_target_module_exists(config, name):
                raise BadInput(
                    f"`lora: {{target_modules: …}}` names {name!r}, the language-model head or tied to it, which takes "
                    f"no adapter; expected modules between embeddings and head, or `all-linear`"
                )
    return config


def without_dropout(model: nn.Module) -> None:
    """Switches off what a model and its adapter drop at random while they train.

    Reinforcement learning compares log-probabilities with those at the rollout: the same weights have to give the same
    ones. The model's config, which is saved with it, stays as it is.
    """
    for module in model.modules():
        for name in dropouts(module):
            setattr(module, name, 0.0)


@contextlib.contextmanager
def quiet(context: Context) -> Iterator[None]:
    """The libraries show errors only: progress and what a user can act on is told by the stage itself."""
    import datasets
    import transformers

    environment = {"TQDM_DISABLE": "1", "TENSORBOARD_LOGGING_DIR": str(context.folder / "tensorboard")}
    before = {name: os.environ.get(name) for name in environment}
    loggers = [logging.getLogger(name) for name in ("trl", "accelerate", "peft")]
    levels = [logger.level for logger in loggers]
    verbosity = transformers.logging.get_verbosity()
    bars = datasets.are_progress_bars_disabled()
    os.environ.update(environment)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            for module in ("trl", "transformers", "accelerate", "peft", "torch", "datasets"):
                warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
        if not bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
