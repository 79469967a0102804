"""A small Hugging Face hub on this machine to download from: models and data sets, whose branch `main` moves."""
from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from hub_server import serving


class Hub(ThreadingHTTPServer):
    """`commits`: {"models/me/m" or "datasets/me/d": {commit: {path: content}}}, the newest last."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}

    def commit(self, name: str, folder: Path) -> str:
        """The commit in which the repository's main is now what the folder holds."""
        files = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
        commit = hashlib.sha1(repr((name, files)).encode()).hexdigest()
        self.commits.setdefault(name, {})[commit] = files
        return commit


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        words = unquote(urlsplit(self.path).path).strip("/").split("/")
        if words[0] == "api":
            name, rest = "/".join(words[1:4]), words[4:]
            files = self.files(name, rest[1] if len(rest) > 1 else "main")
            if files is None:
                return self.answer(b'{"error": "Repository not found"}', 404, {"X-Error-Code": "RepoNotFound"})
            commit, found = files
            listed = [{"type": "file", "path": path, "size": len(content), "oid": digest(content)}
                      for path, content in found.items()]
            if rest[:1] == ["paths-info"]:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
                asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
                listed = [entry for entry in listed if entry["path"] in asked]
            if rest[:1] in (["paths-info"], ["tree"]):
                return self.answer(json.dumps(listed).encode())
            return self.answer(json.dumps({
                "id": "/".join(words[2:4]), "sha": commit, "private": False, "tags": [], "downloads": 0, "likes": 0,
                "siblings": [{"rfilename": path} for path in found]}).encode())
        kind = "datasets" if words[0] == "datasets" else "models"
        words = words[kind == "datasets":]
        files = self.files(f"{kind}/{'/'.join(words[:2])}", words[3])
        if files is None or "/".join(words[4:]) not in files[1]:
            return self.answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
        content = files[1]["/".join(words[4:])]
        self.answer(content, 200, {"X-Repo-Commit": files[0], "ETag": f'"{digest(content)}"'})

    do_HEAD = do_POST = do_GET

    def files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        held = self.server.commits.get(name, {})
        commit = list(held)[-1] if held and revision == "main" else revision
        return (commit, held[commit]) if commit in held else None

    def answer(self, content: bytes, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(content)),
                           **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def hub() -> AbstractContextManager[Hub]:
    return serving(Hub())
