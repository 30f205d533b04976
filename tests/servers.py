"""Real servers of files on this machine, and how they can fail."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Quiet(SimpleHTTPRequestHandler):
    """Serves whole files."""

    server: Server

    def log_message(self, *args: object) -> None:
        pass


class Halved(Quiet):
    """Hangs up in the middle of every other file."""

    asked = 0

    def copyfile(self, source: Any, outputfile: Any) -> None:
        Halved.asked += 1
        content = source.read()
        outputfile.write(content[: len(content) // 2] if Halved.asked % 2 else content)


class Server(ThreadingHTTPServer):
    """``paths``: what it was asked for. ``met``: set when somebody has met that it is ``silent``, as :class:`Mute` knows it."""

    daemon_threads = True

    def __init__(self, *how: Any) -> None:
        self.paths: list[str] = []
        self.silent, self.met = "", threading.Event()
        super().__init__(*how)

    def finish_request(self, request: Any, client_address: Any) -> None:
        try:
            super().finish_request(request, client_address)
        except ConnectionError:
            request.close()  # who asked has left


class Server6(Server):
    address_family = socket.AF_INET6


class Recording(Quiet):
    """Serves whole files, and says so little of them as ``given`` has: names of headers, "ETag" among them."""

    given: tuple[str, ...] = ("Content-Length", "Last-Modified")
    etag = "1"

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        super().do_GET()

    def send_header(self, keyword: str, value: str) -> None:
        if keyword not in ("Content-Length", "Last-Modified") or keyword in self.given:
            super().send_header(keyword, value)

    def end_headers(self) -> None:
        if "ETag" in self.given:
            self.send_header("ETag", self.etag)
        super().end_headers()


class Mute(Quiet):
    """Serves whole files until the server is ``silent``: "head", before it says anything; "body", in the middle of a file; "busy": it says that it is; "once": to one that asks, before it says anything to that."""

    def do_GET(self) -> None:
        if self.server.silent == "head" or (self.server.silent == "once" and not self.server.met.is_set()):
            self.hold()
        if self.server.silent == "busy":
            self.server.met.set()
            self.send_error(503)
        else:
            super().do_GET()

    def copyfile(self, source: Any, outputfile: Any) -> None:
        content = source.read()
        outputfile.write(content[: len(content) // 2])
        if self.server.silent == "body":
            self.hold()
        outputfile.write(content[len(content) // 2 :])

    def hold(self) -> None:
        self.server.met.set()
        threading.Event().wait()


@contextmanager
def served(folder: Path, handler: type[SimpleHTTPRequestHandler] = Quiet, server: type[Server] = Server) -> Iterator[tuple[str, Server]]:
    """The files of ``folder`` behind an address of this machine."""
    host, shown = ("::1", "[::1]") if server is Server6 else ("127.0.0.1", "127.0.0.1")
    with server((host, 0), partial(handler, directory=str(folder))) as running:
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"http://{shown}:{running.server_port}", running
        finally:
            running.shutdown()
