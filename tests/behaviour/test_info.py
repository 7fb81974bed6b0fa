"""`info`: what it says of models and machines, that it believes no file, and that `--verify` reads every byte."""

import hashlib
import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest

from fastvlm_mlx.convert import convert
from fastvlm_mlx.diagnostics import info, random_model
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.files import digests
from fastvlm_mlx.hub import caches
from fastvlm_mlx.network import memory
from fastvlm_mlx.network.memory import PARTS

from .forkserver import Run


@pytest.fixture(scope="module")
def _ours(_apple: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("info") / "ours"
    convert(_apple, out, name="someone/FastVLM-small")
    return out


@pytest.fixture
def ours(_ours: Path, tmp_path: Path) -> Path:
    """A converted folder, the test's own to change."""
    return Path(shutil.copytree(_ours, tmp_path / "ours"))


def test_a_model_for_people(run: Run, ours: Path) -> None:
    done = run("info", ours)
    done.answered()
    said = dict(line.split(None, 1) for line in done.out.decode().splitlines())
    assert said.keys() == {
        "model", "folder", "layout", "licence", "image", "tower", "decoder", "parameters", "stored", "tokenizer",
        "memory", "fits",
    }  # fmt: skip
    assert said["licence"] == f"apple-amlr, research purposes only, see {ours / 'LICENSE'}"
    assert said["layout"] == "llava" and "128 pixels, pad: 4 tokens" in said["image"]
    assert said["fits"].startswith("yes, ") and "usable" in said["fits"]
    assert all(part in said["parameters"] for part in PARTS)


@pytest.mark.slow
def test_a_model_for_programs(run: Run, ours: Path, model: Path) -> None:
    for folder, layout in ((ours, "llava"), (model, "llava"), ("tiny", "llava-training")):
        done = run("info", folder, "--json")
        done.answered()
        table = json.loads(done.out)
        assert table["layout"] == layout and table["fits"] is True
        parts = table["parameters"]
        assert parts.pop("total") == sum(parts.values()) and parts.keys() == set(PARTS)
        memory = table["memory"]
        assert memory["total"] == sum(memory["weights"].values()) + memory["cache"] + memory["activations"]
        assert sum(memory["weights"].values()) == 4 * sum(parts.values())  # in float32 on a CPU, and nothing quantised
    assert json.loads(run("info", "tiny", "--json", "--resolution", 64).out)["image"]["tokens"] == 1


def test_a_source_without_the_agreement_is_pointed_to_it(run: Run, model: Path) -> None:
    assert b"github.com/apple/ml-fastvlm/blob/main/LICENSE_MODEL" in run("info", model).out


@pytest.mark.parametrize(
    ("gigabytes", "verdict"),
    [
        (64, "yes"),
        (35, "barely"),
        (22, r"no, .*with `bits=8` about 2\d\."),
        (17, r"with `bits=4` about 1\d\."),
        (8, "use a smaller model"),
    ],
)
def test_verdicts(gigabytes: int, verdict: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """7B, in float32 on a CPU, whose programs hold a quantised matrix once more."""
    monkeypatch.setattr("fastvlm_mlx.backend.ops.current", lambda: "cpu")
    config = random_model.config("7b")
    found = info.ModelInfo("7b", tmp_path, config, 1, memory.estimate(config, backend="cpu"), gigabytes * 10**9)
    assert re.search(verdict, found.verdict), found.verdict
    assert found.fits == (not found.verdict.startswith("no"))


def test_hostile_names_stay_on_their_lines(run: Run, ours: Path) -> None:
    config = json.loads((ours / "config.json").read_text())
    config["source"] = {"name": "a\nfits yes", "layout": "\x1b[2J\u202e", "license": "mit\nlicence apple"}
    (ours / "config.json").write_text(json.dumps(config))
    done = run("info", ours)
    done.answered()
    lines = done.out.decode().splitlines()
    assert len(lines) == 12 and all(line.isprintable() for line in lines)
    assert run("info", ours, "--json").code == 0


def test_without_a_model(run: Run, tmp_path: Path) -> None:
    done = run("info", "--json", env={"FASTVLM_CACHE": str(tmp_path)})
    done.answered()
    table = json.loads(done.out)
    assert table.keys() == {
        "libraries", "machine", "memory_bytes", "usable_memory_bytes", "backend", "device", "blas", "caches",
    }  # fmt: skip
    assert table["usable_memory_bytes"] > 0 and table["libraries"].keys() >= {"fastvlm-mlx", "python", "mlx"}
    run("info", "--verify").refused("need a model")
    run("info", "--resolution", 64).refused("need a model")


def test_caches_and_how_to_clear_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "our 'own"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "tmp"))
    assert list(caches.every()) == []
    for name, size in {
        "hub/models--apple--FastVLM-0.5B/blobs/aa": 1000,
        "hub/models--apple--FastVLM-0.5B/blobs/bb.incomplete": 300,
        "hub/models--other--LLaMA/blobs/aa": 7,
        "our 'own/models/llava-fastvithd_0.5b_stage3/config.json": 20,
        "our 'own/models/.llava.fastvlm-partial/x": 20,
        "our 'own/archives/llava-fastvithd_7b_stage3.zip.part": 40,
        "our 'own/archives/llava-fastvithd_7b_stage3.zip.part.json": 2,
        "tmp/mlx/0.1/cpu/x.so": 5,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    snapshot = tmp_path / "hub/models--apple--FastVLM-0.5B/snapshots/1"
    snapshot.mkdir(parents=True)
    (snapshot / "model").symlink_to("../../blobs/aa")
    found = {cache.name: (cache.nbytes, cache.partial) for cache in caches.every()}
    assert found == {
        "apple/FastVLM-0.5B": (1300, 300), "llava-fastvithd_0.5b_stage3": (20, 0), "archives": (42, 40),
        "compiled kernels": (5, 0),
    }  # fmt: skip
    for cache in caches.every():
        assert os.system(cache.clear) == 0
    assert list(caches.every()) == [] and (tmp_path / "hub/models--other--LLaMA").exists()


# ---------------------------------------------------------------------------------------------------- --verify


def sums(folder: Path, into: Path | None = None, prefix: str = "") -> None:
    """SHA256SUMS of every file of the folder, in it or elsewhere."""
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {prefix}{path.name}" for path in sorted(folder.iterdir())
    ]
    ((into or folder) / digests.SUMS).write_text("\n".join(lines) + "\n")


