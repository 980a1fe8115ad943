"""A small web server over a gallery: a page to drop a picture on, the search behind it, the pictures of the gallery and nothing else of the disk.

    GET  /                   the page
    GET  /image?name=NAME    a picture of the gallery, small
    GET  /search?name=NAME   the pictures nearest to one of the gallery, as JSON
    POST /search             the same for the picture in the body

It answers to its own names only (the Host header), so that a page from elsewhere cannot reach it under a name that points here, and takes a POST only
with a content type that a form cannot send.
"""

from __future__ import annotations

import io
import json
import threading
import urllib.parse
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from personmae.configs import UserError
from personmae.data.images import UnreadableImage, decode, read_header
from personmae.data.verdicts import MAX_PIXELS
from personmae.evaluation.gallery_index import GalleryIndex
from personmae.extraction import FeatureExtractor
from personmae.visuals.contact_sheet import thumbnail
from personmae.visuals.search_page import PAGE

MAX_BYTES = 20 * 2**20  # of a picture that is sent
POST_TYPE = "application/octet-stream"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLICY = "default-src 'none'; img-src 'self' blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'"


class SearchServer(ThreadingHTTPServer):
    """Answers until `shutdown`; `url` is where."""

    daemon_threads = True

    def __init__(self, gallery: GalleryIndex, extractor: FeatureExtractor, host: str = LOOPBACK[0], port: int = 0, top: int = 20) -> None:
        """port: 0 for a free one. top: pictures of an answer. Raises UserError if the address cannot be had."""
        self.gallery, self.extractor, self.top = gallery, extractor, top
        self.rows = {picture.name: picture.row for picture in gallery.pictures}
        # One network for all requests.
        self.computing = threading.Lock()
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise UserError(f"cannot listen on {host}, port {port}: {error.strerror or error}; choose another with --port") from error

    @property
    def url(self) -> str:
        """The address of the page."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/"

    def find(self, feature: npt.NDArray[np.float32], without: str | None = None) -> list[dict[str, Any]]:
        """The nearest pictures of a feature [D]: name and cosine similarity. without: one that is left out."""
        with self.computing:
            hits = self.gallery.search(feature[None], self.top + 1)
        pairs = zip(hits.names[0], hits.similarities[0], strict=True)
        found = [{"name": name, "similarity": round(similarity, 6)} for name, similarity in pairs if name != without]
        return found[: self.top]

    def describe(self, content: bytes) -> npt.NDArray[np.float32]:
        """The feature [D] of a picture file's content. Raises UnreadableImage if it is none, or larger than images may be."""
        name = "the picture"
        header = read_header(content, name)
        if header.height * header.width > MAX_PIXELS:
            raise UnreadableImage(name, f"is {header.width} x {header.height} pixels, more than {MAX_PIXELS:,}")
        with self.computing:
            return self.extractor(decode(content, name)).numpy()[0]


class _Handler(BaseHTTPRequestHandler):
    server: SearchServer
    timeout = 60

    def do_GET(self) -> None:
        address = urllib.parse.urlsplit(self.path)
        name = urllib.parse.parse_qs(address.query).get("name", [""])[0]
        if not self._is_for_us():
            return
        if address.path == "/":
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", PAGE.encode())
        elif address.path in ("/image", "/search") and name not in self.server.rows:
            self._refuse(HTTPStatus.NOT_FOUND, f"the gallery has no picture {name}")
        elif address.path == "/image":
            self._send_image(name)
        elif address.path == "/search":
            self._send_json({"found": self.server.find(np.asarray(self.server.gallery.features[self.server.rows[name]]), without=name)})
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"there is nothing at {address.path}")

    def do_POST(self) -> None:
        if not self._is_for_us():
            return
        length = self.headers.get("Content-Length", "")
        if urllib.parse.urlsplit(self.path).path != "/search":
            self._refuse(HTTPStatus.NOT_FOUND, "pictures are sent to /search")
        elif self.headers.get_content_type() != POST_TYPE:
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"a picture is sent as {POST_TYPE}")
        elif not length.isascii() or not length.isdigit():
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "the length of the picture is missing")
        elif int(length) > MAX_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the picture has more than {MAX_BYTES // 2**20} MiB")
        else:
            try:
                feature = self.server.describe(self.rfile.read(int(length)))
            except UnreadableImage as error:
                self._refuse(HTTPStatus.BAD_REQUEST, str(error))
                return
            self._send_json({"found": self.server.find(feature)})

    def log_message(self, format: str, *arguments: object) -> None:
        """What was searched for is nobody's business: no log."""

    def _is_for_us(self) -> bool:
        """Whether the request names this server; refuses it else."""
        host = urllib.parse.urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        own = str(self.server.server_address[0])
        if own not in LOOPBACK or host in LOOPBACK:
            return True
        self._refuse(HTTPStatus.FORBIDDEN, f"this server is for this machine alone, not for {host or 'nobody'}")
        return False

    def _send_image(self, name: str) -> None:
        try:
            self._send(HTTPStatus.OK, "image/jpeg", thumbnail(Path(self.server.gallery.root) / name))
        except UnreadableImage as error:
            self._refuse(HTTPStatus.NOT_FOUND, str(error))

    def _send_json(self, content: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(status, "application/json", json.dumps(content).encode())

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        # What was not read of the request would be taken for the next one.
        self.close_connection = True
        self._send_json({"error": reason}, status)

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Content-Security-Policy": POLICY}
        headers |= {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(io.BytesIO(content).getbuffer())
