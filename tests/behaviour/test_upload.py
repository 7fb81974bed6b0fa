"""`convert --upload` against a stand-in for the Hub's endpoints on loopback."""

import base64
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fastvlm_mlx.cli.convert import convert as command
from fastvlm_mlx.errors import HubError, OptionError
from fastvlm_mlx.hub import publish

from .archives import Server
from .forkserver import Run

NAME = "someone/FastVLM-small-mlx"


class Hub(http.server.BaseHTTPRequestHandler):
    """Who the token is of, repositories, and a commit: small files in it, large ones stored before by their SHA-256."""

    token: ClassVar[str]
    refuses: ClassVar[str]
    requests: ClassVar[list[str]]
    stored: ClassVar[dict[str, bytes]]
    committed: ClassVar[dict[str, bytes]]

    def do_GET(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def do_PUT(self) -> None:
        self.stored[self.path.rsplit("/", 1)[1]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.reply({})

    def answer(self, body: bytes) -> None:
        path = self.path.split("?")[0]
        self.requests.append(f"{self.command} {path}")
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            self.reply({"error": "no such token"}, 401)
        elif self.refuses and self.refuses in path:
            self.reply({"error": "refused"}, 403)
        elif path == "/api/whoami-v2":
            self.reply({"name": "someone", "type": "user", "orgs": []})
        elif path == "/api/repos/create":
            self.reply({"url": f"http://{self.headers['Host']}/{NAME}"})
        elif path.startswith(f"/api/models/{NAME}/tree/"):
            self.reply([{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in self.committed])
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif path.startswith(f"/api/models/{NAME}/preupload/"):
            files = json.loads(body)["files"]
            self.reply(
                {
                    "files": [
                        {"path": file["path"], "shouldIgnore": False, "uploadMode": self.mode(file)} for file in files
                    ]
                }
            )
        elif path == f"/{NAME}.git/info/lfs/objects/batch":
            self.reply({"transfer": "basic", "objects": [self.place(file) for file in json.loads(body)["objects"]]})
        elif path.startswith(f"/api/models/{NAME}/commit/"):
            self.commit([json.loads(line) for line in body.splitlines()])
            address = f"http://{self.headers['Host']}/{NAME}/commit/{'a' * 40}"
            self.reply({"commitUrl": address, "commitOid": "a" * 40, "success": True})
        else:
            self.reply({"error": f"{path} is not known here"}, 404)

    def mode(self, file: dict[str, Any]) -> str:
        return "lfs" if file["path"].endswith(".safetensors") else "regular"

    def place(self, file: dict[str, Any]) -> dict[str, Any]:
        return {**file, "actions": {"upload": {"href": f"http://{self.headers['Host']}/objects/{file['oid']}"}}}

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.committed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.committed[value["path"]] = self.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.committed[value["path"]]

    def reply(self, table: Any, status: int = 200) -> None:
        data = json.dumps(table).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A stand-in that takes the token "right", which is in the environment."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub import hf_api as hf_api_module

    class Served(Hub):
        token, refuses = "right", ""
        requests: ClassVar[list[str]] = []
        stored: ClassVar[dict[str, bytes]] = {}
        committed: ClassVar[dict[str, bytes]] = {}

    httpd = Server(("127.0.0.1", 0), Served)
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    endpoint = f"http://127.0.0.1:{httpd.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(hf_api_module.api, "endpoint", endpoint)
    monkeypatch.setattr(HfApi.__init__, "__defaults__", (endpoint, *HfApi.__init__.__defaults__[1:]))  # type: ignore[index]
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "right")
    monkeypatch.setenv("no_proxy", "*")
    yield Served
    httpd.shutdown()
    httpd.server_close()


def test_every_file_arrives(server: type[Hub], apple: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub import constants

    out = tmp_path / "ours"
    command(str(apple), str(out), upload=NAME)
    assert server.committed == {path.name: path.read_bytes() for path in out.iterdir()}
    assert {"README.md", "LICENSE", "config.json", "tokenizer.json", "model.safetensors"} == server.committed.keys()
    assert hashlib.sha256(server.committed["model.safetensors"]).hexdigest() in server.stored
    assert b"license: apple-amlr" in server.committed["README.md"]
    said = capfd.readouterr()
    assert said.out == "" and f"Published: {constants.ENDPOINT}/{NAME}" in said.err


def test_weights_of_an_earlier_conversion_do_not_stay(server: type[Hub], apple: Path, tmp_path: Path) -> None:
    """Its index would have a reader take the old shards for the model."""
    kept = {"notes.txt": b"mine", "adapters/model.safetensors": b"mine too"}
    old = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")
    server.committed.update(kept | dict.fromkeys((*old, "config.json", "model.safetensors"), b"old"))
    command(str(apple), str(tmp_path / "ours"), upload=NAME)
    assert server.committed == kept | {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}


@pytest.mark.parametrize(
    ("token", "says"), [(None, "without a token.*HF_TOKEN"), ("wrong", r"with this token \(HTTP 401\)")]
)
def test_refused_before_converting(
    server: type[Hub], apple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, says: str
) -> None:
    monkeypatch.setattr("fastvlm_mlx.convert.convert", lambda *_, **__: pytest.fail("converted"))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=says):
        command(str(apple), str(tmp_path / "ours"), upload=NAME)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("where", ["/repos/create", "/preupload/", "/lfs/", "/commit/"])
def test_refused_while_publishing(server: type[Hub], apple: Path, tmp_path: Path, where: str) -> None:
    server.refuses = where
    with pytest.raises(HubError, match=r"cannot be written to with this token \(HTTP 403\)"):
        command(str(apple), str(tmp_path / "ours"), upload=NAME)
    assert (tmp_path / "ours" / "config.json").exists() and not server.committed


@pytest.mark.parametrize("name", ["", "name", "a/b/c", "../x", "a/b\n", "-/x", "a b/c", "a--b/c", "a/b.git", "a/b-"])
def test_names_that_are_none(server: type[Hub], name: str) -> None:
    with pytest.raises(OptionError, match="expected OWNER/NAME"):
        publish.check(name)
    assert server.requests == []


@pytest.mark.slow
def test_offline(run: Run, model: Path, tmp_path: Path) -> None:
    run("convert", model, "--out", tmp_path / "x", "--upload", NAME, env={"HF_TOKEN": "x"}).refused(
        "the Hub cannot be reached"
    )
    assert not (tmp_path / "x").exists()
