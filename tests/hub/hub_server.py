"""A small Hub on loopback, for the real clients: models with commits, branches, tags, pull requests and private ones.

It keeps everything in memory, and does what huggingface_hub's requests ask; large files go through git-LFS's protocol.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKENS = {"hf_me": "me", "hf_other": "other"}


class Repo:
    """Commits (id -> files by path, bytes) and names for them."""

    def __init__(self, private: bool):
        self.private, self.commits, self.messages, self.pulls = private, {}, {}, 0
        self.branches, self.tags = {"main": self.add({}, "initial commit")}, {}

    def add(self, files: dict[str, bytes], message: str) -> str:
        content = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in files.items())
        oid = hashlib.sha1(json.dumps([len(self.commits), message, content]).encode()).hexdigest()
        self.commits[oid], self.messages[oid] = files, message
        return oid

    def resolve(self, revision: str | None) -> str | None:
        revision = revision or "main"
        named = {**self.branches, **self.tags}
        return named.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """`with Hub() as hub:` serves at `hub.endpoint`; `hub.repos`, `hub.requests` and `hub.lost` are for tests."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  # large files by their sha256
        self.requests: list[tuple[str, str]] = []
        self.lost: set[str] = set()  # paths whose content the next commits mangle

    def __enter__(self):
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.resolve(revision)]


