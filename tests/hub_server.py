"""A small Hub on this machine: the routes that huggingface_hub calls to push and to load, over real HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

USER = "tester"
NEVER = 0  # a status for LocalHub.answers: no answer at all
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".png")
PIPELINE_TAGS = {"visual-question-answering", "image-to-text", None}  # the Hub has none of image-text retrieval
REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class Repository:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


class LocalHub:
    """Runs in a thread from `with LocalHub() as hub:` on.

    Attributes:
        url: what HF_ENDPOINT is to be.
        repositories: id -> what was pushed.
        answers: pattern -> status. A request "METHOD /path" in which the pattern is found gets that status; NEVER keeps
            it waiting until the end.
        requests: all so far, "METHOD /path".
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.answers: dict[str, int] = {}
        self.requests: list[str] = []
        self.closing = threading.Event()

    def __enter__(self) -> LocalHub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def add(self, repository: str, folder: Path, **texts: str) -> None:
        """A public repository with the files of a folder, and further texts by name."""
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        files |= {name: text.encode() for name, text in texts.items()}
        self.repositories[repository] = Repository(
            files=files, commits=[hashlib.sha1(folder.name.encode()).hexdigest()]
        )


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, content: object = None, status: int = 200, error: str | None = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, **({"X-Error-Code": error} if error else {})}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for pattern, status in self.hub.answers.items():
            if re.search(pattern, request):
                if status == NEVER:
                    self.hub.closing.wait()
                    self.close_connection = True
                else:
                    self.answer({"error": "so the test wants it"}, status)
                return
        for pattern, route in self.ROUTES.items():
            if match := re.fullmatch(pattern, request):
                signed = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
                # what is uploaded goes to a storage of its own by a signed address, as on the Hub
                if self.command == "POST" and not signed:
                    return self.answer({"error": "Invalid username or password."}, 401)
                name = match.groupdict().get("id")
                found = self.hub.repositories.get(name) if name else None
                if name and (found is None or found.private and not signed):
                    return self.answer({"error": "Repository not found"}, 404, "RepoNotFound")
                if match.groupdict().get("revision", "main") not in ("main", *(found.commits if found else ())):
                    return self.answer({"error": "Invalid rev"}, 404, "RevisionNotFound")
                return route(self, **{key: value for key, value in match.groupdict().items() if key != "revision"})
        self.answer({"error": f"this small Hub has no {request}"}, 404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted['organization'] or USER}/{wanted['name']}"
        there = name in self.hub.repositories
        if not there:
            private = wanted.get("visibility") == "private" or wanted.get("private", False)
            self.hub.repositories[name] = Repository(private)
        self.answer({"url": f"{self.hub.url}/{name}"}, 409 if there else 200)

    def validate_yaml(self) -> None:
        errors = [{"message": message} for message in front_matter_errors(json.loads(self.body)["content"])]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, id: str) -> None:
        wanted, there = json.loads(self.body), self.hub.repositories[id].files
        rules = wanted.get("gitIgnore") or there.get(".gitignore", b"").decode()
        files = [
            {
                "path": path,
                "uploadMode": "lfs" if path.endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": any(fnmatch(path.split("/")[-1], rule) for rule in rules.split()),
            }
            for path in (file["path"] for file in wanted["files"])
        ]
        self.answer({"files": files})

    def lfs_batch(self, id: str) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/storage/{one['oid']}"}}}
            for one in json.loads(self.body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.answer({"error": "other content than announced"}, 400)
        self.hub.uploads[oid] = self.body
        self.answer({})

    def commit(self, id: str) -> None:
        repository = self.hub.repositories[id]
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.uploads[value["oid"]]
        oid = hashlib.sha1(self.body).hexdigest()
        repository.commits.append(oid)
        self.answer({"commitUrl": f"{self.hub.url}/{id}/commit/{oid}", "commitOid": oid})

    def info(self, id: str) -> None:
        repository = self.hub.repositories[id]
        self.answer(
            {
                "id": id,
                "sha": repository.commits[-1] if repository.commits else None,
                "private": repository.private,
                "siblings": [{"rfilename": path} for path in repository.files],
                "tags": [],
            }
        )

    def tree(self, id: str, folder: str | None) -> None:
        files = self.hub.repositories[id].files
        listed = [path for path in files if path.startswith(f"{folder}/" if folder else "")]
        if folder and not listed:
            return self.answer({"error": "no such folder"}, 404, "EntryNotFound")
        self.answer(
            [{"type": "file", "path": path, "size": len(files[path]), "oid": git_id(files[path])} for path in listed]
        )

    def resolve(self, id: str, file: str) -> None:
        repository = self.hub.repositories[id]
        commit = repository.commits[-1] if repository.commits else "0" * 40
        if file not in repository.files:
            return self.answer(b"", 404, "EntryNotFound", X_Repo_Commit=commit)
        content = repository.files[file]
        self.answer(content, ETag=f'"{git_id(content)}"', X_Repo_Commit=commit, Accept_Ranges="none")

    ROUTES = {
        r"POST /api/repos/create": create,
        r"POST /api/validate-yaml": validate_yaml,
        r"POST /api/models/(?P<id>[^/]+/[^/]+)/preupload/(?P<revision>.+)": preupload,
        r"POST /(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch": lfs_batch,
        r"PUT /storage/(?P<oid>\w+)": upload,
        r"POST /api/models/(?P<id>[^/]+/[^/]+)/commit/(?P<revision>.+)": commit,
        r"GET /api/models/(?P<id>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?": info,
        r"GET /api/models/(?P<id>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?": tree,
        r"(GET|HEAD) /(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)": resolve,
    }


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def front_matter_errors(card: str) -> list[str]:
    """What the Hub's rules for a model's YAML refuse in it, as far as a card of ours touches them.

    Source: hub-docs, modelcard.md (model-index) and docs/hub/model-cards.md.
    """
    block = re.match(r"---\n(.*?)\n---(\n|$)", card, re.DOTALL)
    data = yaml.safe_load(block.group(1)) if block else None
    if not isinstance(data, dict):
        return ["there is no front matter"]
    errors = [f"{key} is missing" for key in ("library_name", "tags", "model-index") if key not in data]
    if data.get("pipeline_tag") not in PIPELINE_TAGS:
        errors.append("pipeline_tag is none of the Hub's")
    for key in ("tags", "metrics", "datasets"):
        if not all(isinstance(entry, str) for entry in data.get(key, [])):
            errors.append(f"{key} must be a list of strings")
    for name in (data.get("base_model"), *data.get("datasets", [])):
        if name is not None and not REPOSITORY.fullmatch(name):
            errors.append(f"{name} is no id of a repository")
    if data.get("base_model_relation", "finetune") not in ("finetune", "adapter", "merge", "quantized"):
        errors.append("base_model_relation is unknown")
    if not re.fullmatch(r"[a-z0-9.-]+", data.get("license", "unknown")):
        errors.append("license is no identifier")
    for model in data.get("model-index", []):
        for result in model["results"]:
            whole = model["name"] and result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]
            if not whole or not all(metric["type"] and "value" in metric for metric in result["metrics"]):
                errors.append("model-index lacks something")
    return errors
