"""The distiller against a real server that misbehaves: all rows, none twice, nothing paid twice."""

import asyncio
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import teacher_server
from distill_kills import check, command
from teacher_server import (
    BAD_ANSWERS,
    FAULTS,
    TeacherServer,
    completion,
    problems,
    question_row,
    send,
    solution,
)

from gemma_cot.config import embedded
from gemma_cot.data import encode_examples, read_jsonl
from gemma_cot.distill.collect import Gate, worst_usd
from gemma_cot.distill.command import describe
from gemma_cot.distill.journal import Journal
from gemma_cot.distill.pipeline import distill, estimate, read_input, table
from gemma_cot.distill.settings import (
    Price,
    Settings,
    check_settings,
    key_from_environment,
    teacher_of,
)
from gemma_cot.distill.teacher import open_client, wait_of
from gemma_cot.prepare import pipeline as prepare_pipeline
from gemma_cot.tokenizer import encode_prompt, load_tokenizer

KEY = "sk-0123456789abcdef"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(embedded("tiny_model"))


@pytest.fixture
def make(tmp_path):
    """Return a function from (scripted problems, server address) to settings with an input file."""

    def settings(scripted, url: str, **changes) -> Settings:
        rows = "".join(json.dumps(question_row(p)) + "\n" for p in scripted.values())
        (tmp_path / "questions.jsonl").write_text(rows)
        cfg = Settings(
            input=(str(tmp_path / "questions.jsonl"),), output=str(tmp_path / "out"),
            teacher="scripted", base_url=url, price="0.01,0.1,1", max_similarity=1.0,
            concurrency=8, timeout=1, backoff=0.02,
        )  # fmt: skip
        return dataclasses.replace(cfg, **changes)

    return settings


def lines(cfg: Settings, name: str) -> list[dict]:
    return [json.loads(line) for line in (Path(cfg.output) / name).read_text().splitlines()]


def always(status: int, body: bytes, headers=()):
    """Return a server's `play` that answers every request alike."""
    return lambda handler, *_: send(handler, status, body, headers)


# ------------------------------------------------------------------------- misbehaving servers


def test_every_row_comes_once_and_nothing_is_paid_twice(make, tokenizer):
    scripted = problems(1, 40)
    with TeacherServer(scripted, FAULTS, BAD_ANSWERS, storm=60, seed=5) as server:
        cfg = make(scripted, server.url, timeout=0.4)
        summary = distill(cfg, KEY, tokenizer)
        counts = check(Path(cfg.output).parent, server)
        asked = len(server.headers_seen)
        again = distill(cfg, KEY, tokenizer)
    assert (counts["rows"], counts["missing"], counts["duplicates"]) == (40, 0, 0)
    assert counts["paid_twice"] == 0 and counts["wrong"] == 0
    assert counts["complete_answers"] == counts["answers_in_journal"] > 40  # bad ones were paid too
    assert set(server.met) == {*FAULTS, *BAD_ANSWERS, "storm"}
    assert server.most_flying <= cfg.concurrency
    assert all(seen["Authorization"] == f"Bearer {KEY}" for seen in server.headers_seen)
    assert (summary["rows"], summary["rejected"], summary["open"]) == (40, {}, 0)
    records = lines(cfg, "journal.jsonl")
    assert summary["usd"] == pytest.approx(sum(record["usd"] for record in records))
    # 60 cached, 40 fresh and 50 completion tokens at 0.01, 0.1 and 1 dollars a million
    paid = next(record for record in records if record["fault"] is None)
    assert paid["usd"] == pytest.approx(54.6e-6)
    assert len(server.headers_seen) == asked and again["answered_now"] == 0  # none is asked again
    printed = table(summary)
    assert "rows                   40" in printed and "http_429" in printed


def test_what_was_distilled_can_be_prepared_and_trained_on(make, tokenizer, tmp_path):
    scripted = problems(2, 20)
    with TeacherServer(scripted) as server:
        cfg = make(scripted, server.url)
        distill(cfg, "", tokenizer)
    prepare_pipeline.prepare(
        prepare_pipeline.Settings(
            dataset="ours", input=(f"{cfg.output}/rows.jsonl",), output=str(tmp_path / "prepared"),
            model="", instruction="", max_prompt_tokens=256, max_completion_tokens=512, against=(),
            max_overlap=0.0, max_similarity=1.0, eval_share=0.0, tasks="", on_bad_row="fail",
        ),
        tokenizer,
    )  # fmt: skip
    examples, _ = read_jsonl(tmp_path / "prepared" / "train.jsonl")
    rows, too_long = encode_examples(tokenizer, examples, "", 256, 512)
    assert (len(rows), too_long) == (20, 0)
    assert {e.metadata["final_answer"] for e in examples} == {p.answer for p in scripted.values()}


