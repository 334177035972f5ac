"""A Hub on this machine: data sets and models over HTTP, as huggingface_hub writes and reads them without xet."""

import base64
import hashlib
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

from local_server import LocalServer


TOKEN = "hf_writes"


@dataclass
class Repository:
    """A data set or a model: the files of each branch, and the messages of its commits."""

    is_private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=list)
    is_gated: bool = False  # nobody has accepted its terms

    def files(self, revision: str) -> dict[str, bytes] | None:
        """Files of a branch, by its name or its commit."""
        by_commit = {self.sha(name): files for name, files in self.branches.items()}
        return self.branches.get(revision, by_commit.get(revision))

    def sha(self, branch: str) -> str:
        content = json.dumps([branch, len(self.commits), sorted(self.branches[branch])])
        return hashlib.sha1(content.encode()).hexdigest()


class HubServer(LocalServer):
    """The Hub.

    Attributes:
        repositories: By `datasets/owner/name` or `models/owner/name`.
        uploaded: What was sent to the storage of large files, by SHA-256; and how often, in `num_uploads`.
        requests: Method and path of each request.
    """

    def __init__(self):
        super().__init__(_Handler)
        self.repositories: dict[str, Repository] = {}
        self.uploaded: dict[str, bytes] = {}
        self.num_uploads = 0
        self.requests: list[tuple[str, str]] = []


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        with self.server.lock:
            self.server.requests.append((self.command, url.path))
            if parts[0] == "storage":
                self._store(parts[1])
            elif parts == ["api", "whoami-v2"]:
                self._whoami()
            elif parts == ["api", "repos", "create"]:
                self._create()
            elif parts == ["api", "validate-yaml"]:
                self._send({"errors": [], "warnings": []})
            elif parts[0] == "api" and parts[1] in ("datasets", "models"):
                self._repository("/".join(parts[1:4]), parts[4:])
            elif parts[0] == "datasets":
                self._repository("/".join(parts[:3]), parts[3:])
            else:
                self._repository("/".join(("models", *parts[:2])), parts[2:])

    def _repository(self, name: str, rest: list[str]) -> None:
        repository = self.server.repositories.get(name.removesuffix(".git"))
        if repository is None or (repository.is_private and not self._is_known):
            self._fail(404 if self._is_known else 401, "RepoNotFound", "Repository not found")
        elif self.command == "POST" and not self._is_known:
            self._fail(401, "", "Invalid username or password.")
        elif name.endswith(".git"):
            self._batch()
        elif not rest:
            self._info(repository, name, "main")
        elif rest[0] == "branch":
            self._branch(repository, rest[1])
        elif repository.files(rest[1]) is None:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {rest[1]}")
        elif rest[0] == "revision":
            self._info(repository, name, rest[1])
        elif rest[0] == "tree":
            self._tree(repository.files(rest[1]), "/".join(rest[2:]))
        elif rest[0] == "paths-info":
            self._paths_info(repository.files(rest[1]))
        elif rest[0] == "preupload":
            self._preupload(repository.files(rest[1]))
        elif rest[0] == "commit":
            self._commit(repository, name, rest[1])
        elif repository.is_gated:
            self._fail(403, "GatedRepo", "Access to this repository is restricted.")
        elif rest[0] == "resolve":
            self._resolve(repository, rest[1], "/".join(rest[2:]))
        else:
            self._fail(404, "", f"no such path: {self.path}")

    @property
    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    # --- Accounts and repositories

    def _whoami(self) -> None:
        if not self._is_known:
            self._fail(401, "", "Invalid user token.")
            return
        self._send({"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def _create(self) -> None:
        values = json.loads(self.body)
        name = f"{values.get('type', 'model')}s/{values.get('organization') or 'me'}/{values['name']}"
        if not self._is_known:
            self._fail(401, "", "Invalid username or password.")
            return
        status = 409 if name in self.server.repositories else 200
        if status == 200:
            is_private = values.get("private") or values.get("visibility") == "private"
            self.server.repositories[name] = Repository(bool(is_private))
        self._send({"url": f"{self.server.url}/{name.removeprefix('models/')}", "name": name}, status)

    def _branch(self, repository: Repository, name: str) -> None:
        if name in repository.branches:
            self._fail(409, "", "Reference already exists")
            return
        repository.branches[name] = dict(repository.branches["main"])
        self._send({})

    def _info(self, repository: Repository, name: str, revision: str) -> None:
        files = repository.files(revision)
        branch = next(branch for branch, other in repository.branches.items() if other is files)
        self._send(
            {
                "_id": "1",
                "id": name.split("/", 1)[1],
                "author": name.split("/")[1],
                "sha": repository.sha(branch),
                "private": repository.is_private,
                "disabled": False,
                "gated": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in files],
            }
        )

    def _tree(self, files: dict[str, bytes], folder: str) -> None:
        prefix = f"{folder}/" if folder else ""
        inside = {path: content for path, content in files.items() if path.startswith(prefix)}
        if folder and not inside:
            self._fail(404, "EntryNotFound", f"{folder} does not exist")
            return
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            names = {path[len(prefix) :].split("/")[0] for path in inside}
            self._send([_entry(files, prefix + name) for name in sorted(names)])
            return
        folders = {path.rsplit("/", n)[0] for path in inside for n in range(1, path[len(prefix) :].count("/") + 1)}
        self._send([_entry(files, path) for path in sorted({*inside, *folders})])

    def _paths_info(self, files: dict[str, bytes]) -> None:
        values = parse_qs(self.body.decode()) if self.body[:1] != b"{" else json.loads(self.body)
        entries = [_entry(files, path.strip("/")) for path in values["paths"]]
        self._send([entry for entry in entries if entry is not None])

    # --- Writing

    def _preupload(self, files: dict[str, bytes]) -> None:
        answers = [
            {
                "path": file["path"],
                "uploadMode": "lfs"
                if file["path"].endswith((".parquet", ".safetensors", ".bin", ".png"))
                else "regular",
                "shouldIgnore": False,
                "oid": _oid(files[file["path"]]) if file["path"] in files else None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._send({"files": answers})

    def _batch(self) -> None:
        objects = []
        for item in json.loads(self.body)["objects"]:
            known = item["oid"] in self.server.uploaded
            actions = {} if known else {"upload": {"href": f"{self.server.url}/storage/{item['oid']}", "header": {}}}
            objects.append({**item, **({"actions": actions} if actions else {})})
        self._send({"transfer": "basic", "objects": objects})

    def _store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._fail(400, "", "the content is not what its hash says")
            return
        self.server.uploaded[oid] = self.body
        self.server.num_uploads += 1
        self._send({})

    def _commit(self, repository: Repository, name: str, branch: str) -> None:
        files = dict(repository.branches[branch])
        for line in filter(None, self.body.decode().splitlines()):
            value = json.loads(line)
            kind, value = value["key"], value["value"]
            if kind == "header":
                repository.commits.append(value["summary"])
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.server.uploaded[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
            else:
                self._fail(400, "", f"unknown operation {kind}")
                return
        if self.query.get("create_pr") == ["1"]:
            branch = f"refs/pr/{len(repository.commits)}"
        repository.branches[branch] = files
        sha = repository.sha(branch)
        url = f"{self.server.url}/{name.removeprefix('models/')}"
        pull_request = f"{url}/discussions/{len(repository.commits)}"
        self._send({"commitUrl": f"{url}/commit/{sha}", "commitOid": sha, "pullRequestUrl": pull_request})

    # --- Reading

    def _resolve(self, repository: Repository, revision: str, path: str) -> None:
        files = repository.files(revision)
        if path not in files:
            self._fail(404, "EntryNotFound", f"{path} does not exist")
            return
        branch = next(branch for branch, other in repository.branches.items() if other is files)
        content = files[path]
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": repository.sha(branch), "Accept-Ranges": "bytes"}
        status, wanted = 200, self.headers.get("Range")
        if wanted:
            start, _, stop = wanted.removeprefix("bytes=").partition("-")
            first = int(start) if start else max(0, len(content) - int(stop))
            last = min(int(stop), len(content) - 1) if start and stop else len(content) - 1
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            status, content = 206, content[first : last + 1]
        self._send(content, status, headers)

    def _fail(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._send({"error": message}, status, headers)

    def _send(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(value, bytes) else "application/json"
        for name, header in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, header)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _oid(content: bytes) -> str:
    """The hash of a file as Git has it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(files: dict[str, bytes], path: str) -> dict[str, object] | None:
    """A file or a folder, as listings show it."""
    if path in files:
        return {"type": "file", "path": path, "size": len(files[path]), "oid": _oid(files[path])}
    if any(other.startswith(f"{path}/") for other in files):
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
    return None
