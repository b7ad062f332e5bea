"""Training on two real ranks, with DeepSpeed and without, computes what one process does and saves gathered weights.

One pair of ranks (`rank_pair.py`) serves the whole file: `make test` keeps the tests of a file on one worker.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pair import Pair, reinforced
from safetensors.torch import load_file
from tiny_models import Tiny
from training_stages import CPU, Steps, rows_for, run_stage, trained, write_inputs

from cai.contracts.model import Model
from cai.models.chat import Chat
from cai.models.loading import load_causal_lm, load_sequence_classifier
from cai.storage import stopping
from cai.text.errors import StageFailed
from cai.training.loop import newest_resume_point
from cai.training.metrics import read_metrics
from cai.training.tokenised_rows import tokenise_pairs

pytest.importorskip("deepspeed")

LAUNCHED = ("cpu-2-ranks", "cpu-2-ranks-zero2", "cpu-2-ranks-zero3")
"""Accelerate files of two ranks: nothing, optimizer state and gradients, or parameters too are partitioned."""
STEPS = 10
ADAPTER = {"lora": {"rank": 4}}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair") / "log.txt")
    yield pair
    pair.stop()


def settings(**fields: Any) -> dict[str, Any]:
    return {"train": {"max_steps": STEPS, "learning_rate": 1e-3, "save_strategy": "no"}, **fields}


def answers_of(pair: Pair, profile: str, kind: str, folder: Path, model: Model, **job: Any) -> list[dict[str, Any]]:
    write_inputs(folder, {} if kind in {"ppo", "rloo"} else {"rows": rows_for(kind)})
    return pair.run(profile, kind=kind, folder=str(folder), model=model.path, **{"config": settings(), **job})


def train(*where: Any, **job: Any) -> dict[str, Any]:
    """The figures of a stage that no rank fails in."""
    answers = answers_of(*where, **job)
    assert all(answer.keys() == {"figures"} for answer in answers), answers
    figures: dict[str, Any] = answers[0]["figures"]
    return figures


def train_until(stop_at: int, pair: Pair, profile: str, kind: str, folder: Path, model: Model, **job: Any) -> None:
    """Trains a stage that is asked to stop at this step, so that `train` can continue it."""
    answers = answers_of(pair, profile, kind, folder, model, stop_at=stop_at, **job)
    assert [answer.get("error") for answer in answers] == ["Terminated"] * 2, answers
    (folder / stopping.STOP).unlink()


def tensors(folder: Path) -> dict[str, Any]:
    [file] = (folder / "model").glob("*.safetensors")
    return dict(load_file(file))


def assert_close_weights(weights: dict[str, Any], expected: dict[str, Any], profile: str) -> None:
    shapes, expected_shapes = ({name: weight.shape for name, weight in w.items()} for w in (weights, expected))
    assert shapes == expected_shapes
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-4, rtol=1e-3, msg=f"{profile}: {name}")


@pytest.mark.parametrize("changes", [{}, ADAPTER], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_two_ranks_learn_what_one_with_twice_the_accumulation_does_under_every_stage_of_zero(
    kind: str, changes: dict[str, Any], pair: Pair, tmp_path: Path, tiny: Tiny
) -> None:
    start = tiny("llama")
    figures = run_stage(kind, tmp_path / "one", rows_for(kind), start, **settings(**changes))
    single_process = read_metrics(tmp_path / "one")
    assert len([entry for entry in single_process if "loss" in entry]) == STEPS
    weights = tensors(tmp_path / "one")
    for profile in LAUNCHED:
        folder = tmp_path / profile
        figures_of_two = train(pair, profile, kind, folder, start, config=settings(**changes))
        for entry, expected in zip(read_metrics(folder), single_process, strict=True):
            assert entry.keys() == expected.keys()
            # TRL's other metrics are means over micro-batches, which differ here.
            for name in {"loss", "eval_loss", "learning_rate"} & entry.keys():
                assert entry[name] == pytest.approx(expected[name], abs=1e-4), (profile, name)
            for name in {"grad_norm", "eval_reward/margin", "log_prob/chosen"} & entry.keys():
                assert entry[name] == pytest.approx(expected[name], rel=1e-3), (profile, name)
        assert close(figures_of_two, figures), profile
        assert_close_weights(tensors(folder), weights, profile)


@pytest.mark.parametrize("changes", [{}, ADAPTER, {"critic": "", "lora": None}], ids=["full", "lora", "critic"])
def test_ppo_on_two_ranks_learns_what_one_does(changes: dict[str, Any], pair: Pair, tmp_path: Path, tiny: Tiny) -> None:
    config = {"rollouts": 3, "rollout_size": 16, "train": {"learning_rate": 1e-3, "save_strategy": "no"}, **changes}
    start = tiny("llama")
    (tmp_path / "one").mkdir()
    tokens = reinforced("ppo", tmp_path / "one", start, CPU, Steps(), config)["tokens"]
    single_process, weights = read_metrics(tmp_path / "one"), tensors(tmp_path / "one")
    assert len(single_process) == 12
    for profile in LAUNCHED if "critic" not in changes else LAUNCHED[-1:]:
        folder = tmp_path / profile
        assert train(pair, profile, "ppo", folder, start, config=config)["tokens"] == tokens  # of both ranks
        for mine, theirs in zip(read_metrics(folder), single_process, strict=True):
            assert mine.keys() == theirs.keys()
            for name in mine.keys() - {"grad_norm"}:  # the policy's ratio among them
                assert mine[name] == pytest.approx(theirs[name], abs=1e-4), (profile, mine["step"], name)
        assert (folder / "samples.jsonl").read_text().count("\n") == 24
        assert_close_weights(tensors(folder), weights, profile)


def test_ppo_runs_in_bfloat16_under_zero_3(pair: Pair, tmp_path: Path, tiny: Tiny) -> None:
    config = {"rollouts": 1, "rollout_size": 16, "train": {"learning_rate": 1e-3, "save_strategy": "no"}}
    train(pair, "cpu-2-ranks-zero3", "ppo", tmp_path / "stage", tiny("llama"), config=config, dtype="bfloat16")
    assert {weight.dtype for weight in tensors(tmp_path / "stage").values()} == {torch.bfloat16}
    assert len(read_metrics(tmp_path / "stage")) == 4


def test_rloo_on_two_ranks_learns_what_one_does(pair: Pair, tmp_path: Path, tiny: Tiny) -> None:
    config = {"n": 2, "train": {"learning_rate": 1e-3, "save_strategy": "no", "num_train_epochs": 2}}
    start = tiny("llama")
    (tmp_path / "one").mkdir()
    reinforced("rloo", tmp_path / "one", start, CPU, Steps(), config)
    single_process = read_metrics(tmp_path / "one")
    assert len(single_process) == 6
    for profile in LAUNCHED:
        train(pair, profile, "rloo", tmp_path / profile, start, config=config)
        for mine, theirs in zip(read_metrics(tmp_path / profile), single_process, strict=True):
            for name in ("loss", "reward", "kl", "length"):
                assert mine[name] == pytest.approx(theirs[name], abs=1e-4), (profile, mine["step"], name)
    where = (pair, "cpu-2-ranks", "rloo", tmp_path / "stopped", start)
    train_until(4, *where, config=config)  # in the second epoch, which has its own order of prompts
    train(*where, config=config)
    for mine, theirs in zip(read_metrics(tmp_path / "stopped"), read_metrics(tmp_path / "cpu-2-ranks"), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-6)


def test_rloo_stopped_between_passes_is_refused_on_fewer_ranks(pair: Pair, tmp_path: Path, tiny: Tiny) -> None:
    config = {"n": 2, "train": {"learning_rate": 1e-3, "save_strategy": "no", "num_iterations": 2}}
    train_until(3, pair, "cpu-2-ranks", "rloo", tmp_path / "stopped", tiny("llama"), config=config)
    with pytest.raises(StageFailed) as alone:
        reinforced("rloo", tmp_path / "stopped", tiny("llama"), CPU, Steps(), config)
    assert str(alone.value) == (
        "checkpoint-3 lies between two passes over responses that 2 processes share, and cannot be continued by 1: "
        "use a profile with as many as before, or start the stage again with `--from`"
    )


@pytest.mark.parametrize("changes", [{}, ADAPTER], ids=["full", "lora"])
def test_ppo_stopped_in_a_rollout_continues(changes: dict[str, Any], pair: Pair, tmp_path: Path, tiny: Tiny) -> None:
    options = {"learning_rate": 1e-3, "save_strategy": "no", "kl_target": 0.01}
    config = {"rollouts": 2, "rollout_size": 16, "train": options, **changes}
    train_until(3, pair, "cpu-2-ranks-zero3", "ppo", tmp_path / "stopped", tiny("llama"), config=config)
    for name in ("undisturbed", "stopped"):
        train(pair, "cpu-2-ranks-zero3", "ppo", tmp_path / name, tiny("llama"), config=config)
    mine, theirs = read_metrics(tmp_path / "stopped"), read_metrics(tmp_path / "undisturbed")
    assert len(mine) == 8
    for first, second in zip(mine, theirs, strict=True):
        assert first == pytest.approx(second, abs=1e-6)
    samples = [(tmp_path / name / "samples.jsonl").read_bytes() for name in ("stopped", "undisturbed")]
    assert samples[0] == samples[1]
    resumed, undisturbed = (load_causal_lm(trained(tmp_path / name)) for name in ("stopped", "undisturbed"))
    for (name, first), second in zip(resumed.named_parameters(), undisturbed.parameters(), strict=True):
        torch.testing.assert_close(first, second, msg=name)


def close(mine: Any, theirs: Any) -> bool:
    """Whether two trees of figures are equal, numbers up to rounding."""
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(close(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, list):
        return len(mine) == len(theirs) and all(map(close, mine, theirs))
    return bool(mine == pytest.approx(theirs, abs=1e-3))


@pytest.mark.parametrize(
    ("profile", "kind", "changes"), [("cpu-2-ranks-zero2", "sft", {}), ("cpu-2-ranks-zero3", "dpo", ADAPTER)]
)
def test_stopped_after_a_step_the_same_number_of_ranks_continues_with_the_same_losses(
    profile: str, kind: str, changes: dict[str, Any], pair: Pair, tmp_path: Path, tiny: Tiny
) -> None:
    config = settings(**changes)
    train(pair, profile, kind, tmp_path / "undisturbed", tiny("llama"), config=config)
    folder = tmp_path / "stopped"
    train_until(5, pair, profile, kind, folder, tiny("llama"), config=config)
    resume = newest_resume_point(folder)
    assert resume.name == "checkpoint-5"
    assert len(read_metrics(folder)) == 5
    train(pair, profile, kind, folder, tiny("llama"), config=config)
    for mine, theirs in zip(read_metrics(folder), read_metrics(tmp_path / "undisturbed"), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-6)
    for name, weight in tensors(folder).items():
        torch.testing.assert_close(weight, tensors(tmp_path / "undisturbed")[name])


def test_another_number_of_ranks_continues_or_is_refused(pair: Pair, tmp_path: Path, tiny: Tiny) -> None:
    start = tiny("llama")
    run_stage("sft", tmp_path / "undisturbed", rows_for("sft"), start, **settings())
    for profile in ("cpu-2-ranks", "cpu-2-ranks-zero3"):
        train_until(5, pair, profile, "sft", tmp_path / profile, start)
    refused = (
        "stage 'stage' stands at checkpoint-5, which was written by 2 processes under DeepSpeed ZeRO-3 and cannot be "
        "continued by {}: use a profile with as many as before, or start the stage again with `--from stage`"
    )
    with pytest.raises(StageFailed) as alone:
        run_stage("sft", tmp_path / "cpu-2-ranks-zero3", rows_for("sft"), start, **settings())
    assert str(alone.value) == refused.format("1 process without DeepSpeed")
    for answer in answers_of(pair, "cpu-2-ranks-zero2", "sft", tmp_path / "cpu-2-ranks-zero3", start):
        assert answer == {"error": "StageFailed", "message": refused.format("2 processes under DeepSpeed ZeRO-2")}
    run_stage("sft", tmp_path / "cpu-2-ranks", rows_for("sft"), start, **settings())
    undisturbed, resumed = read_metrics(tmp_path / "undisturbed"), read_metrics(tmp_path / "cpu-2-ranks")
    assert [entry["loss"] for entry in resumed] == pytest.approx([entry["loss"] for entry in undisturbed], abs=1e-4)


def test_zero_3_saves_a_gathered_model_that_computes_what_ranks_did(pair: Pair, tmp_path: Path, tiny: Tiny) -> None:
    start = tiny("qwen2")  # its embeddings need not grow
    train(pair, "cpu-2-ranks-zero3", "sft", tmp_path / "policy", start)
    before = dict(load_file(Path(start.path) / "model.safetensors"))
    trained_weights = tensors(tmp_path / "policy")
    shapes = {name: (weight.shape, weight.dtype) for name, weight in trained_weights.items()}
    assert shapes == {name: (weight.shape, weight.dtype) for name, weight in before.items()}
    assert any(not torch.equal(weight, before[name]) for name, weight in trained_weights.items())

    train(pair, "cpu-2-ranks-zero3", "reward", tmp_path / "reward", tiny("llama"))
    held_out = rows_for("reward")[24:]
    pairs, _ = tokenise_pairs(held_out, Chat.load(tiny("llama")), 256)
    model = load_sequence_classifier(trained(tmp_path / "reward"))
    for line, row in zip((tmp_path / "reward" / "evaluation.jsonl").read_text().splitlines(), pairs, strict=True):
        for side, ids in (("chosen", row.chosen_ids), ("rejected", row.rejected_ids)):
            with torch.no_grad():
                score = float(model(input_ids=torch.tensor([row.prompt_ids + ids])).logits)
            assert json.loads(line)[f"{side}_score"] == pytest.approx(score, abs=1e-4)


def test_under_zero_3_a_stage_starts_from_an_adapter(pair: Pair, tmp_path: Path, tiny: Tiny) -> None:
    kind = "reward"  # which also loads the body of a language model under the adapter
    config = {"train": {"max_steps": 2, "learning_rate": 1e-3, "save_strategy": "no"}}
    run_stage(kind, tmp_path / "one", rows_for(kind), tiny("lora"), **config)
    train(pair, "cpu-2-ranks-zero3", kind, tmp_path / "two", tiny("lora"), config=config)
    single_process, two_ranks = ([entry["loss"] for entry in read_metrics(tmp_path / name)] for name in ("one", "two"))
    assert two_ranks == pytest.approx(single_process, abs=1e-4)


def test_the_profile_and_not_the_accelerate_file_says_the_precision(pair: Pair, tmp_path: Path, tiny: Tiny) -> None:
    run_stage("dpo", tmp_path / "one", rows_for("dpo"), tiny("llama"), **settings())
    # The file says `mixed_precision: 'no'`.
    train(pair, "cpu-2-ranks-zero3", "dpo", tmp_path / "two", tiny("llama"), dtype="bfloat16")
    assert {weight.dtype for weight in tensors(tmp_path / "two").values()} == {torch.bfloat16}
    float32, bfloat16 = (
        [entry["loss"] for entry in read_metrics(tmp_path / name) if "loss" in entry] for name in ("one", "two")
    )
    assert bfloat16 == pytest.approx(float32, rel=0.05)
