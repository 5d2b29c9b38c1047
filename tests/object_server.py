"""A server of objects for tests, in this process: what S3, GCS, Azure and plain web servers answer to GET and HEAD, and faults."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

SECRET = "a-secret-that-nobody-quotes"
Fault = Callable[["Call"], bool]
"""Answers a call instead of the server, or changes what lies there; False leaves the answer to the server."""


@dataclass
class Call:
    """One request."""

    handler: BaseHTTPRequestHandler
    number: int
    """How many requests for this object came before"""
    name: str
    """The object, relative to the folder"""
    whole: bytes
    first: int
    last: int
    """Its bytes, and which of them are asked for, the last one included"""

    @property
    def body(self) -> bytes:
        return self.whole[self.first : self.last + 1]

    def answer(self, status: int, body: bytes = b"", *, claimed: int | None = None) -> None:
        """Sends headers and a body; `claimed` is the length that the headers promise."""
        self.handler.send_response(status)
        if status == 206:
            self.handler.send_header("Content-Range", f"bytes {self.first}-{self.last}/{len(self.whole)}")
        self.handler.send_header("Content-Length", str(len(body) if claimed is None else claimed))
        self.handler.send_header("Last-Modified", "Mon, 30 Nov 2026 00:00:00 GMT")
        self.handler.send_header("ETag", f'"{md5(self.whole).hexdigest()}"')
        self.handler.end_headers()
        if self.handler.command != "HEAD":
            self.handler.wfile.write(body)
        if claimed is not None:
            self.drop()

    def drop(self) -> None:
        """Ends the connection."""
        self.handler.close_connection = True
        self.handler.wfile.flush()
        self.handler.connection.shutdown(2)


@dataclass
class ObjectServer:
    """Serves a folder below any first parts of a path: /lab/t.zarr/... as S3 does, /t.zarr/... as a web server does."""

    folder: Path
    address: str = ""
    ranges: bool = True
    """Whether parts of objects can be had, as not from every web server"""
    faults: list[Fault] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)
    """Method and object of every request"""
    sent: list[tuple[str, int]] = field(default_factory=list)
    """Object and bytes of every whole answer"""

    def url(self, kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> str:
        """The URL of a folder in this server as `kind` (s3, gs, az or http), whose keys and address go into the environment."""
        environment = {
            "AWS_ACCESS_KEY_ID": "the-key",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.address,
            "GOOGLE_BASE_URL": self.address,
            "GOOGLE_SKIP_SIGNATURE": "true",
            "AZURE_STORAGE_ENDPOINT": self.address,
            "AZURE_STORAGE_ACCOUNT_NAME": "lab",
            "AZURE_STORAGE_SAS_KEY": f"sv=1&sig={SECRET}",
            "NO_PROXY": "127.0.0.1",
        }
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        return f"{self.address}/{name}" if kind == "http" else f"{kind}://lab/{name}"

    def count(self, part: str = "") -> int:
        return sum(part in name for _, name in self.calls)


@contextmanager
def serving(folder: Path) -> Iterator[ObjectServer]:
    state, lock = ObjectServer(folder), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0]).lstrip("/")
            name = next((part for part in _ends(path) if (folder / part).is_file()), path)
            with lock:
                number = sum(name == other for _, other in state.calls)
                state.calls.append((self.command, name))
            whole = (folder / name).read_bytes() if (folder / name).is_file() else None
            call = Call(self, number, name, whole or b"", 0, len(whole or b"") - 1)
            asked = self.headers.get("Range") if state.ranges else None
            if asked is not None:
                first, last = asked.removeprefix("bytes=").split("-")
                call.first, call.last = int(first), min(int(last or call.last), call.last)
            try:
                if any(fault(call) for fault in state.faults):
                    return
                if whole is None:
                    call.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
                else:
                    # First the note: a client that has the answer may look at once.
                    state.sent.append((name, len(call.body) if self.command == "GET" else 0))
                    call.answer(200 if asked is None else 206, call.body)
            except OSError:  # the client went away
                self.close_connection = True

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as server:
        state.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield state
        server.shutdown()
        thread.join()


def _ends(path: str) -> Iterator[str]:
    """A path, and what remains of it without its first parts."""
    parts = path.split("/")
    return ("/".join(parts[start:]) for start in range(len(parts)))


def failing(status: int, times: int, part: str = "") -> Fault:
    """The first requests for each of these objects fail."""

    def fault(call: Call) -> bool:
        if part not in call.name or call.number >= times:
            return False
        call.answer(status, b"<Error>slow down</Error>")
        return True

    return fault


def dropping(times: int, part: str = "", *, after: float = 0.0) -> Fault:
    """The first connections for each of these objects end early: at once, or after a part of the body."""

    def fault(call: Call) -> bool:
        if part not in call.name or call.number >= times:
            return False
        if after:
            ranged = (call.first, call.last) != (0, len(call.whole) - 1)
            call.answer(206 if ranged else 200, call.body[: int(len(call.body) * after)], claimed=len(call.body))
        else:
            call.drop()
        return True

    return fault


def waiting(seconds: float, times: int, part: str = "") -> Fault:
    """The first answers for each of these objects come late."""

    def fault(call: Call) -> bool:
        if part in call.name and call.number < times:
            time.sleep(seconds)
        return False

    return fault
