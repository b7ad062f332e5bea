"""Training on two real ranks, with DeepSpeed and without, computes what one process does; what it leaves is whole.

One pair of ranks (`pair.py`) serves the whole file, so its tests stay together on one worker.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import training_stages
from pair import Pair
from safetensors.torch import load_file
from training_stages import preference, run_stage, sample, write_inputs

from cai import stopping
from cai.checkpoint import Model, load_causal_lm, load_sequence_classifier
from cai.training import newest_checkpoint

torch = pytest.importorskip("torch")
pytest.importorskip("deepspeed")
pytestmark = pytest.mark.xdist_group("two ranks")

LAUNCHED = ("cpu-2-ranks", "cpu-2-ranks-zero2", "cpu-2-ranks-zero3")
"""Accelerate files of two ranks: none, the optimizer's state and gradients, or the parameters too are parted."""
STEPS = 10
ADAPTER = {"lora": {"rank": 4}}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair") / "log.txt")
    yield pair
    pair.stop()


def rows_for(kind: str) -> list[dict[str, Any]]:
    """24 rows to learn from, three whole steps; nine pairs are held out."""
    if kind == "sft":
        return [sample(number) for number in range(24)]
    held_out = [preference(number, p=0.8, tags=["held_out"]) for number in range(30, 39)]
    return [preference(number, p=0.6 + 0.4 * (number % 3) / 2) for number in range(24)] + held_out


def settings(**more: Any) -> dict[str, Any]:
    return {"train": {"max_steps": STEPS, "learning_rate": 1e-3, "save_steps": 4}, **more}


def train(pair: Pair, profile: str, kind: str, folder: Path, model: Model, **more: Any) -> list[dict[str, Any]]:
    write_inputs(folder, {"rows": rows_for(kind)})
    return pair.run(profile, kind=kind, folder=str(folder), model=model.path, **{"config": settings(), **more})


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tensors(folder: Path) -> dict[str, Any]:
    [file] = (folder / "model").glob("*.safetensors")
    return dict(load_file(file))


@pytest.mark.parametrize("more", [{}, ADAPTER], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_two_ranks_learn_what_one_with_twice_the_accumulation_does_under_every_stage_of_zero(
    kind: str, more: dict[str, Any], pair: Pair, tmp_path: Path, tiny: Callable[..., Model]
) -> None:
    start = tiny("llama")
    figures = run_stage(kind, tmp_path / "one", rows_for(kind), start, **settings(**more))
    one = metrics(tmp_path / "one")
    assert len([entry for entry in one if "loss" in entry]) == STEPS
    weights = tensors(tmp_path / "one")
    for profile in LAUNCHED:
        folder = tmp_path / profile
        first, second = train(pair, profile, kind, folder, start, config=settings(**more))
        assert second.keys() == {"figures"}, second
        for mine, theirs in zip(metrics(folder), one, strict=True):
            assert mine.keys() == theirs.keys()
            # What else TRL logs is a mean over micro-batches, and these are others.
            for name in {"loss", "eval_loss", "learning_rate"} & mine.keys():
                assert mine[name] == pytest.approx(theirs[name], abs=1e-4), (profile, name)
            for name in {"grad_norm", "eval_reward/margin", "log_prob/chosen"} & mine.keys():
                assert mine[name] == pytest.approx(theirs[name], rel=1e-3), (profile, name)
        assert close(first["figures"], figures), profile
        left = tensors(folder)
        assert {name: each.shape for name, each in left.items()} == {n: each.shape for n, each in weights.items()}
        for name, each in left.items():
            torch.testing.assert_close(each, weights[name], atol=1e-4, rtol=1e-3, msg=f"{profile}: {name}")


def close(mine: Any, theirs: Any) -> bool:
    """Whether two trees of figures are equal, numbers up to rounding."""
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(close(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, list):
        return len(mine) == len(theirs) and all(map(close, mine, theirs))
    return bool(mine == pytest.approx(theirs, abs=1e-3))
