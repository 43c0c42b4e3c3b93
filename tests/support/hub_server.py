"""A local server in place of the Hugging Face Hub, with the part of its API that is used here.

Large files are on a second server with another origin, to which the Hub redirects. Both servers
record every request, and can simulate network failures.
"""

import base64
import contextlib
import functools
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseServer
from urllib.parse import unquote, urlsplit


LARGE = (".safetensors", ".bin")


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Commits `files` as the whole content of a branch, and returns the commit."""
        content = repr(sorted(files.items())) + str(len(self.commits))
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[branch] = sha
        return sha


@dataclass
class Request:
    server: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Fault:
    """A failure of the next `times` requests whose `"METHOD /path"` contains the pattern.

    - `status`, `headers`: the answer, if any. Without a status, the headers replace those of the
        true answer, or remove them if they are empty.
    - `cut`: the number of bytes of the body after which the connection is closed.
    - `body`: a body that is sent instead of the true one.
    - `whole`: whether a `Range` is ignored.
    - `endless`: whether the body is repeated until the connection is closed.
    - `pause`: the number of seconds between two bytes of the answer.
    """

    pattern: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    body: bytes | None = None
    whole: bool = False
    endless: bool = False
    pause: float = 0


class Hub:
    """The state of both servers.

    - `sent`: the number of bytes of all bodies.

    - `afterwards`: called with `"METHOD /path"` after each request.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.valid_tokens = {"hf_good"}
        self.members = {"hf_member"}  # Tokens of accounts that have accepted the licences.
        self.afterwards: Callable[[str], None] = lambda request: None
        self.lock = threading.Lock()
        self.sent = 0
        self.closing = threading.Event()
        self.endpoint = self.storage = ""

    def add(
        self, name: str, files: dict[str, bytes], *, gated: bool = False, private: bool = False
    ) -> Repository:
        self.repositories[name] = repository = Repository(gated=gated, private=private)
        repository.commit(files)
        return repository

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, f"{method} {path}"):
                    fault.times -= 1
                    return fault
        return None

    def asked(self, pattern: str) -> list[Request]:
        return [r for r in self.requests if re.search(pattern, f"{r.method} {r.path}")]


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    servers = []
    for name, handler in (("hub", _HubHandler), ("storage", _StorageHandler)):
        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, hub, name))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
    hub.endpoint, hub.storage = (f"http://127.0.0.1:{s.server_address[1]}" for s in servers)
    try:
        yield hub
    finally:
        hub.closing.set()
        for server in servers:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(
        self,
        hub: Hub,
        name: str,
        request: socket.socket,
        address: tuple[str, int],
        server: BaseServer,
    ):
        self.hub, self.name = hub, name
        super().__init__(request, address, server)  # The base class handles the request here.

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_one(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {key.lower(): value for key, value in self.headers.items()}
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(Request(self.name, self.command, path, headers, body))
        self.fault = self.hub.fault(self.command, path)
        if self.fault is not None and self.fault.status is not None:
            self.answer(self.fault.status, b"{}", self.fault.headers)
        else:
            # The quoted path, because revisions may contain slashes.
            self.route(urlsplit(self.path).path, body)
        self.hub.afterwards(f"{self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def route(self, path: str, body: bytes) -> None:
        raise NotImplementedError

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        fault = self.fault or Fault("")
        total = len(body)
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if ranged and status == 200 and not fault.whole:
            start, end = int(ranged[1]), min(int(ranged[2] or total), total - 1)
            status, body = 206, body[start : end + 1]
            headers = {**(headers or {}), "Content-Range": f"bytes {start}-{end}/{total}"}
        headers = {"Content-Length": str(len(body)), **(headers or {})}
        self.send_response(status)
        for key, value in (headers if fault.status else headers | fault.headers).items():
            if value:
                self.send_header(key, value)
        if fault.pause:
            self.drip(b"".join(self._headers_buffer), fault.pause)
            self._headers_buffer = []
        self.end_headers()
        if self.command == "HEAD":
            return
        body = body[: fault.cut]
        self.close_connection = fault.cut is not None or fault.endless
        if fault.pause:
            self.drip(body, fault.pause)
            return
        with contextlib.suppress(OSError):  # The client may close the connection.
            self.send(body)
            while fault.endless:
                self.send(body)

    def send(self, body: bytes) -> None:
        for at in range(0, len(body), 2**16):
            self.wfile.write(body[at : at + 2**16])
            self.hub.sent += len(body[at : at + 2**16])

    def drip(self, text: bytes, pause: float) -> None:
        for byte in text:
            try:
                self.wfile.write(bytes([byte]))
            except OSError:
                return
            self.hub.closing.wait(pause)

    def json(self, value: object, status: int = 200, **headers: str) -> None:
        named = {key.replace("_", "-"): header for key, header in headers.items()}
        body = json.dumps(value).encode()
        self.answer(status, body, {"Content-Type": "application/json", **named})

    def file(self, body: bytes, headers: dict[str, str]) -> None:
        if self.fault is not None and self.fault.body is not None:
            body = self.fault.body
        self.answer(200, body, headers)


class _StorageHandler(_Handler):
    def route(self, path: str, body: bytes) -> None:
        key = path.rsplit("/", 1)[1]
        if self.command == "PUT":
            # The real storage also verifies the announced checksum.
            if hashlib.sha256(body).hexdigest() != key:
                self.answer(400)
                return
            self.hub.large[key] = body
            self.answer(200)
        elif key in self.hub.large:
            self.file(self.hub.large[key], {"ETag": '"of-the-storage"'})
        else:
            self.answer(404)


class _HubHandler(_Handler):
    def route(self, path: str, body: bytes) -> None:
        if path.startswith("/api/repos") and not self.token():
            self.json({"error": "Log in"}, 401)
        elif not self.is_valid(self.token()):
            message = "Invalid credentials in Authorization header"
            self.json({"error": message}, 401, X_Error_Message=message)
        elif path == "/api/repos/create":
            values = json.loads(body)
            name = f"{values['organization']}/{values['name']}"
            url = {"url": f"{self.hub.endpoint}/{name}"}
            if name in self.hub.repositories:
                self.json({"error": "You already created this model repo", **url}, 409)
                return
            self.hub.add(name, {}, private=values.get("visibility") == "private")
            self.json(url)
        elif path == "/api/validate-yaml":
            self.json({"warnings": [], "errors": []})
        elif found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            self.batch(json.loads(body))
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(*map(unquote, found.groups()))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/(.+))?", path):
            name, verb, revision = found.groups()
            self.api(name, verb, unquote(revision or "main"), body)
        else:
            self.answer(404)

    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def is_valid(self, token: str) -> bool:
        return not token or token in self.hub.valid_tokens | self.hub.members

    def repository(self, name: str) -> Repository | None:
        """Returns the repository if it is visible, and otherwise answers as the Hub does."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.token()):
            # The Hub does not reveal which of the two it is.
            self.json({}, 404 if self.token() else 401, X_Error_Code="RepoNotFound")
            return None
        return repository

    def at(self, repository: Repository, revision: str) -> str | None:
        commit = repository.refs.get(revision, revision)
        if commit in repository.commits:
            return commit
        self.json({}, 404, X_Error_Code="RevisionNotFound")
        return None

    def resolve(self, name: str, revision: str, file: str) -> None:
        repository = self.repository(name)
        if repository is None:
            return
        commit = self.at(repository, revision)
        if commit is None:
            return
        if repository.gated and self.token() not in self.hub.members:
            self.json({}, 403, X_Error_Code="GatedRepo", X_Repo_Commit=commit)
            return
        content = repository.commits[commit].get(file)
        if content is None:
            self.json({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        elif file.endswith(LARGE):
            sha = hashlib.sha256(content).hexdigest()
            self.hub.large.setdefault(sha, content)
            location = f"{self.hub.storage}/large/{sha}"
            linked = {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(content))}
            self.answer(302, b"", {"Location": location, "X-Repo-Commit": commit, **linked})
        else:
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            self.file(content, {"ETag": f'"{git}"', "X-Repo-Commit": commit})

    def api(self, name: str, verb: str | None, revision: str, body: bytes) -> None:
        repository = self.repository(name)
        if repository is None:
            return
        if verb == "branch":
            repository.refs.setdefault(revision, repository.refs["main"])
            self.json({})
            return
        commit = self.at(repository, revision)
        if commit is None:
            return
        if verb in (None, "revision"):
            siblings = [{"rfilename": file} for file in repository.commits[commit]]
            self.json({"id": name, "sha": commit, "siblings": siblings, "private": False})
        elif verb == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.json({"files": files})
        elif verb == "commit":
            self.commit(name, repository, revision, commit, body)
        else:
            self.answer(404)

    def batch(self, request: dict[str, list[dict[str, object]]]) -> None:
        objects = [
            {
                "oid": wanted["oid"],
                "size": wanted["size"],
                "actions": {"upload": {"href": f"{self.hub.storage}/large/{wanted['oid']}"}},
            }
            for wanted in request["objects"]
        ]
        self.json({"transfer": "basic", "objects": objects})

    def commit(
        self, name: str, repository: Repository, revision: str, parent: str, body: bytes
    ) -> None:
        files = dict(repository.commits[parent])
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.large[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        if "create_pr=1" in urlsplit(self.path).query:
            revision = "refs/pr/1"
        sha = repository.commit(files, revision)
        answer = {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}", "commitOid": sha}
        if revision.startswith("refs/pr/"):
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{name}/discussions/1"
        self.json({"success": True, **answer})
