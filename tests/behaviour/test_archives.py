"""Apple's archives from a server on loopback that drops connections, lies, redirects and serves other bytes than
promised."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastvlm_mlx
from fastvlm_mlx.errors import CheckpointError, FastVLMWarning, HubError, OptionError
from fastvlm_mlx.files import digests
from fastvlm_mlx.hub import archive, caches, licence, transfer
from fastvlm_mlx.hub.find import find

from .archives import NAME, Behaviour, Handler, drops, honest, raw, replies, serving, zipped
from .forkserver import Run


@pytest.fixture(scope="module")
def data(_apple: Path) -> bytes:
    return zipped(_apple)


@pytest.fixture
def server(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Handler]]:
    """A server of the small checkpoint's archive, and an empty cache."""
    monkeypatch.setattr(transfer, "WAIT_SECONDS", (0.0,) * 4)
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with serving(data) as (handler, address):
        monkeypatch.setenv("FASTVLM_ARCHIVES", address + "/")
        yield handler


def agree(notice: str) -> bool:
    return True


def parts() -> dict[str, int]:
    """What lies in the cache beside models, by name and size."""
    return {path.name: path.stat().st_size for path in (caches.root() / "archives").iterdir()}


def assert_whole(folder: Path, source: Path) -> None:
    """The folder holds what the checkpoint does, its digests, and nothing else; and nothing is left of the archive."""
    assert {path.name for path in folder.iterdir()} == {path.name for path in source.iterdir()} | {digests.SUMS}
    assert all((folder / path.name).read_bytes() == path.read_bytes() for path in source.iterdir())
    assert parts().keys() == {digests.SUMS}
    assert [path.name for path in folder.parent.iterdir()] == [NAME]


def assert_nothing() -> None:
    assert not list((caches.root() / "models").glob("*")) if (caches.root() / "models").exists() else True


def terms_were_said() -> None:
    """Leave in the cache that the notice about Apple's licence has been given."""
    (caches.root() / "notices").mkdir()
    (caches.root() / "notices" / licence.APPLE).touch()


def test_download_unpack_load(server: type[Handler], model: Path, data: bytes) -> None:
    shown: list[str] = []
    folder = find(f"{NAME}.zip", agree=lambda notice: not shown.append(notice)).folder
    assert len(shown) == 1 and "GB" in shown[0] and "research use only" in shown[0]
    assert_whole(folder, model)
    if tool := shutil.which("sha256sum"):
        subprocess.run([tool, "-c", digests.SUMS], cwd=folder, capture_output=True, check=True)
    assert hashlib.sha256(data).hexdigest() in (folder / digests.SUMS).read_text().splitlines()[0]
    server.requests.clear()
    assert (
        find(NAME, agree=lambda _: pytest.fail("asked again")).folder == folder == find(NAME, cached_only=True).folder
    )
    assert server.requests == []
    terms_were_said()
    assert fastvlm_mlx.load(NAME, dtype="float32").generate(None, "Hi", max_tokens=3).text is not None


@pytest.mark.slow
def test_commands_find_it_by_name(server: type[Handler], run: Run, photo: Path, model: Path) -> None:
    find(NAME, agree=agree)
    cache = {"FASTVLM_CACHE": str(caches.root())}
    terms_were_said()
    by_name = run("generate", "-m", NAME, "-i", photo, "--max-tokens", 6, env=cache)
    by_name.answered()
    assert by_name.out == run("generate", "-m", model, "-i", photo, "--max-tokens", 6).out
    assert run("download", NAME, env=cache).out.decode().strip() == str(caches.root() / "models" / NAME)
    run("info", "llava-fastvithd_7b_stage3", env=cache).refused("fastvlm-mlx download llava-fastvithd_7b_stage3")
    run("download", "llava-fastvithd_7b_stage3", "--yes", env=cache).refused("HF_HUB_OFFLINE")
    run("download", "llava-fastvithd_7b_stage3", "--revision", "main", env=cache).refused("no revisions")
    run("download", NAME, "--sha256", "abc", env=cache).refused("64 hexadecimal digits")
    run("download", "apple/FastVLM-0.5B", "--sha256", "a" * 64, env=cache).refused("for Apple's archives")
    run("download", NAME, "--sha256", "a" * 64, env=cache).refused("came from an archive with the SHA-256")


