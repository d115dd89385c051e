"""A proxy before a real server (of MLflow, of objects) that loses, delays and breaks what passes, by a plan."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LATE_S = 17.0  # longer than the tracker waits for an answer
SLOW_S = 0.3
HOP_BY_HOP = ("connection", "date", "server", "transfer-encoding")  # of a connection, not of an answer

FAULTS = {
    "refused": "the connection is closed before the request is passed on",
    "lost answer": "the request is passed on, and its answer thrown away",
    "500": "an error page with status 500",
    "503 object": "status 503 with JSON that is no answer of MLflow",
    "page": "status 200 with a page in HTML, as of a login",
    "half": "the first half of the answer",
    "nothing": "status 200 with an empty body; the request is not passed on",
    "noise": "status 200 with bytes that are no text",
    "late": "the request waits for longer than the tracker, is passed on, and its answer comes too late",
}


class Proxy:
    """What happens to the next request is what ``choose`` returns: a key of FAULTS, None, or ``slow``: it waits."""

    def __init__(self, target: int) -> None:
        self.choose: Callable[[str], str | None] = lambda path: None
        self.done: list[str] = []
        self._target = target
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = b"".join(proxy.read(self))
                fault = proxy.choose(self.path)
                if fault is not None:
                    proxy.done.append(fault)
                proxy.answer(self, body, fault)

            do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any  # noqa: N815 - names of the library

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._server.server_port}"

    @staticmethod
    def read(handler: BaseHTTPRequestHandler) -> Iterator[bytes]:
        """The body of a request, which may come in chunks of lengths that are told one by one."""
        if handler.headers.get("Transfer-Encoding") != "chunked":
            yield handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
            return
        while length := int(handler.rfile.readline(), 16):
            yield handler.rfile.read(length)
            handler.rfile.readline()
        while handler.rfile.readline().strip():
            pass

    def answer(self, handler: BaseHTTPRequestHandler, body: bytes, fault: str | None) -> None:
        if fault in ("late", "slow"):
            time.sleep(LATE_S if fault == "late" else SLOW_S)
        made = {
            "500": (500, "text/html", b"<html><body>Internal Server Error</body></html>"),
            "503 object": (503, "application/json", b'{"detail": "no upstream"}'),
            "page": (200, "text/html", b"<html><body>Sign in</body></html>"),
            "nothing": (200, "application/json", b""),
            "noise": (200, "application/json", bytes(range(256))),
        }
        if fault == "refused":
            handler.close_connection = True
        elif fault in made:
            status, kind, text = made[fault]
            self._write(handler, status, {"Content-Type": kind, "Content-Length": str(len(text))}, text)
        else:
            status, headers, text = self._ask(handler, body)
            if fault == "lost answer":
                handler.close_connection = True
                return
            if fault == "half":
                text = text[: len(text) // 2]
            length = {} if handler.command == "HEAD" else {"Content-Length": str(len(text))}
            self._write(handler, status, headers | length, text)

    def _ask(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection("127.0.0.1", self._target, timeout=60)
        headers = {name: value for name, value in handler.headers.items() if name.lower() not in ("host", *HOP_BY_HOP)}
        upstream.request(handler.command, handler.path, body, headers | {"Host": f"127.0.0.1:{self._target}"})
        answer = upstream.getresponse()
        text = answer.read()
        upstream.close()
        kept = {name.title(): value for name, value in answer.getheaders() if name.lower() not in HOP_BY_HOP}
        return answer.status, kept, text

    @staticmethod
    def _write(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], text: bytes) -> None:
        try:
            handler.send_response(status)
            for name, value in headers.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(b"" if handler.command == "HEAD" else text)
        except OSError:
            handler.close_connection = True  # nobody waits for it any more

    @contextmanager
    def running(self) -> Iterator[Proxy]:
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
