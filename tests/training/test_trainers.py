"""What the trainers rely on in TRL and transformers, private names included: an upgrade that moves it fails here.

The soft-label trainers are compared with TRL's own, on the same model and pairs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from accelerate import Accelerator
from tiny_models import Tiny
from training_stages import preference, stage_context
from transformers import Trainer
from transformers.modeling_layers import GenericForSequenceClassification
from trl.distributed import DistributedBackend
from trl.models.utils import prepare_deepspeed
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import add_fused_lm_head

from cai.contracts.model import Model
from cai.models.chat import Chat
from cai.models.loading import load_causal_lm, load_sequence_classifier
from cai.stages import config_class, dpo, reward
from cai.training import tokenised_rows, trainers
from cai.training.rl.rloo_trainer import join_parts, split_by_length
from cai.training.stage_training import stage_training
from cai.training.trainers import LengthSortedSteps, PromptSteps, SoftDPOTrainer, SoftRewardTrainer


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_private_names_of_trl_and_transformers_are_where_they_were() -> None:
    assert parameters(Trainer._get_train_sampler) == ["self", "train_dataset"]
    assert parameters(Trainer._get_num_items_in_batch) == ["self", "batch_samples", "device"]
    assert parameters(Trainer._save) == ["self", "output_dir", "state_dict"]
    assert "loss_is_scaled_for_ga" in inspect.getsource(Trainer.training_step)
    assert "return self._n_gpu" in inspect.getsource(trl.SFTConfig.n_gpu.fget)
    assert parameters(_BaseTrainer._send_telemetry) == ["self"]
    assert "self._send_telemetry()" in inspect.getsource(_BaseTrainer.__init__)
    assert _BaseTrainer.loss_is_scaled_for_ga is None
    for trainer in (trl.SFTTrainer, trl.RewardTrainer, trl.DPOTrainer):
        assert issubclass(trainer, _BaseTrainer)
        assert "self.create_model_card(" in inspect.getsource(trainer._save_checkpoint)
        assert "_signature_columns is None" in inspect.getsource(trainer._set_signature_columns_if_needed)
        assert parameters(trainer.compute_loss)[:4] == ["self", "model", "inputs", "return_outputs"]
    assert parameters(trl.DPOTrainer._prepare_dataset)[1:] == ["dataset", "processing_class", "args", "dataset_name"]
    assert parameters(trl.DPOTrainer.compute_ref_log_probs) == ["self", "model", "inputs"]


def test_dpo_still_computes_its_reference_and_its_metrics_as_it_did() -> None:
    source = inspect.getsource(trl.DPOTrainer)
    for piece in (
        "self.precompute_ref_logps = args.precompute_ref_log_probs",
        "self.compute_ref_log_probs(model, padded_batch)",
        "labels=labels, fused_lm_head=True",
        'self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}',
        "self.aux_loss_enabled =",
        "self.router_aux_loss_coef =",
    ):
        assert piece in source, piece


def test_transformers_scores_a_sequence_at_its_last_token_that_is_not_padding() -> None:
    source = inspect.getsource(GenericForSequenceClassification.forward)
    assert "non_pad_mask = (input_ids != self.config.get_text_config().pad_token_id)" in source
    assert "(token_indices * non_pad_mask).argmax(-1)" in source


def test_the_defaults_of_trl_that_the_stages_override_are_still_wrong_for_a_cpu() -> None:
    for config in (trl.SFTConfig, trl.RewardConfig, trl.DPOConfig):
        fields = config.__dataclass_fields__
        assert fields["gradient_checkpointing"].default is True
        assert fields["bf16"].default is None  # which becomes True


def test_a_step_holds_the_same_examples_sorted_by_length_and_an_epoch_every_example_once() -> None:
    lengths = [(7 * index) % 31 for index in range(50)]
    sampler = LengthSortedSteps(lengths, 8, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(50))
    assert first == list(sampler)
    for start in range(0, 50, 8):
        step = [lengths[index] for index in first[start : start + 8]]
        assert step == sorted(step, reverse=True)
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert sorted(sampler) == list(range(50))


def test_no_process_has_the_longest_examples_of_a_global_micro_batch() -> None:
    lengths = [index % 32 for index in range(84)]
    alone = list(LengthSortedSteps(lengths, 32, seed=3))
    shared = list(LengthSortedSteps(lengths, 32, seed=3, processes=2, accumulation=2))
    for start in range(0, 80, 16):
        assert sorted(shared[start : start + 16]) == sorted(alone[start : start + 16])
        sliced, dealt = ([lengths[index] for index in order[start : start + 16]] for order in (alone, shared))
        assert abs(sum(dealt[:8]) - sum(dealt[8:])) <= max(dealt) - min(dealt) < sum(sliced[:8]) - sum(sliced[8:])
    assert shared[80:] == alone[80:], "a last, smaller micro-batch keeps its order"
    ones = [lengths[index] for index in LengthSortedSteps(lengths, 8, seed=3, processes=2, accumulation=4)][:8]
    assert ones[0] >= ones[1] >= ones[3] >= ones[2] >= ones[4] >= ones[5] >= ones[7] >= ones[6]


def soft_trainer(kind: str, tmp_path: Path, model: Model, rows: list[dict[str, Any]]) -> tuple[Any, Any]:
    """The stage's trainer, its policy moved away from its reference, and the batch of all rows."""
    context = stage_context(tmp_path / "stage", {"rows": rows}, model)
    config = config_class(kind).model_validate({"id": "stage", "kind": kind, "from": "rows"})
    chat = Chat.load(model)
    pairs, _ = tokenised_rows.tokenise_pairs(rows, chat, 256)
    torch.manual_seed(0)
    with stage_training(config, context) as training:
        args = training.arguments(256, max_length=None)
        stage, load, collator_class, trainer_class = {
            "dpo": (dpo, load_causal_lm, trainers.LabelledDPOCollator, SoftDPOTrainer),
            "reward": (reward, load_sequence_classifier, trainers.LabelledRewardCollator, SoftRewardTrainer),
        }[kind]
        examples, loaded = [stage.trainer_row(pair) for pair in pairs], load(model)
        collator = collator_class(pad_token_id=chat.pad_id)
        reference = {"ref_model": load_causal_lm(model)} if kind == "dpo" else {}
        trainer = trainer_class(
            model=loaded, args=args, data_collator=collator, train_dataset=tokenised_rows.as_dataset(examples),
            processing_class=chat.tokenizer, **reference,
        )  # fmt: skip
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight += 0.02 * torch.randn_like(weight)
    return trainer, collator


