"""A real S3 server on loopback (moto), and a proxy in front of it that does to requests what networks and clouds do."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import s3fs

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


def environment(endpoint: str) -> dict[str, str]:
    """Return the variables by which every client finds the server."""
    return KEYS | {"AWS_ENDPOINT_URL": endpoint, "MLFLOW_S3_ENDPOINT_URL": endpoint, "AWS_MAX_ATTEMPTS": "1"}


def use(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it the only server that this process and what it starts know."""
    for name, value in environment(endpoint).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # the clients at hand know another endpoint


@contextmanager
def s3_server() -> Iterator[str]:
    """Give the endpoint of a fresh S3 server."""
    moto = pytest.importorskip("moto.server", reason="moto[server] plays S3 in these tests")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()  # the next server of this process has another endpoint


def make_bucket(endpoint: str, name: str) -> str:
    """Make a bucket and return its URL."""
    connection = HTTPConnection(urlsplit(endpoint).netloc)
    connection.request("PUT", f"/{name}")
    assert connection.getresponse().status == 200
    return f"s3://{name}"


@dataclass(frozen=True)
class Request:
    """What a fault is decided by."""

    method: str
    path: str
    headers: dict[str, str]
    number: int
    """From 1, of those that a proxy has had."""


@dataclass
class Answer:
    """What goes back to the client."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: int | None = None
    """Bytes of the body after which the connection breaks; None: none are missing."""


Fault = Callable[[Request, Callable[[], Answer]], Answer]
"""Takes a request and what asks the server behind, and gives the answer."""


def refuse(status: int, code: str, message: str) -> Fault:
    """Answer with an error of S3; the server behind is not asked."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    return lambda request, ask: Answer(
        status, {"Content-Type": "application/xml"}, b"" if request.method == "HEAD" else body
    )


def truncate(request: Request, ask: Callable[[], Answer]) -> Answer:
    """Break the connection in the middle of the body."""
    answer = ask()
    answer.cut = len(answer.body) // 2
    return answer


def alter(request: Request, ask: Callable[[], Answer]) -> Answer:
    """Change the last byte of the body."""
    answer = ask()
    answer.body = answer.body[:-1] + bytes([answer.body[-1] ^ 1])
    return answer


def lose_answer(request: Request, ask: Callable[[], Answer]) -> Answer:
    """Let the server act, and break the connection before its answer."""
    ask()
    return Answer(0)


class FaultyS3:
    """A proxy on loopback. `fault(request)` says what happens to a request, or None for nothing."""

    def __init__(self, backend: str) -> None:
        self.fault: Callable[[Request], Fault | None] = lambda request: None
        self.requests: list[Request] = []
        place, proxy, lock = urlsplit(backend).netloc, self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with lock:
                    request = Request(self.command, self.path, dict(self.headers), len(proxy.requests) + 1)
                    proxy.requests.append(request)
                    fault = proxy.fault(request)
                answer = fault(request, lambda: self.ask(body)) if fault is not None else self.ask(body)
                self.reply(answer)

            def ask(self, body: bytes) -> Answer:
                connection = HTTPConnection(place)
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                answer = Answer(response.status, dict(response.getheaders()), response.read())
                connection.close()
                return answer

            def reply(self, answer: Answer) -> None:
                if answer.status == 0:
                    self.close_connection = True
                    return
                self.send_response_only(answer.status)
                own = ("content-length", "connection", "transfer-encoding", "server", "date")
                for name, value in answer.headers.items():
                    if name.lower() not in own or (self.command == "HEAD" and name.lower() == "content-length"):
                        self.send_header(name, value)
                if self.command != "HEAD":
                    self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body[: answer.cut])
                self.close_connection = answer.cut is not None

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815 - names of the base class

            def log_message(self, *arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *request: Any) -> None:
                # A client that was killed, or a server that is gone: not the next test's output.
                if not isinstance(sys.exc_info()[1], (ConnectionError, HTTPException)):
                    super().handle_error(*request)

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = "http://{}:{}".format(*self._server.server_address[:2])

    def __enter__(self) -> "FaultyS3":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def behind_proxy(backend: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[FaultyS3]:
    """Give a proxy in front of a server, as the only S3 that this process and what it starts know."""
    with FaultyS3(backend) as proxy:
        use(proxy.endpoint, monkeypatch)
        monkeypatch.setenv("PREFIXQUANT_CACHE", str(cache))
        yield proxy
        s3fs.S3FileSystem.clear_instance_cache()
