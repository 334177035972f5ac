"""An OpenAI-compatible server on this machine that answers, or misbehaves, as a function of the request decides."""

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler

from local_server import LocalServer


def chat_body(text: str | None, finish_reason: str = "stop", **message: object) -> bytes:
    """A chat completion, as it goes over the wire."""
    choice = {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": text, **message},
    }
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return json.dumps(reply).encode()


@dataclass(frozen=True)
class Fault:
    """What a server does instead of answering: a status with a body, or nothing at all.

    Args:
        status: Status code.
        body: Bytes of the body.
        headers: More headers.
        seconds: How long to wait before.
        seconds_per_byte: How long to wait after each byte of the body.
        hangs_up: Close the connection after this many bytes of the body.
    """

    status: int = 500
    body: bytes = b'{"error": {"message": "out of order"}}'
    headers: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0
    seconds_per_byte: float = 0.0
    hangs_up: int | None = None


FAULTS = {
    "rate_limited": Fault(429, headers=(("Retry-After", "0.01"),)),
    "server_error": Fault(500),
    "unavailable": Fault(503),
    "closed": Fault(200, chat_body("half of it"), hangs_up=20),
    "closed_at_once": Fault(hangs_up=0),
    "not_json": Fault(200, b"{'choices': ["),
    "html": Fault(200, b"<html>busy</html>", headers=(("Content-Type", "text/html"),)),
    "garbage": Fault(200, bytes(range(256))),
    "no_choices": Fault(200, b'{"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": []}'),
    "no_text": Fault(200, chat_body(None)),
    "truncated": Fault(200, chat_body("and then the", "length")),
    "thinks_on": Fault(200, chat_body("<think>hmm, let me see")),
}


class ChatServer(LocalServer):
    """An OpenAI-compatible server.

    Args:
        reply: From a request's JSON and how often it was asked before, its answer: text, bytes of a body, or a fault.
        port: Port; 0 takes a free one.
    """

    def __init__(self, reply: Callable[[dict, int], str | bytes | Fault], port: int = 0):
        super().__init__(_Handler, port)
        self.reply = reply
        self.requests: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.num_active = self.max_active = 0

    @property
    def url(self) -> str:
        return f"{super().url}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = json.dumps(request, sort_keys=True)
        server = self.server
        with server.lock:
            server.requests.append(request)
            server.times.append(time.monotonic())
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            times = server.asked[key]
            server.asked[key] += 1
            server.num_active += 1
            server.max_active = max(server.max_active, server.num_active)
        try:
            reply = server.reply(request, times)
            if isinstance(reply, str):
                reply = chat_body(reply)
            if isinstance(reply, bytes):
                with server.lock:
                    server.answered[key] += 1
                reply = Fault(200, reply)
            self._send(reply)
        finally:
            with server.lock:
                server.num_active -= 1

    def _send(self, reply: Fault) -> None:
        time.sleep(reply.seconds)
        if reply.hangs_up == 0:
            self.close_connection = True
            return
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **dict(reply.headers)}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        body = reply.body[: reply.hangs_up]
        pieces = [body[i : i + 1] for i in range(len(body))] if reply.seconds_per_byte else [body]
        for piece in pieces:
            self.wfile.write(piece)
            time.sleep(reply.seconds_per_byte)
        self.close_connection = reply.hangs_up is not None
