"""A scripted teacher on loopback that misbehaves in every way known of real ones.

    with TeacherServer(problems(seed=7, count=30), faults=FAULTS) as server: ... server.url

Answers come from `gemma_cot.tasks.families`, so they are right. Which faults a request meets before
its answer is a function of its body and `seed`. `delivered` counts, per request body, the complete
answers that were handed to the connection: what a real teacher would bill.
"""

import hashlib
import json
import random
import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from gemma_cot.tasks.families import Problem, draw_problem

# Nothing usable comes, and the same request is sent again.
FAULTS = (
    "429", "429_later", "500", "503", "empty", "blank", "html", "cut_json", "cut_body",
    "no_choices", "error_in_200", "empty_content", "resource", "drip", "drop", "drop_midway",
)  # fmt: skip
# A complete answer that is paid for and useless: another request is sent in its place, after
# "length" only once.
BAD_ANSWERS = ("wrong_schema", "no_json_content", "length")
USAGE = {"prompt_tokens": 100, "prompt_cache_hit_tokens": 60, "completion_tokens": 50}


def problems(seed: int, count: int) -> dict[str, Problem]:
    """Return `count` different problems by their question."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        problem = draw_problem(rng)
        found[problem.question] = problem
    return found


def question_row(problem: Problem) -> dict:
    """Return the input row of a problem, with its gold answer."""
    return {
        "domain": problem.domain,
        "prompt": problem.question,
        "metadata": {"final_answer": problem.answer},
    }


def solution(problem: Problem) -> dict:
    """Return what a teacher should reply."""
    steps = [{"text": step.label, "equation": step.equation} for step in problem.steps]
    return {"steps": steps, "answer": problem.answer}


class TeacherServer:
    """A running server. A context manager.

    faults, bad_answers: what may come before an answer, up to `most` of them a request. latency:
    seconds a request takes, at most. storm: after every that many requests, 429 for a third of
    a second. remembers: a complete answer is billed once for every Idempotency-Key and sent again,
    without a fault, to a request that repeats the key.
    """

    def __init__(
        self, scripted, faults=(), bad_answers=(), most=3, latency=0.0, storm=0, seed=0,
        remembers=False,
    ):  # fmt: skip
        self.memory: dict[str, bytes] | None = {} if remembers else None
        self.turns: defaultdict = defaultdict(threading.Lock)  # a key's requests, one by one
        self.from_memory = 0
        self.scripted, self.faults, self.bad_answers = scripted, faults, bad_answers
        self.most, self.latency, self.storm, self.seed = most, latency, storm, seed
        self.delivered: Counter = Counter()  # request body -> complete answers
        self.questions: Counter = Counter()  # question -> complete and good answers
        self.met: Counter = Counter()  # fault -> how often it was played
        self.headers_seen: list[dict] = []
        self.flying = self.most_flying = 0
        self._tries: Counter = Counter()
        self._cut: set[str] = set()  # questions that met "length"
        self.requests, self._storm_ends = 0, 0.0
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "TeacherServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def next_fault(self, body: bytes) -> str | None:
        """Return what this request meets now."""
        with self.lock:
            self.requests += 1
            if self.storm and self.requests % self.storm == 0:
                self._storm_ends = time.monotonic() + 0.3
            if time.monotonic() < self._storm_ends:
                self.met["storm"] += 1
                return "429"
            rng = random.Random(hashlib.sha256(body).digest() + bytes([self.seed]))
            plan = rng.choices(self.faults, k=rng.randint(0, self.most)) if self.faults else []
            at = self._tries[body]
            self._tries[body] += 1
            fault = plan[at] if at < len(plan) else None
            if fault is None and self.bad_answers and rng.random() < 0.3:
                question = json.loads(body)["messages"][-1]["content"]
                fault = None if question in self._cut else rng.choice(self.bad_answers)
                self._cut |= {question} if fault == "length" else set()
            if fault:
                self.met[fault] += 1
            return fault


def completion(content: str | None, reason: str = "stop", **changes) -> bytes:
    """Return the body of a chat completion."""
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": reason}
    return json.dumps({"id": "1", "model": "scripted-1", "choices": [choice], "usage": USAGE}
                      | changes).encode()  # fmt: skip


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections waiting to be accepted; more than a test opens


def _handler(server: TeacherServer) -> type:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_) -> None:
            """Be quiet."""

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with server.lock:
                server.headers_seen.append(dict(self.headers))
                server.flying += 1
                server.most_flying = max(server.most_flying, server.flying)
                turn = server.turns[self.headers["Idempotency-Key"] if server.memory is not None
                                    else id(self)]  # fmt: skip
            try:
                with turn:
                    play(self, server, body, server.next_fault(body))
            except OSError:
                self.close_connection = True  # the client is gone
            finally:
                with server.lock:
                    server.flying -= 1

    return Handler


def send(handler, status: int, body: bytes, headers=(), kind="application/json") -> None:
    """Send a whole response."""
    handler.send_response(status)
    for name, value in (("Content-Type", kind), ("Content-Length", len(body)), *headers):
        handler.send_header(name, str(value))
    handler.end_headers()
    handler.wfile.write(body)


def play(handler, server: TeacherServer, body: bytes, fault: str | None) -> None:
    """Answer one request, or do what `fault` says."""
    once = handler.headers["Idempotency-Key"]
    if server.memory and once in server.memory:
        server.from_memory += 1
        send(handler, 200, server.memory[once])
        return
    question = json.loads(body)["messages"][-1]["content"]
    good = completion(json.dumps(solution(server.scripted[question])))
    error = json.dumps({"error": {"message": "busy", "code": "busy"}}).encode()
    if server.latency and fault not in ("429", "429_later"):
        time.sleep(server.latency * random.uniform(0.3, 1))
    match fault:
        case "429" | "429_later":
            later = [("Retry-After", "0.2")] if fault == "429_later" else []
            send(handler, 429, error, later)
        case "500" | "503":
            send(handler, int(fault), error)
        case "empty":
            send(handler, 200, b"")
        case "blank":
            send(handler, 200, b"\n \n")
        case "html":
            send(handler, 200, b"<html><body>Bad gateway</body></html>", kind="text/html")
        case "cut_json":
            send(handler, 200, good[: len(good) // 2])
        case "no_choices":
            send(handler, 200, b'{"id": "1", "choices": []}')
        case "error_in_200":
            send(handler, 200, error)
        case "empty_content":
            send(handler, 200, completion("   "))
        case "resource":
            send(handler, 200, completion('{"steps": [', "insufficient_system_resource"))
        case "cut_body" | "drop_midway" | "drip":
            misdeliver(handler, good, fault)
        case "drop":
            handler.close_connection = True
            handler.connection.close()
        case _:
            deliver(handler, server, body, question, good, fault)


def misdeliver(handler, good: bytes, fault: str) -> None:
    """Begin the right answer and do not finish it: cut off, in the header, or byte by byte."""
    handler.close_connection = True
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(good)}\r\n"
    if fault == "drop_midway":
        handler.wfile.write(head.encode()[:30])
    elif fault == "cut_body":
        handler.wfile.write(head.encode() + b"\r\n" + good[: len(good) // 2])
    else:
        handler.wfile.write(head.encode() + b"\r\n")
        for at in range(len(good) - 1):
            handler.wfile.write(good[at : at + 1])
            time.sleep(0.1)
    handler.connection.close()


def deliver(handler, server, body: bytes, question: str, good: bytes, fault: str | None) -> None:
    """Deliver a complete answer, now and then behind the blank lines of a server at work."""
    bad = {
        "wrong_schema": completion('{"solution": "forty-two"}'),
        "no_json_content": completion("Sure! Here is the answer."),
        "length": completion('{"steps": [{"text": "And then', "length"),
    }
    answer = bad.get(fault, good)
    if server.memory is not None:
        server.memory[handler.headers["Idempotency-Key"]] = answer
    blank = b"\n" * (hashlib.sha256(body).digest()[0] % 3)
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(blank) + len(answer)))
    handler.end_headers()
    for line in blank:
        handler.wfile.write(bytes([line]))
        time.sleep(0.02)
    handler.wfile.write(answer)
    with server.lock:
        server.delivered[body] += 1
        server.questions[question] += fault is None
