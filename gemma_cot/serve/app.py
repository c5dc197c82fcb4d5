"""The HTTP of the server: /v1/chat/completions, streamed or not, and /v1/models (Starlette)."""

import asyncio
import json
import queue
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from functools import partial

import jax
import jax.numpy as jnp

from gemma_cot.axes import round_up
from gemma_cot.model.sample import row_keys
from gemma_cot.policy import Policy
from gemma_cot.serve.engine import Row, complete, weights_of, work
from gemma_cot.serve.request import BadRequest, Request, error_body, parse_request

MAX_BODY = 2**20  # bytes of a request: as much is read, and its text made tokens, for any client


def make_app(policy: Policy, name: str, batch: int, seed: int):
    """Return the Starlette application, its model thread running. Compiles before it returns."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    batch = round_up(batch, policy.mesh.shape["data"])
    warm = Request([2], 1, 0.0, 1, (), 0, False, False)
    weights = weights_of(policy)
    complete(policy, weights, batch, [Row(warm, 0, jax.random.key(0), lambda event: None)])
    jobs: queue.Queue[list[Row]] = queue.Queue()
    threading.Thread(target=work, args=(policy, weights, batch, jobs), daemon=True).start()
    count = iter(range(2**62))  # requests without a seed of their own

    async def chat(http):
        try:
            body = json.loads(await read_body(http))
            json.dumps(body, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the body must be JSON in UTF-8, got {error}") from None
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        request = parse_request(body, policy, name, batch)
        number = seed + next(count) if request.seed is None else request.seed
        events, rows = submit(request, number % 2**32, batch, jobs)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if request.stream:
            parts = chunks(head, request, events, rows)
            return StreamingResponse(parts, media_type="text/event-stream")
        return JSONResponse(await whole(head, request, events, rows, http.is_disconnected))

    async def models(http):
        return JSONResponse({"object": "list", "data": [
            {"id": name, "object": "model", "created": 0, "owned_by": "gemma_cot"}]})  # fmt: skip

    async def refuse(http, error):
        bad = isinstance(error, BadRequest)
        status = error.status if bad else getattr(error, "status_code", 500)
        message = error.message if bad else getattr(error, "detail", f"{type(error).__name__}")
        param, code = (error.param, error.code) if bad else (None, None)
        kind = "invalid_request_error" if status < 500 else "server_error"
        return JSONResponse(error_body(message, kind, param, code), status)

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models),
        ],
        exception_handlers={BadRequest: refuse, HTTPException: refuse, Exception: refuse},
    )


async def read_body(http) -> bytes:
    """Return the body of a request; raises BadRequest as soon as it is longer than MAX_BODY."""
    body = bytearray()
    async for part in http.stream():
        body += part
        if len(body) > MAX_BODY:
            raise BadRequest(f"the body must be at most {MAX_BODY} bytes", status=413)
    return bytes(body)


def submit(
    request: Request, seed: int, batch: int, jobs: queue.Queue
) -> tuple[asyncio.Queue, list[Row]]:
    """Hand a request to the model's thread; return the queue of its events, and its rows."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue()
    tell = partial(loop.call_soon_threadsafe, events.put_nowait)
    key_B = row_keys(jax.random.key(seed), jnp.zeros((1,), jnp.int32), batch)  # one shape
    rows = [Row(request, g, key_B[g], tell) for g in range(request.n)]
    jobs.put(rows)
    return events, rows


async def listen(events: asyncio.Queue, rows: list[Row]) -> AsyncIterator[tuple]:
    """Yield (index, new text, finish reason or None, tokens) until all rows have ended.

    Raises what the model's thread met. Rows that nobody listens to any more are given up.
    """
    left = len(rows)
    try:
        while left:
            event = await events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            left -= event[2] is not None
    finally:
        for row in rows:
            row.done = True


def usage_of(request: Request, tokens: dict[int, int]) -> dict:
    """Return OpenAI's usage record; a completion's stop token is counted."""
    prompt, completion = len(request.prompt_ids), sum(tokens.values())
    return {"prompt_tokens": prompt, "completion_tokens": completion,
            "total_tokens": prompt + completion}  # fmt: skip


async def whole(head: dict, request: Request, events, rows, is_gone: Callable) -> dict:
    """Return a chat completion; a client that hangs up meanwhile ends the work."""
    texts, reasons, tokens = [""] * request.n, [None] * request.n, {}
    async with aclosing(listen(events, rows)) as news:
        async for index, text, reason, count in news:
            texts[index] += text
            reasons[index], tokens[index] = reason, count
            if await is_gone():
                break
    choices = [
        {"index": g, "message": {"role": "assistant", "content": texts[g]},
         "finish_reason": reasons[g], "logprobs": None}
        for g in range(request.n)
    ]  # fmt: skip
    usage = usage_of(request, tokens)
    return head | {"object": "chat.completion", "choices": choices, "usage": usage}


async def chunks(head: dict, request: Request, events, rows) -> AsyncIterator[str]:
    """Yield a chat completion as server-sent events."""
    def event(choices: list, usage: dict | None = None) -> str:
        extra = {"usage": usage} if request.include_usage else {}
        chunk = head | {"object": "chat.completion.chunk", "choices": choices} | extra
        return f"data: {json.dumps(chunk)}\n\n"

    def choice(index: int, delta: dict, reason: str | None = None) -> dict:
        return {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}

    tokens: dict[int, int] = {}
    for g in range(request.n):
        yield event([choice(g, {"role": "assistant", "content": ""})])
    try:
        async with aclosing(listen(events, rows)) as news:
            async for index, text, reason, count in news:
                tokens[index] = count
                if text:
                    yield event([choice(index, {"content": text})])
                if reason:
                    yield event([choice(index, {}, reason)])
    except Exception as error:  # the status has gone out as 200: say it in the stream
        yield f"data: {json.dumps(error_body(type(error).__name__, 'server_error'))}\n\n"
        raise
    if request.include_usage:
        yield event([], usage_of(request, tokens))
    yield "data: [DONE]\n\n"
