"""A stub judge: a real HTTP server on this machine with an OpenAI-compatible /chat/completions."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class JudgeServer:
    """Answers each question with what ``reply(question)`` gives: a text, an HTTP code to fail with (and its body), or a whole body.

    Attributes:
        requests: bodies of what was asked, in order, each with its ``Authorization`` header under ``key``.
    """

    def __init__(self, reply: Callable[[str], str | int | bytes | tuple[int, bytes]]) -> None:
        self.requests: list[dict[str, Any]] = []
        ours = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                ours.requests.append({**body, "key": self.headers.get("Authorization"), "path": self.path})
                said = reply(body["messages"][0]["content"])
                code, said = said if isinstance(said, tuple) else (said if isinstance(said, int) else 200, said)
                content = said if isinstance(said, bytes) else json.dumps({"choices": [{"message": {"content": str(said)}}]}).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
