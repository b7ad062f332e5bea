"""Documents packed into rows: a prefix once, then each of its branches, which see the prefix and themselves alone.

A branch's positions restart at the end of its prefix, so that every example reads as if it stood alone: its logits are
those of the plain sequence. Rows hold several documents, which do not see one another.
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
"""What a token of a user's message counts in the loss."""


@dataclass
class Packed:
    """One document as parallel lists, a value a token. Targets are of the token that follows in the same example."""

    ids: list[int]
    positions: list[int]
    branches: list[int]
    """0 in the prefix, 1, 2, ... in the branches."""
    targets: list[int]
    others: list[int]
    """The other target where the target is soft, else the same."""
    shares: list[float]
    """Probability of `targets`; the rest goes to `others`."""
    weights: list[float]


@dataclass(frozen=True)
class Batch:
    """Tensors of shape (rows, length), and `mask` of shape (rows, 1, length, length): True where a token is seen."""

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
    shared = _shared(questions) if len(questions) > 1 else 0
    packed = Packed(questions[0][:shared], list(range(shared)), [0] * shared, [], [], [], [])
    _follow(packed, packed.ids[1:], [CONTEXT] * (shared - 1))
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
        _follow(packed, ids[1:], weights[1:])
        if example.p_first is not None:
            at = len(packed.ids) - 3
            packed.targets[at], packed.others[at], packed.shares[at] = options[0], options[1], example.p_first
    _pad_targets(packed, len(packed.ids))
    return packed


def _question_weights(example: Example, question: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> list[float]:
    """What each token of the question counts: little, but for the thoughts that the model is to have had itself."""
    if example.thoughts is None or len(example.messages) < 3:
        return [CONTEXT if example.messages else example.weight] * len(question)
    before, through = (len(_encode(tokenizer, [render(example.messages[:n])])[0]) for n in (-2, -1))
    through -= 1  # `render` ends with the next turn's mark
    return [CONTEXT] * before + [example.thoughts] * (through - before) + [CONTEXT] * (len(question) - through)


def _shared(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix that all sequences have."""
    columns = zip(*sequences, strict=False)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, sequences)))


def _encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    backend = tokenizer.backend_tokenizer
    return [backend.encode(text, add_special_tokens=False).ids for text in texts]


def _follow(packed: Packed, targets: Sequence[int], weights: Sequence[float]) -> None:
    packed.targets += targets
    packed.others += targets
    packed.shares += [1.0] * len(targets)
    packed.weights += weights


def _pad_targets(packed: Packed, length: int) -> None:
    """The last token of a prefix or a branch has no successor in its example: nothing is learned there."""
    missing = length - len(packed.targets)
    _follow(packed, [0] * missing, [0.0] * missing)


def batch(seed: int, step: int, tokenizer: PreTrainedTokenizerFast, *, rows: int, length: int) -> Batch:
    """The corpus's `step`-th batch: documents placed where they fit, until several in a row do not."""
    stream, misses = documents(seed, step), 0
    placed: list[list[Packed]] = [[] for _ in range(rows)]
    room = [length] * rows
    while misses < 12:
        packed = pack(next(stream), tokenizer, length)
        size = len(packed.ids)
        row = next((i for i in range(rows) if room[i] >= size), None)
        if row is None:
            misses += 1
            continue
        placed[row].append(packed)
        room[row] -= size
    return collate(placed, length, tokenizer.convert_tokens_to_ids(PAD))


def collate(rows: Sequence[Sequence[Packed]], length: int, pad: int) -> Batch:
    """Rows of packed documents as one batch; padding sees itself alone and is not learned from."""
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
    """True where token i may see token j: not later, of the same document, in its prefix or in the same branch.

    `document` and `branch` have shape (rows, length), -1 marks padding; the mask has shape (rows, 1, length, length).
    """
    length = document.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document.device).tril()
    same = (document[:, :, None] == document[:, None, :]) & (document[:, None, :] >= 0)
    visible = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    itself = torch.eye(length, dtype=torch.bool, device=document.device)
    return ((causal & same & visible) | itself)[:, None]
