"""The tokenizer files we export give transformers our ids, chat template included."""

import pytest

from gemma_cot.config import embedded
from gemma_cot.tokenizer import encode_prompt, encode_target, load_tokenizer

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


def test_apply_chat_template_gives_our_ids_for_several_turns():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(embedded("tiny_model"))
    talk = [("system", "Be brief."), ("user", "9 * 4?"), ("assistant", " 36 "), ("user", "+ 1?")]
    messages = [{"role": role, "content": content} for role, content in talk]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    tokenizer = load_tokenizer(embedded("tiny_model"))
    assert ids == encode_prompt(tokenizer, "+ 1?", "Be brief.", [("9 * 4?", " 36 ")])


def test_transformers_knows_the_turn_tokens_as_special():
    """Else skip_special_tokens would leave them in every answer."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(embedded("tiny_model"))
    tokenizer = load_tokenizer(embedded("tiny_model"))
    ids = [*encode_prompt(tokenizer, "a < b"), *encode_target(tokenizer, "<answer>1</answer>")]
    text = theirs.decode(ids, skip_special_tokens=True)
    assert text == "user\na < b\nmodel\n<answer>1</answer>"
    pieces = tokenizer.processor.id_to_piece
    assert {i: token.content for i, token in theirs.added_tokens_decoder.items()} == {
        i: pieces(i) for i in range(109)
    }
