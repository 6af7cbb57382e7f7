"""A W&B server for tests: enough of GraphQL and of the file stream that wandb believes in it, on 127.0.0.1.

It remembers what it was told (history rows by run, configuration, every request body), can stop answering at any
moment, and can pretend that a run exists already.
"""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    def __init__(self) -> None:
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.exit_codes: dict[str, int] = {}
        self.bodies: list[bytes] = []
        self.requests: list[str] = []
        self.runs: set[str] = set()
        self.silent = threading.Event()  # set: take requests and never answer
        self._closing = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                outer._answer(self, b"")

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                outer._answer(self, body)

            do_PUT = do_POST  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that hang up are expected
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        self.bodies.append(body)
        self.requests.append(f"{request.command} {request.path}")
        if self.silent.is_set():
            self._closing.wait()
            request.close_connection = True
            return
        data = json.dumps(self._reply(request.path, body)).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def _reply(self, path: str, body: bytes) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            return self._file_stream(path.split("/")[-2], json.loads(body))
        if path.endswith("/graphql"):
            return {"data": self._graphql(json.loads(body))}
        return {}

    def _file_stream(self, run_id: str, body: dict[str, Any]) -> dict[str, Any]:
        rows = self.history.setdefault(run_id, [])
        chunk = (body.get("files") or {}).get("wandb-history.jsonl")
        if chunk:
            del rows[chunk["offset"] :]
            rows.extend(json.loads(line) for line in chunk["content"])
        if body.get("complete"):
            self.exit_codes[run_id] = body["exitcode"]
        return {"exitcode": None, "limits": {}}

    def _graphql(self, body: dict[str, Any]) -> dict[str, Any]:
        query, variables = body["query"], body.get("variables") or {}
        if "upsertBucket" in query:
            run_id = variables["name"]
            inserted = run_id not in self.runs
            self.runs.add(run_id)
            return {"upsertBucket": {"bucket": self._bucket(run_id), "inserted": inserted}}
        if "RunResumeStatus" in query or "resumeStatus" in query:
            run_id = variables["name"]
            bucket = self._bucket(run_id) if run_id in self.runs else None
            return {"model": {"id": "m", "name": "p", "entity": {"id": "e", "name": "e"}, "bucket": bucket}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/storage/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        if "query ArtifactType" in query:
            return {"project": {"artifact": None}}
        if "createArtifact(" in query:  # as if a table with the same content were there already: nothing to upload
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s", "latestArtifact": None}}
            return {"createArtifact": {"artifact": artifact}}
        if "viewer" in query:
            return {"viewer": {"id": "v", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}}
        if "serverInfo" in query or "ServerInfo" in query:
            return {"serverInfo": {"cliVersionInfo": {"max_cli_version": "99.0.0"}}}
        return {}

    def _bucket(self, run_id: str) -> dict[str, Any]:
        rows = self.history.get(run_id, [])
        return {
            "id": f"storage-{run_id}",
            "name": run_id,
            "displayName": run_id,
            "description": None,
            "config": "{}",
            "sweepName": None,
            "state": "running",
            "historyLineCount": len(rows),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(rows[-1])] if rows else []),
            "eventsTail": "[]",
            "summaryMetrics": json.dumps(rows[-1] if rows else {}),
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),
            "project": {"id": "m", "name": "p", "entity": {"id": "e", "name": "e"}},
        }
