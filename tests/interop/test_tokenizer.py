"""The tokenizer files we export give transformers our ids, chat template included."""

import pytest

from gemma_cot.config import embedded
from gemma_cot.tokenizer import encode_prompt, load_tokenizer

pytestmark = pytest.mark.interop

CHATS = [
    ("What is 12 * 34?", ""),
    ("What does this print?\nx = 12\n\nprint(x)", "Think step by step."),
    ("  two  spaces, <b>é</b> and 한 and \U0001f600  ", ""),
    ("<reasoning>a</reasoning><answer>-1.5</answer>", "tags"),
]


@pytest.mark.parametrize(("question", "system"), CHATS)
def test_apply_chat_template_gives_our_ids(question, system):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(embedded("tiny_model"))
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ours = encode_prompt(load_tokenizer(embedded("tiny_model")), question, system)
    assert ids == ours
    assert ids.count(2) == 1  # one <bos>
