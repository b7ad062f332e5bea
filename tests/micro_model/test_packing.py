"""Branches that share a prefix cost less and say the same."""

from __future__ import annotations

from random import Random

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from cai.micro_model.corpus import Source, make_comparison, make_dialogue, make_review, make_statement
from cai.micro_model.forward import logits_of, loss_of
from cai.micro_model.packing import branch_mask, collate, make_batch, pack
from cai.micro_model.pretrain import Size, new_model
from cai.micro_model.tasks import CRITIQUE, LETTER, STATEMENT, Document, teach_fact
from cai.micro_model.tokenizer import END, render


@pytest.fixture(scope="module")
def packed_documents() -> list[list[Document]]:
    source = Source(Random(3))
    return [[make_comparison(source), make_dialogue(source)], [make_review(source), make_statement(source)]]


def test_a_branch_has_the_logits_of_its_plain_sequence(
    tokenizer: PreTrainedTokenizerFast, packed_documents: list[list[Document]]
) -> None:
    torch.manual_seed(0)
    model = new_model(Size(32, 2, 2, 64), tokenizer).eval()
    rows = [[pack(document, tokenizer, 640) for document in row] for row in packed_documents]
    batch = collate(rows, 640, pad=0)
    with torch.no_grad():
        logits = model(
            input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        ).logits
    for i, (documents, packs) in enumerate(zip(packed_documents, rows, strict=True)):
        start = 0
        for document, packed in zip(documents, packs, strict=True):
            for branch, example in enumerate(document, start=1):
                text = render(example.messages) + example.answer + END
                ids = tokenizer(text, add_special_tokens=False).input_ids
                at = [start + j for j, b in enumerate(packed.branches) if b in (0, branch)]
                assert batch.ids[i, at].tolist() == ids
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


def test_yes_and_no_count_as_much_as_a_letter(tokenizer: PreTrainedTokenizerFast) -> None:
    facts = (teach_fact("it is so", "it is not so", Random(seed)) for seed in range(99))
    questions = next(document for document in facts if len(document) == 2 and document[0].first_weight)
    yes, no = tokenizer.convert_tokens_to_ids(["Yes", "No"])
    packed = pack(questions, tokenizer, 256)
    deciding = [weight for id, weight in zip(packed.targets, packed.weights, strict=True) if id in (yes, no)]
    assert deciding == [LETTER, LETTER]
    assert max(weight for weight in packed.weights if weight not in deciding) == STATEMENT


def test_branch_mask_by_hand() -> None:
    document = torch.tensor([[0, 0, 0, 0, 1, -1]])
    branch = torch.tensor([[0, 1, 1, 2, 0, 0]])
    expected = ["100000", "110000", "111000", "100100", "000010", "000001"]
    mask = branch_mask(document, branch)[0, 0].int().tolist()
    assert ["".join(map(str, row)) for row in mask] == expected


def test_batches_are_full_and_a_function_of_seed_and_step(tokenizer: PreTrainedTokenizerFast) -> None:
    first, again, next_batch = (make_batch(0, step, tokenizer, rows=4, length=512) for step in (9, 9, 10))
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, next_batch.ids)
    assert (first.ids != 0).float().mean() > 0.9


def test_branches_that_do_not_fit_are_left_out_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    document = make_review(Source(Random(1)))
    uncut = pack(document, tokenizer, 4096)
    cut = pack(document, tokenizer, len(uncut.ids) - 1)
    left_out = set(uncut.branches) - set(cut.branches)
    assert len(left_out) == 1
    assert cut.ids == [token for token, branch in zip(uncut.ids, uncut.branches, strict=True) if branch not in left_out]


def test_rationales_of_the_model_are_learned_and_user_messages_hardly(tokenizer: PreTrainedTokenizerFast) -> None:
    source = Source(Random(0))
    document = next(d for d in iter(lambda: make_comparison(source), None) if d and any(e.rationale_weight for e in d))
    example = next(e for e in document if e.rationale_weight)
    packed = pack([example], tokenizer, 2048)
    learned = [packed.targets[i] for i, weight in enumerate(packed.weights) if weight == CRITIQUE]
    assert tokenizer.decode(learned) == example.messages[-2]["content"] + END


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here"))])  # fmt: skip
def test_the_training_step_is_the_plain_models(tokenizer: PreTrainedTokenizerFast, device: str) -> None:
    torch.manual_seed(0)
    model = new_model(Size(64, 2, 2, 128), tokenizer).to(device)
    rows = make_batch(0, 4, tokenizer, rows=2, length=256)
    loss_of(model, rows, compiled=False).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(
        input_ids=rows.ids.to(device), attention_mask=rows.mask.to(device), position_ids=rows.positions.to(device),
        use_cache=False,
    ).logits  # fmt: skip
    log_probs = torch.log_softmax(logits.cpu(), -1)
    targets = (rows.targets, rows.others)
    target_log_probs, other_log_probs = (log_probs.gather(-1, ids[..., None])[..., 0] for ids in targets)
    log_likelihood = rows.weights * (rows.shares * target_log_probs + (1 - rows.shares) * other_log_probs)
    loss = -log_likelihood.sum() / rows.weights.sum()
    loss.backward()
    assert loss.item() == pytest.approx(loss_of(model, rows, compiled=False).item(), rel=2e-3)
    has_weight = rows.weights > 0
    our_logits = logits_of(model, rows).float().cpu()
    torch.testing.assert_close(our_logits[has_weight], logits.cpu()[has_weight], atol=0.02, rtol=0.02)
    for name, p in model.named_parameters():
        likeness = torch.cosine_similarity(p.grad.flatten(), ours[name].flatten(), dim=0)  # type: ignore[union-attr]
        assert likeness > 0.99, name  # bfloat16 against float32
