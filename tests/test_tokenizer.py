"""The chat template as golden text and ids, the stop ids, and every refusal.

The ids of control tokens below are Gemma 3's own; the fixture's tokenizer has them too.
"""

import json
import shutil

import pytest
import sentencepiece

from gemma_cot.tokenizer import (
    BOS,
    decode,
    encode,
    encode_prompt,
    encode_target,
    load_tokenizer,
    render_turns,
)
from gemma_cot.traces import _pieces


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    """The loaded test tokenizer."""
    return load_tokenizer(tokenizer_dir)


@pytest.fixture
def model_dir(tokenizer_dir, tmp_path):
    """A private copy of the tokenizer's folder, to put other files into."""
    return shutil.copytree(tokenizer_dir, tmp_path / "model")


def test_template_without_system_text():
    assert render_turns("How many?") == (
        "<start_of_turn>user\nHow many?<end_of_turn>\n<start_of_turn>model\n"
    )


def test_system_text_goes_first_inside_the_user_turn():
    assert render_turns("How many?", "Be brief.") == (
        "<start_of_turn>user\nBe brief.\n\nHow many?<end_of_turn>\n<start_of_turn>model\n"
    )


def test_user_text_is_stripped_as_in_gemmas_template():
    # Gemma's jinja template has `message['content'] | trim`
    assert render_turns("  \n How many?\n\n") == render_turns("How many?")


def test_the_system_text_opens_the_first_of_several_turns():
    assert render_turns("And pears?", "Be brief.", [(" How many? ", "7\n")]) == (
        "<start_of_turn>user\nBe brief.\n\nHow many?<end_of_turn>\n"
        "<start_of_turn>model\n7<end_of_turn>\n"
        "<start_of_turn>user\nAnd pears?<end_of_turn>\n"
        "<start_of_turn>model\n"
    )


def test_prompt_ids_are_golden(tokenizer):
    """2 <bos>, 105 user 107, the text, 106 107, 105 model 107."""
    inner = [encode(tokenizer, text) for text in ("user", "How many?", "model")]
    assert encode_prompt(tokenizer, "How many?") == [
        2, 105, *inner[0], 107, *inner[1], 106, 107, 105, *inner[2], 107,
    ]  # fmt: skip


def test_system_ids_are_golden(tokenizer):
    """System and user text are joined by one token, 108: two newlines."""
    user, brief, text, model = (
        encode(tokenizer, text) for text in ("user", "Be brief.", "How many?", "model")
    )
    assert encode_prompt(tokenizer, "How many?", "Be brief.") == [
        2, 105, *user, 107, *brief, 108, *text, 106, 107, 105, *model, 107,
    ]  # fmt: skip


@pytest.mark.parametrize("user", ["How many?", "<bos>How many?", "", "<bos><bos>"])
def test_exactly_one_bos(tokenizer, user):
    ids = encode_prompt(tokenizer, user, "Be brief.")
    assert ids[0] == BOS and ids.count(BOS) == 1


def test_encode_adds_nothing_and_maps_turn_tokens(tokenizer):
    # Gemma 3's golden ids: "<start_of_turn><end_of_turn>" is [105, 106], "\n" 107, "\n\n" 108
    assert encode(tokenizer, "<start_of_turn><end_of_turn>") == [105, 106]
    assert encode(tokenizer, "\n") == [107] and encode(tokenizer, "\n\n") == [108]
    assert encode(tokenizer, "") == []
    framed = encode(tokenizer, "<<start_of_turn>>")
    assert framed[1] == 105 and len(framed) == 3


def test_target_ends_in_the_stop_token(tokenizer):
    ids = encode_target(tokenizer, "So 7 - 3 = 4")
    assert ids[-1] == 106 and ids[:-1] == encode(tokenizer, "So 7 - 3 = 4")
    assert encode_target(tokenizer, "") == [106]
    assert ids[-1] in tokenizer.stop_ids


