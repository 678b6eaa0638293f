"""A real S3 server on the loopback address (moto's), and a proxy before it that fails as stores and networks do."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Fault = Callable[[str, str], str | None]
"""Takes method and path of a request; None lets it through, `500`, `503`, `403`, `reset`, `cut` or `slow` do not."""

ERROR = ("<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>made by a test</Message></Error>")
CODES = {"500": "InternalError", "503": "SlowDown", "403": "AccessDenied"}


@contextlib.contextmanager
def s3_server(bucket: str = "runs") -> Iterator[str]:
    """An S3 server with one bucket; its host and port. Keys for it stand in the environment meanwhile."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    kept = {name: os.environ.get(name) for name in (
        "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_EC2_METADATA_DISABLED")}
    os.environ |= {"AWS_ACCESS_KEY_ID": "a-key-of-this-test", "AWS_SECRET_ACCESS_KEY": "a-secret-of-this-test",
                   "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        connection = http.client.HTTPConnection(host, port)
        connection.request("PUT", f"/{bucket}")
        assert connection.getresponse().status == 200
        yield f"{host}:{port}"
    finally:
        server.stop()
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def url_of(server: str, path: str) -> str:
    return f"s3://{path}?endpoint_override={server}&scheme=http&region=us-east-1"


class Proxy:
    """Forwards to a server, but for the requests that `fault` names. asked: (method, path) of all."""

    def __init__(self, server: str):
        self.fault: Fault = lambda method, path: None
        self.asked: list[tuple[str, str]] = []
        self.faults = 0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                body = self._body()
                proxy.asked.append((self.command, self.path))
                fault = proxy.fault(self.command, self.path)
                proxy.faults += fault is not None
                if fault == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    self.connection.close()
                    self.close_connection = True
                    return
                if fault == "slow":
                    time.sleep(0.3)
                if fault in CODES:
                    self._answer(int(fault), [("Content-Type", "application/xml")],
                                 b"" if self.command == "HEAD" else ERROR.format(code=CODES[fault]).encode())
                    return
                upstream = http.client.HTTPConnection(server)
                own = ("connection", "transfer-encoding", "expect")
                headers = {key: value for key, value in self.headers.items() if key.lower() not in own}
                upstream.request(self.command, self.path, body, headers)
                answer = upstream.getresponse()
                data = answer.read()
                upstream.close()
                left_out = {"connection", "transfer-encoding", "date", "server"}
                headers = [pair for pair in answer.getheaders() if pair[0].lower() not in left_out]
                self._answer(answer.status, headers, data, cut=fault == "cut")

            def _body(self) -> bytes:
                if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                while self.rfile.readline().strip():
                    pass
                return b"".join(parts)

            def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool = False) -> None:
                self.send_response(status)
                for key, value in headers:
                    self.send_header(key, value)
                if not any(key.lower() == "content-length" for key, _ in headers):
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[:len(data) // 2] if cut else b"" if self.command == "HEAD" else data)
                if cut:
                    self.wfile.flush()
                    self.connection.close()
                    self.close_connection = True

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.address = f"127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
