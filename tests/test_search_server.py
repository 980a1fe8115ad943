"""The search server: what it answers, what it refuses, and the page in a browser."""

import http.client
import json
import threading
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from personmae.configs import UserError
from personmae.extraction import FeatureExtractor
from personmae.models.vit import VisionTransformer, initialise
from personmae.models.weights import save_encoder
from personmae.models.zoo import ENCODERS
from personmae.recipes.programs import ServeConfig
from personmae.search_server import MAX_BYTES, SearchServer
from personmae.tasks.searching import build_gallery
from tests import test_report

chromium = test_report.chromium
POST = {"Content-Type": "application/octet-stream"}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Over six colours, each in two pictures; one name is HTML."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gallery = tmp_path / "gallery"
    gallery.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = np.clip(rng.integers(0, 256, 3) + rng.integers(-20, 20, (128, 64, 3)), 0, 255)
        for name, scale in (("a", 1.0), ("<b>&", 0.95)):
            Image.fromarray((pixels * scale).astype(np.uint8)).save(gallery / f"{number}{name}.png")
    (tmp_path / "secret.png").write_bytes((gallery / "0a.png").read_bytes())
    encoder = VisionTransformer(ENCODERS["vit-nano"])
    initialise(encoder, torch.Generator().manual_seed(0))
    save_encoder(tmp_path / "encoder.safetensors", encoder, {})
    extractor = FeatureExtractor(tmp_path / "encoder.safetensors")
    config = ServeConfig(gallery=gallery, checkpoint=tmp_path / "encoder.safetensors")
    with SearchServer(build_gallery(config, extractor, say=str), extractor, top=5) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def ask(server, method, path, body=None, headers=None):
    """Status, headers and content of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    connection.request(method, path, body=body, headers=headers or {})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), content


def names(content):
    return [hit["name"] for hit in json.loads(content)["found"]]


def test_a_picture_finds_its_likes_by_name_and_by_content(server):
    status, headers, content = ask(server, "GET", "/search?name=3a.png")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert names(content)[0] == "3<b>&.png"
    assert len(names(content)) == 5
    assert "3a.png" not in names(content)
    body = (Path(server.gallery.root) / "3a.png").read_bytes()
    assert names(ask(server, "POST", "/search", body, POST)[2])[:2] == ["3a.png", "3<b>&.png"]
    status, headers, content = ask(server, "GET", "/image?name=" + urllib.parse.quote("3<b>&.png"))
    assert (status, headers["Content-Type"], content[:3]) == (200, "image/jpeg", b"\xff\xd8\xff")


def test_nothing_but_the_gallery_is_given_out(server):
    for name in ("../secret.png", urllib.parse.quote("../secret.png"), str(Path(server.gallery.root).parent / "secret.png"), "nobody.png", ""):
        for path in ("image", "search"):
            status, _, content = ask(server, "GET", f"/{path}?name={name}")
            assert status == 404
            assert "the gallery has no picture" in json.loads(content)["error"]
    assert ask(server, "GET", "/gallery/3a.png")[0] == 404
    # A page from elsewhere, under a name that was made to point here.
    assert ask(server, "GET", "/", headers={"Host": "evil.example:80"})[0] == 403
    assert ask(server, "POST", "/search", b"x", POST | {"Host": "evil.example"})[0] == 403
    headers = ask(server, "GET", "/")[1]
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "Access-Control-Allow-Origin" not in headers


def test_what_is_no_picture_is_refused(server):
    assert ask(server, "POST", "/search", b"not a picture", POST)[0] == 400
    assert ask(server, "POST", "/search", b"", POST)[0] == 400
    # What a form of another page could send.
    assert ask(server, "POST", "/search", b"x", {"Content-Type": "text/plain"})[0] == 415
    assert ask(server, "POST", "/search", b"x", POST | {"Content-Length": str(MAX_BYTES + 1)})[0] == 413
    assert ask(server, "POST", "/search", None, POST | {"Content-Length": "many"})[0] == 411
    assert ask(server, "POST", "/elsewhere", b"x", POST)[0] == 404
    # It still answers.
    assert ask(server, "GET", "/search?name=1a.png")[0] == 200
    with pytest.raises(UserError, match="cannot listen"):
        SearchServer(server.gallery, server.extractor, port=server.server_address[1])


@pytest.mark.chromium
def test_a_browser_shows_what_was_found(server, chromium):
    class Address(str):
        def as_uri(self):
            return str(self)

    dom = chromium(Address(f"{server.url}?query=3a.png"), "--virtual-time-budget=15000", "--dump-dom")
    assert dom.count("<li>") == 5
    assert '<p id="said" role="status" class="">5 pictures</p>' in dom
    # Names are text, whatever they hold.
    assert "3&lt;b&gt;&amp;.png" in dom
    dom = chromium(Address(f"{server.url}?query=nobody.png"), "--virtual-time-budget=15000", "--dump-dom")
    assert '<p id="said" role="status" class="error">the gallery has no picture nobody.png</p>' in dom