def test_kills_lose_no_answer_and_pay_for_none_twice(make, tmp_path):
    scripted = problems(3, 30)
    faults = [fault for fault in FAULTS if fault != "drip"]  # each would hold up its run for 2 s
    with TeacherServer(scripted, faults, BAD_ANSWERS, most=1, latency=0.4) as server:
        make(scripted, server.url)
        for seconds in (0.3, 0.7):  # after the first answer, so that some are in flight
            before = sum(server.delivered.values())
            process = subprocess.Popen(
                command(tmp_path, server.url), stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            while sum(server.delivered.values()) == before and process.poll() is None:
                time.sleep(0.01)
            time.sleep(seconds)
            assert process.poll() is None, "it was done before it was killed"
            os.killpg(process.pid, signal.SIGKILL)  # the command, and whatever is in its group
            process.wait()
            with Journal(tmp_path / "out" / "journal.jsonl") as journal:
                journal.lock(wait=True)  # until the answers in flight are there
                asked = len(server.headers_seen)
                time.sleep(0.3)
                assert asked == len(server.headers_seen)  # and no others were asked for
                assert sum(server.questions.values()) < 30
        done = subprocess.run(command(tmp_path, server.url), capture_output=True, text=True)
        counts = check(tmp_path, server)
    assert done.returncode == 0, done.stderr
    assert (counts["rows"], counts["missing"], counts["duplicates"]) == (30, 0, 0)
    assert counts["paid_twice"] == 0 and counts["wrong"] == 0
    assert counts["complete_answers"] == counts["answers_in_journal"]


@pytest.fixture
def ctrl_c_is_heard():
    """A shell starts what it runs in the background with SIGINT ignored, these tests perhaps, and
    a child of theirs would ignore it too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_what_is_in_flight(make, tmp_path, ctrl_c_is_heard):
    scripted = problems(18, 60)
    with TeacherServer(scripted, latency=0.4) as server:
        make(scripted, server.url)
        process = subprocess.Popen(
            command(tmp_path, server.url), stdout=subprocess.PIPE, text=True
        )
        while not server.delivered and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate()
        counts = check(tmp_path, server)
    assert process.returncode == 0 and "not complete; the same command goes on" in printed
    assert 0 < counts["rows"] == counts["complete_answers"] < 60


@pytest.mark.parametrize("status", [301, 400, 401, 402, 403, 404, 422])
def test_refusals_stop_the_run_and_keep_what_is_there(make, tokenizer, monkeypatch, status):
    scripted = problems(4, 30)
    with TeacherServer(scripted) as server:
        cfg = make(scripted, server.url, concurrency=2)
        distill(dataclasses.replace(cfg, limit=5), KEY, tokenizer)
        body = json.dumps({"error": {"message": f"no, {KEY}", "code": "x"}}).encode()
        monkeypatch.setattr("teacher_server.play", always(status, body))
        summary = distill(cfg, KEY, tokenizer)
        asked = len(server.headers_seen)
    assert summary["failed"] and f"HTTP {status}" in summary["stopped"]
    assert KEY not in summary["stopped"] and "[key]" in summary["stopped"]
    assert summary["rows"] == 5 and len(lines(cfg, "rows.jsonl")) == 5
    assert asked <= 5 + cfg.concurrency


def test_an_exhausted_quota_stops_though_it_comes_as_429(make, tokenizer, monkeypatch):
    scripted = problems(4, 3)
    body = b'{"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}'
    monkeypatch.setattr("teacher_server.play", always(429, body))
    with TeacherServer(scripted) as server:
        summary = distill(make(scripted, server.url, patience=3), KEY, tokenizer)
    assert "top up the balance" in summary["stopped"]


def test_a_prompt_that_the_server_will_not_read_is_rejected_once(make, tokenizer, monkeypatch):
    scripted = problems(5, 4)
    body = b'{"error": {"message": "Content Exists Risk", "code": "invalid_request_error"}}'
    monkeypatch.setattr("teacher_server.play", always(400, body))
    with TeacherServer(scripted) as server:
        cfg = make(scripted, server.url)
        for _ in range(2):
            summary = distill(cfg, KEY, tokenizer)
            assert summary["rejected"] == {"content_filter": 4} and not summary["failed"]
        assert len(server.headers_seen) == 4
    assert [one["reason"] for one in lines(cfg, "rejects.jsonl")] == ["content_filter"] * 4


def test_questions_given_up_are_open_and_come_in_the_next_run(make, tokenizer, monkeypatch):
    scripted = problems(6, 3)
    with TeacherServer(scripted) as server:
        cfg = make(scripted, server.url, attempts=3)
        monkeypatch.setattr("teacher_server.play", always(503, b"busy"))
        summary = distill(cfg, KEY, tokenizer)
        assert (summary["open"], summary["gave_up"]) == (3, {"http_503": 3})
        assert summary["failed_requests"] == {"http_503": 9} and not summary["failed"]
        monkeypatch.undo()
        assert distill(cfg, KEY, tokenizer)["rows"] == 3


def test_a_request_keeps_its_key_until_a_whole_reply_also_over_a_restart(
    make, tokenizer, monkeypatch
):
    """A server that remembers keys gives a lost answer again; a useless one is of no use twice."""
    scripted = problems(16, 1)
    with TeacherServer(scripted) as server:
        cfg = make(scripted, server.url, attempts=2)
        for status, body in ((503, b"busy"), (200, b"no JSON")):
            monkeypatch.setattr("teacher_server.play", always(status, body))
            assert distill(cfg, KEY, tokenizer)["open"] == 1
        monkeypatch.undo()
        assert distill(cfg, KEY, tokenizer)["rows"] == 1
        keys = [headers["Idempotency-Key"].rpartition("-") for headers in server.headers_seen]
    assert [number for _, _, number in keys] == ["0", "0", "0", "1", "2"]
    assert len({request for request, _, _ in keys}) == 1


def test_a_server_that_never_answers_stops_the_run(make, tokenizer, monkeypatch):
    scripted = problems(6, 3)
    monkeypatch.setattr("teacher_server.play", always(429, b"{}"))
    with TeacherServer(scripted) as server:
        summary = distill(make(scripted, server.url, patience=0.3), KEY, tokenizer)
    assert summary["failed"] and "must answer within 0.3 s" in summary["stopped"]


def test_bad_answers_in_a_row_stop_the_run(make, tokenizer, monkeypatch):
    scripted = problems(7, 30)
    monkeypatch.setattr("teacher_server.play", always(200, completion('{"steps": [], "x": 1}')))
    with TeacherServer(scripted) as server:
        cfg = make(scripted, server.url, max_rejects_in_row=4, concurrency=1)
        summary = distill(cfg, KEY, tokenizer)
    assert "got 4 rejects in a row, the last bad_schema" in summary["stopped"]
    assert summary["rejected"] == {"bad_schema": 4} and summary["open"] == 26
    tries = Counter(record["prompt_hash"] for record in lines(cfg, "journal.jsonl"))
    assert list(tries.values()) == [5] * 4  # each asked five times for a better form


def test_a_wrong_answer_is_not_asked_for_again(make, tokenizer, monkeypatch):
    scripted = problems(8, 6)
    wrong = {"steps": [{"text": "So it is"}], "answer": "nine and a half"}
    monkeypatch.setattr("teacher_server.play", always(200, completion(json.dumps(wrong))))
    with TeacherServer(scripted) as server:
        summary = distill(make(scripted, server.url), KEY, tokenizer)
        assert len(server.headers_seen) == 6
    assert summary["rejected"] == {"wrong_answer": 6}


# ------------------------------------------------------------------------- pace and money


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured(make, tokenizer, monkeypatch, status):
    scripted, times = problems(9, 4), []
    play = teacher_server.play

    def late(handler, *rest):
        times.append(time.monotonic())
        if len(times) == 1:
            return send(handler, status, b"{}", [("Retry-After", "0.5")])
        return play(handler, *rest)

    monkeypatch.setattr("teacher_server.play", late)
    with TeacherServer(scripted) as server:
        summary = distill(make(scripted, server.url, concurrency=1), KEY, tokenizer)
    assert summary["rows"] == 4 and times[1] - times[0] >= 0.5


def test_waits_that_servers_ask_for():
    assert wait_of("7", 0) == 7 and wait_of("", 0) == 0 and wait_of("soon", 0) == 0
    assert wait_of("Thu, 01 Jan 1970 00:01:40 GMT", 60) == 40
    assert wait_of("Thu, 01 Jan 1970 00:01:40 GMT", 600) == 0  # past
    with pytest.raises(Exception, match="must answer again within 3600 s, got Retry-After 86400"):
        wait_of("86400", 0)


def test_the_gate_halves_at_a_429_and_opens_one_by_one():
    async def run() -> list[int]:
        gate, seen = Gate(16), []
        async with gate as first, gate as second:
            gate.too_fast(first, 0)
            seen.append(gate.limit)
            gate.too_fast(second, 0)  # was sent before the halving: says nothing new
            seen.append(gate.limit)
        async with gate as third:
            gate.too_fast(third, 0)
            seen.append(gate.limit)
            async with gate, gate, gate:
                with pytest.raises(TimeoutError):  # the fifth has to wait
                    await asyncio.wait_for(gate.__aenter__(), 0.05)
        for _ in range(4):
            gate.answered()
        seen.append(gate.limit)
        for _ in range(200):
            gate.answered()
        return [*seen, gate.limit]

    assert asyncio.run(run()) == [8, 8, 4, 5, 16]


def test_the_budget_is_never_passed(make, tokenizer):
    scripted = problems(10, 40)
    with TeacherServer(scripted, latency=0.05) as server:
        cfg = make(scripted, server.url, max_tokens=100)
        worst = worst_usd(Price(0.01, 0.1, 1), estimate(cfg, tokenizer)["request"])
        cfg = dataclasses.replace(cfg, max_usd=6 * worst)
        summary = distill(cfg, KEY, tokenizer)
        assert 0 < summary["rows"] < 40 and summary["usd"] <= cfg.max_usd
        assert "--max_usd" in summary["stopped"] and not summary["failed"]
        rows, spent = summary["rows"], summary["usd"]
        summary = distill(cfg, KEY, tokenizer)  # what the folder has cost counts
        assert spent <= summary["usd"] <= cfg.max_usd and summary["rows"] <= rows + 6
        assert distill(dataclasses.replace(cfg, max_usd=1.0), KEY, tokenizer)["rows"] == 40


def test_a_dry_run_shows_the_very_request_and_sends_none(make, tokenizer):
    scripted = problems(11, 7)
    with TeacherServer(scripted) as server:
        cfg = make(scripted, server.url, max_tokens=100)
        plan = estimate(cfg, tokenizer)
        assert not server.headers_seen and not Path(cfg.output).exists()
        distill(dataclasses.replace(cfg, limit=1), KEY, tokenizer)
        sent = json.loads(next(iter(server.delivered)))
        later = estimate(cfg, tokenizer)
    assert plan["request"] == sent
    characters = sum(len(m["content"]) for m in sent["messages"])
    assert worst_usd(Price(0.01, 0.1, 1), sent) == pytest.approx((characters * 0.1 + 100) / 1e6)
    assert (plan["to_ask"], later["to_ask"], later["questions"]) == (7, 6, 7)
    assert plan["likely_usd"] is None
    # 6 answers of 50 tokens at 1 dollar a million, and 0.3 tokens a character at 0.1
    assert later["likely_usd"] == pytest.approx(300e-6 + later["prompt_tokens"] * 0.1e-6)
    prompts = [question.prompt for question in read_input(cfg, tokenizer).questions]
    lengths = [len(encode_prompt(tokenizer, prompt)) for prompt in prompts]
    short = dataclasses.replace(cfg, max_prompt_tokens=min(lengths))
    longer = sum(length > min(lengths) for length in lengths)
    shown = describe(short, estimate(short, tokenizer))
    assert longer and f"not asked: {longer} prompt_too_long" in shown
    text = describe(cfg, plan)
    assert "not asked" not in text
    assert f"POST {server.url}/chat/completions" in text and "at most $" in text
    assert "Bearer $DEEPSEEK_API_KEY" in text and json.dumps(sent, indent=2) in text


# ------------------------------------------------------------------------- the key


def test_the_key_is_nowhere_but_in_the_header(make, tokenizer, monkeypatch, capfd):
    scripted = problems(12, 6)

    def echo(handler, server, body, fault):
        sent = handler.headers["Authorization"]
        asked = json.loads(body)["messages"][-1]["content"]
        answers = [
            (500, f"<html>{sent}</html>".encode()),
            (200, f"<html>{sent}</html>".encode()),
            (200, completion(json.dumps(solution(scripted[asked]) | {"note": sent}), model=sent)),
        ]
        server.met["n"] += 1
        send(handler, *answers[server.met["n"] % 3])

    monkeypatch.setattr("teacher_server.play", echo)
    with TeacherServer(scripted) as server:
        cfg = make(scripted, server.url)
        summary = distill(cfg, KEY, tokenizer)
        monkeypatch.setattr("teacher_server.play", always(401, f"bad key {KEY}".encode()))
        refused = distill(dataclasses.replace(cfg, seed=1), KEY, tokenizer)
    assert summary["rows"] == 6 and "bad key [key]" in refused["stopped"]
    written = [path.read_text() for path in Path(cfg.output).iterdir()]
    printed = capfd.readouterr()
    assert len(written) == 4 and not [text for text in written if KEY in text]
    assert "[key]" in "".join(written)
    assert KEY not in printed.out + printed.err + table(summary) + str(refused)


def test_the_command_keeps_the_key_to_itself(make, tmp_path):
    scripted = problems(13, 3)
    with TeacherServer(scripted) as server:
        make(scripted, server.url)
        server.scripted = {}  # the handler raises and drops every connection
        env = os.environ | {"DEEPSEEK_API_KEY": KEY}
        flags = ["--attempts=2", "--max_rejects_in_row=1"]
        done = subprocess.run(command(tmp_path, server.url, *flags), env=env, capture_output=True,
                              text=True)  # fmt: skip
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: teacher: rows")
    assert server.headers_seen[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in done.stdout + done.stderr and "connection" in done.stdout


@pytest.mark.parametrize("key", ["sk-a b", "sk-a\nb", "sk-ä", "sk-\x07"])
def test_a_key_that_no_header_can_carry(key, monkeypatch):
    cfg = Settings(input=("i",), output="o")
    monkeypatch.setenv("DEEPSEEK_API_KEY", key)
    with pytest.raises(ValueError, match="DEEPSEEK_API_KEY: the key must be printable") as refused:
        key_from_environment(cfg)
    assert key not in str(refused.value)


def test_only_servers_on_this_machine_need_no_key(monkeypatch):
    monkeypatch.delenv("DEEPSEEK_API_KEY", raising=False)
    with pytest.raises(ValueError, match="DEEPSEEK_API_KEY: the environment must hold"):
        key_from_environment(Settings(input=("i",), output="o"))
    local = Settings(input=("i",), output="o", teacher="t", base_url="http://127.0.0.1:1/v1")
    assert key_from_environment(local) == ""
    far = Settings(input=("i",), output="o", teacher="t", base_url="http://box:8000/v1")
    with pytest.raises(ValueError, match="must be https where the key would cross a network"):
        check_settings(far)
    check_settings(dataclasses.replace(far, api_key_env=""))
    assert key_from_environment(dataclasses.replace(far, api_key_env="")) == ""
    monkeypatch.setenv("OTHER", KEY + "\n")
    assert key_from_environment(dataclasses.replace(local, api_key_env="OTHER")) == KEY


# ------------------------------------------------------------------------- files


def test_a_torn_last_line_is_dropped_and_a_broken_one_refused(make, tokenizer):
    scripted = problems(14, 4)
    with TeacherServer(scripted) as server:
        cfg = make(scripted, server.url)
        distill(cfg, KEY, tokenizer)
        path = Path(cfg.output) / "journal.jsonl"
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
        assert distill(cfg, KEY, tokenizer)["answered_now"] == 1
        assert distill(cfg, KEY, tokenizer)["answered_now"] == 0
        path.write_bytes(b'{"key": 1}\n' + whole)
        with pytest.raises(ValueError, match=r"journal.jsonl:1: a line must be a record"):
            distill(cfg, KEY, tokenizer)
        assert path.read_bytes() == b'{"key": 1}\n' + whole
    assert len(server.headers_seen) == 5


def test_a_full_disk_loses_one_answer_and_nothing_else(make, tokenizer):
    scripted = problems(15, 6)
    with TeacherServer(scripted) as server:
        cfg = make(scripted, server.url, concurrency=1)
        distill(dataclasses.replace(cfg, limit=2), KEY, tokenizer)
        path = Path(cfg.output) / "journal.jsonl"
        before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
        try:
            with pytest.raises(ValueError, match="rows.jsonl: must be written"):
                distill(cfg, KEY, tokenizer)  # the journal first, then the rows
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before
        assert len(lines(cfg, "rows.jsonl")) == 2
        assert len(server.headers_seen) == 3  # stopped at once
        assert distill(cfg, KEY, tokenizer)["rows"] == 6


def test_one_run_at_a_time(tmp_path):
    with Journal(tmp_path / "j.jsonl") as second:
        with Journal(tmp_path / "j.jsonl") as first:
            assert first.lock(wait=False) and not second.lock(wait=False)
        assert second.lock(wait=False)


def test_questions_that_are_not_asked(make, tokenizer, tmp_path):
    scripted = problems(16, 2)
    first, second = scripted.values()
    with TeacherServer(scripted) as server:
        cfg = make(scripted, server.url, on_bad_row="skip", against=(str(tmp_path / "test.jsonl"),))
        test_row = question_row(second) | {"chosen": "<reasoning>1</reasoning><answer>1</answer>"}
        test_row["metadata"]["checkpoints"] = []
        (tmp_path / "test.jsonl").write_text(json.dumps(test_row))
        rows = [
            question_row(first) | {"source": "s", "chosen": "old", "reasoning": "none"},
            question_row(first),
            question_row(second),
            {"domain": "math", "prompt": "why " * 400},
            {"domain": "art", "prompt": "why"},
            {"domain": "math", "prompt": " "},
            {"domain": "math", "prompt": "why", "metadata": {"final_answer": 5}},
        ]
        text = "\n".join(json.dumps(row) for row in rows)
        Path(cfg.input[0]).write_text(text + '\n{"domain": "math", "prompt": "\\ud800"}\n[]\n')
        summary = distill(cfg, KEY, tokenizer)
        with pytest.raises(ValueError, match=r"questions.jsonl:5: domain must be one of .*"):
            distill(dataclasses.replace(cfg, on_bad_row="fail"), KEY, tokenizer)
    (row,) = lines(cfg, "rows.jsonl")
    assert row["source"] == "s" and row["reasoning"] == "teacher"
    reasons = {one["line"]: one["reason"] for one in lines(cfg, "rejects.jsonl")}
    assert reasons == {
        2: "duplicate", 3: "in_test_set", 4: "prompt_too_long", 5: "bad_fields", 6: "bad_fields",
        7: "bad_fields", 8: "bad_json", 9: "bad_json",
    }  # fmt: skip
    assert summary["not_asked"] == dict(Counter(reasons.values())) and summary["rejected"] == {}


def test_near_repeats_are_not_paid_for(make, tokenizer):
    scripted = problems(17, 1)
    (problem,) = scripted.values()
    words = " ".join(f"word{i}" for i in range(40))
    near = {f"{words} {end}": dataclasses.replace(problem, domain="math", question=f"{words} {end}")
            for end in ("one", "two")}  # fmt: skip
    with TeacherServer(near) as server:
        summary = distill(make(near, server.url, max_similarity=0.8), KEY, tokenizer)
        assert summary["not_asked"] == {"near_duplicate": 1} and len(server.headers_seen) == 1


# ------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": ()}, "--input: must be given"),
        ({"teacher": "gpt"}, "--base_url: must be given for a teacher other than deepseek-flash"),
        ({"base_url": "ftp://x"}, "--base_url: must be an http"),
        ({"base_url": "http://api.example.com/v1"}, "--base_url: must be https"),
        ({"base_url": "https://me:pw@host/v1"}, "--base_url: must be an http"),
        ({"price": "1,2"}, "--price: must be CACHED,INPUT,OUTPUT"),
        ({"price": "1,-2,3"}, "--price: must be CACHED,INPUT,OUTPUT"),
        ({"extra_body": "[]"}, "--extra_body: must be a JSON object"),
        ({"concurrency": 0}, "--concurrency: must be at least 1, got 0"),
        ({"timeout": 0}, "--timeout: must be above 0, got 0"),
        ({"max_usd": 1.0, "base_url": "https://host/v1"}, "--max_usd: must come with a price"),
        ({"max_similarity": 2.0}, "--max_similarity: must be 0 to 1"),
    ],
)
def test_settings_that_cannot_be_used(change, message):
    cfg = Settings(input=("i",), output="o")
    check_settings(cfg)
    with pytest.raises(ValueError, match=message):
        check_settings(dataclasses.replace(cfg, **change))


def test_another_server_has_neither_deepseeks_prices_nor_its_fields():
    cfg = Settings(input=("i",), output="o")
    assert teacher_of(cfg).base_url == "https://api.deepseek.com"
    assert teacher_of(cfg).price.output == 0.6
    other = teacher_of(dataclasses.replace(cfg, base_url="https://host/v1/"))
    assert (other.base_url, other.price, other.extra_body) == ("https://host/v1", None, {})


def test_without_httpx_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ValueError, match=r"pip install 'gemma_cot\[teacher\]'"):
        open_client(Settings(input=("i",), output="o"), KEY)