def test_declined(server: type[Handler]) -> None:
    with pytest.raises(HubError, match=r"was not downloaded.*`agree`.*`model='tiny'`"):
        find(NAME, agree=lambda _: False)
    assert server.requests == []


def test_without_a_question_it_is_announced(server: type[Handler]) -> None:
    with pytest.warns(FastVLMWarning, match=r"stage3\.zip takes 0\.0 GB"):
        find(NAME)


def test_a_folder_wins(server: type[Handler], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / NAME).symlink_to(model)
    monkeypatch.chdir(tmp_path)
    assert find(NAME).folder == Path(NAME)


def test_dropped_again_and_again_within_a_run(server: type[Handler], model: Path, data: bytes) -> None:
    step = len(data) // 6
    server.script += [drops(step)] * 5
    assert_whole(find(NAME, agree=agree).folder, model)
    assert [request.get("Range") for request in server.requests] == [None, *(f"bytes={i * step}-" for i in range(1, 6))]
    assert {request.get("If-Range") for request in server.requests[1:]} == {'"one"'}


def test_given_up_kept_and_taken_up_by_the_next_run(server: type[Handler], model: Path, data: bytes) -> None:
    server.script += [drops(300_000), *[drops(0)] * 5]
    with pytest.raises(HubError, match=r"300,000 bytes of it are kept.*continues from there"):
        find(NAME, agree=agree)
    assert parts() == {f"{NAME}.zip.part": 300_000, f"{NAME}.zip.part.json": parts()[f"{NAME}.zip.part.json"]}
    assert_nothing()
    server.requests.clear()
    assert_whole(find(NAME, agree=agree).folder, model)
    assert [request.get("Range") for request in server.requests] == ["bytes=300000-"]


@pytest.mark.slow
def test_a_bar_on_a_terminal(server: type[Handler]) -> None:
    leader, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 90, 0, 0))
    command = [sys.executable, "-m", "fastvlm_mlx", "download", NAME, "--yes"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=terminal)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
        while data := os.read(leader, 65536):
            shown += data
    os.close(leader)
    out, _ = process.communicate()
    assert process.returncode == 0 and out.decode().strip().endswith(NAME)
    assert f"{NAME}.zip: 100%".encode() in shown and f"{NAME}, unpacking: 100%".encode() in shown


