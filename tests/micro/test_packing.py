"""Branches that share a prefix cost less and say the same."""

from __future__ import annotations

from random import Random

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from cai.micro.corpus import Document, comparison, correction, dialogue, statement
from cai.micro.packing import batch, branch_mask, collate, pack
from cai.micro.pretrain import Size, forward, new_model
from cai.micro.tokenizer import END, render


@pytest.fixture(scope="module")
def packed_documents() -> list[list[Document]]:
    rng = Random(0)
    return [[comparison(rng), dialogue(rng)], [correction(rng), statement(rng)]]


def test_a_branch_has_the_logits_of_its_plain_sequence(
    tokenizer: PreTrainedTokenizerFast, packed_documents: list[list[Document]]
) -> None:
    torch.manual_seed(0)
    model = new_model(Size(32, 2, 2, 64), tokenizer).eval()
    rows = [[pack(document, tokenizer, 640) for document in row] for row in packed_documents]
    found = collate(rows, 640, pad=0)
    with torch.no_grad():
        logits = model(
            input_ids=found.ids, attention_mask=found.mask, position_ids=found.positions, use_cache=False
        ).logits
    for i, (documents, packs) in enumerate(zip(packed_documents, rows, strict=True)):
        start = 0
        for document, packed in zip(documents, packs, strict=True):
            for branch, example in enumerate(document, start=1):
                text = render(example.messages) + example.answer + END
                ids = tokenizer(text, add_special_tokens=False).input_ids
                at = [start + j for j, b in enumerate(packed.branches) if b in (0, branch)]
                assert found.ids[i, at].tolist() == ids
                with torch.no_grad():
                    plain = model(input_ids=torch.tensor([ids])).logits[0]
                torch.testing.assert_close(logits[i, at], plain, atol=1e-4, rtol=0)
            start += len(packed.ids)


def test_targets_follow_their_own_branch_and_soft_ones_stand_at_the_letter(
    tokenizer: PreTrainedTokenizerFast, packed_documents: list[list[Document]]
) -> None:
    for document in (document for row in packed_documents for document in row):
        packed = pack(document, tokenizer, 1024)
        for branch, example in enumerate(document, start=1):
            at = [j for j, b in enumerate(packed.branches) if b in (0, branch)]
            ids = [packed.ids[j] for j in at]
            for k, j in enumerate(at[:-1]):
                if packed.shares[j] == 1 and packed.weights[j] > 0:
                    assert packed.targets[j] == ids[k + 1]
                elif packed.shares[j] < 1:
                    assert k == len(ids) - 3  # letter and end follow
                    assert packed.shares[j] == example.p_first
            assert packed.weights[at[-1]] == 0


def test_branch_mask_by_hand() -> None:
    document = torch.tensor([[0, 0, 0, 0, 1, -1]])
    branch = torch.tensor([[0, 1, 1, 2, 0, 0]])
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert branch_mask(document, branch)[0, 0].int().tolist() == expected


def test_batches_are_full_and_a_function_of_seed_and_step(tokenizer: PreTrainedTokenizerFast) -> None:
    first, again, other = (batch(0, step, tokenizer, rows=4, length=512) for step in (9, 9, 10))
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, other.ids)
    assert (first.ids != 0).float().mean() > 0.9
    model = new_model(Size(32, 1, 2, 64), tokenizer)
    assert forward(model, first, "cpu").shape == (4, 512, 1536)


def test_branches_that_do_not_fit_are_left_out_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    document = correction(Random(1))
    whole = pack(document, tokenizer, 4096)
    cut = pack(document, tokenizer, len(whole.ids) - 1)
    assert max(cut.branches) == max(whole.branches) - 1
    assert cut.ids == whole.ids[: len(cut.ids)]
