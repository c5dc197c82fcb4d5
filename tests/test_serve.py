"""The server on a real socket: OpenAI's shapes, the sampler's tokens, one compilation, errors."""

import asyncio
import dataclasses
import json
import socket
import threading
import time

import httpx
import jax
import numpy as np
import pytest
import uvicorn

from gemma_cot.axes import make_mesh
from gemma_cot.data import left_pad
from gemma_cot.grpo.rollout import completion_texts
from gemma_cot.model.gemma import logits
from gemma_cot.model.params import init_params
from gemma_cot.model.sample import sample
from gemma_cot.policy import Policy
from gemma_cot.serve.app import listen, make_app, whole
from gemma_cot.serve.engine import Row, advance, sendable, start
from gemma_cot.serve.request import Request, parse_request
from gemma_cot.tokenizer import decode, encode_prompt, load_tokenizer

LIMIT, BATCH = 12, 4
ASK = [{"role": "user", "content": "Tom has 7 apples"}]


@pytest.fixture(scope="module")
def policy(shallow_480, tokenizer_dir) -> Policy:
    cfg, params = shallow_480
    tokenizer = load_tokenizer(tokenizer_dir, cfg.vocab_size)
    return Policy(cfg, params, None, tokenizer, make_mesh("1x1", jax.devices()[:1]), "", 48, LIMIT)


@pytest.fixture(scope="module")
def shallow_480(cfg):
    """The tiny test model with one layer and a row for every piece of the test tokenizer."""
    cfg = dataclasses.replace(cfg, num_layers=1, global_layers=(True,), vocab_size=480)
    return cfg, init_params(jax.random.key(0), cfg)


