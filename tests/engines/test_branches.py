"""Questions that begin alike are computed once, and get the answers that each would get by itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cai.checkpoint import Model, load_causal_lm
from cai.engines import Choice, Question
from cai.engines.branches import rows_of
from cai.engines.local import LocalEngine
from cai.engines.scoring import can_branch
from cai.profile import Profile

Tiny = Callable[..., Model]
FAMILIES = ["llama", "qwen2", "gpt_neox", "thinking", "lora"]
PIECES = st.sampled_from([[1], [1, 2], [3, 4, 5], [6] * 9, [7, 8] * 4])
QUESTIONS = st.lists(
    st.lists(PIECES, min_size=1, max_size=5).map(lambda each: [*itertools.chain(*each)]), min_size=1, max_size=30
)

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
}


@given(questions=QUESTIONS, width=st.sampled_from([1, 8, 1000]), budget=st.sampled_from([16, 64, 4096]))
@settings(max_examples=100, deadline=None)
def test_every_question_stands_in_one_row_and_sees_its_own_ids_alone(
    questions: list[list[int]], width: int, budget: int
) -> None:
    rows = rows_of(questions, width, budget)
    seen: list[int] = []
    for row in rows:
        assert len(row.ids) == len(row.positions) == len(row.until)
        for question, end in row.ends:
            path = [n for n in range(end + 1) if end < row.until[n]]
            assert [row.ids[n] for n in path] == questions[question]
            assert [row.positions[n] for n in path] == list(range(len(path)))
            seen.append(question)
        assert len(row.ids) <= max(budget, max(len(questions[question]) for question, _ in row.ends))
    assert sorted(seen) == list(range(len(questions)))


def test_what_is_shared_is_laid_out_once_unless_the_row_would_be_too_long() -> None:
    pairs = [[pair] * 170 for pair in (1, 2, 3)]
    questions = [pair + [10 + n] * 20 for pair in pairs for n in range(16)]
    rows = rows_of(questions, width=4096, budget=16384)
    assert sorted(len(row.ids) for row in rows) == [170 + 16 * 20] * 3
    many = [pairs[0] + [10 + n] * 20 for n in range(400)]
    assert len(rows_of(many, width=1 << 20, budget=16384)) == 1
    assert max(len(row.ids) for row in rows_of(many, width=32, budget=16384)) < 1000
    alone = rows_of([[n] * 50 for n in range(5)], width=192, budget=16384)
    assert [len(row.ids) for row in alone] == [50] * 5


def asked(count: int) -> list[Question]:
    """Questions about pairs of responses in both orders, the principle last."""
    principles = ["harmless", "honest and true", "kind", "useful to whoever asks", "brief"]
    responses = [f"I say {n}, and then {n * 7} more words about the sea" for n in range(count)]
    found = []
    for first, second in itertools.permutations(responses, 2):
        for principle in principles:
            text = f"Human: how deep is the sea?\nA: {first}\nB: {second}\nWhich is more {principle}?"
            found.append(Question(f"{first}|{second}|{principle}", [{"role": "user", "content": text}]))
    return [*found, found[0].__class__("again", found[0].messages)]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_one_question_a_row(tiny: Tiny, family: str) -> None:
    profile = Profile(device="cpu", dtype="float32", token_budget=2048)
    together, alone = LocalEngine(tiny(family), profile), LocalEngine(tiny(family), profile)
    alone.__dict__["_branches"] = False
    questions = asked(4)
    ours = {choice.id: choice for choice in together.choose(questions)}
    plain = {choice.id: choice for choice in alone.choose(questions)}
    assert together._branches
    assert len(ours) == len(questions)
    for question in questions:
        choice, expected = ours[question.id], plain[question.id]
        assert isinstance(choice, Choice)
        assert isinstance(expected, Choice)
        assert choice.log_probs == pytest.approx(expected.log_probs, abs=1e-4)
        assert choice.mass == pytest.approx(expected.mass, abs=1e-4)


def test_a_model_that_misreads_the_mask_reads_each_question_by_itself(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load_causal_lm(tiny("llama"))
    assert can_branch(lm) is None
    forward = type(lm).forward

    def deaf(self: torch.nn.Module, attention_mask: torch.Tensor | None = None, **rest: object) -> object:
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = None
        return forward(self, attention_mask=attention_mask, **rest)

    deaf.__signature__ = __import__("inspect").signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(lm), "forward", deaf)
    assert "changes its answers" in str(can_branch(lm))
    engine = LocalEngine(tiny("llama"), Profile(device="cpu", dtype="float32"))
    with pytest.warns(UserWarning, match="reads each question by itself"):
        assert len(list(engine.choose(asked(2)))) == len(asked(2))


def test_a_model_with_sliding_windows_reads_each_question_by_itself() -> None:
    import transformers

    config = transformers.Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert "sliding" in str(can_branch(transformers.Qwen2ForCausalLM(config)))


@pytest.mark.parametrize("kind", ["Mistral", "Starcoder2", "Phi3"])
def test_a_window_that_no_layer_type_tells_is_kept(tmp_path: Path, kind: str) -> None:
    import transformers

    tokenizer = models.build_tokenizer("llama")
    shape = {**SHAPE, "vocab_size": len(tokenizer), "num_key_value_heads": 2, "initializer_range": 0.3}
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**shape, **ids, max_position_embeddings=4096, sliding_window=32)
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, profile = Model(kind, str(tmp_path)), Profile(device="cpu", dtype="float32", token_budget=2048)
    together, alone = LocalEngine(model, profile), LocalEngine(model, profile)
    alone.__dict__["_branches"] = False
    questions = asked(2)
    with pytest.warns(UserWarning, match="reaches back 32 tokens") as warned:
        ours = {choice.id: choice for choice in [*together.choose(questions), *together.choose(questions)]}
    assert len(warned) == 1
    for plain in alone.choose(questions):
        choice = ours[plain.id]
        assert isinstance(choice, Choice)
        assert isinstance(plain, Choice)
        assert choice.log_probs == pytest.approx(plain.log_probs, abs=1e-4)


def test_a_window_that_is_off_or_never_full_keeps_nothing_from_branching() -> None:
    from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

    shape = {**SHAPE, "max_position_embeddings": 64, "num_key_value_heads": 2}
    for window in (None, 64):
        assert can_branch(MistralForCausalLM(MistralConfig(**shape, sliding_window=window))) is None
    unused = Qwen2Config(**shape, use_sliding_window=False, sliding_window=4)
    assert can_branch(Qwen2ForCausalLM(unused)) is None


def test_eager_attention_takes_the_mask_too(tiny: Tiny) -> None:
    lm = load_causal_lm(tiny("qwen2"))
    lm.set_attn_implementation("eager")
    assert can_branch(lm) is None


def test_bfloat16_models_pass_the_trial(tiny: Tiny) -> None:
    for family in ("llama", "gpt_neox"):
        assert can_branch(load_causal_lm(tiny(family), "bfloat16")) is None
    assert models.FAMILIES
