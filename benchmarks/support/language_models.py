"""The models of choose.py and generate.py: the embedded model, or one with random weights.

The speed of a model does not depend on its weights' values. Models with random weights use micro's tokenizer, so that
any size can be measured without downloading weights.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.plain import Lm
from cai.contracts.model import Model
from cai.contracts.profile import load_profile
from cai.engines.local.local_engine import LocalEngine
from cai.models.loading import load_tokenizer, pick_device
from cai.models.reference import FACTS, MICRO, resolve

RANDOM = {
    "random-tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 3072,
    },
    # The shapes of SmolLM2's 135 and 360 million parameters.
    "random-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49_152,
    },
    "random-350m": {
        "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
        "num_key_value_heads": 5, "vocab_size": 49_152,
    },
    # The shape of Llama 3.2 1B: 1.2 billion parameters.
    "random-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128_256,
    },
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which model is measured, and on which device."""
    parser.add_argument("--model", choices=["micro", *RANDOM], default="micro")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")


def model_of(name: str, folder: Path) -> Model:
    """The embedded model, or a random one, which is written to `folder` if it is not there yet."""
    if name == "micro":
        return resolve(name, folder=folder)
    home = folder / name
    if not home.exists():
        torch.manual_seed(0)
        # A range far above the default makes logits differ by more than rounding errors.
        config = LlamaConfig(
            **RANDOM[name], tie_word_embeddings=True, initializer_range=0.1, max_position_embeddings=2048,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        with pick_device():
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(home)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", FACTS):
            shutil.copy(MICRO / file, home)
    return resolve(str(home), folder=folder)


def engine_of(model: Model, device: str, dtype: str = "auto", token_budget: int | None = None) -> LocalEngine:
    """The local engine, its model loaded. `dtype` and `token_budget` as in a profile; None is the default budget."""
    profile = load_profile("cpu" if device == "cpu" else "1gpu").model_copy(update={"dtype": dtype})
    if token_budget is not None:
        profile = profile.model_copy(update={"token_budget": token_budget})
    engine = LocalEngine(model, profile)
    assert engine.lm is not None
    return engine


def plain_of(engine: LocalEngine) -> Lm:
    """The engine's model for the functions of plain.py."""
    return Lm(engine.lm, load_tokenizer(engine.model))
