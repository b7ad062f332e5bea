"""The engine `local`, beyond the contract of all engines: batches, limits, memory and precision."""

from __future__ import annotations

import itertools

import pytest
import torch
from engine_contract import completions_by_id, conversation
from local_engines import assert_same_choices, judge_questions, local_engine, make_end_of_turn_likely
from tiny_models import Tiny

from cai.contracts.engine import Completion, Question, Request, Sampling
from cai.engines.local.local_engine import LocalEngine
from cai.models.loading import load_causal_lm

TEXTS = ["Hi", "What is the capital of France?", "Schöne Grüße, 你好 🙂", "How do I pick a lock? " * 8, "B"]


def opened(tiny: Tiny, family: str, **settings: object) -> LocalEngine:
    return local_engine(tiny(family), **{"token_budget": 1024, **settings})


def requests(sampling: Sampling, texts: list[str] = TEXTS) -> list[Request]:
    return [Request(f"{n}", conversation(text), seed=n, sampling=sampling) for n, text in enumerate(texts)]


def complete(engine: LocalEngine, requests: list[Request]) -> dict[str, Completion]:
    return completions_by_id(engine.generate(requests), requests)


def complete_one(engine: LocalEngine, request: Request) -> Completion:
    return complete(engine, [request])[request.id]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen2"])
def test_an_item_gets_the_same_text_alone_and_in_any_batch(tiny: Tiny, family: str) -> None:
    batch = requests(Sampling(max_new_tokens=20, temperature=1.0, top_p=0.95, top_k=50))
    together = complete(opened(tiny, family), batch)
    in_reverse = complete(opened(tiny, family, token_budget=256), batch[::-1])
    for request in batch:
        alone = complete_one(opened(tiny, family), request)
        assert alone.token_ids == together[request.id].token_ids == in_reverse[request.id].token_ids
    another_seed = complete_one(opened(tiny, family), Request("x", batch[0].messages, 99, batch[0].sampling))
    assert another_seed.token_ids != together["0"].token_ids


def test_what_does_not_fit_is_a_failure_that_names_both_lengths(tiny: Tiny) -> None:
    engine = opened(tiny, "llama")
    long, short = conversation("word " * 5000), conversation("Hi")
    sampling = Sampling(max_new_tokens=4)
    batch = [Request("long", long, 0, sampling), Request("short", short, 0, sampling)]
    results = {result.id: result for result in engine.generate(batch)}
    assert isinstance(results["short"], Completion)
    assert "tokens and 4 more are wanted" in results["long"].reason
    assert "takes 4096 in all" in results["long"].reason
    (choice,) = engine.choose([Question("long", long)])
    assert "takes 4096" in choice.reason
    assert engine.model.name in choice.reason


def test_what_the_template_refuses_and_options_of_several_tokens_are_failures(tiny: Tiny) -> None:
    engine = opened(tiny, "mistral")
    (failure,) = engine.generate([Request("x", [{"role": "assistant", "content": "Hi"}], 0)])
    assert "roles must alternate" in failure.reason
    (failure,) = engine.choose([Question("x", conversation("?"), ("Absolutely not", "B"))])
    assert "'Absolutely not'" in failure.reason


def test_a_conversation_without_tokens_is_a_failure(tiny: Tiny) -> None:
    engine = local_engine(tiny("base", chat_template="{{ messages[0]['content'] }}"))
    results = [*engine.choose([Question("a", conversation(""))]), *engine.generate([Request("b", conversation(""), 0)])]
    assert [result.id for result in results] == ["a", "b"]
    for failure in results:
        assert "no tokens" in failure.reason


