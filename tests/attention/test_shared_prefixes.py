"""What rows have in common is read once, and each gets the answer that it would get by itself."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cai.attention import shared_prefixes
from cai.attention.prefix_trees import Node, apart, trees_of
from cai.attention.shared_prefixes import Groups, Prefixes, Shared, can_share, joint_attention, read
from cai.contracts.engine import Choice, Completion, Question, Request, Sampling
from cai.contracts.model import Model
from cai.contracts.profile import Profile
from cai.engines.local import decoding, scoring
from cai.engines.local.local_engine import LocalEngine
from cai.models.loading import load_causal_lm
from cai.text.errors import BadInput

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


@given(questions=QUESTIONS)
@settings(max_examples=100, deadline=None)
def test_every_question_is_the_path_to_one_node(questions: list[list[int]]) -> None:
    trees = trees_of(questions)
    seen: list[int] = []

    def look(node: Node, path: list[int]) -> None:
        path = [*path, *node.ids]
        for question in node.ends:
            assert path == questions[question]
            seen.append(question)
        assert node.ends or node.children
        for child in node.children:
            look(child, path)

    for tree in trees:
        look(tree, [])
    assert sorted(seen) == list(range(len(questions)))
    seen.clear()
    for tree in trees:
        for node in apart(tree):
            assert not node.children
            look(node, [])
    assert sorted(seen) == list(range(len(questions)))


def test_what_is_shared_is_there_once_unless_it_is_not_worth_it() -> None:
    pairs = [[pair] * 170 for pair in (1, 2, 3)]
    questions = [pair + [10 + n] * 20 for pair in pairs for n in range(16)]
    assert [tree.size for tree in trees_of(questions)] == [170 + 16 * 20] * 3
    conversations = [[7] * 300 + question for question in questions]
    (tree,) = trees_of(conversations)
    assert [len(node.children) for node in (tree, *tree.children)] == [3, 16, 16, 16]
    begun = [[7, 8, *question] for question in questions]
    assert [len(tree.children) for tree in trees_of(begun)] == [16, 16, 16], "too little to be a node"


@pytest.mark.usefixtures("pad_to_multiple")
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize(("owners", "most"), [([0, 0, 1, 1], 9), ([1, 0, 0, 2, 0, 0, 0], 9), ([2, 2, 2, 0], 1)])
def test_joint_attention_is_attention_to_the_prefix_and_the_own_tokens_together(
    owners: list[int], most: int, heads: int
) -> None:
    torch.manual_seed(0)
    n, kv_heads, width, length, own = len(owners), 2, 8, 5, 3
    keys, values = torch.randn(3, kv_heads, length, width), torch.randn(3, kv_heads, length, width + 3)
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[1, 3:] = False
    query, own_keys = torch.randn(n, heads, own, width), torch.randn(n, kv_heads, own, width)
    own_values = torch.randn(n, kv_heads, own, width + 3)
    causal = torch.ones(own, own, dtype=torch.bool).tril()
    whole = torch.nn.functional.scaled_dot_product_attention(
        query,
        torch.cat([keys[owners], own_keys], dim=2),
        torch.cat([values[owners], own_values], dim=2),
        attn_mask=torch.cat([mask[owners][:, None].expand(-1, own, -1), causal.expand(n, -1, -1)], dim=-1)[:, None],
        enable_gqa=True,
    )
    device = torch.device("cpu")
    own_bias = torch.zeros(own, own).masked_fill(~causal, -1e30).repeat(heads // kv_heads, 1)
    rows_of = {owner: [n for n in range(len(owners)) if owners[n] == owner] for owner in sorted(set(owners))}
    by_prefix = [Groups([owner], len(rows), range(len(rows)), device, rows) for owner, rows in rows_of.items()]
    for parts in ([Groups.of(owners, most, device)], by_prefix):
        found = joint_attention(
            (query * width**-0.5).reshape(n, kv_heads, -1, width),
            [
                Shared(
                    keys.transpose(-1, -2)[groups.prefixes],
                    values[groups.prefixes],
                    torch.zeros(mask.shape).masked_fill(~mask, -1e30)[groups.prefixes][:, None, None],
                    groups,
                )
                for groups in parts
            ],
            (own_keys.transpose(-1, -2), own_values, own_bias),
        )
        torch.testing.assert_close(found.reshape(whole.shape), whole, atol=1e-6, rtol=1e-5)


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


@pytest.mark.usefixtures("pad_to_multiple")
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_one_question_a_row(tiny: Tiny, family: str) -> None:
    profile = Profile(device="cpu", dtype="float32", token_budget=2048)
    together, alone = LocalEngine(tiny(family), profile), LocalEngine(tiny(family), profile)
    alone.__dict__["_shares"] = False
    questions = asked(4)
    ours = {choice.id: choice for choice in together.choose(questions)}
    plain = {choice.id: choice for choice in alone.choose(questions)}
    assert together._shares
    assert len(ours) == len(questions)
    for question in questions:
        choice, expected = ours[question.id], plain[question.id]
        assert isinstance(choice, Choice)
        assert isinstance(expected, Choice)
        assert choice.log_probs == pytest.approx(expected.log_probs, abs=1e-4)
        assert choice.option_probability == pytest.approx(expected.option_probability, abs=1e-4)


@pytest.mark.usefixtures("pad_to_multiple")
@pytest.mark.parametrize("family", FAMILIES)
def test_responses_are_those_of_one_response_a_row_whatever_runs_beside_them(tiny: Tiny, family: str) -> None:
    """In float32, so that rounding hardly ever decides; samples of one prompt, long and short prompts."""
    prompts = ["how deep is the sea?", "write a poem about the sea " * 9, "a", "which is " * 30, "and then?"]
    requests = [
        Request(f"{n}-{k}", [{"role": "user", "content": text}], 10 * n + k, Sampling(12, temperature=temperature))
        for n, text in enumerate(prompts)
        for k in range(1 + n % 3 * 2)
        for temperature in [(0.0, 1.0)[k % 2]]
    ]
    alone = LocalEngine(tiny(family), Profile(device="cpu", dtype="float32"))
    alone.__dict__["_shares"] = False
    expected = {each.id: each for each in alone.generate(requests)}
    for budget in (256, 700, 16384):
        together = LocalEngine(tiny(family), Profile(device="cpu", dtype="float32", token_budget=budget))
        found = {each.id: each for each in together.generate(requests)}
        assert together._shares
        assert len(found) == len(requests)
        for id, each in found.items():
            other = expected[id]
            assert isinstance(each, Completion)
            assert isinstance(other, Completion)
            assert each.token_ids == other.token_ids
            assert each.log_probs == pytest.approx(other.log_probs, abs=1e-4)


@pytest.mark.parametrize("new_tokens", [8, 33])
@pytest.mark.parametrize("budget", [500, 2000])
@pytest.mark.parametrize("samples", [1, 3])
def test_what_rows_and_prompts_hold_stays_within_the_budget(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, samples: int, new_tokens: int, budget: int
) -> None:
    """Few long prompts with several samples; many shorter ones, with several or one: then fewer rows run at once."""
    held: list[int] = []
    step = decoding._Batch.step

    def counting(self: decoding._Batch) -> torch.Tensor:
        logits = step(self)
        prompts = sum(shelf.prefixes.mask.numel() for shelf in self.shelves.values())
        held.append(prompts + self.room.keys[0].shape[0] * self.room.keys[0].shape[-1])
        return logits

    monkeypatch.setattr(decoding._Batch, "step", counting)
    texts = ["which is deeper " * 12] * 3 + [f"a {n} and a {n}" for n in range(40)]
    requests = [
        Request(f"{n}-{k}", [{"role": "user", "content": text}], 10 * n + k, Sampling(new_tokens))
        for n, text in enumerate(texts)
        for k in range(8 if n < 9 else samples)
    ]
    engine = LocalEngine(tiny("llama"), Profile(device="cpu", dtype="float32", token_budget=budget))
    assert len(list(engine.generate(requests))) == len(requests)
    assert 0.6 * budget < max(held) <= budget


def test_a_model_whose_attention_does_something_else_reads_each_row_whole(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load_causal_lm(tiny("llama"))
    lm.set_attn_implementation("eager")
    assert can_share(lm) is None
    attention = type(lm.model.layers[0].self_attn)
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda self, *args, **rest: forward(self, *args, softcap=3.0, **rest))
    assert "its attention has 'softcap'" in str(can_share(lm))


def test_a_model_that_misplaces_its_ids_reads_each_row_whole(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load_causal_lm(tiny("llama"))
    forward = type(lm).forward

    def from_zero(self: torch.nn.Module, position_ids: torch.Tensor | None = None, **rest: object) -> object:
        return forward(self, **rest)

    from_zero.__signature__ = __import__("inspect").signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(lm), "forward", from_zero)
    assert "changes its logits" in str(can_share(lm))


def test_a_model_with_sliding_windows_reads_each_row_whole() -> None:
    import transformers

    config = transformers.Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert "sliding" in str(can_share(transformers.Qwen2ForCausalLM(config)))


@pytest.mark.parametrize("kind", ["Mistral", "Starcoder2", "Phi3"])
def test_a_window_that_no_layer_type_tells_is_kept(tmp_path: Path, kind: str) -> None:
    import transformers

    tokenizer = tiny_models.build_tokenizer("llama")
    shape = {**SHAPE, "vocab_size": len(tokenizer), "num_key_value_heads": 2, "initializer_range": 0.3}
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**shape, **ids, max_position_embeddings=4096, sliding_window=32)
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, profile = Model(kind, str(tmp_path)), Profile(device="cpu", dtype="float32", token_budget=2048)
    together, alone = LocalEngine(model, profile), LocalEngine(model, profile)
    alone.__dict__["_shares"] = False
    questions = asked(2)
    with pytest.warns(UserWarning, match="reaches back 32 tokens") as warned:
        ours = {choice.id: choice for choice in [*together.choose(questions), *together.choose(questions)]}
    assert len(warned) == 1
    for plain in alone.choose(questions):
        choice = ours[plain.id]
        assert isinstance(choice, Choice)
        assert isinstance(plain, Choice)
        assert choice.log_probs == pytest.approx(plain.log_probs, abs=1e-4)


def test_a_window_that_is_off_or_never_full_keeps_nothing_from_sharing() -> None:
    from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

    shape = {**SHAPE, "max_position_embeddings": 64, "num_key_value_heads": 2}
    for window in (None, 64):
        assert can_share(MistralForCausalLM(MistralConfig(**shape, sliding_window=window))) is None
    unused = Qwen2Config(**shape, use_sliding_window=False, sliding_window=4)
    assert can_share(Qwen2ForCausalLM(unused)) is None


def test_rows_that_end_at_any_token_make_room_for_others(tiny: Tiny) -> None:
    """Many short prompts behind few long ones: rows enter that have no room yet, and end with their first token."""
    model, sampling = tiny("llama"), Sampling(20)
    texts = ["which is deeper " * 30] * 4 + [f"a {n}" for n in range(60)]
    requests = [Request(str(n), [{"role": "user", "content": text}], n, sampling) for n, text in enumerate(texts)]

    def completions(shares: bool, budget: int) -> list[Completion]:
        engine = LocalEngine(model, Profile(device="cpu", dtype="float32", token_budget=budget))
        engine.__dict__["_shares"] = shares
        bias = torch.nn.Parameter(torch.zeros(engine.lm.lm_head.weight.shape[0]))
        bias.data[engine.chat.end_of_turn] = 6.0
        engine.lm.lm_head.bias = bias
        return sorted(engine.generate(requests), key=lambda each: int(each.id))  # type: ignore[arg-type]

    expected = completions(False, 16384)
    lengths = {len(each.token_ids) for each in expected}
    assert {1, 2, 3} < lengths
    for budget in (256, 600, 2000, 16384):
        found = completions(True, budget)
        assert [(each.id, each.token_ids) for each in found] == [(each.id, each.token_ids) for each in expected]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_long_branches_get_the_answers_that_they_would_get_alone(tiny: Tiny, family: str) -> None:
    shared, ends = "how deep is the sea? " * 20, [" and why?", " tell me more about the sea, please" * 12]
    texts = [f"{n % 2} {shared}{n}{end}" for n in range(4) for end in ends]
    questions = [Question(text, [{"role": "user", "content": text}]) for text in texts]
    profile = Profile(device="cpu", dtype="float32", token_budget=4096)
    together, alone = LocalEngine(tiny(family), profile), LocalEngine(tiny(family), profile)
    alone.__dict__["_shares"] = False
    ours, plain = ({each.id: each for each in engine.choose(questions)} for engine in (together, alone))
    for question in questions:
        choice, expected = ours[question.id], plain[question.id]
        assert isinstance(choice, Choice)
        assert isinstance(expected, Choice)
        assert choice.log_probs == pytest.approx(expected.log_probs, abs=1e-4)


def test_fused_attention_is_given_what_it_takes(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of keys whose last dimension is not contiguous torch computes it in many steps."""
    fused, strides = shared_prefixes.scaled_dot_product_attention, []

    def spy(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> Any:
        strides.extend(each.stride(-1) for each in (query, key, value))
        return fused(query, key, value, *rest, **options)

    monkeypatch.setattr(shared_prefixes, "scaled_dot_product_attention", spy)
    model = load_causal_lm(tiny("llama"))
    beginning = read(model, [[5, 6, 7, 8], [9, 10]])[1]()
    reached = len(strides)
    read(model, [[3] * 200, [4] * 150], beginning, [0, 1])
    assert len(strides) > reached > 0
    assert set(strides) == {1}


def test_rotary_positions_that_depend_on_the_longest_row_are_not_shared() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    lm = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=rope, max_position_embeddings=64))
    assert "depend on the longest row" in str(can_share(lm))