def loss_of(trainer: Any, collator: Any, example: dict[str, Any]) -> float:
    return float(trainer.compute_loss(trainer.model, collator([example])))


def trl_loss_of(trainer: Any, collator: Any, example: dict[str, Any]) -> float:
    batch = collator([example])
    del batch["p_chosen"]
    return float(type(trainer).__mro__[3].compute_loss(trainer, trainer.model, batch))


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_soft_loss_is_expected_trl_loss(kind: str, tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    # TRL's loss reads outputs that the CPU head lacks.
    monkeypatch.setattr("cai.training.trainers.add_cpu_lm_head", lambda *_: None)
    labels = torch.rand(6, generator=torch.Generator().manual_seed(1)).tolist()
    rows = [preference(number, p=p) for number, p in enumerate(labels)]
    trainer, collator = soft_trainer(kind, tmp_path, tiny("llama"), rows)
    assert type(trainer).__mro__[3] in (trl.RewardTrainer, trl.DPOTrainer)
    trainer.model.eval()
    with torch.no_grad():
        for example in trainer.train_dataset:
            p = example["p_chosen"]
            swapped = {**example, "chosen_ids": example["rejected_ids"], "rejected_ids": example["chosen_ids"]}
            expected = p * trl_loss_of(trainer, collator, example) + (1 - p) * trl_loss_of(trainer, collator, swapped)
            assert loss_of(trainer, collator, example) == pytest.approx(expected, abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_the_gradient_changes_sign_with_the_label(kind: str, tmp_path: Path, tiny: Tiny) -> None:
    trainer, collator = soft_trainer(kind, tmp_path, tiny("llama"), [preference(1, p=0.9)])
    if kind == "dpo":
        trainer.ref_model.load_state_dict(trainer.model.state_dict())
        weight = trainer.model.get_output_embeddings().weight
    else:
        weight = trainer.model.score.weight
        torch.nn.init.zeros_(weight)
    gradients = []
    for p in (0.9, 0.1, 0.5):
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, collator([{**trainer.train_dataset[0], "p_chosen": p}])).backward()
        gradients.append(weight.grad.clone())
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(gradients[0], -gradients[1])
    assert gradients[2].abs().max() < 1e-6


def test_trl_sends_no_telemetry(tmp_path: Path, tiny: Tiny, monkeypatch: Any) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: pytest.fail("telemetry was sent"))
    soft_trainer("dpo", tmp_path, tiny("llama"), [preference(1)])


