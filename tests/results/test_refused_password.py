"""A server that refuses the password is told from one that is away, and the password is not in the message."""

from __future__ import annotations

import http.server
import threading

import pytest

from grass_ray.config import ConfigError
from grass_ray.results.store import load_records


class Refuses(http.server.BaseHTTPRequestHandler):
    """Answers every request as MLflow's basic-auth does without the right password."""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(401)
        self.send_header("WWW-Authenticate", 'Basic realm="mlflow"')
        self.end_headers()
        self.wfile.write(b"You are not authenticated.")

    do_GET = do_POST = answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_a_password_that_is_refused_is_one_message() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://admin:planted-pa55word@127.0.0.1:{server.server_address[1]}"
    with pytest.raises(ConfigError, match=r"refuses the user or the password; set MLFLOW_TRACKING_USERNAME") as found:
        load_records(address, "mini")
    assert "planted" not in str(found.value)
    server.shutdown()
