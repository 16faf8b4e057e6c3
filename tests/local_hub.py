"""A Hub on this machine, for tests: as much of the Hub's own HTTP protocol as models are uploaded and downloaded by.

    with LocalHub() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment, "HF_TOKEN": "hf_me"})

A process with `hub.environment` before it imports `huggingface_hub` uses it as the Hub. What there is:

- users: whoever has the token `hf_NAME` is NAME and may write to the repositories `NAME/…`;
- repositories, public and private; of a private one nobody but its owner learns that it is there;
- commits with a history, branches, tags, pull requests; every one of them, and a commit's id, is a revision;
- uploads: short texts in the commit itself, weights and large files by Git LFS before it;
- downloads: HEAD and GET with ETag and Range; what was uploaded by LFS is at an address of another host, to which a
  redirect leads that knows its hash and size;
- lists: what a repository is (with the task of its model card), its files and folders, its revisions, its commits;
- downloads that break off: `hub.break_off(path, after)`.

What there is not: Xet, the Hub's newer way to store large files (`hub.environment` has the client do without it); data
sets and spaces; more than a page of a list.
"""

import base64
import contextlib
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIX = ".safetensors"
LFS_SIZE = 1 << 20  # files that are larger go by LFS, too


@dataclass
class Commit:
    id: str
    title: str
    files: dict[str, bytes]
    parent: "Commit | None" = None


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # `refs/heads/main`, `refs/tags/v1`, `refs/pr/1`

    def find(self, revision: str) -> Commit | None:
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        commit_id = next((self.refs[name] for name in names if name in self.refs), revision)
        return self.commits.get(commit_id)

    def add(self, ref: str, title: str, files: dict[str, bytes], parent: Commit | None = None) -> Commit:
        digest = hashlib.sha1(f"{parent and parent.id} {title} {len(self.commits)}".encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        commit = Commit(digest.hexdigest(), title, files, parent)
        self.commits[commit.id] = commit
        self.refs[ref] = commit.id
        return commit


@dataclass
class Download:
    """What a GET of a file was answered with."""

    path: str
    first_byte: int
    num_bytes: int


class HubError(Exception):
    """An error of the Hub: status, the code by which the client knows it, and in words."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class LocalHub:
    """Repositories in memory, served over HTTP on the loopback interface until the `with` block ends."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.downloads: list[Download] = []
        self.objects: dict[str, bytes] = {}  # what was uploaded by LFS, by its SHA-256
        self.signatures: dict[str, str] = {}  # of the addresses of these, and the path that each was made for
        self._breaks: dict[str, tuple[int, Callable[[], object]]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        # Another host by its name, as where the Hub stores large files: clients must not send their token there
        self.storage = f"http://localhost:{self._server.server_port}"

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process use this Hub."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1"}

    def create(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> None:
        """Makes a repository with a first commit of these files, without an upload."""
        self.repositories[repo_id] = Repository(private)
        self.repositories[repo_id].add("refs/heads/main", "initial commit", dict(files))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository at a revision, by their paths."""
        commit = self.repositories[repo_id].find(revision)
        assert commit is not None, f"{repo_id} has no revision {revision}"
        return commit.files

    def titles(self, repo_id: str, revision: str = "main") -> list[str]:
        """The titles of the commits to a revision, the newest first."""
        commit, titles = self.repositories[repo_id].find(revision), []
        while commit is not None:
            titles.append(commit.title)
            commit = commit.parent
        return titles

    def break_off(self, path: str, after: int, action: Callable[[], object] = lambda: None) -> None:
        """Has the next download of the files of this path end after so many bytes: `action` is called, and the
        connection closed."""
        self._breaks[path] = (after, action)

    def take_break(self, path: str) -> tuple[int, Callable[[], object]] | None:
        return self._breaks.pop(path, None)

    # What the handler asks

    def repository(self, repo_id: str, user: str | None) -> Repository:
        repository = self.repositories.get(repo_id)
        if repository is None or (repository.private and repo_id.partition("/")[0] != user):
            raise HubError(401 if user is None else 404, "RepoNotFound", "Repository not found")
        return repository

    def commit_of(self, repository: Repository, revision: str) -> Commit:
        commit = repository.find(revision)
        if commit is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIX) or size > LFS_SIZE


def describe_file(path: str, content: bytes) -> dict[str, Any]:
    """A file as lists have it."""
    info = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
    if is_lfs(path, len(content)):
        info["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return info


def blob_id(content: bytes) -> str:
    """As Git names a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def list_tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, content in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        names = path[len(prefix) :].split("/")
        for depth in range(1, len(names) if recursive else min(len(names), 2)):
            name = prefix + "/".join(names[:depth])
            entries[name] = {"type": "directory", "path": name, "size": 0, "oid": blob_id(name.encode())}
        if recursive or len(names) == 1:
            entries[path] = describe_file(path, content)
    if folder and not entries:
        raise HubError(404, "EntryNotFound", f"{folder} does not exist")
    return list(entries.values())


def card_value(files: dict[str, bytes], name: str) -> str | None:
    """A line of the metadata that a model card begins with."""
    card = files.get("README.md", b"").decode()
    metadata = card.split("---")[1] if card.startswith("---") else ""
    found = re.search(rf"^{name}: *(\S+)", metadata, re.MULTILINE)
    return found.group(1) if found else None


def _handler_for(hub: LocalHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        # Requests and replies

        @property
        def user(self) -> str | None:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            return token.removeprefix("hf_") if token.startswith("hf_") else None

        def read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                chunks = []
                while size := int(self.rfile.readline(), 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(chunks)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def reply(self, status: int, body: Any = b"", **headers: str) -> None:
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def answer(self) -> None:
            body = self.read_body()
            url = urlsplit(self.path)
            # Revisions and paths are quoted, so that a slash in them is none of these
            parts = [unquote(part) for part in url.path.strip("/").split("/")]
            try:
                self.route(parts, parse_qs(url.query), body)
            except HubError as error:
                headers = {"X_Error_Code": error.code, "X_Error_Message": str(error)}
                self.reply(error.status, {"error": str(error)}, **headers)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

        def route(self, parts: list[str], query: dict[str, list[str]], body: bytes) -> None:
            method = "GET" if self.command == "HEAD" else self.command
            match (method, *parts):
                case ("GET", "api", "whoami-v2"):
                    self.require_user()
                    self.reply(200, {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})
                case ("POST", "api", "validate-yaml"):
                    self.reply(200, {"errors": [], "warnings": []})
                case ("POST", "api", "repos", "create"):
                    self.create_repository(json.loads(body))
                case (_, "api", "models", owner, name, *rest):
                    self.route_repository(method, f"{owner}/{name}", rest, query, body)
                case ("POST", owner, name, "info", "lfs", "objects", "batch") if name.endswith(".git"):
                    self.start_lfs_uploads(f"{owner}/{name.removesuffix('.git')}", json.loads(body))
                case ("PUT", "objects", oid):
                    self.check_signature(query)
                    if hashlib.sha256(body).hexdigest() != oid:
                        raise HubError(400, "BadRequest", "The content does not have the hash that was announced")
                    hub.objects[oid] = body
                    self.reply(200)
                case ("GET", "objects", oid):
                    self.send_file(self.check_signature(query), hub.objects[oid], oid)
                case ("GET", owner, name, "resolve", revision, *path):
                    self.resolve(f"{owner}/{name}", revision, "/".join(path))
                case _:
                    raise HubError(404, "NotFound", f"This Hub knows no {self.command} {self.path}")

        def route_repository(
            self, method: str, repo_id: str, rest: list[str], query: dict[str, list[str]], body: bytes
        ) -> None:
            repository = hub.repository(repo_id, self.user)
            if method != "GET" and rest[:1] != ["paths-info"]:
                self.require_user(repo_id)
            match (method, *rest):
                case ("GET",) | ("GET", "revision", _):
                    commit = hub.commit_of(repository, rest[1] if rest else "main")
                    self.reply(200, self.describe(repo_id, repository, commit))
                case ("GET", "tree", revision, *folder):
                    files = hub.commit_of(repository, revision).files
                    recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
                    self.reply(200, list_tree(files, "/".join(folder), recursive))
                case ("POST", "paths-info", revision):
                    files = hub.commit_of(repository, revision).files
                    paths = parse_qs(body.decode()).get("paths", [])
                    self.reply(200, [describe_file(path, files[path]) for path in paths if path in files])
                case ("GET", "refs"):
                    self.reply(200, self.list_refs(repository))
                case ("GET", "commits", revision):
                    commit, commits = hub.commit_of(repository, revision), []
                    while commit is not None:
                        commits.append(
                            {"id": commit.id, "title": commit.title, "message": "", "authors": [],
                             "date": "2026-01-01T00:00:00.000Z"}
                        )  # fmt: skip
                        commit = commit.parent
                    self.reply(200, commits)
                case ("POST", "branch", branch):
                    start = json.loads(body or b"{}").get("startingPoint", "main")
                    self.create_ref(repository, f"refs/heads/{branch}", start)
                case ("POST", "tag", revision):
                    self.create_ref(repository, f"refs/tags/{json.loads(body)['tag']}", revision)
                case ("POST", "preupload", revision):
                    hub.commit_of(repository, revision)
                    files = [
                        {"path": file["path"], "shouldIgnore": False,
                         "uploadMode": "lfs" if is_lfs(file["path"], file["size"]) else "regular"}
                        for file in json.loads(body)["files"]
                    ]  # fmt: skip
                    self.reply(200, {"files": files})
                case ("POST", "commit", revision):
                    lines = [json.loads(line) for line in body.splitlines()]
                    self.commit(repo_id, repository, revision, lines, "create_pr" in query)
                case _:
                    raise HubError(404, "NotFound", f"This Hub knows no {self.command} {self.path}")

        def require_user(self, repo_id: str | None = None) -> None:
            if self.user is None:
                raise HubError(401, "Unauthorized", "Invalid username or password.")
            if repo_id is not None and repo_id.partition("/")[0] != self.user:
                raise HubError(403, "Forbidden", f"{self.user} may not write to {repo_id}")

        # What is asked for

        def create_repository(self, request: dict[str, Any]) -> None:
            self.require_user()
            repo_id = f"{request.get('organization') or self.user}/{request['name']}"
            self.require_user(repo_id)
            if repo_id in hub.repositories:
                return self.reply(409, {"error": "You already created it", "url": f"{hub.endpoint}/{repo_id}"})
            # Older clients say `private`
            hub.create(repo_id, {}, request.get("visibility") == "private" or bool(request.get("private")))
            return self.reply(200, {"url": f"{hub.endpoint}/{repo_id}"})

        def describe(self, repo_id: str, repository: Repository, commit: Commit) -> dict[str, Any]:
            info = {
                "id": repo_id,
                "modelId": repo_id,
                "author": repo_id.partition("/")[0],
                "sha": commit.id,
                "private": repository.private,
                "siblings": [{"rfilename": path} for path in commit.files],
                "tags": [],
            }
            for key, name in (("pipeline_tag", "pipeline_tag"), ("library_name", "library_name")):
                value = card_value(commit.files, name)
                if value is not None:
                    info[key] = value
            return info

        def list_refs(self, repository: Repository) -> dict[str, Any]:
            def matching(prefix: str) -> list[dict[str, str]]:
                return [
                    {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": commit_id}
                    for ref, commit_id in repository.refs.items()
                    if ref.startswith(prefix)
                ]

            return {
                "branches": matching("refs/heads/"),
                "tags": matching("refs/tags/"),
                "pullRequests": matching("refs/pr/"),
                "converts": [],
            }

        def create_ref(self, repository: Repository, ref: str, revision: str) -> None:
            if ref in repository.refs:
                return self.reply(409, {"error": f"{ref} is there already"})
            repository.refs[ref] = hub.commit_of(repository, revision).id
            return self.reply(200, {})

        def start_lfs_uploads(self, repo_id: str, request: dict[str, Any]) -> None:
            hub.repository(repo_id, self.user)
            self.require_user(repo_id)
            objects = []
            for asked in request["objects"]:
                info = {"oid": asked["oid"], "size": asked["size"]}
                if asked["oid"] not in hub.objects:
                    info["actions"] = {"upload": {"href": self.storage_address(asked["oid"], asked["oid"])}}
                objects.append(info)
            self.reply(200, {"transfer": "basic", "objects": objects})

        def commit(
            self, repo_id: str, repository: Repository, revision: str, lines: list[dict[str, Any]], create_pr: bool
        ) -> None:
            parent = hub.commit_of(repository, revision)
            files, title = dict(parent.files), ""
            for line in lines:
                value = line["value"]
                match line["key"]:
                    case "header":
                        title = value["summary"]
                    case "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    case "lfsFile":
                        if value["oid"] not in hub.objects:
                            raise HubError(400, "BadRequest", f"{value['path']} was not uploaded before the commit")
                        files[value["path"]] = hub.objects[value["oid"]]
                    case "deletedFile":
                        files.pop(value["path"], None)
                    case _:
                        raise HubError(400, "BadRequest", f"This Hub knows no {line['key']!r} in a commit")
            num_requests = sum(ref.startswith("refs/pr/") for ref in repository.refs)
            ref = next((ref for ref in (revision, f"refs/heads/{revision}") if ref in repository.refs), None)
            if create_pr:
                ref = f"refs/pr/{num_requests + 1}"
            if ref is None:
                raise HubError(400, "BadRequest", f"{revision} is no branch")
            commit = repository.add(ref, title, files, parent)
            answer = {"commitUrl": f"{hub.endpoint}/{repo_id}/commit/{commit.id}", "commitOid": commit.id}
            if create_pr:
                answer["pullRequestUrl"] = f"{hub.endpoint}/{repo_id}/discussions/{num_requests + 1}"
            self.reply(200, {**answer, "hookOutput": ""})

        def resolve(self, repo_id: str, revision: str, path: str) -> None:
            commit = hub.commit_of(hub.repository(repo_id, self.user), revision)
            content = commit.files.get(path)
            if content is None:
                headers = {"X_Error_Code": "EntryNotFound", "X_Repo_Commit": commit.id}
                return self.reply(404, {"error": "Entry not found"}, **headers)
            if not is_lfs(path, len(content)):
                return self.send_file(path, content, blob_id(content), X_Repo_Commit=commit.id)
            oid = hashlib.sha256(content).hexdigest()
            hub.objects.setdefault(oid, content)
            return self.reply(
                302,
                Location=self.storage_address(oid, path),
                X_Linked_ETag=f'"{oid}"',
                X_Linked_Size=str(len(content)),
                X_Repo_Commit=commit.id,
            )

        def storage_address(self, oid: str, path: str) -> str:
            """Where an object may be put to or fetched from without a token, by whoever was told of it."""
            signature = secrets.token_hex(8)
            hub.signatures[signature] = path
            return f"{hub.storage}/objects/{oid}?signature={signature}"

        def check_signature(self, query: dict[str, list[str]]) -> str:
            if self.headers.get("Authorization"):
                raise HubError(400, "BadRequest", "A token was sent to where it must not be")
            signature = query.get("signature", [""])[0]
            if signature not in hub.signatures:
                raise HubError(403, "Forbidden", "The address is not signed")
            return hub.signatures[signature]

        def send_file(self, path: str, content: bytes, etag: str, **headers: str) -> None:
            headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", **headers}
            first, status = 0, 200
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if wanted is not None:
                first, status = int(wanted.group(1)), 206
                headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            if self.command == "HEAD":
                return self.reply(status, content[first:], **headers)
            hub.downloads.append(Download(path, first, len(content) - first))
            broken = hub.take_break(path)
            if broken is None:
                return self.reply(status, content[first:], **headers)
            after, action = broken
            hub.downloads[-1].num_bytes = after
            self.send_response(status)
            self.send_header("Content-Length", str(len(content) - first))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            with contextlib.suppress(OSError):  # of a client that is gone
                self.wfile.write(content[first : first + after])
                self.wfile.flush()
            action()
            self.close_connection = True
            return None

    return Handler
