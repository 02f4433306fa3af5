"""A stand-in for the Hub's API over HTTP: what `huggingface_hub` asks for to make, look at and fill a model
repository of small files. The real one cannot run here; the client that talks to it is the real one."""

from __future__ import annotations

import base64
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


class HubServer:
    """`tokens`: token -> (user, role). `repos` fills up."""

    def __init__(self, tokens: dict[str, tuple[str, str]]) -> None:
        self.tokens = tokens
        self.repos: dict[str, Repo] = {}
        self.asked: list[str] = []
        hub = self

        class Handler(_Handler):
            server_state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_state: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        return None

    def do_GET(self) -> None:
        hub, path = self.server_state, self.path.partition("?")[0]
        hub.asked.append(f"GET {path}")
        owner = self._owner()
        if owner is None:
            return self._answer(401, {"error": "Invalid credentials"})
        if path == "/api/whoami-v2":
            token = {"displayName": "t", "role": owner[1]}
            return self._answer(
                200, {"name": owner[0], "orgs": [{"name": "team"}], "auth": {"accessToken": token}}
            )
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path):
            repo = hub.repos.get(match[1])
            if repo is None:
                return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            rest = match[2] or ""
            if rest.startswith("/tree"):
                return self._answer(
                    200,
                    [
                        {"type": "file", "path": n, "size": len(d), "oid": "0" * 40}
                        for n, d in repo.files.items()
                    ],
                )
            siblings = [{"rfilename": name} for name in repo.files]
            return self._answer(
                200, {"id": match[1], "private": repo.private, "siblings": siblings, "sha": "0" * 40}
            )
        return self._answer(404, {"error": path})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        hub, path = self.server_state, self.path.partition("?")[0]
        hub.asked.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        owner = self._owner()
        if owner is None or owner[1] == "read":
            return self._answer(403, {"error": "Forbidden: this token may not write"})
        if path == "/api/repos/create":
            return self._create(json.loads(body), owner[0])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path):
            repo = hub.repos[match[1]]
            if match[2] == "preupload":
                names = [entry["path"] for entry in json.loads(body)["files"]]
                files = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
                return self._answer(200, {"files": files})
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    repo.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "deletedFile":
                    del repo.files[entry["value"]["path"]]
            url = f"{hub.url}/{match[1]}/commit/{'1' * 40}"
            return self._answer(
                200, {"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""}
            )
        return self._answer(404, {"error": path})

    def _create(self, asked: dict[str, Any], user: str) -> None:
        name = f"{asked.get('organization') or user}/{asked['name']}"
        url = f"{self.server_state.url}/{name}"
        if name in self.server_state.repos:
            return self._answer(409, {"error": "You already created this model repo", "url": url})
        private = asked.get("private", asked.get("visibility") == "private")
        self.server_state.repos[name] = Repo(bool(private))
        return self._answer(200, {"url": url, "name": name, "id": name})

    def _owner(self) -> tuple[str, str] | None:
        return self.server_state.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _answer(self, code: int, data: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(data).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