def test_rloo_still_asks_for_responses_rewards_and_probabilities_where_it_did() -> None:
    rloo = trl.RLOOTrainer
    assert parameters(rloo._generate) == ["self", "prompts"]
    assert parameters(rloo._calculate_rewards) == ["self", "inputs", "prompts", "completions", "completion_ids_list"]
    assert parameters(rloo._prepare_inputs) == ["self", "generation_batch"]
    assert parameters(rloo._get_per_token_logps_and_entropies)[:7] == [
        "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy",
    ]  # fmt: skip
    assert parameters(Trainer._save_checkpoint) == ["self", "model", "trial"]
    assert parameters(Trainer._load_rng_state) == ["self", "checkpoint"]
    assert parameters(prepare_deepspeed) == ["model", "accelerator"]
    assert parameters(add_fused_lm_head)[:2] == ["model", "temperature"]
    source = inspect.getsource(rloo)
    for piece in (
        "# If beta is 0.0, the reference model is not needed\n            self.ref_model = None",
        "prompt_ids_list, completion_ids_list, completions = self._generate(prompts)",
        "rewards_per_func = self._calculate_rewards(inputs, prompts, completions, completion_ids_list)",
        "unscorable_mask = torch.isnan(rewards_per_func).all(dim=1)",
        "repeat_count=self.num_iterations * self.args.steps_per_generation",
        "sampler_fn=self._get_train_sampler",
        "self._buffered_inputs[self._step % self.args.steps_per_generation]",
        "self._step += 1",
        'self._metrics[mode]["frac_reward_zero_std"]',
        'self._metrics[mode]["clip_ratio/region_mean"]',
        'self._metrics[mode][f"rewards/{reward_func_name}/mean"]',
        "loss = per_sequence_loss.mean()",
    ):
        assert piece in source, piece
    assert rloo.loss_is_scaled_for_ga is False


def test_ppo_still_finds_in_transformers_and_trl_what_it_relies_on() -> None:
    assert parameters(Trainer._save) == ["self", "output_dir", "state_dict"]
    assert parameters(Trainer._load_from_checkpoint) == ["self", "resume_from_checkpoint", "model"]
    assert parameters(Trainer.create_optimizer) == ["self", "model"]
    assert "outputs" in parameters(add_fused_lm_head)
    assert parameters(DistributedBackend.gather_params) == ["self", "params"]
    assert parameters(Accelerator.reduce)[:3] == ["self", "tensor", "reduction"]
    # A rollout comes before the first step of its epoch; tokens are counted before the step is taken.
    epochs, steps = inspect.getsource(Trainer._inner_training_loop), inspect.getsource(Trainer._run_epoch)
    assert epochs.index("on_epoch_begin") < epochs.index("self._run_epoch(")
    assert steps.index("self.get_batch_samples(") < steps.index("self.training_step(")
    state = inspect.getsource(Trainer._init_training_state)
    assert "epochs_trained = int(self.state.global_step // num_update_steps_per_epoch)" in state


def test_prompts_of_a_step_come_together_and_their_order_depends_on_seed_and_epoch_alone() -> None:
    sampler = PromptSteps(n_prompts=7, prompts_per_step=3, repeats=2, passes=2, seed=5)
    order = list(sampler)
    assert len(order) == len(sampler) == 24
    assert order[:6] == order[6:12]
    assert order[12:18] == order[18:]
    assert order[0:6:2] == order[1:6:2]
    assert len(set(order)) == 6
    assert list(sampler) == order
    sampler.set_epoch(1)
    assert list(sampler) != order


def test_a_rollout_split_by_length_holds_the_same_rows_with_less_padding() -> None:
    lengths = [(3, 1), (1, 4), (2, 2), (1, 1)]
    rollouts = {
        "prompt_ids": torch.tensor([[0] * (3 - p) + [10 * n + 1] * p for n, (p, _) in enumerate(lengths)]),
        "prompt_mask": torch.tensor([[0] * (3 - p) + [1] * p for p, _ in lengths]),
        "completion_ids": torch.tensor([[10 * n + 2] * r + [0] * (4 - r) for n, (_, r) in enumerate(lengths)]),
        "completion_mask": torch.tensor([[1] * r + [0] * (4 - r) for _, r in lengths]),
        "advantages": torch.arange(4.0),
    }
    parts = split_by_length(rollouts, 2)
    assert [part["advantages"].tolist() for part in parts] == [[1.0, 0.0], [2.0, 3.0]]
    assert parts[1]["prompt_ids"].tolist() == [[21, 21], [0, 31]]
    assert parts[1]["completion_mask"].tolist() == [[1, 1], [1, 0]]
    assert sum(int(part["completion_mask"].sum()) for part in parts) == 8
    joined = join_parts(parts, pad_id=0)
    assert all(torch.equal(joined[name], tensor[[1, 0, 2, 3]]) for name, tensor in rollouts.items())
