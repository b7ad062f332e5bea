"""Fixtures of the small world's tests: a tokenizer trained on the corpus."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from cai.micro_model.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(seed=0, vocabulary=3072)
