"""Who is let in: hosts, origins, keys, types of bodies; names of models; addresses that may be connected to."""

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra serve is not installed")

from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.serve.fetching import is_public
from fastvlm_mlx.serve.keys import Keys, new_key
from fastvlm_mlx.serve.names import ModelNames
from fastvlm_mlx.serve.refusal import Refusal
from fastvlm_mlx.serve.security import Guard, is_loopback
from fastvlm_mlx.serve.server import Settings, address

KEY, OTHER = "sk-0123456789", "sk-abcdefghij"


async def nothing(*_: Any) -> None:
    raise AssertionError("let in")


def guard(host: str = "127.0.0.1", port: int = 8080, *keys: str) -> Guard:
    return Guard(nothing, Keys(keys), host, port)


def status(found: Guard, *headers: tuple[str, str], method: str = "GET", path: str = "/v1/models") -> int:
    """The status a request is refused with; 0 where it is let in."""
    raw = [(name.lower().encode(), value.encode()) for name, value in headers]
    try:
        found.check({"type": "http", "method": method, "path": path, "headers": raw})
    except Refusal as refusal:
        return refusal.status
    return 0


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost:8080", "[::1]:8080", "LocalHost:8080"])
def test_our_own_names(host: str) -> None:
    assert status(guard(), ("Host", host)) == 0


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.test",
        "evil.test:8080",
        "127.0.0.1",
        "127.0.0.1:8081",
        "localhost",
        "localhost:08080",
        "localhost.:8080",
        "localhost:8080.evil.test",
        "127.0.0.1.evil.test:8080",
        "user@127.0.0.1:8080",
        "127.1:8080",
        "2130706433:8080",
        "0.0.0.0:8080",
        "::1:8080",
        "[::ffff:127.0.0.1]:8080",
        "127.0.0.2:8080",
    ],
)
def test_other_hosts_are_refused(host: str) -> None:
    assert status(guard(), ("Host", host)) == 403


def test_a_host_is_needed_once() -> None:
    assert status(guard()) == 403
    assert status(guard(), ("Host", "localhost:8080"), ("Host", "localhost:8080")) == 400


def test_the_usual_port_needs_no_number() -> None:
    assert status(guard(port=80), ("Host", "localhost")) == 0
    assert status(guard(port=80), ("Host", "localhost:80")) == 0


def test_an_address_of_ones_own_choice() -> None:
    assert status(guard("127.0.0.2"), ("Host", "127.0.0.2:8080")) == 0
    assert status(guard("::1"), ("Host", "[::1]:8080")) == 0


def test_elsewhere_the_key_protects() -> None:
    found = guard("0.0.0.0", 8080, KEY)
    assert status(found, ("Host", "192.168.0.7:8080")) == 401
    assert status(found, ("Host", "mac.local:8080"), ("Authorization", f"Bearer {KEY}")) == 0
    assert status(found, ("Authorization", f"Bearer {KEY}")) == 403


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([("Origin", "http://127.0.0.1:8080")], 0),
        ([("Origin", "http://127.0.0.1:8080"), ("Sec-Fetch-Site", "same-origin")], 0),
        ([("Sec-Fetch-Site", "none")], 0),
        ([("Origin", "http://evil.test")], 403),
        ([("Origin", "https://evil.test")], 403),
        ([("Origin", "null")], 403),
        ([("Origin", "")], 403),
        ([("Origin", "file://")], 403),
        ([("Origin", "http://127.0.0.1:3000")], 403),
        ([("Origin", "http://127.0.0.1")], 403),
        ([("Origin", "http://localhost:8080")], 403),  # another origin than the one the request was sent to
        ([("Origin", "http://127.0.0.1:8080.evil.test")], 403),
        ([("Origin", "http://evil.test@127.0.0.1:8080")], 403),
        ([("Origin", "http://[::1")], 403),
        ([("Sec-Fetch-Site", "cross-site")], 403),
        ([("Sec-Fetch-Site", "same-site")], 403),
        ([("Sec-Fetch-Site", "Cross-Site")], 403),
        ([("Origin", "http://127.0.0.1:8080"), ("Sec-Fetch-Site", "cross-site")], 403),
        ([("Origin", "http://127.0.0.1:8080"), ("Origin", "http://evil.test")], 400),
    ],
)
def test_origins(headers: list[tuple[str, str]], expected: int) -> None:
    assert status(guard(), ("Host", "127.0.0.1:8080"), *headers) == expected


def test_an_origin_behind_a_proxy() -> None:
    found = guard("0.0.0.0", 8080, KEY)
    key = ("Authorization", f"Bearer {KEY}")
    assert status(found, ("Host", "vlm.example"), ("Origin", "https://vlm.example"), key) == 0
    assert status(found, ("Host", "vlm.example"), ("Origin", "https://evil.example"), key) == 403


@pytest.mark.parametrize(
    ("kind", "path", "expected"),
    [
        ("application/json", "/v1/chat/completions", 0),
        ("application/json; charset=utf-8", "/v1/chat/completions", 0),
        ('Application/JSON; charset="UTF-8"', "/v1/responses", 0),
        ("application/json; charset=utf-16", "/v1/chat/completions", 415),
        ("text/plain", "/v1/chat/completions", 415),
        ("text/plain; application/json", "/v1/chat/completions", 415),
        ("application/x-www-form-urlencoded", "/v1/chat/completions", 415),
        ("multipart/form-data; boundary=x", "/v1/chat/completions", 415),
        ("image/jpeg", "/v1/chat/completions", 415),
        ("", "/v1/chat/completions", 415),
        ("image/jpeg", "/v1/live", 0),
        ("image/png", "/live", 0),
        ("image/svg+xml", "/v1/live", 415),
        ("text/plain", "/v1/live", 415),
        ("application/json", "/v1/live", 415),
        ("", "/v1/live", 415),
    ],
)
def test_types_of_bodies(kind: str, path: str, expected: int) -> None:
    headers = [("Host", "localhost:8080"), *([("Content-Type", kind)] if kind else [])]
    assert status(guard(), *headers, method="POST", path=path) == expected


