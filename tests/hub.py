"""A local stand-in for the Hugging Face hub, with as much as an upload needs; it accepts one token."""

import base64
import contextlib
import json
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RIGHT = "hf_right"


class Hub(BaseHTTPRequestHandler):
    """The handler of the stand-in, which keeps what was committed: repository -> file -> bytes."""

    repositories: dict[str, dict[str, bytes]]
    #: The repositories that nobody else may see.
    private: set[str]

    def do_GET(self) -> None:
        match self.path.partition("?")[0].removeprefix("/api/").split("/"):
            case ["models", owner, name, "tree", *_]:
                files = self.repositories[f"{owner}/{name}"]
                self._answer(
                    [
                        {"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
                        for path, data in files.items()
                    ]
                )
            case ["models", owner, name]:
                self._answer({"id": f"{owner}/{name}", "private": f"{owner}/{name}" in self.private})
            case _:
                self._answer({"type": "user", "name": "owner"})

    def do_POST(self) -> None:
        body = self._body()
        match self.path.removeprefix("/api/").split("/"):
            case ["repos", "create"]:
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'owner'}/{asked['name']}"
                is_new = name not in self.repositories
                if is_new and asked.get("visibility") == "private":
                    self.private.add(name)
                self.repositories.setdefault(name, {})
                url = f"http://{self.headers['Host']}/{name}"
                self._answer({"url": url, "name": name}, 200 if is_new else 409)
            case ["models", _, _, "preupload", _]:
                files = json.loads(body)["files"]
                self._answer(
                    {
                        "files": [
                            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                            for file in files
                        ]
                    }
                )
            case ["models", owner, name, "commit", _]:
                files = self.repositories[f"{owner}/{name}"]
                for entry in map(json.loads, body.splitlines()):
                    if entry["key"] == "file":
                        files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                    elif entry["key"] == "deletedFile":
                        del files[entry["value"]["path"]]
                self._answer({"commitUrl": self.path, "commitOid": "0" * 40, "hookOutput": ""})
            case _:
                self._answer({}, 200)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, content: object, status: int = 200) -> None:
        if self.headers.get("Authorization") != f"Bearer {RIGHT}":
            content, status = {"error": "Invalid credentials"}, 401
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def local_hub(private: Iterable[str] = ()) -> Iterator[tuple[str, dict[str, dict[str, bytes]]]]:
    """Serve a hub; yield its address and what it keeps. An existing repository is public unless it is listed."""
    repositories: dict[str, dict[str, bytes]] = {}
    handler = type("OwnHub", (Hub,), {"repositories": repositories, "private": set(private)})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", repositories
        server.shutdown()
