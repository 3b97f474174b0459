"""Checkpoints to and from a hub: a server on the loopback that speaks the hub's protocol, and the hub's own client."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch

from seqssm import hub
from seqssm.backbone import BackboneConfig, LanguageModel, MixerSpec
from seqssm.errors import UserError
from seqssm.hub import remote

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as pushing and pulling a model needs. Repositories are dicts of files by name."""

    protocol_version = "HTTP/1.1"
    repositories: dict[str, dict[str, bytes]]
    objects: dict[str, bytes]
    unknown: list[str]

    def log_message(self, *_: object) -> None: ...

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, content: object, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code: str) -> None:
        self._answer({"error": code}, 404, X_Error_Code=code, X_Error_Message=code)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            files = self.repositories.get(match[1])
            if files is None:
                self._missing("RepoNotFound")
            elif match[3] not in (None, "main", COMMIT):
                self._missing("RevisionNotFound")
            elif match[2] == "tree":
                rows = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
                self._answer(rows)
            else:
                self._answer({"id": match[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            content = self.repositories.get(match[1], {}).get(match[3])
            if content is None:
                self._missing("EntryNotFound")
            else:
                etag = f'"{hashlib.sha1(content).hexdigest()}"'
                self._answer(content, ETag=etag, X_Repo_Commit=COMMIT, Content_Type="application/octet-stream")
        elif path == "/api/agent-harnesses":  # the client asks for names for its user agent
            self._answer({})
        else:
            self._refuse()

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            there = name in self.repositories
            self.repositories.setdefault(name, {})
            url = f"http://{self.headers['Host']}/{name}"
            self._answer({"url": url, "name": name}, 409 if there else 200)
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": one["oid"],
                    "size": one["size"],
                    "actions": {"upload": {"href": f"http://{self.headers['Host']}/lfs/{one['oid']}", "header": {}}},
                }
                for one in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            for line in body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    self.repositories[match[1]][value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    self.repositories[match[1]][value["path"]] = self.objects[value["oid"]]
            url = f"http://{self.headers['Host']}/{match[1]}/commit/{COMMIT}"
            self._answer({"commitUrl": url, "commitOid": COMMIT, "success": True})
        elif path == "/api/validate-yaml":
            self._answer({"warnings": [], "errors": []})
        else:
            self._refuse()

    def do_PUT(self) -> None:
        body = self._body()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        self.objects[oid] = body
        self._answer({})

    def _refuse(self) -> None:
        self.unknown.append(f"{self.command} {self.path}")
        self._answer({"error": "not here"}, 500)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the loopback speaks plain LFS
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_loopback")
    Hub.repositories, Hub.objects, Hub.unknown = {}, {}, []
    http = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_address[1]}"
    http.shutdown()
    http.server_close()
    assert not Hub.unknown


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    backbone = BackboneConfig(d_model=16, n_layers=1, mixers={"m": MixerSpec(class_path="Mamba")})
    network = LanguageModel(11, backbone).eval()
    config = {"task": "seqssm.backbone.LanguageModel", "init_args": network.init_args()}
    notes = "license: apache-2.0\nsummary: A test.\n"
    metrics = {"metrics": {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}}}
    return hub.save(tmp_path / "model", config, network.state_dict(), notes=notes, metrics=metrics)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_checkpoint_goes_to_a_repository_and_comes_back(server: str, model: Path, tmp_path: Path) -> None:
    (model / "optimizer.pt").write_bytes(b"not of the checkpoint")
    assert COMMIT in remote.push(model, "someone/a-model", endpoint=server)
    (model / "optimizer.pt").unlink()
    assert Hub.repositories["someone/a-model"] == content(model)
    remote.push(model, "someone/a-model", endpoint=server)  # again, into the same repository
    # Whatever else a repository holds stays there.
    Hub.repositories["someone/a-model"] |= {"evil.py": b"boom", "../../escape": b"boom", "sub/config.json": b"{}"}
    folder = remote.pull("someone/a-model", tmp_path / "new" / "copy", endpoint=server, revision="main")
    assert content(folder) == content(model)
    assert [path.name for path in folder.parent.iterdir()] == ["copy"]


def test_what_a_hub_refuses_is_one_line_and_the_old_folder_stays(server: str, model: Path, tmp_path: Path) -> None:
    remote.push(model, "someone/broken", endpoint=server)
    files = Hub.repositories["someone/broken"]
    whole = dict(files)
    old = remote.pull("someone/broken", tmp_path / "old", endpoint=server)
    before = content(old)

    def refused(place: str, words: str, **arguments: str) -> None:
        with pytest.raises(UserError, match=words) as caught:
            remote.pull(place, old, **{"endpoint": server, **arguments})
        assert "\n" not in str(caught.value)
        assert content(old) == before
        assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []

    refused("someone/nothing", "no such repository")
    refused("someone/broken", "no such revision", revision="v9")
    refused("someone/broken", "cannot be reached", endpoint="http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached"):
        remote.push(model, "someone/new", endpoint="http://127.0.0.1:9")
    files["model.safetensors"] = whole["model.safetensors"][:-7]
    refused("someone/broken", "someone/broken: model.safetensors is not the file that was saved")
    files["model.safetensors"] = whole["model.safetensors"]
    del files["README.md"]
    refused("someone/broken", "no model card")
    files |= whole
    files["config.json"] = whole["config.json"].replace(b'"format_version": 1', b'"format_version": 7')
    refused("someone/broken", "format_version 7")


@pytest.mark.parametrize(
    "name", ["a/../b", "owner/..", "owner", "a/b/c", "owner/na me", "-x/y", "owner/x--y", "a/b.git"]
)
def test_names_that_are_none_reach_no_server(name: str, model: Path, tmp_path: Path) -> None:
    nowhere = {"endpoint": "http://127.0.0.1:9"}
    with pytest.raises(UserError, match="not the name of a hub repository"):
        remote.pull(name, tmp_path / "copy", **nowhere)
    with pytest.raises(UserError, match="not the name of a hub repository"):
        remote.push(model, name, **nowhere)
    assert not (tmp_path / "copy").exists()


def test_folders_serve_as_places(model: Path, tmp_path: Path) -> None:
    place = str(tmp_path / "shelf" / "model")
    assert remote.push(model, place) == place
    assert content(remote.pull(place, tmp_path / "back")) == content(model)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="is not a checkpoint"):
        remote.push(model, str(tmp_path / "photos"))
    (model / "README.md").unlink()
    with pytest.raises(UserError, match="no model card"):
        remote.push(model, place)


def test_the_command_finds_the_hub_by_its_environment(server: str, model: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": server, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_loopback"}
    for args in (["push", str(model), "someone/b"], ["pull", "someone/b", str(tmp_path / "copy")]):
        done = subprocess.run(
            [sys.executable, "-m", "seqssm", "hub", *args], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("pu")
    assert content(tmp_path / "copy") == content(model)
