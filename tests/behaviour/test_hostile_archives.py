"""Archives that attack whoever unpacks them: refused in one sentence, with nothing written, in little time and
memory."""

import io
import random
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.files import unzip

from .archives import NAME, zipped
from .forkserver import Run

pytestmark = pytest.mark.slow

Write = Callable[[zipfile.ZipFile], object]
TOP = f"{NAME}/"


def made(
    *entries: tuple[str | zipfile.ZipInfo, bytes], config: bool = True, method: int = zipfile.ZIP_DEFLATED
) -> bytes:
    """An archive of these files, after a config.json."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method, compresslevel=1) as archive:
        if config:
            archive.writestr(f"{TOP}config.json", b"{}")
        for name, content in entries:
            info = zipfile.ZipInfo(name) if isinstance(name, str) else name
            info.compress_type = method
            archive.writestr(info, content)
    return out.getvalue()


class Pipe(io.BytesIO):
    """Somewhere to write that cannot be gone back in."""

    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        raise io.UnsupportedOperation


def streamed(content: dict[str, bytes]) -> bytes:
    """An archive with sizes after the data, as `zip` writes into a pipe, and in 64 bits, as over 4 GB."""
    out = Pipe()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            with archive.open(TOP + name, "w", force_zip64=True) as file:
                file.write(data)
    return out.getvalue()


def special(name: str, kind: int, content: bytes = b"/etc/passwd") -> bytes:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (kind | 0o777) << 16
    return made((info, content))


def flagged(bit: int) -> bytes:
    """The last file's flag set, in its own header and in the directory."""
    data = bytearray(made((f"{TOP}x", b"secret")))
    local, central = data.rindex(b"PK\x03\x04"), data.rindex(b"PK\x01\x02")
    data[local + 6] |= bit
    data[central + 8] |= bit
    return bytes(data)


def directory(offset: int, layout: str, value: int, data: bytes | None = None) -> bytes:
    """A field of the last entry in the directory changed."""
    found = bytearray(data or made((f"{TOP}x", b"x" * 5000)))
    struct.pack_into(layout, found, found.rindex(b"PK\x01\x02") + offset, value)
    return bytes(found)


def end(offset: int, layout: str, value: int) -> bytes:
    """A field of the directory's end changed."""
    found = bytearray(made((f"{TOP}x", b"x")))
    struct.pack_into(layout, found, found.rindex(b"PK\x05\x06") + offset, value)
    return bytes(found)


def overlapping(count: int) -> bytes:
    """Many directory entries that all unpack the same few bytes of zeros (as in David Fifield's zip bomb)."""
    data = made((f"{TOP}0", bytes(1_000_000)))
    start = data.rindex(b"PK\x01\x02")
    entry = data[start : data.rindex(b"PK\x05\x06")]
    many = b"".join(entry.replace(f"{TOP}0".encode(), f"{TOP}{chr(48 + i % 75)}".encode()) for i in range(count))
    first = data.index(b"PK\x01\x02")
    body = data[:start] + many
    return body + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count + 1, count + 1, len(body) - first, first, 0)


def wide_directory(size: int) -> bytes:
    """A directory that is said to take `size` bytes, with as many zeros in its place."""
    start = len(made())
    return made() + bytes(size) + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 9, 9, size, start, 0)


NAMES: dict[str, str] = {
    name: name
    for name in (
        "../x", "../../../../etc/passwd", f"{TOP}../x", f"{TOP}../../x", "..", f"{TOP}..", "/x", "/etc/cron.d/x",
        "//x/y",
        "..\\x", f"{TOP}..\\..\\x", "C:\\x", "C:/x", "c:x", "\\\\host\\share", f"{TOP}a\nb", f"{TOP}a\rb",
        f"{TOP}\x1b[2J",
        f"{TOP}a\x7f", f"{TOP}\u202etxt.exe", f"{TOP}\u2028", f"{TOP}a:stream", f"{TOP}{'x' * 201}",
        f"{TOP}{'é' * 120}",
        "a/b/c/d/e", f"{TOP}1/2/3/4/5/6/7/8", "/", "a/../../b", "./../x", "../",
    )
}  # fmt: skip

SAME: dict[str, tuple[str, str]] = {
    "twice": ("x", "x"),
    "in capitals": ("x.json", "X.JSON"),
    "composed and not": ("caf\u00e9", "cafe\u0301"),
    "with a dot": ("x", "./x"),
    "a sharp s": ("stra\u00dfe", "STRASSE"),
    "the config": ("config.json", "CONFIG.json"),
}

BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "zeros": (lambda: made((f"{TOP}x", bytes(120_000_000))), "which no weights do"),
    "zeros in many files": (
        lambda: made(*((f"{TOP}{i}", bytes(1_000_000)) for i in range(120))),
        "which no weights do",
    ),
    "zeros left out": (lambda: made(("elsewhere/x", bytes(120_000_000))), "which no weights do"),
    "overlapping files": (lambda: overlapping(500), ""),
    "thousands of files": (lambda: made(*((f"{TOP}{i}", b"") for i in range(1001))), "1002 files"),
    "a directory of 2 MB": (lambda: wide_directory(2_000_000), "a directory of 2,000,000 bytes"),
    "a directory of 50 MB": (lambda: wide_directory(50_000_000), "a directory of 50,000,000 bytes"),
    "a size of 4 GB": (lambda: directory(24, "<L", 0xFFFFFFFE), "which no weights do"),
    "a packed size of 4 GB": (lambda: directory(20, "<L", 0xFFFFFFFE), "forged"),
}

KINDS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a link": (lambda: special(f"{TOP}x", stat.S_IFLNK), "a link"),
    "a link for the config": (lambda: special(f"{TOP}model.safetensors", stat.S_IFLNK), "a link"),
    "a link for a folder": (lambda: special("other", stat.S_IFLNK, b"/tmp"), "a link"),
    "a pipe": (lambda: special(f"{TOP}x", stat.S_IFIFO, b""), "a link or a device"),
    "a device": (lambda: special(f"{TOP}x", stat.S_IFCHR, b""), "a link or a device"),
    "a disk": (lambda: special(f"{TOP}x", stat.S_IFBLK, b""), "a link or a device"),
    "a socket": (lambda: special(f"{TOP}x", stat.S_IFSOCK, b""), "a link or a device"),
    "a folder with content": (lambda: special(f"{TOP}x/", stat.S_IFDIR), "a link or a device"),
    "encrypted": (lambda: flagged(1), "encrypted"),
    "strongly encrypted": (lambda: flagged(0x41), "encrypted"),
    "patched data": (lambda: flagged(0x20), "damaged"),
    "bzip2": (lambda: made((f"{TOP}x", b"x"), method=zipfile.ZIP_BZIP2), "packed in a way"),
    "lzma": (lambda: made((f"{TOP}x", b"x"), method=zipfile.ZIP_LZMA), "packed in a way"),
    "an unknown method": (lambda: directory(10, "<H", 97), "packed in a way"),
    "a file and a folder": (lambda: made((f"{TOP}x", b""), (f"{TOP}x/y", b"")), "files and folders at once"),
    "no config": (lambda: made((f"{TOP}x", b""), config=False), "no config.json"),
    "nothing": (lambda: made(config=False), "no config.json"),
    "two models": (lambda: made(("other/config.json", b"{}")), "more than one model"),
    "a config twice": (lambda: made((f"{TOP}config.json", b"{}")), "twice"),
    "a name with a zero": (
        lambda: made((f"{TOP}abcd", b"x")).replace(f"{TOP}abcd".encode(), f"{TOP}ab\0d".encode()), "no name of a file",
    ),
    "an empty name": (lambda: directory(28, "<H", 0), ""),
    "a smaller size": (lambda: directory(24, "<L", 100), "damaged"),
    "a larger size": (lambda: directory(24, "<L", 6000), "does not have the size"),
    "a smaller packed size": (lambda: directory(20, "<L", 3), "damaged"),
    "another checksum": (lambda: directory(16, "<L", 1), "damaged"),
    "another name in the directory": (lambda: directory(46 + len(TOP), "<B", ord("y")), "damaged"),
    "a header elsewhere": (lambda: directory(42, "<L", 5), "damaged"),
    "a header beyond the end": (lambda: directory(42, "<L", 1 << 30), "damaged"),
    "a directory before the start": (lambda: end(12, "<L", 1 << 20), "damaged"),
    "a directory elsewhere": (lambda: end(16, "<L", 3), "damaged"),
    "a directory at the end": (lambda: end(16, "<L", 0xFFFFFFFE), "damaged"),
    "empty": (lambda: b"", "damaged"),
    "a page": (lambda: b"<html></html>", "damaged"),
    "only an end": (lambda: b"PK\x05\x06" + bytes(18), "no config.json"),
    "another archive": (lambda: b"\x1f\x8b" + bytes(100), "damaged"),
}  # fmt: skip


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Callable[[bytes, str], None]:
    """`refused(data, says)`: `download` of an archive that has come already turns it down, and leaves nothing
    anywhere."""

    def check(data: bytes, says: str) -> None:
        cache = tmp_path / "cache"
        (cache / "archives").mkdir(parents=True)
        (cache / "archives" / f"{NAME}.zip").write_bytes(data)
        run("download", NAME, "--yes", env={"FASTVLM_CACHE": str(cache)}).refused(says)
        left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
        assert left <= {"cache", "cache/archives", "cache/archives/SHA256SUMS", "cache/models"}

    return check


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names(refused: Callable[[bytes, str], None], name: str) -> None:
    refused(made((name, b"x")), "no name of a file" if "/b/c" not in name and "/7/" not in name else "folders deep")


