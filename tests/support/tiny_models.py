"""Tiny randomly initialised models of several families, saved as Hugging Face folders, and their chat templates.

Each has 2 layers of width 32 and a byte-level BPE tokenizer trained on a few sentences here, so that building all of
them takes about a second. They know nothing; what they share with real models is everything around the weights.
`random_model` is a model of any architecture, without a tokenizer.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from cai.contracts.model import Model

Tiny = Callable[..., Model]
"""Type of the fixture `tiny`."""


@dataclass(frozen=True)
class Family:
    """How models of a family write a conversation, and what they are built of."""

    template: str | None
    """Name of the chat template in chat_templates/; None for a base model."""
    eos: str
    bos: str | None = None
    pad: str | None = None
    unk: str | None = None
    special: tuple[str, ...] = ()
    """Other special tokens."""
    ordinary: tuple[str, ...] = ()
    """Added tokens that are not special."""
    architecture: str = "llama"


FAMILIES = {
    "llama": Family(
        "llama3", "<|eot_id|>", bos="<|begin_of_text|>",
        special=("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|finetune_right_pad_id|>"),
    ),
    "qwen2": Family(
        "chatml", "<|im_end|>", pad="<|endoftext|>", special=("<|endoftext|>", "<|im_start|>"), architecture="qwen2"
    ),
    "gpt_neox": Family("plain", "<|endoftext|>", pad="<|padding|>", architecture="gpt_neox"),
    "no_system": Family("gemma", "<eos>", "<bos>", "<pad>", special=("<start_of_turn>", "<end_of_turn>")),
    "pad_is_eos": Family("zephyr", "</s>", "<s>", "</s>"),
    "mistral": Family("mistral", "</s>", "<s>", unk="<unk>"),
    "thinking": Family(
        "thinking", "<|im_end|>", pad="<|endoftext|>", special=("<|endoftext|>", "<|im_start|>"),
        ordinary=("<think>", "</think>", "<tool_call>"), architecture="qwen2",
    ),
    "base": Family(None, "<|endoftext|>", architecture="gpt_neox"),
}  # fmt: skip
CHATS = {
    "llama2": Family("llama2", "</s>", "<s>", unk="<unk>"),
    "phi": Family("phi", "<|endoftext|>", special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "deepseek": Family(
        "deepseek", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>",
        ordinary=("<｜User｜>", "<｜Assistant｜>"),
    ),
    "vicuna": Family("vicuna", "</s>", "<s>", unk="<unk>"),
    "alpaca": Family("alpaca", "</s>"),
    "harmony": Family(
        "harmony", "<|return|>", pad="<|endoftext|>", special=("<|start|>", "<|end|>", "<|message|>", "<|channel|>")
    ),
}  # fmt: skip
"""More ways to write a conversation, each for a tokenizer; no model is built of these."""


def chat_template(name: str) -> str:
    """The template in chat_templates/, as it stands there: these files end without a newline."""
    return (Path(__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


RANDOM_SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def random_model(architecture: str, auto_class: str = "AutoModelForCausalLM", **config: Any) -> Any:
    """A model of transformers' architecture of that name, the same at each call."""
    import transformers

    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model(architecture, **{**RANDOM_SHAPE, **config})
    return getattr(transformers, auto_class).from_config(settings)


MISTRAL, PLAIN = chat_template("mistral"), chat_template("plain")

CORPUS = """You are a helpful assistant. What is the capital of France? The capital of France is Paris, of course.
How do I pick a lock? I will not help with that; a locksmith can open the door for you. Which response is better?
Human: Please write a poem about the sea.
Assistant: The sea is wide, the sea is deep, and in its waves the fishes sleep.
The first response is more helpful, honest and harmless than the second one. Answer with A or B only: B. (A) yes (B) no
def add(first, second):
    return first + second
"""


def build_tokenizer(family: str, sentencepiece: bool = False):  # type: ignore[no-untyped-def]
    """A tokenizer of that family: byte-level BPE, or with a leading `▁` and byte fallback as Llama 2 has it."""
    from transformers import PreTrainedTokenizerFast

    chat = (FAMILIES | CHATS)[family]
    tokens = {f"{role}_token": getattr(chat, role) for role in ("bos", "eos", "pad", "unk") if getattr(chat, role)}
    trained = Tokenizer.from_str(_trained_json(sentencepiece))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, **tokens)
    tokenizer.add_special_tokens({"additional_special_tokens": list(chat.special)})
    tokenizer.add_tokens([AddedToken(text, special=False) for text in chat.ordinary])
    tokenizer.chat_template = chat_template(chat.template) if chat.template else None
    return tokenizer


def build(family: str, folder: Path, *, seed: int = 0) -> Path:
    """Saves the tiny model of that family in `folder` and returns it. `lora` is an adapter over `llama`, beside it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if family == "lora":
        return _build_lora(folder, seed)
    tokenizer = build_tokenizer(family)
    architecture = FAMILIES[family].architecture
    special_ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    config = AutoConfig.for_model(
        architecture, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=4096, vocab_size=len(tokenizer), **special_ids, tie_word_embeddings=False,
        initializer_range=0.3,  # far from uniform, so that the most likely token is not a matter of rounding
        **({"rotary_pct": 0.5} if architecture == "gpt_neox" else {"num_key_value_heads": 2}),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _build_lora(folder: Path, seed: int) -> Path:
    """An adapter whose update is not zero, over the `llama` model that is built beside it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = folder.parent / "llama"
    if not base.exists():
        build("llama", base)
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.2)
    model.peft_config["default"].base_model_name_or_path = "../llama"
    model.save_pretrained(folder)
    return folder


@functools.cache
def _trained_json(sentencepiece: bool) -> str:
    if sentencepiece:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        initial = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=initial, show_progress=False)
        tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
        spec = json.loads(tokenizer.to_str())
        spec["added_tokens"] = spec["added_tokens"][:3]  # bytes are no special tokens
        return json.dumps(spec)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    return tokenizer.to_str()  # type: ignore[no-any-return]
