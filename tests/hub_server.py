"""A small Hugging Face hub on this machine: the endpoints that making a repository and uploading a folder use."""
from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

TOKEN = "hf_secret_of_this_test"


class Hub(ThreadingHTTPServer):
    """`files`: what the one repository holds. `refuses`: how many commits it does not take."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.visibility: dict[str, str] = {}                 # {name: as it was made}
        self.objects: dict[str, bytes] = {}                  # large files by their digest
        self.files: dict[str, bytes] = {}
        self.commits, self.refuses = 0, 0


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        if self.path.endswith("/auth-check/write"):
            return self.answer({}, 200 if self.may_write() else 403)
        if "/tree/" in self.path:
            return self.answer([{"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                                for path, content in self.server.files.items()])
        self.answer({"id": "me/model", "sha": "0" * 40})

    def do_PUT(self) -> None:                                # a large file's content; the address is signed, as on S3
        self.server.objects[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        hub, content = self.server, self.body()
        if not self.may_write():
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked['organization']}/{asked['name']}"
            code = 409 if name in hub.visibility else 200
            hub.visibility.setdefault(name, asked.get("visibility"))
            return self.answer({"url": f"{hub.address}/{name}"}, code)
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            return self.answer({"files": [{"path": file["path"], "shouldIgnore": False,
                                           "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                                          for file in json.loads(content)["files"]]})
        if self.path.endswith("/info/lfs/objects/batch"):
            return self.answer({"objects": [{**wanted, "actions": {"upload": {
                "href": f"{hub.address}/storage/{wanted['oid']}"}}} for wanted in json.loads(content)["objects"]]})
        if "/commit/" in self.path:
            return self.commit([json.loads(line) for line in content.splitlines()])
        self.answer({"error": f"unknown: {self.path}"}, 404)

    def commit(self, lines: list[dict[str, Any]]) -> None:
        hub = self.server
        if hub.refuses:
            hub.refuses -= 1
            return self.answer({"error": "storage quota exceeded"}, 403)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[value["path"]] = hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del hub.files[value["path"]]
        hub.commits += 1
        oid = f"{hub.commits:040x}"
        self.answer({"success": True, "commitUrl": f"{hub.address}/me/model/commit/{oid}", "commitOid": oid})

    def may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content: object, code: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


S = TypeVar("S", bound=ThreadingHTTPServer)


def hub() -> AbstractContextManager[Hub]:
    return serving(Hub())


@contextmanager
def serving(server: S) -> Iterator[S]:
    """Inside, a thread answers for the server."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
