"""Hub names, against a prepared cache and a stand-in for the Hub on loopback; nothing else is ever reached."""

import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastvlm_mlx.errors import FastVLMWarning, HubError, ImageError
from fastvlm_mlx.hub.find import find

from .archives import Server

NAME, COMMIT = "someone/FastVLM-small", "a" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """The three endpoints a download uses: the repository's description, its files' tree, and the files."""

    folder: Path
    requests: list[str]
    tokens: list[str | None]

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, *, body: bool) -> None:
        self.requests.append(self.path)
        self.tokens.append(self.headers.get("Authorization"))
        files = sorted(path.name for path in self.folder.iterdir())
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/{NAME}"):
            siblings = [{"rfilename": name, "size": (self.folder / name).stat().st_size} for name in files]
            tree = [{"type": "file", "path": s["rfilename"], "size": s["size"], "oid": "0" * 40} for s in siblings]
            data = json.dumps(tree if "/tree/" in path else {"id": NAME, "sha": COMMIT, "siblings": siblings}).encode()
            self.reply(data, {"Content-Type": "application/json"}, body)
        elif path.startswith(f"/{NAME}/resolve/") and path.rsplit("/", 1)[1] in files:
            data = (self.folder / path.rsplit("/", 1)[1]).read_bytes()
            self.reply(data, {"ETag": f'"{path.rsplit("/", 1)[1]}-1"', "X-Repo-Commit": COMMIT}, body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def reply(self, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(apple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A stand-in that serves the small checkpoint, with some files nobody needs, to an empty cache."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub import hf_api as hf_api_module

    (apple / "pytorch_model.bin").write_bytes(b"never fetched")
    (apple / "modeling_llava.py").write_text("raise SystemExit('never run')")

    class Served(Hub):
        folder, requests, tokens = apple, [], []

    httpd = Server(("127.0.0.1", 0), Served)
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    endpoint = f"http://127.0.0.1:{httpd.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hf_api_module.api, "endpoint", endpoint)
    monkeypatch.setattr(HfApi.__init__, "__defaults__", (endpoint, *HfApi.__init__.__defaults__[1:]))  # type: ignore[index]
    yield Served
    httpd.shutdown()
    httpd.server_close()


def test_a_first_download_is_announced_fetches_what_is_needed_and_is_not_repeated(server: type[Hub]) -> None:
    shown: list[str] = []
    folder = find(NAME, agree=lambda notice: not shown.append(notice)).folder
    assert len(shown) == 1 and NAME in shown[0] and "GB" in shown[0] and "research use only" in shown[0]
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "vocab.json", "merges.txt"} <= names
    assert not names & {"pytorch_model.bin", "modeling_llava.py"}
    assert not [path for path in server.requests if path.endswith((".bin", ".py"))]
    server.requests.clear()
    assert find(NAME, agree=lambda _: pytest.fail("asked again")).folder == folder
    assert server.requests == []  # offline once cached


def test_declined(server: type[Hub]) -> None:
    with pytest.raises(HubError, match=r"was not downloaded.*`agree`.*`model='tiny'`"):
        find(NAME, agree=lambda _: False)
    assert not [path for path in server.requests if "resolve" in path]


def test_a_picture_is_checked_before_anything_is_fetched(server: type[Hub], tmp_path: Path) -> None:
    from fastvlm_mlx.cli.generate import generate

    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ImageError, match="is empty"):
        generate(model=NAME, image=[str(tmp_path / "empty.jpg")], yes=True)
    assert not [path for path in server.requests if "resolve" in path]


def test_an_interrupted_download_is_taken_up_again(server: type[Hub]) -> None:
    with pytest.warns(FastVLMWarning, match="research use only"):
        folder = find(NAME).folder
    for name in ("model.safetensors", "merges.txt"):
        (folder / name).unlink()
        assert (find(NAME, agree=lambda _: True).folder / name).exists()


def test_a_revision_and_a_token(server: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    folder = find(NAME, revision="v2", agree=lambda _: True).folder
    assert folder == find(NAME, revision="v2", cached_only=True).folder
    assert any("/resolve/" in path or "/revision/v2" in path for path in server.requests)
    assert all("main" not in path for path in server.requests)
    assert set(server.tokens) == {"Bearer hf_mine"}
    with pytest.raises(HubError, match="not in the local cache"):
        find(NAME, cached_only=True)  # the newest is another one


def test_a_name_the_hub_does_not_know(server: type[Hub]) -> None:
    with pytest.raises(HubError, match=r"no such folder, and the Hub has no such model"):
        find("someone/else")


def test_a_folder_wins_over_a_name(server: type[Hub], apple: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(apple.parent)
    shutil.copytree(apple, Path(NAME))
    assert find(NAME).folder == Path(NAME)
    assert server.requests == []


def test_unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="cannot be reached"):
        find(NAME)