@pytest.mark.slow
def test_interrupted_by_a_person_and_taken_up_again(server: type[Handler], model: Path) -> None:
    done = threading.Event()
    server.script.append(lambda handler: (honest(handler, 300_000), done.wait(30)))
    command = [sys.executable, "-m", "fastvlm_mlx", "download", NAME, "--yes"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    part = caches.root() / "archives" / f"{NAME}.zip.part"
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate()
    done.set()
    assert process.returncode == 130 and out == b"" and 0 < part.stat().st_size <= 300_000
    assert_nothing()
    kept = part.stat().st_size
    assert_whole(find(NAME, agree=agree).folder, model)
    assert server.requests[-1]["Range"] == f"bytes={kept}-"


def test_a_drop_of_a_few_bytes_at_a_time_ends(server: type[Handler]) -> None:
    server.script += [drops(7)] * 1000
    with pytest.raises(HubError, match=r"keeps being interrupted \(the connection was closed\)"):
        find(NAME, agree=agree)
    assert len(server.requests) < 10


def test_another_file_meanwhile_starts_over(server: type[Handler], model: Path, data: bytes) -> None:
    server.script += [drops(300_000)]
    other, tag = data, '"two"'
    server.script.append(lambda handler: (setattr(type(handler), "tag", tag), honest(handler)))
    server.data = other
    assert_whole(find(NAME, agree=agree).folder, model)
    assert server.requests[1]["If-Range"] == '"one"'  # to which the server answers with all of the new file


def test_another_address_starts_over(server: type[Handler], model: Path) -> None:
    server.script += [drops(300_000), *[drops(0)] * 5]
    with pytest.raises(HubError):
        find(NAME, agree=agree)
    notes = caches.root() / "archives" / f"{NAME}.zip.part.json"
    notes.write_text(json.dumps(json.loads(notes.read_text()) | {"url": "https://elsewhere"}))
    server.requests.clear()
    assert_whole(find(NAME, agree=agree).folder, model)
    assert "Range" not in server.requests[0]


@pytest.mark.parametrize(
    "notes", ["", "[]", "{", '{"url": 1, "tag": "a", "size": 3}', '{"url": "x"}', "null", "\0", "9" * 9999]
)
def test_notes_that_are_damaged(server: type[Handler], model: Path, notes: str) -> None:
    (caches.root() / "archives").mkdir(parents=True)
    (caches.root() / "archives" / f"{NAME}.zip.part").write_bytes(b"left over")
    (caches.root() / "archives" / f"{NAME}.zip.part.json").write_text(notes)
    assert_whole(find(NAME, agree=agree).folder, model)


def test_a_tag_that_would_add_a_header(server: type[Handler], model: Path) -> None:
    server.script += [replies(200, {"ETag": '"a"', "Content-Length": 10**6}, b"x" * 100_000), *[drops(0)] * 5]
    with pytest.raises(HubError):
        find(NAME, agree=agree)
    notes = caches.root() / "archives" / f"{NAME}.zip.part.json"
    notes.write_text(json.dumps(json.loads(notes.read_text()) | {"tag": '"a"\r\nEvil: 1'}))
    server.requests.clear()
    assert_whole(find(NAME, agree=agree).folder, model)
    assert not any("Evil" in request for request in server.requests)


def later(*behaviours: Behaviour) -> list[Behaviour]:
    """The behaviours after 300,000 bytes and a dropped connection."""
    return [drops(300_000), *behaviours]


# Behaviours after which an honest answer follows: each ends with the whole model.
RECOVERED: dict[str, list[Behaviour]] = {
    "ranges ignored": later(replies(200, {"ETag": '"one"'})),
    "busy": [replies(503, {}, b"")] * 3,
    "slow down": [replies(429, {}, b"")],
    "timed out": [replies(408, {}, b"")],
    "busy in between": later(replies(502, {}, b"")),
    "no answer": [raw(b"")] * 2,
    "no HTTP": [raw(b"220 ftp ready\r\n")],
    "an endless header": [raw(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000)],
    "a hundred thousand headers": [raw(b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 100_000)],
    "a cut header": [raw(b"HTTP/1.1 200 OK\r\nContent-Le")],
    "nothing there": later(replies(416, {"Content-Range": "bytes */5"}, b"")),
    "nothing there, without a size": later(replies(416, {}, b"")),
    "a longer length": [replies(200, {"ETag": '"one"', "Content-Length": 10**9})],
    "a chunk cut short": [raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\nabc")],
    "no chunk": [raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\nabc")],
    "another file's range": later(replies(206, {"Content-Range": "bytes 300000-400000/400001"}, b"x" * 100_001)),
}


@pytest.mark.parametrize("case", RECOVERED)
def test_recovered(server: type[Handler], model: Path, case: str) -> None:
    server.script += RECOVERED[case]
    assert_whole(find(NAME, agree=agree).folder, model)


# Behaviours that end it, and what is said.
ENDED: dict[str, tuple[list[Behaviour], str]] = {
    "not found": ([replies(404, {}, b"")], "HTTP 404"),
    "forbidden": ([replies(403, {}, b"")], "HTTP 403"),
    "gone in between": (later(replies(410, {}, b"")), "HTTP 410"),
    "a redirect to a file": ([replies(302, {"Location": "file:///etc/passwd"}, b"")], "not a plain https"),
    "a redirect to ftp": ([replies(302, {"Location": "ftp://127.0.0.1/x"}, b"")], "not a plain https"),
    "a redirect to data": ([replies(302, {"Location": "data:,x"}, b"")], "not a plain https"),
    "a redirect to http elsewhere": (
        [replies(301, {"Location": "http://example.invalid/x"}, b"")],
        "not a plain https",
    ),
    "a redirect to http by no scheme": ([replies(307, {"Location": "//example.invalid/x"}, b"")], "not a plain https"),
    "a redirect with a password": (
        [replies(302, {"Location": "https://me:secret@example.invalid/"}, b"")],
        "not a plain https",
    ),
    "a redirect to no address": ([replies(302, {"Location": "http://[::1/"}, b"")], "not a plain https"),
    "a redirect with a space": ([replies(302, {"Location": "http://127.0.0.1/a b"}, b"")], "not a plain https"),
    "a redirect without an address": ([replies(302, {}, b"")], "HTTP 302"),
    "an endless redirect": ([replies(302, {"Location": f"/{i}"}, b"") for i in range(20)], "without end"),
    "a redirect in between": (later(replies(302, {"Location": "file:///etc/passwd"}, b"")), "not a plain https"),
    "compressed": ([replies(200, {"Content-Encoding": "gzip"})], "'gzip'"),
    "a part of its own accord": ([replies(206, {"Content-Range": "bytes 10-99/100"}, b"x" * 90)], "status 206"),
    "the wrong part": (later(replies(206, {"Content-Range": "bytes 5-99/100"}, b"x" * 95)), "range 'bytes 5-99/100'"),
    "a part of unknown size": (
        later(replies(206, {"Content-Range": "bytes 300000-300009/*"}, b"x" * 10)),
        "status 206",
    ),
    "a part without a range": (later(replies(206, {}, b"x" * 10)), "status 206"),
    "parts in another unit": (later(replies(206, {"Content-Range": "apples 300000-9/10"}, b"x")), "status 206"),
    "many parts": (later(replies(206, {"Content-Type": "multipart/byteranges; boundary=x"}, b"x")), "status 206"),
    "no content": ([replies(204, {}, b"")], "status 204"),
    "terabytes": ([replies(200, {"Content-Length": 10**13})], "more than any FastVLM"),
}


@pytest.mark.parametrize("case", ENDED)
def test_ended(server: type[Handler], case: str) -> None:
    behaviours, says = ENDED[case]
    server.script += behaviours
    with pytest.raises(HubError) as caught:
        find(NAME, agree=agree)
    assert says in str(caught.value)
    assert_nothing()


# Bytes that are not the archive, and what is said; they do not stay.
WRONG: dict[str, Behaviour] = {
    "a page": replies(200, {}, b"<html>Please accept our terms</html>"),
    "nothing": replies(200, {}, b""),
    "a shorter length": lambda handler: replies(200, {"Content-Length": 1000})(handler),
    "half of it, without a length": lambda handler: handler.send(200, {}, handler.data[: len(handler.data) // 2]),
    "half of it, in chunks": lambda handler: raw(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n" + handler.data[:1000] + b"\r\n0\r\n\r\n"
    )(handler),
    "a bit turned over": lambda handler: replies(200, {}, _turned(handler.data, len(handler.data) // 2))(handler),
}


def _turned(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize("case", WRONG)
def test_other_bytes_are_noticed_and_do_not_stay(server: type[Handler], case: str, model: Path, data: bytes) -> None:
    server.script += [WRONG[case], WRONG[case]]
    digest = hashlib.sha256(data).hexdigest()
    with pytest.raises(CheckpointError, match=r"fetch it again"):
        archive.find(NAME, agree, sha256=digest)
    assert_nothing()
    assert not any(name.endswith((".zip", ".part")) for name in parts())
    with pytest.raises(CheckpointError, match=r"fetch it again"):
        archive.find(NAME, agree)
    assert_nothing()
    assert_whole(archive.find(NAME, agree, sha256=digest.upper()), model)


def test_a_digest_once_seen_is_expected_again(server: type[Handler], model: Path, tmp_path: Path, data: bytes) -> None:
    folder = find(NAME, agree=agree).folder
    (folder / "config.json").unlink()
    with pytest.raises(HubError, match="holds no model; remove it"):
        find(NAME, agree=agree)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    server.data = _turned(data, 10)  # a date in the first file's header: unpacks to the same
    with pytest.raises(CheckpointError, match=r"of an earlier download; to take the new one, pass it as `sha256`"):
        find(NAME, agree=agree)
    assert_whole(archive.find(NAME, agree, sha256=hashlib.sha256(server.data).hexdigest()), model)


def test_more_than_any_model_without_a_length(server: type[Handler], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "MAX_DOWNLOAD_BYTES", 100_000)
    server.script.append(lambda handler: handler.send(200, {}, b"x" * 200_000))
    with pytest.raises(HubError, match=r"without end"):
        find(NAME, agree=agree)


def test_a_server_that_falls_silent(server: type[Handler], monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setattr(transfer, "TIMEOUT_SECONDS", 0.2)
    done = threading.Event()
    server.script.append(lambda handler: (handler.wfile.write(b"HTTP/1.1 200 OK\r\n"), done.wait(20)))
    server.script.append(lambda handler: (honest(handler, 200_000), done.wait(20)))
    folder = find(NAME, agree=agree).folder
    done.set()
    assert_whole(folder, model)


@pytest.mark.parametrize(
    "base", ["http://example.invalid", "file:///tmp", "ftp://127.0.0.1", "example.invalid/x", "https://", "\n"]
)
def test_bases_that_are_not_safe(server: type[Handler], monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    monkeypatch.setenv("FASTVLM_ARCHIVES", base)
    with pytest.raises(HubError, match="not a plain https address"):
        find(NAME, agree=agree)


def test_unreachable(server: type[Handler], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVLM_ARCHIVES", "http://127.0.0.1:1")
    with pytest.raises(HubError, match="cannot be reached"):
        find(NAME, agree=agree)


def test_https_never_leads_to_http_even_on_this_machine() -> None:
    with pytest.raises(HubError, match="not a plain https"):
        transfer.check_address("http://127.0.0.1/x", "https://example.com/x")
    transfer.check_address("https://cdn.example.com/x", "https://example.com/x")


def test_two_at_once(server: type[Handler]) -> None:
    part = caches.root() / "archives" / f"{NAME}.zip.part"
    part.parent.mkdir(parents=True)
    with part.open("wb") as file, pytest.raises(HubError, match="by another process"):
        fcntl.flock(file, fcntl.LOCK_EX)
        find(NAME, agree=agree)


def test_one_that_ends_as_another_begins(server: type[Handler], monkeypatch: pytest.MonkeyPatch) -> None:
    """Renamed after it was opened and before it was locked: what is open is the finished archive then."""
    path = caches.root() / "archives" / f"{NAME}.zip"
    path.parent.mkdir(parents=True)
    path.with_name(f"{NAME}.zip.part").write_bytes(b"all of it")
    monkeypatch.setattr(fcntl, "flock", lambda *_: path.with_name(f"{NAME}.zip.part").rename(path))
    with pytest.raises(HubError, match="by another process just now; try again"):
        find(NAME, agree=agree)
    assert path.read_bytes() == b"all of it"


@pytest.mark.parametrize("status", [405, 416])
def test_a_size_that_is_not_told(server: type[Handler], monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setattr(server, "do_HEAD", replies(status, {}, b""))
    with pytest.raises(HubError, match=f"HTTP {status}"):
        find(NAME, agree=agree)


def test_a_list_of_digests_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    sums = {"x": "a" * 64}
    digests.write_sums(tmp_path / digests.SUMS, sums)
    with pytest.raises(UnicodeEncodeError):
        digests.write_sums(tmp_path / digests.SUMS, {"\udc80": "b" * 64})
    assert digests.read_sums(tmp_path / digests.SUMS) == sums


def test_no_room(server: type[Handler], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(HubError, match=r"free.*make room"):
        find(NAME, agree=agree)


def test_a_cache_that_cannot_be_written(server: type[Handler]) -> None:
    caches.root().write_text("a file in the cache's place")
    with pytest.raises(HubError, match=r"cannot be stored in the cache.*FASTVLM_CACHE"):
        find(NAME, agree=agree)


def test_a_list_of_its_own_is_replaced(server: type[Handler], apple: Path) -> None:
    (apple / digests.SUMS).write_text("not ours")
    server.data = zipped(apple)
    found = digests.verify(find(NAME, agree=agree).folder)
    assert found.unknown == [] and found.files == len(list(apple.iterdir())) - 1


def test_a_name_that_is_none() -> None:
    for name in ("llava-fastvithd_3b_stage3", "llava-fastvithd_0.5b_stage1", "llava-fastvithd_0.5b_stage3.tar"):
        with pytest.raises(HubError, match="no such folder"):
            find(name)
        with pytest.raises(OptionError, match="none of Apple's archives"):
            archive.find(name)
