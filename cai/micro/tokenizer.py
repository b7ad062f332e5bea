"""The small model's tokenizer: byte-level BPE trained on the corpus, with the chat format it was pretrained in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cai.micro.corpus import Example, documents
from cai.records import Message

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL = (PAD, BOS, END, *ROLES.values())

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def render(messages: Sequence[Message]) -> str:
    """What `CHAT_TEMPLATE` renders with a generation prompt, faster. Without messages, bare text follows."""
    turns = "".join(f"{ROLES[message['role']]}{message['content']}{END}" for message in messages)
    return f"{BOS}{turns}{ROLES['assistant']}" if messages else BOS


def train_tokenizer(seed: int, vocabulary: int, examples: int = 30_000) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocabulary` tokens, the special ones included, trained on the corpus's own text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core: Tokenizer = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_texts(seed, examples), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=list(ROLES.values()),
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def _texts(seed: int, examples: int) -> Iterator[str]:
    stream = documents(seed, -1)
    count = 0
    while count < examples:
        document: list[Example] = next(stream)
        for example in document:
            yield from (message["content"] for message in example.messages)
            yield example.answer
            count += 1
