"""A small HTTP server in front of a real one, which answers some requests itself or changes them on their way."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message

NOT_FORWARDED = ("connection", "expect", "transfer-encoding")


@dataclass
class Request:
    """What came in; a gate may change the headers."""

    method: str
    path: str
    headers: Message
    body: bytes


@dataclass(frozen=True)
class Answer:
    """What goes back instead of the real server's answer."""

    status: int
    headers: dict[str, str]
    body: bytes


@contextlib.contextmanager
def fronting(url: str, gate: Callable[[Request], Answer | None]) -> Iterator[str]:
    """Forward to `url` what `gate` does not answer; yields the endpoint, on loopback, served by threads of this
    process.

    The Host header stays that of this server, since signatures cover it.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request = Request(self.command, self.path, self.headers, body)
            answer = gate(request)
            if answer is not None:
                self.answer(answer.status, list(answer.headers.items()), answer.body)
                return
            connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
            with contextlib.closing(connection):
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in request.headers.items():
                    if name.lower() not in NOT_FORWARDED:
                        connection.putheader(name, value)
                connection.endheaders(body)
                response = connection.getresponse()
                kept = [(n, v) for n, v in response.getheaders() if n.lower() not in NOT_FORWARDED]
                self.answer(response.status, kept, response.read())

        def answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers:
                self.send_header(name, value)
            if status != 204 and not any(name.lower() == "content-length" for name, _ in headers):
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = do_PATCH = handle_request  # noqa: N815 - names of http.server

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