@pytest.mark.parametrize("case", SAME)
def test_names_that_a_file_system_may_take_for_one(refused: Callable[[bytes, str], None], case: str) -> None:
    one, other = SAME[case]
    with pytest.warns(UserWarning) if one == other else pytest.MonkeyPatch.context():
        data = made((TOP + one, b"1"), (TOP + other, b"2"), config=case != "the config")
    refused(data, "twice")


@pytest.mark.parametrize("case", BOMBS)
def test_bombs(refused: Callable[[bytes, str], None], case: str) -> None:
    make, says = BOMBS[case]
    refused(make(), says)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", KINDS)
def test_kinds(refused: Callable[[bytes, str], None], case: str) -> None:
    make, says = KINDS[case]
    refused(make(), says)


@pytest.fixture(scope="module")
def plain() -> tuple[bytes, dict[str, bytes]]:
    """A small archive in order, and what it holds."""
    content = {
        "config.json": b'{"a": 1}' * 20,
        "model.safetensors": random.Random(0).randbytes(3000),
        "vocab.json": b"{}" * 300,
    }
    return made(*((TOP + name, data) for name, data in content.items()), config=False), content


def outcome(path: Path, data: bytes, out: Path) -> dict[str, bytes] | None:
    """What unpacking leaves, None where it is refused; any other error than CheckpointError goes up."""
    path.write_bytes(data)
    out.mkdir()
    try:
        unzip.unpack(unzip.read_contents(path), out)
        return {file.name: file.read_bytes() for file in out.iterdir()}
    except CheckpointError as error:
        assert (len(str(error)) < 1000 and "fetch it again" in str(error)) or "yourself" in str(error)
        return None
    finally:
        for file in out.iterdir():
            file.unlink()
        out.rmdir()


def test_cut_anywhere(plain: tuple[bytes, dict[str, bytes]], tmp_path: Path) -> None:
    data, _ = plain
    for length in range(0, len(data), 29):
        assert outcome(tmp_path / "x.zip", data[:length], tmp_path / "out") is None, length


@pytest.mark.parametrize("seed", range(3))
def test_bytes_changed_anywhere(plain: tuple[bytes, dict[str, bytes]], tmp_path: Path, seed: int) -> None:
    """200 archives with one to three bytes changed: refused, or unpacked to exactly what was packed."""
    data, content = plain
    generator = random.Random(seed)
    headers = [i for i in range(len(data)) if i < 60 or i > len(data) - 400]
    for _ in range(200):
        changed = bytearray(data)
        for _ in range(generator.randint(1, 3)):
            changed[generator.choice(headers) if generator.random() < 0.8 else generator.randrange(len(data))] = (
                generator.choice((0, 1, 0xFF, 0x7F, 0x80, generator.randrange(256)))
            )
        found = outcome(tmp_path / "x.zip", bytes(changed), tmp_path / "out")
        assert found is None or found.items() <= content.items(), bytes(changed)


def test_in_order(plain: tuple[bytes, dict[str, bytes]], tmp_path: Path, model: Path) -> None:
    data, content = plain
    assert outcome(tmp_path / "x.zip", data, tmp_path / "out") == content
    assert (
        outcome(tmp_path / "x.zip", b"#!/bin/sh\n" + data, tmp_path / "out") == content
    )  # as self-extracting ones have
    found = outcome(tmp_path / "x.zip", zipped(model), tmp_path / "out")
    assert found == {path.name: path.read_bytes() for path in model.iterdir()}
    assert outcome(tmp_path / "x.zip", streamed(content), tmp_path / "out") == content
    flat = made(("config.json", b"{}"), ("tokenizer.json", b"{}"), config=False)
    assert outcome(tmp_path / "x.zip", flat, tmp_path / "out") == {"config.json": b"{}", "tokenizer.json": b"{}"}
