"""A Hugging Face hub on loopback, in memory: answers huggingface_hub as the real one does.

with HubServer() as hub:
    hub.add("owner/name", directory)
    ...                               # HF_ENDPOINT=hub.url, or `use(hub, monkeypatch, cache)`
    hub.fetched("owner/name")         # the files whose content went out
    hub.files("owner/name")           # what lies in a repository now

Repositories can be private, gated, renamed or out of order, and bodies can be cut off. Answers
follow huggingface_hub 0.36 and 2.4 (files by LFS, without Xet).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "a" * 34


@dataclass
class Repo:
    """A repository: one branch and what it held at each commit."""

    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str = "main") -> str:
        content = b"".join(f"{n}{len(b)}".encode() + b for n, b in sorted(self.files.items()))
        sha = hashlib.sha1(content + str(len(self.commits)).encode()).hexdigest()
        self.commits[sha] = dict(self.files)
        self.refs[branch] = sha
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = self.refs.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


class HubServer:
    """The server; a context manager.

    Attributes:
        requests: (method, path) of all that was asked.
        cut: Names of files whose bodies are cut off in the middle.
        out_of_order: Everything is answered by 503.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        self.requests: list[tuple[str, str]] = []
        self.gone_out: list[tuple[str, str]] = []
        self.lfs: dict[str, bytes] = {}
        self.cut: set[str] = set()
        self.out_of_order = False
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(
        self, name: str, directory: Path | None = None, *, branch: str = "main", **options: bool
    ) -> str:
        """Puts a directory into a repository, over what is there; gives the commit."""
        repo = self.repos.setdefault(name, Repo(**options))
        if directory is not None:
            repo.files = {
                path.relative_to(directory).as_posix(): path.read_bytes()
                for path in sorted(directory.rglob("*"))
                if path.is_file()
            }
        return repo.commit(branch)

    def files(self, name: str) -> dict[str, bytes]:
        """What lies in a repository."""
        return self.repos[name].files

    def fetched(self, name: str) -> set[str]:
        """The files whose content went out."""
        return {file for repo, file in self.gone_out if repo == name}

    def forget(self) -> None:
        """Forgets what was asked."""
        self.requests.clear()
        self.gone_out.clear()


def use(hub: HubServer, monkeypatch, cache: Path, *, offline: bool = False) -> None:
    """Makes this process talk to a hub, with an empty cache of its own."""
    import huggingface_hub.constants as constants

    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_TOKEN_PATH": str(cache / "no-token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    _forget_0_36(hub, monkeypatch)
    import transformers.utils.hub as transformers_hub

    for name in ("TRANSFORMERS_CACHE", "HF_HUB_CACHE"):
        if hasattr(transformers_hub, name):
            monkeypatch.setattr(transformers_hub, name, str(cache))
    if hasattr(transformers_hub, "_is_offline_mode"):
        monkeypatch.setattr(transformers_hub, "_is_offline_mode", offline)


