"""Pretraining in miniature: it learns, resumes, and ships what others load."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from cai.micro import oracle
from cai.micro.conversations import prompts
from cai.micro_model import pretrain
from cai.micro_model.corpus import LONG_EVERY, corpus_hash
from cai.micro_model.pretrain import SIZES, Size, Training
from cai.micro_model.tokenizer import CHAT_TEMPLATE
from cai.models.reference import MICRO

SHORT = Training(steps=4, size="tiny", rows=2, length=256)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "tiny", Size(32, 1, 2, 64, 2200))
    monkeypatch.setattr(pretrain, "RESUME_EVERY", 2)
    monkeypatch.setattr(pretrain, "LOG_EVERY", 1)
    monkeypatch.setattr(pretrain, "VALIDATION_DOCUMENTS", 2)
    monkeypatch.setattr(pretrain, "TOKENIZER_EXAMPLES", 1000)


def train(folder: Path, training: Training = SHORT, log: Callable[[str], None] = lambda line: None) -> None:
    pretrain.pretrain(folder, training=training, device="cpu", compiled=False, log=log)


@pytest.mark.usefixtures("tiny")
def test_a_run_killed_half_way_ends_with_the_same_weights(tmp_path: Path) -> None:
    train(tmp_path / "whole")

    def kill(line: str) -> None:
        if line.startswith("step 4"):
            raise KeyboardInterrupt

    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "part", log=kill)
    train(tmp_path / "part", log=lines.append)
    assert "steps 2 to 4" in lines[0]
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (tmp_path / "part" / "metrics.jsonl").read_bytes()
    assert (tmp_path / "whole" / "curves.svg").read_bytes().startswith(b"<?xml")
    folders = (tmp_path / "whole", tmp_path / "part")
    undisturbed, resumed = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders)
    assert all(torch.equal(undisturbed[key], resumed[key]) for key in undisturbed)
    assert not (tmp_path / "part" / pretrain.RESUME_POINT).exists()


@pytest.mark.usefixtures("tiny")
def test_another_training_does_not_resume(tmp_path: Path) -> None:
    lines: list[str] = []
    train(tmp_path, replace(SHORT, steps=2))
    train(tmp_path, replace(SHORT, seed=1, steps=2), log=lines.append)
    assert "steps 0 to 2" in lines[0]


def test_sizes_are_about_what_they_say() -> None:
    from cai.micro_model.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(0, 3072, examples=500)
    models = {name: pretrain.new_model(size, tokenizer) for name, size in SIZES.items()}
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert 0.4e6 < counts["small"] < 0.7e6
    assert 1.3e6 < counts["medium"] < 1.8e6
    assert 3.5e6 < counts["large"] < 4.5e6


def test_the_learning_rate_warms_up_stays_and_falls_to_zero() -> None:
    training = Training(warm_up=10, schedule=((0, 1.0), (500, 1.0), (1000, 0.0)))
    rates = [pretrain.rate_at(step, training) for step in (0, 9, 400, 750, 999)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.002])


def test_long_steps_have_long_conversations(tokenizer: PreTrainedTokenizerFast) -> None:
    long = pretrain.step_batch(Training(), LONG_EVERY - 1, tokenizer)
    assert long.ids.shape == (2, 2048)
    steps = [pretrain.step_batch(Training(), n * LONG_EVERY - 1, tokenizer) for n in range(1, 9)]
    assert max(int(step.positions.max()) for step in steps) > 1500
    assert pretrain.step_batch(Training(), 0, tokenizer).ids.numel() == 4160


shipped = pytest.mark.skipif(not (MICRO / "config.json").is_file(), reason="no weights in the package")


@shipped
def test_the_shipped_model_answers_in_its_world() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    model = AutoModelForCausalLM.from_pretrained(MICRO, dtype=torch.float32).eval()
    rows = prompts("test", limit=10)
    clear = 0
    for row in rows:
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": False}
        ids = tokenizer.apply_chat_template(row["messages"], **options)
        out = model.generate(ids, max_new_tokens=160, do_sample=False)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        clear += oracle.well_formed(oracle.read(row["messages"], text))
    assert clear >= 9


@shipped
def test_the_shipped_folder_says_what_it_was_trained_on_and_pads_with_a_token_of_its_own() -> None:
    facts = json.loads((MICRO / "cai.json").read_text())
    assert facts["templates"] == "micro"
    assert facts["corpus"] == corpus_hash(facts["training"]["seed"])
    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")
    assert (MICRO / "model.safetensors").stat().st_size <= 12_000_000
