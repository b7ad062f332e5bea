"""What TRL 1.12.0's PPO computes, stored in data/trl-ppo.safetensors: rollouts, and the losses that it made of them.

That version was TRL's last with PPO. It needs an environment of its own, whose interpreter writes the file anew:

    python -m venv ENVIRONMENT && ENVIRONMENT/bin/pip install torch==2.13.0 trl==1.12.0 transformers==5.23.0
    OMP_NUM_THREADS=1 ENVIRONMENT/bin/python tests/support/trl_ppo.py

TRL's maths is in the middle of `PPOTrainer.train`, so the trainer itself trains three tiny Llamas for one update, and
the functions that it calls are wrapped to record their arguments and results. `stored` reads these, and `model` gives
the models as they were before the update, to compute log-probabilities from.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:  # the other interpreter has no cai
    from cai.training.rl.rollouts import Episode

FILE = Path(__file__).with_name("data") / "trl-ppo.safetensors"
PAD, BOS, END = 0, 1, 2
BATCH, QUERY, RESPONSE, MINIBATCHES, EPOCHS = 16, 5, 8, 2, 2
LLAMA = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 32, "initializer_range": 0.4, "pad_token_id": PAD, "bos_token_id": BOS,
    "eos_token_id": END,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    # No end token: every response has RESPONSE tokens.
    "whole": {"kl_estimator": "k1", "temperature": 1.0, "kl_coef": 0.2},
    "ended": {"kl_estimator": "k3", "temperature": 0.7, "kl_coef": 0.1, "stop_token": "eos",
              "missing_eos_penalty": 1.0, "gamma": 0.98},
    "whitened": {"kl_estimator": "k1", "temperature": 0.7, "kl_coef": 0.1, "stop_token": "eos",
                 "whiten_rewards": True},
}  # fmt: skip
"""Settings of TRL's by case, beside those that all share (`_arguments`)."""


@dataclass(frozen=True)
class Rollouts:
    """One update by TRL: what it sampled, and what it computed from that.

    Rows of `token_ids` are a prompt, padded on the left to `QUERY`, and a response, padded on the right. The other
    tensors are (batch, seq) over the responses, as the models gave them, padding included. Those that begin with
    `step_` have another dimension before, the minibatches in their order, whose rows `step_rows` names.
    """

    settings: dict[str, Any]
    """Of PPOConfig: gamma, lam, cliprange, cliprange_value, kl_coef, kl_estimator, temperature and others."""
    logged: dict[str, float]
    """What TRL logged, under its own names."""
    token_ids: Tensor
    log_probs: Tensor
    ref_log_probs: Tensor
    values: Tensor
    scores: Tensor
    """(batch,) of the reward model, before the penalty for a missing end is subtracted"""
    whitened_rewards: Tensor
    """empty where rewards were not whitened"""
    advantages: Tensor
    """not yet whitened"""
    whitened_advantages: Tensor
    step_rows: Tensor
    step_log_probs: Tensor
    step_values: Tensor
    policy_losses: Tensor
    """(minibatches,), as are the other three"""
    value_losses: Tensor
    policy_clipped: Tensor
    value_clipped: Tensor

    @property
    def mask(self) -> Tensor:
        """(batch, seq), true at a response's tokens, the end token among them."""
        return self.token_ids[:, QUERY:] != PAD

    @property
    def mask_and_one_more(self) -> Tensor:
        """The mask with the column behind each response's last token, where TRL puts the score and reads a value."""
        mask = self.mask
        return torch.cat([mask[:, :1], mask[:, :-1]], dim=1)


def stored(case: str) -> Rollouts:
    """The rollouts of one of `CASES`."""
    with safe_open(FILE, "pt") as file:
        facts = json.loads(file.metadata()["facts"])[case]
    return Rollouts(**facts, **_stored_tensors(case))


