"""Two ranks under DeepSpeed with what GPU profiles set: bfloat16, gradient checkpointing, padded rows, TRL's head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_paths
import pytest
import torch
from rank_pair import Pair, reinforced
from safetensors.torch import load_file
from tiny_models import Tiny
from training_stages import CPU, Steps, rows_for, run_stage, write_inputs

from cai.contracts.model import Model
from cai.models.loading import load_causal_lm
from cai.models.reference import resolve
from cai.training.metrics import read_metrics

pytest.importorskip("deepspeed")

ZERO = ("cpu-2-ranks-zero2", "cpu-2-ranks-zero3")
ADAPTER = {"lora": {"rank": 4}}
TRAIN = {"max_steps": 3, "learning_rate": 1e-3, "save_strategy": "no"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair") / "log.txt")
    yield pair
    pair.stop()


def train(pair: Pair, profile: str, kind: str, folder: Path, model: Model, **job: Any) -> list[dict[str, Any]]:
    """The metrics of a stage in bfloat16 that no rank fails in."""
    write_inputs(folder, {} if kind in {"ppo", "rloo"} else {"rows": rows_for(kind)})
    answers = pair.run(profile, kind=kind, folder=str(folder), model=model.path, **gpu_paths.GPU_SETTINGS, **job)
    assert all(answer.keys() == {"figures"} for answer in answers), (profile, answers)
    return read_metrics(folder)


def weight_dtypes(folder: Path) -> set[torch.dtype]:
    [file] = (folder / "model").glob("*.safetensors")
    return {weight.dtype for weight in load_file(file).values()}


def assert_weights_have_changed(folder: Path, start: Model) -> None:
    """Fails where the stage's model has the weights of its start, both in bfloat16 with adapters merged."""
    trained = resolve(str(folder / "model"), folder=folder)
    weights, start_weights = (load_causal_lm(model, "bfloat16").state_dict() for model in (trained, start))
    assert weights.keys() == start_weights.keys()
    assert any(not torch.equal(weight, start_weights[name]) for name, weight in weights.items())


@pytest.mark.parametrize("start", ["llama", "lora"])
@pytest.mark.parametrize("changes", [{}, ADAPTER], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_losses_are_those_of_one_process_in_float32_up_to_rounding(
    kind: str, changes: dict[str, Any], start: str, pair: Pair, tmp_path: Path, tiny: Tiny
) -> None:
    config = {"train": TRAIN, **changes}
    run_stage(kind, tmp_path / "one", rows_for(kind), tiny(start), **config)
    expected = [entry["loss"] for entry in read_metrics(tmp_path / "one") if "loss" in entry]
    for profile in ZERO if start == "llama" else ZERO[1:]:
        metrics = train(pair, profile, kind, tmp_path / profile, tiny(start), config=config)
        losses = [entry["loss"] for entry in metrics if "loss" in entry]
        assert losses == pytest.approx(expected, rel=0.05), profile
        assert weight_dtypes(tmp_path / profile) == {torch.bfloat16}, profile


@pytest.mark.parametrize(
    ("start", "changes"),
    [
        ("llama", {}),
        ("llama", ADAPTER),
        ("llama", {"critic": "critic"}),
        ("llama", {"critic": "critic", **ADAPTER}),
        ("lora", {}),
        ("lora", {"critic": "critic"}),
    ],
    ids=["full", "lora", "critic", "lora-critic", "from-an-adapter", "from-an-adapter-critic"],
)
def test_ppo_learns_from_the_same_policy_reference_and_values(
    start: str, changes: dict[str, Any], pair: Pair, tmp_path: Path, tiny: Tiny
) -> None:
    options = {"learning_rate": 1e-3, "save_strategy": "no"}
    config = {"rollouts": 2, "rollout_size": 16, "train": options, **changes}
    (tmp_path / "one").mkdir()
    named = {"critic": tiny("llama")}
    reinforced("ppo", tmp_path / "one", tiny(start), CPU, Steps(), {"named": named, **config})
    first_step = read_metrics(tmp_path / "one")[0]
    for profile in ZERO[1:] if "critic" in changes or start == "lora" else ZERO:
        paths = {name: model.path for name, model in named.items()}
        metrics = train(pair, profile, "ppo", tmp_path / profile, tiny(start), config=config, named=paths)
        assert len(metrics) == 8
        assert all(math.isfinite(value) for entry in metrics for value in entry.values())
        first = metrics[0]
        assert abs(first["kl"]) < 0.5, "the reference is the policy before its first step"
        assert first["sampler_gap"] < 0.1, "the sampler has the policy's weights"
        assert first["policy/entropy"] == pytest.approx(first_step["policy/entropy"], rel=0.1)
        assert_weights_have_changed(tmp_path / profile, tiny(start))


@pytest.mark.parametrize(("start", "changes"), [("llama", {}), ("llama", ADAPTER), ("lora", {})])
def test_rloo_learns_from_the_same_policy_and_reference(
    start: str, changes: dict[str, Any], pair: Pair, tmp_path: Path, tiny: Tiny
) -> None:
    config = {"n": 2, "train": {"learning_rate": 1e-3, "save_strategy": "no"}, **changes}
    for profile in ZERO if start == "llama" else ZERO[1:]:
        metrics = train(pair, profile, "rloo", tmp_path / profile, tiny(start), config=config)
        assert len(metrics) == 3
        assert abs(metrics[0]["kl"]) < 0.5, "the reference is the policy before its first step"
        assert_weights_have_changed(tmp_path / profile, tiny(start))