def test_a_model_that_keeps_states_is_refused_in_one_sentence(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    tokenizer = tiny_models.build_tokenizer("llama")
    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=len(tokenizer), state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = LocalEngine(Model("mamba", str(tmp_path)), Profile(device="cpu", dtype="float32"))
    with pytest.warns(UserWarning, match="reads each row whole"), pytest.raises(BadInput, match="keeps states"):
        list(engine.generate([Request("a", [{"role": "user", "content": "a"}], 0, Sampling(4))]))


@pytest.mark.parametrize("kind", ["Qwen3", "Mixtral", "Phi3", "OPT", "Cohere", "DeepseekV3"])
def test_attention_of_many_kinds_can_be_shared(kind: str) -> None:
    import transformers

    shape = {**SHAPE, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0, "head_dim": 8}
    shape |= {"num_local_experts": 2, "ffn_dim": 16, "word_embed_proj_dim": 16}
    shape |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 10}
    shape |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    if kind == "DeepseekV3":
        shape |= {"head_dim": 4}
    config = getattr(transformers, f"{kind}Config")(**shape)
    torch.manual_seed(0)
    assert can_share(getattr(transformers, f"{kind}ForCausalLM")(config).eval()) is None


def test_a_model_that_takes_no_other_attention_is_found_out() -> None:
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(n_embd=16, n_layer=2, n_head=2, rotary_dim=4, vocab_size=64, initializer_range=0.3)
    torch.manual_seed(0)
    assert "changes its logits" in str(can_share(GPTJForCausalLM(config).eval()))


