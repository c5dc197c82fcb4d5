"""From a line to token arrays: every refusal of a row, lengths, padding pictures, order of rows."""

import json

import numpy as np
import pytest

from gemma_cot.config import embedded
from gemma_cot.data import (
    Encoded,
    Example,
    encode_examples,
    indices_for_step,
    left_pad,
    parse_row,
    prompt_width,
    read_jsonl,
    sft_rows,
    target_width,
)
from gemma_cot.tokenizer import encode_prompt, encode_target, load_tokenizer

GOOD = {
    "domain": "math",
    "prompt": "How many?",
    "chosen": "<reasoning>3 + 4 = 7</reasoning><answer>7</answer>",
    "metadata": {"checkpoints": ["3 + 4 = 7"], "final_answer": "7"},
}


def line(**changes) -> bytes:
    """Return a good row with some keys replaced, as one line; a value of ... removes the key."""
    row = {key: value for key, value in (GOOD | changes).items() if value is not ...}
    return json.dumps(row, ensure_ascii=False).encode()


def metadata(**changes) -> dict:
    """Return good metadata with some keys replaced; a value of ... removes the key."""
    return {k: v for k, v in (GOOD["metadata"] | changes).items() if v is not ...}


# ---- rows ---------------------------------------------------------------------------------------


def test_a_row_is_read_with_its_further_keys():
    example = parse_row(line(level=3, source={"book": "é"}, metadata=metadata(hint="x")), 12)
    assert example == Example(
        id=12,
        domain="math",
        prompt="How many?",
        chosen="<reasoning>3 + 4 = 7</reasoning><answer>7</answer>",
        metadata={"checkpoints": ["3 + 4 = 7"], "final_answer": "7", "hint": "x"},
        extra={"level": 3, "source": {"book": "é"}},
    )
    assert parse_row(line().decode(), 1).prompt == "How many?"  # text as well as bytes


@pytest.mark.parametrize("domain", ["math", "code", "science"])
def test_the_three_domains_and_no_checkpoints_are_good(domain):
    example = parse_row(line(domain=domain, metadata=metadata(checkpoints=[])), 1)
    assert example.domain == domain and example.metadata["checkpoints"] == []


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"{", "must be JSON in UTF-8"),
        (b"no json", "must be JSON in UTF-8"),
        (line()[:-1], "must be JSON in UTF-8"),  # torn
        (line() + line(), "must be JSON in UTF-8"),  # two on one line
        (line().replace(b"How", b"\xe9"), "must be JSON in UTF-8"),  # Latin-1
        (line().replace(b"How", b"\\ud800"), "must be JSON in UTF-8"),  # half a character
        (b"[" * 100_000, "must be JSON in UTF-8"),  # deeper than any parser goes
        (b"[1, 2]", "must be a JSON object, got list"),
        (b'"text"', "must be a JSON object, got str"),
        (b"null", "must be a JSON object, got NoneType"),
        (line(domain=...), "domain must be a non-blank string, got None"),
        (line(domain="history"), "domain must be one of math, code, science, got 'history'"),
        (line(domain="Math"), "domain must be one of math, code, science, got 'Math'"),
        (line(prompt=...), "prompt must be a non-blank string, got None"),
        (line(prompt=" \n"), "prompt must be a non-blank string"),
        (line(prompt=["How many?"]), "prompt must be a non-blank string"),
        (line(chosen=...), "chosen must be a non-blank string, got None"),
        (line(chosen=""), "chosen must be a non-blank string, got ''"),
        (line(chosen=7), "chosen must be a non-blank string, got 7"),
        (line(chosen="The answer is 7."), "chosen must be <reasoning>..</reasoning><answer>.."),
        (line(chosen="<reasoning>a</reasoning><answer> </answer>"), "chosen must be <reasoning>"),
        (line().decode().encode("utf-16"), "must be JSON in UTF-8"),
        (line().decode().encode("utf-32"), "must be JSON in UTF-8"),
        (line(prompt="x").replace(b'"x"', b'"\xed\xa0\xbd"'), "must be JSON in UTF-8"),
        (line(metadata=...), "metadata must be an object, got NoneType"),
        (line(metadata="{}"), "metadata must be an object, got str"),
        (line(metadata=metadata(checkpoints=...)), "checkpoints must be a list of strings"),
        (line(metadata=metadata(checkpoints="3 + 4 = 7")), "checkpoints must be a list of strings"),
        (line(metadata=metadata(checkpoints=["a", 7])), "checkpoints must be a list of strings"),
        (line(metadata=metadata(final_answer=...)), "final_answer must be a string, got None"),
        (line(metadata=metadata(final_answer=7)), "final_answer must be a string, got 7"),
    ],
)
def test_a_bad_row_is_refused_with_its_reason(bad, reason):
    with pytest.raises(ValueError, match=reason):
        parse_row(bad, 1)


# ---- files --------------------------------------------------------------------------------------


def test_lines_are_numbered_as_an_editor_does(tmp_path):
    """Blank lines are passed over and counted; CRLF, a byte order mark and no last newline are
    fine; a line separator inside a text is no line end."""
    path = tmp_path / "rows.jsonl"
    third = line(prompt="one\u2028two\u0085three")
    path.write_bytes(b"\xef\xbb\xbf" + line() + b"\r\n\r\n  \n" + third + b"\n\n" + line())
    examples, rejects = read_jsonl(path)
    assert [example.id for example in examples] == [1, 4, 6]
    assert examples[1].prompt == "one\u2028two\u0085three"
    assert rejects == []


def test_fail_names_file_line_and_reason(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line() + b"\n\n" + line(domain="art") + b"\n" + line())
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: domain must be one of .* got 'art'"):
        read_jsonl(path)