@pytest.mark.parametrize(
    "text",
    [
        "<reasoning>7 - 3 = 4</reasoning>\n<answer>4</answer>",
        "  two  spaces ",
        "π ≤ 世界 🙂",
        "\n\n\n",
    ],
)
def test_decode_undoes_encode(tokenizer, text):
    assert decode(tokenizer, encode(tokenizer, text)) == text


def test_decode_drops_pad_eos_bos_and_keeps_turns(tokenizer):
    ids = [0, 0, 2, *encode(tokenizer, "coins"), 106, 1, 0]
    assert decode(tokenizer, ids) == "coins<end_of_turn>"


def test_ids_without_a_piece_have_no_text(tokenizer):
    """From Gemma 3 4B on the embedding has more rows than the tokenizer has pieces."""
    ids, size = encode(tokenizer, "seven"), tokenizer.vocab_size
    assert decode(tokenizer, [size, *ids, size + 63]) == "seven"
    pieces = [tokenizer.processor.id_to_piece(i) for i in ids]
    assert _pieces(tokenizer, [size, *ids]) == ["", *pieces]  # of a trace


def test_digits_are_one_token_each(tokenizer):
    assert len(encode(tokenizer, "1234567890")) == 10


def test_stop_ids_without_generation_config(tokenizer):
    assert tokenizer.stop_ids == (1, 106) and tokenizer.end_of_turn == 106
    assert tokenizer.vocab_size == 480


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ({"eos_token_id": [1, 106]}, (1, 106)),
        ({"eos_token_id": None}, (1, 106)),
        ({"eos_token_id": 1}, (1, 106)),  # the turn token stops even where the file forgets it
        ({"eos_token_id": [107, 1]}, (1, 106, 107)),
        ({}, (1, 106)),
    ],
)
def test_stop_ids_add_those_of_generation_config(model_dir, listed, expected):
    (model_dir / "generation_config.json").write_text(json.dumps(listed))
    assert load_tokenizer(model_dir).stop_ids == expected


@pytest.mark.parametrize("bad", [[1, 480], [-1], ["<eos>"]])
def test_stop_ids_outside_the_vocabulary_are_refused(model_dir, bad):
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": bad}))
    with pytest.raises(ValueError, match="eos_token_id must be ids below the vocabulary's 480"):
        load_tokenizer(model_dir)


@pytest.mark.parametrize("text", ['{"eos_token_id": [1', "[1]"])
def test_a_broken_generation_config_is_refused(model_dir, text):
    (model_dir / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match="generation_config.json: must .*JSON"):
        load_tokenizer(model_dir)


def test_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.model: file must exist"):
        load_tokenizer(tmp_path)


def test_broken_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="must be a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_tokenizer_larger_than_the_embedding_is_refused(tokenizer_dir):
    assert load_tokenizer(tokenizer_dir, vocab_size=480).vocab_size == 480
    assert load_tokenizer(tokenizer_dir, vocab_size=512).vocab_size == 480  # padded embedding: fine
    with pytest.raises(ValueError, match="must fit the embedding's 479 rows, got 480"):
        load_tokenizer(tokenizer_dir, vocab_size=479)


def train_other(folder, **options) -> None:
    """Train a little tokenizer that breaks one of Gemma 3's conventions."""
    gemma = dict(pad_id=0, eos_id=1, bos_id=2, unk_id=3)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Tom has pears and coins", "Tom gives apples away"]),
        model_prefix=str(folder / "tokenizer"),
        model_type="char",
        vocab_size=16,
        hard_vocab_limit=False,
        add_dummy_prefix=False,
        minloglevel=2,
        **(gemma | options),
    )


def test_other_control_ids_are_refused(tmp_path):
    train_other(tmp_path, bos_id=1, eos_id=2)
    with pytest.raises(ValueError, match=r"must be \(0, 1, 2\) as in Gemma 3, got \(0, 2, 1\)"):
        load_tokenizer(tmp_path)


def test_turn_token_that_is_not_one_token_is_refused(tmp_path):
    train_other(tmp_path, user_defined_symbols=["<start_of_turn>"])
    with pytest.raises(ValueError, match="<end_of_turn> must be one token"):
        load_tokenizer(tmp_path)
