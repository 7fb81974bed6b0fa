"""PyTorch's own files under attack: nothing in a pickle is run, and what is no table of tensors is refused in one
sentence."""

import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .changes import Attack, text, then, without
from .folders import Folder
from .forkserver import ForkServer, Run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_with_torch() -> Iterator[Run]:
    """PyTorch, whose import takes seconds, is there already."""
    pytest.importorskip("torch")
    server = ForkServer("torch")
    yield server.run
    server.stop()


class Sleeps:
    """Unpickled, it would wait for ever."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, ("__import__('time').sleep(1e6)",)


def pickled(tensors: dict[str, Any], path: Path, **options: Any) -> None:
    import torch

    torch.save(tensors, path, **options)


def small_tensors() -> dict[str, Any]:
    import torch

    return {"model.norm.weight": torch.zeros(64), "model.embed_tokens.weight": torch.zeros(512, 64)}


def rezipped(
    path: Path, change: Callable[[str, bytes], bytes] = lambda _, data: data, how: int = zipfile.ZIP_STORED
) -> None:
    """The archive with its members changed, or packed in another way."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))


def write_pickle(case: str, path: Path, evidence: Path) -> None:
    import torch

    tensors = small_tensors()
    if case == "code":
        tensors["x"] = Attack(evidence)
    elif case == "code that waits":
        tensors["x"] = Sleeps()
    elif case == "code in an old archive":
        path.write_bytes(pickle.dumps(Attack(evidence)))
        return
    elif case == "a list":
        pickled([1, 2], path)  # type: ignore[arg-type]
        return
    elif case == "numbers for names":
        tensors[7] = torch.zeros(1)  # type: ignore[index]
    elif case == "a text for a tensor":
        tensors["x"] = "text"
    elif case == "a sparse tensor":
        tensors["x"] = torch.zeros(8, 8).to_sparse()
    elif case == "complex numbers":
        tensors["x"] = torch.zeros(8, dtype=torch.complex64)
    elif case == "a number repeated":
        tensors["x"] = torch.zeros(1).expand(1 << 30)
    elif case == "only a few tensors":
        pass
    pickled(tensors, path, _use_new_zipfile_serialization=case != "the old format")
    data = path.read_bytes()
    if case == "empty":
        path.write_bytes(b"")
    elif case.startswith("cut at "):
        path.write_bytes(data[: len(data) * int(case.split()[2]) // 100])
    elif case.startswith("flipped at "):
        place = len(data) * int(case.split()[2]) // 1000
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
    elif case == "compressed":
        rezipped(path, how=zipfile.ZIP_DEFLATED)
    elif case == "a bomb":
        rezipped(
            path, lambda name, old: old + bytes(100_000_000) if name.endswith("data/0") else old, zipfile.ZIP_DEFLATED
        )
    elif case == "a directory of 1.2 MB":
        with zipfile.ZipFile(path, "a") as archive:
            for i in range(5000):
                archive.writestr(f"{i:0200}", b"")
    elif case == "noise for a pickle":
        rezipped(path, lambda name, old: b"\x80\x02" + bytes(range(200)) if name.endswith("data.pkl") else old)
    elif case == "a storage cut short":
        rezipped(path, lambda name, old: old[:10] if "/data/" in name else old)


PICKLES = {
    "code": "nothing in it was run",
    "code that waits": "nothing in it was run",
    "code in an old archive": "not an archive",
    "the old format": "not an archive",
    "a list": "a list",
    "numbers for names": "expected a table",
    "a text for a tensor": "expected a table",
    "a sparse tensor": "'x'",
    "complex numbers": "'x'",
    "a number repeated": "'x'",
    "only a few tensors": "missing",
    "empty": "not an archive",
    **{f"cut at {percent} %": "pytorch_model.bin" for percent in range(10, 100, 20)},
    "compressed": "compressed",
    "a bomb": "compressed",
    "a directory of 1.2 MB": "not an archive",
    "noise for a pickle": "nothing in it was run",
    "a storage cut short": "pytorch_model",
    **{f"flipped at {mille} in 1000": "" for mille in range(0, 1000, 125)},
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickles(run_with_torch: Run, apple: Path, tmp_path: Path, case: str) -> None:
    evidence = tmp_path / "executed"
    without("model.safetensors")(apple)
    write_pickle(case, apple / "pytorch_model.bin", evidence)
    Folder(run_with_torch, apple, apple, "llava").refused(PICKLES[case])
    assert not evidence.exists()


def test_pickles_that_could_be_the_weights(run: Run, apple: Path) -> None:
    pytest.importorskip("torch")
    then(without("model.safetensors"), text("a.pt", "x"), text("b.ckpt", "y"))(apple)
    Folder(run, apple, apple, "llava").refused("'a.pt', 'b.ckpt'")
