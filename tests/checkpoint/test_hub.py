"""The Hub, spoken to over HTTP: a server on this machine answers as the Hub does, also badly."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from checkpoints import compressed, fp8, scales, write

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server holds, how it misbehaves, and what it was asked.

    ``drops`` breaks that many downloads of the file ``dropped`` in the middle.
    """

    files: dict[str, bytes]
    token: str | None = None
    drops: int = 0
    dropped: str = ""
    ranges: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    url: str = ""


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.send(401, b"", {"X-Error-Code": "RepoNotFound"})
            elif not path.startswith(("/api/models/owner/name", "/owner/name/")):
                self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif match := re.match(r"/api/models/owner/name/revision/(.+)", path):
                self.info(match[1])
            elif re.match(r"/api/models/owner/name/tree/", path):
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in hub.files.items()
                ]
                self.send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
            elif path == "/api/models/owner/name":
                self.info("main")
            elif match := re.match(r"/owner/name/resolve/[^/]+/(.+)", path):
                self.file(match[1], body=body)
            else:
                self.send(404, b"", {})

        def info(self, revision: str) -> None:
            if revision not in ("main", COMMIT, "v1"):
                self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
                return
            siblings = [{"rfilename": name} for name in hub.files]
            facts = {"id": "owner/name", "modelId": "owner/name", "sha": COMMIT, "siblings": siblings, "tags": [],
                     "private": False, "downloads": 0, "likes": 0}  # fmt: skip
            self.send(200, json.dumps(facts).encode(), {"Content-Type": "application/json"})

        def file(self, name: str, *, body: bool) -> None:
            content = hub.files.get(name)
            if content is None:
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            start, status = 0, 200
            facts = {
                "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            if (asked := self.headers.get("Range")) and body:
                hub.ranges.append(asked)
                start, status = int(asked.removeprefix("bytes=").split("-")[0]), 206
                facts["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if body and name == hub.dropped and hub.drops > 0:
                hub.drops -= 1
                middle = start + (len(content) - start) // 2
                self.send(status, content[start:middle], facts, length=len(content) - start)
                self.close_connection = True
                self.connection.close()
                return
            self.send(status, content[start:] if body else b"", facts, length=len(content) - start)

        def send(self, status: int, content: bytes, facts: dict[str, str], *, length: int | None = None) -> None:
            self.send_response(status)
            for key, value in facts.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content) if length is None else length))
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()

    return Handler


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = write(
        tmp_path / "repository",
        {"m.weight": fp8(1024, 1024), "m.weight_scale": scales(1024, 1)},
        compressed("channel", "token"),
    )
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    found = Hub(files={**files, "pytorch_model.bin": b"never fetched", "tokenizer.json": b"{}"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(found))
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


OPEN = """
import sys, json, torch
from fp8gemm import CheckpointError
from fp8gemm.checkpoint import open_checkpoint
name, options = sys.argv[1], json.loads(sys.argv[2])
try:
    checkpoint = open_checkpoint(name, **options)
    print(json.dumps({"sum": float(checkpoint.dequantize("m.weight").double().sum())}))
except CheckpointError as error:
    print(json.dumps({"error": str(error)}))
"""


def opened(hub: Hub, tmp_path: Path, name: str = "owner/name", **options: object) -> dict[str, object]:
    """What another process finds, since huggingface_hub reads its environment when it is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
    }
    ran = subprocess.run(
        [sys.executable, "-c", OPEN, name, json.dumps({"cache_dir": str(tmp_path / "cache"), **options})],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    facts: dict[str, object] = json.loads(ran.stdout)
    return facts


SUM = float((fp8(1024, 1024).float() * scales(1024, 1)).double().sum())


def test_a_repository_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    assert opened(hub, tmp_path) == {"sum": SUM}
    weights = "GET /owner/name/resolve/" + COMMIT + "/model.safetensors"
    assert hub.asked.count(weights) == 1
    assert not any("pytorch_model.bin" in asked for asked in hub.asked)
    assert opened(hub, tmp_path) == {"sum": SUM}
    assert hub.asked.count(weights) == 1
    assert any((tmp_path / "cache").rglob("model.safetensors"))


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_revisions(revision: str, hub: Hub, tmp_path: Path) -> None:
    assert opened(hub, tmp_path, revision=revision) == {"sum": SUM}
    assert "name exists on the Hub, but has no revision v9" in str(opened(hub, tmp_path, revision="v9"))


def test_a_dropped_connection_resumes_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    """huggingface_hub takes up a file at a multiple of 10 MB: this one is 24 MB, and breaks in the middle."""
    hub.files["padding.safetensors"] = os.urandom(24_000_000)
    hub.drops = 1
    hub.dropped = "padding.safetensors"
    assert opened(hub, tmp_path) == {"sum": SUM}
    assert hub.drops == 0
    assert len(hub.ranges) == 1
    assert int(hub.ranges[0].removeprefix("bytes=").split("-")[0]) >= 10_000_000
    arrived = next((tmp_path / "cache").rglob("padding.safetensors")).read_bytes()
    assert arrived == hub.files["padding.safetensors"]


def test_an_interrupted_download_goes_on_with_the_files_that_lack(hub: Hub, tmp_path: Path) -> None:
    hub.files["padding.safetensors"] = os.urandom(1000)
    hub.drops = 1000
    hub.dropped = "model.safetensors"
    error = str(opened(hub, tmp_path)["error"])
    assert "downloading owner/name failed" in error
    assert "opening it again resumes from there" in error
    assert any((tmp_path / "cache").rglob("padding.safetensors"))
    assert not any((tmp_path / "cache").rglob("model.safetensors")), "half a file has no name"
    hub.drops = 0
    hub.asked.clear()
    assert opened(hub, tmp_path) == {"sum": SUM}
    assert not any("GET" in asked and "padding" in asked for asked in hub.asked)


def test_tokens(hub: Hub, tmp_path: Path) -> None:
    hub.token = "secret"
    error = str(opened(hub, tmp_path, token=False)["error"])
    assert "neither a local file or folder nor a repository on the Hub that you can access" in error
    assert "token=" in error
    assert opened(hub, tmp_path, token="secret") == {"sum": SUM}
    assert "secret" not in error


def test_offline(hub: Hub, tmp_path: Path) -> None:
    error = str(opened(hub, tmp_path, offline=True)["error"])
    assert "owner/name has not been downloaded completely, and offline mode is on" in error
    assert hub.asked == []
    opened(hub, tmp_path)
    hub.asked.clear()
    assert opened(hub, tmp_path, offline=True) == {"sum": SUM}
    assert hub.asked == []


def test_no_such_repository(hub: Hub, tmp_path: Path) -> None:
    assert "nobody/nothing is neither a local file or folder" in str(opened(hub, tmp_path, "nobody/nothing")["error"])


def test_nobody_answers(tmp_path: Path) -> None:
    nobody = Hub(files={}, url="http://127.0.0.1:9")
    error = str(opened(nobody, tmp_path)["error"])
    assert "downloading owner/name failed" in error


def test_the_sum_is_a_real_check() -> None:
    assert torch.isfinite(torch.tensor(SUM))
    assert SUM != 0
