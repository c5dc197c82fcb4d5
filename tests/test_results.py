"""Result files: whole, appended to, torn, resumed; and the protocol beside them."""

import json

import pytest

from gemma_cot.results import (
    append_results,
    beside,
    differing,
    files_hash,
    open_results,
    read_protocol,
    read_results,
    template_hash,
    write_results,
    write_whole,
)

PROTOCOL = {"n": 3, "seed": 0, "temperature": 1.0, "model": "here"}


def result(number: int, **changes) -> dict:
    return {
        "id": number, "domain": "math", "prompt": "p", "completion": "c", "format": 1.0,
        "process": None, "outcome": 1.0, "num_tokens": 5, "repetition": 0.0, "checkpoints": 0,
        "checkpoints_literal": 0, "checkpoints_normalised": 0,
    } | changes  # fmt: skip


@pytest.fixture
def path(tmp_path):
    """A result file with two rows."""
    path = tmp_path / "new" / "out.jsonl"
    assert open_results(path, PROTOCOL, resume=False, overwrite=False) == []
    append_results(path, [result(1)])
    append_results(path, [result(2)])
    return path


def test_results_come_back_as_they_were(tmp_path):
    """Whatever a model writes: line separators of Unicode and of ASCII, quotes, None scores."""
    odd = ["a\nb\r\nc", "\u2028 and \u2029 and \u0085", "\x0b\x0c\x1c\x1d\x1e", '"\\', ""]
    rows = [result(i, completion=text, outcome=None) for i, text in enumerate(odd)]
    path = tmp_path / "eval" / "base.jsonl"
    write_results(path, rows)
    assert read_results(path) == rows
    assert [item.name for item in path.parent.iterdir()] == ["base.jsonl"]  # nothing half-written
    write_results(path, rows[:1])
    assert read_results(path) == rows[:1]
    write_results(path, [])
    assert read_results(path) == []


@pytest.mark.parametrize("torn", [b"", b'{"id": 3, "dom', b"\xe2\x82"])
def test_resuming_keeps_whole_rows_and_drops_a_torn_line(path, torn):
    with open(path, "ab") as file:
        file.write(torn)
    assert open_results(path, PROTOCOL, resume=True, overwrite=False) == [result(1), result(2)]
    append_results(path, [result(3)])
    assert [row["id"] for row in read_results(path)] == [1, 2, 3]


def test_rows_of_an_older_version_are_not_gone_on_with(tmp_path):
    path = tmp_path / "out.jsonl"
    open_results(path, PROTOCOL, resume=False, overwrite=False)
    old = result(1)
    del old["repetition"]
    append_results(path, [old])
    with pytest.raises(ValueError, match="--resume: rows in .* got none of repetition: an older"):
        open_results(path, PROTOCOL, resume=True, overwrite=False)
    assert read_results(path) == [old]  # still good for --compare and --pass_rates


def test_every_result_file_has_a_protocol_of_its_own(tmp_path):
    paths = [tmp_path / name for name in ("m.v1", "m.v2", "t0.7", "a.jsonl", "plain")]
    beside_them = {beside(path, "protocol.json") for path in paths}
    assert len(beside_them) == len(paths)
    assert beside(tmp_path / "a.jsonl", "summary.json").name == "a.summary.json"


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path):
    with pytest.raises(OSError):
        write_whole(tmp_path, "text")
    assert list(tmp_path.parent.glob(f"{tmp_path.name}.tmp")) == []


def test_resuming_begins_where_nothing_is(tmp_path):
    path = tmp_path / "out.jsonl"
    path.touch()
    assert open_results(path, PROTOCOL, resume=True, overwrite=False) == []
    assert read_protocol(path) == PROTOCOL


def test_another_protocol_is_not_resumed_and_the_file_stays(path):
    before = path.read_bytes()
    changed = PROTOCOL | {"temperature": 0.5}
    with pytest.raises(ValueError, match="got 1 that differ, first temperature: 1.0 then, 0.5 now"):
        open_results(path, changed, resume=True, overwrite=False)
    moved = PROTOCOL | {"model": "there"}  # its weights' hash is what counts
    assert len(open_results(path, moved, resume=True, overwrite=False)) == 2
    beside(path, "protocol.json").unlink()
    with pytest.raises(ValueError, match="--resume: settings must be those"):
        open_results(path, PROTOCOL, resume=True, overwrite=False)
    assert path.read_bytes() == before


def test_results_in_the_way_are_replaced_only_when_asked(path):
    with pytest.raises(ValueError, match="--output: must be a new file, got .* add --resume"):
        open_results(path, PROTOCOL, resume=False, overwrite=False)
    assert len(read_results(path)) == 2
    assert open_results(path, PROTOCOL, resume=False, overwrite=True) == []
    assert read_results(path) == []


@pytest.mark.parametrize("line", ["{broken", "[]", '{"id": 1}'])
def test_what_is_no_result_is_named_with_its_line(path, line):
    with open(path, "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"out.jsonl:3: a line must be a result of evaluate"):
        read_results(path)


def test_files_that_cannot_be_used(tmp_path, path):
    with pytest.raises(ValueError, match="nowhere.jsonl: must be a result file of evaluate"):
        read_results(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="--output: must be a file to write to"):
        open_results(path / "below" / "x.jsonl", PROTOCOL, resume=False, overwrite=False)
    with pytest.raises(ValueError, match="--output: .* must take the results as they come"):
        append_results("/dev/full", [result(1)])
    beside(path, "protocol.json").write_text("{")
    with pytest.raises(ValueError, match="out.protocol.json: must be JSON"):
        read_protocol(path)


def test_a_protocol_is_what_decides_the_numbers(tmp_path):
    assert differing({"a": 1, "model": "x"}, {"a": 2, "b": 3, "model": "y"}) == ["a", "b"]
    assert template_hash("") != template_hash("Think.")
    (tmp_path / "one").write_bytes(b"ab")
    (tmp_path / "two").write_bytes(b"c")
    first = files_hash(tmp_path / "one", tmp_path / "two")
    (tmp_path / "one").write_bytes(b"a")
    (tmp_path / "two").write_bytes(b"bc")
    assert first != files_hash(tmp_path / "one", tmp_path / "two")
    json.dumps(read_protocol(tmp_path / "none.jsonl"))