def test_a_model_with_eager_attention_shares_and_is_left_as_it_was(tiny: Tiny) -> None:
    lm = load_causal_lm(tiny("qwen2"))
    lm.set_attn_implementation("eager")
    assert can_share(lm) is None
    assert lm.config._attn_implementation == "eager"


def test_where_memory_runs_out_the_work_goes_on_with_half_the_tokens(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = LocalEngine(tiny("llama"), Profile(device="cpu", dtype="float32", token_budget=4096))
    requests = [Request(f"{n}", question.messages, n, Sampling(8)) for n, question in enumerate(asked(3))]
    enough = sorted(engine.choose(asked(4)), key=lambda each: each.id)
    written = sorted(engine.generate(requests), key=lambda each: each.id)
    forward = type(engine.lm).forward

    def small(self: torch.nn.Module, input_ids: torch.Tensor, **rest: object) -> object:
        if input_ids.numel() > 500:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"
            )
        return forward(self, input_ids=input_ids, **rest)

    monkeypatch.setattr(type(engine.lm), "forward", small)
    with pytest.warns(UserWarning, match="memory ran out; going on with") as warned:
        found = sorted(engine.choose(asked(4)), key=lambda each: each.id)
    said = [str(each.message).split("with ")[1] for each in warned]
    assert said == list(dict.fromkeys(said))
    assert [each.id for each in found] == [each.id for each in enough]
    for each, expected in zip(found, enough, strict=True):
        assert isinstance(each, Choice)
        assert isinstance(expected, Choice)
        assert each.log_probs == pytest.approx(expected.log_probs, abs=1e-4)
    steps = itertools.count()

    def once_in_the_middle(self: torch.nn.Module, input_ids: torch.Tensor, **rest: object) -> object:
        if next(steps) == 5:
            raise RuntimeError("could not create a primitive")
        return forward(self, input_ids=input_ids, **rest)

    monkeypatch.setattr(type(engine.lm), "forward", once_in_the_middle)
    engine._budget = 2048
    with pytest.warns(UserWarning, match="memory ran out; going on with 1,024"):
        again = sorted(engine.generate(requests), key=lambda each: each.id)
    assert [each.token_ids for each in again] == [each.token_ids for each in written]  # type: ignore[union-attr]
    monkeypatch.setattr(type(engine.lm), "forward", lambda self, **_: (_ for _ in ()).throw(RuntimeError("something")))
    with pytest.raises(RuntimeError, match="something"):
        list(engine.choose(asked(2)))


