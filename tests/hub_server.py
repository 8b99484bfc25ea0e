"""A real model hub on this machine, as far as up- and downloads need one; what arrives is kept and can be looked at.

It speaks the part of the hub's protocol that `huggingface_hub` uses without Xet: make a repository, list its files,
check a card, ask how each file is sent, send large ones by Git LFS, commit; describe a file and hand it out.
"""

import base64
import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from tests.openai_server import refuse_foreign

COMMIT = "1" * 40


@dataclass
class Repository:
    """What the hub holds of a model."""

    visibility: str | None
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


class HubServer:
    """`with HubServer() as hub:` serves at `hub.url`; `hub.broken` is a status and a text that every answer is then."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        """Large files by their SHA-256."""
        self.tokens: set[str] = set()
        self.requests: list[str] = []
        self.broken: tuple[int, str] | None = None
        self.delay = 0.0
        """Seconds before every answer."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if not refuse_foreign(self):
                    self.answer(b"")

            do_HEAD = do_GET

            def do_POST(self) -> None:
                if not refuse_foreign(self):
                    self.answer(self.read())

            do_PUT = do_POST

            def read(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                chunks = []
                while size := int(self.rfile.readline(), 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(chunks)

            def answer(self, body: bytes) -> None:
                path = urlsplit(self.path).path
                hub.requests.append(f"{self.command} {path}")
                time.sleep(hub.delay)
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                if token:
                    hub.tokens.add(token)
                if hub.broken:
                    status, said = hub.broken[0], {"error": hub.broken[1].format(token=token)}
                else:
                    status, said = hub.serve(self.command, path, body)
                data = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(status)
                if isinstance(said, bytes):
                    self.send_header("ETag", hashlib.sha1(data).hexdigest())
                    self.send_header("X-Repo-Commit", COMMIT)
                elif "repository" in str(said).lower():
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def serve(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """(status, answer) of one request."""
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if method == "PUT" and path.startswith("/objects/"):
            return self._keep(path.removeprefix("/objects/"), body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._offer(o) for o in json.loads(body)["objects"]]}
        if "/resolve/" in path:
            return self._hand_out(*path.removeprefix("/").split("/resolve/"))
        name = "/".join(path.split("/")[3:5])
        repository = self.repositories.get(name)
        if not path.startswith("/api/models/") or repository is None:
            return 404, {"error": "Repository not found"}
        match path.split("/")[5] if path.count("/") > 4 else "":
            case "":
                return 200, {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in repository.files]}
            case "preupload":
                return 200, {"files": [self._describe(file) for file in json.loads(body)["files"]]}
            case "tree":
                listed = repository.files.items()
                return 200, [{"type": "file", "path": p, "size": len(data), "oid": "0" * 40} for p, data in listed]
            case "commit":
                self._commit(repository, body)
                return 200, {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": COMMIT}
        return 404, {"error": "Not found"}

    def _hand_out(self, name: str, place: str) -> tuple[int, Any]:
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        data = self.repositories[name].files.get(place.split("/", 1)[1])
        return (404, {"error": "Entry not found"}) if data is None else (200, data)

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
        self.repositories[name] = Repository(asked.get("visibility"))
        return 200, {"url": f"{self.url}/{name}", "name": name}

    def _describe(self, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith(".safetensors")
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def _offer(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {**wanted, "actions": {"upload": {"href": f"{self.url}/objects/{wanted['oid']}"}}}

    def _keep(self, oid: str, body: bytes) -> tuple[int, Any]:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "the content does not match its hash"}
        self.objects[oid] = body
        return 200, {}

    def _commit(self, repository: Repository, body: bytes) -> None:
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    repository.messages.append(value["summary"])
                case "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    repository.files[value["path"]] = self.objects[value["oid"]]
                case "deletedFile":
                    del repository.files[value["path"]]