class Refused(Exception):
    def __init__(self, status: int, code: str, message: str):
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message}
        self.body = {"error": message}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def handle_request(self):
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path)
        self.hub.requests.append((self.command, path))
        self.data = self.read_body()
        self.user = TOKENS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        try:
            for pattern, method in ROUTES:
                if match := re.fullmatch(pattern, path):
                    return self.reply(200, *method(self, **match.groupdict()))
            raise Refused(404, "", f"no such address: {path}")
        except Refused as refused:
            self.reply(refused.status, refused.body, refused.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def read_body(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def reply(self, status: int, body=None, headers=None):
        content = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if isinstance(body, bytes) else "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # What is asked for

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        repo, owner = self.hub.repos.get(repo_id), repo_id.split("/")[0]
        if repo is None or (repo.private and self.user != owner):
            raise Refused(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if write and self.user != owner:
            raise Refused(403, "", "You have no right to write here")
        return repo

    def commit_of(self, repo: Repo, revision: str | None) -> str:
        if oid := repo.resolve(revision):
            return oid
        raise Refused(404, "RevisionNotFound", f"Revision not found: {revision}")

    def whoami(self):
        if self.user is None:
            raise Refused(401, "", "Invalid user token")
        token = {"accessToken": {"role": "write", "displayName": "test"}}
        return ({"type": "user", "name": self.user, "fullname": self.user, "orgs": [], "auth": token},)

    def create(self):
        asked = json.loads(self.data)
        repo_id = f"{asked.get('organization') or self.user}/{asked['name']}"
        if self.user is None or not repo_id.startswith(f"{self.user}/"):
            raise Refused(403, "", "You have no right to create this")
        url = {"url": f"http://{self.headers['Host']}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            refused = Refused(409, "", "You already created this model repo")
            refused.body["url"] = url["url"]
            raise refused
        self.hub.repos[repo_id] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        return (url,)

    def yaml(self):
        return ({"errors": [], "warnings": []},)

    def preupload(self, repo_id, revision):
        large = (".safetensors", ".bin", ".png")
        return (
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(large) else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for file in json.loads(self.data)["files"]
                ]
            },
        )

    def lfs_batch(self, repo_id):
        address = f"http://{self.headers['Host']}/lfs"
        objects = [
            {"oid": one["oid"], "size": one["size"]}
            if one["oid"] in self.hub.blobs
            else {**one, "actions": {"upload": {"href": f"{address}/{one['oid']}"}}}
            for one in json.loads(self.data)["objects"]
        ]
        return {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def lfs_put(self, oid):
        if hashlib.sha256(self.data).hexdigest() != oid:
            raise Refused(400, "", "the content has another hash")
        self.hub.blobs[oid] = self.data
        return ()

    def commit(self, repo_id, revision):
        create_pr = "create_pr" in self.query
        repo = self.repo(repo_id, write=not (create_pr or revision.startswith("refs/pr/")))
        files, message = dict(repo.commits[self.commit_of(repo, revision)]), ""
        for line in self.data.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
            elif kind == "deletedFolder":
                files = {path: data for path, data in files.items() if not path.startswith(value["path"])}
        for path in self.hub.lost & set(files):
            files[path] = files[path][:-1]
        oid, url = repo.add(files, message), f"http://{self.headers['Host']}/{repo_id}"
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}", "hookOutput": ""}
        if create_pr:
            repo.pulls += 1
            revision = f"refs/pr/{repo.pulls}"
            answer["pullRequestUrl"] = f"{url}/discussions/{repo.pulls}"
        repo.branches[revision] = oid
        return (answer,)

    def branch(self, repo_id, name):
        repo = self.repo(repo_id, write=True)
        if name in repo.branches:
            raise Refused(409, "", "Reference already exists")
        repo.branches[name] = self.commit_of(repo, json.loads(self.data or b"{}").get("startingPoint"))
        return ()

    def tag(self, repo_id, revision):
        repo, name = self.repo(repo_id, write=True), json.loads(self.data)["tag"]
        if name in repo.tags:
            raise Refused(409, "", "Tag already exists")
        repo.tags[name] = self.commit_of(repo, revision)
        return ()

    def refs(self, repo_id):
        repo = self.repo(repo_id)

        def listed(names, kind):
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in names.items()]

        return ({"branches": listed(repo.branches, "heads"), "tags": listed(repo.tags, "tags"), "converts": []},)

    def info(self, repo_id, revision=None):
        repo = self.repo(repo_id)
        oid = self.commit_of(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(repo.commits[oid])]
        state = {"private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        return ({"_id": oid, "id": repo_id, "modelId": repo_id, "sha": oid, **state, "siblings": siblings},)

    def entry(self, path: str, data: bytes) -> dict:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        found = {"type": "file", "oid": blob, "size": len(data), "path": path}
        if (sha256 := hashlib.sha256(data).hexdigest()) in self.hub.blobs:
            found["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
        return found

    def tree(self, repo_id, revision, path=None):
        repo = self.repo(repo_id)
        files, prefix = repo.commits[self.commit_of(repo, revision)], f"{path}/" if path else ""
        found = [self.entry(name, data) for name, data in sorted(files.items()) if name.startswith(prefix)]
        if path and not found:
            raise Refused(404, "EntryNotFound", "Entry not found")
        return (found,)

    def paths(self, repo_id, revision):
        repo = self.repo(repo_id)
        files = repo.commits[self.commit_of(repo, revision)]
        is_json = "json" in self.headers.get("Content-Type", "")
        wanted = json.loads(self.data)["paths"] if is_json else parse_qs(self.data.decode())["paths"]
        wanted = [wanted] if isinstance(wanted, str) else wanted
        return ([self.entry(path, files[path]) for path in wanted if path in files],)

    def file(self, repo_id, rest):
        repo = self.repo(repo_id)
        names = sorted({**repo.branches, **repo.tags, **repo.commits}, key=len, reverse=True)
        revision = next((name for name in names if rest.startswith(f"{name}/")), None)
        oid = self.commit_of(repo, revision or rest)
        path = rest[len(revision) + 1 :]
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if path not in repo.commits[oid]:
            refused = Refused(404, "EntryNotFound", "Entry not found")
            refused.headers.update(headers)
            raise refused
        data = repo.commits[oid][path]
        entry = self.entry(path, data)
        return data, {**headers, "ETag": f'"{entry.get("lfs", entry)["oid"]}"'}


_ID, _REV = r"(?P<repo_id>[^/]+/[^/]+)", r"(?P<revision>refs/pr/\d+|[^/]+)"
ROUTES = [
    (r"/api/whoami-v2", Handler.whoami),
    (r"/api/repos/create", Handler.create),
    (r"/api/validate-yaml", Handler.yaml),
    (rf"/{_ID}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    (rf"/api/models/{_ID}", Handler.info),
    (rf"/api/models/{_ID}/refs", Handler.refs),
    (rf"/api/models/{_ID}/revision/{_REV}", Handler.info),
    (rf"/api/models/{_ID}/preupload/{_REV}", Handler.preupload),
    (rf"/api/models/{_ID}/commit/{_REV}", Handler.commit),
    (rf"/api/models/{_ID}/branch/(?P<name>.+)", Handler.branch),
    (rf"/api/models/{_ID}/tag/{_REV}", Handler.tag),
    (rf"/api/models/{_ID}/tree/{_REV}(/(?P<path>.+))?", Handler.tree),
    (rf"/api/models/{_ID}/paths-info/{_REV}", Handler.paths),
    (rf"/{_ID}/resolve/(?P<rest>.+)", Handler.file),
]