def _forget_0_36(hub: HubServer, monkeypatch) -> None:
    """What releases before 1.0 keep of the constants as they were when they were imported."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    if hasattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE"):
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    if hasattr(_http, "_get_session_from_cache"):
        # A session is offline, or not, for as long as it lasts.
        kept = _http._get_session_from_cache
        fresh = getattr(kept, "__wrapped__", kept)
        monkeypatch.setattr(_http, "_get_session_from_cache", fresh)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: object) -> None:
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
        length = int(self.headers.get("Content-Length") or 0)
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        body = self._chunks() if chunked else self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if self.hub.out_of_order:
            return self._json(503, {"error": "out of order"})
        for pattern, answer in _ROUTES:
            found = pattern.fullmatch(path)
            if found:
                return answer(self, body, **found.groupdict())
        return self._json(404, {"error": f"no such page: {path}"})

    def _chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    # --- reading ----------------------------------------------------------------------------------

    def _repo(self, name: str) -> Repo | None:
        """The repository, if it may be seen; otherwise the refusal is sent."""
        if name in self.hub.renamed:
            there = self.path.replace(name, self.hub.renamed[name], 1)
            self._send(307, b"", {"Location": there})
            return None
        repo = self.hub.repos.get(name)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not known):
            # As the hub does, which does not tell strangers what there is.
            status = 404 if known else 401
            self._json(status, {"error": "Repository not found"}, code="RepoNotFound")
            return None
        return repo

    def info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        found = self._repo(repo)
        if found is None:
            return None
        at = found.at(revision or "main")
        if at is None:
            return self._json(404, {"error": "Invalid rev id"}, code="RevisionNotFound")
        siblings = [{"rfilename": name} for name in at[1]]
        return self._json(
            200,
            {"_id": "1", "id": repo, "modelId": repo, "sha": at[0], "private": found.private,
             "siblings": siblings, "tags": [], "downloads": 0, "likes": 0},
        )  # fmt: skip

    def tree(self, body: bytes, repo: str, revision: str, folder: str | None = None) -> None:
        found = self._repo(repo)
        if found is None:
            return None
        at = found.at(revision)
        if at is None:
            return self._json(404, {"error": "Invalid rev id"}, code="RevisionNotFound")
        listed = []
        for name, content in at[1].items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": _git_oid(content)}
            if _is_lfs(name):
                sha = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 130}
            listed.append(entry)
        return self._json(200, listed)

    def resolve(self, body: bytes, repo: str, revision: str, file: str) -> None:
        found = self._repo(repo)
        if found is None:
            return None
        if found.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json(403, {"error": "Access is restricted"}, code="GatedRepo")
        at = found.at(revision)
        if at is None:
            return self._json(404, {"error": "Invalid rev id"}, code="RevisionNotFound")
        content = at[1].get(file)
        if content is None:
            return self._json(404, {"error": "Entry not found"}, code="EntryNotFound")
        sha = hashlib.sha256(content).hexdigest()
        headers = {
            "X-Repo-Commit": at[0],
            "ETag": f'"{sha if _is_lfs(file) else _git_oid(content)}"',
            "Accept-Ranges": "bytes",
        }
        if _is_lfs(file):
            headers |= {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(content))}
        if self.command == "GET":
            self.hub.gone_out.append((repo, file))
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        status = 200
        if ranged:
            start = int(ranged[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content, status = content[start:], 206
        return self._send(status, content, headers, cut=Path(file).name in self.hub.cut)

    # --- writing ----------------------------------------------------------------------------------

    def _may_write(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._json(401, {"error": "Invalid username or password."})
        return False

    def create(self, body: bytes) -> None:
        if not self._may_write():
            return None
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else ""
        name = name or asked["name"]
        made = {"url": f"{self.hub.url}/{name}", "id": name}
        if name in self.hub.repos:
            return self._json(409, {"error": "You already created this model repo", **made})
        is_private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.add(name, private=is_private)
        return self._json(200, made)

    def validate(self, body: bytes) -> None:
        return self._json(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        if self._repo(repo) is None or not self._may_write():
            return None
        files = [
            {
                "path": asked["path"],
                "uploadMode": "lfs" if _is_lfs(asked["path"]) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for asked in json.loads(body)["files"]
        ]
        return self._json(200, {"files": files})

    def batch(self, body: bytes, repo: str) -> None:
        if not self._may_write():
            return None
        objects = [
            {
                **asked,
                "authenticated": True,
                "actions": {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}},
            }
            for asked in json.loads(body)["objects"]
        ]
        return self._json(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._json(400, {"error": "other content than announced"})
        self.hub.lfs[oid] = body
        return self._send(200, b"", {})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        found = self._repo(repo)
        if found is None or not self._may_write():
            return None
        for line in body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "file":
                found.files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                found.files[value["path"]] = self.hub.lfs[value["oid"]]
            elif key == "deletedFile":
                del found.files[value["path"]]
        sha = found.commit(revision)
        return self._json(
            200,
            {
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}",
                "hookOutput": "",
            },
        )

    # --- answers ----------------------------------------------------------------------------------

    def _json(self, status: int, content: object, code: str | None = None) -> None:
        headers = {"Content-Type": "application/json"}
        if code:
            headers |= {"X-Error-Code": code, "X-Error-Message": str(content)}
        self._send(status, json.dumps(content).encode(), headers)

    def _send(
        self, status: int, content: bytes, headers: dict[str, str], *, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()


def _is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pt", ".npy", "tokenizer.json"))


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_NAME = r"(?P<repo>[^/]+/[^/]+?)"
_ROUTES = [
    (re.compile(pattern.replace("NAME", _NAME)), answer)
    for pattern, answer in (
        (r"/api/repos/create", _Handler.create),
        (r"/api/validate-yaml", _Handler.validate),
        (r"/api/models/NAME/preupload/(?P<revision>.+)", _Handler.preupload),
        (r"/api/models/NAME/commit/(?P<revision>.+)", _Handler.commit),
        (r"/api/models/NAME/tree/(?P<revision>[^/]+)/?(?P<folder>.*)", _Handler.tree),
        (r"/api/models/NAME/revision/(?P<revision>.+)", _Handler.info),
        (r"/api/models/NAME", _Handler.info),
        (r"/lfs/(?P<oid>\w+)", _Handler.store),
        (r"/NAME\.git/info/lfs/objects/batch", _Handler.batch),
        (r"/NAME/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
    )
]
