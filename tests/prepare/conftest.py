"""The embedded tokenizer, and settings for rows in our schema."""

import pytest

from gemma_cot.config import embedded
from gemma_cot.prepare.pipeline import Settings
from gemma_cot.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(embedded("tiny_model"))


@pytest.fixture
def cfg(tmp_path) -> Settings:
    """Settings for rows in our schema; `write` makes the input."""
    return Settings(
        dataset="ours", input=(str(tmp_path / "in.jsonl"),), output=str(tmp_path / "new" / "out"),
        model="", instruction="", max_prompt_tokens=256, max_completion_tokens=512, against=(),
        max_overlap=0.0, max_similarity=0.8, eval_share=0.0, tasks="", on_bad_row="skip",
    )  # fmt: skip
