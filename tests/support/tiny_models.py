"""Tiny randomly initialised models of several families, saved as Hugging Face folders, and their chat templates.

Each has 2 layers of width 32 and a byte-level BPE tokenizer trained on a few sentences here, so that building all of
them takes about a second. They know nothing; what they share with real models is everything around the weights.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

LLAMA3 = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim "
    "+ '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (first if loop.first else '') + message['content'].strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'].strip() + eos_token }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}"
    "{% elif message.role == 'user' %}"
    "{{ '\n\nHuman: ' + message.content }}{% else %}{{ '\n\nAssistant: ' + message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
THINKING = (
    "{%- for message in messages %}{%- set content = message.content %}{%- if message.role == 'assistant' %}"
    "{%- set reasoning = '' %}{%- if '</think>' in content %}"
    "{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.last %}{{- '<|im_start|>assistant\n<think>\n' + reasoning + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}"
    "{%- else %}{{- '<think>\n' }}{%- endif %}{%- endif %}"
)

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% else %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
VICUNA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}"
    "{{ 'A chat between a curious user and an assistant. ' }}{% endif %}{% for message in turns %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] }}"
    "{% else %}{{ ' ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
ALPACA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% set turns = messages[1:] %}"
    "{% else %}{{ 'Below is an instruction that describes a task.\n\n' }}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if message['role'] == 'user' %}"
    "{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
HARMONY = (
    "{{ '<|start|>system<|message|>You are a model.\nReasoning: low<|end|>' }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{{ '<|start|>developer<|message|># Instructions\n\n' + message['content'] + '<|end|>' }}"
    "{% elif message['role'] == 'user' %}{{ '<|start|>user<|message|>' + message['content'] + '<|end|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + message['content'] + "
    "('<|return|>' if loop.last else '<|end|>') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|channel|>final<|message|>' }}{% endif %}"
)

FAMILIES: dict[str, dict[str, object]] = {
    "llama": {
        "template": LLAMA3,
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "special": ["<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|finetune_right_pad_id|>"],
    },
    "qwen2": {
        "template": CHATML,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "special": ["<|endoftext|>", "<|im_start|>"],
    },
    "gpt_neox": {"template": PLAIN, "eos_token": "<|endoftext|>", "pad_token": "<|padding|>", "special": []},
    "no_system": {
        "template": GEMMA,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "special": ["<start_of_turn>", "<end_of_turn>"],
    },
    "pad_is_eos": {"template": ZEPHYR, "eos_token": "</s>", "pad_token": "</s>", "bos_token": "<s>", "special": []},
    "mistral": {"template": MISTRAL, "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "special": []},
    "thinking": {
        "template": THINKING,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "special": ["<|endoftext|>", "<|im_start|>"],
        "markup": ["<think>", "</think>", "<tool_call>"],
    },
    "base": {"eos_token": "<|endoftext|>", "special": []},
}
"""Per family: the chat template, tokens with a role, other special tokens, added tokens that are not special."""

CHATS: dict[str, dict[str, object]] = {
    "llama2": {"template": LLAMA2, "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "special": []},
    "phi": {
        "template": PHI,
        "eos_token": "<|endoftext|>",
        "special": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    },
    "deepseek": {
        "template": DEEPSEEK,
        "bos_token": "<｜begin▁of▁sentence｜>",
        "eos_token": "<｜end▁of▁sentence｜>",
        "pad_token": "<｜▁pad▁｜>",
        "special": [],
        "markup": ["<｜User｜>", "<｜Assistant｜>"],
    },
    "vicuna": {"template": VICUNA, "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "special": []},
    "alpaca": {"template": ALPACA, "eos_token": "</s>", "special": []},
    "harmony": {
        "template": HARMONY,
        "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>",
        "special": ["<|start|>", "<|end|>", "<|message|>", "<|channel|>"],
    },
}
"""More ways to write a conversation, each for a tokenizer; no model is built of these."""

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
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    facts = (FAMILIES | CHATS)[family]
    named = {key: value for key, value in facts.items() if key.endswith("_token")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_trained(sentencepiece), **named)
    tokenizer.add_special_tokens({"additional_special_tokens": list(facts["special"])})  # type: ignore[call-overload]
    tokenizer.add_tokens([AddedToken(text, special=False) for text in facts.get("markup", [])])  # type: ignore[attr-defined]
    tokenizer.chat_template = facts.get("template")
    return tokenizer


def build(family: str, folder: Path, *, seed: int = 0) -> Path:
    """Saves the tiny model of that family in `folder` and returns it. `lora` is an adapter over `llama`, beside it."""
    import torch
    import transformers

    if family == "lora":
        return _build_lora(folder, seed)
    tokenizer = build_tokenizer(family)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,  # far from uniform, so that the most likely token is not a matter of rounding
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    if family in {"gpt_neox", "base"}:
        config = transformers.GPTNeoXConfig(**shape, rotary_pct=0.5)
        kind = transformers.GPTNeoXForCausalLM
    elif family in {"qwen2", "thinking"}:
        config = transformers.Qwen2Config(**shape, num_key_value_heads=2)
        kind = transformers.Qwen2ForCausalLM
    else:
        config = transformers.LlamaConfig(**shape, num_key_value_heads=2)
        kind = transformers.LlamaForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _build_lora(folder: Path, seed: int) -> Path:
    """An adapter whose update is not zero, over the `llama` model that is built beside it."""
    import torch
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
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

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


def _trained(sentencepiece: bool):  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer

    return Tokenizer.from_str(_trained_json(sentencepiece))
