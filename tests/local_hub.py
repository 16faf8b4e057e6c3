"""A Hub on this machine, for tests of uploads and downloads: the part of the Hub's HTTP interface that they use.

`with LocalHub() as hub:` serves until the block ends. A process that has `HF_ENDPOINT` set to `hub.endpoint` before it
imports `huggingface_hub` uses it as the Hub; `hub.repositories[repo_id][path]` are the bytes of an uploaded file.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class LocalHub:
    """Repositories in memory, each with one branch of whatever name, served over HTTP."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commits: list[tuple[str, str]] = []  # repository and message
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def sha(self, repo_id: str) -> str:
        """The id of a repository's state."""
        digest = hashlib.sha1(repo_id.encode())
        for path, content in sorted(self.repositories[repo_id].items()):
            digest.update(path.encode() + content)
        return digest.hexdigest()

    def commit(self, repo_id: str, lines: list[dict[str, Any]]) -> None:
        files = self.repositories[repo_id]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append((repo_id, value["summary"]))
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
            else:
                raise ValueError(f"A commit has {line['key']!r}, which this Hub does not know.")


def _handler_for(hub: LocalHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def reply(self, status: int, body: Any = b"", **headers: str) -> None:
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                chunks = []
                while size := int(self.rfile.readline(), 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(chunks)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_POST(self) -> None:
            body = self.body()
            parts = urlsplit(self.path).path.strip("/").split("/")
            if parts == ["api", "validate-yaml"]:
                return self.reply(200, {"errors": [], "warnings": []})
            if parts == ["api", "repos", "create"]:
                request = json.loads(body)
                repo_id = f"{request.get('organization') or 'me'}/{request['name']}"
                if repo_id in hub.repositories:
                    return self.reply(409, {"url": f"{hub.endpoint}/{repo_id}"})
                hub.repositories[repo_id] = {}
                return self.reply(200, {"url": f"{hub.endpoint}/{repo_id}"})
            if parts[:2] == ["api", "models"] and len(parts) > 4:
                repo_id, action = "/".join(parts[2:4]), parts[4]
                if action == "preupload":
                    files = [
                        {**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
                    ]
                    return self.reply(200, {"files": files})
                if action == "branch":
                    return self.reply(200, {})
                if action == "commit":
                    hub.commit(repo_id, [json.loads(line) for line in body.splitlines()])
                    sha = hub.sha(repo_id)
                    url = f"{hub.endpoint}/{repo_id}/commit/{sha}"
                    return self.reply(200, {"commitUrl": url, "commitOid": sha, "hookOutput": ""})
            return self.reply(404, {"error": f"no POST {self.path}"})

        def do_GET(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            is_api = parts[:2] == ["api", "models"]
            repo_id = "/".join(parts[2:4] if is_api else parts[:2])
            if repo_id not in hub.repositories:
                return self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            files, sha = hub.repositories[repo_id], hub.sha(repo_id)
            if is_api and parts[4:5] == ["tree"]:
                if len(parts) > 6:  # no folders
                    return self.reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
                tree = [{"type": "file", "path": path, "size": len(data), "oid": sha} for path, data in files.items()]
                return self.reply(200, tree)
            if is_api:
                siblings = [{"rfilename": path} for path in files]
                return self.reply(
                    200,
                    {
                        "id": repo_id,
                        "modelId": repo_id,
                        "sha": sha,
                        "siblings": siblings,
                        "tags": [],
                        "private": False,
                    },
                )
            path = "/".join(parts[4:])
            if parts[2:3] != ["resolve"] or path not in files:
                return self.reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            etag = hashlib.sha1(files[path]).hexdigest()
            return self.reply(200, files[path], ETag=f'"{etag}"', X_Repo_Commit=sha)

        do_HEAD = do_GET

    return Handler
