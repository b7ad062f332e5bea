"""A base of 4 bits is refused before anything runs where a profile cannot train over it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from cai.contracts.profile import Profile, load_profile
from cai.run.plan import Options, selected_stages
from cai.run.recipe import load_recipe
from cai.text.errors import BadInput

RECIPE = """
name: quantised
model: micro
judge: micro
constitution: {constitution}
prompts:
  heldout: {{source: micro, split: test}}
stages:
  - {{id: responses, kind: sample, prompts: heldout}}
  - {{id: sl-cai, kind: sft, from: responses, lora: {{base: nf4}}}}
  - {{id: policy, kind: rloo, model: sl-cai, prompts: heldout, rewards: [{{judge: micro}}], lora: {{base: {base}}}}}
"""


def refusal(tmp_path: Path, profile: Profile, *, base: str = "nf4") -> str:
    """The sentence with which a run on that profile is refused; empty where it is not."""
    constitution = Path(__file__).parents[2] / "constitutions" / "micro.yaml"
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(constitution=constitution, base=base))
    try:
        selected_stages(load_recipe(path), Options(), profile)
    except BadInput as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ("cpu", "stage 'sl-cai': found `lora: {base: nf4}`, which needs a GPU, and profile 'cpu' has none"),
        ("8gpu-zero3", "ZeRO-3 of profile '8gpu-zero3' cannot partition such weights"),
        ("1gpu", "needs the package bitsandbytes: install `constitutional-ai[qlora]`"),
    ],
)
def test_a_profile_that_cannot_train_over_it_is_refused(
    profile: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    missing = lambda name, *rest: None if name == "bitsandbytes" else find_spec(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    assert words in refusal(tmp_path, load_profile(profile))


def test_with_the_package_and_a_gpu_it_is_planned_but_not_sampled_by_vllm(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name)
    gpu = load_profile("1gpu")
    assert refusal(tmp_path, gpu) == ""
    message = refusal(tmp_path, gpu.model_copy(update={"engine": "vllm"}))
    assert message.startswith("stage 'policy': found `lora: {base: nf4}`, but vLLM of profile '1gpu'")


def test_another_format_is_refused_with_its_position(tmp_path: Path) -> None:
    assert "recipe.yaml:11:" in (message := refusal(tmp_path, load_profile("1gpu"), base="int8"))
    assert "nf4" in message
