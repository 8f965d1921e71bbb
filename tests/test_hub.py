"""Upload to the Hugging Face hub, against a stand-in of its HTTP API on this machine. Nothing leaves it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from dodistill import DodistillError, distill, load_model
from dodistill.commands.cli import main
from dodistill.report import hub
from dodistill.report.card import model_card
from dodistill.report.front_matter import front_matter, without_folders
from helpers import SHAPE, student, tree

TOKEN = "hf_of_this_test"
REPO = "me/digits-student"


class StandIn(ThreadingHTTPServer):
    """The part of the hub's API that an upload uses. `repos`: name -> {"private": ..., "files": {name: bytes}}."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repos: dict[str, dict[str, Any]] = {}
        self.large: dict[str, bytes] = {}  #: by sha256, as LFS keeps them
        self.seen: list[str] = []
        self.commits = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """No traceback for a client that hangs up."""


class Answers(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def reply(self, status: int, value: Any = None) -> None:
        data = json.dumps(value if value is not None else {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def allowed(self) -> bool:
        """401 for a token that is not known, 403 for the repository of another."""
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply(401, {"error": "Invalid credentials"})
            return False
        return True

    def do_PUT(self) -> None:
        data = self.read()
        assert self.path.removeprefix("/put/") == hashlib.sha256(data).hexdigest()
        self.server.large[self.path.removeprefix("/put/")] = data
        self.reply(200)

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").partition("?")[0]
        if name not in self.server.repos:
            self.reply(404, {"error": "Repository not found"})
        elif self.allowed():
            self.reply(200, {"id": name, "private": self.server.repos[name]["private"]})

    def do_POST(self) -> None:
        body = self.read()
        path = self.path.partition("?")[0]
        self.server.seen.append(path)
        if not self.allowed():
            return
        if path.startswith("/api/models/others/"):
            self.reply(403, {"error": "You don't have the rights"})
        elif path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == f"/api/models/{REPO}/preupload/main":
            self.reply(200, {"files": [
                {"path": file["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in json.loads(body)["files"]
            ]})  # fmt: skip
        elif path == f"/{REPO}.git/info/lfs/objects/batch":
            self.reply(200, {"transfer": "basic", "objects": [
                {**one, "actions": {"upload": {"href": f"{self.server.url}/put/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]})  # fmt: skip
        elif path == f"/api/models/{REPO}/commit/main":
            self.commit([json.loads(line) for line in body.splitlines()])
        else:
            self.reply(404, {"error": f"no {path}"})

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != "me":
            return self.reply(403, {"error": "You don't have the rights to create a model under this namespace"})
        if name in self.server.repos:
            return self.reply(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"})
        self.server.repos[name] = {"private": asked.get("visibility") == "private" or asked.get("private") is True,
                                   "files": {}}  # fmt: skip
        return self.reply(200, {"url": f"{self.server.url}/{name}", "id": name, "name": name})

    def commit(self, lines: list[dict[str, Any]]) -> None:
        files = self.server.repos[REPO]["files"]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        self.server.commits += 1
        self.reply(200, {"success": True, "commitUrl": f"{self.server.url}/{REPO}/commit/{'0' * 40}",
                         "commitOid": "0" * 40})  # fmt: skip


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    pytest.importorskip("huggingface_hub")
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # the stand-in speaks LFS
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def run(teacher: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    settings = {k: v for k, v in tree("procedural").items() if k not in ("source", "intervention")}
    distill(
        teacher, student(), tree("procedural")["source"], image_shape=SHAPE, out="run", verbose=False, test="digits",
        **settings,
    )  # fmt: skip
    config = json.loads(Path("run/config.json").read_text())
    config["teacher"]["spec"] = "/home/someone/secret/teacher.safetensors"
    config["data"]["test"] = "/home/someone/digits"
    Path("run/config.json").write_text(json.dumps(config))
    return Path("run")


def test_push(standin: StandIn, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "run", "student.pt2"]) == 0
    assert standin.seen == []  # nothing is uploaded without the flag
    assert main(["export", "run", "student.pt2", "--push", REPO, "--licence", "mit"]) == 0
    said = capsys.readouterr().out
    assert f"{standin.url}/{REPO}: README.md, config.json, student.pt2, student.safetensors" in said
    repo = standin.repos[REPO]
    assert repo["private"] is False
    files = repo["files"]
    assert set(files) == {"README.md", "config.json", "student.pt2", "student.safetensors"}
    assert files["student.safetensors"] == (run / "student.safetensors").read_bytes()
    assert files["student.pt2"] == Path("student.pt2").read_bytes()
    assert standin.commits == 1

    config = json.loads(files["config.json"])
    assert config["library_name"] == "dodistill"
    assert config["model"]["spec"] == "tiny4"
    assert config["distilled"]["teacher"]["spec"] == "teacher.safetensors"
    assert b"someone" not in files["config.json"] + files["README.md"]

    import huggingface_hub

    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.library_name) == ("mit", "dodistill")
    assert card.data.pipeline_tag == "image-classification"
    (score,) = card.data.eval_results
    summary = json.loads((run / "summary.json").read_text())
    assert (score.dataset_name, score.metric_type) == ("digits", "accuracy")
    assert score.metric_value == pytest.approx(summary["delivered_accuracy"], abs=0.01)
    assert f'hf_hub_download("{REPO}", "student.safetensors")' in card.text
    assert "- `student.pt2`: max |difference|" in card.text
    assert "report.html" not in card.text

    assert main(["export", "run", "--push", REPO, "--private"]) == 2  # it is there, and public
    assert "is there already and is public, but --private was given; nothing was uploaded" in capsys.readouterr().err
    assert standin.commits == 1
    assert main(["export", "run", "--push", REPO]) == 0  # again, weights alone
    assert standin.commits == 2


def test_private(standin: StandIn, run: Path) -> None:
    assert main(["export", "run", "--push", REPO, "--private"]) == 0
    assert standin.repos[REPO]["private"] is True
    assert set(standin.repos[REPO]["files"]) == {"README.md", "config.json", "student.safetensors"}


def test_what_can_go_wrong(
    standin: StandIn, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(words: list[str], *said: str) -> None:
        assert main(["export", *words]) == 2
        told = capsys.readouterr().err
        assert all(part in told for part in said), told
        assert TOKEN not in told
        assert len(told.strip().splitlines()) == 1

    refused(["run", "--push", "digits"], "name a repository as OWNER/NAME")
    refused(["run", "images", "--push", REPO], "images is a folder for images")
    refused(["run/student.safetensors", "--push", REPO], "give the folder of a finished run")
    assert standin.seen == []
    refused(["run", "--push", "others/student"], "may not write to others/student", "You don't have the rights")
    standin.repos["others/student"] = {"private": False, "files": {}}
    refused(["run", "--push", "others/student"], "may not write to others/student", "You don't have the rights")
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    refused(["run", "--push", REPO], "does not accept the token", "hf auth login", "HF_TOKEN")
    monkeypatch.delenv("HF_TOKEN")
    before = len(standin.seen)
    refused(["run", "s.pt2", "--push", REPO], "needs a token that may write", "hf auth login", "HF_TOKEN")
    assert not Path("s.pt2").exists()  # refused before the export
    assert len(standin.seen) == before
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with socket.socket() as free:  # a port where nobody listens
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        refused(["run", "--push", REPO], "cannot be reached", "check the network and HF_ENDPOINT")
    monkeypatch.setattr(Answers, "create", lambda self, asked: self.reply(500, {"error": "out of order"}))
    monkeypatch.setenv("HF_ENDPOINT", standin.url)
    refused(["run", "--push", REPO], "with status 500", "out of order")
    assert standin.commits == 0


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(DodistillError, match=r"huggingface_hub: pip install 'dodistill\[hub\]'"):
        hub.connect(REPO)


def test_front_matter() -> None:
    def read(*args: Any) -> dict[str, Any]:
        text = front_matter(*args)
        assert text.startswith("---\n")
        assert text.endswith("\n---")
        found: dict[str, Any] = yaml.safe_load(text.strip("-"))
        return found

    plain = read({}, {})
    assert plain["license"] == "other"
    assert plain["license_name"] == "as-the-teacher"
    assert "model-index" not in plain
    assert "onnx" not in plain["tags"]
    summary = {"delivered_accuracy": 91.238, "student_name": 'a: "b"\n---'}
    full = read({"data": {"test": "my data/"}}, summary, "mit", ["s.int8.onnx"])
    assert "onnx" in full["tags"]
    assert "license_name" not in full
    (result,) = full["model-index"][0]["results"]
    assert result["dataset"] == {"name": "my data/", "type": "my-data"}
    assert result["metrics"][0]["value"] == 91.24
    assert full["model-index"][0]["name"] == 'a: "b"\n---'


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/home/me/t.py:factory", "t.py:factory"),
        ("~/models/t.safetensors", "t.safetensors"),
        ("../t.pth", "t.pth"),
        ("C:\\Users\\me\\t.pth", "t.pth"),
        ("\\\\server\\me\\t.pth", "t.pth"),
        ("..\\me\\t.pth", "t.pth"),
        ("the images of file:///home/me/set.npz", "the images of set.npz"),
        ("s3://bucket/set", "s3://bucket/set"),
        ("dodistill distill --teacher=/home/me/t.pth --out /home/me/runs/x/ --steps 3",
         "dodistill distill --teacher=t.pth --out x --steps 3"),
        ("/home/me/Acme, Inc (2024)/c++/scans.npz", "scans.npz"),
        ("dodistill distill --train '/home/me/Acme merger/x.npz' --teacher='/home/O'\"'\"'Neill, A/t.pth' --steps 3",
         "dodistill distill --train x.npz --teacher=t.pth --steps 3"),
        ("the classes of /home/me/Acme merger/set are numbers", "the classes of set are numbers"),
        ("kdci+/home/me/a b/mine.py+~/c d/yours.py", "kdci+mine.py+yours.py"),
        ("cat / dog", "cat / dog"),
        ("planted:/home/me/mnist.npz:0.9", "planted:mnist.npz:0.9"),
        ("timm:resnet18", "timm:resnet18"),
        ("owner/name", "owner/name"),
        ("see https://example.org/a/b, 3/4 and 1e-3", "see https://example.org/a/b, 3/4 and 1e-3"),
    ],
)  # fmt: skip
def test_without_folders(text: str, kept: str) -> None:
    assert without_folders({"a": [text, 3, None]}) == {"a": [kept, 3, None]}


def test_a_card_says_where_images_were_given() -> None:
    assert "None of the teacher's training data was used" in model_card({"source": {"name": "fast"}}, {})
    given = model_card({"source": {"name": "data"}}, {})
    assert "None of the teacher's" not in given
    assert "They may be the teacher's training data" in given


def test_the_code_of_a_card_runs(standin: StandIn, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the download replaced by the file itself."""
    import torch

    text = hub.content(run, REPO, {}, "other")["README.md"].decode()
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code is not None
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name: str(run / name))
    images = torch.rand(2, *SHAPE)
    found: dict[str, Any] = {"images": images}
    exec(code[1], found)
    assert torch.equal(found["logits"], load_model("run/student.safetensors").eval()(images))