def _stored_tensors(prefix: str) -> dict[str, Tensor]:
    with safe_open(FILE, "pt") as file:
        names = [name for name in file.keys() if name.startswith(f"{prefix}.")]  # noqa: SIM118 - it is no dictionary
        return {name.partition(".")[2]: file.get_tensor(name) for name in names}


def episodes(case: str) -> list[Episode]:
    """The stored responses as the stage `ppo` has them after a rollout, without advantages."""
    from cai.training.rl.rollouts import Episode

    theirs = stored(case)
    ended = (theirs.token_ids[:, QUERY:] == END).any(dim=1).tolist()
    episode_list = []
    for row, (ids, length) in enumerate(zip(theirs.token_ids, theirs.mask.sum(dim=1).tolist(), strict=True)):
        prompt = ids[:QUERY]
        episode = Episode(
            prompt_id=str(row), prompt_ids=prompt[prompt != PAD].tolist(),
            token_ids=ids[QUERY : QUERY + length].tolist(), text="", finished=ended[row], sampled_log_probs=[],
            score=theirs.scores[row].item(),
        )  # fmt: skip
        for name in ("log_probs", "ref_log_probs", "values"):
            setattr(episode, name, getattr(theirs, name)[row, :length].clone())
        episode_list.append(episode)
    return episode_list


def model(role: str) -> Any:
    """TRL's policy, reference, value or reward model before the update; the last two are sequence classifiers."""
    built = _built(role)
    built.load_state_dict(_stored_tensors(role))
    return built.eval()


def _built(role: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    if role in {"policy", "reference"}:
        return LlamaForCausalLM(LlamaConfig(**LLAMA))
    return LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=1))


def _initial_models() -> dict[str, Any]:
    """The four models. The reference is the policy, changed a little."""
    torch.manual_seed(0)
    models = {role: _built(role) for role in ("policy", "reference", "value", "reward")}
    policy = models["policy"]
    with torch.no_grad():
        # A feature that all tokens share gives two of them a bias: pad is never sampled, and the end token sometimes.
        policy.model.embed_tokens.weight[:, 0] = 2.0
        policy.model.layers[0].self_attn.o_proj.weight[0] = policy.model.layers[0].mlp.down_proj.weight[0] = 0.0
        policy.lm_head.weight[[PAD, END]] = 0.0
        policy.lm_head.weight[PAD, 0], policy.lm_head.weight[END, 0] = -20.0, 2.0
        models["reference"].load_state_dict(policy.state_dict())
        for weight in models["reference"].lm_head.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return models


def _arguments(folder: str) -> dict[str, Any]:
    """Settings that all cases share. At this learning rate the second epoch leaves the clipping range."""
    return {
        "output_dir": folder, "per_device_train_batch_size": BATCH, "num_mini_batches": MINIBATCHES,
        "num_ppo_epochs": EPOCHS, "total_episodes": BATCH, "response_length": RESPONSE, "learning_rate": 0.02,
        "num_sample_generations": 0, "save_strategy": "no", "report_to": "none", "bf16": False, "seed": 0,
        "local_rollout_forward_batch_size": BATCH, "lr_scheduler_type": "constant",
    }  # fmt: skip


@contextmanager
def _kept(module: Any) -> Iterator[dict[str, list[tuple[Any, Any]]]]:
    """(arguments, result) of each call of TRL's functions, by name, in order."""
    calls: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
    inside = False

    def kept(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **keywords: Any) -> Any:
            nonlocal inside
            if inside:  # whitening calls masked_mean too; only the losses' means are recorded
                return function(*arguments, **keywords)
            inside = True
            result = function(*arguments, **keywords)
            inside = False
            copied = (value.detach().clone() if isinstance(value, Tensor) else None for value in arguments)
            calls[name].append((tuple(copied), result))
            return result

        return called

    names = ("batch_generation", "selective_log_softmax", "get_reward", "forward", "masked_mean", "masked_whiten")
    wrapped = {name: kept(name, getattr(module, name)) for name in names}
    permutation = kept("permutation", module.np.random.permutation)
    with mock.patch.multiple(module, **wrapped), mock.patch.object(module.np.random, "permutation", permutation):
        yield calls


