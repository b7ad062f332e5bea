"""Documents packed into rows: the shared prefix once, then a branch for each example.

A branch attends to the prefix and to itself alone, and its positions continue those of the prefix, so that the logits
of every example are those of its plain sequence. A row has several documents, which do not attend to one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cai.micro_model.corpus import documents
from cai.micro_model.tasks import Document, Example
from cai.micro_model.tokenizer import END, PAD, render
from cai.templates import OPTIONS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONTEXT = 0.02
"""Weight in the loss of a token of a user's message."""


@dataclass
class Packed:
    """One document as parallel lists with one value a token. The target of a token is the next one of its example."""

    ids: list[int]
    positions: list[int]
    branches: list[int]
    """0 in the prefix, 1, 2, ... in the branches."""
    targets: list[int]
    others: list[int]
    """The second target if the target is soft, else the same as `targets`."""
    shares: list[float]
    """Target probability of `targets`; that of `others` is the rest."""
    weights: list[float]


@dataclass(frozen=True)
class Batch:
    """Tensors of shape (rows, length), and `mask` of shape (rows, 1, length, length): True where a token attends."""

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor
    others: torch.Tensor
    shares: torch.Tensor
    weights: torch.Tensor


def pack(document: Document, tokenizer: PreTrainedTokenizerFast, limit: int) -> Packed:
    """The document in at most `limit` tokens; branches that do not fit are left out."""
    end, options = tokenizer.convert_tokens_to_ids(END), tokenizer.convert_tokens_to_ids(list(OPTIONS))
    questions = _encode(tokenizer, [render(example.messages) for example in document])
    answers = _encode(tokenizer, [example.answer for example in document])
    shared = shared_prefix_length(questions) if len(questions) > 1 else 0
    packed = Packed(questions[0][:shared], list(range(shared)), [0] * shared, [], [], [], [])
    _append_targets(packed, packed.ids[1:], [CONTEXT] * (shared - 1))
    for branch, (example, question, answer) in enumerate(zip(document, questions, answers, strict=True), start=1):
        ids = question[shared:] + answer + [end]
        if len(packed.ids) + len(ids) > limit and (branch > 1 or shared):
            continue
        weights = _question_weights(example, question, tokenizer)[shared:] + [example.weight] * (len(answer) + 1)
        if example.first_weight is not None:
            weights[len(question) - shared] = example.first_weight
        if example.p_first is not None:
            weights[-1] = 0.05
        start = len(packed.ids)
        packed.ids += ids
        packed.positions += range(shared, shared + len(ids))
        packed.branches += [branch] * len(ids)
        if shared:
            _pad_targets(packed, start)
        _append_targets(packed, ids[1:], weights[1:])
        if example.p_first is not None:
            letter = len(packed.ids) - 3  # the token before the letter, which precedes the end of the turn
            packed.targets[letter], packed.others[letter] = options
            packed.shares[letter] = example.p_first
    _pad_targets(packed, len(packed.ids))
    return packed


def _question_weights(example: Example, question: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> list[float]:
    """Weight of each token of the question: `CONTEXT`, except in a rationale of the model's own."""
    if example.rationale_weight is None or len(example.messages) < 3:
        return [CONTEXT if example.messages else example.weight] * len(question)
    before, through = (len(_encode(tokenizer, [render(example.messages[:n])])[0]) for n in (-2, -1))
    through -= 1  # `render` ends with the token that opens the next turn
    return [CONTEXT] * before + [example.rationale_weight] * (through - before) + [CONTEXT] * (len(question) - through)


def shared_prefix_length(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix that all sequences share."""
    columns = zip(*sequences, strict=False)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, sequences)))


def _encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    backend = tokenizer.backend_tokenizer
    return [backend.encode(text, add_special_tokens=False).ids for text in texts]


def _append_targets(packed: Packed, targets: Sequence[int], weights: Sequence[float]) -> None:
    packed.targets += targets
    packed.others += targets
    packed.shares += [1.0] * len(targets)
    packed.weights += weights


def _pad_targets(packed: Packed, length: int) -> None:
    """Adds targets of weight 0 up to `length`: the last token of a prefix or a branch has no next token."""
    missing = length - len(packed.targets)
    _append_targets(packed, [0] * missing, [0.0] * missing)


def make_batch(seed: int, step: int, tokenizer: PreTrainedTokenizerFast, *, rows: int, length: int) -> Batch:
    """The corpus's `step`-th batch: each document goes to the first row that it fits into, until 12 fitted nowhere."""
    stream, misses = documents(seed, step), 0
    placed: list[list[Packed]] = [[] for _ in range(rows)]
    free_tokens = [length] * rows
    while misses < 12:
        packed = pack(next(stream), tokenizer, length)
        size = len(packed.ids)
        row = next((i for i in range(rows) if free_tokens[i] >= size), None)
        if row is None:
            misses += 1
            continue
        placed[row].append(packed)
        free_tokens[row] -= size
    return collate(placed, length, tokenizer.convert_tokens_to_ids(PAD))


def collate(rows: Sequence[Sequence[Packed]], length: int, pad: int) -> Batch:
    """Rows of packed documents as one batch; a padding token attends to itself alone and has weight 0."""
    shape = (len(rows), length)
    ids = torch.full(shape, pad)
    document, branch = torch.full(shape, -1), torch.zeros(shape, dtype=torch.long)
    positions, targets, others = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    shares, weights = torch.ones(shape), torch.zeros(shape)
    for i, row in enumerate(rows):
        start = 0
        for number, packed in enumerate(row):
            span = slice(start, start + len(packed.ids))
            ids[i, span], positions[i, span] = torch.tensor(packed.ids), torch.tensor(packed.positions)
            targets[i, span], others[i, span] = torch.tensor(packed.targets), torch.tensor(packed.others)
            shares[i, span], weights[i, span] = torch.tensor(packed.shares), torch.tensor(packed.weights)
            document[i, span], branch[i, span] = number, torch.tensor(packed.branches)
            start = span.stop
    return Batch(ids, positions, branch_mask(document, branch), targets, others, shares, weights)


def branch_mask(document: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """True where token i attends to token j: j is not later, of the same document, in its prefix or in the same branch.

    `document` and `branch` have shape (rows, length), -1 marks padding; the mask has shape (rows, 1, length, length).
    """
    length = document.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document.device).tril()
    same = (document[:, :, None] == document[:, None, :]) & (document[:, None, :] >= 0)
    visible = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    itself = torch.eye(length, dtype=torch.bool, device=document.device)
    return ((causal & same & visible) | itself)[:, None]
