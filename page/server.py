"""The page's server: a few files, and questions that are answered by a Studio.

    GET /               the page; a query in its URL is a setting, which the page asks about
    GET /about          the network, as JSON
    GET /plan?QUERY     what a drawing would cost, its link, command line and program, as JSON
    GET /draw?QUERY     the drawing: a line of JSON for each event, while the connection is open

A drawing belongs to the connection that asked for it: nobody else sees its pictures, and closing the connection cancels
it. The server is for people on this machine (or whom ssh forwards here): it refuses requests that another site's page
makes a browser send, and its page can load nothing from elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import traceback
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from page.drawing import Studio
from page.settings import Settings
from runtime.errors import UserError

STATIC = Path(__file__).parent / "static"
SCRIPTS = ("levels.js", "pictures.js", "page.js")
FILES = {"/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css")}
FILES |= {f"/{name}": (name, "text/javascript") for name in SCRIPTS}
HOSTS = ("127.0.0.1", "localhost", "::1")
CONTENT = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'"  # nothing from other hosts
FAULTS = (ValueError, FloatingPointError, OSError, UserError)  # of what was asked for; their text says what to do


class CancelledError(Exception):
    """Nobody waits for the drawing any more."""


class PageServer(ThreadingHTTPServer):
    """Serves the page of a network, to this machine alone.

    Args:
        studio:  that draws
        default: settings that the page opens with
        about:   the network in words and numbers, for the page
        network: flags of sample.py that name the network
        load:    arguments of Pipeline.load that do so
        port:    0 for any that is free
    """

    def __init__(
        self,
        studio: Studio,
        default: Settings,
        about: dict[str, Any],
        network: list[str],
        load: tuple[str, str],
        port: int = 0,
    ) -> None:
        self.studio = studio
        self.default = default
        self.about = about
        self.network = network
        self.load = load
        self.drawings: set[Handler] = set()  # that are under way
        self.closing = False
        super().__init__(("127.0.0.1", port), Handler)

    def server_close(self) -> None:
        """Close the server, and cancel the drawings."""
        self.closing = True
        super().server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def plan(self, query: str) -> dict[str, Any]:
        """All that the page shows of a setting before it is drawn (raises as Studio.plan)."""
        settings = Settings.from_query(query, self.default)
        costs = self.studio.in_turn(lambda: self.studio.plan(settings))
        return {
            "settings": asdict(settings),
            "query": settings.query(),
            "command": settings.command(self.network),
            "python": settings.python(*self.load),
            **costs,
        }


class Handler(BaseHTTPRequestHandler):
    """Answers a request."""

    server: PageServer
    server_version = "PPFlow"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in HOSTS:
            self.answer(403, {"error": "this page is for 127.0.0.1 alone"})
        elif url.path in FILES:
            name, kind = FILES[url.path]
            self.send(200, f"{kind}; charset=utf-8", (STATIC / name).read_bytes())
        elif url.path not in ("/about", "/plan", "/draw"):
            self.answer(404, {"error": f"there is no {url.path} here"})
        elif self.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            self.answer(403, {"error": "another site's page asked for this"})
        elif url.path == "/about":
            self.answer(200, self.server.about)
        elif url.path == "/plan":
            self.plan(url.query)
        else:
            self.draw(url.query)

    def plan(self, query: str) -> None:
        try:
            self.answer(200, self.server.plan(query))
        except FAULTS as error:
            self.answer(400, {"error": str(error)})

    def draw(self, query: str) -> None:
        """Stream the events of a drawing; an error is the last one."""
        self.send(200, "application/x-ndjson")
        self.server.drawings.add(self)
        try:
            self.server.studio.draw(Settings.from_query(query, self.server.default), self.tell)
            self.tell({"kind": "end"})
        except CancelledError:
            pass
        except FAULTS as error:
            self.tell_error(str(error))
        except torch.OutOfMemoryError:
            self.tell_error("the device's memory is too small for these pictures: draw fewer, or smaller ones")
        except Exception as error:
            if self.server.closing:  # the queue takes nothing more
                return
            traceback.print_exc()
            self.tell_error(f"the drawing failed with {type(error).__name__}: the terminal of app.py says more")
        finally:
            self.server.drawings.discard(self)

    def tell_error(self, message: str) -> None:
        with contextlib.suppress(CancelledError):
            self.tell({"kind": "error", "error": message})

    def tell(self, event: dict[str, Any]) -> None:
        """Write an event as a line (CancelledError if the other side has closed the connection)."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        try:
            if self.server.closing or (readable and not self.connection.recv(1, socket.MSG_PEEK)):
                raise CancelledError
            self.wfile.write(json.dumps(event).encode() + b"\n")
        except OSError as error:
            raise CancelledError from error

    def answer(self, status: int, values: dict[str, Any]) -> None:
        self.send(status, "application/json", json.dumps(values).encode())

    def send(self, status: int, kind: str, body: bytes | None = None) -> None:
        """Send a response; without a body, its beginning."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", CONTENT)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        if body is not None:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if body is not None:
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Say nothing of requests."""
