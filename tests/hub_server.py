"""A small stand-in for the Hugging Face Hub on 127.0.0.1: one dataset, ranged reads, and faults on demand.

Serves what `datasets` and `huggingface_hub` ask when they stream a dataset: the README, the revision, the tree, and
ranged GETs of files. Every request is recorded. A fault is taken off the list by the first request for a data file's
bytes: a status to answer with, `drop` (the connection is closed without an answer), `cut` (half of the body, then the
connection is closed), `short` or `empty` (half of the body or nothing, and a Content-Length that says so).
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """The dataset ID with the files below `root`, served at `endpoint` while the context lasts."""

    root: Path
    dataset: str = "someone/fineweb-edu"
    revision: str = REVISION
    old_revisions: list[str] = field(default_factory=list)  # that can still be asked for
    faults: list[int | str | None] = field(default_factory=list)  # None: this request is answered well
    always: int | None = None  # answer every request with this status
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> "Hub":
        hub = self

        class Handler(_Handler):
            owner = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def data_ranges(self) -> list[tuple[str, str]]:
        """(file, Range) of every GET of a data file's bytes so far."""
        return [
            (path.rpartition("/resolve/")[2].partition("/")[2], spec or "")
            for method, path, spec in self.requests
            if method == "GET" and path.endswith(".parquet") and "/resolve/" in path
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind = self.headers.get("Content-Type", "")
        form = json.loads(data) if "json" in kind else dict(parse_qs(data.decode()))
        self._answer(body=True, form=form)

    def _answer(self, *, body: bool, form: dict[str, Any] | None = None) -> None:
        hub = self.owner
        path = unquote(urlsplit(self.path).path)
        with hub.lock:
            hub.requests.append((self.command, path, self.headers.get("Range")))
        if hub.always is not None:
            return self._send(hub.always, b"{}", {})
        api, files = f"/api/datasets/{hub.dataset}", f"/datasets/{hub.dataset}/resolve/"
        if path == api or path.startswith(f"{api}/revision/"):
            revision = path.removeprefix(f"{api}/revision/") if path != api else "main"
            if revision not in ("main", hub.revision, *hub.old_revisions):
                return self._missing("RevisionNotFound")
            return self._json(self._info() | {"sha": hub.revision if revision == "main" else revision})
        if path.startswith(f"{api}/tree/"):
            return self._json(self._tree(path.removeprefix(f"{api}/tree/").partition("/")[2]))
        if path.startswith(f"{api}/paths-info/"):
            return self._json([self._entry(name) for name in (form or {}).get("paths", []) if self._exists(name)])
        if path.startswith(files):
            revision, _, name = path.removeprefix(files).partition("/")
            return self._file(name, hub.revision if revision == "main" else revision, body=body)
        return self._missing("RepoNotFound")

    def _info(self) -> dict[str, Any]:
        hub = self.owner
        names = [file.relative_to(hub.root).as_posix() for file in sorted(hub.root.rglob("*")) if file.is_file()]
        return {
            "id": hub.dataset,
            "sha": hub.revision,
            "private": False,
            "gated": False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "lastModified": "2025-01-01T00:00:00.000Z",
            "createdAt": "2025-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": name} for name in names],
        }

    def _exists(self, name: str) -> bool:
        return (self.owner.root / name).exists()

    def _entry(self, name: str) -> dict[str, Any]:
        path = self.owner.root / name
        if path.is_dir():
            return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        size = path.stat().st_size
        return {
            "type": "file",
            "oid": digest[:40],
            "size": size,
            "path": name,
            "lfs": {"oid": digest, "size": size, "pointerSize": 100},
        }

    def _tree(self, folder: str) -> list[dict[str, Any]]:
        base = self.owner.root / folder
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
        found = sorted(base.rglob("*") if recursive else base.iterdir()) if base.is_dir() else []
        return [self._entry(path.relative_to(self.owner.root).as_posix()) for path in found]

    def _file(self, name: str, revision: str, *, body: bool) -> None:
        path = self.owner.root / name
        if not path.is_file():
            return self._missing("EntryNotFound")
        data = path.read_bytes()
        headers = {
            "X-Repo-Commit": revision,
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "Accept-Ranges": "bytes",
            "X-Linked-Size": str(len(data)),
        }
        status, spec = 200, self.headers.get("Range")
        if spec:
            first, _, last = spec.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data, status = data[start:stop], 206
        fault = self._next_fault() if body and name.endswith((".parquet", ".jsonl")) else None
        if isinstance(fault, int):
            return self._send(fault, b"busy", {"Retry-After": "0"} if fault == 429 else {})
        if fault == "drop":
            self.close_connection = True
            return self.connection.close()
        if fault in ("short", "empty"):
            data = data[: len(data) // 2] if fault == "short" else b""
        return self._send(status, data, headers, cut=fault == "cut")

    def _next_fault(self) -> int | str | None:
        with self.owner.lock:
            return self.owner.faults.pop(0) if self.owner.faults else None

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        self._send(404, b'{"error": "not found"}', {"X-Error-Code": code, "X-Error-Message": "not found"})

    def _send(self, status: int, data: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        try:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self.close_connection = True
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