def turn_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_verified(run: Run, ours: Path) -> None:
    run("info", ours, "--verify").refused("no digests to verify it by")
    sums(ours)
    done = run("info", ours, "--verify")
    done.answered()
    assert b"5 files agree with SHA256SUMS" in done.out
    (ours / "notes.txt").write_text("mine")
    done = run("info", ours, "--verify", "--json")
    assert json.loads(done.out)["verified"] == {"against": "SHA256SUMS", "files": 5, "unknown": ["notes.txt"]}


def test_verified_by_a_list_beside_it(run: Run, ours: Path, tmp_path: Path) -> None:
    sums(ours, tmp_path, "ours/")
    assert b"5 files agree" in run("info", ours, "--verify").out
    turn_a_bit(ours / "model.safetensors")
    run("info", ours, "--verify").refused("'model.safetensors' differ")


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "model.safetensors"])
def test_a_bit_turned_over_in_any_file(run: Run, ours: Path, name: str) -> None:
    sums(ours)
    turn_a_bit(ours / name)
    run("info", ours, "--verify").refused(f"{name!r} differ from SHA256SUMS", "fetch")


def test_a_file_missing(run: Run, ours: Path) -> None:
    sums(ours)
    (ours / "LICENSE").unlink()
    run("info", ours, "--verify").refused("'LICENSE' are missing")


LISTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no digests"),
    "only a comment": (b"# nothing\n", "no digests"),
    "words": (b"hello\n", "no new line"),
    "short digests": (b"abc  config.json\n", "no new line"),
    "digits that are none": (b"g" * 64 + b"  config.json\n", "no new line"),
    "one blank": (b"a" * 64 + b" config.json\n", "no new line"),
    "no name": (b"a" * 64 + b"  \n", "no new line"),
    "a name twice": ((b"a" * 64 + b"  config.json\n") * 2, "no new line"),
    "another folder": (b"a" * 64 + b"  ../config.json\n", "lie elsewhere"),
    "an absolute path": (b"a" * 64 + b"  /etc/passwd\n", "lie elsewhere"),
    "a folder below": (b"a" * 64 + b"  x/config.json\n", "lie elsewhere"),
    "bytes": (bytes(range(256)), "not UTF-8"),
    "UTF-16": ("x".encode("utf-16"), "not UTF-8"),
    "megabytes": (b"#" * 2_000_000, "more than the"),
    "a file that is not there": (b"a" * 64 + b"  other.bin\n", "missing"),
    "a long name": (b"a" * 64 + b"  " + b"x" * 5000 + b"\n", "missing"),
    "escapes": (b"a" * 64 + b"  \x1b[2J\n", "missing"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LISTS)
def test_lists_that_are_none(run: Run, ours: Path, case: str) -> None:
    content, says = LISTS[case]
    (ours / digests.SUMS).write_bytes(content)
    run("info", ours, "--verify").refused(says)


@pytest.mark.parametrize("seed", range(3))
def test_lists_changed_anywhere(ours: Path, seed: int) -> None:
    """A list with some bytes changed verifies no more than before, and says so or names what it does not know."""
    sums(ours)
    whole, generator = (ours / digests.SUMS).read_bytes(), random.Random(seed)
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(generator.randint(1, 3)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        (ours / digests.SUMS).write_bytes(
            bytes(data[: generator.randrange(len(data))] if generator.random() < 0.2 else data)
        )
        try:
            found = digests.verify(ours)
        except CheckpointError:
            continue
        assert found.files + len(found.unknown) == 5


def test_a_pipe_for_a_list(run: Run, ours: Path) -> None:
    os.mkfifo(ours / digests.SUMS)
    run("info", ours, "--verify").refused("pipe")


def test_the_hubs_own_names(ours: Path, tmp_path: Path, run: Run) -> None:
    """In the Hub's cache a large file is named by its SHA-256, a small one by what git calls it, and a snapshot links
    to them."""
    blobs, snapshot = tmp_path / "cache/blobs", tmp_path / "cache/snapshots/1"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    for path in ours.iterdir():
        data = path.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        name = hashlib.sha256(data).hexdigest() if path.suffix == ".safetensors" else git
        (blobs / name).write_bytes(data)
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    assert b"5 files agree with the Hub's digests" in run("info", snapshot, "--verify").out
    for name in ("tokenizer.json", "model.safetensors"):
        turn_a_bit(snapshot / name)
        with pytest.raises(CheckpointError, match=name):
            digests.verify(snapshot)
        turn_a_bit(snapshot / name)
    (snapshot / "LICENSE").resolve().unlink()
    with pytest.raises(CheckpointError, match="'LICENSE' are missing"):
        digests.verify(snapshot)