@pytest.mark.parametrize("family", ["llama", "pad_is_eos", "no_system"])
def test_a_sampled_end_of_turn_ends_the_response_and_is_no_text(tiny: Tiny, family: str) -> None:
    engine = opened(tiny, family)
    end = engine.chat.end_of_turn
    make_end_of_turn_likely(engine)  # so that rows finish at different steps
    batch = requests(Sampling(max_new_tokens=30), [TEXTS[n % 5] for n in range(12)])
    completions = complete(engine, batch)
    assert len({len(completion.token_ids) for completion in completions.values()}) > 2
    for request in batch:
        completion = completions[request.id]
        assert completion.finish_reason == "stop"
        assert completion.token_ids[-1] == end
        assert end not in completion.token_ids[:-1]
        assert len(completion.log_probs) == len(completion.token_ids)
        assert engine.chat.tokenizer.convert_ids_to_tokens(end) not in completion.text
        assert complete_one(engine, request).token_ids == completion.token_ids


def test_bfloat16_is_used_where_the_hardware_computes_in_it(tiny: Tiny) -> None:
    engine = opened(tiny, "llama", dtype="auto")
    assert engine.lm.dtype == (torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32)
    complete(engine, requests(Sampling(4), ["Hi"]))


def test_the_adapter_is_merged_into_its_base(tiny: Tiny) -> None:
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        plain, adapted = (load_causal_lm(tiny(family))(ids).logits for family in ("llama", "lora"))
    assert not torch.allclose(plain, adapted, atol=1e-2)


def test_in_bfloat16_weights_are_multiplied_by_padded_sizes_alone(tiny: Tiny) -> None:
    engine = local_engine(tiny("llama"), dtype="bfloat16")
    sizes = set()
    for module in engine.lm.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, states, __: sizes.add(states[0].shape[:-1].numel()))
    assert engine._shares_prefixes
    sizes.clear()  # those of the trial
    assert len(list(engine.choose(judge_questions(3)))) == len(judge_questions(3))
    complete(engine, requests(Sampling(20), ["a " * n for n in range(1, 40)]))
    assert sizes
    assert not [size for size in sizes if size % 32 and size not in {1, 2, 4, 8, 16}]


def test_a_budget_that_memory_has_no_room_for_is_lowered(tiny: Tiny) -> None:
    engine = local_engine(tiny("llama"), token_budget=1 << 50)
    with pytest.warns(UserWarning, match="may be more than memory has room for"):
        assert len(list(engine.choose(judge_questions(2)))) == len(judge_questions(2))
    with pytest.warns(UserWarning, match="may be more than memory has room for"):
        LocalEngine(engine.model, engine.profile, engine.lm)


def test_where_memory_runs_out_work_goes_on_with_half_the_tokens(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = local_engine(tiny("llama"), token_budget=4096)
    questions = judge_questions(4)
    batch = [Request(f"{n}", question.messages, n, Sampling(8)) for n, question in enumerate(judge_questions(3))]
    choices, completions = list(engine.choose(questions)), complete(engine, batch)
    forward = type(engine.lm).forward
    no_memory = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"

    def fail_above_500_tokens(self: torch.nn.Module, input_ids: torch.Tensor, **rest: object) -> object:
        if input_ids.numel() > 500:
            raise RuntimeError(no_memory)
        return forward(self, input_ids=input_ids, **rest)

    monkeypatch.setattr(type(engine.lm), "forward", fail_above_500_tokens)
    with pytest.warns(UserWarning, match="memory ran out; going on with") as warnings:
        assert_same_choices(engine.choose(questions), choices)
    budgets = [str(warning.message).split("with ")[1] for warning in warnings]
    assert budgets == list(dict.fromkeys(budgets))
    steps = itertools.count()

    def fail_once(self: torch.nn.Module, input_ids: torch.Tensor, **rest: object) -> object:
        if next(steps) == 5:
            raise RuntimeError("could not create a primitive")
        return forward(self, input_ids=input_ids, **rest)

    monkeypatch.setattr(type(engine.lm), "forward", fail_once)
    engine._budget.n_tokens = 2048
    with pytest.warns(UserWarning, match="memory ran out; going on with 1,024"):
        again = complete(engine, batch)
    assert all(again[id].token_ids == completion.token_ids for id, completion in completions.items())
    monkeypatch.setattr(type(engine.lm), "forward", lambda self, **_: (_ for _ in ()).throw(RuntimeError("something")))
    with pytest.raises(RuntimeError, match="something"):
        list(engine.choose(judge_questions(2)))