def _ran(case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One update by TRL: the facts of it, and the tensors that `Rollouts` has."""
    import numpy as np
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    vocabulary = Tokenizer(WordLevel({f"t{n}": n for n in range(LLAMA["vocab_size"])}, unk_token="t3"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="t0", bos_token="t1", eos_token="t2", padding_side="left"
    )
    models = _initial_models()
    np.random.seed(0)
    with tempfile.TemporaryDirectory() as folder, _kept(ppo_trainer) as calls:
        config = PPOConfig(**_arguments(folder), **case)
        random = np.random.default_rng(0)
        prompts = [[BOS, *random.integers(3, 24, size=size).tolist()] for size in random.integers(1, QUERY, size=BATCH)]
        prompts[0] = [BOS, 3, 4, 5, 6]
        trainer = PPOTrainer(
            args=config, processing_class=tokenizer, model=models["policy"], ref_model=models["reference"],
            reward_model=models["reward"], value_model=models["value"],
            train_dataset=Dataset.from_dict({"input_ids": prompts}),
        )  # fmt: skip
        trainer.train()
    names = (
        "gamma", "lam", "cliprange", "cliprange_value", "vf_coef", "kl_coef", "kl_estimator", "temperature",
        "learning_rate", "missing_eos_penalty", "whiten_rewards", "num_ppo_epochs", "num_mini_batches",
    )  # fmt: skip
    logged = {name: value for name, value in trainer.state.log_history[0].items() if "/" in name}
    facts = {"settings": {name: getattr(config, name) for name in names}, "logged": logged}
    return facts, _tensors(calls, config.whiten_rewards)


def _tensors(calls: dict[str, list[tuple[Any, Any]]], whiten_rewards: bool) -> dict[str, Tensor]:
    """The tensors of `Rollouts` from the calls that TRL made in one update."""
    token_ids, _ = calls["batch_generation"][0][1]
    (_, (values, _, _)), (_, (_, scores, _)) = calls["get_reward"]
    log_probs = [result for _, result in calls["selective_log_softmax"]]
    whitening = calls["masked_whiten"]
    means = [result for _, result in calls["masked_mean"]]
    rows = torch.stack([torch.from_numpy(result) for _, result in calls["permutation"]])
    new_values = [result[1][:, QUERY - 1 : -1].squeeze(-1) for _, result in calls["forward"][1:]]
    tensors = {
        "token_ids": token_ids,
        "log_probs": log_probs[0],
        "ref_log_probs": log_probs[1],
        "values": values[:, QUERY - 1 : -1].squeeze(-1),
        "scores": scores,
        "whitened_rewards": whitening[0][1] if whiten_rewards else torch.zeros(0),
        "advantages": whitening[-1][0][0],
        "whitened_advantages": whitening[-1][1],
        "step_rows": rows.reshape(EPOCHS * MINIBATCHES, -1),
        "step_log_probs": torch.stack(log_probs[2:]),
        "step_values": torch.stack(new_values),
        "value_losses": 0.5 * torch.stack(means[0::4]),
        "value_clipped": torch.stack(means[1::4]),
        "policy_losses": torch.stack(means[2::4]),
        "policy_clipped": torch.stack(means[3::4]),
    }
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def main() -> None:
    """Writes the file. Runs under the interpreter of an environment with TRL 1.12.0."""
    from importlib.metadata import version

    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {"versions": {name: version(name) for name in ("torch", "transformers", "trl")}}
    for role, built in _initial_models().items():
        tensors |= {f"{role}.{name}": weight.clone() for name, weight in built.state_dict().items()}
    for case, settings in CASES.items():
        facts[case], case_tensors = _ran(settings)
        tensors |= {f"{case}.{name}": tensor for name, tensor in case_tensors.items()}
    FILE.parent.mkdir(exist_ok=True)
    save_file(tensors, FILE, metadata={"facts": json.dumps(facts)})


if __name__ == "__main__":
    main()