def test_skip_lists_every_bad_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([line(domain="art"), line(), b"{", line(prompt="b")]))
    examples, rejects = read_jsonl(path, "skip")
    assert [(example.id, example.prompt) for example in examples] == [(2, "How many?"), (4, "b")]
    assert len(rejects) == 2
    assert rejects[0].startswith(f"{path}:1: domain must be one of")
    assert rejects[1].startswith(f"{path}:3: must be JSON")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="must hold at least one good row, got 0 bad ones"):
        read_jsonl(path)


def test_a_file_of_bad_rows_alone_is_refused_even_when_skipping(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{\n[]\n")
    with pytest.raises(ValueError, match="at least one good row, got 2 bad ones"):
        read_jsonl(path, "skip")


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing.jsonl: must be a readable JSONL file, got No "):
        read_jsonl(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match="must be a readable JSONL file"):
        read_jsonl(tmp_path)


# ---- lengths ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(embedded("tiny_model"))


def test_too_long_is_discarded_and_never_truncated(tokenizer):
    """The limits are inclusive and the stop token counts."""
    chosen = "<reasoning>{}</reasoning><answer>a</answer>".format
    examples = [parse_row(line(prompt="b " * n, chosen=chosen("a " * m)), 10 * n + m)
                for n in (1, 2, 3) for m in (1, 2, 3)]  # fmt: skip
    middle = examples[4]  # n = m = 2
    prompt = len(encode_prompt(tokenizer, middle.prompt, "Be brief."))
    target = len(encode_target(tokenizer, middle.chosen))
    kept, discarded = encode_examples(tokenizer, examples, "Be brief.", prompt, target)
    assert [row.example.id for row in kept] == [11, 12, 21, 22] and discarded == 5
    for row in kept:
        assert row.prompt_ids == encode_prompt(tokenizer, row.example.prompt, "Be brief.")
        assert row.target_ids == encode_target(tokenizer, row.example.chosen)
        assert row.target_ids[-1] == tokenizer.end_of_turn
    shorter, _ = encode_examples(tokenizer, examples, "Be brief.", prompt, target - 1)
    assert [row.example.id for row in shorter] == [11, 21]
    shorter, _ = encode_examples(tokenizer, examples, "Be brief.", prompt - 1, target)
    assert [row.example.id for row in shorter] == [11, 12]


def test_nothing_left_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="at least one of 1 rows must fit 3 prompt and 512"):
        encode_examples(tokenizer, [parse_row(line(), 1)], "", 3, 512)


@pytest.mark.parametrize(("longest", "width"), [(1, 16), (16, 16), (17, 32)])
def test_widths_are_the_longest_rounded_up_to_sixteen(longest, width):
    example = parse_row(line(), 1)
    rows = [Encoded(example, [2] * longest, [1]), Encoded(example, [2], [1] * longest)]
    assert prompt_width(rows) == target_width(rows) == width


# ---- padding ------------------------------------------------------------------------------------


def test_left_pad_as_a_picture():
    tokens_PT, start_P = left_pad([[2, 5, 6], [2], [2, 7, 8, 9]], 4)
    assert tokens_PT.tolist() == [[0, 2, 5, 6], [0, 0, 0, 2], [2, 7, 8, 9]]
    assert start_P.tolist() == [1, 3, 0]
    assert tokens_PT.dtype == start_P.dtype == np.int32


def test_a_prompt_wider_than_its_columns_is_refused():
    with pytest.raises(ValueError, match="prompt 1: must fit 2 columns, got 3 tokens"):
        left_pad([[2], [2, 3, 4]], 2)


def test_sft_rows_as_a_picture():
    example = parse_row(line(), 1)
    rows = [Encoded(example, [2, 5], [7, 8, 1]), Encoded(example, [2, 5, 6], [1])]
    batch = sft_rows(rows, 3, 4)
    assert batch["tokens_BT"].tolist() == [
        [0, 2, 5, 7, 8, 1, 0],
        [2, 5, 6, 1, 0, 0, 0],
    ]
    assert batch["mask_BT"].astype(int).tolist() == [
        [0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 0, 0, 0],
    ]
    assert batch["start_B"].tolist() == [1, 0]


# ---- which rows a step takes --------------------------------------------------------------------


@pytest.mark.parametrize(("num_rows", "count"), [(12, 4), (10, 4), (5, 5), (3, 7), (1, 3), (7, 1)])
def test_every_row_is_taken_once_before_any_is_taken_again(num_rows, count):
    steps = 3 * num_rows  # 3 * count whole epochs
    stream = np.concatenate([indices_for_step(s, 9, num_rows, count) for s in range(steps)])
    assert stream.shape == (3 * num_rows * count,)
    for epoch in stream.reshape(-1, num_rows):
        assert sorted(epoch) == list(range(num_rows))


def test_epochs_and_seeds_have_their_own_order():
    first, second = (indices_for_step(step, 0, 100, 100).tolist() for step in (0, 1))
    other_seed = indices_for_step(0, 1, 100, 100).tolist()
    assert first != second and first != other_seed and first != list(range(100))


def test_the_rows_of_a_step_are_a_pure_function():
    forwards = [indices_for_step(step, 3, 10, 4).tolist() for step in range(20)]
    backwards = [indices_for_step(step, 3, 10, 4).tolist() for step in reversed(range(20))]
    assert forwards == backwards[::-1]
    # cut otherwise, the stream is the same: 20 steps of 4 are 10 of 8
    wider = [indices_for_step(step, 3, 10, 8).tolist() for step in range(10)]
    assert sum(forwards, []) == sum(wider, [])
