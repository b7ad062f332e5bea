"""The engine contract, on every tiny model: what transformers itself computes, per item, with failures named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny_models
import torch

from cai.attention.cpu_sizes import batches
from cai.contracts.engine import Choice, Completion, Question, Request, Sampling
from cai.contracts.model import Model
from cai.contracts.profile import Profile
from cai.engines.local.local_engine import LocalEngine
from cai.engines.local.token_sampling import draw
from cai.models.loading import load_causal_lm
from cai.storage.rows import Failure, Message

Tiny = Callable[..., Model]
FAMILIES = [family for family, facts in tiny_models.FAMILIES.items() if "template" in facts] + ["lora", "base"]
TEXTS = ["Hi", "What is the capital of France?", "Schöne Grüße, 你好 🙂", "How do I pick a lock? " * 8, "B"]


def opened(tiny: Tiny, family: str, **options: object) -> LocalEngine:
    settings = {"name": "test", "device": "cpu", "dtype": "float32", "token_budget": 1024, **options}
    model = tiny(family, chat_template=tiny_models.PLAIN) if family == "base" else tiny(family)
    return LocalEngine(model, Profile.model_validate(settings))


def requests(sampling: Sampling) -> list[Request]:
    return [
        Request(f"{n}", [{"role": "user", "content": text}], seed=n, sampling=sampling) for n, text in enumerate(TEXTS)
    ]


def by_id(results: object) -> dict[str, Completion]:
    found = {result.id: result for result in results}  # type: ignore[attr-defined]
    assert all(isinstance(result, Completion) for result in found.values())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_transformers_generate(tiny: Tiny, family: str) -> None:
    engine = opened(tiny, family)
    chat = engine.chat
    done = by_id(engine.generate(requests(Sampling(max_new_tokens=24, temperature=0))))
    assert len(done) == len(TEXTS)
    for completion in done.values():
        theirs = engine.lm.generate(
            torch.tensor([completion.prompt_ids]),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=sorted(chat.end_ids),
            pad_token_id=chat.pad_id,
            suppress_tokens=None if chat.pad_id in chat.end_ids else [chat.pad_id],
        )[0, len(completion.prompt_ids) :].tolist()
        if chat.stop:
            theirs = theirs[: len(completion.token_ids)]
        assert completion.token_ids == theirs
        assert completion.finish_reason == ("stop" if theirs[-1] in chat.end_ids or len(theirs) < 24 else "length")
        assert completion.text == chat.text(theirs, stop=chat.stop).text


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_a_plain_forward_pass(tiny: Tiny, family: str) -> None:
    engine = opened(tiny, family)
    done = by_id(engine.generate(requests(Sampling(max_new_tokens=12, temperature=0.7, top_p=0.9))))
    for completion in done.values():
        ids = torch.tensor([completion.prompt_ids + completion.token_ids])
        with torch.no_grad():
            logits = engine.lm(ids).logits[0, len(completion.prompt_ids) - 1 : -1]
        theirs = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.log_probs), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen2"])
def test_an_item_gets_the_same_text_alone_and_in_any_batch(tiny: Tiny, family: str) -> None:
    wanted = requests(Sampling(max_new_tokens=20, temperature=1.0, top_p=0.95, top_k=50))
    together = by_id(opened(tiny, family).generate(wanted))
    reversed_order = by_id(opened(tiny, family, token_budget=256).generate(wanted[::-1]))
    for request in wanted:
        alone = by_id(opened(tiny, family).generate([request]))[request.id]
        assert alone.token_ids == together[request.id].token_ids == reversed_order[request.id].token_ids
    other = by_id(opened(tiny, family).generate([Request("x", wanted[0].messages, 99, wanted[0].sampling)]))["x"]
    assert other.token_ids != together["0"].token_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_options_have_the_log_probabilities_of_a_plain_forward_pass(tiny: Tiny, family: str) -> None:
    engine = opened(tiny, family, token_budget=512)
    asked = [Question(f"{n}", [{"role": "user", "content": f"{text} A or B?"}]) for n, text in enumerate(TEXTS)]
    answers = {choice.id: choice for choice in engine.choose(asked)}
    for question in asked:
        choice = answers[question.id]
        assert isinstance(choice, Choice)
        prompt, options = engine.chat.question(question.messages, question.options)
        with torch.no_grad():
            theirs = engine.lm(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[options]
        assert choice.log_probs == pytest.approx(theirs.tolist(), abs=1e-4)
        assert choice.option_probability == pytest.approx(theirs.exp().sum().item(), abs=1e-4)


def test_what_does_not_fit_is_a_failure_that_names_both_lengths(tiny: Tiny) -> None:
    engine = opened(tiny, "llama")
    long = [{"role": "user", "content": "word " * 5000}]
    short = [{"role": "user", "content": "Hi"}]
    sampling = Sampling(max_new_tokens=4)
    results = {
        r.id: r for r in engine.generate([Request("long", long, 0, sampling), Request("short", short, 0, sampling)])
    }
    assert isinstance(results["short"], Completion)
    failure = results["long"]
    assert isinstance(failure, Failure)
    assert "tokens and 4 more are wanted" in failure.reason
    assert "takes 4096 in all" in failure.reason
    (choice,) = engine.choose([Question("long", long)])
    assert isinstance(choice, Failure)
    assert "takes 4096" in choice.reason
    assert engine.model.name in choice.reason


def test_what_the_template_refuses_and_options_of_several_tokens_are_failures(tiny: Tiny) -> None:
    engine = opened(tiny, "mistral")
    (failure,) = engine.generate([Request("x", [{"role": "assistant", "content": "Hi"}], 0)])
    assert isinstance(failure, Failure)
    assert "roles must alternate" in failure.reason
    (failure,) = engine.choose([Question("x", [{"role": "user", "content": "?"}], ("Absolutely not", "B"))])
    assert isinstance(failure, Failure)
    assert "'Absolutely not'" in failure.reason


def test_a_conversation_without_tokens_is_a_failure(tiny: Tiny) -> None:
    model = tiny("base", chat_template="{{ messages[0]['content'] }}")
    engine = LocalEngine(model, Profile(device="cpu", dtype="float32"))
    empty: list[Message] = [{"role": "user", "content": ""}]
    (answer,) = engine.choose([Question("a", empty)])
    (text,) = engine.generate([Request("a", empty, 0)])
    for each in (answer, text):
        assert isinstance(each, Failure)
        assert "no tokens" in each.reason


def test_a_stop_string_ends_a_response_and_is_not_part_of_it(tiny: Tiny) -> None:
    engine = opened(tiny, "llama")
    messages = [{"role": "user", "content": "Hi"}]
    sampling = Sampling(max_new_tokens=40, temperature=1.0)
    (whole,) = engine.generate([Request("x", messages, 3, sampling)])
    assert isinstance(whole, Completion)
    stop = whole.text[10:13]
    (cut,) = engine.generate([Request("x", messages, 3, Sampling(40, 1.0, stop=(stop,)))])
    assert isinstance(cut, Completion)
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text.partition(stop)[0].strip()
    assert len(cut.token_ids) < len(whole.token_ids)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]


@pytest.mark.parametrize("family", ["llama", "pad_is_eos", "no_system"])
def test_a_drawn_end_of_turn_ends_the_response_and_is_no_text(tiny: Tiny, family: str) -> None:
    engine = opened(tiny, family)
    end = engine.chat.end_of_turn
    head = engine.lm.get_output_embeddings()
    bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]))
    bias.data[end] = 6.0  # an end every few tokens: rows leave the batch at different steps
    head.bias = bias
    sampling = Sampling(max_new_tokens=30, temperature=1.0)
    wanted = [Request(f"{n}", [{"role": "user", "content": TEXTS[n % 5]}], n, sampling) for n in range(12)]
    done = by_id(engine.generate(wanted))
    assert len({len(completion.token_ids) for completion in done.values()}) > 2
    for request in wanted:
        completion = done[request.id]
        assert completion.finish_reason == "stop"
        assert completion.token_ids[-1] == end
        assert end not in completion.token_ids[:-1]
        assert len(completion.log_probs) == len(completion.token_ids)
        assert engine.chat.tokenizer.convert_ids_to_tokens(end) not in completion.text
        (alone,) = engine.generate([request])
        assert isinstance(alone, Completion)
        assert alone.token_ids == completion.token_ids


def test_sampling_draws_from_the_distribution_that_its_settings_leave() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().repeat(4000, 1)
    even = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    uniform = torch.stack([even, even[torch.randperm(4000, generator=torch.Generator().manual_seed(0))]], dim=-1)

    def shares(sampling: Sampling, banned: tuple[int, ...] = ()) -> list[float]:
        tokens, log_probs = draw(logits, uniform, sampling, banned)
        assert log_probs.tolist() == pytest.approx(logits[0][tokens].tolist(), abs=1e-6)
        return (torch.bincount(tokens, minlength=4) / 4000).tolist()

    assert shares(Sampling()) == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=1e-3)
    assert shares(Sampling(temperature=0)) == [1, 0, 0, 0]
    assert shares(Sampling(temperature=0), banned=(0,)) == [0, 1, 0, 0]
    assert shares(Sampling(temperature=0.5)) == pytest.approx([16 / 30, 9 / 30, 4 / 30, 1 / 30], abs=1e-3)
    assert shares(Sampling(top_k=2)) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=1e-3)
    assert shares(Sampling(top_p=0.65)) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=1e-2)
    assert shares(Sampling(top_p=0.75)) == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0], abs=1e-2)
    assert shares(Sampling(top_p=0.3)) == [1, 0, 0, 0]
    assert shares(Sampling(top_k=3, top_p=0.7)) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=1e-2)


def test_batches_stay_within_the_token_budget() -> None:
    sizes = sorted([5, 9, 3, 12, 40, 7, 7, 200])
    found = list(batches(sizes, 40))
    assert [size for first, last in found for size in sizes[first:last]] == sizes
    assert all((last - first) * sizes[last - 1] <= 40 or last - first == 1 for first, last in found)
    assert list(batches([], 40)) == []


def test_bfloat16_is_used_where_the_hardware_computes_in_it(tiny: Tiny) -> None:
    native = torch.cpu._is_avx512_bf16_supported()
    engine = opened(tiny, "llama", dtype="auto")
    assert engine.lm.dtype == (torch.bfloat16 if native else torch.float32)
    (done,) = engine.generate([Request("x", [{"role": "user", "content": "Hi"}], 0, Sampling(4))])
    assert isinstance(done, Completion)


def test_the_adapter_is_merged_into_its_base(tiny: Tiny) -> None:
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        plain, adapted = (load_causal_lm(tiny(family))(ids).logits for family in ("llama", "lora"))
    assert not torch.allclose(plain, adapted, atol=1e-2)
