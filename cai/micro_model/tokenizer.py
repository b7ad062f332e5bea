"""The small model's tokenizer: byte-level BPE trained on the corpus, with the chat format it was pretrained in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from cai.micro import phrases, topics
from cai.micro_model.corpus import PHASES, documents
from cai.micro_model.tasks import SCALES
from cai.storage.rows import Message
from cai.templates import OPTIONS

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
CONTEXT_LENGTH = 2048
SPECIAL = (PAD, BOS, END, *ROLES.values())

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def render(messages: Sequence[Message]) -> str:
    """What `CHAT_TEMPLATE` renders with a generation prompt, faster. Without messages, only the first token."""
    turns = "".join(f"{ROLES[message['role']]}{message['content']}{END}" for message in messages)
    return f"{BOS}{turns}{ROLES['assistant']}" if messages else BOS


def train_tokenizer(seed: int, vocabulary: int, examples: int = 20_000) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocabulary` tokens, the special ones included, trained on the corpus's own text.

    Every word of the world is repeated in the training text, so that rare words, and words that never occur in a
    dialogue, are single tokens too. So are the answers of questions with few possible answers.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core: Tokenizer = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    core.train_from_iterator(_training_texts(seed, examples), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, bos_token=BOS, eos_token=END,
        additional_special_tokens=list(ROLES.values()), chat_template=CHAT_TEMPLATE, model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _training_texts(seed: int, examples: int) -> Iterator[str]:
    count = 0
    for i, phase in enumerate(PHASES):
        for document in documents(seed, -1 - i, phase.end - 1):
            for example in document:
                yield from (message["content"] for message in example.messages)
                yield example.answer
                count += 1
            if count >= examples * (i + 1) / len(PHASES):
                break
    for word in sorted(lexicon()):
        yield " ".join(["", word] * (examples // 50))
    for option in ANSWERS:
        yield from [option] * (examples // 20)


ANSWERS = (*OPTIONS, *(str(n) for n in range(1, max(SCALES) + 1)), "Yes", "No")
"""Answers of questions with few possible answers."""


def lexicon() -> set[str]:
    """Every word of the world's topics and sentences."""
    lists = (value for module in (topics, phrases) for name, value in vars(module).items() if name.isupper())
    return {word for text in _strings(tuple(lists)) for word in re.findall(r"[A-Za-z']+", re.sub(r"\{\w\}", " ", text))}


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings((*value.keys(), *value.values()))
    elif isinstance(value, tuple):
        for inner in value:
            yield from _strings(inner)
