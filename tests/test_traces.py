"""What a trace says of one completion."""

import numpy as np
import pytest

from gemma_cot.config import embedded
from gemma_cot.tokenizer import decode, encode, load_tokenizer
from gemma_cot.traces import _completion


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(embedded("tiny_model"))


def test_the_text_leaves_out_the_stop_token_and_nothing_else(tokenizer):
    words = encode(tokenizer, "So 7 - 3 = 4")
    for ids, stopped in ((words, False), ([*words, tokenizer.end_of_turn], True)):
        tokens = np.array([2, 105, *ids, 0])
        mask = np.array([False, False, *[True] * len(ids), False])
        update = {"tokens": tokens, "mask": mask, "advantage": np.array([0.5])}
        traced = _completion(update, tokenizer)
        assert (traced["text"], traced["stopped"]) == (decode(tokenizer, words), stopped)
        assert traced["ids"] == ids and traced["text"] == "So 7 - 3 = 4"