@pytest.mark.parametrize(
    ("authorization", "expected"),
    [
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        (f"Basic {KEY}", 401),
        (KEY, 401),
        (f"Bearer {KEY}x", 401),
        (f"Bearer {KEY[:-1]}", 401),
        (f"Bearer {KEY} {KEY}", 401),
        ("Bearer é", 401),
        (f"Bearer {KEY}", 0),
        (f"bearer {OTHER}", 0),
    ],
)
def test_keys(authorization: str | None, expected: int) -> None:
    headers = [("Host", "localhost:8080"), *([("Authorization", authorization)] if authorization is not None else [])]
    assert status(guard("127.0.0.1", 8080, KEY, OTHER), *headers) == expected


def test_what_needs_no_key() -> None:
    found = guard("127.0.0.1", 8080, KEY)
    assert [status(found, ("Host", "localhost:8080"), path=path) for path in ("/health", "/", "/metrics")] == [
        0,
        0,
        401,
    ]


def test_each_key_has_a_salt_of_its_own() -> None:
    keys = Keys([KEY, OTHER])
    first, second = keys.salt_of(f"Bearer {KEY}"), keys.salt_of(f"Bearer {OTHER}")
    assert first and second and first != second
    assert keys.salt_of(f"Bearer {KEY}") == first
    assert Keys().salt_of("Bearer whatever") == b""


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key is compared, by digests of one length, whichever of them is right."""
    compared: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "hmac.compare_digest", lambda one, other: compared.append((len(one), len(other))) or one == other
    )
    Keys([KEY, OTHER]).salt_of(f"Bearer {KEY}")
    assert compared == [(16, 16)] * 2


def test_the_keys_themselves_are_not_kept() -> None:
    assert KEY not in repr(vars(Keys([KEY])))


@pytest.mark.parametrize("key", ["", "sk-1234", "sk-with blank", "sk-\nsecond-line", "sk-ééééééé"])
def test_keys_that_are_none(key: str) -> None:
    with pytest.raises(OptionError, match="api_key") as found:
        Keys([KEY, key])
    assert not key or key not in str(found.value)


def test_a_new_key_is_long_and_new() -> None:
    assert len({new_key() for _ in range(10)}) == 10
    assert min(map(len, (new_key(), new_key()))) > 30


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True), ("::1", True), ("[::1]", True)]
    + [(host, False) for host in ("0.0.0.0", "::", "", "192.168.0.1", "mac.local", "localhost.evil.test")],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_others_are_let_in_with_a_key_only() -> None:
    with pytest.raises(OptionError, match="key"):
        Settings("0.0.0.0")
    assert Settings("0.0.0.0", keys=[KEY]).keyring
    for wrong in ({"port": -1}, {"port": 65536}, {"max_rows": 0}):
        with pytest.raises(OptionError):
            Settings(**wrong)  # type: ignore[arg-type]


def test_addresses() -> None:
    assert [address(host, 80) for host in ("127.0.0.1", "0.0.0.0", "::1", "::")] == [
        "http://127.0.0.1:80",
        "http://127.0.0.1:80",
        "http://[::1]:80",
        "http://[::1]:80",
    ]


def test_names_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ModelNames.of("tiny").names == ("tiny",)
    assert ModelNames.of("apple/FastVLM-0.5B").names == ("apple/FastVLM-0.5B", "FastVLM-0.5B")
    assert ModelNames.of("apple/FastVLM-0.5B@main").names == ("apple/FastVLM-0.5B@main", "FastVLM-0.5B")
    folder = tmp_path / "private" / "my-model"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    for path in (str(folder), f"{folder}/", ".", os.path.relpath(folder)):
        assert ModelNames.of(path).names == ("my-model",)


def test_a_model_by_another_name() -> None:
    names = ModelNames.of("apple/FastVLM-0.5B")
    for known in (None, "FastVLM-0.5B", "apple/FastVLM-0.5B"):
        names.check(known)
    for unknown, expected in (("gpt-4o", 404), ("", 404), ("/etc", 404), (5, 400), (["tiny"], 400)):
        with pytest.raises(Refusal) as found:
            names.check(unknown)
        assert (found.value.status, found.value.param) == (expected, "model")


@pytest.mark.parametrize("found", ["93.184.216.34", "8.8.8.8", "2606:4700:4700::1111"])
def test_public_addresses(found: str) -> None:
    assert is_public(found)


@pytest.mark.parametrize(
    "found",
    [
        "127.0.0.1",
        "127.8.8.8",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "192.0.2.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "::127.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:8.8.8.8",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd12::1",
        "ff02::1",
        "2001:db8::1",
        "64:ff9b::7f00:1",
        "64:ff9b::808:808",
        "2002:7f00:1::",
        "2001:0:7f00:1::",
        "localhost",
        "",
        "127.1",
        "0x7f000001",
    ],
)
def test_addresses_that_are_not_public(found: str) -> None:
    assert not is_public(found)
