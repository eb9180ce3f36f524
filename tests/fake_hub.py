"""A hub of our own: as much of the Hugging Face hub's HTTP as its client needs to upload and download.

Files that the client declares as large go through the large-file batch protocol, others inline.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The repositories, by ``models/user/name`` or ``datasets/user/name``, and who asked for what."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.logins: set[str] = set()
        self.private: dict[str, bool] = {}
        self.token, self.commit = "hf_writer", COMMIT
        self.fails_at = ""  # a file that cannot be downloaded


class Handler(BaseHTTPRequestHandler):
    """Answers for one self.hub."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, status: int, content: Any = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def allowed(self) -> bool:
        login = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.hub.logins.add(login)
        if login != self.hub.token:
            self.reply(401, {"error": "Invalid credentials"})
        return login == self.hub.token

    def do_POST(self) -> None:
        self.hub.requests.append(f"POST {self.path}")
        data = self.body()
        if not self.allowed():
            return
        if self.path == "/api/validate-yaml":
            front = yaml.safe_load(json.loads(data)["content"].split("---")[1])
            base = front.get("base_model", "user/name")
            errors = [] if base.count("/") == 1 and ".." not in base else [{"message": '"base_model" is no model id'}]
            self.reply(400 if errors else 200, {"errors": errors, "warnings": []})
        elif self.path == "/api/repos/create":
            wanted = json.loads(data)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            key = f"{wanted.get('type', 'model')}s/{name}"
            known = key in self.hub.repositories
            self.hub.repositories.setdefault(key, {})
            self.hub.private.setdefault(key, bool(wanted.get("private") or wanted.get("visibility") == "private"))
            self.hub.created.append(wanted)
            self.reply(409 if known else 200, {"url": f"http://{self.headers['Host']}/{name}", "name": name})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            files = [
                {
                    "path": file["path"], "shouldIgnore": False,
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                }
                for file in json.loads(data)["files"]
            ]  # fmt: skip
            self.reply(200, {"files": files})
        elif match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", self.path):
            objects = [
                {**item, "actions": {"upload": {"href": f"http://{self.headers['Host']}/put/{item['oid']}"}}}
                for item in json.loads(data)["objects"]
            ]
            self.reply(200, {"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            repository = self.hub.repositories[f"models/{match[1]}"]
            for line in map(json.loads, data.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repository[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repository[value["path"]] = self.hub.objects[value["oid"]]
            address = f"http://{self.headers['Host']}/{match[1]}/commit/{COMMIT}"
            self.reply(200, {"success": True, "commitOid": COMMIT, "commitUrl": address})
        else:
            self.reply(404, {"error": f"no {self.path}"})

    def do_PUT(self) -> None:
        data = self.body()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.objects[oid] = data
        self.reply(200)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            files = self.hub.repositories.get(f"{match[1]}/{match[2]}")
            if files is None:
                self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
                return
            siblings = [{"rfilename": name} for name in files]
            private = self.hub.private.get(f"{match[1]}/{match[2]}", False)
            about = {"id": match[2], "sha": self.hub.commit, "siblings": siblings, "private": private, "tags": []}
            self.reply(200, about)
        elif match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/[^/]+", path):
            files = self.hub.repositories.get(f"{match[1]}/{match[2]}", {})
            entries = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in files.items()
            ]
            self.reply(200, entries)
        elif match := re.fullmatch(r"(?:/(datasets))?/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            key = f"{match[1] or 'models'}/{match[2]}"
            if key not in self.hub.repositories:
                self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
                return
            content = self.hub.repositories[key].get(match[3])
            if self.hub.fails_at and match[3] == self.hub.fails_at and self.command == "GET":
                self.reply(403, {"error": "Forbidden"})
                return
            if content is None:
                self.reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
                return
            self.reply(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=self.hub.commit)
        else:
            self.reply(404, {"error": f"no {path}"})


@contextmanager
def running_hub() -> Iterator[tuple[Hub, str]]:
    """A hub and its address, while the context lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