@pytest.fixture(scope="module")
def url(policy):
    """The address of a running server."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = make_app(policy, "tiny", BATCH, seed=0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    server.should_exit = True
    thread.join()


def post(url: str, messages=ASK, **fields) -> httpx.Response:
    body = {"model": "tiny", "messages": messages} | fields
    return httpx.post(f"{url}/chat/completions", json=body, timeout=60)


def texts(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [choice["message"]["content"] for choice in response.json()["choices"]]


def test_completions_are_those_of_the_sampler(url, policy):
    ids = encode_prompt(policy.tokenizer, ASK[0]["content"])
    tokens_PT, start_P = left_pad([ids], 48)
    want = sample(
        policy.params, policy.cfg, tokens_PT, start_P, jax.random.key(9), num_completions=3,
        max_new_tokens=LIMIT, temperature=0.7, stop_ids=policy.tokenizer.stop_ids,
        prompt_id_P=np.zeros(1, np.int32),
    )  # fmt: skip
    host = jax.device_get(want)
    wanted = completion_texts(
        policy.tokenizer, host.tokens_BT, host.completion_mask_BT, host.stopped_B
    )
    response = post(url, temperature=0.7, seed=9, n=3)
    assert texts(response) == wanted
    assert len(set(wanted)) > 1
    reasons = [choice["finish_reason"] for choice in response.json()["choices"]]
    assert reasons == ["stop" if stopped else "length" for stopped in host.stopped_B]
    assert response.json()["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": int(host.completion_mask_BT.sum()),
        "total_tokens": len(ids) + int(host.completion_mask_BT.sum()),
    }


def test_temperature_zero_takes_the_likeliest_token(url, policy):
    ids = encode_prompt(policy.tokenizer, ASK[0]["content"])
    likeliest = int(logits(policy.params, policy.cfg, np.array([ids]))[0, -1].argmax())
    one = post(url, temperature=0, max_tokens=1, n=2)
    assert texts(one) == [decode(policy.tokenizer, [likeliest])] * 2 != ["", ""]
    assert len(set(texts(post(url, temperature=0, n=3)))) == 1


def test_a_stream_says_the_same_piece_by_piece(url):
    plain = post(url, temperature=1, seed=3, n=2)
    body = {"model": "tiny", "messages": ASK, "temperature": 1, "seed": 3, "n": 2, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    pieces, reasons = ["", ""], {}
    for event in events:
        for choice in event["choices"]:
            pieces[choice["index"]] += choice["delta"].get("content", "")
            if choice["finish_reason"]:
                reasons[choice["index"]] = choice["finish_reason"]
    assert pieces == texts(plain)
    assert reasons == {c["index"]: c["finish_reason"] for c in plain.json()["choices"]}
    assert len(events) > 2 * 3  # several pieces each
    assert events[-1]["choices"] == [] and events[-1]["usage"] == plain.json()["usage"]


def test_limits_stops_and_seeds(url):
    whole = texts(post(url, temperature=0))[0]
    assert len(whole) >= 4
    short = post(url, temperature=0, max_tokens=2)
    assert whole.startswith(texts(short)[0]) and len(texts(short)[0]) < len(whole)
    assert short.json()["choices"][0]["finish_reason"] == "length"
    assert short.json()["usage"]["completion_tokens"] == 2
    assert texts(post(url, temperature=0, max_completion_tokens=10**6)) == [whole]
    middle = whole[2:4]
    stopped = post(url, temperature=0, stop=["never there", middle])
    assert texts(stopped) == [whole[: whole.find(middle)]]
    assert stopped.json()["choices"][0]["finish_reason"] == "stop"
    first, second = (texts(post(url)) for _ in range(2))  # no seed: each request its own draws
    assert first != second


def test_earlier_turns_and_system_text_are_seen(url, policy):
    system = [{"role": "system", "content": "Be brief."}]
    more = [{"role": "assistant", "content": "7"}, {"role": "user", "content": "And pears?"}]
    counts = [post(url, messages, max_tokens=1).json()["usage"]["prompt_tokens"]
              for messages in (ASK, system + ASK, ASK + more)]  # fmt: skip
    assert counts == [
        len(encode_prompt(policy.tokenizer, "Tom has 7 apples")),
        len(encode_prompt(policy.tokenizer, "Tom has 7 apples", "Be brief.")),
        len(encode_prompt(policy.tokenizer, "And pears?", "", [("Tom has 7 apples", "7")])),
    ]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Tom has 7 apples"}]}]
    assert post(url, parts, max_tokens=1).json()["usage"]["prompt_tokens"] == counts[0]


def test_a_request_says_what_is_asked(policy):
    trained = dataclasses.replace(policy, instruction="Think.")

    def parsed(*messages, **fields) -> Request:
        body = {"model": "tiny", "messages": list(messages)} | fields
        return parse_request(body, trained, "tiny", BATCH)

    def ids(system: str) -> list[int]:
        return encode_prompt(policy.tokenizer, ASK[0]["content"], system)

    assert parsed(*ASK).prompt_ids == ids("Think.") != ids("")
    for role in ("system", "developer"):
        told = parsed({"role": role, "content": "Be brief."}, *ASK)
        assert told.prompt_ids == ids("Be brief.")  # in place of the one of training
    assert parsed(*ASK).max_tokens == LIMIT
    for name in ("max_tokens", "max_completion_tokens"):
        assert parsed(*ASK, **{name: 3}).max_tokens == 3
    assert parsed(*ASK, max_tokens=9, max_completion_tokens=3).max_tokens == 3


def test_clients_at_once_share_batches_and_nothing_is_compiled_anew(url):
    compiled = start._cache_size(), advance._cache_size()

    def answer(i: int) -> list[str]:
        fields = {"temperature": 0.5 + i / 10, "n": 1 + i % 3, "max_tokens": 6 + i}
        return texts(post(url, seed=i, **fields))

    alone = [answer(i) for i in range(6)]
    together: list = [None] * 6

    def client(i: int) -> None:
        together[i] = answer(i)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert (start._cache_size(), advance._cache_size()) == compiled


def test_models_are_listed(url):
    listed = httpx.get(f"{url}/models").json()
    assert [model["id"] for model in listed["data"]] == ["tiny"] and listed["object"] == "list"


@pytest.mark.parametrize(
    ("fields", "param", "status"),
    [
        ({"model": "gpt"}, "model", 404),
        ({"messages": []}, "messages", 400),
        ({"messages": "hi"}, "messages", 400),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "messages", 400),
        ({"messages": ASK * 2}, "messages", 400),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages", 400),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", 400),
        ({"messages": [{"role": "user", "content": "7 apples " * 40}]}, "messages", 400),
        ({"n": 0}, "n", 400),
        ({"n": BATCH + 1}, "n", 400),
        ({"n": True}, "n", 400),
        ({"temperature": -1}, "temperature", 400),
        ({"temperature": "hot"}, "temperature", 400),
        ({"max_tokens": 0}, "max_tokens", 400),
        ({"max_tokens": 1.5}, "max_tokens", 400),
        ({"seed": "x"}, "seed", 400),
        ({"stop": ["a"] * 5}, "stop", 400),
        ({"stop": [""]}, "stop", 400),
        ({"top_p": 0.5}, "top_p", 400),
        ({"top_k": 5}, "top_k", 400),
        ({"temperature": 1e-9}, "temperature", 400),
        ({"stream": "false"}, "stream", 400),
        ({"tools": [{}]}, "tools", 400),
        ({"response_format": {"type": "json_schema"}}, "response_format", 400),
    ],
)
def test_bad_requests_are_refused_in_openais_shape(url, fields, param, status):
    response = post(url, **fields)
    error = response.json()["error"]
    assert response.status_code == status and error["param"] == param
    assert error["type"] == "invalid_request_error" and error["message"]


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b'{"model": "\\ud800"}'])
def test_a_body_that_is_no_request(url, body):
    response = httpx.post(f"{url}/chat/completions", content=body)
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_a_body_without_end_is_not_read_to_it(url):
    body = b'{"model": "' + b"x" * 2**21 + b'"}'
    response = httpx.post(f"{url}/chat/completions", content=body)
    assert response.status_code == 413 and "at most 1048576 bytes" in response.text


def test_a_client_that_goes_before_its_body_is_no_error(url, caplog):
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"
    for _ in range(3):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(head)
    assert len(texts(post(url, temperature=0))) == 1
    assert "Exception in ASGI" not in caplog.text


def test_other_addresses_and_methods(url):
    assert httpx.get(f"{url}/nothing").json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{url}/chat/completions").status_code == 405


def test_a_client_that_hangs_up_does_not_stop_the_server(url):
    body = {"model": "tiny", "messages": ASK, "stream": True, "n": BATCH}
    for _ in range(3):
        with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=60) as response:
            next(response.iter_lines())
    began = time.monotonic()
    assert len(texts(post(url, temperature=0))) == 1
    assert time.monotonic() - began < 30


def test_work_for_nobody_is_given_up():
    async def hang_up(gone: bool) -> list[bool]:
        events, request = asyncio.Queue(), Request([2], 2, 0.0, 9, (), 0, False, False)
        rows = [Row(request, g, None, events.put_nowait) for g in range(2)]
        rows[0].tell((0, "a", None, 1))

        async def is_gone() -> bool:
            return True

        if gone:  # a client that waits for the whole answer
            await whole({}, request, events, rows, is_gone)
        else:  # one that reads a stream
            stream = listen(events, rows)
            await anext(stream)
            await stream.aclose()
        return [row.done for row in rows]

    for gone in (True, False):
        assert asyncio.run(hang_up(gone)) == [True, True]


def test_a_failure_of_the_model_reaches_the_client(url, policy, monkeypatch):
    def broken(*_):
        raise MemoryError("no room")

    monkeypatch.setattr("gemma_cot.serve.engine.complete", broken)
    response = post(url)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    monkeypatch.undo()
    assert len(texts(post(url))) == 1


def test_only_what_is_sure_is_sent():
    assert sendable("abc", ()) == 3
    assert sendable("abc<", ("<end>",)) == 3  # may become a stop string
    assert sendable("abc<en", ("<end>", "x")) == 3
    assert sendable("abc<e.", ("<end>",)) == 6  # did not
    assert sendable("abc\ufffd", ()) == 3  # half a character