CONVERSATION = [5] * 300
RESPONSES = [[*CONVERSATION, 6 + n % 7, 9 + n // 7, *[4] * (8 + n % 3)] for n in range(40)]
TURNS = [[token for turn in range(last + 1) for token in [6 + turn] * 60] for last in range(8)]


@pytest.mark.parametrize(
    ("prompts", "budget", "passes"),
    [
        ([[*each, 20 + n, *[3] * 9] for each in RESPONSES for n in range(3)], 2048, 41),
        ([[*CONVERSATION, *each] for each in TURNS], 1500, 12),  # of all turns the conversation would be held again
        ([[*CONVERSATION, 20 + n, *[3] * 9] for n in range(40)], 256, 41),  # less than one question needs
    ],
    ids=["a long conversation, many responses, principles", "a question after every turn", "too small a budget"],
)
def test_prefixes_that_are_held_at_once_stay_within_the_budget(
    prompts: list[list[int]], budget: int, passes: int, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[int, int] = {}
    most: list[int] = []

    def counting(*given: Any) -> tuple[torch.Tensor, Callable[[], Prefixes]]:
        logits, keep = read(*given)
        most.append(sum(held.values()))

        def kept() -> Prefixes:
            prefixes = keep()
            held[id(prefixes)] = shared_prefixes.mask.numel()
            weakref.finalize(prefixes, held.pop, id(prefixes))
            return prefixes

        return logits, kept

    monkeypatch.setattr(scoring, "read", counting)
    lm = load_causal_lm(tiny("llama"))
    found = dict(scoring.score(lm, [(prompt, [1, 2]) for prompt in prompts], budget))
    assert 300 <= max(most) <= max(budget, 300)
    assert len(most) <= passes
    assert not held
    for number in (0, len(prompts) - 1):
        with torch.inference_mode():
            logits = lm(input_ids=torch.tensor([prompts[number]])).logits[0, -1].log_softmax(dim=-1)
        assert found[number] == pytest.approx(logits[[1, 2]].tolist(), abs=1e-4)
    assert len(found) == len(prompts)


def test_a_budget_that_memory_has_no_room_for_is_lowered(tiny: Tiny) -> None:
    profile = Profile(device="cpu", dtype="float32", token_budget=1 << 50)
    engine = LocalEngine(tiny("llama"), profile)
    with pytest.warns(UserWarning, match="may be more than memory has room for"):
        assert len(list(engine.choose(asked(2)))) == len(asked(2))
    with pytest.warns(UserWarning, match="may be more than memory has room for"):
        LocalEngine(tiny("llama"), profile, engine.lm)


def test_in_bfloat16_weights_are_multiplied_by_few_sizes_alone(tiny: Tiny) -> None:
    model = load_causal_lm(tiny("llama"), "bfloat16")
    sizes = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, states, __: sizes.add(states[0].shape[:-1].numel()))
    engine = LocalEngine(tiny("llama"), Profile(device="cpu", dtype="bfloat16"), model)
    assert engine._shares
    sizes.clear()  # of the trial
    assert len(list(engine.choose(asked(3)))) == len(asked(3))
    requests = [Request(str(n), [{"role": "user", "content": "a " * n}], n, Sampling(20)) for n in range(1, 40)]
    assert len(list(engine.generate(requests))) == len(requests)
    assert sizes
    assert not [size for size in sizes if size % 32 and size not in {1, 2, 4, 8, 16}]


def test_bfloat16_models_share_too(tiny: Tiny) -> None:
    for family in ("llama", "gpt_neox"):
        assert can_share(load_causal_lm(tiny(family), "bfloat16")) is None
    assert tiny_models.FAMILIES
