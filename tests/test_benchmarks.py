"""Every benchmark runs alone, its last line is one JSON object, and both of its sides compute the same."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from benchmarks import choose, generate, plain, ppo
from benchmarks.support import language_models, ppo_models
from benchmarks.support.measurement import run_for_json
from cai.constitution import load_constitution
from cai.engines.local.local_engine import LocalEngine
from cai.micro.conversations import prompts
from cai.templates import load_templates

FOLDER = Path(__file__).parents[1] / "benchmarks"
SLOW = {"feedback", "quickstart", "plain", "ppo"}
"""Benchmarks that train models even with `--quick`."""
QUICK = sorted(path.stem for path in FOLDER.glob("[!_]*.py") if path.stem not in SLOW)
OPTIONS = {"choose": ["--model", "random-tiny"], "generate": ["--model", "random-tiny"]}
MICRO = language_models.model_of("micro", FOLDER)
CONVERSATIONS = [prompt["messages"] for prompt in prompts("train", limit=8)]


@pytest.mark.parametrize("name", QUICK)
def test_a_benchmark_runs_alone_and_ends_with_its_figures(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    figures = run_for_json([sys.executable, FOLDER / f"{name}.py", "--quick", *OPTIONS.get(name, [])])
    assert figures["bench"] == name
    assert {"ours", "plain", "unit", "ratio", "sizes", "versions", "hardware"} <= figures.keys()
    if name == "choose":
        assert figures["log_odds_difference_float32"] < 1e-4
        assert figures["bound"] == round(16 * 190 / (170 + 16 * 20), 2)
        assert figures["sizes"]["questions"] == 2 * 16 * figures["sizes"]["pairs"]
    if name == "generate":
        assert figures["greedy"] == {"equal": 8, "of": 8, "dtype": "float32"}
        assert figures["first_token"]["p"] > 0.01
        assert figures["peer"] == {"measured": False}


@pytest.fixture(scope="module")
def engine() -> Iterator[LocalEngine]:
    with language_models.engine_of(MICRO, "cpu", "float32") as opened:
        yield opened


def test_a_judge_is_asked_the_same_to_rounding_one_question_a_row_or_all_that_share_a_prefix_at_once() -> None:
    assert choose.largest_difference(MICRO, "cpu", choose.Shape(2)) < 1e-4


def test_made_questions_share_their_prefix_and_nothing_else() -> None:
    shape = choose.Shape(pairs=3, principles=4, prefix=11, branch=5)
    questions, rows = choose.make_questions(shape, 3072)
    assert len(questions) == shape.questions
    assert sum(map(len, questions)) == shape.tokens
    assert sum(map(len, rows)) == shape.unique
    assert len({tuple(question[:11]) for question in questions}) == 6
    assert len({tuple(question[:12]) for question in questions}) == len(questions)


def test_both_ways_write_the_same_where_the_likeliest_token_is_always_taken(engine: LocalEngine) -> None:
    assert generate.count_equal_greedy(engine, CONVERSATIONS, 24) == len(CONVERSATIONS)


def test_first_tokens_are_drawn_from_the_models_own_distribution(engine: LocalEngine) -> None:
    assert generate.compare_first_tokens(engine, CONVERSATIONS[0])["p"] > 0.01


def test_cells_of_the_test_hold_everything_and_none_is_too_small() -> None:
    rng = np.random.default_rng(0)
    for size in (2, 20, 3000):
        expected = 1000 * rng.dirichlet(np.full(size, 0.1))
        observed = rng.multinomial(1000, expected / expected.sum()).astype(float)
        observed_cells, expected_cells = generate.merge_cells(observed, expected)
        assert observed_cells.sum() == 1000
        assert expected_cells.sum() == pytest.approx(1000)
        assert len(expected_cells) == 1 or expected_cells.min() >= generate.MIN_EXPECTED


def test_plain_asks_in_the_words_of_the_templates() -> None:
    document = load_constitution(FOLDER.parent / "constitutions" / "micro.yaml")
    templates = load_templates("micro")
    principle = document.principles[0]
    messages = CONVERSATIONS[0]
    critique, revision = (messages, "No."), (messages, "No.", "It is curt.")
    comparison = (messages, "No.", "Yes.")
    assert plain.ask_critique(*critique, principle.critique) == templates.critique(*critique, principle)
    assert plain.ask_revision(*revision, principle.revise) == templates.revise(*revision, principle)
    assert plain.ask_comparison(*comparison, principle.compare) == templates.compare(*comparison, principle)


def test_plain_follows_the_recipe_and_asks_the_principles_of_the_constitution() -> None:
    recipe = plain.read_recipe()
    document = load_constitution(FOLDER.parent / "constitutions" / "micro.yaml")
    for tags in (["red_team"], ["helpful"], ["borderline", "helpful"]):
        principle_ids = [principle["id"] for principle in plain.applicable(recipe.principles, tags)]
        assert principle_ids == [principle.id for principle in document.principles if principle.applies(tags)]
    weights = {principle["id"]: principle.get("weight", 1.0) for principle in recipe.principles}
    assert weights == {principle.id: principle.weight for principle in document.principles}
    prompt_sets = yaml.safe_load(plain.RECIPE.read_text())["prompts"]
    limits = {name: prompt_set["limit"] for name, prompt_set in prompt_sets.items()}
    assert {name: len(prompts) for name, prompts in recipe.prompts.items()} == limits


def test_the_reward_that_a_policy_learns_from_is_how_many_more_good_tokens_than_bad_it_draws(tmp_path: Path) -> None:
    shape = ppo_models.config(width=64, layers=2, vocabulary=4096)
    ppo_models.reward_model(shape, tmp_path)
    model = LlamaForSequenceClassification.from_pretrained(tmp_path)
    ids = torch.randint(ppo_models.SPECIAL, 4096, (8, 20), generator=torch.Generator().manual_seed(1))
    expected = ppo_models.SPREAD * ppo_models.kinds(shape)[ids].mean(dim=1)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(model(ids).logits.squeeze(-1).detach(), expected, atol=0.02, rtol=0.02)


def test_the_policy_that_learns_is_of_fifty_million_parameters_and_ends_its_responses(tmp_path: Path) -> None:
    sizes = ppo.Sizes()
    with torch.device("meta"):
        large = LlamaForCausalLM(ppo_models.config(sizes.width, sizes.layers, sizes.vocabulary))
    assert sum(weight.numel() for weight in large.parameters()) >= 50_000_000
    ppo_models.policy(ppo_models.config(width=64, layers=2, vocabulary=4096), tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    with torch.inference_mode():
        next_ = model(torch.randint(ppo_models.SPECIAL, 4096, (8, 20))).logits.softmax(-1).mean(dim=(0, 1))
    assert 0.5 < next_[ppo_models.END] / ppo_models.ENDS < 2
    assert next_[ppo_models.PAD] < 1e-6
    assert next_.topk(100).values.sum() > 0.3, "tokens are as unequal as words are"


def test_sides_are_compared_by_their_best_speed_their_least_memory_and_their_last_rewards() -> None:
    def run(seconds: float, peak: float, reward: float) -> dict[str, Any]:
        return {"seconds": [9.0, seconds, seconds], "peak": peak, "rewards": [0.0, 1.0, reward], "kl": [0.0, 1.0, 2.0]}

    sizes = ppo.Sizes(batch=6, updates=3)
    figures = ppo.summary([run(2.0, 3e6, 4.0), run(3.0, 2e6, 5.0)], sizes)
    assert figures["episodes_per_s"] == 3.0
    assert figures["peak_mb"] == 2.0
    assert figures["final_rewards"] == [4.0, 5.0]
    assert figures["final_kl"] == [2.0, 2.0]
    difference = ppo.reward_difference([4.0, 5.0, 6.0], [1.0, 2.0, 3.0])
    assert difference is not None
    assert difference["mean"] == 3.0
    # 3 ± t(0.975, 4 degrees of freedom) sqrt(1/3 + 1/3)
    np.testing.assert_allclose(difference["interval"], [3 - 2.776445 * 0.816497, 3 + 2.776445 * 0.816497], rtol=1e-5)
    assert ppo.reward_difference([1.0], [2.0]) is None
