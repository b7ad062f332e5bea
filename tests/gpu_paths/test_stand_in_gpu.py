"""Engine `local` on a device that is not the CPU: no tensors of two devices meet, and the answers are the CPU's."""

from __future__ import annotations

import pytest
import torch
from local_engines import assert_same_choices, judge_questions, local_engine
from stand_in_gpu import DEVICE, MixedDevices, StandInGpu
from tiny_models import Tiny
from training_stages import CPU

from cai.contracts.engine import Completion, Request, Sampling
from cai.engines.local.local_engine import LocalEngine
from cai.models.loading import load_causal_lm


def requests() -> list[Request]:
    """Prompts of several lengths and two samples of one, greedy and from a nucleus."""
    prompts = ["What is it?", "What is it?", "How deep is the sea, and who told you so? " * 2, "Why?"]
    samplings = [Sampling(max_new_tokens=16, temperature=0), Sampling(max_new_tokens=8, top_p=0.9)]
    return [
        Request(f"{number}-{n}", [{"role": "user", "content": prompt}], n, sampling)
        for number, sampling in enumerate(samplings)
        for n, prompt in enumerate(prompts)
    ]


def completions(engine: LocalEngine) -> dict[str, list[int]]:
    results = list(engine.generate(requests()))
    assert all(isinstance(result, Completion) for result in results), results
    return {result.id: result.token_ids for result in results if isinstance(result, Completion)}


@pytest.mark.parametrize(("family", "shares_prefixes"), [("llama", None), ("qwen2", False)])
def test_the_engine_answers_there_as_on_the_cpu(family: str, shares_prefixes: bool | None, tiny: Tiny) -> None:
    cpu = local_engine(tiny(family), shares_prefixes=shares_prefixes)
    expected_ids, expected_choices = completions(cpu), list(cpu.choose(judge_questions(2)))
    model = load_causal_lm(tiny(family))
    with StandInGpu() as gpu:
        gpu.put(model)
        engine = LocalEngine(tiny(family), CPU, model)
        if shares_prefixes is not None:
            engine.__dict__["_shares_prefixes"] = shares_prefixes
        assert completions(engine) == expected_ids
        assert_same_choices(engine.choose(judge_questions(2)), expected_choices)
    assert shares_prefixes is False or engine._shares_prefixes
    assert gpu.operations


def test_tensors_of_two_devices_do_not_meet() -> None:
    with StandInGpu():
        on_gpu = torch.ones(3, device=DEVICE)
        for operation in (torch.add, torch.dot, lambda a, b: torch.cat([a, b])):
            with pytest.raises(MixedDevices):
                operation(on_gpu, torch.ones(3))
        assert (on_gpu + torch.ones(())).device == DEVICE  # as on a GPU, a number may come from the CPU
        assert (on_gpu.cpu() + torch.ones(3)).tolist() == [2.0] * 3
